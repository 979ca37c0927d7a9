"""Commands that sample and evaluate: sample, evaluate, reference, fetch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from jlt.cli.command import Command, Flat, Positional, Result
from jlt.config import SampleConfig, SampleFormat
from jlt.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Sample(Command):
    """Draw images from a checkpoint; image i of a seed is always the same.

    Several processes share the work: torchrun --nproc-per-node 8 -m -- jlt sample ...
    The same words continue what was interrupted.

    For example:

      jlt sample --checkpoint run --out samples --num 64 --format grid
    """

    checkpoint: Path
    """Run folder (its newest checkpoint) or checkpoint folder."""
    out: Path
    config: Annotated[SampleConfig, Flat] = field(default_factory=SampleConfig)
    format: SampleFormat = "png"
    steps_strip: bool = False
    """Draw one picture of what the network takes for the clean image (x^) along the way from noise."""
    interpolate: bool = False
    """Draw one picture of the ways from the noise of image 0 to that of 1, from 2 to 3, and so on."""
    compare: Path | None = None
    """Another run or checkpoint, drawn from the same noise and labels, for one picture of both."""
    autoencoder_path: str | None = None
    """Where the autoencoder of the latents lies, if not where its name says."""

    def run(self) -> Result:
        if self.steps_strip or self.interpolate or self.compare:
            return self._picture()
        from jlt.runtime.environment import default_device
        from jlt.runtime.processes import join_group
        from jlt.sampling.sampler import open_sampler
        from jlt.sampling.save import save_samples
        from jlt.training.checkpoint import open_checkpoint

        checkpoint, device = open_checkpoint(self.checkpoint), default_device()
        sampler = open_sampler(checkpoint, self.config, device, self.autoencoder_path)
        with join_group(device) as group:
            written = save_samples(sampler, self.out, self.format, group)
        return Result({"written": str(written), "protocol": sampler.protocol()}, f"{self.config.num} images: {written}")

    def _picture(self) -> Result:
        from jlt.runtime.environment import default_device
        from jlt.runtime.processes import join_group
        from jlt.sampling.pictures import save_picture
        from jlt.sampling.sampler import open_sampler
        from jlt.training.checkpoint import open_checkpoint

        if self.steps_strip and self.interpolate:
            raise UsageError("One picture is either --steps-strip or --interpolate.")
        if self.format != "png":
            raise UsageError("--steps-strip, --interpolate and --compare draw one PNG: leave --format out.")
        kind = "strip" if self.steps_strip else "interpolation" if self.interpolate else "pairs"
        paths = [self.checkpoint, *([self.compare] if self.compare else [])]
        checkpoints = [open_checkpoint(path) for path in paths]
        samplers = [open_sampler(one, self.config, default_device(), self.autoencoder_path) for one in checkpoints]
        names = [f"{one.run.name}, step {one.step:,}" for one in checkpoints]
        with join_group(default_device()) as group:
            written = group.on_rank0(lambda: save_picture(samplers, self.out, kind, names))
        protocols = [sampler.protocol() for sampler in samplers]
        return Result({"written": str(written), "protocols": protocols}, f"Open {written}")


@dataclass(frozen=True, kw_only=True)
class Evaluate(Command):
    """Measure a checkpoint's samples, or a folder or .npz of images, against real images.

    For example:

      jlt evaluate --checkpoint run --reference digits --num 1000
    """

    checkpoint: Path | None = None
    """Run folder (its newest checkpoint) or checkpoint folder; or name --samples."""
    samples: Path | None = None
    """Folder of images, or an .npz with `arr_0`."""
    reference: str = "digits"
    """An .npz of statistics, a folder of class folders, or the name of a bundled set."""
    features: str = "digits"
    """Feature extractor: digits, inception (on which FID is defined) or dinov2."""
    features_path: Path | None = None
    """Where its weights are, if they are not bundled: a file for inception, a folder or Hub id for dinov2."""
    config: Annotated[SampleConfig, Flat] = field(default_factory=lambda: SampleConfig(num=1000))
    autoencoder_path: str | None = None
    """Where the autoencoder of the latents lies, if not where its name says."""

    def run(self) -> Result:
        from jlt.evaluation.extractors import load_extractor
        from jlt.experiments.checkpoint_evaluation import evaluate_checkpoint, evaluate_files
        from jlt.report.terminal import metrics_table
        from jlt.results import result_json
        from jlt.runtime.environment import default_device
        from jlt.runtime.processes import join_group

        device = default_device()
        if (samples := self.samples) and not self.checkpoint:
            extractor = load_extractor(self.features, device, self.features_path)
            with join_group(device) as group:
                result = group.on_rank0(lambda: evaluate_files(samples, self.reference, extractor))
        elif self.checkpoint and not self.samples:
            extractor = load_extractor(self.features, device, self.features_path)
            with join_group(device) as group:
                result = evaluate_checkpoint(
                    self.checkpoint, self.reference, extractor, self.config, self.autoencoder_path, group
                )
        else:
            raise UsageError("Evaluation needs either --checkpoint or --samples.")
        return Result(result_json(result), metrics_table(result.metrics))


@dataclass(frozen=True, kw_only=True)
class Reference(Command):
    """Measure real images once, for evaluations to compare samples with: statistics and single features.

    Several processes share the work: torchrun --nproc-per-node 8 -m jlt reference ...

    For example:

      jlt reference --images digits --resolution 32 --out digits.npz
    """

    images: str
    """A folder of class folders, parquet or tar files, or the name of a bundled set."""
    out: Path
    """The .npz to write; what it was made of goes into a .json beside it."""
    resolution: int = 256
    """Side in pixels that the images are brought to: that of the samples."""
    split: str | None = None
    """Which files of a folder, as train."""
    features: str = "digits"
    """Feature extractor: digits, inception or dinov2."""
    features_path: Path | None = None
    """Where its weights are, if not in the usual place."""

    def run(self) -> Result:
        from jlt.evaluation.extractors import load_extractor
        from jlt.experiments.make_reference import make_reference
        from jlt.images.registry import open_source
        from jlt.runtime.environment import default_device

        if self.resolution < 1:
            raise UsageError("--resolution must be 1 or more.")
        device = default_device()
        extractor = load_extractor(self.features, device, self.features_path)
        source = open_source(self.images, self.split)
        identity = make_reference(source, extractor, self.resolution, self.out, device)
        return Result(identity, f"Statistics of {identity['count']:,} images: {self.out}")


@dataclass(frozen=True, kw_only=True)
class Fetch(Command):
    """Download published weights into $JLT_CACHE, or .cache/jlt at home: inception, on which FID is defined.

    For example:

      jlt fetch inception
    """

    weights: Annotated[str, Positional, tyro.conf.arg(metavar="NAME")]

    def run(self) -> Result:
        from jlt.evaluation.fetch import fetch

        path = fetch(self.weights)
        return Result({"path": str(path)}, f"Fetched: {path}")
