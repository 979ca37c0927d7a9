"""Frozen data classes as plain JSON types, and back: one codec for configurations and for result files.

A field is a bool, an int, a float, a str, a literal, a nested data class, a tuple of one of these, a mapping from str,
int or a literal to one of these, one of these or None, or `Any` for JSON that is passed on as it is. A number may be
annotated with the `Range` of its values (`jlt.ranges`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from jlt.errors import JLTError, shortened, unknown_name
from jlt.ranges import Range, RangeError

T = TypeVar("T")
LARGEST_INTEGER = 2**64 - 1
Count = Annotated[int, Range(0)]
Size = Annotated[int, Range(1)]
NonNegative = Annotated[float, Range(0.0)]
Share = Annotated[float, Range(0.0, 1.0)]


def to_json(value: Any) -> Any:
    """Return a data class, or anything that may be a field of one, as plain JSON types.

    A field whose metadata has `omit_default` is left out where it has its default.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            entry.name: to_json(getattr(value, entry.name))
            for entry in dataclasses.fields(value)
            if not (entry.metadata.get("omit_default") and getattr(value, entry.name) == entry.default)
        }
    if isinstance(value, Mapping):
        return {str(key): to_json(entry) for key, entry in value.items()}
    if isinstance(value, (tuple, list)):
        return list(value) if _all_float(value) else [to_json(entry) for entry in value]
    return value


def _all_float(values: Sequence[Any]) -> bool:
    # Spectra hold thousands of numbers: a call for each of them would take most of the time.
    return all(type(entry) is float for entry in values)


def from_json(kind: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """Build a data class from plain JSON types; an unknown key, a missing one or an impossible value is a JLTError.

    `where` begins the dotted names in errors.
    """
    if not isinstance(values, Mapping):
        raise JLTError(f"{where.removesuffix('.') or 'its content'} must be an object with named fields.")
    hints = _hints(typing.cast(Any, kind))
    for key in values:
        if key not in hints:
            raise unknown_name("setting", f"{where}{key}", [f"{where}{known}" for known in hints])
    fields = dataclasses.fields(typing.cast(Any, kind))
    required = {entry.name for entry in fields if entry.default is entry.default_factory is dataclasses.MISSING}
    if missing := sorted(required - values.keys()):
        raise JLTError(f"{where}{missing[0]} is missing.")
    fitting = {key: _convert(hints[key], value, f"{where}{key}") for key, value in values.items()}
    try:
        return kind(**fitting)
    except RangeError as error:
        raise RangeError(f"{where}{error.name}", error.values, error.found) from error
    except (ValueError, TypeError, ArithmeticError) as error:
        raise JLTError(f"{where.removesuffix('.') or 'its content'} is not possible: {error}.") from error


def known_fields(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that a data class has fields for; JLTError for what is no object."""
    if not isinstance(values, Mapping):
        raise JLTError(f"{shortened(repr(values))} is no object with named fields.")
    return {key: value for key, value in values.items() if key in _hints(kind)}


def from_file(kind: type[T], path: Path, content: Mapping[str, Any]) -> T:
    """Return the data class that a file holds; JLTError, with the file's name, for a value that is not possible."""
    try:
        return from_json(kind, content)
    except JLTError as error:
        raise JLTError(f"{path} is damaged or was written by another version: {error}") from error


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    names = {entry.name for entry in dataclasses.fields(kind)}
    return {name: hint for name, hint in typing.get_type_hints(kind, include_extras=True).items() if name in names}


def _convert(hint: Any, value: Any, where: str) -> Any:
    """Return `value` as the type `hint` of a field."""
    if hint is Any:
        return value
    if typing.get_origin(hint) is Annotated:
        return _in_range(_convert(hint.__origin__, value, where), hint.__metadata__, where)
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return from_json(typing.cast(type, hint), value, f"{where}.")
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple and isinstance(value, (list, tuple)):
        if Ellipsis not in arguments and len(value) != len(arguments):
            raise JLTError(f"{where} must have {len(arguments)} values.")
        if arguments[0] is float and _all_float(value) and all(map(math.isfinite, value)):
            return tuple(value)
        return tuple(_convert(arguments[0], entry, where) for entry in value)
    if origin is Literal:
        if value not in arguments:
            raise JLTError(f"{where} must be one of {', '.join(map(str, arguments))}, not {shortened(repr(value))}.")
        return value
    if origin in (typing.Union, types.UnionType):
        (kind,) = set(arguments) - {types.NoneType}
        return None if value is None else _convert(kind, value, where)
    if isinstance(origin, type) and issubclass(origin, Mapping) and isinstance(value, Mapping):
        key_hint, entry_hint = arguments
        return {
            _key(key_hint, key, where): _convert(entry_hint, entry, f"{where}.{key}") for key, entry in value.items()
        }
    if type(value) is int and abs(value) > LARGEST_INTEGER:
        raise JLTError(f"{where} is a whole number of more than 64 bits.")
    if hint is float and type(value) is int:
        return float(value)
    if hint is float and type(value) is float and not math.isfinite(value):
        raise JLTError(f"{where} must be a finite number, not {value}.")
    if not isinstance(hint, type) or not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise JLTError(f"{where} must be {getattr(hint, '__name__', hint)}, not {shortened(repr(value))}.")
    return value


def _in_range(value: Any, marks: Sequence[Any], where: str) -> Any:
    for mark in marks:
        if isinstance(mark, Range) and value not in mark:
            raise RangeError(where, mark, value)
    return value


def _key(hint: Any, key: Any, where: str) -> Any:
    """Return the key of a mapping, which JSON has as text."""
    if hint is int and isinstance(key, str):
        try:
            return int(key)
        except ValueError as error:
            raise JLTError(f"{where} has the key {key!r}, which is no whole number.") from error
    return _convert(hint, key, where)
