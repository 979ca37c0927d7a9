"""The page: one HTML file that needs nothing else, made from result files."""

from __future__ import annotations

import base64
import hashlib
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jlt import __version__
from jlt.report import findings, geometry_text, palette
from jlt.report.result_rows import MEASUREMENT_HEADS, result_rows
from jlt.report.sample_grids import sample_grids, sample_series
from jlt.report.study import Study, flatten, grouped, read_study
from jlt.report.wording import Table, listed, number
from jlt.results.price import Price
from jlt.results.run import Log, Run
from jlt.results.sweep import Sweep
from jlt.runtime.progress import format_seconds, inform
from jlt.storage.files import write_text
from jlt.storage.folders import remove_leftovers

SLIDER = ("gaussian.js", "slider.js")
AXES = ("prediction", "loss_space", "patch_size", "seed")


def write_report(folder: Path) -> Path:
    """Write report.html into the folder of an experiment or a run from the result files in it; return its path.

    JLTError for any other folder, damaged files, and evaluations by different protocols.
    """
    path = folder / "report.html"
    remove_leftovers(folder, path.name)
    if (folder / Sweep.FILE).exists():
        from jlt.report.sweep_page import sweep_context

        write_text(path, render_template("sweep.html", sweep_context(folder)))
    elif (folder / Price.FILE).exists():
        from jlt.report.price_page import price_context

        write_text(path, render_template("price.html", price_context(folder)))
    else:
        study = read_study(folder)
        for note in study.notes:
            inform(note)
        write_text(path, render(study))
    return path


def render(study: Study) -> str:
    """Return the page of a study as HTML."""
    from jlt.report import expected
    from jlt.report.run_figures import run_figures
    from jlt.report.training_figures import cells_figure, training_figure

    # Distances of noise neither confirm nor refute a forecast.
    compared = [] if findings.why_undecidable(study) else expected.checks(study)
    by_loss_space = findings.cells(study)
    shared, differing = settings(study)
    context = {
        "study": study,
        "title": study.title,
        "verdict": findings.verdict(study),
        "details": findings.details(study),
        "limits": [*findings.limits(study), *study.notes],
        "facts": page_facts(study),
        "rows": result_rows(study),
        "measurements": MEASUREMENT_HEADS,
        "set_aside": set_aside_table(study),
        "more_colours": [(f"t{place}", colour) for place, colour in enumerate(palette.TIME)],
        "cells": cells_figure(by_loss_space),
        "cell_texts": findings.cell_sentences(by_loss_space),
        "training": training_figure(study),
        "logged": run_figures(study),
        "series": sample_series(study.runs[0]) if len(study.runs) == 1 else [],
        "grids": sample_grids(study),
        "checks": expected.check_table(compared),
        "check_texts": [*expected.check_sentences(compared), *expected.floor_sentences(study)],
        "before_training": all(check.forecast.before_training for check in compared),
        "expected": expected.expected_figure(compared),
        "matched": matched_statements(study),
        "shared_settings": shared,
        "differing_settings": differing,
        "protocol": flatten(study.protocol),
        "command": command(study),
        "machine_and_latents": flatten(
            {"machine": study.ablation.machine if study.ablation else None, "latents": study.latents}
        ),
    }
    geometry = _geometry_context(study)
    scripts = SLIDER if geometry.get("slider_spectra") else ()
    return render_template("report.html", {**context, **geometry}, scripts)


def _geometry_context(study: Study) -> dict[str, Any]:
    """Return what the template shows of the geometry and of the networks' errors, no geometry without one."""
    from jlt.report.geometry_figures import geometry_figures, inside_figures
    from jlt.report.sample_figures import sample_spectrum_figures

    geometry, inside = study.geometry, study.inside
    errors = {
        "inside": [*inside_figures(inside), *sample_spectrum_figures(inside)] if inside else [],
        "inside_texts": geometry_text.inside_sentences(inside) if inside else [],
    }
    if geometry is None:
        return {**errors, "geometry": None}
    sizes = [f"patch {size}" for size in geometry.tokens]
    heads = ["Whole latents", "Directions", "Effective rank", "Participation", "Below 0.1", "their share", "Known to"]
    return {
        **errors,
        "geometry": geometry_figures(geometry),
        "spectra": Table("Spectrum summary", ["", *sizes], geometry_text.spectrum_rows(geometry)),
        "whole": Table("Whole latents", heads, geometry_text.whole_rows(geometry)),
        "slider_spectra": geometry_text.slider_spectra(geometry),
        "channels_hide": geometry_text.channels_sentence(geometry),
        "cautions": geometry_text.caution_sentences(geometry),
    }


def render_template(name: str, context: Mapping[str, Any], scripts: Sequence[str] = ()) -> str:
    """Return one of the package's pages as HTML, with the scripts of these files as one."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("jlt.report")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals |= {"version": __version__, "palette": palette, "value_text": value_text}
    # The page's own policy allows this one script alone.
    script = "\n".join(loader.get_source(environment, file)[0] for file in scripts)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() if script else ""
    return environment.get_template(name).render(script=script, script_sha256=digest, **context)


def settings(study: Study) -> tuple[dict[str, Any], Table]:
    """Return the settings that all runs' config.json share, and a table of those that differ."""
    configs = [flatten(run.config) for run in study.runs]
    values = {key: [config.get(key) for config in configs] for key in dict.fromkeys(key for c in configs for key in c)}
    shared = {key: found[0] for key, found in values.items() if all(value == found[0] for value in found)}
    differing = [key for key in values if key not in shared]
    names = [run.folder.name for run in study.runs]
    rows = [[name, *(value_text(values[key][place]) for key in differing)] for place, name in enumerate(names)]
    header = ["Run", *differing]
    return shared, Table("Settings that differ between runs", header, rows, left=range(len(header)))


def set_aside_table(study: Study) -> Table:
    """Return the evaluations in no other table: run, step, how they were made, and their Frechet distance."""
    shown = next((found for run in study.runs for found in run.evaluations), None)
    rows = []
    for run, found in study.set_aside:
        how = listed([f"{key} {value_text(theirs)}" for key, _, theirs in (shown.differences(found) if shown else [])])
        rows.append((run.folder.name, f"{found.step:,}", how, number(found.metrics.frechet_distance)))
    return Table("Other evaluations", ["Run", "Step", "Made with", "Fréchet distance"], rows, left=(0, 2))


def value_text(value: Any) -> str:
    """Write a setting: lists with commas, booleans as yes and no, long hashes shortened."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(value_text, value))
    if value is None or value == "":
        return "—"
    text = str(value)
    return f"{text[:12]}…" if len(text) == 64 and set(text) <= set("0123456789abcdef") else text


def command(study: Study) -> str:
    """Return the command that produces these results again."""
    ablation = study.ablation
    if ablation is None:
        if study.geometry is not None and not study.systems:
            return geometry_text.analyze_command(study.geometry, study.inside)
        config = shlex.quote(str(study.folder / "config.json"))
        return f"jlt train {config} --latents LATENTS --out OUT\njlt report OUT"
    if ablation.command:
        return ablation.command
    axes = {axis: dict.fromkeys(getattr(run, axis) for run in ablation.systems) for axis in AXES}
    options = [f"--{axis.replace('_', '-')} {' '.join(map(str, values))}" for axis, values in axes.items()]
    return f"jlt ablate {ablation.recipe} --latents LATENTS --out OUT {' '.join(options)}"


def page_facts(study: Study) -> dict[str, str]:
    """Return the figures of the strip under the headline: data, systems, training, evaluation and time."""
    facts = {}
    latents, protocol, ablation = study.latents, study.protocol, study.ablation
    source = findings.name_in(latents, "source")
    if latents.get("count"):
        facts["Data"] = f"{latents['count']:,} latents" + (f" of {source}" if source else "")
    if autoencoder := findings.name_in(protocol, "autoencoder") or findings.name_in(latents, "autoencoder"):
        psnr = ablation.autoencoder_psnr if ablation else None
        facts["Autoencoder"] = autoencoder + (f", {number(psnr)} dB" if psnr else "")
    if len(study.systems) > 1:
        seeds = len({run.seed for run in study.runs})
        facts["Compared"] = f"{len(study.systems)} systems, {seeds} {'seed' if seeds == 1 else 'seeds'} each"
    facts |= _training_facts(study)
    if protocol.get("count"):
        solver = str(protocol.get("solver")).title()
        facts["Evaluated"] = f"{protocol['count']:,} samples, {protocol.get('steps')}-step {solver}"
    if ablation and ablation.seconds:
        cores = f" on {ablation.machine['cores']} cores" if ablation.machine.get("cores") else ""
        facts["Training time"] = f"{format_seconds(ablation.seconds)} in all{cores}"
    return facts


def _training_facts(study: Study) -> dict[str, str]:
    """Return how far the training is, and of a single run its speed."""
    runs, facts = study.runs, {}
    one = runs[0] if len(runs) == 1 else None
    if one and one.log.steps and not one.log.ended:
        facts = _progress_facts(one)
    elif study.final_step is not None:
        facts["Trained"] = f"{study.final_step:,} steps{' each' if len(runs) > 1 else ''}"
    facts |= _session_facts(one.log) if one else {}
    if skipped := sum(len(run.log.skipped) for run in runs):
        facts["Skipped updates"] = f"{skipped:,}" + (" in all" if len(runs) > 1 else "")
    return facts


def _progress_facts(run: Run) -> dict[str, str]:
    log, steps, reached = run.log, run.config["steps"], run.log.steps[-1].step
    facts = {"Progress": f"step {reached:,} of {steps:,} ({100 * reached // steps}%)"}
    if log.stopped:
        facts["State"] = "stopped and saved; run the same command again to resume"
    left = log.seconds_left(steps, run.config["batch_size"])
    if left is not None:
        facts["Time left"] = f"{format_seconds(left)} at its latest speed"
    return facts


def _session_facts(log: Log) -> dict[str, str]:
    facts, session = {}, log.session
    if session.processes:
        kind = f" ({session.parallel})" if session.processes > 1 and session.parallel else ""
        device = f" on {session.device}" if session.device else ""
        facts["Processes"] = f"{session.processes}{kind}{device}"
    if log.steps and (last := log.steps[-1]).img_per_second:
        facts["Speed"] = f"{number(last.img_per_second)} images/s" + (f", MFU {last.mfu:.0%}" if last.mfu else "")
    return facts


def matched_statements(study: Study) -> list[str]:
    """Return what the matched check of an ablation found, in sentences."""
    matched = study.ablation.matched if study.ablation else None
    if not matched:
        return []
    texts = {
        "Compared between all runs and found equal": matched.checked,
        "Allowed to differ, because it is what the ablation compares": matched.differs,
    }
    names = {run.folder.name: system.name for system in study.systems for run in system.runs}
    return [
        *(f"{text}: {listed(settings)}." for text, settings in texts.items() if settings),
        *_shared_hashes(matched.initial_weights, names, "initial weights"),
        *_shared_hashes(matched.draws, names, "sample order, noise, times and label drops"),
    ]


def _shared_hashes(hashes: Mapping[str, str], names: Mapping[str, str], what: str) -> list[str]:
    """Name the systems that share something; seeds that share it among the same systems make one sentence."""
    by_hash = grouped((digest, names.get(run, run)) for run, digest in hashes.items())
    by_systems = grouped((tuple(systems), f"{digest[:8]}…") for digest, systems in by_hash.items())
    return [
        f"Same {what}, bit for bit{', at each seed' if len(digests) > 1 else ''}: {listed(systems)} "
        f"(SHA-256 {', '.join(digests)})."
        if len(systems) > 1
        else f"No other system has the {what} of {systems[0]} (SHA-256 {', '.join(digests)})."
        for systems, digests in by_systems.items()
    ]
