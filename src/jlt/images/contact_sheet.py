"""Sheets of images with words: a title above, a name at the left of a row, on top of a column or under each image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

Font = ImageFont.ImageFont | ImageFont.FreeTypeFont
INK, PAPER = (30, 30, 30), (255, 255, 255)
MARGIN, GAP, TITLE_SIZE, TEXT_SIZE, LINE_HEIGHT = 12, 4, 18, 15, 20
LONGEST_NAME = 200
"""Pixels that the names of rows may take."""


@dataclass(frozen=True)
class SheetText:
    """What is written on a sheet; what is longer than its place is cut."""

    title: str = ""
    rows: Sequence[str] = ()
    columns: Sequence[str] = ()
    captions: Sequence[str] = ()
    """One for each image, row by row; each may have several lines."""


def draw_sheet(
    images: UInt8[np.ndarray, "n s s 3"], columns: int, words: SheetText | None = None, min_side: int = 0
) -> Image.Image:
    """Lay images out row by row. Those smaller than `min_side` pixels are enlarged pixel by pixel: nothing is smoothed.

    The last row may be shorter.
    """
    words = words or SheetText()
    side = images.shape[1] * max(1, -(-min_side // images.shape[1]))
    rows = -(-len(images) // columns)
    title_font, font = ImageFont.load_default(TITLE_SIZE), ImageFont.load_default(TEXT_SIZE)
    names = [_fitted(name, font, LONGEST_NAME) for name in words.rows]
    left = MARGIN + (MARGIN + round(max(map(font.getlength, names))) if names else 0)
    top = MARGIN + (TITLE_SIZE + MARGIN if words.title else 0) + (LINE_HEIGHT if words.columns else 0)
    tops = [top]
    for row in range(rows):
        lines = [len(text.splitlines()) for text in words.captions[row * columns : (row + 1) * columns]]
        tops.append(tops[-1] + side + GAP + LINE_HEIGHT * max(lines, default=0))
    width = left + columns * (side + GAP) - GAP + MARGIN
    if words.title:
        width = max(width, 2 * MARGIN + round(title_font.getlength(words.title)))
    sheet = Image.new("RGB", (width, tops[-1] - GAP + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN), words.title, INK, title_font)
    for column, name in enumerate(words.columns):
        draw.text((left + column * (side + GAP), top - LINE_HEIGHT), _fitted(name, font, side), INK, font)
    for row, name in enumerate(names):
        draw.text((MARGIN, tops[row] + side / 2), name, INK, font, anchor="lm")
    for index, image in enumerate(images):
        x, y = left + index % columns * (side + GAP), tops[index // columns]
        sheet.paste(Image.fromarray(image).resize((side, side), Image.Resampling.NEAREST), (x, y))
        if words.captions:
            draw.multiline_text((x, y + side + GAP / 2), _fitted(words.captions[index], font, side), INK, font)
    return sheet


def _fitted(text: str, font: Font, width: int) -> str:
    """Return a text whose lines are cut to a width in pixels."""
    return "\n".join(_cut(line, font, width) for line in text.split("\n"))


def _cut(line: str, font: Font, width: int) -> str:
    kept = len(line)
    while kept > 1 and font.getlength(line[:kept] + "…" * (kept < len(line))) > width:
        kept -= 1
    return line[:kept] + "…" * (kept < len(line))
