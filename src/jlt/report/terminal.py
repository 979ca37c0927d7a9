"""Results as text, for a terminal."""

from __future__ import annotations

import textwrap
from pathlib import Path

from jlt.report.findings import compared_text, verdict
from jlt.report.geometry_text import advice_sentences, inside_sentences, whole_rows
from jlt.report.result_rows import result_rows
from jlt.report.study import read_study
from jlt.report.wording import TEXT_WIDTH, metric_text, number, text_table, with_error
from jlt.results.evaluation import SPREAD_OF, Evaluation, Metrics
from jlt.results.geometry import ErrorByDirection, Geometry


def results_table(folder: Path) -> str:
    """Return the results of an ablation or a run: a row per system, stars at the best numbers, and the verdict."""
    study = read_study(folder)
    rows = [
        [row.title, *(f"{cell.text}{' *' if cell.best else '  '}" for cell in row.cells), row.seconds]
        for row in result_rows(study)
    ]
    header = ["system", "Frechet distance  ", "inception score  ", "label agreement  ", "training"]
    compared = f"{compared_text(study.protocol)}\n\n" if study.protocol else ""
    return f"{compared}{text_table(header, rows)}\n\n{textwrap.fill(verdict(study), TEXT_WIDTH)}"


def evaluation_table(evaluation: Evaluation) -> str:
    """Return what was compared in which features, and the numbers."""
    return f"{compared_text(evaluation.protocol, evaluation.metrics.count)}\n\n{metrics_table(evaluation.metrics)}"


def metrics_table(metrics: Metrics) -> str:
    """Return the numbers of one evaluation, a row per metric, with its error; a dash is what could not be measured."""
    rows = []
    for name, value in vars(metrics).items():
        if name in SPREAD_OF.values():
            continue
        error = metrics[SPREAD_OF[name]] if name in SPREAD_OF else None
        text = f"{value:,}" if name == "count" else metric_text(name, value, 4)
        cells = (text, "") if error is None else with_error(value, error)
        rows.append([name.replace("_", " "), *cells])
    return text_table(["metric", "value", ""], rows, left=(0, 2))


def geometry_table(geometry: Geometry, inside: ErrorByDirection | None = None) -> str:
    """Return the spectra of an analysis, a row per patch size, the advice, and the errors of networks."""
    rows = []
    for size, entry in geometry.tokens.items():
        figures = (entry.eigenvalues[0], entry.eigenvalues[-1], entry.effective_rank, entry.participation_ratio)
        rows.append([f"patch {size}", str(entry.dimension), *map(number, figures)])
    tables = [text_table(["tokens", "directions", "largest", "smallest", "effective rank", "participation"], rows)]
    if whole := whole_rows(geometry):
        header = ["whole latents", "directions", "effective rank", "participation", "below 0.1", "share", "known to"]
        tables.append(text_table(header, whole))
    texts = [*advice_sentences(geometry), *(inside_sentences(inside) if inside else [])]
    return "\n\n".join([*tables, *(textwrap.fill(text, TEXT_WIDTH) for text in texts)])
