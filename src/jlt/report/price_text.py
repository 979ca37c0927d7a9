"""Sentences and tables of a price, for its page and for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from jlt.report import wording
from jlt.report.wording import Table, interval_text, metric_text, number, sentence, unbroken
from jlt.results.price import Price, Priced, SamplerSetting
from jlt.results.sweep import WHOLE_INTERVAL

SOLVERS = {
    "euler": "Euler",
    "heun": "Heun",
    "midpoint": "midpoint",
    "dpmpp_2m": "DPM-Solver++(2M)",
    "ancestral": "ancestral",
}
FURTHER = ("inception_score", "recall", "label_agreement")


def by_line(points: Sequence[Priced]) -> list[Priced]:
    """Return the settings in order: those of one curve together, with a rising number of steps."""
    return sorted(points, key=lambda point: (*curve_key(point), point.steps))


def curve_key(point: SamplerSetting) -> tuple[str, float, tuple[float, float]]:
    """Return what the settings of one curve share: solver, shift and guidance interval."""
    return point.solver, point.shift, point.cfg_interval


def curves(points: Sequence[Priced]) -> list[list[Priced]]:
    """Return the settings by curve, each with a rising number of steps."""
    return [list(curve) for _, curve in groupby(by_line(points), key=curve_key)]


def verdict(result: Price) -> str:
    """State the price of the choice and of the published sampler in a sentence."""
    published = result.points[0]
    if result.choice is None:
        return (
            f"No setting comes within the error of the published sampler, {measured(published)} with "
            f"{published.evaluations} evaluations."
        )
    first, chosen = result.confirmed
    fewer = f"{chosen.evaluations} evaluations instead of {first.evaluations}"
    if chosen.within:
        return f"{fewer}: {chosen.steps} steps of {SOLVERS[chosen.solver]} suffice."
    return f"{fewer} seemed to suffice, but other images do not confirm it."


def details(result: Price) -> list[str]:
    """State the confirmed distances, their difference and the measured time."""
    if result.choice is None:
        nearest = min(result.points[1:], key=lambda point: point.difference)
        return [f"The nearest is {sampler_text(nearest)} with {nearest.evaluations} evaluations: {measured(nearest)}."]
    first, chosen = result.confirmed
    texts = [
        f"The cheapest setting within the error of the published sampler is {sampler_text(chosen)}.",
        f"On {result.num:,} images that took no part in the choice, its distance is {measured(chosen)}, that of the "
        f"published sampler {measured(first)}. The difference from the same noise is {behind(chosen)}.",
    ]
    if first.seconds and chosen.seconds:
        texts.append(
            f"An image takes {number(chosen.seconds * 1000)} ms instead of {number(first.seconds * 1000)} ms, "
            "without decoding."
        )
    return texts


def facts(result: Price) -> dict[str, str]:
    """Return the figures of the strip under the headline."""
    return {
        "Checkpoint": f"step {result.checkpoint.step:,}",
        "Guidance": "none" if result.cfg_scale == 1 else f"{result.cfg_scale:g}",
        "Settings": f"{len(result.points) - 1}, {result.num:,} images each",
        "Machine": wording.machine_text(result.machine),
    }


def sampler_text(setting: SamplerSetting) -> str:
    """Write a setting as prose does: 16-step DPM-Solver++(2M) with shift 0.5, guidance for t from 0.1 to 0.9."""
    shift = "" if setting.shift == 1 else f" with shift {setting.shift:g}"
    interval = "" if setting.cfg_interval == WHOLE_INTERVAL else f", {interval_text(setting.cfg_interval)}"
    return f"{setting.steps}-step {SOLVERS[setting.solver]}{shift}{interval}"


def measured(point: Priced) -> str:
    """Write a distance with its error."""
    return unbroken(point.value, point.error) if point.error else number(point.value, 4)


def behind(point: Priced) -> str:
    """Write by how much a setting is worse than the published sampler, with the error of the difference."""
    return unbroken(point.difference, point.difference_error) if point.difference_error else "—"


def points_table(result: Price, label: str, points: Sequence[Priced], metrics: Sequence[str] = FURTHER) -> Table:
    """Return measurements with further metrics; settings within the error of the published sampler say so."""
    further = [name for name in metrics if result.points[0].metrics[name] is not None]
    columns = ["Solver", "Steps", "Shift", "Guided times", "Evaluations", "Fréchet distance", "Against published"]
    header = [*columns, "Within error", *(sentence(wording.metric_name(name)) for name in further)]
    rows = [
        [
            SOLVERS[point.solver],
            str(point.steps),
            f"{point.shift:g}",
            "—" if result.cfg_scale == 1 else "{:g} to {:g}".format(*point.cfg_interval),
            str(point.evaluations),
            measured(point),
            behind(point),
            "yes" if point.within else "no",
            *(metric_text(name, point.metrics[name], 4) for name in further),
        ]
        for point in points
    ]
    marked = [place for place, point in enumerate(points) if point.setting == result.choice]
    return Table(label, header, rows, left=(0, 3, 7), marked=marked)


def price_table(result: Price) -> str:
    """Return all settings, the cheapest first, and the confirmation as text, for a terminal."""
    # A terminal has no room for more metrics.
    tables = [points_table(result, "", found, ()) for found in (result.points, result.confirmed) if found]
    texts = [wording.text_table(table.header, table.rows, left=table.left) for table in tables]
    return "\n\n".join([*texts, verdict(result), *details(result), result.reproduce])
