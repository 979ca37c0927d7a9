"""The forecast of a run as text, for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jlt.report.text_table import text_table
from jlt.report.wording import number, percent
from jlt.runtime.progress import format_seconds

SECTIONS = {
    "work": "work",
    "memory": "memory of one process",
    "disk": "disk",
    "time": "time",
    "measured": "measured on this machine",
}
PREFIXES = ("", "k", "M", "G", "T", "P", "E", "Z")


def plan_table(plan: Mapping[str, Any]) -> str:
    """Return a plan, a table per section, and whether the run fits."""
    config = plan["config"]
    where = "this machine's CPU" if plan["gpu"] == "cpu" else plan["gpu"]
    title = f"{config['name']} on {plan['processes']} x {where}, {config['precision']}, {config['parallel']}"
    title += ", compiled" if config["compile"] else ", eager"
    title += ", gradient checkpointing" if config["gradient_checkpointing"] else ""
    tables = [_section(heading, plan[name]) for name, heading in SECTIONS.items() if plan[name]]
    return "\n\n".join([title, *tables, _verdict(plan)])


def _section(heading: str, figures: Mapping[str, Any]) -> str:
    rows = [[name.replace("_", " "), quantity(entry), entry["source"]] for name, entry in figures.items()]
    return text_table([heading, "", "source"], rows, left=(0, 2), widths={0: 25, 1: 16}).strip("\n")


def quantity(figure: Mapping[str, Any]) -> str:
    """Format a figure with its unit: 130,508,672, 20.1 GiB, 138 GFLOP, 989 TFLOP/s, 40.0%."""
    value, unit = figure["value"], figure["unit"]
    if unit == "bytes":
        return memory(value)
    if unit == "count":
        return f"{value:,}" if float(value).is_integer() else number(value)
    if unit in ("FLOP", "FLOP/s"):
        return prefixed(value, unit)
    return {"share": percent, "seconds": _seconds, "hours": _hours, "per second": number}[unit](value)


def memory(value: float) -> str:
    """Format bytes in GiB, smaller ones in MiB and KiB."""
    if value == 0:
        return "0"
    power = 3 if value >= 2**30 else 2 if value >= 2**20 else 1
    return f"{number(value / 2 ** (10 * power))} {('KiB', 'MiB', 'GiB')[power - 1]}"


def prefixed(value: float, unit: str) -> str:
    """Format with the prefix that leaves one to three digits before the point."""
    power = 0
    while value >= 1000 and power < len(PREFIXES) - 1:
        value, power = value / 1000, power + 1
    return f"{number(value)} {PREFIXES[power]}{unit}"


def _seconds(value: float) -> str:
    return f"{number(value)} s"


def _hours(value: float) -> str:
    return f"{number(value)} h" if value >= 1 else format_seconds(3600 * value)


def _verdict(plan: Mapping[str, Any]) -> str:
    total, available = (memory(plan["memory"][name]["value"]) for name in ("total", "available"))
    if plan["fits"]:
        largest = plan["largest_micro_batch_size"]
        return f"It fits: {total} of {available}. The largest micro-batch that would fit is {largest}."
    if not plan["ways_to_fit"]:
        return f"It does not fit: {total}, and there are {available}. No batch fits: take more or larger GPUs."
    ways = [
        [_options(way["settings"]), memory(way["bytes"]), _hours(way["seconds"] / 3600)] for way in plan["ways_to_fit"]
    ]
    table = text_table(["what would make it fit", "memory", "training"], ways).strip("\n")
    return f"It does not fit: {total}, and there are {available}.\n\n{table}"


def _options(settings: Mapping[str, Any]) -> str:
    """Return settings as options of the command line."""
    options = [(f"--{name.replace('_', '-')}", value) for name, value in settings.items()]
    return " ".join(option if value is True else f"{option} {value}" for option, value in options)
