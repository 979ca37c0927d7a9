"""The command that generates images: sample."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from jlt.cli.command import Command, Flat, Result
from jlt.cli.options import AutoencoderPath, CheckpointPath
from jlt.config import SampleConfig, SampleFormat
from jlt.errors import UsageError
from jlt.runtime.processes import join_group


@dataclass(frozen=True, kw_only=True)
class Sample(Command):
    """Generate images from a checkpoint.

    Run the same command again to resume. Several processes share the work:
      torchrun --nproc-per-node 8 -m -- jlt sample ...

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
    """Draw one picture of interpolations from the noise of image 0 to that of image 1, from 2 to 3, and so on."""
    compare: Path | None = None
    """Another run or checkpoint: draw one picture of both, from the same noise and labels."""
    sample: Annotated[SampleConfig, Flat] = field(default_factory=SampleConfig)
    autoencoder_path: AutoencoderPath = None

    def run(self) -> Result:
        if self.steps_strip and self.interpolate:
            raise UsageError("--steps-strip and --interpolate cannot be combined.")
        picture = self.steps_strip or self.interpolate or self.compare is not None
        if picture and self.format != "png":
            raise UsageError("--steps-strip, --interpolate and --compare draw one PNG: leave out --format.")
        from jlt.runtime.environment import default_device
        from jlt.sampling.sampler import open_sampler
        from jlt.sampling.save import save_picture, save_samples
        from jlt.training.checkpoint import open_checkpoint

        device = default_device()
        opened = [open_checkpoint(path) for path in (self.checkpoint, self.compare) if path is not None]
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
