"""Which weights of a checkpoint are meant: the raw ones, a stored average, or one rebuilt from the run's snapshots."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from jlt.errors import JLTError, unknown_name
from jlt.runtime.progress import inform
from jlt.storage.files import sealed_sha256
from jlt.training.checkpoint import Checkpoint, SnapshotFolder, list_snapshots
from jlt.training.power_ema import WORDS, Snapshot, coefficients, parse_sigma_rel, reconstruct

NOTABLE_RESIDUAL = 0.05
"""From this share of a wanted average that the stored ones cannot express, a line says so."""


@dataclass(frozen=True)
class ChosenWeights:
    """A network's weights, the words that name them, and, where they were rebuilt, what from (else None)."""

    tensors: dict[str, Tensor]
    ema: str
    rebuilt: Mapping[str, Any] | None


def choose_name(checkpoint: Checkpoint, ema: str) -> str:
    """Return the words for the weights that are meant: the first average, or `none`, where empty."""
    names = checkpoint.ema_names()
    return ema or (names[0] if names else "none")


def choose_weights(checkpoint: Checkpoint, ema: str) -> ChosenWeights:
    """Return the weights that words name: a stored average, `sigma_rel=0.07`, `none`; the first average where empty.

    JLTError for words that name nothing, for damaged files, and where there is nothing to rebuild from.
    """
    require_ema(checkpoint, ema)
    names, chosen = checkpoint.ema_names(), choose_name(checkpoint, ema)
    if chosen == "none":
        return ChosenWeights(checkpoint.read("network.safetensors"), chosen, None)
    if chosen in names:
        return ChosenWeights(checkpoint.read(f"ema_{chosen}.safetensors"), chosen, None)
    return _rebuild(checkpoint, chosen)


def require_ema(checkpoint: Checkpoint, ema: str) -> None:
    """Raise a JLTError for words that name no weights; reads none."""
    names, chosen = checkpoint.ema_names(), choose_name(checkpoint, ema)
    if chosen in (*names, "none"):
        return
    if not chosen.startswith(WORDS):
        raise unknown_name("EMA in this checkpoint", chosen, [*names, "none", f"{WORDS}0.07"])
    parse_sigma_rel(chosen)


def _rebuild(checkpoint: Checkpoint, words: str) -> ChosenWeights:
    width = parse_sigma_rel(words)
    earlier = [folder for folder in list_snapshots(checkpoint.run) if folder.step < checkpoint.step]
    stored: list[tuple[Snapshot, Callable[[], Mapping[str, Tensor]]]] = [
        (Snapshot(folder.updates, parse_sigma_rel(name)), partial(folder.read, f"ema_{name}.safetensors"))
        for folder in (*earlier, checkpoint)
        for name in folder.ema_names()
        if name.startswith(WORDS) and folder.updates
    ]
    if not stored:
        raise JLTError(
            f"{checkpoint.folder} holds no power-function average, from which {words} could be rebuilt: "
            "train with --power-ema 0.05 0.1."
        )
    combination = coefficients([snapshot for snapshot, _ in stored], checkpoint.updates, width)
    tensors = reconstruct(zip(combination.coefficients.tolist(), [read for _, read in stored], strict=True))
    if combination.residual > NOTABLE_RESIDUAL:
        inform(
            f"{words} is rebuilt from {len(stored)} stored averages, which cannot express {combination.residual:.0%} "
            "of it: snapshots closer together (--snapshot-every), or a length nearer to those stored, would."
        )
    return ChosenWeights(tensors, words, _origin(earlier, len(stored), combination.residual))


def _origin(earlier: list[SnapshotFolder], count: int, residual: float) -> dict[str, Any]:
    hashes = {folder.folder.name: folder.sha256 for folder in earlier}
    return {"averages": count, "residual": round(residual, 6), "snapshots_sha256": sealed_sha256(hashes)}
