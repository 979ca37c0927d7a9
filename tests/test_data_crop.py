"""The ADM crop, pixel for pixel, against a slow and obvious resampling in NumPy; and every image mode."""

from __future__ import annotations

import io
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from jlt.errors import JLTError
from jlt.images.crop import centre_crop, to_rgb
from jlt.images.reading import decode_image


def box(x: float) -> float:
    return 1.0 if -0.5 < x <= 0.5 else 0.0


def bicubic(x: float, a: float = -0.5) -> float:
    # Keys 1981, "Cubic convolution interpolation for digital image processing".
    x = abs(x)
    if x < 1:
        return ((a + 2) * x - (a + 3)) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * a if x < 2 else 0.0


def resample_rows(pixels: np.ndarray, size: int, kernel: Callable[[float], float], support: float) -> np.ndarray:
    """Convolve along axis 0 with the kernel, widened where it shrinks, in Pillow's 22 fractional bits."""
    length = len(pixels)
    scale = length / size
    widening = max(scale, 1.0)
    rows = []
    for position in range(size):
        centre = (position + 0.5) * scale
        first = max(int(centre - support * widening + 0.5), 0)
        last = min(int(centre + support * widening + 0.5), length)
        weights = [kernel((source - centre + 0.5) / widening) for source in range(first, last)]
        total = sum(weights)
        fixed = [math.floor(weight / total * 2**22 + 0.5) for weight in weights]
        summed = sum(w * pixels[source].astype(np.int64) for w, source in zip(fixed, range(first, last), strict=True))
        rows.append(np.clip((summed + 2**21) >> 22, 0, 255))
    return np.array(rows)


def resample(pixels: np.ndarray, width: int, height: int, kernel: Callable, support: float) -> np.ndarray:
    wide = resample_rows(pixels.swapaxes(0, 1), width, kernel, support).swapaxes(0, 1)
    return resample_rows(wide, height, kernel, support)


def slow_centre_crop(pixels: np.ndarray, size: int) -> np.ndarray:
    while min(pixels.shape[:2]) >= 2 * size:
        pixels = resample(pixels, pixels.shape[1] // 2, pixels.shape[0] // 2, box, 0.5)
    height, width = pixels.shape[:2]
    scale = size / min(height, width)
    pixels = resample(pixels, round(width * scale), round(height * scale), bicubic, 2.0)
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


@pytest.mark.parametrize(
    ("width", "height", "size"),
    [
        (8, 8, 32),  # the digits: enlarged only
        (32, 32, 32),  # untouched
        (50, 40, 32),  # bicubic only
        (64, 64, 32),  # one exact halving
        (131, 97, 32),  # odd sizes: one halving that drops a row, then bicubic
        (300, 129, 32),  # two halvings
        (33, 200, 16),  # upright
        (3, 17, 5),
    ],
)
def test_crop_is_adms_pixel_for_pixel(width: int, height: int, size: int) -> None:
    pixels = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    cropped = centre_crop(Image.fromarray(pixels), size)
    assert cropped.dtype == np.uint8
    np.testing.assert_array_equal(cropped, slow_centre_crop(pixels, size))


@settings(max_examples=60, deadline=None)
@given(width=st.integers(1, 70), height=st.integers(1, 70), size=st.integers(1, 20))
def test_crop_is_adms_at_any_size(width: int, height: int, size: int) -> None:
    # A strip of one pixel would be enlarged to size * size * length: slow in the slow implementation.
    assume(max(width, height) * size / min(width, height) < 300)
    pixels = np.random.default_rng(width * 100 + height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    np.testing.assert_array_equal(centre_crop(Image.fromarray(pixels), size), slow_centre_crop(pixels, size))


def test_a_strip_that_would_fill_the_memory_is_refused() -> None:
    with pytest.raises(JLTError, match="1 x 60000 pixels is too narrow"):
        centre_crop(Image.new("L", (1, 60000)), 256)


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_rotation_is_that_of_pillow(kind: str, orientation: int) -> None:
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    pixels = np.random.default_rng(orientation).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, kind, exif=exif)
    image = decode_image(buffer.getvalue(), str)
    plain = Image.fromarray(np.asarray(image.convert("RGB")))
    np.testing.assert_array_equal(centre_crop(image, 5), centre_crop(plain, 5))
    upright = Image.fromarray(np.asarray(ImageOps.exif_transpose(image).convert("RGB")))
    np.testing.assert_array_equal(centre_crop(image, 5, exif="apply"), centre_crop(upright, 5))


@pytest.mark.parametrize("exif", [b"Exif\0\0", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"\xff" * 40])
def test_damaged_exif_is_no_exif(exif: bytes) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), (9, 8, 7)).save(buffer, "JPEG", exif=exif)
    image = decode_image(buffer.getvalue(), str)
    np.testing.assert_array_equal(centre_crop(image, 4, exif="apply"), centre_crop(image, 4))


def test_digits_are_enlarged_by_the_same_function() -> None:
    grey = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    expected = slow_centre_crop(np.repeat(grey[..., None], 3, axis=2), 32)
    np.testing.assert_array_equal(centre_crop(Image.fromarray(grey), 32), expected)


def pixel(image: Image.Image) -> tuple[int, int, int]:
    return tuple(np.array(to_rgb(image))[0, 0].tolist())


def test_modes_become_rgb_without_regard_to_alpha() -> None:
    assert pixel(Image.new("L", (1, 1), 77)) == (77, 77, 77)
    assert pixel(Image.new("1", (1, 1), 1)) == (255, 255, 255)
    assert pixel(Image.new("LA", (1, 1), (77, 0))) == (77, 77, 77)
    assert pixel(Image.new("RGBA", (1, 1), (10, 20, 30, 0))) == (10, 20, 30)
    assert pixel(Image.new("CMYK", (1, 1), (255, 0, 0, 0))) == (0, 255, 255)
    palette = Image.new("P", (1, 1), 1)
    palette.putpalette([0, 0, 0, 9, 8, 7])
    assert pixel(palette) == (9, 8, 7)
    palette.info["transparency"] = b"\x00\x00"
    assert pixel(palette) == (9, 8, 7)


@pytest.mark.parametrize("mode", Image.MODES)
def test_every_mode_of_pillow_is_converted_or_refused(mode: str) -> None:
    image = Image.new(mode, (4, 4))
    if mode == "F":
        with pytest.raises(JLTError):
            to_rgb(image)
        return
    assert centre_crop(image, 4, exif="apply").shape == (4, 4, 3)
    # As PNG notes which colour is clear.
    for transparency in {"P": (0, b"\x00"), "L": (0,), "1": (0,), "I;16": (0,), "RGB": ((0, 0, 0),)}.get(mode, ()):
        image.info["transparency"] = transparency
        assert centre_crop(image, 4, exif="apply").shape == (4, 4, 3)


def test_what_pillow_cannot_convert_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    # Pillow 13 converts every mode; earlier ones raise a ValueError for LAB, for instance.
    def refuse(image: Image.Image, mode: str) -> Image.Image:
        raise ValueError(f"conversion from {image.mode} to {mode} not supported")

    monkeypatch.setattr(Image.Image, "convert", refuse)
    with pytest.raises(JLTError, match="mode LAB has no conversion to RGB"):
        centre_crop(Image.new("LAB", (4, 4)), 4)


def test_other_colour_models_keep_their_colours() -> None:
    assert pixel(Image.new("RGBX", (1, 1), (10, 20, 30, 0))) == (10, 20, 30)
    assert pixel(Image.new("HSV", (1, 1), (85, 255, 255))) == (0, 255, 0)
    assert pixel(Image.new("YCbCr", (1, 1), (100, 128, 128))) == (100, 100, 100)
    # Colours that were multiplied by an alpha of 1/2 or so are divided by it again.
    assert pixel(Image.new("La", (1, 1), (50, 128))) == pytest.approx((100, 100, 100), abs=1)
    assert pixel(Image.new("RGBa", (1, 1), (10, 50, 100, 128))) == pytest.approx((20, 100, 200), abs=1)


@pytest.mark.parametrize("dtype", ["<u2", ">u2", "<i4"])
def test_sixteen_bit_grey_is_scaled_not_clipped(dtype: str) -> None:
    values = np.array([[0, 257, 300, 32768, 65535]], dtype=dtype)
    expected = np.rint(values.astype(float) * 255 / 65535)
    np.testing.assert_array_equal(np.array(to_rgb(Image.fromarray(values)))[..., 0], expected)


def test_values_without_a_white_are_refused() -> None:
    with pytest.raises(JLTError, match="floating-point"):
        centre_crop(Image.new("F", (4, 4), 0.5), 4)
    with pytest.raises(JLTError, match="0 to 65536"):
        centre_crop(Image.fromarray(np.array([[0, 65536]], dtype=np.int32)), 1)
