"""Commands that generate images and measure them: sample, fetch, reference, evaluate, sweep, price."""

from __future__ import annotations

from dataclasses import InitVar, dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from jlt.cli.command import (
    AutoencoderPath,
    CheckpointPath,
    Command,
    FeatureOptions,
    Flat,
    MetricOptions,
    Positional,
    Result,
    command_line,
)
from jlt.config import Metric, NamedSampler, SampleConfig, SampleFormat, Solver
from jlt.errors import UsageError
from jlt.report.page import write_report
from jlt.report.sweep_page import sweep_table
from jlt.report.terminal import evaluation_table
from jlt.results.files import result_json
from jlt.runtime.processes import join_group


@dataclass(frozen=True, kw_only=True)
class Sample(Command):
    """Generate images from a checkpoint.

    Run the same command again to resume. Several processes share the work:
      jlt --processes 8 sample ...

    For example:
      jlt sample --checkpoint run --out samples --num 64 --format grid
    """

    checkpoint: CheckpointPath
    out: Path
    """Folder of the images."""
    format: SampleFormat = "png"
    """png: numbered files; npz: one array, as ADM's evaluator reads it; grid: one picture of all images."""
    steps_strip: bool = False
    """Draw one picture of the predicted clean image (x^) at times from noise to data."""
    interpolate: bool = False
    """Draw interpolations from the noise of image 0 to that of image 1, of the class of image 0, then from 2 to 3."""
    compare: Path | None = None
    """Another one like --checkpoint: draw one picture of both, from the same noise and labels."""
    sample: Annotated[SampleConfig, Flat] = field(default_factory=SampleConfig)
    autoencoder_path: AutoencoderPath = None

    def run(self) -> Result:
        if self.steps_strip and self.interpolate:
            raise UsageError("--steps-strip and --interpolate cannot be combined.")
        picture = self.steps_strip or self.interpolate or self.compare is not None
        if picture and self.format != "png":
            raise UsageError("--steps-strip, --interpolate and --compare draw one PNG: leave out --format.")
        from jlt.interop.sources import open_source
        from jlt.runtime.environment import default_device
        from jlt.sampling.sampler import open_sampler
        from jlt.sampling.save import save_picture, save_samples

        device = default_device()
        opened = [open_source(path) for path in (self.checkpoint, self.compare) if path is not None]
        samplers = [open_sampler(checkpoint, self.sample, device, self.autoencoder_path) for checkpoint in opened]
        protocols = [sampler.protocol() for sampler in samplers]
        with join_group(device) as group:
            if not picture:
                written = save_samples(samplers[0], self.out, self.format, group)
                data = {"written": str(written), "protocol": protocols[0]}
                return Result(data, f"{self.sample.num} images: {written}")
            kind = "strip" if self.steps_strip else "interpolation" if self.interpolate else "pairs"
            names = [f"{checkpoint.run.name}, step {checkpoint.step:,}" for checkpoint in opened]
            written = group.on_rank0(lambda: save_picture(samplers, self.out, kind, names))
        return Result({"written": str(written), "protocols": protocols}, f"Open {written}")


@dataclass(frozen=True, kw_only=True)
class Fetch(Command):
    """Download the Inception weights on which FID is defined.

    They are stored in $JLT_CACHE, or in ~/.cache/jlt.

    For example:
      jlt fetch inception
    """

    weights: Annotated[str, Positional, tyro.conf.arg(metavar="NAME")]
    """Name of the weights: inception."""

    def run(self) -> Result:
        from jlt.evaluation.fetch import fetch

        path = fetch(self.weights)
        return Result({"path": str(path)}, f"Fetched: {path}")


@dataclass(frozen=True, kw_only=True)
class Reference(Command):
    """Compute the statistics of real images for evaluations.

    Several processes share the work:
      jlt --processes 8 reference ...

    For example:
      jlt reference --images digits --resolution 32 --out digits.npz
    """

    images: str
    """Images: a folder of class folders, of parquet or of tar files, or the bundled set digits."""
    out: Path
    """Statistics to write, an .npz; a .json of the same name describes them."""
    resolution: int = 256
    """Side in pixels to which the images are cropped and resized, that of the samples."""
    split: str | None = None
    """Split of a folder that holds several, such as train. Default: the only one."""
    features: Annotated[FeatureOptions, Flat] = field(default_factory=FeatureOptions)

    def run(self) -> Result:
        from jlt.experiments.make_reference import make_reference
        from jlt.images.registry import open_source
        from jlt.runtime.environment import default_device

        device = default_device()
        source = open_source(self.images, self.split)
        extractor = self.features.load(device, lambda: source)
        identity = make_reference(source, extractor, self.resolution, self.out, device)
        return Result(identity, f"Statistics of {identity['count']:,} images: {self.out}")


@dataclass(frozen=True, kw_only=True)
class Evaluate(Command):
    """Compare generated images with real images.

    Run the same command again to resume. Several processes share the work of --checkpoint:
      jlt --processes 8 evaluate ...

    For example:
      jlt evaluate --checkpoint run --num 1000
    """

    checkpoint: Path | None = None
    """Run, checkpoint, exported folder, or hub:user/name; this or --samples is required."""
    samples: Path | None = None
    """Generated images instead of a checkpoint: a folder, or an .npz with `arr_0`."""
    metrics: Annotated[MetricOptions, Flat] = field(default_factory=MetricOptions)
    sample: Annotated[SampleConfig, Flat] = field(default_factory=lambda: SampleConfig(num=1000))
    autoencoder_path: AutoencoderPath = None

    def run(self) -> Result:
        if (self.checkpoint is None) == (self.samples is None):
            raise UsageError("Evaluation needs either --checkpoint or --samples.")
        if self.samples is not None and not self.metrics.reference:
            raise UsageError(
                "Images on disk do not record which images they are like: name real ones with --reference."
            )
        from jlt.experiments.checkpoint_evaluation import evaluate_checkpoint, evaluate_files, images_of
        from jlt.interop.sources import open_source
        from jlt.runtime.environment import default_device

        device, samples, reference = default_device(), self.samples, self.metrics.reference
        checkpoint = open_source(self.checkpoint) if self.checkpoint is not None else None
        real_images = reference or images_of(checkpoint.latents if checkpoint else {})
        extractor = self.metrics.load(device, lambda: real_images)
        with join_group(device) as group:
            if samples is not None:
                result = group.on_rank0(lambda: evaluate_files(samples, reference, extractor))
            elif checkpoint is not None:
                result = evaluate_checkpoint(
                    checkpoint, real_images, extractor, self.sample, self.autoencoder_path, group
                )
        return Result(result_json(result), evaluation_table(result))


@dataclass(frozen=True)
class FixedSampling(SampleConfig):
    """The settings of the sampler that a sweep does not vary."""

    cfg_scale: tyro.conf.Suppress[tyro.conf.Fixed[float]] = 1.0
    cfg_interval: tyro.conf.Suppress[tyro.conf.Fixed[tuple[float, float]]] = (0.0, 1.0)
    ema: tyro.conf.Suppress[tyro.conf.Fixed[str]] = ""


@dataclass(frozen=True, kw_only=True)
class Sweep(Command):
    """Search for the best guidance and EMA of a checkpoint.

    Few images of each setting find the best region; more images from the same noise rank the settings in it. Images of
    another seed, which no choice depends on, measure the result. Run the same command again to resume. Several
    processes share the work:
      jlt --processes 8 sweep ...

    For example:
      jlt sweep --checkpoint run --cfg-scale 1 1.5 2 3 --cfg-interval 0,1 0.1,1 --ema 0.999 none
    """

    checkpoint: CheckpointPath
    out: Path | None = None
    """Folder of the results. Default: RUN/sweeps/step_NNNNNNN."""
    cfg_scale: tuple[float, ...] = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0)
    """Guidance scales; 1 is unguided."""
    cfg_interval: tuple[str, ...] = ("0,1",)
    """Guidance intervals, each as low,high."""
    ema: tuple[str, ...] = ()
    """Weights: EMA decays (0.9999), lengths to rebuild (sigma_rel=0.07), or none. Default: all stored averages."""
    coarse_num: int | None = None
    """Images per setting in the first stage. Default: num / 20, but at least twice the dimension of the features."""
    refine: int = 1
    """Rounds that also try the guidance scales halfway to the neighbours of the best."""
    confirm: int = 2
    """Largest number of settings to confirm: the best, and those that do not differ from it significantly."""
    confirm_seed: int | None = None
    """Seed of the images that confirm. Default: seed + 1."""
    metric: Metric = "frechet_distance"
    """Metric to optimise; only frechet_distance has an error estimate."""
    metrics: Annotated[MetricOptions, Flat] = field(default_factory=MetricOptions)
    sample: Annotated[FixedSampling, Flat] = field(default_factory=lambda: FixedSampling(num=1000))
    autoencoder_path: AutoencoderPath = None

    def run(self) -> Result:
        from jlt.experiments.checkpoint_evaluation import images_of
        from jlt.experiments.measured_settings import Subject
        from jlt.experiments.search import SweepConfig, default_coarse_num
        from jlt.experiments.sweep import resolve_ema, sweep
        from jlt.interop.sources import open_source
        from jlt.runtime.environment import default_device

        intervals = tuple(map(parse_interval, self.cfg_interval))
        device, checkpoint = default_device(), open_source(self.checkpoint)
        extractor = self.metrics.load(device, lambda: self.metrics.reference or images_of(checkpoint.latents))
        sample = SampleConfig(**vars(self.sample))
        config = SweepConfig(
            sample=sample,
            cfg_scale=self.cfg_scale,
            cfg_interval=intervals,
            ema=resolve_ema(checkpoint, self.ema),
            coarse_num=self.coarse_num or default_coarse_num(sample, extractor.dimension),
            confirm_seed=sample.seed + 1 if self.confirm_seed is None else self.confirm_seed,
            refine=self.refine,
            confirm=self.confirm,
            metric=self.metric,
        )
        with join_group(device) as group:
            subject = Subject(
                checkpoint, self.metrics.reference, extractor, self.metrics.features_path, self.autoencoder_path
            )
            out, result = sweep(config, subject, self.out, device, group, command_line())
            report = group.on_rank0(lambda: write_report(out))
        return Result(
            {**result_json(result), "folder": str(out), "report": str(report)},
            f"{sweep_table(result)}\n\nOpen {report}",
        )


@dataclass(frozen=True)
class PricedSampling(SampleConfig):
    """The settings of the sampler that a price does not vary."""

    solver: tyro.conf.Suppress[tyro.conf.Fixed[Solver]] = "heun"
    steps: tyro.conf.Suppress[tyro.conf.Fixed[int]] = 50
    shift: tyro.conf.Suppress[tyro.conf.Fixed[float]] = 1.0
    grid: tyro.conf.Suppress[tyro.conf.Fixed[tuple[float, ...]]] = ()
    sampler: InitVar[tyro.conf.Suppress[tyro.conf.Fixed[NamedSampler | None]]] = None
    cfg_interval: tyro.conf.Suppress[tyro.conf.Fixed[tuple[float, float]]] = (0.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class Price(Command):
    """Find the cheapest sampler that is as good as the published one.

    50-step Heun is measured first, then every cheaper setting from the same noise. Images of another seed measure the
    choice. Run the same command again to resume. Several processes share the work:
      jlt --processes 8 price ...

    For example:
      jlt price --checkpoint run --cfg-scale 2 --solver heun dpmpp_2m --steps 6 8 10 12 16 20
    """

    checkpoint: CheckpointPath
    out: Path | None = None
    """Folder of the results. Default: RUN/prices/step_NNNNNNN."""
    solver: tuple[Solver, ...] = ("euler", "heun", "dpmpp_2m")
    """Solvers."""
    steps: tuple[int, ...] = (5, 6, 8, 10, 12, 14, 16, 20)
    """Numbers of steps."""
    shift: tuple[float, ...] = (1.0,)
    """Shifts a of the times of the steps, t -> t / (t + a (1 - t)); 1 is uniform."""
    cfg_interval: tuple[str, ...] = ("0,1",)
    """Guidance intervals, each as low,high. The published sampler is measured with the first one."""
    max_evaluations: int = 40
    """Largest number of evaluations of the network per image, both branches of guidance counted."""
    confirm_seed: int | None = None
    """Seed of the images that confirm. Default: seed + 1."""
    metrics: Annotated[MetricOptions, Flat] = field(default_factory=MetricOptions)
    sample: Annotated[PricedSampling, Flat] = field(default_factory=lambda: PricedSampling(num=1000))
    autoencoder_path: AutoencoderPath = None

    def run(self) -> Result:
        from jlt.experiments.checkpoint_evaluation import images_of
        from jlt.experiments.measured_settings import Subject
        from jlt.experiments.price import PriceConfig, price
        from jlt.interop.sources import open_source
        from jlt.report.price_text import price_table
        from jlt.runtime.environment import default_device

        sample = SampleConfig(**vars(self.sample))
        config = PriceConfig(
            sample=sample,
            solver=self.solver,
            steps=self.steps,
            shift=self.shift,
            cfg_interval=tuple(map(parse_interval, self.cfg_interval)),
            max_evaluations=self.max_evaluations,
            confirm_seed=sample.seed + 1 if self.confirm_seed is None else self.confirm_seed,
        )
        device, checkpoint = default_device(), open_source(self.checkpoint)
        metrics = self.metrics
        extractor = metrics.load(device, lambda: metrics.reference or images_of(checkpoint.latents))
        subject = Subject(checkpoint, metrics.reference, extractor, metrics.features_path, self.autoencoder_path)
        with join_group(device) as group:
            out, result = price(config, subject, self.out, device, group, command_line())
            report = group.on_rank0(lambda: write_report(out))
        return Result(
            {**result_json(result), "folder": str(out), "report": str(report)},
            f"{price_table(result)}\n\nOpen {report}",
        )


def parse_interval(text: str) -> tuple[float, float]:
    """Return (0.1, 1.0) for `0.1,1`."""
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        raise UsageError(f"--cfg-interval takes pairs low,high such as 0.1,1, not {text!r}.") from None
    return low, high
