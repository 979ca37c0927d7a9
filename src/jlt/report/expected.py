"""The forecasts of clean and velocity prediction against the measurements: sentences, a table and a figure.

Imports matplotlib, so import this module only where figures are drawn.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from statistics import correlation, fmean

from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator, PercentFormatter

from jlt.config import Prediction
from jlt.report.figures import Figure, Panel, draw, draw_spreads, make_log
from jlt.report.findings import CLOSE_RATIO
from jlt.report.palette import INK, MUTED, PAPER, SYMBOL
from jlt.report.study import Spread, Study, System, grouped, spread
from jlt.report.wording import Table, listed, number, patch_text, percent, range_text, spread_text
from jlt.results.geometry import SettingForecast

MARKERS = "osD^vPX<>"


@dataclass(frozen=True)
class Check:
    """A forecast and the Frechet distance of velocity over that of clean prediction, pair by pair of equal seeds."""

    setting: str
    forecast: SettingForecast
    ratio: Spread

    def needed(self, of_width: bool) -> float:
        """Return the directions that velocity needs beyond the clean latent, as a share of all or of the width."""
        share = self.forecast.clean_over_velocity
        return share * self.forecast.dimension / self.forecast.width if of_width else share

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


POWER, WIDTH = "power of the eigenvalues (0 whitened, 1 untouched)", "width of the network"
Place = Callable[[Check], float | None]
"""The position of a setting along an axis."""
AXES: Mapping[str, tuple[str, Place]] = {
    POWER: ("the power", lambda check: check.forecast.anisotropy),
    WIDTH: ("the width", lambda check: check.forecast.width),
}
"""Quantities along a line: the label of the axis, a short name, and the value of a setting."""


def checks(study: Study) -> list[Check]:
    """Return every setting that has a forecast and measurements of both predictions."""
    found = []
    for forecast in study.forecasts:
        loss = f"{SYMBOL[forecast.loss_space]}-space loss" if study.several_losses else ""
        if ratio := spread(_ratios(study, forecast)):
            found.append(Check(patch_text(forecast.patch_size, forecast.variant, loss), forecast, ratio))
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
    expected = [check.needed(by_width) for check in found]
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
        texts.append(
            f"At {patch_text(forecast.patch_size, forecast.variant)} a width of {forecast.width} cannot output "
            f"{forecast.dimension} directions. The {SYMBOL[forecast.loss_space]}-space loss ended at {listed(losses)} "
            f"{when} out of reach for any such network."
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


def check_table(found: Sequence[Check]) -> Table:
    """Return a row per setting: the expectation, the measured ratio and its range over seeds."""
    header = ["Setting", "Expected", "Distance of v over x", "Range over seeds"]
    rows = [
        (
            check.setting,
            f"{check.expected_first or check.forecast.call}, {percent(check.forecast.clean_over_velocity)}",
            number(check.ratio.mean),
            range_text(check.ratio),
        )
        for check in found
    ]
    return Table("Expected and measured", header, rows, left=(0, 1))


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Return Spearman's rank correlation, equal values sharing their mean rank; 0 where one side is constant."""
    return correlation(_ranks(a), _ranks(b)) if len(set(a)) > 1 < len(set(b)) else 0.0


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(values)
    return [order.index(value) + (order.count(value) - 1) / 2 for value in values]


def expected_figure(found: Sequence[Check]) -> Figure | None:
    """Draw the ratio of distances against what was expected, and along the geometry and the width where they vary."""
    if len(found) < 2:
        return None
    panels = [_along(found, label) for label, (_, place) in AXES.items() if len(set(map(place, found))) > 1]
    by_width = widths_differ(found)
    caption = (
        "The Fréchet distance of velocity over that of clean prediction, pair by pair of equal seeds: above 1 the "
        "clean latent wins. Points are means over seeds, bars run from the smallest to the largest. The expectation is "
        "the number of directions of a token that velocity needs more than the clean latent (eq. 13), as a share of "
        f"{'the width of the network' if by_width else 'all of them'}."
    )
    return Figure("Expected and measured", (*panels, _against_expected(found, by_width)), caption)


def _along(found: Sequence[Check], label: str) -> Panel:
    name, place = AXES[label]

    def finish(axes: Axes) -> None:
        values = sorted({place(check) or 0.0 for check in found})
        if values[0] > 0:
            axes.set_xscale("log")
            axes.set_xticks(values, [f"{value:g}" for value in values])
            axes.xaxis.set_minor_locator(NullLocator())
        axes.set(title="Distance of velocity over clean", xlabel=label)

    ratios = [f"{number(check.ratio.mean)} at {check.setting}" for check in found]
    return _panel(found, label, place, "-", finish, f"Ratio of distances against {name}: {listed(ratios)}.")


def _against_expected(found: Sequence[Check], by_width: bool) -> Panel:
    def finish(axes: Axes) -> None:
        axes.axvline(0.0, color=MUTED.light, linewidth=1)
        what = f"needed beyond clean, of {'the width' if by_width else 'all directions'}"
        axes.set(title="Measured against expected", xlabel=what)
        axes.xaxis.set_major_formatter(PercentFormatter(1, 0))

    pairs = [f"expected {percent(check.needed(by_width))}, measured {number(check.ratio.mean)}" for check in found]
    alt = f"Ratio of distances against the expectation: {listed(pairs)}."
    return _panel(found, POWER, lambda check: check.needed(by_width), "none", finish, alt)


def _panel(
    found: Sequence[Check], along: str, place: Place, line: str, finish: Callable[[Axes], None], alt: str
) -> Panel:
    """Draw the ratios of distances by their place, for each group of settings that differ in more than `along`."""
    groups = _groups(found, along)

    def paint(axes: Axes) -> None:
        for (label, group), marker in zip(groups.items(), itertools.cycle(MARKERS), strict=False):
            points = [(at, check.ratio) for check in group if (at := place(check)) is not None]
            if line == "-":
                points.sort(key=itemgetter(0))
            face = PAPER if marker in MARKERS[1::2] else INK
            style = {"marker": marker, "linestyle": line, "color": INK.light, "markerfacecolor": face.light}
            draw_spreads(axes, points, **style, label=label)
        finish(axes)
        axes.axhline(1.0, color=MUTED.light, linewidth=1)
        make_log(axes, [bound for check in found for bound in (check.ratio.low, check.ratio.high, 1.0)])
        if len(groups) > 1:
            axes.legend(fontsize=8, frameon=False)

    return draw(paint, alt)


def _groups(found: Sequence[Check], along: str) -> dict[str, list[Check]]:
    """Return the settings by the quantities that differ in addition to the axis `along`, under names for these."""
    described: dict[str, Callable[[Check], str]] = {
        "patch": lambda check: f"patch {check.forecast.patch_size}",
        POWER: lambda check: "" if check.forecast.anisotropy is None else f"power {check.forecast.anisotropy:g}",
        WIDTH: lambda check: f"width {check.forecast.width}",
        "loss": lambda check: f"{SYMBOL[check.forecast.loss_space]}-space loss",
    }
    varied = [describe for name, describe in described.items() if name != along and len(set(map(describe, found))) > 1]
    return grouped((", ".join(filter(None, (describe(check) for describe in varied))), check) for check in found)
