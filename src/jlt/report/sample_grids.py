"""The pictures of a report: sample grids of all systems, and those of one run along its training."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from jlt.report.result_rows import result_rows
from jlt.report.study import Study
from jlt.report.wording import number
from jlt.results.run import Run
from jlt.storage.folders import path_inside

T = TypeVar("T")
MOST_GRIDS = 6
"""Sample grids that a page shows of one training."""
LARGE_BYTES = 250_000
"""A grid whose file is larger is embedded smaller."""
LARGE_SIDE = 720
"""Longest side in pixels of a grid that is embedded smaller."""


@dataclass(frozen=True)
class Grid:
    """Decoded samples with their texts."""

    name: str
    uri: str
    text: str
    alt: str


def picture_uri(path: Path) -> str:
    """Return a picture as a data URI: a small PNG byte for byte, a large one as WebP at a smaller size.

    JLTError for a file that is not a whole image.
    """
    from jlt.images.reading import read_image

    image = read_image(path)
    if image.format == "PNG" and path.stat().st_size <= LARGE_BYTES:
        return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    buffer = io.BytesIO()
    image.thumbnail((LARGE_SIDE, LARGE_SIDE))
    image.convert("RGB").save(buffer, "webp", quality=85)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def sample_grids(study: Study) -> dict[int, list[Grid]]:
    """Return the sample grids of the first seed that has one, by patch size."""
    grids: dict[int, list[Grid]] = {}
    for row in result_rows(study):
        path = next((run.grid for run in row.system.runs if run.grid), None)
        if path:
            distance = f"Fréchet distance {row.cells[0].text}" + (" over seeds" if row.cells[0].span else "")
            alt = f"Samples of {row.title}, one row per class; {distance}."
            grids.setdefault(row.system.patch_size, []).append(Grid(row.title, picture_uri(path), distance, alt))
    return grids


def sample_series(run: Run) -> list[Grid]:
    """Return the first, some and the last of the sample grids along a training, without files that no longer exist."""
    found = [(step, path) for step, file in run.log.samples if (path := path_inside(run.folder, file)).is_file()]
    grids = []
    for step, path in spaced(found, MOST_GRIDS):
        evaluation = run.at(step)
        text = f"Fréchet distance {number(evaluation.metrics.frechet_distance)}" if evaluation else ""
        grids.append(Grid(f"Step {step:,}", picture_uri(path), text, f"Samples after {step:,} training steps."))
    return grids


def spaced(items: Sequence[T], most: int) -> list[T]:
    """Return at most `most` items, the first and the last among them, at equal distances."""
    places = {round(place * (len(items) - 1) / (most - 1)) for place in range(most)} if items else set()
    return [items[place] for place in sorted(places)]
