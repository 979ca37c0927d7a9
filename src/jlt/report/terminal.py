"""Results as text, for a terminal."""

from __future__ import annotations

import textwrap
from pathlib import Path

from jlt.report.findings import verdict
from jlt.report.geometry_rows import whole_rows
from jlt.report.geometry_sentences import advice_sentences, inside_sentences
from jlt.report.result_rows import result_rows
from jlt.report.results import read_study
from jlt.report.text_table import TEXT_WIDTH, text_table
from jlt.report.wording import number
from jlt.results.geometry import ErrorByDirection, Geometry


def results_table(folder: Path) -> str:
    """Return the results of an ablation or a run, a row per system, the best of columns starred, and the verdict."""
    study = read_study(folder)
    rows = [
        [row.title, *(f"{cell.text}{' *' if cell.best else '  '}" for cell in row.cells), row.seconds]
        for row in result_rows(study)
    ]
    header = ["system", "Frechet distance  ", "inception score  ", "label agreement  ", "training"]
    return f"{text_table(header, rows)}\n\n{textwrap.fill(verdict(study), TEXT_WIDTH)}"


def geometry_table(geometry: Geometry, inside: ErrorByDirection | None = None) -> str:
    """Return the spectra of an analysis, a row per patch size, the advice, and the errors of networks."""
    rows = [
        [
            f"patch {size}",
            str(entry.dimension),
            number(entry.eigenvalues[0]),
            number(entry.eigenvalues[-1]),
            number(entry.effective_rank),
            number(entry.participation_ratio),
        ]
        for size, entry in geometry.tokens.items()
    ]
    tables = [text_table(["tokens", "directions", "largest", "smallest", "effective rank", "participation"], rows)]
    if whole := whole_rows(geometry):
        header = ["whole latents", "directions", "effective rank", "participation", "below 0.1", "share", "known to"]
        tables.append(text_table(header, whole))
    texts = [*advice_sentences(geometry), *(inside_sentences(inside) if inside else [])]
    return "\n\n".join([*tables, *(textwrap.fill(text, TEXT_WIDTH) for text in texts)])
