"""What was expected of clean and velocity prediction before the training, against what was measured after it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from jlt.config import Prediction
from jlt.report.findings import CLOSE_RATIO
from jlt.report.palette import SYMBOL
from jlt.report.study import Spread, Study, System, spread
from jlt.report.wording import listed, number, percent, spread_text
from jlt.results import SettingForecast

NOTHING = 1e-3
"""Of a loss: what is less is not told as a number."""


@dataclass(frozen=True)
class Check:
    """One geometry, network and loss: how many directions more than the clean latent velocity was expected to need, and
    the Frechet distance of velocity over that of clean prediction, pair by pair of equal seeds.
    """

    setting: str
    anisotropy: float | None
    patch_size: int
    width: int
    loss_space: str
    expected: float
    """As a share of all directions."""
    load: float
    """As a share of the network's width."""
    call: str
    """x, v or eps; even; or undecided."""
    ratio: Spread
    before_training: bool

    @property
    def measured_first(self) -> str | None:
        """Of x and v the one that won for every seed, or clearly with a single one; None where that cannot be said."""
        clear = CLOSE_RATIO if self.ratio.count == 1 else 1.0
        if self.ratio.low > clear:
            return "x"
        return "v" if self.ratio.high < 1 / clear else None

    @property
    def expected_first(self) -> str | None:
        """Of x and v the one that was expected to win; None where the model did not say."""
        if self.call in ("even", "undecided"):
            return None
        return "x" if self.expected > 0 else "v"


def checks(study: Study) -> list[Check]:
    """Return every setting of which something was expected and in which both predictions were measured."""
    several = len({system.loss_space for system in study.systems}) > 1
    found = []
    for forecast in study.forecasts:
        ratio = spread(_ratios(study, forecast))
        if ratio is None:
            continue
        space, beyond = forecast.loss_space, forecast.clean_over_velocity
        told = ", ".join(filter(None, [forecast.variant, f"{SYMBOL[space]}-space loss" * several]))
        found.append(
            Check(
                setting=f"patch {forecast.patch_size}{f' ({told})' if told else ''}",
                anisotropy=forecast.anisotropy,
                patch_size=forecast.patch_size,
                width=forecast.width,
                loss_space=space,
                expected=beyond,
                load=beyond * forecast.dimension / forecast.width,
                call=forecast.call,
                ratio=ratio,
                before_training=forecast.before_training,
            )
        )
    return found


def widths_differ(found: Sequence[Check]) -> bool:
    """Say whether directions have to be counted in units of the width, since networks differ in it."""
    return len({check.width for check in found}) > 1


def _ratios(study: Study, forecast: SettingForecast) -> list[float]:
    """Return the distance of velocity over that of clean prediction at the final step, for every seed of both."""
    of = {system.prediction: _by_seed(system, study.final_step) for system in _systems_of(study, forecast)}
    clean, velocity = of.get("x", {}), of.get("v", {})
    return [velocity[seed] / clean[seed] for seed in sorted(clean.keys() & velocity.keys()) if clean[seed] > 0]


def _by_seed(system: System, step: int | None) -> dict[int, float]:
    found = {}
    for run in system.runs:
        if evaluation := run.at(step):
            found[run.seed] = evaluation.metrics.frechet_distance
    return found


def check_sentences(found: Sequence[Check]) -> list[str]:
    """Say how the expectation fared, whichever way it went."""
    if not found:
        return []
    called = [check for check in found if check.expected_first]
    decided = [check for check in called if check.measured_first]
    right = [check for check in decided if check.expected_first == check.measured_first]
    wrong = [check.setting for check in decided if check not in right]
    texts = []
    when = "before the training" if all(check.before_training for check in found) else "from the latents alone"
    if len(decided) == 1:
        texts.append(f"The prediction that was expected to win at {decided[0].setting} {'lost' if wrong else 'won'}.")
    elif decided:
        texts.append(
            f"In {len(right)} of {len(decided)} settings that were called {when} and that the measurements decide, the "
            f"prediction that won is the one that was expected{f'; not at {listed(wrong)}' if wrong else ''}."
        )
    told = {
        "Called for one of them, but not decided by what was measured": [c for c in called if c not in decided],
        "Called even": [check for check in found if check.call == "even"],
        "Not called, since the model does not say": [check for check in found if check.call == "undecided"],
    }
    for words, some in told.items():
        if some:
            ratios = listed([f"{number(check.ratio.mean)} at {check.setting}" for check in some])
            texts.append(f"{words}: the distance of velocity over that of clean prediction came to {ratios}.")
    by_width = widths_differ(found)
    expected = [check.load if by_width else check.expected for check in found]
    if len(set(expected)) > 2:
        unit = ", in units of the width," if by_width else ""
        correlation = rank_correlation(expected, [check.ratio.mean for check in found])
        texts.append(
            f"The rank correlation of what was expected{unit} with what was measured is {number(correlation, 2)} over "
            f"{len(found)} settings (1 is the same order, 0 none, minus 1 the reverse)."
        )
    return texts


def floor_sentences(study: Study) -> list[str]:
    """Say what the loss could not fall below where a network is narrower than its tokens, and to where it fell."""
    texts = []
    for forecast in study.forecasts:
        floor, measured = forecast.advice[0].loss_floor, _final_losses(study, forecast)
        if forecast.width >= forecast.dimension or not measured:
            continue
        told = [
            f"{SYMBOL[name]} {spread_text(loss)}, of which {_share_out_of_reach(floor[name] / loss.mean)}"
            for name, loss in measured.items()
        ]
        said = "had been said to be" if forecast.before_training else "is, by the latents alone,"
        where = f"patch {forecast.patch_size}" + f" ({forecast.variant})" * bool(forecast.variant)
        texts.append(
            f"At {where} a width of {forecast.width} cannot put out {forecast.dimension} directions. The "
            f"{SYMBOL[forecast.loss_space]}-space loss ended at {listed(told)} {said} out of reach for any such "
            "network."
        )
    return texts


def _share_out_of_reach(share: float) -> str:
    return "nothing" if share < NOTHING else f"{number(100 * share, 2)}%"


def _final_losses(study: Study, forecast: SettingForecast) -> dict[Prediction, Spread]:
    """Return the training loss of every prediction, over the last tenth of the steps, by seeds."""
    found: dict[Prediction, Spread] = {}
    for system in _systems_of(study, forecast):
        last = [run.log.steps[-max(1, len(run.log.steps) // 10) :] for run in system.runs if run.log.steps]
        loss = spread(fmean(logged.loss for logged in steps) for steps in last)
        if loss is not None:
            found[system.prediction] = loss
    return found


def _systems_of(study: Study, forecast: SettingForecast) -> list[System]:
    return [s for s in study.systems if (s.variant, s.patch_size, s.loss_space) == forecast.setting]


def check_rows(found: Sequence[Check]) -> list[tuple[str, str, str, str]]:
    """Return setting, what was expected, the measured ratio and its range over seeds, as text."""
    return [
        (
            check.setting,
            f"{check.expected_first or check.call}, {percent(check.expected)}",
            number(check.ratio.mean),
            f"{number(check.ratio.low)} to {number(check.ratio.high)}" if check.ratio.count > 1 else "",
        )
        for check in found
    ]


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Return Spearman's rank correlation, equal values sharing their mean rank; 0 where one side is constant."""
    ranks = [_ranks(values) for values in (a, b)]
    mean = (len(a) - 1) / 2
    x, y = ([rank - mean for rank in side] for side in ranks)
    norm = math.sqrt(sum(value**2 for value in x) * sum(value**2 for value in y))
    return sum(p * q for p, q in zip(x, y, strict=True)) / norm if norm else 0.0


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(values)
    return [order.index(value) + (order.count(value) - 1) / 2 for value in values]
