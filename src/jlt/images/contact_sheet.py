"""Sheets of images with text: a title above, names left of the rows and above the columns, captions below images."""

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
"""Largest width of a row's name in pixels."""


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
    names = [_fitted(name, font, LONGEST_NAME) for name in text.rows]
    left = MARGIN + (MARGIN + round(max(map(font.getlength, names))) if names else 0)
    top = MARGIN + (TITLE_SIZE + MARGIN if text.title else 0) + (LINE_HEIGHT if text.columns else 0)
    tops = [top]
    for row in range(rows):
        lines = [len(caption.splitlines()) for caption in text.captions[row * columns : (row + 1) * columns]]
        tops.append(tops[-1] + side + GAP + LINE_HEIGHT * max(lines, default=0))
    width = left + columns * (side + GAP) - GAP + MARGIN
    if text.title:
        width = max(width, 2 * MARGIN + round(title_font.getlength(text.title)))
    sheet = Image.new("RGB", (width, tops[-1] - GAP + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN), text.title, INK, title_font)
    for column, name in enumerate(text.columns):
        draw.text((left + column * (side + GAP), top - LINE_HEIGHT), _fitted(name, font, side), INK, font)
    for row, name in enumerate(names):
        draw.text((MARGIN, tops[row] + side / 2), name, INK, font, anchor="lm")
    for index, image in enumerate(images):
        x, y = left + index % columns * (side + GAP), tops[index // columns]
        sheet.paste(Image.fromarray(image).resize((side, side), Image.Resampling.NEAREST), (x, y))
        if text.captions:
            draw.multiline_text((x, y + side + GAP / 2), _fitted(text.captions[index], font, side), INK, font)
    return sheet


def _fitted(text: str, font: Font, width: int) -> str:
    """Return a text whose lines are cut to a width in pixels."""
    lines = text.split("\n")
    for number, line in enumerate(lines):
        kept = len(line)
        while kept > 1 and font.getlength(lines[number]) > width:
            kept -= 1
            lines[number] = f"{line[:kept]}…"
    return "\n".join(lines)
