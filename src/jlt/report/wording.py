"""Numbers, metrics, lists, tables and the settings of a sweep as text."""

from __future__ import annotations

import io
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jlt.report.study import Spread
from jlt.results.evaluation import SHARES
from jlt.results.sweep import WHOLE_INTERVAL, Setting, Sweep, SweepPoint

TEXT_WIDTH = 100
NO_BREAK_SPACE = "\N{NO-BREAK SPACE}"
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
    """Format a value and its error, both to the error's second significant digit: 2.563, ± 0.031."""
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


def metric_name(metric: str) -> str:
    """Return the name of a metric: Fréchet distance."""
    return metric.replace("_", " ").replace("frechet", "Fréchet")


def metric_text(metric: str, value: float | None, digits: int = 3) -> str:
    """Format a metric: shares as percentages, others with some significant digits."""
    return percent(value) if metric in SHARES else number(value, digits)


def spread_text(value: Spread) -> str:
    """Format a mean, with the smallest and largest value if there are several seeds."""
    return number(value.mean) + (f" ({range_text(value)})" if value.count > 1 else "")


def range_text(value: Spread, metric: str = "") -> str:
    """Format the smallest and the largest value over seeds, empty for a single seed."""
    return f"{metric_text(metric, value.low)} to {metric_text(metric, value.high)}" if value.count > 1 else ""


def listed(parts: Sequence[str]) -> str:
    """Join parts as prose does: a, b and c."""
    return " and ".join(filter(None, (", ".join(parts[:-1]), *parts[-1:])))


def patch_text(patch_size: int, *traits: str) -> str:
    """Name systems by their patch size and further traits: patch 1, patch 2 (width 64)."""
    more = ", ".join(filter(None, traits))
    return f"patch {patch_size} ({more})" if more else f"patch {patch_size}"


def sentence(text: str) -> str:
    """Return text with its first letter in upper case."""
    return text[:1].upper() + text[1:]


@dataclass(frozen=True)
class Table:
    """A table of a page; columns of text (`left`) are aligned left, numbers right, and `marked` rows are bold."""

    label: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: Collection[int] = (0,)
    marked: Collection[int] = ()


def text_table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    left: Collection[int] = (0,),
    widths: Mapping[int, int] | None = None,
) -> str:
    """Return a table as text; columns of text (`left`) are aligned left, numbers right.

    `widths` are the smallest widths of columns, for several tables in one column grid.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable

    table = RichTable(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, title in enumerate(header):
        width = (widths or {}).get(index)
        table.add_column(title, justify="left" if index in left else "right", no_wrap=True, min_width=width)
    for row in rows:
        table.add_row(*row)
    stream = io.StringIO()
    # Names are data: without these options, "mk[/x]y" and ":bug:" would be markup.
    Console(file=stream, width=120, markup=False, emoji=False, highlight=False).print(table)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()).strip("\n")


def setting_text(setting: Setting) -> str:
    """Write a setting as prose does: guidance 1.5 for t from 0.1 to 1 with the EMA 0.9999."""
    guidance = f"guidance {setting.cfg_scale:g}{_within(setting.cfg_interval)}" if setting.guided else "no guidance"
    return f"{guidance} with {ema_text(setting.ema)}"


def interval_text(interval: tuple[float, float]) -> str:
    """Write the times at which guidance acts."""
    return f"guidance{_within(interval) or ' at all times'}"


def _within(interval: tuple[float, float]) -> str:
    return "" if interval == WHOLE_INTERVAL else " for t from {:g} to {:g}".format(*interval)


def ema_text(ema: str) -> str:
    """Write which weights are meant."""
    return "the raw weights" if ema == "none" else f"the EMA {ema}"


def measured_text(sweep: Sweep, point: SweepPoint) -> str:
    """Write the metric of the search, with its error."""
    return unbroken(point.value, point.error) if point.error else metric_text(sweep.metric, point.value, 4)


def behind_text(sweep: Sweep, point: SweepPoint) -> str:
    """Write by how much a measurement is worse than the best of its table, with the error of the difference."""
    behind = point.behind
    if behind is None:
        return "—"
    if sweep.metric in SHARES:
        return percent(behind.difference)
    return unbroken(behind.difference, behind.error) if behind.error else number(behind.difference)


def unbroken(value: float, error: float) -> str:
    """Write a value with its error, in which no line ends."""
    return NO_BREAK_SPACE.join(with_error(value, error)).replace(" ", NO_BREAK_SPACE)


def machine_text(machine: Mapping[str, Any]) -> str:
    """Name the GPU that measured, or the cores of a CPU."""
    return machine["device"] if machine["device"] != "cpu" else f"{machine['cores']} cores"
