"""What the commands share: the base class, the result, and how options are parsed and shown."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import tyro
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructFieldSpec, StructTypeInfo

Positional = tyro.conf.Positional
Flat = tyro.conf.arg(name="")
"""Marks a data class whose fields are options of the command itself, without a prefix."""


@dataclass(frozen=True)
class Result:
    """The outcome of a command: `data` for --json, `text` for a reader, `ok` for the exit code."""

    data: dict[str, Any]
    text: str
    ok: bool = True


@dataclass(frozen=True, kw_only=True)
class Command:
    """Options of every command."""

    json: bool = False
    """Print the result as one JSON object on stdout."""
    debug: bool = False
    """Print the traceback of an error."""

    def run(self) -> Result:
        """Do the work; a JLTError states what is wrong and what to do."""
        raise NotImplementedError


def command_line() -> str:
    """Return the command of this process, quoted for a shell."""
    return shlex.join(["jlt", *sys.argv[1:]])


def option_names(kind: type) -> list[str]:
    """Return the options of a data class as the command line spells them, those of its flattened parts included."""
    names = []
    for name, hint in get_type_hints(kind, include_extras=True).items():
        part, *marks = get_args(hint) or (hint,)
        names += option_names(part) if Flat in marks else [f"--{name.replace('_', '-')}"]
    return names


_registry = ConstructorRegistry()
_resolving: list[type] = []


@_registry.struct_rule
def _plain_help(info: StructTypeInfo) -> StructConstructorSpec | None:
    """Show no empty defaults, which the help texts explain, and INT instead of {None}|INT."""
    if not dataclasses.is_dataclass(info.type) or info.type in _resolving:
        return None
    # While this rule is being applied it passes, so that tyro's own rule answers.
    _resolving.append(info.type)
    spec = ConstructorRegistry.get_struct_spec(info)
    _resolving.pop()
    assert isinstance(spec, StructConstructorSpec)
    return dataclasses.replace(spec, fields=tuple(map(_plain_field, spec.fields)))


def _plain_field(entry: StructFieldSpec) -> StructFieldSpec:
    if not (entry.default is None or isinstance(entry.default, bool) or entry.default in ("", ())):
        return entry
    hint: Any = get_args(entry.type)[0] if get_origin(entry.type) is Annotated else entry.type
    metavar = next(kind.__name__.upper() for kind in get_args(hint)) if entry.default is None else None
    plain: Any = Annotated[entry.type, tyro.conf.arg(help_behavior_hint="", metavar=metavar)]
    return dataclasses.replace(entry, type=plain)


PARSING: dict[str, Any] = {
    "config": (tyro.conf.FlagCreatePairsOff, tyro.conf.OmitSubcommandPrefixes),
    "registry": _registry,
}
"""Settings of every call of tyro."""
