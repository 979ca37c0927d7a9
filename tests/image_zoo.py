"""Every kind of image in real collections, good and bad, and the expected pixels or error."""

from __future__ import annotations

import io
import re
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jlt.errors import JLTError
from jlt.images.crop import centre_crop
from jlt.images.reading import BadImageError
from jlt.images.source import ImageSource

SIZE = 32
LEFT, RIGHT = (200, 60, 40), (20, 120, 220)


@dataclass(frozen=True)
class Expectation:
    """The expected result for an image: pixels up to a tolerance (of lossy formats), or an error."""

    pixels: np.ndarray | None = None
    """As stored in the file, (SIZE, 2 * SIZE, 3)."""
    tolerance: int = 0
    upright: np.ndarray | None = None
    """Turned by EXIF, where that makes a difference."""
    reason: str = ""
    """A part of the error, if there are no pixels."""

    def crop(self, exif: str = "ignore") -> np.ndarray:
        """The centre crop of SIZE: no resizing is needed, so it is a slice."""
        pixels = self.upright if exif == "apply" and self.upright is not None else self.pixels
        top, left = (pixels.shape[0] - SIZE) // 2, (pixels.shape[1] - SIZE) // 2
        return pixels[top : top + SIZE, left : left + SIZE]


def halves(left: object, right: object, dtype: type = np.uint8) -> np.ndarray:
    """SIZE rows and twice as many columns, whose left half has one value and whose right half another."""
    return np.stack([np.array([left] * SIZE + [right] * SIZE, dtype=dtype)] * SIZE)


def grey_rgb(left: int, right: int) -> np.ndarray:
    return halves((left,) * 3, (right,) * 3)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(value: int) -> bytes:
    """A small grey image."""
    return encoded(Image.new("L", (2, 2), value), "PNG")


def write_tar(path: Path, members: list[tuple[str, bytes]], form: int = tarfile.USTAR_FORMAT, mtime: float = 0) -> Path:
    with tarfile.open(path, "w", format=form) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(content), mtime
            archive.addfile(info, io.BytesIO(content))
    return path


def jpeg(image: Image.Image, **options: object) -> bytes:
    # Without subsampling colours keep to their half.
    return encoded(image, "JPEG", quality=95, subsampling=0, **options)


def palette(first: int = 0, **info: object) -> Image.Image:
    image = Image.fromarray(halves(first, 1 - first))
    image.putpalette([*LEFT, *RIGHT])
    image.info.update(info)
    return image


def zoo() -> dict[str, tuple[bytes, Expectation]]:
    """The content of each file, by class/file (files differ before the first dot too), and the expected result."""
    colour, grey = halves(LEFT, RIGHT), halves(50, 180)
    rgb, exact, near = Image.fromarray(colour), Expectation(colour), Expectation(colour, 4)
    grey_exact = Expectation(grey_rgb(50, 180))
    rotated = Image.Exif()
    rotated[0x0112] = 6  # "rotate by a quarter with the clock to display"
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    noise_jpeg = encoded(noise, "JPEG")
    return {
        "common/bitmap.bmp": (encoded(rgb, "BMP"), exact),
        "common/lossless.webp": (encoded(rgb, "WEBP", lossless=True), exact),
        "common/capital_ending.JPEG": (jpeg(rgb), near),
        "common/portable.png": (encoded(rgb, "PNG"), exact),
        "common/progressive.jpg": (jpeg(rgb, progressive=True), near),
        "common/tiff.tif": (encoded(rgb, "TIFF", compression="tiff_lzw"), exact),
        "odd/alpha.png": (encoded(Image.fromarray(halves((*LEFT, 0), (*RIGHT, 99))), "PNG"), exact),
        "odd/animated.gif": (encoded(palette(), "GIF", save_all=True, append_images=[palette(1)]), exact),
        "odd/bilevel.png": (encoded(Image.fromarray(grey > 99), "PNG"), Expectation(grey_rgb(0, 255))),
        "odd/cmyk.jpg": (jpeg(rgb.convert("CMYK")), Expectation(colour, 6)),
        "odd/damaged_exif.jpg": (jpeg(rgb, exif=b"Exif\0\0II*\0\xff\xff"), near),
        "odd/deep_grey.png": (encoded(Image.fromarray(grey.astype(np.uint16) * 257), "PNG"), grey_exact),
        "odd/grey.jpg": (jpeg(Image.fromarray(grey)), Expectation(grey_rgb(50, 180), 2)),
        "odd/grey_alpha.png": (encoded(Image.fromarray(halves((50, 0), (180, 9))), "PNG"), grey_exact),
        "odd/palette.png": (encoded(palette(), "PNG"), exact),
        "odd/palette_clear_colours.png": (encoded(palette(transparency=b"\x00\x80"), "PNG"), exact),
        "odd/palette_clear_index.png": (encoded(palette(transparency=1), "PNG"), exact),
        "odd/png_called.jpg": (encoded(rgb, "PNG"), exact),
        "odd/rotated.jpg": (jpeg(rgb, exif=rotated), Expectation(colour, 4, upright=np.rot90(colour, -1))),
        "bad/empty.jpg": (b"", Expectation(reason="holds no bytes")),
        "bad/float.tif": (encoded(Image.new("F", (64, 32)), "TIFF"), Expectation(reason="floating-point")),
        "bad/text.jpg": (b"<html>404 Not Found</html>", Expectation(reason="no image format")),
        "bad/truncated.jpg": (noise_jpeg[: len(noise_jpeg) // 2], Expectation(reason="truncated")),
    }


def write_zoo(folder: Path) -> dict[str, Expectation]:
    """Write class folders of all kinds, bad ones included, and return the expected result of each, by class/file."""
    for name, (content, _) in zoo().items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return {name: expectation for name, (_, expectation) in sorted(zoo().items())}


def assert_is_zoo(source: ImageSource, names: list[str]) -> None:
    """Assert that a source holds the zoo's images of these names, in this order, and names the bad ones."""
    animals = zoo()
    assert len(source) == len(names)
    for index, name in enumerate(names):
        expected = animals[name][1]
        if expected.pixels is None:
            with pytest.raises(JLTError, match=expected.reason) as caught:
                centre_crop(source[index][0], SIZE)
            if isinstance(caught.value, BadImageError):
                assert caught.value.image == source.describe(index)
                assert re.search(re.escape(name.partition("/")[2].partition(".")[0]), caught.value.image)
            continue
        image, label = source[index]
        assert source.class_names[label] == name.partition("/")[0]
        assert image.size == (2 * SIZE, SIZE), name
        for exif in ("ignore", "apply"):
            error = np.abs(centre_crop(image, SIZE, exif).astype(int) - expected.crop(exif).astype(int)).max()
            assert error <= expected.tolerance, (name, exif, error)
