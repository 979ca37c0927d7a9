"""How a page and a terminal write the settings and numbers of a sweep."""

from __future__ import annotations

from jlt.report.wording import metric_text, number, percent, with_error
from jlt.results import Sweep
from jlt.results.evaluation import SHARES
from jlt.results.sweep import WHOLE_INTERVAL, Setting, SweepPoint

NO_BREAK_SPACE = "\N{NO-BREAK SPACE}"


def setting_text(setting: Setting) -> str:
    """Write a setting as prose does: guidance 1.5 for t from 0.1 to 1 with the EMA 0.9999."""
    text = "no guidance"
    if setting.guided:
        low, high = setting.cfg_interval
        within = "" if setting.cfg_interval == WHOLE_INTERVAL else f" for t from {low:g} to {high:g}"
        text = f"guidance {setting.cfg_scale:g}{within}"
    return f"{text} with {ema_text(setting.ema)}"


def interval_text(interval: tuple[float, float]) -> str:
    """Write the times at which guidance acts."""
    low, high = interval
    return "guidance at all times" if interval == WHOLE_INTERVAL else f"guidance for t from {low:g} to {high:g}"


def ema_text(ema: str) -> str:
    """Write which weights are meant."""
    return "the raw weights" if ema == "none" else f"the EMA {ema}"


def measured_text(sweep: Sweep, point: SweepPoint) -> str:
    """Write the metric of the search, with its error."""
    return _with_error(point.value, point.error) if point.error else metric_text(sweep.metric, point.value, 4)


def behind_text(sweep: Sweep, point: SweepPoint) -> str:
    """Write by how much a measurement is worse than the best of its table, with the error of the difference."""
    behind = point.behind
    if behind is None:
        return "—"
    if sweep.metric in SHARES:
        return percent(behind.difference)
    return _with_error(behind.difference, behind.error) if behind.error else number(behind.difference)


def _with_error(value: float, error: float) -> str:
    return NO_BREAK_SPACE.join(with_error(value, error)).replace(" ", NO_BREAK_SPACE)
