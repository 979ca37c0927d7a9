"""The centre crop of ADM (Dhariwal and Nichol 2021, arXiv 2105.05233), on which every ImageNet result stands."""

from __future__ import annotations

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from jlt.errors import JLTError


def centre_crop(image: Image.Image, size: int) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """Return the central `size` x `size` pixels, 0..255, of the image whose short side was brought to `size`.

    Pixel for pixel the crop of ADM: halved by a box filter while the short side is at least twice `size`, then bicubic,
    then cropped. A short side below `size` is enlarged by the same bicubic step. JLTError for a mode without a range.
    """
    image = to_rgb(image)
    while min(image.size) >= 2 * size:
        image = _resize(image, image.width // 2, image.height // 2, Image.Resampling.BOX)
    scale = size / min(image.size)
    image = _resize(image, round(image.width * scale), round(image.height * scale), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.array(image.crop((left, top, left + size, top + size)))


def _resize(image: Image.Image, width: int, height: int, kernel: Image.Resampling) -> Image.Image:
    # Across, then down, with 8 bits in between: what one call did when the field's data was made. Since version 13
    # Pillow resizes upright images (higher than twice their width) in the other order, which differs by a level.
    return image.resize((width, image.height), kernel).resize((width, height), kernel)


def to_rgb(image: Image.Image) -> Image.Image:
    """Return the image in 8-bit RGB as the field's protocol does: alpha and EXIF rotation are ignored.

    16-bit grey is scaled from 0..65535, where Pillow's own conversion would clip it at 255. JLTError for floating-point
    images and for integers beyond 16 bits, since nothing says which value is white.
    """
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):
        return Image.fromarray(_sixteen_to_eight_bits(image)).convert("RGB")
    if image.mode == "F":
        raise JLTError("A floating-point image does not say which value is white: save it with 8 or 16 bits.")
    if image.mode == "P" and "transparency" in image.info:
        # By way of RGBA the colours are the same, without Pillow's warning that the transparency is lost.
        image = image.convert("RGBA")
    return image.convert("RGB")


def _sixteen_to_eight_bits(image: Image.Image) -> UInt8[np.ndarray, "h w"]:
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        found = f"{values.min()} to {values.max()}"
        raise JLTError(f"An integer image with values from {found} does not say which is white: save it with 16 bits.")
    # 65535 = 255 * 257, so 257 is one step of 8 bits.
    return np.rint(values / 257).astype(np.uint8)
