"""The page: one HTML file that needs nothing else, from the result files of an ablation or of a single run."""

from __future__ import annotations

import base64
import hashlib
import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jlt import __version__
from jlt.report import findings, palette
from jlt.report.cells import cell_sentences, cells
from jlt.report.expected import check_rows, check_sentences, checks, floor_sentences
from jlt.report.geometry_rows import advised_training, analyze_command, slider_spectra, spectrum_rows, whole_rows
from jlt.report.geometry_sentences import caution_sentences, channels_sentence, inside_sentences
from jlt.report.result_rows import result_rows
from jlt.report.results import Study, flatten, protocol_differences, read_study
from jlt.report.run_log import Log
from jlt.report.sample_grids import Grid, picture_uri, sample_series
from jlt.report.wording import listed, number
from jlt.runtime.progress import format_seconds
from jlt.storage.files import write_text

SLIDER = "slider.js"


def write_report(folder: Path) -> Path:
    """Write report.html into the folder of an ablation, a run or a sweep from the result files in it; return its path.

    Raises JLTError for any other folder, damaged files, and evaluations that were not made the same way.
    """
    path = folder / "report.html"
    if (folder / "sweep.json").exists():
        from jlt.report.sweep_page import sweep_context

        write_text(path, render_template("sweep.html", sweep_context(folder)))
    else:
        write_text(path, render(read_study(folder)))
    return path


def render(study: Study) -> str:
    """Return the page of a study as HTML."""
    from jlt.report.expected_figures import expected_figure
    from jlt.report.figures import cells_figure, training_figure
    from jlt.report.geometry_figures import geometry_figures, inside_figures
    from jlt.report.run_figures import run_figures

    # Distances of noise say nothing of what was expected.
    compared = [] if findings.at_chance(study) else checks(study)
    by_loss_space = cells(study)
    context = {
        "study": study,
        "title": study.title,
        "verdict": findings.verdict(study),
        "details": findings.details(study),
        "limits": findings.limits(study),
        "facts": page_facts(study),
        "rows": result_rows(study),
        "more_colours": [(f"t{place}", colour) for place, colour in enumerate(palette.TIME)],
        "cells": cells_figure(by_loss_space),
        "cell_texts": cell_sentences(by_loss_space),
        "training": training_figure(study),
        "logged": run_figures(study),
        "series": sample_series(study.runs[0]) if len(study.runs) == 1 else [],
        "grids": sample_grids(study),
        "geometry": geometry_figures(study.geometry) if study.geometry else [],
        "checks": check_rows(compared),
        "check_texts": [*check_sentences(compared), *floor_sentences(study)],
        "said_before": all(check.forecast.before_training for check in compared),
        "expected": expected_figure(compared),
        "inside": inside_figures(study.inside) if study.inside else [],
        "inside_texts": inside_sentences(study.inside) if study.inside else [],
        "spectra": spectrum_rows(study.geometry) if study.geometry else {},
        "whole_rows": whole_rows(study.geometry) if study.geometry else [],
        "advised_training": advised_training(study.geometry) if study.geometry else "",
        "slider_spectra": slider_spectra(study.geometry) if study.geometry else [],
        "channels_hide": channels_sentence(study.geometry) if study.geometry else "",
        "cautions": caution_sentences(study.geometry) if study.geometry else [],
        "matched": matched_statements(study),
        "shared_settings": settings(study)[0],
        "differing_settings": settings(study)[1],
        "protocol": flatten(study.protocol or {}),
        "command": command(study),
        "set_aside": set_aside_rows(study),
        "machine_and_latents": flatten({"machine": study.facts.get("machine"), "latents": study.latents}),
    }
    return render_template("report.html", context)


def render_template(name: str, context: Mapping[str, Any]) -> str:
    """Return one of the package's pages as HTML."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("jlt.report")
    environment = Environment(
        loader=loader,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template(name)
    # The page's own policy lets nothing run but this very script, and that only where there is something to move.
    script = loader.get_source(environment, SLIDER)[0] if context.get("slider_spectra") else ""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() if script else ""
    words = {"version": __version__, "palette": palette, "value_text": value_text}
    return template.render(**words, script=script, script_sha256=digest, **context)


def page_facts(study: Study) -> dict[str, str]:
    """Return the figures of the strip under the headline: what was trained on what, and how long it took."""
    facts = {}
    latents, protocol = study.latents, study.protocol or {}
    source = findings.name_in(latents, "source")
    if latents.get("count"):
        facts["Data"] = f"{latents['count']:,} latents" + (f" of {source}" if source else "")
    autoencoder = findings.name_in(protocol, "autoencoder") or findings.name_in(latents, "autoencoder")
    if autoencoder:
        psnr = study.facts.get("autoencoder_psnr")
        facts["Autoencoder"] = autoencoder + (f", {number(psnr)} dB" if psnr else "")
    if len(study.systems) > 1:
        seeds = sorted({run.seed for run in study.runs})
        facts["Compared"] = f"{len(study.systems)} systems, {len(seeds)} {'seed' if len(seeds) == 1 else 'seeds'} each"
    facts |= training_facts(study)
    if protocol.get("count"):
        facts["Evaluated"] = (
            f"{protocol['count']:,} samples, {protocol.get('steps')}-step {str(protocol.get('solver')).title()}"
        )
    if study.facts.get("seconds"):
        machine = study.facts.get("machine", {})
        cores = f" on {machine['cores']} cores" if machine.get("cores") else ""
        facts["Training time"] = f"{format_seconds(study.facts['seconds'])} in all{cores}"
    return facts


def training_facts(study: Study) -> dict[str, str]:
    """Return how far the training is, and what a run under way is doing."""
    runs, facts = study.runs, {}
    skipped = sum(len(run.log.skipped) for run in runs)
    if len(runs) == 1 and runs[0].log.steps and not runs[0].log.ended:
        facts = _facts_under_way(runs[0].log, runs[0].config)
    elif study.final_step is not None:
        facts["Trained"] = f"{study.final_step:,} steps{' each' if len(runs) > 1 else ''}"
    if len(runs) == 1:
        facts |= _facts_of_session(runs[0].log)
    if skipped:
        facts["Skipped updates"] = f"{skipped:,}" + (" in all" if len(runs) > 1 else "")
    return facts


def _facts_under_way(log: Log, config: Mapping[str, Any]) -> dict[str, str]:
    last, steps = log.steps[-1], config.get("steps")
    if not steps:
        return {"Progress": f"step {last.step:,}"}
    facts = {"Progress": f"step {last.step:,} of {steps:,} ({math.floor(100 * last.step / steps)}%)"}
    left = log.seconds_left(steps, config.get("batch_size", 0))
    if log.stopped:
        facts["State"] = "stopped and saved; the same words continue it"
    if left is not None:
        facts["Time left"] = f"{format_seconds(left)} at its latest speed"
    return facts


def _facts_of_session(log: Log) -> dict[str, str]:
    facts, session = {}, log.session
    if session.get("processes"):
        kind = f" ({session['parallel']})" if session["processes"] > 1 and session.get("parallel") else ""
        device = f" on {session['device']}" if session.get("device") else ""
        facts["Processes"] = f"{session['processes']}{kind}{device}"
    if log.steps and log.steps[-1].img_per_second:
        last = log.steps[-1]
        facts["Speed"] = f"{number(last.img_per_second)} images/s" + (f", MFU {last.mfu:.0%}" if last.mfu else "")
    return facts


def sample_grids(study: Study) -> dict[int, list[Grid]]:
    """Return the sample grids of the first seed that has one, by patch size."""
    grids: dict[int, list[Grid]] = {}
    for row in result_rows(study):
        run = next((run for run in row.system.runs if run.grid), None)
        if run is None or run.grid is None:
            continue
        distance = f"Fréchet distance {row.cells[0].text}" + (" over seeds" if row.cells[0].span else "")
        alt = f"Samples of {row.title}, one row per class; {distance}."
        grids.setdefault(row.system.patch_size, []).append(Grid(row.title, picture_uri(run.grid), distance, alt))
    return grids


def matched_statements(study: Study) -> list[str]:
    """Return what the matched check of an ablation found, in sentences."""
    matched = study.facts.get("matched")
    if not matched:
        return []
    texts = []
    if matched.get("checked"):
        texts.append(f"Compared between all runs and found equal: {listed(matched['checked'])}.")
    if matched.get("differs"):
        texts.append(f"Allowed to differ, since it is what the comparison is about: {listed(matched['differs'])}.")
    names = {run.folder.name: system.name for system in study.systems for run in system.runs}
    for key, what in (("initial_weights", "initial weights"), ("draws", "sample order, noise, times and label drops")):
        texts.extend(_shared_hashes(matched.get(key, {}), names, what))
    return texts


def _shared_hashes(hashes: Mapping[str, str], names: Mapping[str, str], what: str) -> list[str]:
    """Say which systems share something; seeds that share it among the same systems make one sentence."""
    by_hash: dict[str, list[str]] = {}
    for run, digest in hashes.items():
        name = Path(run).name
        by_hash.setdefault(digest, []).append(names.get(name, name))
    by_systems: dict[tuple[str, ...], list[str]] = {}
    for digest, systems in by_hash.items():
        by_systems.setdefault(tuple(systems), []).append(f"{digest[:8]}…")
    return [
        f"Same {what}, bit for bit{', at each seed' if len(digests) > 1 else ''}: {listed(systems)} "
        f"(SHA-256 {', '.join(digests)})."
        if len(systems) > 1
        else f"{systems[0]} alone has its {what} (SHA-256 {', '.join(digests)})."
        for systems, digests in by_systems.items()
    ]


def settings(study: Study) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """Return the settings that all runs' config.json share, and those that differ with the value of each run."""
    configs = [flatten(run.config) for run in study.runs]
    keys = list(dict.fromkeys(key for config in configs for key in config))
    shared, differing = {}, {}
    for key in keys:
        values = [config.get(key) for config in configs]
        if all(value == values[0] for value in values):
            shared[key] = values[0]
        else:
            differing[key] = values
    return shared, differing


def set_aside_rows(study: Study) -> list[tuple[str, str, str, str]]:
    """Return the evaluations in no table: run, step, how they were made differently, and their Frechet distance."""
    rows = []
    shown = next((evaluation for run in study.runs for evaluation in run.evaluations), None)
    for evaluation in study.set_aside:
        differing = protocol_differences(shown, evaluation) if shown else []
        how = listed([f"{key} {theirs}" for key, _, theirs in differing])
        run = evaluation.path.parent.parent.name
        rows.append((run, f"{evaluation.step:,}", how, number(evaluation.metrics.get("frechet_distance"))))
    return rows


def value_text(value: Any) -> str:
    """Write a setting: lists with commas, truth as yes and no, long hashes shortened."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(value_text, value))
    if value is None or value == "":
        return "—"
    text = str(value)
    return f"{text[:12]}…" if len(text) == 64 and set(text) <= set("0123456789abcdef") else text


def command(study: Study) -> str:
    """Return the command that makes these results again."""
    if study.facts.get("command"):
        return str(study.facts["command"])
    if not study.systems and study.geometry is not None:
        return analyze_command(study.geometry, study.inside)
    if not study.facts:
        return f"jlt report {shlex.quote(str(study.folder))}"
    words: dict[str, list[Any]] = {
        "--prediction": [system.prediction for system in study.systems],
        "--loss-space": [system.loss_space for system in study.systems],
        "--patch-size": [system.patch_size for system in study.systems],
        "--seed": [run.seed for run in study.runs],
    }
    options = [f"{option} {' '.join(map(str, dict.fromkeys(values)))}" for option, values in words.items()]
    return f"jlt ablate {study.facts.get('recipe', 'RECIPE')} --latents LATENTS --out OUT {' '.join(options)}"
