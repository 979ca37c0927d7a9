"""Results as text, for a terminal."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jlt.progress import format_seconds
from jlt.report.page import result_rows
from jlt.report.results import read_study
from jlt.report.wording import number


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table as text: the first column to the left, numbers to the right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, title in enumerate(header):
        table.add_column(title, justify="left" if index == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    stream = io.StringIO()
    Console(file=stream, width=120).print(table)
    return "\n".join(line.rstrip() for line in stream.getvalue().strip("\n").splitlines())


def results_table(folder: Path) -> str:
    """Return the results of an ablation or a run, a row per system, the best of each column starred."""
    rows = [
        [row.system.name, *(f"{cell.text}{' *' if cell.best else '  '}" for cell in row.cells), row.seconds]
        for row in result_rows(read_study(folder))
    ]
    return text_table(["system", "Frechet distance  ", "inception score  ", "label agreement  ", "training"], rows)


def metrics_table(metrics: Mapping[str, Any]) -> str:
    """Return the numbers of one evaluation."""
    return text_table(["metric", "value"], [[name, number(value, 6)] for name, value in metrics.items()])


def geometry_table(geometry: Mapping[str, Any]) -> str:
    """Return the spectra of an analysis, a row per patch size."""
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
    return text_table(["tokens", "directions", "largest", "smallest", "effective rank", "participation"], rows)


def benchmark_table(measured: Mapping[str, Any]) -> str:
    """Return a benchmark's figures."""
    rows = [
        ["images per second", number(measured["img_per_second"])],
        ["seconds per step", number(measured["seconds_per_step"])],
        ["GFLOP per image", number(measured["gflop_per_image"])],
        ["GFLOP/s", number(measured["gflops"])],
        ["GFLOP/s of a matrix product", number(measured["matmul_gflops"])],
        ["MFU", f"{measured['mfu']:.1%}"],
        ["peak memory, GiB", number(measured["peak_memory_gib"])],
        ["warm-up", format_seconds(measured["warmup_seconds"])],
    ]
    title = f"{measured['preset']}, batch {measured['batch_size']}, {measured['precision']}"
    return text_table([title + (", compiled" if measured["compile"] else ", eager"), ""], rows)
