"""The standard streams: text in the characters that a terminal can show, and one sentence where a stream is lost."""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import re
import sys
import unicodedata
from collections.abc import Iterator

from jlt.errors import JLTError, without_credentials

PLAIN = {
    **{"—": "-", "─": "-", "━": "-", "⁻": "-", "\N{MINUS SIGN}": "-", "…": "...", "→": "->", "±": "+-", "·": "."},
    **{"\N{MULTIPLICATION SIGN}": "x", "≥": ">=", "≤": "<=", "ε": "eps", "λ": "lambda", "∞": "inf"},
}
"""What replaces characters that a stream cannot encode; others lose their accent, or become an escape."""
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
"""Characters that command a terminal or change the direction of what follows."""
LONGEST_MESSAGE = 4000
"""Letters of a message that are shown; a name in it may come from a file and have any length."""


def prepare_streams() -> None:
    """Open what is closed among the standard streams, and let stdout and stderr write whatever they are given.

    A closed stdout becomes one that cannot be written, so that its loss is noticed.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            # Otherwise the next file that is opened would receive what libraries print.
            os.open(os.devnull, os.O_RDONLY if descriptor == 1 else os.O_RDWR)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)
    codecs.register_error("jlt", _in_plain_characters)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="jlt")


def _in_plain_characters(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(_plain, error.object[error.start : error.end])), error.end


def _plain(character: str) -> str:
    simple = unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode()
    return PLAIN.get(character) or simple or ascii(character)[1:-1]


def harmless(text: str) -> str:
    """Return text with its control characters as escapes: a name from a file must not command the terminal."""
    return CONTROLS.sub(lambda match: ascii(match[0])[1:-1], text)


def say(message: str) -> None:
    """Print a message to a person on stderr, without credentials and cut if it is long; a lost stream ends no work."""
    if len(message) > LONGEST_MESSAGE:
        message = f"{message[: LONGEST_MESSAGE // 2]}…{message[-LONGEST_MESSAGE // 2 :]}"
    with contextlib.suppress(OSError, ValueError):
        print(harmless(without_credentials(message)), file=sys.stderr, flush=True)


def deliver(text: str = "") -> None:
    """Print a result on stdout, after everything that was printed before; JLTError if it cannot be written."""
    with printing():
        if text:
            print(text)
        sys.stdout.flush()


@contextlib.contextmanager
def printing() -> Iterator[None]:
    """Turn the loss of stdout during a block that does nothing but print into a JLTError."""
    try:
        yield
    except OSError as error:
        # The interpreter must not complain at its last flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        raise JLTError(f"stdout cannot be written ({error.strerror}), so the output is incomplete.") from error
