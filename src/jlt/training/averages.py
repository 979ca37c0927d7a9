"""The weights of a checkpoint by name: the raw ones, a stored average, or one rebuilt from the run's snapshots."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from jlt.errors import JLTError, unknown_name
from jlt.runtime.progress import inform
from jlt.storage.files import sealed_sha256
from jlt.training.checkpoint import Checkpoint, StepFolder, list_snapshots
from jlt.training.power_ema import SIGMA_REL, Snapshot, coefficients, parse_sigma_rel, reconstruct

NOTABLE_RESIDUAL = 0.05
"""A larger residual of a rebuilt average is reported."""


@dataclass(frozen=True)
class ChosenWeights:
    """A network's weights, their name, and the origin of rebuilt ones (else None)."""

    tensors: dict[str, Tensor]
    ema: str
    rebuilt: Mapping[str, Any] | None


def choose_name(checkpoint: Checkpoint, ema: str) -> str:
    """Return the name of the chosen weights; an empty one becomes the first average, or `none`."""
    names = checkpoint.ema_names()
    return ema or (names[0] if names else "none")


def choose_weights(checkpoint: Checkpoint, ema: str) -> ChosenWeights:
    """Return weights by name: a stored average, `sigma_rel=0.07`, `none`; the first average if empty.

    JLTError for an unknown name, for damaged files, and if there is no average to rebuild from.
    """
    require_ema(checkpoint, ema)
    names, chosen = checkpoint.ema_names(), choose_name(checkpoint, ema)
    if chosen == "none":
        return ChosenWeights(checkpoint.read("network.safetensors"), chosen, None)
    if chosen in names:
        return ChosenWeights(checkpoint.read(f"ema_{chosen}.safetensors"), chosen, None)
    return _rebuild(checkpoint, chosen)


def require_ema(checkpoint: Checkpoint, ema: str) -> None:
    """Raise a JLTError for an unknown name of weights; reads none."""
    names, chosen = checkpoint.ema_names(), choose_name(checkpoint, ema)
    if chosen in (*names, "none"):
        return
    if not chosen.startswith(SIGMA_REL):
        raise unknown_name("EMA in this checkpoint", chosen, [*names, "none", f"{SIGMA_REL}0.07"])
    parse_sigma_rel(chosen)


def _rebuild(checkpoint: Checkpoint, name: str) -> ChosenWeights:
    width = parse_sigma_rel(name)
    earlier = [folder for folder in list_snapshots(checkpoint.run) if folder.step < checkpoint.step]
    stored: list[tuple[Snapshot, Callable[[], Mapping[str, Tensor]]]] = [
        (Snapshot(folder.updates, parse_sigma_rel(average)), partial(folder.read, f"ema_{average}.safetensors"))
        for folder in (*earlier, checkpoint)
        for average in folder.ema_names()
        if average.startswith(SIGMA_REL) and folder.updates
    ]
    if not stored:
        raise JLTError(
            f"{checkpoint.folder} holds no power-function average to rebuild {name} from: "
            "train with --power-ema 0.05 0.1."
        )
    combination = coefficients([snapshot for snapshot, _ in stored], checkpoint.updates, width)
    tensors = reconstruct(zip(combination.coefficients.tolist(), [read for _, read in stored], strict=True))
    if combination.residual > NOTABLE_RESIDUAL:
        inform(
            f"{name} is rebuilt from {len(stored)} stored averages with a residual of {combination.residual:.0%}. "
            "More frequent snapshots (--snapshot-every) or a length nearer to a stored one would lower it."
        )
    return ChosenWeights(tensors, name, _origin(earlier, len(stored), combination.residual))


def _origin(earlier: list[StepFolder], count: int, residual: float) -> dict[str, Any]:
    hashes = {folder.folder.name: folder.sha256 for folder in earlier}
    return {"averages": count, "residual": round(residual, 6), "snapshots_sha256": sealed_sha256(hashes)}
