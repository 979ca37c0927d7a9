"""The geometry of a store in a folder: measured once, kept, and drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Question:
    """What is asked of a space: by which patches it is cut, and for which networks and training the advice is."""

    patch_sizes: tuple[int, ...]
    widths: tuple[int, ...]
    model: TimeModel

    def words(self, store: LatentStore) -> dict[str, Any]:
        """Return what `geometry.json` says of the question, as JSON values."""
        return {
            "schema": SCHEMA,
            "latents": store.identity(),
            "patch_sizes": list(self.patch_sizes),
            "widths": list(self.widths),
            "training": {"timesteps": to_dict(self.model.timesteps), "t_eps": self.model.t_eps},
        }


def measure_geometry(
    store: LatentStore, folder: Path, question: Question, device: str = "cpu", group: Group | None = None
) -> dict[str, Any]:
    """Write `geometry.json` into a folder, or keep the one that is there if it answers the same question."""
    group, path, words = group or Alone(), folder / "geometry.json", question.words(store)
    stored = group.on_first(lambda: read_json(path) if path.exists() else {})
    if {key: stored.get(key) for key in words} == words:
        return stored
    found = analyze(store, question.patch_sizes, question.widths, question.model, device, group)
    measured = {**words, **found}
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
    store: LatentStore, out: Path, question: Question, device: str = "cpu", group: Group | None = None
) -> dict[str, Any]:
    """Measure a store's geometry in a folder of its own, and write the page; return the geometry, in all processes."""
    group = group or Alone()
    group.on_first(lambda: claim_folder(out, "analysis.json", {"latents": store.identity()}))
    geometry = measure_geometry(store, out, question, device, group)
    group.on_first(lambda: write_report(out))
    return geometry
