"""A network from elsewhere becomes a run folder: what each reader of files returns, and the one writer."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from jlt.autoencoders.load import IN_RUN
from jlt.config import NetworkConfig, TrainConfig
from jlt.errors import JLTError
from jlt.interop.pipeline_settings import IN_FOLDER
from jlt.results.run import CONFIG
from jlt.storage.files import atomic_path, write_marker
from jlt.storage.folders import Claim, whole_folder
from jlt.training.checkpoint import Checkpoint, open_checkpoint, save_checkpoint
from jlt.training.state import run_identity

IMPORTED = "imported"
"""Key of the hash of what was imported, in the source of the latents of an imported run."""
LARGEST_SIDE = 4096
"""Pixels; a file's own claim about its images is not trusted beyond this."""
MOST_TOKENS = 1 << 16
MOST_UPDATES = 10**9


@dataclass(frozen=True)
class Imported:
    """A checkpoint of another program, or an export, in this program's terms."""

    config: TrainConfig
    latents: Mapping[str, Any]
    """What identifies the latents of a training: see `imported_latents`."""
    weights: Mapping[str, Mapping[str, Tensor]]
    """`network` and each `ema_<name>` that there is, in float32; a reader may convert each when it is taken."""
    step: int
    facts: Mapping[str, Any]
    """What the checkpoint's state records of its origin; `step_counts` is updates, epochs or nothing."""
    autoencoder: Mapping[str, Path] = field(default_factory=dict)
    """Files of an autoencoder that the run gets a copy of, by the names of the copies."""


def imported_latents(
    autoencoder: Mapping[str, Any], kind: str, sha256: str, resolution: int, class_names: list[str]
) -> dict[str, Any]:
    """Return what identifies the latents: the autoencoder, the kind of images, and the hash of what is imported."""
    return {
        "autoencoder": dict(autoencoder),
        "source": {"kind": kind, IMPORTED: sha256},
        "count": None,
        "resolution": resolution,
        "class_names": class_names,
    }


def require_moderate(network: NetworkConfig, downsampling: int) -> None:
    """Raise JLTError for grids that no weight confirms and that no network has: they cost memory with every image."""
    if max(network.height, network.width) * downsampling > LARGEST_SIDE or network.tokens > MOST_TOKENS:
        raise JLTError(f"jlt reads no images of more than {LARGEST_SIDE:,} pixels a side, or {MOST_TOKENS:,} tokens.")


def require_finite(path: Path, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Raise JLTError naming the first weight with a value that is not finite in float32."""
    for name, weight in weights:
        if not weight.float().isfinite().all():
            raise JLTError(f"{path} holds values that are not finite in {name[:80]}: did its training diverge?")


def write_run(imported: Imported, out: Path) -> Checkpoint:
    """Write a run folder with one checkpoint, and open it; a kill at any moment leaves no run.

    A folder that the same import of the same source wrote is only opened; so is one that another process made in the
    meantime. JLTError for a folder that holds anything else.
    """
    run, latents = out.resolve(), dict(imported.latents)
    if imported.autoencoder:
        latents["autoencoder"] = {**latents["autoencoder"], "source": f"{IN_RUN}{IN_FOLDER}"}
    claim = Claim(run, CONFIG, run_identity(imported.config, latents))
    if not claim.is_begun():
        with whole_folder(run, claim.is_begun) as partial:
            updates = imported.step if imported.facts["step_counts"] == "updates" else 0
            state = {"step": imported.step, "updates": updates, "imported": dict(imported.facts)}
            save_checkpoint(partial, imported.config, latents, imported.weights, state)
            for name, path in imported.autoencoder.items():
                with atomic_path(partial / IN_FOLDER / name) as copy:
                    shutil.copyfile(path, copy)
            write_marker(partial / CONFIG, claim.identity)
    return open_checkpoint(run)
