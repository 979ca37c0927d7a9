"""The page of a sweep, from its sweep.json: the choice, what it was chosen among, and the number that confirms it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jlt.errors import JLTError
from jlt.report import palette
from jlt.report.metrics_table import SHARES
from jlt.report.results import flatten
from jlt.report.sweep_wording import METRIC_NAMES, Point, behind_text, measured_text, metric_name, same, setting_text
from jlt.report.text_table import text_table
from jlt.report.wording import number, percent, sentence
from jlt.storage.files import read_json

BESIDES = ("frechet_distance", "inception_score", "recall", "label_agreement")
"""Metrics that the tables show beside the one that was searched by."""


def sweep_context(folder: Path) -> dict[str, Any]:
    """Return what the template shows of a sweep; JLTError for a damaged file."""
    from jlt.report.sweep_figures import sweep_figures

    path = folder / "sweep.json"
    result = read_json(path)
    try:
        shown = columns(result)
        return {
            "title": result["title"],
            "verdict": verdict(result),
            "details": details(result),
            "facts": facts(result),
            "columns": [column_name(shown[0]), "Behind the best", *map(column_name, shown[1:])],
            "confirmed": [row(result, point, shown, "") for point in _confirmed(result)],
            "confirmed_caption": confirmed_caption(result),
            "figures": sweep_figures(result),
            "rule": result["rule"],
            "stages": [stage_table(result, place, shown) for place in range(len(result["stages"]))],
            "protocol": flatten(result["confirmed"][0]["protocol"]),
            "machine_and_latents": flatten({"machine": result["machine"], "latents": result["latents"]}),
            "reproduce": result["reproduce"],
            "command": result["command"],
            "created": result["created"][:10],
            "more_colours": [(f"s{place}", colour) for place, colour in enumerate(palette.SCALE)],
        }
    except (KeyError, IndexError, TypeError) as error:
        raise JLTError(f"{path} is damaged or was written by another version ({error!r}).") from error


def verdict(result: Mapping[str, Any]) -> str:
    """Say the choice and its confirmed number in a sentence."""
    best = result["confirmed"][0]
    return (
        f"{sentence(setting_text(best))}: {metric_name(result)} {measured_text(result, best)} on "
        f"{best['num']:,} images that took no part in the choice."
    )


def details(result: Mapping[str, Any]) -> list[str]:
    """Say what else has to be known of the choice: its seeds, its rivals, and where it lies in the grid."""
    search, confirmation, choice = result["search"], result["confirmation"], result["choice"]
    texts = [
        f"Seed {search['seed']} chose, seed {confirmation['seed']} confirmed. In the search the same setting had "
        f"{measured_text(result, choice)} on {choice['num']:,} images.",
        *_rivals(result),
    ]
    if edge := _edge(result):
        texts.append(edge)
    return texts


def _rivals(result: Mapping[str, Any]) -> list[str]:
    best, *others = result["confirmed"]
    name = metric_name(result)
    if not others:
        return ["No other setting came within the errors of it in the last stage of the search."]
    texts = []
    for other in others:
        better = (other["value"] < best["value"]) == result["lower_is_better"] and other["value"] != best["value"]
        text = f"The search could not tell it from {setting_text(other)}, whose confirmed {name} is "
        text += measured_text(result, other)
        if better:
            text += ": better, but the choice stays, since these images are not to choose by"
        texts.append(f"{text}.")
    return texts


def _edge(result: Mapping[str, Any]) -> str:
    scales, chosen = sorted(result["axes"]["cfg_scale"]), result["choice"]["cfg_scale"]
    if len(scales) < 2 or scales[0] < chosen < scales[-1] or chosen == 1:
        return ""
    beyond = "Larger" if chosen >= scales[-1] else "Smaller"
    return f"The chosen guidance lies at the edge of what was searched. {beyond} ones may be better."


def facts(result: Mapping[str, Any]) -> dict[str, str]:
    """Return the figures of the strip under the headline."""
    first, stages = result["stages"][0], result["stages"]
    protocol = result["confirmed"][0]["protocol"]
    device = result["machine"]["device"]
    return {
        "Checkpoint": f"step {result['checkpoint']['step']:,}",
        "Grid": _counts(len(first["points"]), first["num"]),
        "Last stage": _counts(len(stages[-1]["points"]), stages[-1]["num"]),
        "Confirmation": _counts(len(result["confirmed"]), result["confirmation"]["num"]),
        "Sampler": f"{protocol['steps']}-step {protocol['solver'].title()}",
        "Machine": device if device != "cpu" else f"{result['machine']['cores']} cores",
    }


def _counts(settings: int, images: int) -> str:
    return f"1 setting, {images:,} images" if settings == 1 else f"{settings} settings, {images:,} images each"


def columns(result: Mapping[str, Any]) -> list[str]:
    """Return the metrics of the tables, the one that was searched by first."""
    measured = result["confirmed"][0]["metrics"]
    return [result["metric"], *(name for name in BESIDES if name != result["metric"] and measured[name] is not None)]


def column_name(metric: str) -> str:
    """Return the head of a column."""
    return sentence(METRIC_NAMES.get(metric, metric.replace("_", " ")))


@dataclass(frozen=True)
class Row:
    """One measurement in a table."""

    scale: str
    times: str
    ema: str
    cells: tuple[str, ...]
    note: str
    chosen: bool


@dataclass(frozen=True)
class StageTable:
    """The measurements of a stage, best first."""

    title: str
    rows: tuple[Row, ...]


def row(result: Mapping[str, Any], point: Point, metrics: Sequence[str], note: str) -> Row:
    """Return one measurement as texts."""
    low, high = point["cfg_interval"]
    guided = point["cfg_scale"] != 1
    besides = [
        percent(point["metrics"][name]) if name in SHARES else number(point["metrics"][name], 4) for name in metrics[1:]
    ]
    return Row(
        f"{point['cfg_scale']:g}",
        f"{low:g} to {high:g}" if guided else "—",
        point["ema"],
        (measured_text(result, point), behind_text(result, point), *besides),
        note,
        same(point, result["choice"]),
    )


def _confirmed(result: Mapping[str, Any]) -> list[Point]:
    return result["confirmed"]


def confirmed_caption(result: Mapping[str, Any]) -> str:
    """Say what the confirmed numbers are of."""
    confirmation = result["confirmation"]
    error = (
        " ± is the standard error by the jackknife; that of a difference is smaller for the same noise."
        if result["confirmed"][0]["error"]
        else ""
    )
    return (
        f"{confirmation['num']:,} images of seed {confirmation['seed']} for each setting; the choice, in bold, was "
        f"made before they were drawn.{error}"
    )


def stage_table(result: Mapping[str, Any], place: int, metrics: Sequence[str]) -> StageTable:
    """Return a stage's measurements with what became of each."""
    stages = result["stages"]
    stage = stages[place]
    last = place == len(stages) - 1
    rows = []
    for rank, point in enumerate(stage["points"]):
        note = "went on" if rank < stage["kept"] else "dropped"
        if last or stage["kept"] == len(stage["points"]):
            note = "chosen" if last and rank == 0 else ""
        rows.append(row(result, point, metrics, note))
    name = {"coarse": "The whole grid", "halving": "What was left", "refinement": "With guidance scales between"}
    settings = "1 setting" if len(rows) == 1 else f"{len(rows)} settings"
    title = (
        f"{place + 1}. {name[stage['name']]}: {settings}, {stage['num']:,} images of seed {result['search']['seed']}"
    )
    return StageTable(title, tuple(rows))


def sweep_table(result: Mapping[str, Any]) -> str:
    """Return the stages and the confirmation as text, for a terminal."""
    metrics = columns(result)[:1]
    lines = []
    parts = [(f"{place + 1} {stage['name']}", stage["points"]) for place, stage in enumerate(result["stages"])]
    for name, points in [*parts, ("confirmation", result["confirmed"])]:
        for point in points:
            shown = row(result, point, metrics, "")
            seed, mark = str(point["seed"]), "chosen" if shown.chosen else ""
            lines.append([name, shown.scale, shown.times, shown.ema, f"{point['num']:,}", seed, shown.cells[0], mark])
    header = ["stage", "guidance", "times", "EMA", "images", "seed", metric_name(result), ""]
    return f"{text_table(header, lines, left=(0, 2, 3, 7))}\n\n{verdict(result)}\n\n{result['reproduce']}"
