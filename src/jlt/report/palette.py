"""The colours and lines of a report: one colour and marker per prediction, one line per patch size, in every figure."""

from __future__ import annotations

from dataclasses import dataclass


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

# They differ in hue and in lightness, for colour-blind readers and for grey prints; a test checks it.
PREDICTION: dict[str, Colour] = {
    "x": Colour("#1f5fbf", "#5aa9f5"),
    "eps": Colour("#b58900", "#f7e08c"),
    "v": Colour("#a3162a", "#f26d7d"),
}
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
MARKER: dict[str, str] = {"x": "o", "eps": "^", "v": "s"}
SYMBOL: dict[str, str] = {"x": "x", "eps": "ε", "v": "v"}
NAMES: dict[str, str] = {"x": "clean prediction (x)", "eps": "noise prediction (ε)", "v": "velocity prediction (v)"}
SHORT_NAMES: dict[str, str] = {"x": "clean (x)", "eps": "noise (ε)", "v": "velocity (v)"}

DASHES: tuple[tuple[float, ...], ...] = ((), (5.0, 2.0), (1.2, 1.6), (6.0, 1.6, 1.2, 1.6))


def dashes(patch_size: int) -> tuple[float, ...]:
    """Return the dash pattern of a patch size, in line widths: solid for 1, dashed for 2, dotted for 4."""
    return DASHES[min(patch_size.bit_length() - 1, len(DASHES) - 1)]


_MARKS = {
    "": "",
    "x": '<circle cx="17" cy="6" r="3.4"/>',
    "eps": '<path d="M17 2 L21 9.4 L13 9.4 Z"/>',
    "v": '<rect x="13.8" y="2.8" width="6.4" height="6.4"/>',
    "star": '<path d="M17 0 L18.6 4.2 L23 4.4 L19.6 7.1 L20.8 11.4 L17 9 L13.2 11.4 L14.4 7.1 L11 4.4 L15.4 4.2 Z"/>',
}


def swatch(prediction: str | None, patch_size: int) -> str:
    """Return the swatch of a system in a legend, of no prediction in the colour of the text."""
    return line_swatch(prediction or "ink", prediction or "", dashes(patch_size))


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
