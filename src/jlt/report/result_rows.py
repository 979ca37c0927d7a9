"""The results table of a study: a row per system."""

from __future__ import annotations

from dataclasses import dataclass

from jlt.report import palette
from jlt.report.results import MEASUREMENTS, Spread, Study, System, spread
from jlt.report.wording import number, percent
from jlt.runtime.progress import format_seconds

HIGHER_IS_BETTER = {"frechet_distance": False, "inception_score": True, "label_agreement": True}


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
    step = study.final_step
    measured = {
        metric: [system.measured(metric, step) if step is not None else None for system in study.systems]
        for metric in MEASUREMENTS
    }
    best = {metric: _best(metric, values) for metric, values in measured.items()}
    rows = []
    for index, system in enumerate(study.systems):
        cells = []
        for metric in MEASUREMENTS:
            value = measured[metric][index]
            write = percent if metric == "label_agreement" else number
            span = f"{write(value.low)} to {write(value.high)}" if value is not None and value.count > 1 else ""
            marked = value is not None and len(study.systems) > 1 and value.mean == best[metric]
            cells.append(Cell(write(value.mean) if value else "—", span, marked))
        seconds = spread(run.log.seconds for run in system.runs if run.log.seconds is not None)
        rows.append(
            Row(
                system,
                palette.swatch(system.prediction, system.patch_size),
                ", ".join([system.name, *_apart(system, study)]),
                ", ".join(
                    [palette.SHORT_WORDS[system.prediction], f"patch {system.patch_size}", *_apart(system, study)]
                ),
                tuple(cells),
                format_seconds(seconds.mean) if seconds else "—",
                _row_note(system, measured["frechet_distance"][index], study),
            )
        )
    order = {index: value.mean if value else float("inf") for index, value in enumerate(measured["frechet_distance"])}
    return [rows[index] for index in sorted(order, key=lambda index: (study.systems[index].patch_size, order[index]))]


def _apart(system: System, study: Study) -> list[str]:
    """Return words for what sets a system apart from others of its name: variant, and loss space where that varies."""
    several = len({other.loss_space for other in study.systems}) > 1
    loss = [f"{palette.SYMBOL[system.loss_space]}-space loss"] if several else []
    return [system.variant, *loss] if system.variant else loss


def _best(metric: str, values: list[Spread | None]) -> float | None:
    means = [value.mean for value in values if value is not None]
    return (max if HIGHER_IS_BETTER[metric] else min)(means, default=None)


def _row_note(system: System, final: Spread | None, study: Study) -> str:
    """Say what is missing from a row, empty if nothing is."""
    if final is None:
        reached = max((run.reached for run in system.runs), default=0)
        return f"at step {reached:,}; not evaluated at {study.final_step:,}" if study.final_step else "not evaluated"
    seeds = max(len(other.runs) for other in study.systems)
    return f"{final.count} of {seeds} seeds" if final.count < seeds else ""
