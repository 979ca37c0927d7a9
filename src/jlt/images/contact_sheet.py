"""Sheets of images with text: a title above, names left of the rows and above the columns, captions below images."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

Font = ImageFont.ImageFont | ImageFont.FreeTypeFont
INK, PAPER = (30, 30, 30), (255, 255, 255)
MARGIN, GAP, TITLE_SIZE, TEXT_SIZE, LINE_HEIGHT = 12, 4, 18, 15, 20
LONGEST_NAME = 200
"""Largest width of a row's name in pixels."""
LONGEST_TITLE = 1500
MOST_LINES = 4
"""Lines of a caption."""


@dataclass(frozen=True)
class SheetText:
    """The text on a sheet; text that is too long for its place is cut."""

    title: str = ""
    rows: Sequence[str] = ()
    columns: Sequence[str] = ()
    captions: Sequence[str] = ()
    """One per image, row by row; each may have several lines."""


def draw_sheet(
    images: UInt8[np.ndarray, "n s s 3"], columns: int, text: SheetText | None = None, min_side: int = 0
) -> Image.Image:
    """Lay images out row by row; the last row may be shorter.

    Images smaller than `min_side` pixels are enlarged by an integer factor, without smoothing.
    """
    text = text or SheetText()
    side = images.shape[1] * max(1, -(-min_side // images.shape[1]))
    rows = -(-len(images) // columns)
    title_font, font = ImageFont.load_default(TITLE_SIZE), ImageFont.load_default(TEXT_SIZE)
    title = _fitted(" ".join(text.title.split()), title_font, LONGEST_TITLE)
    names = [_fitted(" ".join(name.split()), font, LONGEST_NAME) for name in text.rows]
    left = MARGIN + (MARGIN + round(max(map(font.getlength, names))) if names else 0)
    top = MARGIN + (TITLE_SIZE + MARGIN if text.title else 0) + (LINE_HEIGHT if text.columns else 0)
    captions = [_fitted(caption, font, side) for caption in text.captions]
    tops = [top]
    for row in range(rows):
        lines = [len(caption.splitlines()) for caption in captions[row * columns : (row + 1) * columns]]
        tops.append(tops[-1] + side + GAP + LINE_HEIGHT * max(lines, default=0))
    width = left + columns * (side + GAP) - GAP + MARGIN
    if text.title:
        width = max(width, 2 * MARGIN + round(title_font.getlength(title)))
    sheet = Image.new("RGB", (width, tops[-1] - GAP + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN), title, INK, title_font)
    for column, name in enumerate(text.columns):
        draw.text(
            (left + column * (side + GAP), top - LINE_HEIGHT), _fitted(" ".join(name.split()), font, side), INK, font
        )
    for row, name in enumerate(names):
        draw.text((MARGIN, tops[row] + side / 2), name, INK, font, anchor="lm")
    for index, image in enumerate(images):
        x, y = left + index % columns * (side + GAP), tops[index // columns]
        sheet.paste(Image.fromarray(image).resize((side, side), Image.Resampling.NEAREST), (x, y))
        if captions:
            draw.multiline_text((x, y + side + GAP / 2), captions[index], INK, font)
    return sheet


def _fitted(text: str, font: Font, width: int) -> str:
    """Return the first lines of a text, each cut to a width in pixels: a name in it may have any length."""
    return "\n".join(_cut(line, font, width) for line in text.split("\n", MOST_LINES)[:MOST_LINES])


def _cut(line: str, font: Font, width: int) -> str:
    # No more is measured than has room, since hardly a letter is narrower than half a pixel.
    if len(line) <= 2 * width and (len(line) < 2 or font.getlength(line) <= width):
        return line
    kept = bisect.bisect_right(range(1, 2 * width), width, key=lambda end: math.ceil(font.getlength(f"{line[:end]}…")))
    return f"{line[: max(1, kept)]}…"
