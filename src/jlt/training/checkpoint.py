"""Checkpoints: a folder per step that exists whole or not at all, and says by its hashes that it is sound.

checkpoints/step_0000500/
    network.safetensors, ema_0.99.safetensors, ..., optimizer.safetensors
    state.json       step, digest of all draws so far, hash of the initial weights
    manifest.json    configuration, latent space, SHA-256 of every file; written last
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from jlt.config import TrainConfig, from_dict, to_dict
from jlt.errors import JLTError, unknown_name
from jlt.files import (
    fsync_folder,
    read_json,
    read_sealed_json,
    sealed_sha256,
    sealed_text,
    sha256_file,
    write_json,
    write_text,
)

SCHEMA = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk, its manifest read."""

    folder: Path
    step: int
    config: TrainConfig
    latents: Mapping[str, Any]
    """Identity of the latent store that it was trained on, its autoencoder's included."""
    files: Mapping[str, str]

    @property
    def sha256(self) -> str:
        """Identity of what was trained: a hash over the step and the hashes of all tensors."""
        tensors = {name: sha256 for name, sha256 in self.files.items() if name.endswith(".safetensors")}
        return sealed_sha256({"step": self.step, "files": tensors})

    def ema_names(self) -> list[str]:
        """Return the decays that are stored, as the words that name them."""
        return [name.removeprefix("ema_").removesuffix(".safetensors") for name in self.files if name[:4] == "ema_"]

    def read(self, name: str) -> dict[str, Tensor]:
        """Read one file of tensors after checking its hash; a damaged or missing one is a JLTError."""
        check_file(self.folder / name, self.files[name])
        return load_tensors(self.folder / name)

    def read_state(self) -> dict[str, Any]:
        """Read `state.json` after checking its hash."""
        check_file(self.folder / "state.json", self.files["state.json"])
        return read_json(self.folder / "state.json")

    def weights(self, ema: str) -> dict[str, Tensor]:
        """Return the network's weights: of an EMA decay, `none` for the raw ones, empty for the first EMA."""
        names = self.ema_names()
        chosen = ema or (names[0] if names else "none")
        if chosen != "none" and chosen not in names:
            raise unknown_name("EMA in this checkpoint", chosen, [*names, "none"])
        return self.read("network.safetensors" if chosen == "none" else f"ema_{chosen}.safetensors")


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file; anything else (a pickle, a truncated file) is a JLTError and is never executed."""
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise JLTError(f"{path} is not a readable safetensors file ({error}).") from error


def check_file(path: Path, sha256: str) -> None:
    """Raise a JLTError unless the file exists and has this hash."""
    if not path.is_file():
        raise JLTError(f"{path} is missing: the checkpoint is not complete.")
    if sha256_file(path) != sha256:
        raise JLTError(f"{path} is damaged: its content does not match the hash in {MANIFEST}.")


def save_checkpoint(
    run: Path,
    step: int,
    config: TrainConfig,
    latents: Mapping[str, Any],
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
) -> Path:
    """Write a checkpoint beside its place and rename it there: a kill at any moment leaves none or all of it."""
    final = step_folder(run, step)
    partial = final.with_name(f".{final.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        for name, values in tensors.items():
            save_file({key: value.contiguous() for key, value in values.items()}, partial / f"{name}.safetensors")
        write_json(partial / "state.json", {**state, "step": step})
        files = sorted(partial.iterdir())
        for path in files:
            with path.open("rb+") as file:
                os.fsync(file.fileno())
        manifest = {
            "schema": SCHEMA,
            "step": step,
            "config": to_dict(config),
            "latents": latents,
            "files": {path.name: sha256_file(path) for path in files},
        }
        write_text(partial / MANIFEST, sealed_text(manifest))
        partial.rename(final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    fsync_folder(final.parent)
    return final


def step_folder(run: Path, step: int) -> Path:
    """Return where a run keeps the checkpoint of a step."""
    return run / "checkpoints" / f"step_{step:07d}"


def list_checkpoints(run: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first; JLTError for one that has lost its manifest."""
    folders = sorted(run.glob("checkpoints/step_*"))
    for folder in folders:
        # A checkpoint appears by a rename, whole: one without a manifest was damaged later.
        if not (folder / MANIFEST).is_file():
            raise JLTError(f"{folder} has no {MANIFEST}: it is damaged; delete it to continue from the one before.")
    return folders


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint folder, or the newest checkpoint of a run folder; a JLTError says what is missing."""
    if not path.exists():
        raise JLTError(f"{path} does not exist.")
    folder = path
    if not (path / MANIFEST).is_file():
        complete = list_checkpoints(path)
        if not complete:
            raise JLTError(f"{path} is neither a checkpoint nor a run with a complete checkpoint in it.")
        folder = complete[-1]
    manifest = read_sealed_json(folder / MANIFEST)
    if manifest.get("schema") != SCHEMA:
        raise JLTError(f"{folder / MANIFEST} is not a checkpoint's manifest of schema {SCHEMA}.")
    try:
        config = from_dict(TrainConfig, manifest["config"])
    except JLTError as error:
        raise JLTError(f"{folder / MANIFEST} was written by another version: {error}") from error
    return Checkpoint(folder, manifest["step"], config, manifest["latents"], manifest["files"])


def is_checkpoint_or_run(path: Path) -> bool:
    """Return whether a folder holds a checkpoint or a run, by what lies in it."""
    return (path / "checkpoints").is_dir() or (path / "state.json").exists() or (path / "network.safetensors").exists()


def verify_checkpoints(path: Path) -> list[str]:
    """Return what is wrong with a checkpoint, or with all of a run's, by name; an empty list means they are sound."""
    folders = sorted(path.glob("checkpoints/step_*")) or [path]
    return [problem for folder in folders for problem in _problems(folder)]


def _problems(folder: Path) -> list[str]:
    if not (folder / MANIFEST).is_file():
        return [f"{folder / MANIFEST} is missing."]
    try:
        checkpoint = open_checkpoint(folder)
    except JLTError as error:
        return [str(error)]
    problems = []
    for name, sha256 in checkpoint.files.items():
        try:
            check_file(folder / name, sha256)
        except JLTError as error:
            problems.append(str(error))
    known = {*checkpoint.files, MANIFEST}
    return problems + [f"{extra} is not in the manifest." for extra in folder.iterdir() if extra.name not in known]
