"""The page: one HTML file that needs nothing else, from the result files of an ablation or of a single run."""

from __future__ import annotations

import base64
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jlt import __version__
from jlt.files import write_text
from jlt.progress import format_seconds
from jlt.report import findings, palette
from jlt.report.results import MEASUREMENTS, Run, Spread, Study, System, flatten, read_study, spread
from jlt.report.wording import listed, number, percent, spread_text

HIGHER_IS_BETTER = {"frechet_distance": False, "inception_score": True, "label_agreement": True}


def write_report(folder: Path) -> Path:
    """Write report.html into an ablation folder or a run folder from the result files in it, and return its path.

    Raises JLTError for any other folder, damaged files, and evaluations that were not made the same way.
    """
    path = folder / "report.html"
    write_text(path, render(read_study(folder)))
    return path


def render(study: Study) -> str:
    """Return the page of a study as HTML."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    from jlt.report.figures import training_figure
    from jlt.report.geometry_figures import geometry_figures

    environment = Environment(
        loader=PackageLoader("jlt.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html").render(
        study=study,
        version=__version__,
        palette=palette,
        verdict=findings.verdict(study),
        details=findings.details(study),
        limits=findings.limits(study),
        facts=page_facts(study),
        rows=result_rows(study),
        training=training_figure(study),
        grids=sample_grids(study),
        geometry=geometry_figures(study.geometry) if study.geometry else [],
        spectra=spectrum_rows(study),
        matched=matched_statements(study),
        shared_settings=settings(study)[0],
        differing_settings=settings(study)[1],
        protocol=flatten(study.protocol or {}),
        command=command(study),
        value_text=value_text,
        machine_and_latents=flatten({key: study.facts[key] for key in ("machine", "latents") if key in study.facts}),
    )


@dataclass(frozen=True)
class Cell:
    """One number of the results table; `best` marks the best of its column."""

    text: str
    best: bool = False


@dataclass(frozen=True)
class Row:
    """One system of the results table."""

    system: System
    swatch: str
    cells: tuple[Cell, ...]
    seconds: str
    note: str


def result_rows(study: Study) -> list[Row]:
    """Return the results table at the final step, by patch size and then by Frechet distance."""
    step = study.final_step
    measured = {
        metric: [system.measured(metric, step) if step is not None else None for system in study.systems]
        for metric in MEASUREMENTS
    }
    best = {metric: _best(metric, values) for metric, values in measured.items()}
    rows = []
    for index, system in enumerate(study.systems):
        cells = []
        for metric in MEASUREMENTS:
            value = measured[metric][index]
            text = spread_text(value, as_percent=metric == "label_agreement")
            marked = value is not None and len(study.systems) > 1 and value.mean == best[metric]
            cells.append(Cell(text, marked))
        seconds = spread(run.seconds for run in system.runs if run.seconds is not None)
        rows.append(
            Row(
                system,
                palette.swatch(system.prediction, system.patch_size),
                tuple(cells),
                format_seconds(seconds.mean) if seconds else "–",
                _row_note(system, measured["frechet_distance"][index], study),
            )
        )
    order = {index: value.mean if value else float("inf") for index, value in enumerate(measured["frechet_distance"])}
    return [rows[index] for index in sorted(order, key=lambda index: (study.systems[index].patch_size, order[index]))]


def _best(metric: str, values: list[Spread | None]) -> float | None:
    means = [value.mean for value in values if value is not None]
    return (max if HIGHER_IS_BETTER[metric] else min)(means, default=None)


def _row_note(system: System, final: Spread | None, study: Study) -> str:
    """Say what is missing from a row, empty if nothing is."""
    if final is None:
        reached = max((run.reached for run in system.runs), default=0)
        return f"at step {reached:,}, not yet evaluated at {study.final_step:,}" if study.final_step else "not evaluated"
    seeds = max(len(other.runs) for other in study.systems)
    return f"{final.count} of {seeds} seeds" if final.count < seeds else ""


def page_facts(study: Study) -> dict[str, str]:
    """Return the figures of the strip under the headline: what was trained on what, and how long it took."""
    facts = {}
    latents, protocol = study.facts.get("latents", {}), study.protocol or {}
    images = latents.get("source")
    source = images.get("name") if isinstance(images, Mapping) else images
    if latents.get("count"):
        facts["Data"] = f"{latents['count']:,} latents" + (f" of {source}" if source else "")
    autoencoder = protocol.get("autoencoder") or latents.get("autoencoder")
    if isinstance(autoencoder, Mapping):
        psnr = study.facts.get("autoencoder_psnr")
        facts["Autoencoder"] = f"{autoencoder.get('name')}" + (f", {number(psnr)} dB" if psnr else "")
    if len(study.systems) > 1:
        seeds = sorted({run.seed for run in study.runs})
        facts["Compared"] = f"{len(study.systems)} systems, {len(seeds)} {'seed' if len(seeds) == 1 else 'seeds'} each"
    if study.final_step is not None:
        facts["Trained"] = f"{study.final_step:,} steps"
    if protocol.get("count"):
        facts["Evaluated"] = f"{protocol['count']:,} samples, {protocol.get('steps')} {protocol.get('solver')} steps"
    if study.facts.get("seconds"):
        machine = study.facts.get("machine", {})
        cores = f" on {machine['cores']} cores" if machine.get("cores") else ""
        facts["Took"] = f"{format_seconds(study.facts['seconds'])}{cores}"
    return facts


@dataclass(frozen=True)
class Grid:
    """The decoded samples of one system."""

    name: str
    uri: str
    text: str
    alt: str


def sample_grids(study: Study) -> dict[int, list[Grid]]:
    """Return the sample grids of the first seed that has one, by patch size."""
    grids: dict[int, list[Grid]] = {}
    for row in result_rows(study):
        run = next((run for run in row.system.runs if run.grid), None)
        if run is None or run.grid is None:
            continue
        uri = "data:image/png;base64," + base64.b64encode(run.grid.read_bytes()).decode()
        distance = f"Fréchet distance {row.cells[0].text}"
        alt = f"Samples of {row.system.name}, one row per class; {distance}."
        grids.setdefault(row.system.patch_size, []).append(Grid(row.system.name, uri, distance, alt))
    return grids


@dataclass(frozen=True)
class SpectrumRow:
    """The summary of one patch size's spectrum, as the page writes it."""

    patch_size: int
    texts: tuple[str, ...]


def spectrum_rows(study: Study) -> list[SpectrumRow]:
    """Return the summaries of every patch size's spectrum."""
    rows = []
    for entry in (study.geometry or {}).get("tokens", {}).values():
        below, channels = entry["share_below"]["0.1"], entry["channel_variance"]
        rows.append(
            SpectrumRow(
                entry["patch_size"],
                (
                    f"{entry['dimension']:,}",
                    f"{entry['count']:,}",
                    number(entry["effective_rank"]),
                    number(entry["participation_ratio"]),
                    "infinite" if entry["anisotropy"] is None else number(entry["anisotropy"]),
                    number(entry["sphericity"], 2),
                    f"{below['directions']} ({percent(below['variance_share'])} of the variance)",
                    f"{number(min(channels), 2)} to {number(max(channels), 2)}",
                ),
            )
        )
    return rows


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
    names = {system_run: system for system in study.systems for system_run in _run_names(study, system)}
    for key, what in (("initial_weights", "initial weights"), ("draws", "sample order, noise, times and label drops")):
        texts.extend(_shared_hashes(matched.get(key, {}), names, what))
    return texts


def _run_names(study: Study, system: System) -> list[str]:
    return [run.folder.relative_to(study.folder).as_posix() for run in system.runs]


def _shared_hashes(hashes: Mapping[str, str], names: Mapping[str, System], what: str) -> list[str]:
    by_hash: dict[str, list[str]] = {}
    for run, digest in hashes.items():
        by_hash.setdefault(digest, []).append(names[run].name if run in names else run)
    return [
        f"Same {what}, bit for bit: {listed(list(dict.fromkeys(systems)))} (SHA-256 {digest[:12]}…)."
        if len(systems) > 1
        else f"{systems[0]} alone has these {what} (SHA-256 {digest[:12]}…)."
        for digest, systems in by_hash.items()
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


def value_text(value: Any) -> str:
    """Write a setting: lists with commas, truth as yes and no, long hashes shortened."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(value_text, value))
    if value is None or value == "":
        return "–"
    text = str(value)
    return f"{text[:12]}…" if len(text) == 64 and set(text) <= set("0123456789abcdef") else text


def command(study: Study) -> str:
    """Return the command that makes these results again."""
    if study.facts.get("command"):
        return str(study.facts["command"])
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
