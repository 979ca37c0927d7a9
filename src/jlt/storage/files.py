"""Files of results: written under a temporary name and renamed, so that a reader never sees half of one.

Also what a folder of results needs: a file that identifies its work, and a lock while a process writes.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import os
import re
import secrets
import shutil
import zipfile
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jlt.errors import JLTError

LOCK = ".lock"
UNREADABLE_ARRAYS = (
    *(OSError, KeyError, ValueError, TypeError, EOFError, AttributeError, RuntimeError),
    *(zipfile.BadZipFile, zlib.error),
)
"""What numpy and torch raise for a damaged file of arrays, or for a file of another kind."""
LONG_LIST = 8
"""A message shows no list with more values than this."""


def why_unreadable(error: Exception) -> str:
    """Return what is wrong with a file of arrays, without numpy's advice to unpickle it."""
    return "it is a pickle, or no archive of arrays" if "pickle" in str(error) else str(error)


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder, flushed to disk and renamed to `path` if the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays last, because some writers choose their format by it.
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    # What has this name already may be a link, which writing would follow.
    temporary.unlink(missing_ok=True)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        fsync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def fsync_folder(folder: Path) -> None:
    """Make the folder's own entries (new names, renames) durable, or the content of a file."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def path_inside(folder: Path, name: str) -> Path:
    """Return the path of a file that another file in `folder` names; JLTError if it, links followed, is outside."""
    try:
        inside = (folder / name).resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError, RuntimeError):
        # A null character, a name that is too long, or links in a circle.
        inside = False
    if not inside:
        raise JLTError(f"{name!r} leads out of {folder}: a file may name only files in its own folder.")
    return folder / name


def require_unlinked(root: Path, path: Path) -> None:
    """Raise JLTError if `path`, or a folder between it and `root`, is a link; `root` itself may be one."""
    for part in (path, *path.parents):
        if part == root:
            return
        if part.is_symlink():
            raise JLTError(
                f"{part} is a link, and nothing in {root} is written or removed through one: put a folder in its place."
            )


def open_unlinked(path: Path, flags: int) -> int:
    """Open a file and return its descriptor; JLTError for a link, which may lead to a file of other work."""
    try:
        return os.open(path, flags | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise JLTError(f"{path} is a link, and nothing is written through one: remove it.") from error
        raise


def write_text(path: Path, text: str) -> None:
    """Write text atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically; NaN and infinity are refused (ValueError) since they are not JSON."""
    write_text(path, _indented(value))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; a JLTError names a file that is missing, does not parse or holds anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise JLTError(f"{path} does not exist.") from error
    # What is nested too deeply, or has a number of thousands of digits, is valid JSON and cannot be parsed.
    except (ValueError, RecursionError) as error:
        raise JLTError(f"{path} is not readable JSON ({error}): it is damaged, or another program wrote it.") from error
    if not isinstance(content, dict):
        raise JLTError(f"{path} holds no JSON object: it is damaged, or another program wrote it.")
    return content


def sealed_text(content: Mapping[str, Any]) -> str:
    """Return JSON whose last field is the SHA-256 of the rest."""
    return _indented({**content, "sha256": sealed_sha256(content)})


def sealed_sha256(content: Mapping[str, Any]) -> str:
    """Return the hash that `sealed_text` appends."""
    return hashlib.sha256(_indented(content).encode()).hexdigest()


def read_sealed_json(path: Path, required: bool = True) -> dict[str, Any]:
    """Return the content of a sealed file, without its hash; JLTError if it was damaged or edited.

    With `required` False, a file without a hash is read as it is.
    """
    content = read_json(path)
    if "sha256" not in content:
        if not required:
            return content
        raise JLTError(f"{path} carries no hash of itself: it is damaged, or another program wrote it.")
    # The bytes are compared too, since an edit may keep the parsed values (1e-05 for 1E-05).
    unchanged = path.read_bytes() == _indented(content).encode()
    recorded = content.pop("sha256")
    if not unchanged or recorded != sealed_sha256(content):
        raise JLTError(f"{path} was edited or damaged: its content does not match its own SHA-256.")
    return content


def _indented(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


class Difference(NamedTuple):
    """A value in which two nested mappings differ; None where one of them has no such key."""

    key: str
    """Dotted name, with the first differing place of a long list in brackets."""
    old: Any
    new: Any


def difference(
    old: Mapping[str, Any], new: Mapping[str, Any], where: str = "", free: Collection[str] = ()
) -> list[Difference]:
    """Return the values in which two nested mappings differ, in the order of their names; `free` keys may differ."""
    found = []
    for key in sorted({*old, *new} - {*free}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += difference(a, b, f"{where}{key}.")
        elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b) > LONG_LIST:
            # The first place stands for all: a thousand class names may differ.
            places = [place for place in range(len(a)) if a[place] != b[place]]
            found += [Difference(f"{where}{key}[{first}]", a[first], b[first]) for first in places[:1]]
        elif a != b:
            found.append(Difference(f"{where}{key}", a, b))
    return found


def format_difference(differences: Iterable[Difference]) -> str:
    """Return differences as a part of a sentence: `seed: 0 -> 1; steps: 10 -> 20`."""
    return "; ".join(f"{key}: {_short(old)} -> {_short(new)}" for key, old, new in differences)


def _short(value: Any) -> str:
    if isinstance(value, list) and len(value) > LONG_LIST:
        return f"{len(value)} values"
    text = repr(value)
    # The first digits of a hash distinguish it.
    return text if not re.fullmatch(r"'[0-9a-f]{64}'", text) else f"{text[:13]}...'"


def claim_folder(
    folder: Path, marker: str, identity: Mapping[str, Any], free: Collection[str] = (), allowed: Collection[str] = ()
) -> None:
    """Make a folder the place of one piece of work, whose JSON `identity` goes into the file `marker`.

    A JLTError leaves the folder as it is: for a file, for a folder that holds anything but entries named in `allowed`,
    and for one whose marker differs in more than the `free` keys; the message shows the difference.
    """
    if folder.exists() and not folder.is_dir():
        raise JLTError(f"{folder} is a file: name a folder.")
    identity = json.loads(json.dumps(identity))
    path = folder / marker
    if path.is_file():
        if differences := difference(read_json(path), identity, free=free):
            raise JLTError(
                f"{folder} holds other work, which differs in: {format_difference(differences)}. Choose another folder."
            )
    elif folder.exists() and (foreign := sorted({entry.name for entry in folder.iterdir()} - {*allowed, LOCK})):
        raise JLTError(f"{folder} exists and holds other files, such as {foreign[0]}: choose an empty or new folder.")
    write_json(path, identity)


@contextlib.contextmanager
def lock_folder(folder: Path, root: Path | None = None) -> Iterator[None]:
    """Hold a folder as its only writer; JLTError if another process does. The lock ends with its process.

    `root` is the folder that the user named, where it is not `folder` itself: JLTError for a link between the two.
    """
    require_unlinked(root or folder, folder)
    folder.mkdir(parents=True, exist_ok=True)
    lock = open_unlinked(folder / LOCK, os.O_RDWR | os.O_CREAT)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise JLTError(f"Another process is writing into {folder}: wait for it, or name another folder.") from error
        yield
    finally:
        os.close(lock)


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes `folder`, by a rename and flushed to disk, if the block succeeds.

    Every process has its own one. What killed processes left is removed. FileExistsError if `folder` holds something by
    then: another process was faster.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(f".{glob.escape(folder.name)}.*.partial"):
        # One that is being written is locked, and a link is none.
        if (left / LOCK).is_file():
            with contextlib.suppress(JLTError), lock_folder(left, folder.parent):
                shutil.rmtree(left, ignore_errors=True)
    partial = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.partial")
    with lock_folder(partial):
        try:
            yield partial
            for path in (*partial.rglob("*"), partial):
                fsync_folder(path)
            try:
                partial.rename(folder)
            except OSError as error:
                if error.errno == errno.ENOTEMPTY:
                    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(folder)) from error
                raise
            (folder / LOCK).unlink()
            fsync_folder(folder.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's content as a hexadecimal string."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
