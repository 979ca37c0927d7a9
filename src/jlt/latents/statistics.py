"""Sums over stored latents, the moments that follow from them, and the check that latents are normalised."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from jlt.errors import JLTError

STD_RANGE = (0.5, 1.5)
"""Standard deviation of all values of normalised latents; FLUX.2's is near 1.77 without normalisation."""
MAX_MEAN = 1.0
"""Largest absolute mean of all values of normalised latents."""
MAX_VALUE = 100.0
"""Largest absolute value of normalised latents; a Gaussian's would stay below 10."""


@dataclass(frozen=True)
class LatentSums:
    """Float64 sums of values and squares per channel over `values` positions, and the extremes of all values."""

    values: int
    total: tuple[float, ...]
    squares: tuple[float, ...]
    minimum: float
    maximum: float

    @classmethod
    def zero(cls, channels: int) -> LatentSums:
        """Return the sums over no latents."""
        return cls(0, (0.0,) * channels, (0.0,) * channels, np.inf, -np.inf)

    def add(self, latents: Float[np.ndarray, "n c h w"]) -> LatentSums:
        """Return the sums with a batch of latents added."""
        if not len(latents):
            return self
        wide = latents.astype(np.float64)
        total, squares = (tuple(array.sum((0, 2, 3)).tolist()) for array in (wide, np.square(wide)))
        positions = latents.size // latents.shape[1]
        return self.merge(LatentSums(positions, total, squares, float(wide.min()), float(wide.max())))

    def merge(self, other: LatentSums) -> LatentSums:
        """Return the sums over both; another order of merging may change the last bit."""
        return LatentSums(
            self.values + other.values,
            tuple(map(operator.add, self.total, other.total)),
            tuple(map(operator.add, self.squares, other.squares)),
            min(self.minimum, other.minimum),
            max(self.maximum, other.maximum),
        )

    def moments(self) -> dict[str, Any]:
        """Return moments and extremes as fields of a store's manifest; `mean` and `std` are over all values."""
        channel_mean = np.array(self.total) / self.values
        channel_std = np.sqrt(np.maximum(np.array(self.squares) / self.values - channel_mean**2, 0))
        mean = float(channel_mean.mean())
        return {
            "mean": mean,
            "std": math.sqrt(max(float(np.mean(self.squares)) / self.values - mean**2, 0.0)),
            "minimum": self.minimum,
            "maximum": self.maximum,
            "channel_mean": tuple(channel_mean.tolist()),
            "channel_std": tuple(channel_std.tolist()),
        }

    def require_normalised(self, autoencoder: str) -> None:
        """Raise a JLTError with the measured values if noise of unit variance does not suit the latents' scale."""
        low, high = STD_RANGE
        largest, moments = max(-self.minimum, self.maximum), self.moments()
        mean, std, stds = moments["mean"], moments["std"], moments["channel_std"]
        if low <= std <= high and abs(mean) <= MAX_MEAN and largest <= MAX_VALUE:
            return
        raise JLTError(
            f"The latents of {autoencoder!r} are not normalised. Their standard deviation is {std:.3g} "
            f"(per channel {min(stds):.3g} to {max(stds):.3g}; expected {low} to {high}), their mean {mean:.3g} "
            f"(expected within {MAX_MEAN:g}), their values go from {self.minimum:.3g} to {self.maximum:.3g} "
            f"(expected within {MAX_VALUE:g}). Check the autoencoder's weights, statistics and scaling factor."
        )
