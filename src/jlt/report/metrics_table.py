"""The numbers of one evaluation as text, for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jlt.report.text_table import text_table
from jlt.report.wording import number, percent, with_error

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
