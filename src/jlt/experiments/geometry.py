"""The geometry of a store in a folder: measured once, kept, and drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jlt.config import to_dict
from jlt.data.store import LatentStore
from jlt.experiments.inside import look_inside
from jlt.files import claim_folder, read_json, write_json
from jlt.geometry.analyze import SCHEMA, analyze
from jlt.geometry.forecast import TimeModel
from jlt.processes import Alone, Group
from jlt.report.page import write_report
from jlt.report.results import INSIDE
from jlt.training.checkpoint import Checkpoint


def measure_geometry(
    store: LatentStore,
    folder: Path,
    patch_sizes: tuple[int, ...],
    widths: tuple[int, ...],
    model: TimeModel,
    device: str = "cpu",
    group: Group | None = None,
) -> dict[str, Any]:
    """Write `geometry.json` into a folder, or keep the one that is there if it answers the same question."""
    group, path = group or Alone(), folder / "geometry.json"
    question = {
        "schema": SCHEMA,
        "latents": store.identity(),
        "patch_sizes": list(patch_sizes),
        "widths": list(widths),
        "training": {"timesteps": to_dict(model.timesteps), "t_eps": model.t_eps},
    }
    stored = group.on_first(lambda: read_json(path) if path.exists() else {})
    if {key: stored.get(key) for key in question} == question:
        return stored
    measured = {**question, **analyze(store, patch_sizes, widths, model, device, group)}
    group.on_first(lambda: write_json(path, measured))
    return measured


def look_into(
    checkpoints: Sequence[Checkpoint], store: LatentStore, out: Path, num: int, ema: str, device: str = "cpu"
) -> dict[str, Any]:
    """Write `inside.json`, where trained networks err, beside the geometry of the latents that they learnt."""
    claim_folder(out, "analysis.json", {"latents": store.identity()})
    found = look_inside(checkpoints, store, num, ema, device=device)
    write_json(out / INSIDE, found)
    return found


def analyze_into(
    store: LatentStore,
    out: Path,
    patch_sizes: tuple[int, ...],
    widths: tuple[int, ...],
    model: TimeModel,
    device: str = "cpu",
    group: Group | None = None,
) -> dict[str, Any]:
    """Measure a store's geometry in a folder of its own, and write the page; return the geometry, in all processes."""
    group = group or Alone()
    group.on_first(lambda: claim_folder(out, "analysis.json", {"latents": store.identity()}))
    geometry = measure_geometry(store, out, patch_sizes, widths, model, device, group)
    group.on_first(lambda: write_report(out))
    return geometry
