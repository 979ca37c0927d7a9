"""What training draws at random: pure functions of (seed, step, sample), so every process can draw its own share."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from jlt.config import TrainConfig
from jlt.data.order import SampleOrder
from jlt.draws import derive_seed, generator
from jlt.timesteps import times_from_uniform


@dataclass(frozen=True)
class StepDraws:
    """The draws of samples `first` to `first + n` of one step's global batch."""

    indices: np.ndarray
    """Positions in the latent store, int64."""
    flips: np.ndarray
    """Whether each sample is mirrored, bool."""
    t: Float[Tensor, "n"]
    dropped: Bool[Tensor, "n"]
    """Whether each label is replaced by the null class."""
    noise_seeds: list[int]

    def digest(self, previous: str) -> str:
        """Chain these draws onto the digest of all that came before, so that two runs can prove equal draws."""
        fingerprint = hashlib.sha256(previous.encode())
        seeds = np.array(self.noise_seeds, dtype=np.int64)
        for part in (self.indices, self.flips, self.t.numpy(), self.dropped.numpy(), seeds):
            fingerprint.update(np.ascontiguousarray(part).tobytes())
        return fingerprint.hexdigest()


def draw_step(config: TrainConfig, order: SampleOrder, step: int, first: int, count: int) -> StepDraws:
    """Draw samples [first, first + count) of the global batch of a step."""
    share = slice(first, first + count)
    numbers = torch.rand(2, config.batch_size, dtype=torch.float64, generator=generator(config.seed, "step", step))
    position = step * config.batch_size + first
    flips = order.flips(position, count) if config.flips else np.zeros(count, dtype=bool)
    # Uniform numbers are multiples of 2^-53; half of one keeps them off 0, where the inverse distribution is infinite.
    uniform = numbers[0, share] + 2.0**-54
    return StepDraws(
        indices=order.indices(position, count),
        flips=flips,
        t=times_from_uniform(uniform, config.timesteps).float(),
        dropped=numbers[1, share] < config.label_dropout,
        noise_seeds=[derive_seed(config.seed, "noise", step, sample) for sample in range(first, first + count)],
    )
