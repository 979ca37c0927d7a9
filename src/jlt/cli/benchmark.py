"""The benchmarks of `jlt benchmark`. Nothing heavy is imported before one of them runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from jlt.cli.command import Command, Flat, Result
from jlt.config import InferencePrecision, Precision, SampleConfig
from jlt.experiments.recipes import preset_config
from jlt.latents.encode_config import EncodeConfig
from jlt.ranges import Ranged
from jlt.report import benchmark_table as tables


@dataclass(frozen=True)
class UpdateOptions(Ranged):
    """Settings of an update that a training takes too."""

    precision: Precision = "bfloat16"
    """Precision of the network; bfloat16 is autocast."""
    compile: bool = False
    """torch.compile the network; needs a C++ compiler on a CPU."""
    gradient_checkpointing: bool = False
    """Recompute each block in the backward pass: less memory, more compute."""
    accumulation: int = 1
    """Micro-batches per update."""


@dataclass(frozen=True, kw_only=True)
class TrainBenchmark(Command):
    """Measure the update of a training, against a matrix product.

    Measures every network at every batch size on random latents, and skips those that do not fit in memory. At the
    fastest batch size it also measures the training loop, and what --profile and --compare request.

    For example:
      jlt benchmark train --preset JLT-B/1 --batch-size 8 16 --compile --profile
    """

    preset: tuple[str, ...] = ("JLT-B/1",)
    """Networks and their predictions, such as JLT-B/1 or DiT-L/2."""
    batch_size: tuple[int, ...] = (8,)
    """Samples per update."""
    steps: int = 5
    """Measured updates, after a few that warm up."""
    update: Annotated[UpdateOptions, Flat] = UpdateOptions()
    loop_steps: int = 40
    """Steps of the training loop with data, log and checkpoints in a temporary folder; 0 skips it."""
    profile: bool = False
    """Also measure the parts of a step."""
    compare: bool = False
    """Also measure eager, compiled and recomputing updates and other precisions."""

    def run(self) -> Result:
        configs = [preset_config(name, **vars(self.update)) for name in self.preset]
        from jlt.benchmarks.train import benchmark_train

        measured = benchmark_train(
            configs, self.batch_size, self.steps, self.loop_steps, profile=self.profile, compare=self.compare
        )
        return Result(measured, tables.benchmark_table(measured))


@dataclass(frozen=True, kw_only=True)
class SampleBenchmark(Command):
    """Measure sampling and decoding, against a plain loop.

    The network has random weights. The plain loop calls it once per branch of guidance at every evaluation.

    For example:
      jlt benchmark sample --preset JLT-B/1 --batch-size 4 --compile
    """

    preset: str = "JLT-B/1"
    """Network and its prediction, such as JLT-B/1 or DiT-L/2."""
    batch_size: int = 4
    """Images generated at a time."""
    steps: int = 50
    """Steps of the Heun solver."""
    cfg_scale: float = 2.9
    """Guidance scale w (eq. 7); 1 is unguided."""
    cfg_interval: tuple[float, float] = (0.1, 1.0)
    """Guidance interval: low and high time (eq. 7)."""
    precision: InferencePrecision = "float32"
    """Precision of the network; bfloat16 is autocast."""
    compile: bool = False
    """torch.compile the network; needs a C++ compiler on a CPU."""
    autoencoder_path: str | None = None
    """Weights of FLUX.2's autoencoder: a folder or Hub id. Default: random ones of its class and size."""
    decoder: str | None = None
    """Another decoder than FLUX.2's: taef2, or taef2:PLACE with the place of its weights."""

    def run(self) -> Result:
        config = preset_config(self.preset)
        from jlt.benchmarks.sample import benchmark_sample

        sample = SampleConfig(
            steps=self.steps,
            cfg_scale=self.cfg_scale,
            cfg_interval=self.cfg_interval,
            batch_size=self.batch_size,
            precision=self.precision,
            compile=self.compile,
            decoder=self.decoder or (f"flux2:{self.autoencoder_path}" if self.autoencoder_path else None),
        )
        measured = benchmark_sample(config, sample)
        return Result(measured, tables.sample_benchmark_table(measured))


@dataclass(frozen=True, kw_only=True)
class DataBenchmark(Command):
    """Measure how fast latents are read, against other ways.

    For example:
      jlt benchmark data --count 8000 --batch-size 256
    """

    latents: Path | None = None
    """Folder of the latent store. Default: a temporary one of random 128x16x16 latents."""
    count: int = 8000
    """Latents in the temporary store."""
    batch_size: int = 256
    """Latents per batch."""
    seconds: float = 1.0
    """Seconds for each way of reading in each round."""

    def run(self) -> Result:
        from jlt.benchmarks.data import benchmark_data

        measured = benchmark_data(self.latents, self.count, self.batch_size, self.seconds)
        return Result(measured, tables.data_benchmark_table(measured))


@dataclass(frozen=True)
class TemporaryEncoding(EncodeConfig):
    """The settings of an encoding into a temporary store."""

    images: str = "digits"
    """Images, as for jlt encode; they are repeated up to --num."""
    autoencoder: str = "tiny"
    """Autoencoder: flux2, taef2, kl, pixels or tiny."""
    preview: tyro.conf.Suppress[tyro.conf.Fixed[bool]] = False
    repair: tyro.conf.Suppress[tyro.conf.Fixed[bool]] = False


@dataclass(frozen=True, kw_only=True)
class EncodeBenchmark(Command):
    """Measure encoding, against the autoencoder's forward pass.

    For example:
      jlt benchmark encode --autoencoder flux2 --images photos --num 64
    """

    num: int = 256
    """Number of images to encode."""
    config: Annotated[TemporaryEncoding, Flat] = TemporaryEncoding()

    def run(self) -> Result:
        from jlt.benchmarks.data import benchmark_encode

        measured = benchmark_encode(self.config, self.num)
        return Result(measured, tables.encode_benchmark_table(measured))


@dataclass(frozen=True, kw_only=True)
class GeometryBenchmark(Command):
    """Measure the geometry of random latents, against a matrix product.

    For example:
      jlt benchmark geometry --patch-size 1 2 --count 2000
    """

    patch_size: tuple[int, ...] = (1, 2)
    """Patch sizes: sides of a token in latent positions."""
    count: int = 2000
    """Latents of the measured pass."""

    def run(self) -> Result:
        from jlt.benchmarks.geometry import benchmark_geometry

        measured = benchmark_geometry(self.patch_size, self.count)
        return Result(measured, tables.geometry_benchmark_table(measured))


KINDS = (TrainBenchmark, SampleBenchmark, DataBenchmark, EncodeBenchmark, GeometryBenchmark)
BENCHMARKS: dict[str, type[Command]] = {kind.__name__.removesuffix("Benchmark").lower(): kind for kind in KINDS}


@dataclass(frozen=True, kw_only=True)
class Benchmark(Command):
    """Measure speed, utilisation and memory on this machine.

    For example:
      jlt benchmark train --preset JLT-B/1 --batch-size 8 --compile
    """
