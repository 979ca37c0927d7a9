"""Numbers and lists as a person writes them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from jlt.report.results import Spread

TIMES = "\N{MULTIPLICATION SIGN}"
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def number(value: float | None, digits: int = 3) -> str:
    """Format with some significant digits: 20.1, 0.0008, 1,240, 3.2 × 10⁻⁷; a dash for None and infinity."""
    if value is None or not math.isfinite(value):
        return "—"
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    power = int(exponent)
    if power < -4 or power > 8:
        return f"{mantissa} {TIMES} 10{str(power).translate(_SUPERSCRIPT)}"
    return f"{float(f'{mantissa}e{power}'):,.{max(digits - 1 - power, 0)}f}"


def with_error(value: float, error: float) -> tuple[str, str]:
    """Format a value and its error to the same decimal place, that of the error's second digit: 2.563, ± 0.031."""
    if not (math.isfinite(value) and math.isfinite(error)) or error <= 0:
        return number(value, 4), f"± {number(error, 2)}"
    place = math.floor(math.log10(error))
    digits = max(1, math.floor(math.log10(abs(value))) - place + 2) if value else 1
    return number(value, min(digits, 12)), f"± {number(error, 2)}"


def percent(share: float | None) -> str:
    """Format a share of 0 to 1 as a percentage: 97.1%, 0.034%, 100.0%."""
    if share is None:
        return "—"
    return f"{number(100 * share, 2)}%" if 0 < share < 0.01 else f"{100 * share:.1f}%"


def spread_text(value: Spread | None, as_percent: bool = False) -> str:
    """Format a mean, with the smallest and largest value where there are several seeds."""
    if value is None:
        return "—"
    write = percent if as_percent else number
    span = f" ({write(value.low)} to {write(value.high)})" if value.count > 1 else ""
    return write(value.mean) + span


def listed(words: Sequence[str], last: str = "and") -> str:
    """Join words as prose does: a, b and c."""
    if len(words) < 2:
        return "".join(words)
    return f"{', '.join(words[:-1])} {last} {words[-1]}"


def sentence(text: str) -> str:
    """Return text with its first letter in upper case."""
    return text[:1].upper() + text[1:]
