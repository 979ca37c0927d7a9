"""The one reader and the one writer of result files.

A result is a frozen data class with the number of its schema. Its file is JSON, sealed with the SHA-256 of its own
content and of what it belongs to (`jlt.storage.files`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from jlt.errors import JLTError
from jlt.storage.codec import from_file, to_json
from jlt.storage.files import read_sealed_json, sealed_text, with_place, write_text


@dataclass(frozen=True)
class ResultFile:
    """What one result file holds."""

    SCHEMA: ClassVar[int]
    """Raised whenever the meaning of a field changes, or a field without a default is added or removed."""
    PLACED: ClassVar[bool] = True
    """Whether it belongs to the folder that it is in, and to its name there."""
    UNREAD: ClassVar[frozenset[str]] = frozenset()
    """Keys of older files of this schema that are ignored."""


R = TypeVar("R", bound=ResultFile)


def result_json(result: ResultFile) -> dict[str, Any]:
    """Return a result as JSON values with the number of its schema, as its file holds it."""
    return {"schema": result.SCHEMA, **to_json(result)}


def write_result(path: Path, result: ResultFile) -> None:
    """Write a result atomically; NaN and infinity are a ValueError, since they are not JSON."""
    content = result_json(result)
    write_text(path, sealed_text(with_place(content, path) if result.PLACED else content))


def read_result(kind: type[R], path: Path) -> R:
    """Read a result; JLTError for a file that is missing, damaged, edited, misplaced or of another schema."""
    return parse_result(kind, path, read_sealed_json(path))


def parse_result(kind: type[R], path: Path, content: Mapping[str, Any]) -> R:
    """Return the result that a file at this path holds; JLTError for another schema, and for an impossible value."""
    # Some files of earlier versions have no schema number: those were of schema 1.
    schema = content.get("schema", 1)
    if schema != kind.SCHEMA:
        raise JLTError(
            f"{path} has schema {schema}, and this version of jlt reads schema {kind.SCHEMA}: "
            "run the command that wrote it again."
        )
    fields = {key: value for key, value in content.items() if key not in {"schema", *kind.UNREAD}}
    return from_file(kind, path, fields)
