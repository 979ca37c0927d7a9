"""How a page writes the settings and numbers of a sweep."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jlt.report.metrics_table import SHARES
from jlt.report.wording import number, percent, with_error

Point = Mapping[str, Any]


METRIC_NAMES = {
    "frechet_distance": "Fréchet distance",
    "spatial_frechet_distance": "spatial Fréchet distance",
    "kernel_distance": "kernel distance",
    "inception_score": "inception score",
    "label_agreement": "label agreement",
}


def metric_name(result: Mapping[str, Any]) -> str:
    """Return what the search was by, in words."""
    return METRIC_NAMES.get(result["metric"], result["metric"].replace("_", " "))


def setting_text(point: Point, ema: bool = True) -> str:
    """Write a setting as prose does: guidance 1.5 for t from 0.1 to 1 with the EMA 0.9999."""
    low, high = point["cfg_interval"]
    if point["cfg_scale"] == 1:
        text = "no guidance"
    else:
        text = f"guidance {point['cfg_scale']:g}"
        text += "" if (low, high) == (0, 1) else f" for t from {low:g} to {high:g}"
    return f"{text} with {ema_text(point['ema'])}" if ema else text


def ema_text(ema: str) -> str:
    """Write which weights are meant."""
    return "the raw weights" if ema == "none" else f"the EMA {ema}"


def measured_text(result: Mapping[str, Any], point: Point) -> str:
    """Write the number that was searched by, with its error."""
    if result["metric"] in SHARES:
        return percent(point["value"])
    if not point["error"]:
        return number(point["value"], 4)
    # No line is broken within it.
    return " ".join(with_error(point["value"], point["error"])).replace(" ", "\N{NO-BREAK SPACE}")


def behind_text(result: Mapping[str, Any], point: Point) -> str:
    """Write by how much a measurement is worse than the best beside it, with the error of the difference."""
    behind = point["behind"]
    if behind is None:
        return "—"
    difference, error = behind["difference"], behind["error"]
    if result["metric"] in SHARES:
        return percent(difference)
    return (
        " ".join(with_error(difference, error)).replace(" ", "\N{NO-BREAK SPACE}") if error else number(difference, 3)
    )


def same(one: Point, other: Point) -> bool:
    """Whether two measurements are of one setting."""
    return all(one[key] == other[key] for key in ("cfg_scale", "cfg_interval", "ema"))
