"""Results as text, for a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jlt.report.findings import verdict
from jlt.report.geometry_rows import whole_rows
from jlt.report.geometry_sentences import inside_sentences
from jlt.report.result_rows import result_rows
from jlt.report.results import read_study
from jlt.report.text_table import TEXT_WIDTH, text_table
from jlt.report.wording import number


def results_table(folder: Path) -> str:
    """Return the results of an ablation or a run, a row per system, the best of columns starred, and the verdict."""
    study = read_study(folder)
    rows = [
        [row.title, *(f"{cell.text}{' *' if cell.best else '  '}" for cell in row.cells), row.seconds]
        for row in result_rows(study)
    ]
    header = ["system", "Frechet distance  ", "inception score  ", "label agreement  ", "training"]
    return f"{text_table(header, rows)}\n\n{textwrap.fill(verdict(study), TEXT_WIDTH)}"


def geometry_table(geometry: Mapping[str, Any]) -> str:
    """Return the spectra of an analysis, a row per patch size, and the advice for each patch size and width."""
    rows = [
        [
            f"patch {size}",
            str(entry["dimension"]),
            number(entry["eigenvalues"][0]),
            number(entry["eigenvalues"][-1]),
            number(entry["effective_rank"]),
            number(entry["participation_ratio"]),
        ]
        for size, entry in geometry["tokens"].items()
    ]
    table = text_table(["tokens", "directions", "largest", "smallest", "effective rank", "participation"], rows)
    whole = [[*cells] for cells in whole_rows(geometry)]
    if whole:
        header = ["whole latents", "directions", "effective rank", "participation", "below 0.1", "share", "known to"]
        table += "\n\n" + text_table(header, whole)
    advice = [
        f"Patch {size}, width {advice['width']}: {advice['words']}"
        for size, entry in geometry["tokens"].items()
        for advice in entry["forecast"]["advice"]
    ]
    inside = inside_sentences(geometry["inside"]) if "inside" in geometry else []
    return "\n\n".join([table, *(textwrap.fill(words, TEXT_WIDTH) for words in [*advice, *inside])])
