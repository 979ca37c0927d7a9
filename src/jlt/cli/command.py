"""What every verb of the command line is: a data class of its words, which does the work and returns a result."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from typing import Any

import tyro


def command_line() -> str:
    """Return the words of this process as a shell would take them again."""
    return shlex.join(["jlt", *sys.argv[1:]])


@dataclass(frozen=True)
class Result:
    """What a verb found: `data` for --json, `text` for a person, and whether all was well."""

    data: dict[str, Any]
    text: str
    sound: bool = True


@dataclass(frozen=True, kw_only=True)
class Command:
    """Options that every verb has."""

    json: bool = False
    """Print the result as one JSON object on stdout."""
    debug: bool = False
    """Show the traceback of an error."""

    def run(self) -> Result:
        """Do the work; JLTError says what went wrong."""
        raise NotImplementedError


Positional = tyro.conf.Positional


Flat = tyro.conf.arg(name="")
