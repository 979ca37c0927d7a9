"""The one way in which image files are read: they may be damaged, or made to do harm."""

from __future__ import annotations

import errno
import io
import os
import stat
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from PIL import Image, UnidentifiedImageError

from jlt.errors import JLTError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM", "TIFF")
"""What is read, whatever a file's name ends in. Pillow knows more; for PostScript it would start another program."""
MOST_BYTES = 2**29
"""Size of an image file."""
MOST_PIXELS = 2**27
"""Pixels of an image: 400 MB of RGB."""
ABSENT = (errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO)
"""Faults of one file's name or kind, next to those that Python's own types tell from faults of a disk."""
ZEROS = bytes(64)
"""More zeros than any picture has in a row, where zero bits do not stand for an even area."""
END_OF_JPEG = b"\xff\xd9"


class BadImageError(JLTError):
    """One image that cannot be used; `image` names it, `reason` says why. Encoding stops at it, or skips it."""

    def __init__(self, image: str, reason: str) -> None:
        # Both arguments go to the base class, so that the error can be pickled in a worker process.
        super().__init__(image, reason)
        self.image, self.reason = image, reason

    def __str__(self) -> str:
        return f"{self.image} {self.reason}: repair or remove it."


def read_image(path: Path, describe: Callable[[], str] | None = None) -> Image.Image:
    """Return the decoded image of a file as `decode_image` does; without `describe`, errors name the path.

    Only a regular file is opened, since a pipe would block for ever, and a device may act. BadImageError for any other,
    and for one of more than MOST_BYTES, of which nothing is read; JLTError for a fault of the disk.
    """
    describe = describe or (lambda: str(path))
    return decode_image(_content(path, describe), describe)


def _content(path: Path, describe: Callable[[], str]) -> bytes:
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise BadImageError(describe(), "is not a file")
        # Non-blocking, since another process may have put a pipe in its place.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            require_size(size, describe)
            # No more than the size: the files of /proc claim to be empty, and reading some of them blocks.
            return file.read(size)
    except (FileNotFoundError, PermissionError, IsADirectoryError, ValueError) as error:
        raise BadImageError(describe(), f"cannot be read ({getattr(error, 'strerror', error)})") from error
    except OSError as error:
        if error.errno in ABSENT:
            raise BadImageError(describe(), f"cannot be read ({error.strerror})") from error
        # A fault of the disk or the network is no property of the image, so the image is not skipped.
        raise JLTError(f"{describe()} cannot be read ({error.strerror}).") from error


def require_size(size: int, describe: Callable[[], str]) -> None:
    """Raise BadImageError for an image file of more than MOST_BYTES, before it is read."""
    if size > MOST_BYTES:
        raise BadImageError(describe(), f"has {size:,} bytes, and an image file at most {MOST_BYTES:,}")


def decode_image(data: bytes, describe: Callable[[], str]) -> Image.Image:
    """Return the first frame of an encoded image, in the file's own mode and size.

    BadImageError, with the text that `describe` returns, for a file of none of the FORMATS, for one that is truncated
    or damaged as far as its format tells, and for more than MOST_PIXELS. Every changed bit of a PNG is found by the
    checksums of its chunks; a JPEG has none, so that only a missing end and an impossible gap are found.
    """

    def fail(reason: str, error: Exception | None = None) -> NoReturn:
        raise BadImageError(describe(), reason) from error

    require_size(len(data), describe)
    if not data:
        fail("holds no bytes")
    try:
        with warnings.catch_warnings():
            # Pillow warns of damaged EXIF, which does not change the pixels, and of sizes below its own limit.
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            if image.width * image.height > MOST_PIXELS:
                fail(f"has {image.width} x {image.height} pixels, and an image at most {MOST_PIXELS:,}")
            # Before the pixels, whose decoder may have a reason of its own.
            if fault := _fault(data, image.format or ""):
                fail(fault)
            image.load()
    except (MemoryError, BadImageError):
        raise
    except UnidentifiedImageError as error:
        fail(f"is of no image format that is read here ({', '.join(FORMATS)})", error)
    except Exception as error:
        # Decoders raise many types: OSError, SyntaxError, struct.error, ...
        fail(f"does not decode as an image ({error})", error)
    return image


def _fault(data: bytes, kind: str) -> str:
    """Return what is wrong with an encoded image that its decoder does not see; empty if nothing is."""
    if kind == "PNG":
        return _png_fault(data)
    if kind in ("JPEG", "MPO"):
        return _jpeg_fault(data)
    if kind == "WEBP" and len(data) < 8 + int.from_bytes(data[4:8], "little"):
        return "is truncated"
    return ""


def _png_fault(data: bytes) -> str:
    """Compare the checksum of every chunk (PNG, 5.3 and 5.4), which the decoder skips for pixels."""
    view, place = memoryview(data), 8
    while place + 12 <= len(data):
        length, name = struct.unpack_from(">I4s", data, place)
        end = place + 12 + length
        if end > len(data):
            break
        if zlib.crc32(view[place + 4 : end - 4]) != int.from_bytes(view[end - 4 : end], "big"):
            return f"is damaged: the checksum of its chunk {name!r} at byte {place:,} is wrong"
        if name == b"IEND":
            return ""
        place = end
    return "is truncated"


def _jpeg_fault(data: bytes) -> str:
    """Look for the end marker (ITU T.81, B.1.1.3), and for a gap of zeros in the coded data before it."""
    # By the number of each table of AC coefficients (T.81, B.2.4.2): the symbol of its shortest code, which is zeros.
    zeros_mean: dict[int, int] = {}
    components, place = 0, 2
    while 0 < (place := data.find(b"\xff", place)) < len(data) - 4:
        marker, length = data[place + 1], int.from_bytes(data[place + 2 : place + 4], "big")
        if marker in (0x00, 0x01, 0xFF) or 0xD0 <= marker <= 0xD8:
            place += 1
            continue
        body = data[place + 4 : place + 2 + length]
        place += 2 + length
        if marker in (0xC0, 0xC1) and len(body) > 5:
            components = body[5]
        elif marker == 0xC4:
            zeros_mean |= _zero_codes(body)
        elif marker == 0xDA:
            if data.rfind(END_OF_JPEG, place) < 0:
                return "is truncated, or its end is damaged: it has no end marker"
            # Zero bits are an even area where the shortest code ends a block, and otherwise no picture.
            together = components > 0 and body[:1] == bytes([components]) and len(body) > 2
            gap = data.find(ZEROS, place) if together and zeros_mean.get(body[2] & 15, 0) else -1
            # Anything may follow the end, such as a film.
            if 0 <= gap < data.find(END_OF_JPEG, place):
                return "is damaged: it has a gap of zeros"
            return ""
    return "is truncated: it has no pixels"


def _zero_codes(tables: bytes) -> dict[int, int]:
    """Return the symbol of the first code of each table of AC coefficients in a segment of Huffman tables."""
    found: dict[int, int] = {}
    while len(tables) > 17:
        if tables[0] >> 4:
            found[tables[0] & 15] = tables[17]
        tables = tables[17 + sum(tables[1:17]) :]
    return found
