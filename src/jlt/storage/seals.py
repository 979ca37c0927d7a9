"""Seals inside PNG and .npz files: a hash of all other bytes, and of the work and the name that a file belongs to.

A PNG has it as its last text chunk, an .npz as the comment of its archive, so other programs read both as before.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from pathlib import Path

from jlt.errors import JLTError

DIGITS = 64
END_OF_PNG = b"\0\0\0\0IEND\xaeB`\x82"
CHUNK = b"tEXtseal\0"
CHUNK_BYTES = 4 + len(CHUNK) + DIGITS + 4
END_OF_ZIP = b"PK\x05\x06"
END_OF_ZIP_BYTES = 22
"""Of an archive without a comment; its last two bytes are the comment's length."""
BLOCK = 2**20


def seal_file(path: Path, name: str, work: str) -> None:
    """Seal a PNG or an .npz, in place, as the file `name` of a work with this identity.

    ValueError for a file that another program than Pillow or numpy may have written.
    """
    with path.open("rb+") as file:
        if _holds(file.fileno(), END_OF_PNG, len(END_OF_PNG)):
            file.seek(-len(END_OF_PNG), os.SEEK_END)
            body = file.tell()
            file.write(_chunk(_digest(path, body, name, work)) + END_OF_PNG)
        elif _holds(file.fileno(), END_OF_ZIP, END_OF_ZIP_BYTES):
            file.seek(-2, os.SEEK_END)
            file.write(DIGITS.to_bytes(2, "little"))
            file.flush()
            file.write(_digest(path, file.tell(), name, work).encode())
        else:
            raise ValueError(f"{path} is no PNG or .npz that can be sealed")


def is_intact(path: Path, name: str, work: str) -> bool | None:
    """Return whether a file is as it was sealed under this name in this work; None if it is whole and has no seal."""
    # Opening a pipe would wait for ever.
    if not path.is_file():
        return False
    size = path.stat().st_size
    with path.open("rb") as file:
        descriptor = file.fileno()
        if path.suffix == ".png":
            body = size - len(END_OF_PNG) - CHUNK_BYTES
            chunk = os.pread(descriptor, CHUNK_BYTES, max(0, body))
            if not _holds(descriptor, END_OF_PNG, len(END_OF_PNG)):
                return False
            return chunk == _chunk(_digest(path, body, name, work)) if chunk[4:].startswith(CHUNK) else None
        if _holds(descriptor, END_OF_ZIP, END_OF_ZIP_BYTES):
            return None
        recorded = os.pread(descriptor, DIGITS, max(0, size - DIGITS))
        return recorded == _digest(path, size - DIGITS, name, work).encode()


def _chunk(digest: str) -> bytes:
    content = CHUNK + digest.encode()
    return (len(content) - 4).to_bytes(4, "big") + content + zlib.crc32(content).to_bytes(4, "big")


def require_sealed(path: Path, work: str) -> None:
    """Raise JLTError for a sealed file that was damaged since, or that is of another work or another name."""
    if is_intact(path, path.name, work) is False:
        raise JLTError(f"{path} is damaged, or was copied here or renamed: remove it to have it drawn again.")


def _holds(descriptor: int, mark: bytes, from_end: int) -> bool:
    size = os.fstat(descriptor).st_size
    return size >= from_end and os.pread(descriptor, len(mark), size - from_end) == mark


def _digest(path: Path, size: int, name: str, work: str) -> str:
    """Return the hash of the first bytes of a file, and of what it belongs to."""
    digest = hashlib.sha256(f"{work} {name}\n".encode())
    with path.open("rb") as file:
        while size > 0 and (block := file.read(min(BLOCK, size))):
            digest.update(block)
            size -= len(block)
    return digest.hexdigest()
