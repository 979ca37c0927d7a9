"""Program texts and documents use plain technical English and no private dialect."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SUFFIXES = {".py", ".md", ".html", ".js", ".css"}

# Each pattern matches whole words, in any case unless it says otherwise, across line breaks and in identifiers too.
DIALECT = {
    r"words": "arguments, options, keys or names; 'the same command', 'different arguments'",
    r"verbs?": "command",
    r"told|said|heard|asked": "reported, printed, received, requested or evaluated",
    r"nobody|whoever|somebody|anybody": "the process, the caller or the user, by name",
    r"beside": "next to, or in addition to",
    r"(lie|lies|lay) (in|on|at|where|there|within|outside|between|among|from|beyond)": "is in, is stored in, is at",
    r"at hand": "available",
    r"anew": "again",
    r"put out": "output",
    r"needs? (the )?least": "requires the fewest",
    r"of one mind": "same arguments on every rank",
    r"ending together": "collective",
    r"(is|are|be|was|were|holds?|stays?|all) (un)?sound|(un)?sound(ness)? (ones?|shards?|files?)": "valid",
    r"what did not come true": "the predictions that failed",
    r"(never|was) chosen by": "used for selection",
    r"(?-i:DESIGN) [0-9]": "docs/notation.md, an equation or a paper",
}


def compiled(pattern: str) -> re.Pattern[str]:
    """Let a pattern match whole words: letters end a word, underscores do not, and a space is any white space."""
    spaced = pattern.replace(" ", r"[\s#]+")
    return re.compile(rf"(?<![A-Za-z])(?:{spaced})(?![A-Za-z])", re.IGNORECASE)


def texts() -> list[Path]:
    """Return the files that a user or a developer reads."""
    found = [path for folder in ("src", "docs", "examples") for path in sorted((ROOT / folder).rglob("*"))]
    return [ROOT / "README.md", *(path for path in found if path.suffix in SUFFIXES and path.is_file())]


FORMATS = ('ARGUMENTS_FILE = "words.json"', 'words: str = ""')
"""Names in files of earlier versions, which must stay readable."""


@pytest.mark.parametrize("pattern", DIALECT)
def test_no_text_uses_the_private_dialect(pattern):
    expression, found = compiled(pattern), []
    for path in texts():
        text = path.read_text(encoding="utf-8")
        for match in expression.finditer(text):
            number = text.count("\n", 0, match.start()) + 1
            line = text.splitlines()[number - 1].strip()
            if line in FORMATS:
                continue
            found.append(f"{path.relative_to(ROOT)}:{number}: {' '.join(match[0].split())!r} in: {line[:90]}")
    assert not found, f"Write instead: {DIALECT[pattern]}.\n" + "\n".join(found)
