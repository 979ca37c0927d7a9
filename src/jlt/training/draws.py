"""The random draws of training: functions of seed and step. Every process draws the whole batch and keeps its share."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from jlt.config import TrainConfig
from jlt.latents.loader import SampleOrder
from jlt.runtime.random_numbers import derive_seed, generator
from jlt.timesteps import times_from_uniform


@dataclass(frozen=True)
class StepDraws:
    """The draws of some samples of one step's global batch."""

    indices: np.ndarray
    """Positions in the latent store, int64."""
    flips: np.ndarray
    """Whether each sample is mirrored, bool."""
    t: Float[Tensor, "n"]
    dropped: Bool[Tensor, "n"]
    """Whether each label is replaced by the null class."""
    noise_seeds: list[int]
    digest: str = ""
    """Hash over all draws of the run up to this step, so that two runs can prove equal draws."""

    def part(self, of: slice) -> StepDraws:
        """Return the draws of some of these samples."""
        parts = (self.indices[of], self.flips[of], self.t[of], self.dropped[of], self.noise_seeds[of])
        return StepDraws(*parts, self.digest)


def draw_steps(config: TrainConfig, order: SampleOrder, steps: range, digest: str) -> Iterator[StepDraws]:
    """Yield the draws of global batches, chained onto the digest of the draws before."""
    for step in steps:
        draws = draw_step(config, order, step)
        fingerprint = hashlib.sha256(digest.encode())
        seeds = np.array(draws.noise_seeds, dtype=np.int64)
        for part in (draws.indices, draws.flips, draws.t.numpy(), draws.dropped.numpy(), seeds):
            fingerprint.update(part.tobytes())
        digest = fingerprint.hexdigest()
        yield replace(draws, digest=digest)


def draw_step(config: TrainConfig, order: SampleOrder, step: int) -> StepDraws:
    """Draw the global batch of a step."""
    count = config.batch_size
    numbers = torch.rand(2, count, dtype=torch.float64, generator=generator(config.seed, "step", step))
    # Uniform numbers are multiples of 2^-53; half of one keeps them off 0, where the inverse distribution is infinite.
    uniform = numbers[0] + 2.0**-54
    return StepDraws(
        indices=order.indices(step * count, count),
        flips=order.flips(step * count, count) if config.flips else np.zeros(count, dtype=bool),
        t=times_from_uniform(uniform, config.timesteps).float(),
        dropped=numbers[1] < config.label_dropout,
        noise_seeds=[derive_seed(config.seed, "noise", step, sample) for sample in range(count)],
    )
