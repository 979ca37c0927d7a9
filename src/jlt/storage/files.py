"""Result files: written beside and renamed, so that a reader sees the old file or the new one and never half of one.

Also what a folder of results needs: a file that says whose it is, and a lock for as long as somebody writes.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import zipfile
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jlt.errors import JLTError

LOCK = ".lock"
UNREADABLE_ARRAYS = (
    OSError,
    KeyError,
    ValueError,
    TypeError,
    EOFError,
    AttributeError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
)
"""What numpy and torch raise for files of arrays that are damaged or of another kind."""
LONG_LIST = 8
"""Lists with more values than this are not shown whole in a message."""


def why_unreadable(error: Exception) -> str:
    """Return what is wrong with a file of arrays, without numpy's advice to run what is in it."""
    return "it is a pickle, or no archive of arrays" if "pickle" in str(error) else str(error)


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder, flushed to disk and renamed to `path` if the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays last: some writers choose their format by it.
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        fsync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def fsync_folder(folder: Path) -> None:
    """Make the folder's own entries (new names, renames) durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write text atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically; NaN and infinity are refused (ValueError) since they are not JSON."""
    write_text(path, _indented(value))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; a file that is missing, does not parse or holds anything else is named in a JLTError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise JLTError(f"{path} does not exist.") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise JLTError(
            f"{path} is not readable JSON ({error}): it is damaged or was written by something else."
        ) from error
    if not isinstance(content, dict):
        raise JLTError(f"{path} holds no JSON object: it is damaged or was written by something else.")
    return content


def sealed_text(content: Mapping[str, Any]) -> str:
    """Return JSON that carries the SHA-256 of its own content as its last field."""
    return _indented({**content, "sha256": sealed_sha256(content)})


def sealed_sha256(content: Mapping[str, Any]) -> str:
    """Return the hash with which `sealed_text` seals a content."""
    return hashlib.sha256(_indented(content).encode()).hexdigest()


def read_sealed_json(path: Path) -> dict[str, Any]:
    """Return the content of a sealed file, without its hash; JLTError if it was damaged or edited."""
    content = read_json(path)
    if "sha256" not in content:
        raise JLTError(f"{path} carries no hash of itself: it was damaged or written by something else.")
    # The bytes are compared too, since an edit may leave the parsed values as they are (1e-05 for 1E-05).
    unchanged = path.read_bytes() == _indented(content).encode()
    recorded = content.pop("sha256")
    if not unchanged or recorded != sealed_sha256(content):
        raise JLTError(f"{path} was edited or damaged: its content does not match its own SHA-256.")
    return content


def _indented(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


Difference = tuple[str, Any, Any]
"""The dotted name of a value, the old value and the new one; None where there is none."""


def difference(old: Mapping[str, Any], new: Mapping[str, Any], where: str = "") -> list[Difference]:
    """Return every value in which two nested mappings differ."""
    found: list[Difference] = []
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += difference(a, b, f"{where}{key}.")
        elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b) > LONG_LIST:
            # One entry for all: a thousand class names may differ.
            first = next((place for place in range(len(a)) if a[place] != b[place]), None)
            if first is not None:
                found.append((f"{where}{key}[{first}]", a[first], b[first]))
        elif a != b:
            found.append((f"{where}{key}", a, b))
    return found


def format_difference(differences: Sequence[Difference]) -> str:
    """Return differences as text: steps: 10 -> 20; seed: 0 -> 1."""
    return "; ".join(f"{key}: {_short(old)} -> {_short(new)}" for key, old, new in differences)


def _short(value: Any) -> str:
    if isinstance(value, list) and len(value) > LONG_LIST:
        return f"{len(value)} values"
    text = repr(value)
    # What tells hashes apart is at their beginning.
    return text if not re.fullmatch(r"'[0-9a-f]{64}'", text) else f"{text[:13]}...'"


def claim_folder(
    folder: Path, marker: str, words: Mapping[str, Any], free: Collection[str] = (), allowed: Collection[str] = ()
) -> None:
    """Make a folder the place of one piece of work, described by JSON `words` in the file `marker`.

    A JLTError leaves the folder as it is: for a file, for a folder that holds anything but entries named in `allowed`,
    and for one whose marker differs in more than the `free` keys; the message shows the difference.
    """
    if folder.exists() and not folder.is_dir():
        raise JLTError(f"{folder} is a file: name a folder.")
    words = json.loads(json.dumps(words))
    path = folder / marker
    if path.is_file():
        stored = read_json(path)
        before, now = ({key: side[key] for key in side if key not in free} for side in (stored, words))
        if differences := difference(before, now):
            raise JLTError(
                f"{folder} holds other work, which differs in: {format_difference(differences)}. Choose another folder."
            )
    elif folder.exists() and (foreign := sorted({entry.name for entry in folder.iterdir()} - {*allowed, LOCK})):
        raise JLTError(f"{folder} exists and holds other files, such as {foreign[0]}: choose an empty or new folder.")
    write_json(path, words)


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Hold a folder as its only writer; JLTError if another process does. The lock ends with its process."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise JLTError(f"Another process is writing into {folder}: wait for it, or name another folder.") from error
        yield


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's content as a hexadecimal string."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
