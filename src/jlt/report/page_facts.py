"""The figures under the headline of a page, and what the proof of a matched ablation found."""

from __future__ import annotations

import math
from collections.abc import Mapping

from jlt.report.findings import name_in
from jlt.report.study import Study
from jlt.report.wording import listed, number
from jlt.results.run import Run
from jlt.runtime.progress import format_seconds


def page_facts(study: Study) -> dict[str, str]:
    """Return the figures of the strip under the headline: data, systems, training, evaluation and time."""
    facts = {}
    latents, protocol, ablation = study.latents, study.protocol, study.ablation
    source = name_in(latents, "source")
    if latents.get("count"):
        facts["Data"] = f"{latents['count']:,} latents" + (f" of {source}" if source else "")
    if autoencoder := name_in(protocol, "autoencoder") or name_in(latents, "autoencoder"):
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
    skipped = sum(len(run.log.skipped) for run in runs)
    if len(runs) == 1 and runs[0].log.steps and not runs[0].log.ended:
        facts = _progress_facts(runs[0])
    elif study.final_step is not None:
        facts["Trained"] = f"{study.final_step:,} steps{' each' if len(runs) > 1 else ''}"
    if len(runs) == 1:
        facts |= _session_facts(runs[0])
    if skipped:
        facts["Skipped updates"] = f"{skipped:,}" + (" in all" if len(runs) > 1 else "")
    return facts


def _progress_facts(run: Run) -> dict[str, str]:
    log, steps = run.log, run.config.get("steps")
    last = log.steps[-1]
    if not steps:
        return {"Progress": f"step {last.step:,}"}
    facts = {"Progress": f"step {last.step:,} of {steps:,} ({math.floor(100 * last.step / steps)}%)"}
    if log.stopped:
        facts["State"] = "stopped and saved; run the same command again to resume"
    left = log.seconds_left(steps, run.config.get("batch_size", 0))
    if left is not None:
        facts["Time left"] = f"{format_seconds(left)} at its latest speed"
    return facts


def _session_facts(run: Run) -> dict[str, str]:
    facts, session, log = {}, run.log.session, run.log
    if session.get("processes"):
        kind = f" ({session['parallel']})" if session["processes"] > 1 and session.get("parallel") else ""
        device = f" on {session['device']}" if session.get("device") else ""
        facts["Processes"] = f"{session['processes']}{kind}{device}"
    if log.steps and log.steps[-1].img_per_second:
        last = log.steps[-1]
        facts["Speed"] = f"{number(last.img_per_second)} images/s" + (f", MFU {last.mfu:.0%}" if last.mfu else "")
    return facts


def matched_statements(study: Study) -> list[str]:
    """Return what the matched check of an ablation found, in sentences."""
    matched = study.ablation.matched if study.ablation else None
    if not matched:
        return []
    texts = []
    if matched.checked:
        texts.append(f"Compared between all runs and found equal: {listed(matched.checked)}.")
    if matched.differs:
        texts.append(f"Allowed to differ, because it is what the ablation compares: {listed(matched.differs)}.")
    names = {run.folder.name: system.name for system in study.systems for run in system.runs}
    draws = "sample order, noise, times and label drops"
    return [
        *texts,
        *_shared_hashes(matched.initial_weights, names, "initial weights"),
        *_shared_hashes(matched.draws, names, draws),
    ]


def _shared_hashes(hashes: Mapping[str, str], names: Mapping[str, str], what: str) -> list[str]:
    """Name the systems that share something; seeds that share it among the same systems make one sentence."""
    by_hash: dict[str, list[str]] = {}
    for run, digest in hashes.items():
        by_hash.setdefault(digest, []).append(names.get(run, run))
    by_systems: dict[tuple[str, ...], list[str]] = {}
    for digest, systems in by_hash.items():
        by_systems.setdefault(tuple(systems), []).append(f"{digest[:8]}…")
    return [
        f"Same {what}, bit for bit{', at each seed' if len(digests) > 1 else ''}: {listed(systems)} "
        f"(SHA-256 {', '.join(digests)})."
        if len(systems) > 1
        else f"No other system has the {what} of {systems[0]} (SHA-256 {', '.join(digests)})."
        for systems, digests in by_systems.items()
    ]
