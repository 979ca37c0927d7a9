"""Commands on latent stores: encode, verify, analyze."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from jlt.cli.command import Command, Flat, Positional, Result
from jlt.config import LossSpace, TimestepConfig
from jlt.errors import UsageError
from jlt.latents.encode_config import EncodeConfig


@dataclass(frozen=True, kw_only=True)
class Encode(Command):
    """Encode images into a latent store, or adopt shards that the authors' program wrote.

    Several processes share the work: torchrun --nproc-per-node 8 -m jlt encode ...
    Shards of the authors' program are adopted where they lie: jlt encode --adopt DIR (with --help for its options)

    For example:

      jlt encode --images digits --autoencoder tiny --resolution 32 --out latents
    """

    config: Annotated[EncodeConfig, Flat]
    out: Path
    """Folder of the store; the same words continue it."""

    def run(self) -> Result:
        from jlt.latents.encoding import encode
        from jlt.runtime.environment import default_device

        return _store_result(encode(self.config, self.out, default_device()), self.out)


@dataclass(frozen=True, kw_only=True)
class Adopt(Command):
    """Make a latent store of the authors' shards, where they lie: write the manifest beside them.

    For example:

      jlt encode --adopt shards --resolution 256
    """

    adopt: Path
    """Folder of latents_rank*_shard*.safetensors."""
    autoencoder: str = "flux2"
    """What made the latents, and will decode samples."""
    autoencoder_path: str | None = None
    """Where its weights are: a local folder or a Hub id."""
    resolution: int | None = None
    """Side of the images in pixels (default: the latents' height times the autoencoder's downsampling)."""
    class_names: Path | None = None
    """A text file with one class name a line (default: the numbers)."""

    def run(self) -> Result:
        from jlt.images.labels import read_class_names
        from jlt.latents.adoption import adopt

        names = read_class_names(self.class_names) if self.class_names else None
        manifest = adopt(self.adopt, self.autoencoder, self.autoencoder_path, self.resolution, names)
        return _store_result(manifest, self.adopt)


def _store_result(manifest: Any, folder: Path) -> Result:
    shape = f"{manifest.channels}x{manifest.height}x{manifest.width}"
    text = f"{manifest.count} latents of {shape} in {folder}, overall standard deviation {manifest.std:.3f}"
    if manifest.skipped:
        first, more = manifest.skipped[0], len(manifest.skipped) - 1
        text += f"\nnot in it, and listed in its manifest: {first.image}, which {first.reason}"
        text += f", and {more} more" if more else ""
    return Result(manifest.content(), text)


@dataclass(frozen=True, kw_only=True)
class Verify(Command):
    """Read a latent store or a checkpoint whole and name everything that is wrong; exits 1 if anything is.

    For example:

      jlt verify latents
    """

    folder: Annotated[Path, Positional, tyro.conf.arg(metavar="DIR")]

    def run(self) -> Result:
        from jlt.latents.store import verify_store
        from jlt.training.checkpoint import is_checkpoint_or_run, verify_checkpoints

        problems = verify_checkpoints(self.folder) if is_checkpoint_or_run(self.folder) else verify_store(self.folder)
        text = "\n".join(problems) or f"{self.folder} is sound."
        return Result({"folder": str(self.folder), "problems": problems}, text, sound=not problems)


@dataclass(frozen=True, kw_only=True)
class Analyze(Command):
    """Measure the target geometry of a latent store, and say which prediction it favours: eq. 9-13 of docs/notation.md.

    Several processes share the work: torchrun --nproc-per-node 8 -m -- jlt analyze ...

    For example:

      jlt analyze --latents latents --out geometry --patch-size 1 2 --width 768
    """

    latents: Path
    out: Path
    """Folder for geometry.json and report.html."""
    patch_size: tuple[int, ...] = (1, 2)
    """How latents are cut into tokens."""
    width: tuple[int, ...] = ()
    """Widths of networks that the advice is for (default: those of --checkpoint, else 768, that of JLT-B)."""
    timesteps: Annotated[TimestepConfig, Flat] = field(default_factory=TimestepConfig)
    """The training times that the advice is for."""
    t_eps: float = 0.05
    """Clamp of the matched loss that the advice is for (eq. 5); 0 takes eq. 13 as it stands."""
    loss_space: LossSpace = "v"
    """Space of that loss."""
    noise_scale: float = 1.0
    """Standard deviation of that training's noise."""
    checkpoint: tuple[Path, ...] = ()
    """Runs or checkpoints, trained on these latents, whose errors by direction and time are measured too."""
    ema: str = ""
    """Which of their weights; empty takes a run's first EMA."""
    num: int = 1024
    """Latents that the networks are shown."""

    def run(self) -> Result:
        from jlt.experiments.analysis import AnalysisConfig, analyze_into
        from jlt.experiments.error_by_direction import Networks
        from jlt.latents.store import LatentStore
        from jlt.report.terminal import geometry_table
        from jlt.results.files import result_json
        from jlt.results.geometry import TrainingModel
        from jlt.runtime.environment import default_device
        from jlt.runtime.processes import join_group
        from jlt.training.checkpoint import open_checkpoint

        opened = [open_checkpoint(path) for path in self.checkpoint]
        networks = Networks(opened, self.num, self.ema) if opened else None
        known = sorted({checkpoint.config.network.hidden_size for checkpoint in opened})
        widths = self.width or tuple(known) or (768,)
        if not self.patch_size or min((*widths, *self.patch_size)) < 1:
            raise UsageError("--patch-size and --width need numbers of 1 or more.")
        model = TrainingModel(self.timesteps, self.t_eps, self.loss_space, self.noise_scale)
        config = AnalysisConfig(self.patch_size, widths, model)
        store, device = LatentStore.open(self.latents), default_device()
        with join_group(device) as group:
            geometry, inside = analyze_into(store, self.out, config, networks, device, group)
        data = result_json(geometry) | ({"inside": result_json(inside)} if inside else {})
        return Result(data, f"{geometry_table(geometry, inside)}\n\nOpen {self.out / 'report.html'}")
