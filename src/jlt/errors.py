"""Errors that are messages to the user, and the nearest-name hint that they carry."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

MAX_LISTED = 20
"""Known names that an error lists."""
LONGEST_SHOWN = 80
"""Characters of a name or a value in a message; it may come from a file."""


class JLTError(Exception):
    """A problem that the user can fix; its text is one sentence that states the problem and the remedy."""


class UsageError(JLTError):
    """The arguments of a command are wrong: a name that does not exist, an option that is missing."""


def shortened(text: str) -> str:
    """Return a name or a value as text of a length that a message can show."""
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}…"


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UsageError:
    """Return the error for a name that is not among the known ones, with the nearest of them."""
    name, *names = map(shortened, (name, *known))
    folded = {candidate.lower(): candidate for candidate in names}
    near = [folded[match] for match in difflib.get_close_matches(name.lower(), folded, n=3, cutoff=0.4)]
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    hint = f"did you mean {' or '.join(near)}?" if near else f"choose from {', '.join(names[:MAX_LISTED])}{more}."
    return UsageError(f"There is no {kind} named {name!r}: {hint}")
