"""Numbered latents: the noise and label of image i are functions of the seed and i, whatever else is drawn.

The image itself is then the same up to float rounding, which depends on the shapes of matrix products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from jlt.autoencoders.contract import Autoencoder
from jlt.config import LatentShape, SampleConfig
from jlt.errors import JLTError, UsageError
from jlt.prediction import clean_from_velocity
from jlt.runtime.random_numbers import derive_seed, generator, normal_per_sample
from jlt.sampling.guidance import Denoiser, guided
from jlt.sampling.solvers import Noise, no_noise, solve
from jlt.timesteps import sampling_grid

OnClean = Callable[[float, Float[Tensor, "n c h w"]], None]
"""Receives a time of the path and the clean prediction x^ there."""


@dataclass(frozen=True)
class Start:
    """What numbered images begin with: their noise, their labels, and what a stochastic solver adds at each step."""

    noise: Float[Tensor, "n c h w"]
    labels: Int[Tensor, "n"]
    fresh: Noise = no_noise


@dataclass(frozen=True)
class LatentBatch:
    """Latents of the images `start` to `start + n`, with the labels they were drawn for."""

    start: int
    latents: Float[Tensor, "n c h w"]
    labels: Int[Tensor, "n"]


@dataclass(frozen=True)
class LatentSampler:
    """Draws numbered latents of one shape from a denoiser, and from a guide where there is one."""

    denoiser: Denoiser
    shape: LatentShape
    config: SampleConfig
    device: torch.device | str = "cpu"
    noise_scale: float = 1.0
    guide: Denoiser | None = None

    def batches(self, numbers: Iterable[range] | None = None) -> Iterator[LatentBatch]:
        """Yield a batch for each range of `numbers`; without them all `config.num`, in order.

        JLTError for latents that are not finite.
        """
        for indices in batches_of(self.config.num, self.config.batch_size) if numbers is None else numbers:
            start = self.start(indices)
            latents = self.flow(start)
            if not latents.isfinite().all():
                raise JLTError(
                    f"Some of the images {indices[0]} to {indices[-1]} are not finite: has training diverged?"
                )
            yield LatentBatch(indices[0], latents, start.labels)

    @torch.inference_mode()
    def start(self, indices: Sequence[int]) -> Start:
        """Return what numbered images begin with."""
        shape, seed = (self.shape.channels, self.shape.height, self.shape.width), self.config.seed

        def draw(purpose: str, *step: int) -> Float[Tensor, "n c h w"]:
            seeds = [derive_seed(seed, purpose, index, *step) for index in indices]
            return self.noise_scale * normal_per_sample(seeds, shape, self.device)

        labels = labels_for(self.config.labels, indices, self.shape.num_classes, seed).to(self.device)
        return Start(draw("image"), labels, lambda step: draw("image step", step))

    @torch.inference_mode()
    def flow(self, start: Start, on_clean: OnClean | None = None) -> Float[Tensor, "n c h w"]:
        """Carry noise to latents; `on_clean` receives x^ (eq. 4) at every time at which the velocity is evaluated.

        Of two stages of a solver at one time, the one on the path itself comes last.
        """
        config = self.config
        velocity = guided(self.denoiser, start.labels, config.cfg_scale, config.cfg_interval, self.guide)

        def observed(z: Float[Tensor, "n c h w"], t: float) -> Float[Tensor, "n c h w"]:
            v = velocity(z, t)
            if on_clean is not None:
                on_clean(t, clean_from_velocity(v, z, t))
            return v

        with torch.autocast(start.noise.device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
            return solve(config.solver, observed, start.noise, sampling_grid(config), start.fresh)


def labels_for(rule: str, indices: Sequence[int], num_classes: int, seed: int) -> Int[Tensor, "n"]:
    """Return the labels of numbered images: `equal` counts per class, `random`, or a list that repeats."""
    if rule == "equal":
        return torch.tensor([index % num_classes for index in indices])
    if rule == "random":
        draws = [torch.randint(num_classes, (), generator=generator(seed, "label", index)) for index in indices]
        return torch.stack(draws)
    try:
        labels = [int(part) for part in rule.split(",")]
    except ValueError:
        raise UsageError(f"labels must be equal, random or a list such as 3,7,7, not {rule!r}.") from None
    outside = [label for label in labels if not 0 <= label < num_classes]
    if outside:
        raise JLTError(f"There is no class {outside[0]}: the network knows the classes 0 to {num_classes - 1}.")
    return torch.tensor([labels[index % len(labels)] for index in indices])


def batches_of(num: int, batch_size: int) -> list[range]:
    """Return the numbers 0 to num - 1 in consecutive ranges of batch_size; the last may be shorter."""
    return [range(start, min(start + batch_size, num)) for start in range(0, num, batch_size)]


@torch.inference_mode()
def decode_to_uint8(autoencoder: Autoencoder, latents: Float[Tensor, "n c h w"]) -> UInt8[Tensor, "n hh ww 3"]:
    """Decode latents to images with levels 0 to 255, rounded to the nearest."""
    images = autoencoder.decode(latents)
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
