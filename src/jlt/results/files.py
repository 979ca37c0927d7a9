"""The one reader and the one writer of result files.

A result is a frozen data class with the number of its schema. Its file is JSON, sealed with the SHA-256 of its own
content.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from jlt.errors import JLTError
from jlt.storage.codec import from_json, to_json
from jlt.storage.files import read_sealed_json, sealed_text, write_text


@dataclass(frozen=True)
class ResultFile:
    """What one result file holds."""

    SCHEMA: ClassVar[int]
    """Raised whenever the meaning of a field changes, or a field without a default is added or removed."""
    ALWAYS_SEALED: ClassVar[bool] = False
    """Whether all versions have sealed this file, so that one without a seal is damaged."""
    UNREAD: ClassVar[frozenset[str]] = frozenset()
    """Keys of older files of this schema that are ignored."""


R = TypeVar("R", bound=ResultFile)


def result_json(result: ResultFile) -> dict[str, Any]:
    """Return a result as JSON values with the number of its schema, as its file holds it."""
    return {"schema": result.SCHEMA, **to_json(result)}


def write_result(path: Path, result: ResultFile) -> None:
    """Write a result atomically; NaN and infinity are a ValueError, since they are not JSON."""
    write_text(path, sealed_text(result_json(result)))


def read_result(kind: type[R], path: Path) -> R:
    """Read a result; JLTError for a file that is missing, damaged, edited or of another schema."""
    # Some files of earlier versions have no seal, and some no schema number: those were of schema 1.
    content = read_sealed_json(path, required=kind.ALWAYS_SEALED)
    schema = content.pop("schema", 1)
    if schema != kind.SCHEMA:
        raise JLTError(
            f"{path} has schema {schema}, and this version of jlt reads schema {kind.SCHEMA}: "
            "run the command that wrote it again."
        )
    try:
        return from_json(kind, {key: value for key, value in content.items() if key not in kind.UNREAD})
    except JLTError as error:
        raise JLTError(f"{path} is damaged or was written by another version: {error}") from error
