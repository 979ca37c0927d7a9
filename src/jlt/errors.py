"""Errors that are messages to the user, the nearest name that they suggest, and texts without credentials."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher

MAX_LISTED = 20
"""Known names that an error lists."""
CREDENTIALS = (
    # user:password@ of a URL; `Path` keeps only one of the two slashes.
    (re.compile(r"\b([a-z][a-z0-9+.-]*:/+)\S*@", re.IGNORECASE), r"\1***@"),
    # The query of a URL, which may be signed, and such values without one.
    (re.compile(r"\b([a-z][a-z0-9+.-]*:/+[^\s?]*\?)(?!\*\*\*)[^\s'\"]+", re.IGNORECASE), r"\1***"),
    (re.compile(r"([?&][\w.-]*(?:token|key|sig|secret|passw|cred)[\w.-]*=)[^\s&'\"]+", re.IGNORECASE), r"\1***"),
    # A token of the Hub.
    (re.compile(r"\bhf_[A-Za-z0-9]{8,}"), "hf_..."),
)
"""Patterns of what gives access, and what takes their place."""


LONGEST_SHOWN = 80
"""Characters of a name or a value in a message; it may come from a file."""
SIMILAR = 0.4
"""Likeness from which on a name may be meant, 0 to 1."""
AS_SIMILAR = 0.15
"""By how much less than the nearest name further ones may be alike."""


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
    near = _nearest(name, names)
    hint = f"did you mean {' or '.join(near)}?" if near else f"choose from {few(names, MAX_LISTED)}."
    return UsageError(f"There is no {kind} named {name!r}: {hint}")


def without_credentials(text: str) -> str:
    """Return a text whose URLs have neither user, password nor query, and which holds no token of the Hub."""
    if not any(mark in text for mark in (":/", "=", "hf_")):
        return text
    for pattern, replacement in CREDENTIALS:
        text = pattern.sub(replacement, text)
    return text


def few(names: Sequence[str], most: int = 5) -> str:
    """Return the first of some names as text, with the number of the others."""
    return ", ".join(names[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else "")


def _nearest(name: str, names: Iterable[str]) -> list[str]:
    """Return up to three names that may be meant; of a dotted option the last part or its initials suffice."""
    wanted, folded = name.lower(), {candidate.lower(): candidate for candidate in names}
    last = {candidate: f"--{candidate.rpartition('.')[2]}" for candidate in folded if candidate.startswith("--")}
    same = [candidate for candidate, part in last.items() if wanted in (part, _initials(part))]

    def likeness(candidate: str) -> float:
        return max(SequenceMatcher(None, text, wanted).ratio() for text in (candidate, last.get(candidate, candidate)))

    ranked = sorted(((likeness(candidate), candidate) for candidate in folded), reverse=True)
    alike = [candidate for value, candidate in ranked if value >= max(SIMILAR, ranked[0][0] - AS_SIMILAR)]
    return [folded[candidate] for candidate in (same or alike)[:3]]


def _initials(option: str) -> str:
    return f"--{''.join(part[:1] for part in option[2:].split('-'))}"
