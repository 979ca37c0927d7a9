"""Errors that are messages to the user, and the nearest-name hint that they carry."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher

MAX_LISTED = 20
"""Known names that an error lists."""
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
