"""Results as text, for a terminal."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from jlt.report.findings import inside_sentences, verdict
from jlt.report.geometry_rows import whole_rows
from jlt.report.page import result_rows
from jlt.report.results import read_study
from jlt.report.wording import number, percent, with_error

TEXT_WIDTH = 100


def text_table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    left: Collection[int] = (0,),
    widths: Mapping[int, int] | None = None,
) -> str:
    """Return a table as text: columns of words (`left`) to the left, numbers to the right.

    `widths` are the least widths of columns, for tables whose columns have to stand under each other.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, title in enumerate(header):
        width = (widths or {}).get(index)
        table.add_column(title, justify="left" if index in left else "right", no_wrap=True, min_width=width)
    for row in rows:
        table.add_row(*row)
    stream = io.StringIO()
    Console(file=stream, width=120).print(table)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()).strip("\n")


def results_table(folder: Path) -> str:
    """Return the results of an ablation or a run, a row per system, the best of columns starred, and the verdict."""
    study = read_study(folder)
    rows = [
        [row.title, *(f"{cell.text}{' *' if cell.best else '  '}" for cell in row.cells), row.seconds]
        for row in result_rows(study)
    ]
    header = ["system", "Frechet distance  ", "inception score  ", "label agreement  ", "training"]
    return f"{text_table(header, rows)}\n\n{textwrap.fill(verdict(study), TEXT_WIDTH)}"


SHARES = ("precision", "recall", "coverage", "label_agreement")
SPREADS = {
    "frechet_distance": "frechet_distance_error",
    "inception_score": "inception_score_std",
    "kernel_distance": "kernel_distance_std",
}
"""Metrics with what is written behind them as plus or minus."""


def metrics_table(metrics: Mapping[str, Any]) -> str:
    """Return the numbers of one evaluation, a metric a row, with its error; a dash is what could not be measured."""
    rows = []
    for name, value in metrics.items():
        if name in SPREADS.values():
            continue
        spread = metrics.get(SPREADS.get(name, ""))
        if value is None or name == "count":
            cells = ["—" if value is None else f"{value:,}", ""]
        elif name in SHARES:
            cells = [percent(value), ""]
        elif spread is None:
            cells = [number(value, 4), ""]
        else:
            cells = list(with_error(value, spread))
        rows.append([name.replace("_", " "), *cells])
    return text_table(["metric", "value", ""], rows, left=(0, 2))


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


def encode_benchmark_table(measured: Mapping[str, Any]) -> str:
    """Return the figures of the encoding benchmark."""
    rows = [
        ["images per second, encoding", number(measured["img_per_second"])],
        ["images per second, autoencoder alone", number(measured["bare_img_per_second"])],
        ["ratio", f"{measured['ratio']:.1%}"],
        ["peak memory, MiB", number(measured["peak_memory_mib"], 4)],
    ]
    rows += [
        [f"peak memory for {int(count):,} small images, MiB", number(mib, 4)]
        for count, mib in measured["memory_mib_by_images"].items()
    ]
    name, precision = measured["autoencoder"]["name"], measured["precision"]
    title = f"{name}, {measured['resolution']} px, batch {measured['batch_size']}, {precision}"
    return text_table([title, ""], rows)


WAYS = {
    "loader": "the trainer's loader",
    "loader_float32": "... with conversion to float32",
    "gather": "gather into new memory, not ahead",
    "memory_map": "rows copied out of memory maps",
    "memory_copy": "copy of batches in memory",
    "per_sample_alone": "per sample through safetensors",
    "per_sample_workers": "... in worker processes",
    "computing": "matrix products, nothing read",
    "computing_gather": "... and gather in turn",
    "computing_loader": "... and the loader beside them",
}


def data_benchmark_table(measured: Mapping[str, Any]) -> str:
    """Return the figures of a benchmark of reading."""
    rates, ratios = measured["latents_per_second"], measured["loader_ratio"]
    rows = [[label, f"{rates[way]:,.0f}", number(ratios[way])] for way, label in WAYS.items()]
    shape = "x".join(map(str, measured["shape"]))
    title = f"{measured['latents']['count']} latents, {shape} {measured['dtype']}, batch {measured['batch_size']}"
    opening, memory = measured["opening"], measured["epoch_memory"]
    facts = [
        ["reading hidden behind computing", f"{measured['hidden']:.0%}"],
        ["opening the store", f"{opening['seconds'] * 1e3:.3g} ms"],
        [
            f"opening {opening['large_count']:,} latents in {opening['large_shards']} shards",
            f"{opening['large_seconds'] * 1e3:.3g} ms",
        ],
        *(
            [f"peak memory of an epoch of {memory[f'{size}_count']:,}", f"{memory[f'{size}_bytes'] / 2**20:.0f} MiB"]
            for size in ("small", "large")
        ),
        ["their ratio", number(memory["ratio"])],
    ]
    return text_table([title, "latents/s", "loader's ratio"], rows) + "\n\n" + text_table(["besides", ""], facts)
