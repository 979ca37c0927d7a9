"""Image files that are damaged, or made to do harm: each is refused with a sentence, and nothing else happens."""

from __future__ import annotations

import functools
import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_zoo import encoded
from PIL import Image

from jlt.errors import JLTError
from jlt.evaluation.image_files import open_images
from jlt.images.reading import MOST_BYTES, BadImageError, decode_image, read_image
from jlt.report.sample_grids import picture_uri

POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(touched) (w) file closefile\nshowpage\n%%EOF\n"
SEEDS = st.integers(0, 3)
MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")


def picture(seed: int, side: int = 12) -> Image.Image:
    levels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(levels)


def smooth(seed: int, side: int = 256) -> Image.Image:
    return picture(seed, 24).resize((side, side), Image.Resampling.BICUBIC)


@functools.cache
def png(seed: int, mode: str) -> bytes:
    image = picture(seed)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    else:
        image = image.convert("L").convert("LA") if mode == "LA" else image.convert(mode)
    return encoded(image, "PNG")


@functools.cache
def jpeg(seed: int, options: tuple[tuple[str, object], ...]) -> bytes:
    return encoded(smooth(seed), "JPEG", **dict(options))


def pixels(data: bytes) -> bytes:
    return decode_image(data, lambda: "picture").tobytes()


def refused(data: bytes) -> str:
    with pytest.raises(BadImageError) as caught:
        decode_image(data, lambda: "picture")
    assert str(caught.value).startswith("picture ")
    return str(caught.value)


@given(seed=SEEDS, mode=st.sampled_from(MODES), place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
@settings(max_examples=200, deadline=None)
def test_every_flipped_bit_of_a_png_is_refused(seed, mode, place, bit):
    data = bytearray(png(seed, mode))
    data[int(place * len(data))] ^= 1 << bit
    refused(bytes(data))


@given(
    seed=SEEDS,
    kind=st.sampled_from(["PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM"]),
    share=st.floats(0, 0.98),
)
@settings(max_examples=150, deadline=None)
def test_every_truncated_image_is_refused(seed, kind, share):
    data = encoded(picture(seed, 40), kind)
    refused(data[: int(share * len(data))])


OPTIONS = [(), (("optimize", True),), (("progressive", True),), (("subsampling", 0),), (("quality", 30),)]


@given(seed=SEEDS, options=st.sampled_from(OPTIONS), share=st.floats(0.2, 0.95))
@settings(max_examples=100, deadline=None)
def test_a_jpeg_that_ends_in_zeros_is_refused(seed, options, share):
    data = jpeg(seed, options)
    kept = int(share * len(data))
    refused(data[:kept] + bytes(len(data) - kept))


@given(seed=SEEDS, options=st.sampled_from([(), (("subsampling", 0),)]), share=st.floats(0.3, 0.8))
@settings(max_examples=60, deadline=None)
def test_a_jpeg_with_a_gap_of_zeros_is_refused(seed, options, share):
    data = jpeg(seed, options)
    start = int(share * (len(data) - 600))
    assert "gap of zeros" in refused(data[:start] + bytes(512) + data[start + 512 :])


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("colour", ["white", "black", (12, 200, 90)])
def test_even_areas_thumbnails_and_what_follows_the_end_are_no_damage(options, colour):
    thumbnail = encoded(picture(0), "JPEG")
    even = encoded(Image.new("RGB", (1024, 512), colour), "JPEG", exif=thumbnail, **dict(options))
    expected = Image.open(io.BytesIO(even)).tobytes()
    assert (
        pixels(even) == pixels(even + bytes(4096)) == pixels(even + b"film" + encoded(picture(1), "JPEG")) == expected
    )


def test_only_known_formats_are_opened(tmp_path: Path):
    for name in ("grid.png", "a.jpg", "plain"):
        (tmp_path / name).write_bytes(POSTSCRIPT)
        with pytest.raises(BadImageError, match="no image format that is read here"):
            read_image(tmp_path / name)
    with pytest.raises(BadImageError, match="no image format"):
        picture_uri(tmp_path / "grid.png")


@pytest.mark.parametrize("size", [(2**15, 2**13), (60_000, 60_000)])
def test_sizes_are_looked_at_before_memory(tmp_path: Path, size: tuple[int, int]):
    header = struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n"
    for name, content in ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(99))), (b"IEND", b"")):
        checksum = zlib.crc32(name + content)
        data += struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)
    assert "pixels" in refused(data)
    with (tmp_path / "sparse.png").open("wb") as file:
        file.write(data)
        file.truncate(40 * 10**9)
    with pytest.raises(BadImageError, match=f"40,000,000,000 bytes, and an image file at most {MOST_BYTES:,}"):
        read_image(tmp_path / "sparse.png")


def test_pipes_devices_and_files_of_the_system_are_not_read(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.png")
    for name, target in (("zero.png", "/dev/zero"), ("log.png", "/proc/kmsg"), ("loop.png", "loop.png")):
        (tmp_path / name).symlink_to(target)
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(BadImageError, match=path.name):
            read_image(path)
    with pytest.raises(JLTError, match="leads out of"):
        open_images(tmp_path)
    with pytest.raises(JLTError, match="neither a folder nor a file"):
        open_images(tmp_path / "pipe.png")


def test_arrays_beyond_all_limits_are_not_read(tmp_path: Path):
    labels = np.zeros(2**18, np.int64)
    np.savez_compressed(tmp_path / "a.npz", arr_0=np.zeros((2, 4, 4, 3), np.uint8), arr_1=labels)
    with pytest.raises(JLTError, match=r"arr_1.npy has 2,097,280 bytes"):
        open_images(tmp_path / "a.npz")
