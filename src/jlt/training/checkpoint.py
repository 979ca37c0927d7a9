"""Checkpoints: a folder per step that exists whole or not at all, with hashes to verify it.

checkpoints/step_0000500/
    network.safetensors, ema_0.99.safetensors, ..., optimizer.safetensors
    state.json       step and other counts, digest of all draws so far, hash of the initial weights, seconds, device
    manifest.json    configuration, latent space, SHA-256 of every file; written last
snapshots/step_0000500/
    ema_sigma_rel=0.05.safetensors, ...
    manifest.json    step, number of updates, SHA-256 of every file; written last
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from jlt.config import TrainConfig
from jlt.errors import JLTError
from jlt.storage.codec import Count, NonNegative, from_file, known_fields, to_json
from jlt.storage.files import (
    partial_path,
    read_json,
    read_sealed_json,
    sealed_sha256,
    sealed_text,
    sha256_file,
    with_place,
    write_json,
    write_text,
)
from jlt.storage.folders import LOCK, require_unlinked, stays_inside, whole_folder
from jlt.storage.weights import write_tensors
from jlt.training.power_ema import format_sigma_rel

SCHEMA = 2
MANIFEST = "manifest.json"
STATE = "state.json"


@dataclass(frozen=True)
class StepManifest:
    """The `manifest.json` of a checkpoint or, without the two last fields, of a snapshot."""

    step: Count
    updates: Count
    files: Mapping[str, str]
    """SHA-256 by name."""
    config: TrainConfig | None = None
    latents: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class LatentsOrigin:
    """What a manifest says of the latents of the training, as far as it is read; it is stored and passed on as JSON."""

    autoencoder: Mapping[str, Any]
    source: Mapping[str, Any] = field(default_factory=dict)
    count: Count | None = None
    resolution: Count | None = None
    class_names: tuple[str, ...] | None = None
    manifest_sha256: str | None = None


@dataclass(frozen=True)
class Facts:
    """The `state.json` of a checkpoint; that of an imported one has only counts and its origin."""

    step: Count
    updates: Count
    skipped_in_a_row: Count = 0
    draws: str = ""
    initial_weights: str = ""
    seconds: NonNegative = 0.0
    device: str = ""
    imported: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class StepFolder:
    """A folder of tensors that belongs to a step of a run, with its manifest: a checkpoint or a snapshot."""

    folder: Path
    step: int
    updates: int
    """Steps that changed the weights."""
    files: Mapping[str, str]
    """SHA-256 by name."""

    @property
    def sha256(self) -> str:
        """Identity of the trained weights: a hash over the step and the hashes of all tensors."""
        tensors = {name: sha256 for name, sha256 in self.files.items() if name.endswith(".safetensors")}
        return sealed_sha256({"step": self.step, "files": tensors})

    def ema_names(self) -> list[str]:
        """Return the names of the stored averages."""
        return [name.removeprefix("ema_").removesuffix(".safetensors") for name in self.files if name[:4] == "ema_"]

    def read(self, name: str) -> dict[str, Tensor]:
        """Read one file of tensors after checking its hash; a damaged or missing one is a JLTError."""
        return load_tensors(self._checked(name))

    def _checked(self, name: str) -> Path:
        if name not in self.files:
            raise JLTError(f"{self.folder} holds no {name}: an imported run has only the weights that its source had.")
        if problem := _file_problem(self.folder / name, self.files[name]):
            raise JLTError(problem)
        return self.folder / name


@dataclass(frozen=True)
class Checkpoint(StepFolder):
    """Everything that a run resumes from."""

    config: TrainConfig
    latents: Mapping[str, Any]
    """Identity of the latent store of the training, with its autoencoder."""

    @property
    def run(self) -> Path:
        """The run folder that contains it."""
        return self.folder.parent.parent

    def ema_names(self) -> list[str]:
        """Return the names of the averages in the order of the configuration."""
        return average_names(self.config)

    def read_state(self) -> Facts:
        """Read `state.json` after checking its hash."""
        return from_file(Facts, self.folder / STATE, read_json(self._checked(STATE)))


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file; anything else (a pickle, a truncated file) is a JLTError and is never executed."""
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise JLTError(f"{path} is not a readable safetensors file ({error}).") from error


def _file_problem(path: Path, sha256: str) -> str | None:
    """Return what is wrong with a file of this hash: it is missing or damaged."""
    if not path.is_file():
        return f"{path} is missing: the checkpoint is not complete."
    if sha256_file(path) != sha256:
        return f"{path} is damaged: its content does not match the hash in {MANIFEST}."
    return None


M = TypeVar("M")
Tensors = Mapping[str, Mapping[str, Tensor]]
"""Tensors to write, by file and name."""


def save_checkpoint(
    run: Path, config: TrainConfig, latents: Mapping[str, Any], tensors: Tensors, state: Mapping[str, Any]
) -> Path:
    """Write the checkpoint of `state["step"]`; a kill at any moment leaves none or all of it."""
    return _write_folder(step_folder(run, state["step"]), tensors, state, config=to_json(config), latents=latents)


def save_snapshot(run: Path, tensors: Tensors, state: Mapping[str, Any]) -> Path:
    """Write a snapshot of the power-function averages; a kill at any moment leaves none or all of it."""
    return _write_folder(run / "snapshots" / step_folder(run, state["step"]).name, tensors, state)


def _write_folder(final: Path, tensors: Tensors, state: Mapping[str, Any], **training: Any) -> Path:
    """Write a folder that appears whole, its manifest last.

    `training` is the configuration and the latents, which only a checkpoint holds.
    """
    with whole_folder(final) as partial:
        for name, values in tensors.items():
            write_tensors(partial / f"{name}.safetensors", values)
        if training:
            write_json(partial / STATE, state)
        facts = {"schema": SCHEMA, "step": state["step"], "updates": state["updates"], **training}
        files = {path.name: sha256_file(path) for path in sorted(partial.iterdir()) if path.name != LOCK}
        manifest = with_place({**facts, "files": files}, final / MANIFEST)
        write_text(partial / MANIFEST, sealed_text(manifest))
    return final


def remove_folder(folder: Path) -> None:
    """Remove a checkpoint or a snapshot; a kill at any moment leaves all of it, or nothing that looks like one.

    JLTError if it, or the folder that the run keeps it in, is a link.
    """
    require_unlinked(folder.parent.parent, folder)
    doomed = partial_path(folder)
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def require_own_folders(run: Path) -> None:
    """Raise JLTError if a folder that a run writes to, or one of its checkpoints or snapshots, is a link."""
    for parent in ("checkpoints", "snapshots", "samples", "evaluations", "coordinates"):
        for folder in (run / parent, *run.glob(f"{parent}/step_*")):
            require_unlinked(run, folder)


def average_names(config: TrainConfig) -> list[str]:
    """Return the names of the averages of a run, decays before power functions."""
    return [*map(repr, config.ema), *map(format_sigma_rel, config.power_ema)]


def step_folder(run: Path, step: int) -> Path:
    """Return where a run keeps the checkpoint of a step."""
    return run / "checkpoints" / f"step_{step:07d}"


def _by_step(run: Path, kind: str) -> list[Path]:
    return sorted(run.glob(f"{kind}/step_*"), key=step_of)


def list_checkpoints(run: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first; JLTError for one that has lost its manifest."""
    folders = _by_step(run, "checkpoints")
    for folder in folders:
        # A checkpoint appears whole, by a rename: one without a manifest was damaged later.
        if not (folder / MANIFEST).is_file():
            raise JLTError(f"{folder} has no {MANIFEST}: it is damaged; delete it to continue from the one before.")
    return folders


def step_of(folder: Path) -> int:
    """Return the step of a checkpoint or snapshot by its folder's name."""
    step = folder.name.removeprefix("step_")
    if not step.isdecimal():
        raise JLTError(f"{folder} is no checkpoint or snapshot, which have the name step_ and a number: move it away.")
    return int(step)


def prune_checkpoints(run: Path, keep_last: int, keep_every: int) -> None:
    """Remove all but the newest `keep_last` checkpoints (0: all) and those at multiples of `keep_every` (0: none)."""
    for folder in _by_step(run, "checkpoints")[:-keep_last] if keep_last else []:
        if not (keep_every and step_of(folder) % keep_every == 0):
            remove_folder(folder)


def remove_later_snapshots(run: Path, step: int) -> None:
    """Remove snapshots of steps that will be made again."""
    for folder in _by_step(run, "snapshots"):
        if step_of(folder) > step:
            remove_folder(folder)


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint folder, or the newest checkpoint of a run folder; a JLTError says what is missing."""
    if not path.exists():
        raise JLTError(f"{path} does not exist: name a run folder of jlt train, or one of its checkpoints.")
    folders = [path] if (path / MANIFEST).is_file() else list_checkpoints(path)
    if not folders:
        raise JLTError(_without_checkpoint(path))
    folder = folders[-1]
    manifest = _read_manifest(folder)
    if manifest.config is None or manifest.latents is None:
        raise JLTError(f"{folder} is a snapshot of averages: name its run, with an EMA such as sigma_rel=0.07.")
    from_file(LatentsOrigin, folder / MANIFEST, known_fields(LatentsOrigin, manifest.latents))
    return Checkpoint(folder, *_facts(manifest), manifest.config, manifest.latents)


def _without_checkpoint(path: Path) -> str:
    """Return what is wrong with a path that holds no checkpoint, and what leads to one."""
    if runs := sorted(folder.parent for form in ("*", "runs/*") for folder in path.glob(f"{form}/checkpoints")):
        return f"{path} is no run, but the folder of runs: name one of them, such as {runs[0]}."
    sentence = f"{path} is neither a checkpoint nor a run with a complete checkpoint: make one with jlt train."
    if path.is_file() or (path / "model_index.json").is_file():
        sentence += f" `jlt import {path} --out RUN` makes a run of another program's file, or of an export."
    return sentence


def list_snapshots(run: Path) -> list[StepFolder]:
    """Return the snapshots of a run, oldest first."""
    return [StepFolder(folder, *_facts(_read_manifest(folder))) for folder in _by_step(run, "snapshots")]


def _facts(manifest: StepManifest) -> tuple[int, int, Mapping[str, str]]:
    return manifest.step, manifest.updates, manifest.files


def _read_manifest(folder: Path) -> StepManifest:
    path = folder / MANIFEST
    content = read_sealed_json(path)
    if content.pop("schema", None) != SCHEMA:
        raise JLTError(f"{path} is not a checkpoint's manifest of schema {SCHEMA}: name a run.")
    manifest = from_file(StepManifest, path, content)
    if folder.name.startswith("step_") and step_of(folder) != manifest.step:
        raise JLTError(f"{path} is of step {manifest.step}: the folder was renamed or copied.")
    for name in manifest.files:
        # Links are followed, since what they lead to must have the hash in the manifest.
        if not stays_inside(name):
            raise JLTError(f"{path} names {name!r}: a manifest may name only files in its own folder.")
    return manifest


def is_checkpoint_or_run(path: Path) -> bool:
    """Return whether a folder holds a checkpoint or a run, by its files."""
    return (path / "checkpoints").is_dir() or (path / "state.json").exists() or (path / "network.safetensors").exists()


def verify_checkpoints(path: Path) -> list[str]:
    """Return the problems of a checkpoint, or of all checkpoints and snapshots of a run; empty if there are none."""
    folders = [*(sorted(path.glob("checkpoints/step_*")) or [path]), *sorted(path.glob("snapshots/step_*"))]
    return [problem for folder in folders for problem in _problems(folder)]


def _problems(folder: Path) -> list[str]:
    if not (folder / MANIFEST).is_file():
        return [f"{folder / MANIFEST} is missing."]
    try:
        files = _read_manifest(folder).files
    except JLTError as error:
        return [str(error)]
    problems = [_file_problem(folder / name, sha256) for name, sha256 in files.items()]
    extra = sorted({path.name for path in folder.iterdir()} - {*files, MANIFEST})
    return [*filter(None, problems), *(f"{folder / name} is not in the manifest." for name in extra)]
