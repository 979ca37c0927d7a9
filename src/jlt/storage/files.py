"""Files of results: written under a temporary name and renamed, so that a reader never sees half of one."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import secrets
import stat
import zipfile
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jlt.errors import JLTError, without_credentials

UNREADABLE_ARRAYS = (
    *(OSError, KeyError, ValueError, TypeError, EOFError, AttributeError, RuntimeError),
    *(zipfile.BadZipFile, zlib.error),
)
"""What numpy and torch raise for a damaged file of arrays, or for a file of another kind."""
LARGEST_JSON = 2**30
SEAL = "sha256"
PLACE = "belongs_to"
WORK = "work"
MARKERS = ("config.json", "plan.json", "analysis.json")
"""The files that say what a run, a comparison or an analysis is; others in their folders belong to them."""
INSIDE = {1: ("evaluations", "points"), 2: ("checkpoints", "snapshots")}
"""Folders within such a folder, by how many levels below it their files are."""
LONG_LIST = 8
"""A message shows no list with more values than this."""


def why_unreadable(error: Exception) -> str:
    """Return what is wrong with a file of arrays, without numpy's advice to unpickle it."""
    return "it is a pickle, or no archive of arrays" if "pickle" in str(error) else str(error)


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder, flushed to disk and renamed to `path` if the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = partial_path(path)
    # Made here, so that no link is followed, and since some libraries make files that only their owner can read.
    mode = stat.S_IMODE(_create(temporary))
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        temporary.replace(path)
        fsync_path(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def partial_path(path: Path) -> Path:
    """Return a new name under which this process writes a file or a folder before it is renamed to `path`."""
    # Threads, and processes in several containers, have one number. The suffix stays last, because some writers choose
    # their format by it.
    return path.with_name(f".{path.stem}.{os.getpid()}-{secrets.token_hex(4)}.partial{path.suffix}")


def _create(path: Path) -> int:
    """Create an empty file, and return the mode that the umask gives it."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        return os.fstat(descriptor).st_mode
    finally:
        os.close(descriptor)


def fsync_path(path: Path) -> None:
    """Make the content of a file, or the entries of a folder (new names, renames), durable."""
    descriptor = os.open(path, os.O_RDONLY)
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
    """Read a JSON object; a JLTError names a file that is missing, does not parse or holds anything else."""
    return parse_json(_json_bytes(path), str(path))


def _json_bytes(path: Path) -> bytes:
    if not path.exists():
        raise JLTError(f"{path} does not exist.")
    # Opening a pipe would wait for ever.
    if not path.is_file():
        raise JLTError(f"{path} is not a file.")
    if path.stat().st_size > LARGEST_JSON:
        raise JLTError(f"{path} has more than {LARGEST_JSON:,} bytes: it is damaged, or another program wrote it.")
    return path.read_bytes()


def parse_json(text: bytes, name: str) -> dict[str, Any]:
    """Parse a JSON object whose numbers are finite; JLTError for anything else, with the `name` of where it is."""
    try:
        content = json.loads(text.decode(), parse_constant=_no_number, parse_float=_finite)
    # A number with thousands of digits is a ValueError, too.
    except (ValueError, RecursionError) as error:
        raise JLTError(f"{name} is not readable JSON ({error}): it is damaged, or another program wrote it.") from error
    if not isinstance(content, dict):
        raise JLTError(f"{name} holds no JSON object: it is damaged, or another program wrote it.")
    return content


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _no_number(text)


def sealed_text(content: Mapping[str, Any]) -> str:
    """Return JSON whose last field is the SHA-256 of the rest."""
    return _indented({**content, SEAL: sealed_sha256(content)})


def sealed_sha256(content: Mapping[str, Any]) -> str:
    """Return the hash that `sealed_text` appends."""
    return hashlib.sha256(_indented(content).encode()).hexdigest()


def read_sealed_json(path: Path) -> dict[str, Any]:
    """Return the content of a sealed file, without its hash and place.

    JLTError if it was damaged or edited, has no seal, or was written for another folder or under another name.
    """
    text = _json_bytes(path)
    content = parse_json(text, str(path))
    if SEAL not in content:
        raise unsealed(path)
    # The bytes are compared too, since an edit may keep the parsed values (1e-05 for 1E-05).
    unchanged = text == _indented(content).encode()
    recorded = content.pop(SEAL)
    if not unchanged or recorded != sealed_sha256(content):
        raise JLTError(f"{path} was edited or damaged: its content does not match its own SHA-256.")
    # Earlier versions did not record the place.
    place = content.pop(PLACE, None)
    if place is not None and (here := place_of(path)) and place != here:
        raise JLTError(
            f"{path} was copied or renamed, since it was written for {_place_text(place)}, and this is "
            f"{_place_text(here)}: remove it or put it back."
        )
    return content


def unsealed(path: Path) -> JLTError:
    """Return the error for a file without a seal."""
    return JLTError(
        f"{path} carries no hash of itself: an earlier version wrote it, an editor changed it, or it is damaged. "
        f"`jlt verify {path.parent} --seal` accepts it as it is."
    )


def without_seal(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of a file as it was before it was sealed."""
    return {key: value for key, value in content.items() if key not in (SEAL, PLACE, WORK)}


def with_place(content: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return the content of a file with what it belongs to: the work in its folder, and its own name there."""
    place = place_of(path)
    return {**content, PLACE: place} if place else dict(content)


def place_of(path: Path) -> dict[str, str] | None:
    """Return the identity of the work that a file belongs to, and its name there; None outside of such a folder."""
    path = path.parent.resolve() / path.name
    above = path.parents
    levels = next((n for n, names in INSIDE.items() if len(above) > n and above[n - 1].name in names), 0)
    root = above[levels]
    marker = next((root / name for name in MARKERS if (root / name).is_file()), None)
    return {"work": read_marker(marker)[1], "file": path.relative_to(root).as_posix()} if marker else None


def _place_text(place: Any) -> str:
    named = isinstance(place, Mapping) and isinstance(place.get("file"), str)
    return f"{place['file']} of the work {str(place.get('work'))[:12]}" if named else "another place"


def read_marker(path: Path) -> tuple[dict[str, Any], str]:
    """Return the content of the sealed file that says what a folder is for, and the identity of this work."""
    content = read_sealed_json(path)
    work = content.pop(WORK, None)
    if not isinstance(work, str):
        raise unsealed(path)
    return content, work


def write_marker(path: Path, content: Mapping[str, Any], free: Collection[str] = ()) -> None:
    """Write the sealed file that says what a folder is for, with the identity of the work if it has none.

    That is a hash of the content without the `free` keys, and stays when these change.
    """
    work = content.get(WORK) or sealed_sha256({key: content[key] for key in content if key not in free})
    write_text(path, sealed_text({**content, WORK: work}))


def work_of(folder: Path) -> str:
    """Return the identity of the run in a folder, empty where there is none."""
    path = folder / MARKERS[0]
    return read_marker(path)[1] if path.is_file() else ""


def recorded(value: Any) -> Any:
    """Return a value of JSON types as a file records it: plain, and without the credentials of its URLs."""
    return _redacted(json.loads(json.dumps(value)))


def without_paths(value: Any) -> Any:
    """Return JSON in which the last part stands for every absolute path, which is of the machine that measured."""
    if isinstance(value, Mapping):
        return {key: without_paths(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(entry) for entry in value]
    return Path(value).name if isinstance(value, str) and value.startswith(("/", "~")) else value


def _redacted(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _redacted(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_redacted(entry) for entry in value]
    return without_credentials(value) if isinstance(value, str) else value


def _indented(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, indent=2, allow_nan=False)
    if without_credentials(text) != text:
        text = json.dumps(recorded(content), indent=2, allow_nan=False)
    return text + "\n"


class Difference(NamedTuple):
    """A value in which two nested mappings differ; None where one of them has no such key."""

    key: str
    """Dotted name, with the first differing place of a long list in brackets."""
    old: Any
    new: Any


def difference(
    old: Mapping[str, Any], new: Mapping[str, Any], where: str = "", free: Collection[str] = ()
) -> list[Difference]:
    """Return the values in which two nested mappings differ, in the order of their names; `free` ones may differ."""
    found = []
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if f"{where}{key}" in free:
            continue
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += difference(a, b, f"{where}{key}.", free)
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


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's content as a hexadecimal string."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
