"""The linear path from noise to data (eq. 1-2).

Symbols, here and everywhere: t in [0, 1] is time, 0 noise and 1 data; x the clean latent; eps the noise, already
multiplied by its scale s; z the noisy latent; v = dz/dt the velocity.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

Time = Float[Tensor, "batch"] | float
"""A time for each element of a batch, or one for all."""


@dataclass(frozen=True)
class PathSample:
    """A point of the path with all that belongs to it; every tensor has the batch first."""

    x: Float[Tensor, "*shape"]
    eps: Float[Tensor, "*shape"]
    t: Float[Tensor, "batch"]
    z: Float[Tensor, "*shape"]

    @property
    def v(self) -> Float[Tensor, "*shape"]:
        """Eq. 2."""
        return self.x - self.eps


def expand_time(t: Time, like: Float[Tensor, "batch *rest"]) -> Float[Tensor, "batch *ones"] | float:
    """Return t with trailing axes of one, so that it broadcasts against `like`; a number as it is."""
    return t.reshape(-1, *[1] * (like.ndim - 1)) if isinstance(t, Tensor) else t


def interpolate(
    x: Float[Tensor, "batch *rest"], eps: Float[Tensor, "batch *rest"], t: Float[Tensor, "batch"]
) -> PathSample:
    """Eq. 1: z = t x + (1 - t) eps, with t in [0, 1] for each element of the batch."""
    time = expand_time(t, x)
    return PathSample(x=x, eps=eps, t=t, z=time * x + (1 - time) * eps)
