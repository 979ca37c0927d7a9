"""Errors that are messages to the user, the nearest-name hint that they carry, and what no text may repeat."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

LONGEST_NAME = 80
"""Characters of a name in a message."""
MAX_LISTED = 20
"""Known names that an error lists."""
CREDENTIALS = (
    # user:password@ of a URL; a path has a single slash of it.
    (re.compile(r"\b([a-z][a-z0-9+.-]*:/+)\S*@", re.IGNORECASE), r"\1***@"),
    # The query of a URL, which may be signed, and such values without one.
    (re.compile(r"\b([a-z][a-z0-9+.-]*:/+[^\s?]*\?)(?!\*\*\*)[^\s'\"]+", re.IGNORECASE), r"\1***"),
    (re.compile(r"([?&][\w.-]*(?:token|key|sig|secret|passw|cred)[\w.-]*=)[^\s&'\"]+", re.IGNORECASE), r"\1***"),
    # A token of the Hub.
    (re.compile(r"\bhf_[A-Za-z0-9]{8,}"), "hf_..."),
)
"""Patterns of what gives access, and what takes their place."""


class JLTError(Exception):
    """A problem that the user can fix; its text is one sentence that states the problem and the remedy."""


class UsageError(JLTError):
    """The arguments of a command are wrong: a name that does not exist, an option that is missing."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UsageError:
    """Return the error for a name that is not among the known ones, with the nearest of them."""
    names, name = list(known), name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}..."
    folded = {candidate.lower(): candidate for candidate in names}
    near = [folded[match] for match in difflib.get_close_matches(name.lower(), folded, n=3, cutoff=0.4)]
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    hint = f"did you mean {' or '.join(near)}?" if near else f"choose from {', '.join(names[:MAX_LISTED])}{more}."
    return UsageError(f"There is no {kind} named {name!r}: {hint}")


def without_credentials(text: str) -> str:
    """Return a text whose URLs have neither user, password nor query, and which holds no token of the Hub."""
    if not any(mark in text for mark in (":/", "=", "hf_")):
        return text
    for pattern, replacement in CREDENTIALS:
        text = pattern.sub(replacement, text)
    return text
