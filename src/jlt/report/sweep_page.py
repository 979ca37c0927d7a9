"""The page of a sweep: the choice, the settings it was chosen from, and the number that confirms it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jlt.report import palette, wording
from jlt.report.study import flatten
from jlt.report.wording import Table, behind_text, measured_text, metric_name, metric_text, sentence, setting_text
from jlt.results.evaluation import bias_text
from jlt.results.files import read_result
from jlt.results.sweep import Sweep, SweepPoint, SweepStage

FURTHER = ("frechet_distance", "inception_score", "recall", "label_agreement")
"""Metrics that the tables show in addition to the one of the search."""
STAGES = {"coarse": "The whole grid", "halving": "What was left", "refinement": "With guidance scales between"}


def sweep_context(folder: Path) -> dict[str, Any]:
    """Return what the template shows of a sweep; JLTError for a damaged file."""
    from jlt.report.sweep_figures import sweep_figures

    result = read_result(Sweep, folder / Sweep.FILE)
    return {
        "result": result,
        "title": result.title,
        "verdict": verdict(result),
        "details": details(result),
        "facts": facts(result),
        "confirmed": points_table(result, "Confirmed settings", "", [(point, "") for point in result.confirmed]),
        "figures": sweep_figures(result),
        "stages": [stage_table(result, place) for place in range(len(result.stages))],
        "protocol": flatten(result.confirmed[0].protocol),
        "machine_and_latents": flatten({"machine": result.machine, "latents": result.latents}),
        "more_colours": [(f"s{place}", colour) for place, colour in enumerate(palette.SCALE)],
    }


def verdict(result: Sweep) -> str:
    """State the choice and its confirmed number in a sentence."""
    best = result.confirmed[0]
    return (
        f"{sentence(setting_text(best))}: {metric_name(result.metric)} {measured_text(result, best)} on "
        f"{best.num:,} images that took no part in the choice."
    )


def details(result: Sweep) -> list[str]:
    """State the seeds of the choice, its rivals, and whether it is at the edge of the grid."""
    choice = result.choice
    texts = [
        f"Seed {result.search.seed} chose, seed {result.confirmation.seed} confirmed. In the search the same setting "
        f"had {measured_text(result, choice)} on {choice.num:,} images.",
        *_rivals(result),
        *bias_sentences(result.confirmed[0]),
    ]
    scales, chosen = sorted(result.axes.cfg_scale), choice.cfg_scale
    if len(scales) > 1 and choice.guided and not scales[0] < chosen < scales[-1]:
        beyond = "Larger" if chosen >= scales[-1] else "Smaller"
        texts.append(f"The chosen guidance is at the edge of the grid. {beyond} scales may be better.")
    return texts


def bias_sentences(point: SweepPoint) -> list[str]:
    """Return what the bias of few images does to a confirmed distance, where there is one."""
    extractor = (point.protocol or {}).get("extractor", {})
    text = bias_text(point.metrics, extractor["dimension"]) if "dimension" in extractor else ""
    return [text] if text else []


def _rivals(result: Sweep) -> list[str]:
    best, *others = result.confirmed
    if not others:
        return ["In the last stage of the search, every other setting was worse by more than the errors allow."]
    texts = []
    for other in others:
        better = other.value < best.value if result.lower_is_better else other.value > best.value
        note = ": better, but the choice stays, because these images must not decide it" if better else ""
        texts.append(
            f"The search could not distinguish it from {setting_text(other)}, whose confirmed "
            f"{metric_name(result.metric)} is {measured_text(result, other)}{note}."
        )
    return texts


def facts(result: Sweep) -> dict[str, str]:
    """Return the figures of the strip under the headline."""
    first, last, protocol = result.stages[0], result.stages[-1], result.confirmed[0].protocol or {}
    return {
        "Checkpoint": f"step {result.checkpoint.step:,}",
        "Grid": _counts(len(first.points), first.num),
        "Last stage": _counts(len(last.points), last.num),
        "Confirmation": _counts(len(result.confirmed), result.confirmation.num),
        "Sampler": f"{protocol['steps']}-step {protocol['solver'].title()}",
        "Machine": wording.machine_text(result.machine),
    }


def _counts(settings: int, images: int) -> str:
    return f"1 setting, {images:,} images" if settings == 1 else f"{settings} settings, {images:,} images each"


def stage_table(result: Sweep, place: int) -> Table:
    """Return a stage's measurements with what became of each."""
    stage, last = result.stages[place], place == len(result.stages) - 1
    rows = [(point, _outcome(stage, rank, last)) for rank, point in enumerate(stage.points)]
    settings = "1 setting" if len(rows) == 1 else f"{len(rows)} settings"
    title = f"{place + 1}. {STAGES[stage.name]}: {settings}, {stage.num:,} images of seed {result.search.seed}"
    return points_table(result, title, "Afterwards", rows)


def _outcome(stage: SweepStage, rank: int, last: bool) -> str:
    if last or stage.kept == len(stage.points):
        return "chosen" if last and rank == 0 else ""
    return "went on" if rank < stage.kept else "dropped"


def points_table(result: Sweep, label: str, note: str, rows: Sequence[tuple[SweepPoint, str]]) -> Table:
    """Return measurements with a note each, the metric of the search first."""
    measured = result.confirmed[0].metrics
    further = [name for name in FURTHER if name != result.metric and measured[name] is not None]
    names = [metric_name(result.metric), "behind the best", *map(metric_name, further)]
    texts = [
        [
            *_setting_cells(point),
            measured_text(result, point),
            behind_text(result, point),
            *(metric_text(name, point.metrics[name], 4) for name in further),
            text,
        ]
        for point, text in rows
    ]
    header = ["Guidance", "Times", "EMA", *map(sentence, names), note]
    marked = [place for place, (point, _) in enumerate(rows) if point.setting == result.choice.setting]
    return Table(label, header, texts, left=(1, 2, len(header) - 1), marked=marked)


def _setting_cells(point: SweepPoint) -> tuple[str, str, str]:
    low, high = point.cfg_interval
    return f"{point.cfg_scale:g}", f"{low:g} to {high:g}" if point.guided else "—", point.ema


def sweep_table(result: Sweep) -> str:
    """Return the stages and the confirmation as text, for a terminal."""
    parts = [(f"{place} {stage.name}", stage.points) for place, stage in enumerate(result.stages, 1)]
    lines = [
        [
            name,
            *_setting_cells(point),
            f"{point.num:,}",
            str(point.seed),
            measured_text(result, point),
            "chosen" if point.setting == result.choice.setting else "",
        ]
        for name, points in [*parts, ("confirmation", result.confirmed)]
        for point in points
    ]
    header = ["stage", "guidance", "times", "EMA", "images", "seed", metric_name(result.metric), ""]
    return f"{wording.text_table(header, lines, left=(0, 2, 3, 7))}\n\n{verdict(result)}\n\n{result.reproduce}"
