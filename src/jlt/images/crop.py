"""The centre crop of ADM (Dhariwal and Nichol 2021, arXiv 2105.05233), which every published ImageNet result uses."""

from __future__ import annotations

import contextlib
import warnings
from typing import Literal

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from jlt.errors import JLTError
from jlt.images.reading import MOST_PIXELS

Exif = Literal["ignore", "apply"]
ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""The operation that makes an image upright, by EXIF tag 0x0112 (EXIF 2.3, 4.6.4 A); ROTATE is counterclockwise."""


def centre_crop(image: Image.Image, size: int, exif: Exif = "ignore") -> UInt8[np.ndarray, "{size} {size} 3"]:
    """Return the central `size` x `size` pixels, 0..255, of the image scaled to a short side of `size`.

    Equal to ADM's crop in every pixel: a box filter halves the image while its short side is at least twice `size`,
    then a bicubic step brings it to `size`, up or down. exif="apply" first turns the image as its EXIF tag says, which
    the field's protocol ignores (Pillow always applies the tag of TIFF files). JLTError for a mode without a defined
    range, and for a strip so narrow that it would be enlarged beyond 2**27 pixels.
    """
    rgb = to_rgb(image)
    turn = ORIENTATIONS.get(_orientation(image)) if exif == "apply" else None
    if turn is not None:
        rgb = rgb.transpose(turn)
    while min(rgb.size) >= 2 * size:
        rgb = _resize(rgb, rgb.width // 2, rgb.height // 2, Image.Resampling.BOX)
    scale = size / min(rgb.size)
    width, height = round(rgb.width * scale), round(rgb.height * scale)
    # A narrow strip grows without bound when its short side is enlarged.
    if width * height > MOST_PIXELS:
        raise JLTError(f"An image of {image.width} x {image.height} pixels is too narrow to be cropped: remove it.")
    rgb = _resize(rgb, width, height, Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return np.array(rgb.crop((left, top, left + size, top + size)))


def _orientation(image: Image.Image) -> int:
    # Damaged EXIF is common and counts as none: the parser warns, or raises many types of exceptions.
    with warnings.catch_warnings(), contextlib.suppress(Exception):
        warnings.simplefilter("ignore")
        return int(image.getexif().get(0x0112, 1))
    return 1


def _resize(image: Image.Image, width: int, height: int, kernel: Image.Resampling) -> Image.Image:
    # Horizontally, then vertically, with 8 bits in between, as one call did when the field's data was made. Since
    # version 13 Pillow resizes images higher than twice their width in the other order, which differs by one level.
    return image.resize((width, image.height), kernel).resize((width, height), kernel)


def to_rgb(image: Image.Image) -> Image.Image:
    """Return the image in 8-bit RGB; alpha is ignored, as in the field's protocol.

    16-bit grey is scaled from 0..65535, where Pillow's own conversion would clip it at 255. JLTError for floating-point
    images and for integers beyond 16 bits, whose white level is unknown, and for modes that Pillow cannot convert.
    """
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):
        return Image.fromarray(_sixteen_to_eight_bits(image)).convert("RGB")
    if image.mode == "F":
        raise JLTError("A floating-point image does not define which value is white: save it with 8 or 16 bits.")
    if image.mode == "P" and "transparency" in image.info:
        # Through RGBA the colours are the same, without Pillow's warning that the transparency is lost.
        image = image.convert("RGBA")
    if image.mode == "La":
        # Pillow converts grey with premultiplied alpha to LA only.
        image = image.convert("LA")
    try:
        return image.convert("RGB")
    except ValueError as error:
        raise JLTError(f"An image of Pillow's mode {image.mode} has no conversion to RGB: save it as RGB.") from error


def _sixteen_to_eight_bits(image: Image.Image) -> UInt8[np.ndarray, "h w"]:
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        found = f"{values.min()} to {values.max()}"
        raise JLTError(f"An integer image with values {found} has no known white level: save it with 16 bits.")
    # 65535 = 255 * 257, so one step of 8 bits is 257.
    return np.rint(values / 257).astype(np.uint8)
