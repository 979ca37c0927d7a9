"""The results table of a study: a row per system."""

from __future__ import annotations

from dataclasses import dataclass

from jlt.report import palette
from jlt.report.study import MEASUREMENTS, Spread, Study, System, spread
from jlt.report.wording import metric_name, metric_text, range_text, sentence
from jlt.results.evaluation import LOWER_IS_BETTER
from jlt.runtime.progress import format_seconds

MEASUREMENT_HEADS = [
    f"{sentence(metric_name(name))} {'↓' if name in LOWER_IS_BETTER else '↑'}" for name in MEASUREMENTS
]


@dataclass(frozen=True)
class Cell:
    """One number of the results table, its range over seeds, and whether it is the best of its column."""

    text: str
    span: str
    best: bool


@dataclass(frozen=True)
class Row:
    """One system of the results table."""

    system: System
    swatch: str
    title: str
    kind: str
    cells: tuple[Cell, ...]
    seconds: str
    note: str


def result_rows(study: Study) -> list[Row]:
    """Return the results table at the final step, by patch size and then by Frechet distance."""
    measured = {
        metric: [system.measured(metric, study.final_step) for system in study.systems] for metric in MEASUREMENTS
    }
    best = {}
    for metric, values in measured.items():
        means = [value.mean for value in values if value and len(values) > 1]
        best[metric] = (min if metric in LOWER_IS_BETTER else max)(means, default=None)
    rows = []
    for place, system in enumerate(study.systems):
        seconds = spread(run.log.seconds for run in system.runs)
        traits = [system.variant] * bool(system.variant)
        traits += [f"{palette.SYMBOL[system.loss_space]}-space loss"] * study.several_losses
        distance = measured["frechet_distance"][place]
        row = Row(
            system,
            palette.swatch(system.prediction, system.patch_size),
            ", ".join([system.name, *traits]),
            ", ".join([palette.SHORT_NAMES[system.prediction], f"patch {system.patch_size}", *traits]),
            tuple(_cell(metric, values[place], best[metric]) for metric, values in measured.items()),
            format_seconds(seconds.mean) if seconds else "—",
            _row_note(system, distance, study),
        )
        rows.append((system.patch_size, distance.mean if distance else float("inf"), row))
    return [row for *_, row in sorted(rows, key=lambda item: item[:2])]


def _cell(metric: str, value: Spread | None, best: float | None) -> Cell:
    if value is None:
        return Cell("—", "", False)
    return Cell(metric_text(metric, value.mean), range_text(value, metric), value.mean == best)


def _row_note(system: System, final: Spread | None, study: Study) -> str:
    """Return what is missing from a row, empty if nothing is."""
    if final is None:
        reached = max((run.reached for run in system.runs), default=0)
        return f"at step {reached:,}; not evaluated at {study.final_step:,}" if study.final_step else "not evaluated"
    return f"{final.count} of {study.seeds} seeds" if final.count < study.seeds else ""
