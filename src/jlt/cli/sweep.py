"""The verb `jlt sweep`. Nothing heavy is imported before it runs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from jlt.cli.command import Command, Result, command_line
from jlt.config import Metric, SampleConfig
from jlt.errors import UsageError

WHOLE = "0,1"


@dataclass(frozen=True)
class FixedSampling(SampleConfig):
    """The settings of sampling that are no axes."""

    cfg_scale: tyro.conf.Suppress[tyro.conf.Fixed[float]] = 1.0
    cfg_interval: tyro.conf.Suppress[tyro.conf.Fixed[tuple[float, float]]] = (0.0, 1.0)
    ema: tyro.conf.Suppress[tyro.conf.Fixed[str]] = ""


@dataclass(frozen=True, kw_only=True)
class Sweep(Command):
    """Find the guidance and the average of the weights that a checkpoint is best sampled with.

    Few images of each setting find the region, more of the same noise the best; images of another seed, which took no
    part in the choice, say how good it is. The same words continue what was interrupted, and several processes share
    the work: torchrun --nproc-per-node 8 -m -- jlt sweep ...

    For example:

      jlt sweep --checkpoint run --reference digits --cfg-scale 1 1.5 2 3 --cfg-interval 0,1 0.1,1 --ema 0.999 none
    """

    checkpoint: Path
    """Run folder (its newest checkpoint) or checkpoint folder."""
    out: Path | None = None
    """Folder of the sweep (default: RUN/sweeps/step_NNNNNNN)."""
    reference: str = "digits"
    """An .npz of statistics, a folder of class folders, or the name of a bundled set."""
    features: str = "digits"
    """Feature extractor: digits, inception or dinov2."""
    features_path: Path | None = None
    """Where its weights are, if not in the usual place."""
    cfg_scale: tuple[float, ...] = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0)
    """Guidance scales; 1 is unguided."""
    cfg_interval: tuple[str, ...] = (WHOLE,)
    """Times low,high between which guidance acts."""
    ema: tuple[str, ...] = ()
    """Averages: decays (0.9999), lengths to rebuild (sigma_rel=0.07), none (default: all that are stored)."""
    coarse_num: int | None = None
    """Images of each setting in the first stage (default: num / 20, at least 2 for each dimension of the features)."""
    confirm_seed: int | None = None
    """Seed of the images that confirm (default: seed + 1)."""
    refine: int = 1
    """Rounds that try the guidance scales halfway to the neighbours of the best."""
    confirm: int = 2
    """Most settings that are confirmed: the best, and those that cannot be told from it."""
    metric: Metric = "frechet_distance"
    """What is best; only the Frechet distance has an error by which settings are told apart."""
    config: Annotated[FixedSampling, tyro.conf.arg(name="")] = field(default_factory=lambda: FixedSampling(num=1000))
    autoencoder_path: str | None = None
    """Where the autoencoder of the latents lies, if not where its name says."""

    def run(self) -> Result:
        from jlt.evaluation.extractors import load_extractor
        from jlt.experiments.search import SweepConfig, default_coarse_num
        from jlt.experiments.sweep import resolve_ema, sweep
        from jlt.report.page import write_report
        from jlt.report.sweep_page import sweep_table
        from jlt.results import result_json
        from jlt.runtime.environment import default_device
        from jlt.runtime.processes import join_group
        from jlt.training.checkpoint import open_checkpoint

        intervals = tuple(map(parse_interval, self.cfg_interval))
        device, checkpoint = default_device(), open_checkpoint(self.checkpoint)
        extractor = load_extractor(self.features, device, self.features_path)
        sample = SampleConfig(
            **{entry.name: getattr(self.config, entry.name) for entry in dataclasses.fields(self.config)}
        )
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
            out, result = sweep(
                config,
                checkpoint.folder,
                self.reference,
                extractor,
                self.out,
                device,
                group,
                self.autoencoder_path,
                command_line(),
                self.features_path,
            )
            report = group.on_rank0(lambda: write_report(out))
        data = {**result_json(result), "folder": str(out), "report": str(report)}
        return Result(data, f"{sweep_table(result)}\n\nOpen {report}")


def parse_interval(words: str) -> tuple[float, float]:
    """Return (0.1, 1.0) for `0.1,1`."""
    try:
        low, high = map(float, words.split(","))
    except ValueError:
        raise UsageError(f"--cfg-interval takes pairs low,high such as 0.1,1, not {words!r}.") from None
    return low, high
