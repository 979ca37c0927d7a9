"""The page of a price: Frechet distance against evaluations, and the cheapest setting that suffices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jlt.report import palette
from jlt.report.price_figure import price_figure
from jlt.report.price_text import by_line, details, facts, points_table, verdict
from jlt.report.study import flatten
from jlt.results.files import read_result
from jlt.results.price import Price


def price_context(folder: Path) -> dict[str, Any]:
    """Return what the template shows of a price; JLTError for a damaged file."""
    result = read_result(Price, folder / Price.FILE)
    points = [result.points[0], *by_line(result.points[1:])]
    return {
        "result": result,
        "title": result.title,
        "verdict": verdict(result),
        "details": details(result),
        "facts": facts(result),
        "confirmed": points_table(result, "Confirmed settings", result.confirmed),
        "figure": price_figure(result),
        "points": points_table(result, "All settings", points),
        "protocol": flatten(result.points[0].protocol),
        "machine_and_latents": flatten({"machine": result.machine, "latents": result.latents}),
        "more_colours": [(f"t{place}", colour) for place, colour in enumerate(palette.TIME)],
    }
