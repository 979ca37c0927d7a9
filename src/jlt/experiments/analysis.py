"""The geometry of a store in a folder: measured once, kept, and drawn."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jlt.errors import JLTError
from jlt.experiments.error_by_direction import Networks, measure_error_by_direction, require_comparable
from jlt.geometry.accumulate import Latents, Moments, measure_moments
from jlt.geometry.analyze import describe
from jlt.geometry.forecast import TrainingModel
from jlt.latents.store import LatentStore
from jlt.patches import require_divisor
from jlt.report.page import write_report
from jlt.report.study import GEOMETRY, GEOMETRY_SCHEMA, INSIDE
from jlt.runtime.processes import Group, SingleProcess, rank0_value
from jlt.runtime.progress import inform
from jlt.storage.codec import to_json
from jlt.storage.files import claim_folder, read_sealed_json, sealed_text, write_text


@dataclass(frozen=True)
class Question:
    """What is asked of a space: by which patches it is cut, and for which networks and training the advice is."""

    patch_sizes: tuple[int, ...]
    widths: tuple[int, ...]
    model: TrainingModel

    def words(self, store: Latents) -> dict[str, Any]:
        """Return what `geometry.json` says of the question, as JSON values."""
        return {
            "schema": GEOMETRY_SCHEMA,
            "latents": store.identity(),
            "patch_sizes": list(self.patch_sizes),
            "widths": list(self.widths),
            "training": to_json(self.model),
        }


def measure_geometry(
    store: LatentStore, folder: Path, question: Question, device: str = "cpu", group: Group | None = None
) -> dict[str, Any]:
    """Write `geometry.json` into a folder, or keep the one that is there if it answers the same question."""
    group = group or SingleProcess()
    stored = _stored(store, folder, question, group)
    if stored is not None:
        return stored
    return _answer(measure_moments(store, question.patch_sizes, device, group), store, folder, question, group)


def analyze_into(
    store: LatentStore,
    out: Path,
    question: Question,
    networks: Networks | None = None,
    device: str = "cpu",
    group: Group | None = None,
) -> dict[str, Any]:
    """Measure a store's geometry in a folder of its own, look into networks that learnt it, and write the page.

    A geometry that is there and answers the same question is kept, and the store is read once. Returns the geometry, in
    all processes, with `inside` where networks are named. JLTError for networks that cannot be compared on this store.
    """
    group = group or SingleProcess()
    if networks is not None:
        require_comparable(networks.checkpoints, store)
    for patch_size in question.patch_sizes:
        require_divisor(patch_size, store.shape.height, store.shape.width)
    group.on_rank0(lambda: claim_folder(out, "analysis.json", {"latents": store.identity()}))
    if networks is None:
        geometry = measure_geometry(store, out, question, device, group)
        group.on_rank0(lambda: (out / INSIDE).unlink(missing_ok=True))
    else:
        geometry = _analyze_with(networks, store, out, question, device, group)
    group.on_rank0(lambda: write_report(out))
    return geometry


def _analyze_with(
    networks: Networks, store: LatentStore, out: Path, question: Question, device: str, group: Group
) -> dict[str, Any]:
    """Write `geometry.json` and `inside.json`, from what one pass over the store has seen."""
    geometry = _stored(store, out, question, group)
    patch_sizes = (networks.patch_size, *(() if geometry else question.patch_sizes))
    moments = measure_moments(store, patch_sizes, device, group)
    geometry = geometry or _answer(moments, store, out, question, group)
    inside = measure_error_by_direction(networks, store, moments, device, group)
    group.on_rank0(lambda: write_text(out / INSIDE, sealed_text(inside)))
    return {**geometry, "inside": inside}


def _stored(store: LatentStore, folder: Path, question: Question, group: Group) -> dict[str, Any] | None:
    """Return the geometry that a folder holds, in all processes; None if it answers another question or is damaged."""
    words = question.words(store)
    stored = group.on_rank0(lambda: _readable(folder / GEOMETRY))
    return stored if {key: stored.get(key) for key in words} == words else None


def _readable(path: Path) -> dict[str, Any]:
    try:
        return read_sealed_json(path) if path.exists() else {}
    except JLTError as error:
        inform(f"{error} It is measured anew.")
        return {}


def _answer(
    moments: Moments | None, store: LatentStore, folder: Path, question: Question, group: Group
) -> dict[str, Any]:
    """Write what the first process saw as the answer to a question, and return it, in all processes."""

    def answer() -> dict[str, Any]:
        found = describe(rank0_value(moments), store.identity(), question.patch_sizes, question.widths, question.model)
        measured = {**question.words(store), **found}
        write_text(folder / GEOMETRY, sealed_text(measured))
        return measured

    return group.on_rank0(answer)
