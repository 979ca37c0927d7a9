"""The verbs of `jlt benchmark`. Nothing heavy is imported before one of them runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jlt.cli.command import Command, Result
from jlt.config import Precision
from jlt.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class TrainBenchmark(Command):
    """The trainer's own update on random latents, against a matrix product in the same run.

    Every network is measured at every batch size; those that do not fit in memory are passed over. At the fastest
    batch size the rest is measured: the training loop, and what --profile and --compare ask for.

    For example:

      jlt benchmark train --preset JLT-B/1 --batch-size 8 16 --compile --profile
    """

    preset: tuple[str, ...] = ("JLT-B/1",)
    batch_size: tuple[int, ...] = (8,)
    steps: int = 5
    """Measured updates, after a few that warm up."""
    precision: Precision = "bfloat16"
    compile: bool = False
    gradient_checkpointing: bool = False
    accumulation: int = 1
    """Micro-batches of one update."""
    loop_steps: int = 40
    """Steps of the training loop with its data, log and checkpoints, which go to a temporary folder; 0 for none."""
    profile: bool = False
    """Say where the time of a step goes."""
    compare: bool = False
    """Measure eager, compiled and recomputing updates and other precisions in turn."""

    def run(self) -> Result:
        from jlt.experiments.systems import preset_config

        configs = [
            preset_config(
                name,
                precision=self.precision,
                compile=self.compile,
                gradient_checkpointing=self.gradient_checkpointing,
                accumulation=self.accumulation,
            )
            for name in self.preset
        ]
        from jlt.benchmarks.train import benchmark_train
        from jlt.report.benchmark_table import benchmark_table

        result = benchmark_train(
            configs, self.batch_size, self.steps, self.loop_steps, profile=self.profile, compare=self.compare
        )
        return Result(result, benchmark_table(result))


@dataclass(frozen=True, kw_only=True)
class DataBenchmark(Command):
    """Reading latents as training does, against other ways of reading them in the same run.

    For example:

      jlt benchmark data --count 8000 --batch-size 256
    """

    latents: Path | None = None
    """A store to read (default: a temporary one of random 128x16x16 latents)."""
    count: int = 8000
    """Latents in the temporary store."""
    batch_size: int = 256
    seconds: float = 1.0
    """How long each way of reading is timed in each round."""

    def run(self) -> Result:
        from jlt.benchmarks.data import benchmark_data
        from jlt.report.benchmark_table import data_benchmark_table

        measured = benchmark_data(self.latents, self.count, self.batch_size, self.seconds)
        return Result(measured, data_benchmark_table(measured))


@dataclass(frozen=True, kw_only=True)
class EncodeBenchmark(Command):
    """Encoding, against the autoencoder's bare forward on the same images in the same run.

    For example:

      jlt benchmark encode --autoencoder flux2 --images photos --num 64
    """

    images: str = "digits"
    """What to encode, as in jlt encode; repeated until there are --num."""
    autoencoder: str = "tiny"
    autoencoder_path: str | None = None
    resolution: int = 256
    num: int = 256
    """Images to encode."""
    batch_size: int = 32
    precision: Literal["float32", "bfloat16"] = "float32"
    workers: int | None = None
    """Processes that decode images (default: one per core, none for a bundled set)."""

    def run(self) -> Result:
        from jlt.benchmarks.encode import benchmark_encode
        from jlt.latents.encode_config import EncodeConfig
        from jlt.report.benchmark_table import encode_benchmark_table

        config = EncodeConfig(
            images=self.images,
            autoencoder=self.autoencoder,
            autoencoder_path=self.autoencoder_path,
            resolution=self.resolution,
            batch_size=self.batch_size,
            precision=self.precision,
            workers=self.workers,
        )
        measured = benchmark_encode(config, self.num)
        return Result(measured, encode_benchmark_table(measured))


@dataclass(frozen=True, kw_only=True)
class SampleBenchmark(Command):
    """Sampling with random weights, against a plain loop over the same network in the same run; and decoding.

    The plain loop calls the network once for each branch of guidance at every evaluation.

    For example:

      jlt benchmark sample --preset JLT-B/1 --batch-size 4 --compile
    """

    preset: str = "JLT-B/1"
    batch_size: int = 4
    steps: int = 50
    cfg_scale: float = 2.9
    cfg_interval: tuple[float, float] = (0.1, 1.0)
    precision: Literal["float32", "bfloat16"] = "float32"
    compile: bool = False
    autoencoder_path: str | None = None
    """Weights of FLUX.2's autoencoder (default: random ones of its class and size)."""

    def run(self) -> Result:
        from jlt.benchmarks.sample import benchmark_sample
        from jlt.config import SampleConfig
        from jlt.experiments.systems import preset_config
        from jlt.report.benchmark_table import sample_benchmark_table

        sample = SampleConfig(
            steps=self.steps,
            cfg_scale=self.cfg_scale,
            cfg_interval=self.cfg_interval,
            batch_size=self.batch_size,
            precision=self.precision,
            compile=self.compile,
        )
        measured = benchmark_sample(preset_config(self.preset), sample, self.autoencoder_path)
        return Result(measured, sample_benchmark_table(measured))


@dataclass(frozen=True, kw_only=True)
class GeometryBenchmark(Command):
    """Measuring the geometry of random 128x16x16 latents, against a bare matrix product in the same run.

    For example:

      jlt benchmark geometry --patch-size 1 2 --count 2000
    """

    patch_size: tuple[int, ...] = (1, 2)
    count: int = 2000
    """Latents of the measured pass."""

    def run(self) -> Result:
        from jlt.benchmarks.geometry import benchmark_geometry
        from jlt.report.benchmark_table import geometry_benchmark_table

        if self.count < 2:
            raise UsageError("--count must be 2 or more.")
        measured = benchmark_geometry(self.patch_size, self.count)
        return Result(measured, geometry_benchmark_table(measured))


BENCHMARKS: dict[str, type[Command]] = {
    "train": TrainBenchmark,
    "sample": SampleBenchmark,
    "data": DataBenchmark,
    "encode": EncodeBenchmark,
    "geometry": GeometryBenchmark,
}


@dataclass(frozen=True, kw_only=True)
class Benchmark(Command):
    """Measure speed, utilisation and memory on this machine: of training, of sampling, of reading data, of encoding.

    For example:

      jlt benchmark train --preset JLT-B/1 --batch-size 8 --compile
    """
