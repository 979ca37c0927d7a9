"""The colours and lines of a report: one colour and marker per prediction, one line per patch size, in every figure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from jlt.config import Prediction, parse_prediction

T = TypeVar("T")


@dataclass(frozen=True)
class Colour:
    """One role in light and in dark mode, as #rrggbb; all light values differ."""

    light: str
    dark: str


INK = Colour("#1b1f24", "#e8e6e3")
MUTED = Colour("#5b636d", "#a2a9b3")
LINE = Colour("#d5d9de", "#3a4048")
PAPER = Colour("#ffffff", "#15181c")
PANEL = Colour("#f5f6f8", "#1d2126")


class ByPrediction(dict[Prediction, T]):
    """Values of x, eps, v and the two lines; other predictions have that of their line."""

    def __missing__(self, prediction: Prediction) -> T:
        return self[line_of(prediction)]


class Names(dict[Prediction, str]):
    """Names of x, eps and v; those of other predictions follow from a pattern."""

    def __init__(self, pattern: str, **names: str) -> None:
        super().__init__(names)
        self.pattern = pattern

    def __missing__(self, prediction: Prediction) -> str:
        return self.pattern.format(prediction)


def line_of(prediction: Prediction) -> str:
    """Return x, eps or v itself, and the line, skip or mix, of every other prediction."""
    return prediction if prediction in ("x", "eps", "v", "skip", "mix") else parse_prediction(prediction)[0]


# They differ in hue and in lightness, for colour-blind readers and for grey prints; a test checks it.
PREDICTION = ByPrediction(
    x=Colour("#1f5fbf", "#5aa9f5"),
    eps=Colour("#b58900", "#f7e08c"),
    v=Colour("#a3162a", "#f26d7d"),
    skip=Colour("#5c1461", "#8233f8"),
    mix=Colour("#f058a7", "#a14488"),
)
# Ranges of time from noise to data: matplotlib's plasma without its palest part.
TIME: tuple[Colour, ...] = (
    Colour("#0d0887", "#ba3388"),
    Colour("#5801a4", "#da5a6a"),
    Colour("#9410a2", "#f2844b"),
    Colour("#c33d80", "#fdb42f"),
    Colour("#e56a5d", "#f4ed27"),
)
# From good to bad, for numbers in cells; text on the first DEEP ones has the colour of the paper, on others of ink.
DEEP = 3
SCALE: tuple[Colour, ...] = (
    Colour("#083f3d", "#8cebdd"),
    Colour("#0f5f5a", "#62cdbf"),
    Colour("#1f7d76", "#45ab9f"),
    Colour("#72b5ae", "#2f6f68"),
    Colour("#a6d0cb", "#28564f"),
    Colour("#cbe4e1", "#22433f"),
    Colour("#e7f2f1", "#1d3230"),
)
MARKER = ByPrediction(x="o", eps="^", v="s", skip="D", mix="v")
SYMBOL = Names("{}", x="x", eps="ε", v="v")
NAMES = Names("prediction {}", x="clean prediction (x)", eps="noise prediction (ε)", v="velocity prediction (v)")
SHORT_NAMES = Names("{}", x="clean (x)", eps="noise (ε)", v="velocity (v)")

DASHES: tuple[tuple[float, ...], ...] = ((), (5.0, 2.0), (1.2, 1.6), (6.0, 1.6, 1.2, 1.6))


def dashes(patch_size: int) -> tuple[float, ...]:
    """Return the dash pattern of a patch size, in line widths: solid for 1, dashed for 2, dotted for 4."""
    return DASHES[min(patch_size.bit_length() - 1, len(DASHES) - 1)]


_MARKS = {
    "": "",
    "x": '<circle cx="17" cy="6" r="3.4"/>',
    "eps": '<path d="M17 2 L21 9.4 L13 9.4 Z"/>',
    "v": '<rect x="13.8" y="2.8" width="6.4" height="6.4"/>',
    "skip": '<path d="M17 1.6 L21.4 6 L17 10.4 L12.6 6 Z"/>',
    "mix": '<path d="M17 10 L13 2.6 L21 2.6 Z"/>',
    "star": '<path d="M17 0 L18.6 4.2 L23 4.4 L19.6 7.1 L20.8 11.4 L17 9 L13.2 11.4 L14.4 7.1 L11 4.4 L15.4 4.2 Z"/>',
}


def swatch(prediction: str | None, patch_size: int) -> str:
    """Return the swatch of a system in a legend, of no prediction in the colour of the text."""
    line = line_of(prediction) if prediction else ""
    return line_swatch(line or "ink", line, dashes(patch_size))


def line_swatch(role: str, mark: str = "", pattern: tuple[float, ...] | None = ()) -> str:
    """Return a small inline SVG for a legend: a line with a marker, without the line if `pattern` is None.

    `role` names the page's CSS variable of its colour.
    """
    dash = " ".join(f"{2 * length:g}" for length in pattern or ())
    line = f'<line x1="1" x2="33" y1="6" y2="6" stroke="currentColor" stroke-width="2" stroke-dasharray="{dash}"/>'
    return (
        f'<svg class="swatch" viewBox="0 0 34 12" aria-hidden="true" style="color:var(--{role})">'
        f'{line if pattern is not None else ""}<g fill="currentColor">{_MARKS[mark]}</g></svg>'
    )
