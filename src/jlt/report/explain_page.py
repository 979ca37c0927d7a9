"""The page of `jlt explain`: when the targets stop being equivalent, as curves that sliders move.

The curves are computed in the page itself, by gaussian.js and forecast.js, which mirror `jlt.geometry`. The measured
experiments on it are in measured.json: their spectra, in units of the noise's variance, and their results. A spectrum
holds the means of equal groups of directions where these are many.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from jlt.errors import UsageError
from jlt.report.page import render_template
from jlt.storage.codec import from_json, to_json
from jlt.storage.files import read_json, write_text

MEASURED = Path(__file__).with_name("measured.json")
SCRIPTS = ("gaussian.js", "forecast.js", "explain.js")


@dataclass(frozen=True)
class Space:
    """A measured latent space at one patch size."""

    name: str
    title: str
    dimension: int
    """Directions of a token."""
    width: int
    """Width of the network that the recipe trains on it."""
    preset: bool
    """Whether the reader may choose it."""
    spectrum: tuple[float, ...]


@dataclass(frozen=True)
class Experiment:
    """A pair of trained systems, velocity against clean prediction."""

    space: str
    title: str
    power: float
    """That the variances of the space were raised to, with the same sum."""
    width: int
    ratio: float
    """Frechet distance of v over that of x; `low` and `high` are the range of three seeds, where there is one."""
    low: float | None
    high: float | None
    published: bool
    """Whether the result is one of Fu et al. 2026, and not of this project."""


@dataclass(frozen=True)
class Measured:
    """Everything measured that the page shows."""

    spaces: tuple[Space, ...]
    experiments: tuple[Experiment, ...]


def explanation() -> str:
    """Return the page as HTML; it needs nothing else, and asks nothing of a network."""
    measured = from_json(Measured, read_json(MEASURED))
    context = {
        "title": "Targets of diffusion models",
        "verdict": "When do x, ε and v stop being equivalent?",
        "more_colours": [],
        "measured": to_json(measured),
        "dimensions": {space.name: space.dimension for space in measured.spaces},
    }
    return render_template("explain.html", context, SCRIPTS)


def write_explanation(path: Path) -> None:
    """Write the page to a file that ends in .html; UsageError for other names."""
    if path.suffix != ".html":
        raise UsageError(f"{path} cannot be the page: name a file that ends in .html, such as explain.html.")
    write_text(path, explanation())
