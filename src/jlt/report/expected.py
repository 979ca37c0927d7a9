"""The forecasts of clean and velocity prediction against the measurements after the training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import correlation, fmean

from jlt.config import Prediction
from jlt.report.findings import CLOSE_RATIO
from jlt.report.palette import SYMBOL
from jlt.report.study import Spread, Study, System, spread
from jlt.report.wording import listed, number, percent, spread_text
from jlt.results.geometry import SettingForecast


@dataclass(frozen=True)
class Check:
    """A forecast and the Frechet distance of velocity over that of clean prediction, pair by pair of equal seeds."""

    setting: str
    forecast: SettingForecast
    ratio: Spread

    @property
    def load(self) -> float:
        """Directions that velocity was expected to need beyond the clean latent, as a share of the network's width."""
        return self.forecast.clean_over_velocity * self.forecast.dimension / self.forecast.width

    @property
    def measured_first(self) -> str | None:
        """Of x and v the one that won for every seed, or clearly with a single one; None where it is not decided."""
        clear = CLOSE_RATIO if self.ratio.count == 1 else 1.0
        if self.ratio.low > clear:
            return "x"
        return "v" if self.ratio.high < 1 / clear else None

    @property
    def expected_first(self) -> str | None:
        """Of x and v the one that was expected to win; None where the model did not decide."""
        if self.forecast.call in ("even", "undecided"):
            return None
        return "x" if self.forecast.clean_over_velocity > 0 else "v"


def checks(study: Study) -> list[Check]:
    """Return every setting that has a forecast and measurements of both predictions."""
    several = len({system.loss_space for system in study.systems}) > 1
    found = []
    for forecast in study.forecasts:
        loss = f"{SYMBOL[forecast.loss_space]}-space loss" if several else ""
        more = ", ".join(filter(None, [forecast.variant, loss]))
        setting = f"patch {forecast.patch_size}{f' ({more})' if more else ''}"
        if ratio := spread(_ratios(study, forecast)):
            found.append(Check(setting, forecast, ratio))
    return found


def widths_differ(found: Sequence[Check]) -> bool:
    """Return whether networks differ in width, so that directions are counted in units of it."""
    return len({check.forecast.width for check in found}) > 1


def _ratios(study: Study, forecast: SettingForecast) -> list[float]:
    """Return the distance of velocity over that of clean prediction at the final step, for every seed of both."""
    distances = {
        (system.prediction, run.seed): evaluation.metrics.frechet_distance
        for system in _systems_of(study, forecast)
        for run in system.runs
        if (evaluation := run.at(study.final_step))
    }
    clean = {seed: value for (name, seed), value in sorted(distances.items()) if name == "x" and value > 0}
    return [distances["v", seed] / value for seed, value in clean.items() if ("v", seed) in distances]


def check_sentences(found: Sequence[Check]) -> list[str]:
    """Compare the forecasts with the measurements, the failed ones included."""
    if not found:
        return []
    called = [check for check in found if check.expected_first]
    decided = [check for check in called if check.measured_first]
    right = [check for check in decided if check.expected_first == check.measured_first]
    wrong = [check.setting for check in decided if check not in right]
    texts = []
    if len(decided) == 1:
        texts.append(f"The prediction that was expected to win at {decided[0].setting} {'lost' if wrong else 'won'}.")
    elif decided:
        before = all(check.forecast.before_training for check in found)
        texts.append(
            f"In {len(right)} of {len(decided)} settings with a forecast "
            f"{'before the training' if before else 'from the latents alone'} and a decisive measurement, the "
            f"expected prediction won{f'; not at {listed(wrong)}' if wrong else ''}."
        )
    groups = {
        "Expected to differ, but not decided by the measurements": [c for c in called if c not in decided],
        "Expected to be even": [c for c in found if c.forecast.call == "even"],
        "Without a forecast, since the model does not decide": [c for c in found if c.forecast.call == "undecided"],
    }
    for group, members in groups.items():
        if members:
            ratios = listed([f"{number(check.ratio.mean)} at {check.setting}" for check in members])
            texts.append(f"{group}: the distance of velocity over that of clean prediction is {ratios}.")
    by_width = widths_differ(found)
    expected = [check.load if by_width else check.forecast.clean_over_velocity for check in found]
    if len(set(expected)) > 2:
        unit = ", in units of the width," if by_width else ""
        rank = rank_correlation(expected, [check.ratio.mean for check in found])
        texts.append(
            f"The rank correlation of the expectation{unit} with the measurement is {number(rank, 2)} over "
            f"{len(found)} settings (1 is the same order, 0 none, minus 1 the reverse)."
        )
    return texts


def floor_sentences(study: Study) -> list[str]:
    """Compare the final loss with its floor where a network is narrower than its tokens."""
    texts = []
    for forecast in study.forecasts:
        measured = _final_losses(study, forecast)
        if forecast.width >= forecast.dimension or not measured:
            continue
        losses = [
            f"{SYMBOL[name]} {spread_text(loss)}, of which {_share_out_of_reach(floor / loss.mean)}"
            for name, floor in forecast.advice[0].loss_floor.items()
            if (loss := measured.get(name))
        ]
        when = "was forecast to be" if forecast.before_training else "is, by the latents alone,"
        where = f"patch {forecast.patch_size}" + f" ({forecast.variant})" * bool(forecast.variant)
        texts.append(
            f"At {where} a width of {forecast.width} cannot output {forecast.dimension} directions. The "
            f"{SYMBOL[forecast.loss_space]}-space loss ended at {listed(losses)} {when} out of reach for any such "
            "network."
        )
    return texts


def _share_out_of_reach(share: float) -> str:
    return "nothing" if share < 1e-3 else f"{number(100 * share, 2)}%"


def _final_losses(study: Study, forecast: SettingForecast) -> dict[Prediction, Spread]:
    """Return the training loss of every prediction, over the last tenth of the steps, by seeds."""
    losses = {
        system.prediction: spread(
            fmean(logged.loss for logged in steps[-max(1, len(steps) // 10) :])
            for run in system.runs
            if (steps := run.log.steps)
        )
        for system in _systems_of(study, forecast)
    }
    return {name: loss for name, loss in losses.items() if loss}


def _systems_of(study: Study, forecast: SettingForecast) -> list[System]:
    return [s for s in study.systems if (s.variant, s.patch_size, s.loss_space) == forecast.setting]


def check_rows(found: Sequence[Check]) -> list[tuple[str, str, str, str]]:
    """Return the setting, the expectation, the measured ratio and its range over seeds, as text."""
    return [
        (
            check.setting,
            f"{check.expected_first or check.forecast.call}, {percent(check.forecast.clean_over_velocity)}",
            number(check.ratio.mean),
            f"{number(check.ratio.low)} to {number(check.ratio.high)}" if check.ratio.count > 1 else "",
        )
        for check in found
    ]


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Return Spearman's rank correlation, equal values sharing their mean rank; 0 where one side is constant."""
    return correlation(_ranks(a), _ranks(b)) if len(set(a)) > 1 < len(set(b)) else 0.0


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(values)
    return [order.index(value) + (order.count(value) - 1) / 2 for value in values]
