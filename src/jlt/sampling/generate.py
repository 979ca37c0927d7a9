"""Numbered images: the noise and label of image i are functions of the seed and i, whatever is drawn beside it.

The image itself is then the same up to float rounding, which depends on the shapes of matrix products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from jlt.autoencoders.contract import Autoencoder
from jlt.config import SampleConfig
from jlt.errors import JLTError, UsageError
from jlt.runtime.random_numbers import derive_seed, generator, normal_per_sample
from jlt.sampling.guidance import Denoiser, guided
from jlt.sampling.solvers import Noise, no_noise, solve
from jlt.timesteps import sampling_grid

Seen = Callable[[float, Float[Tensor, "n c h w"]], None]
"""What is told of a time on the path and the clean prediction there."""


@dataclass(frozen=True)
class SampleBatch:
    """Images `start` to `start + n` of a run of sampling."""

    start: int
    latents: Float[Tensor, "n c h w"]
    labels: Int[Tensor, "n"]


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
def sample_latents(
    denoiser: Denoiser,
    shape: tuple[int, int, int],
    num_classes: int,
    config: SampleConfig,
    device: torch.device | str = "cpu",
    noise_scale: float = 1.0,
    numbers: Iterable[range] | None = None,
    guide: Denoiser | None = None,
) -> Iterator[SampleBatch]:
    """Yield latents of the given (C, H, W), a batch for each range of `numbers`; without them all `config.num`.

    JLTError for latents that are not finite.
    """
    for indices in batches_of(config.num, config.batch_size) if numbers is None else numbers:
        labels = labels_for(config.labels, indices, num_classes, config.seed).to(device)
        noise, fresh = noise_of(config.seed, indices, shape, device, noise_scale)
        latents = flow(denoiser, noise, labels, config, fresh, guide)
        if not latents.isfinite().all():
            raise JLTError(f"Some of the images {indices[0]} to {indices[-1]} are not finite: has training diverged?")
        yield SampleBatch(indices[0], latents, labels)


@torch.inference_mode()
def flow(
    denoiser: Denoiser,
    noise: Float[Tensor, "n c h w"],
    labels: Int[Tensor, "n"],
    config: SampleConfig,
    fresh: Noise = no_noise,
    guide: Denoiser | None = None,
    seen: Seen | None = None,
) -> Float[Tensor, "n c h w"]:
    """Carry noise to latents; `seen` is told the clean prediction x^ (eq. 4) of every time that is asked for.

    At a time that two stages of a solver share, the one of the path itself comes last.
    """
    velocity = guided(denoiser, labels, config.cfg_scale, config.cfg_interval, guide)

    def seeing(z: Float[Tensor, "n c h w"], t: float) -> Float[Tensor, "n c h w"]:
        v = velocity(z, t)
        if seen is not None:
            seen(t, z + (1 - t) * v)
        return v

    with torch.autocast(noise.device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
        return solve(config.solver, seeing, noise, sampling_grid(config), fresh)


def noise_of(
    seed: int, indices: Sequence[int], shape: tuple[int, int, int], device: torch.device | str, scale: float
) -> tuple[Float[Tensor, "n c h w"], Noise]:
    """Return the noise that numbered images begin with, and the source of what a stochastic solver adds at a step."""

    def draw(purpose: str, *step: int) -> Float[Tensor, "n c h w"]:
        return scale * normal_per_sample([derive_seed(seed, purpose, index, *step) for index in indices], shape, device)

    return draw("image"), lambda step: draw("image step", step)


@torch.inference_mode()
def decode_to_uint8(autoencoder: Autoencoder, latents: Float[Tensor, "n c h w"]) -> UInt8[Tensor, "n hh ww 3"]:
    """Decode latents to images with levels 0 to 255, rounded to the nearest."""
    images = autoencoder.decode(latents)
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
