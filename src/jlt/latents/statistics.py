"""Sums over stored latents, from which their moments follow, and the check that these are of a sane scale."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from jlt.errors import JLTError

STD_RANGE = (0.5, 1.5)
"""Standard deviation of all values between which latents count as normalised; FLUX.2's are near 1.77 without it."""
MAX_MEAN = 1.0
"""Mean of all values, in absolute terms, up to which latents count as normalised."""
MAX_VALUE = 100.0
"""Largest absolute value of normalised latents; a Gaussian's would stay below 10."""


@dataclass(frozen=True)
class LatentSums:
    """Float64 sums of values and squares per channel over `values` positions, and the extremes; mergeable."""

    values: int
    total: np.ndarray
    squares: np.ndarray
    minimum: float
    maximum: float

    @classmethod
    def zero(cls, channels: int) -> LatentSums:
        """Return the sums of nothing."""
        return cls(0, np.zeros(channels), np.zeros(channels), np.inf, -np.inf)

    def add(self, latents: Float[np.ndarray, "n c h w"]) -> LatentSums:
        """Return the sums with a batch of latents added."""
        if not len(latents):
            return self
        wide = latents.astype(np.float64)
        return self.merge(
            LatentSums(
                latents.size // latents.shape[1],
                wide.sum((0, 2, 3)),
                np.square(wide).sum((0, 2, 3)),
                float(wide.min()),
                float(wide.max()),
            )
        )

    def merge(self, other: LatentSums) -> LatentSums:
        """Return the sums over both; in another order the last bit may differ."""
        return LatentSums(
            self.values + other.values,
            self.total + other.total,
            self.squares + other.squares,
            min(self.minimum, other.minimum),
            max(self.maximum, other.maximum),
        )

    def to_json(self) -> dict[str, Any]:
        """Return JSON values from which `from_json` makes the same sums, bit for bit."""
        return {**asdict(self), "total": self.total.tolist(), "squares": self.squares.tolist()}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> LatentSums:
        """Return the sums that `to_json` wrote."""
        return cls(**{**fields, "total": np.array(fields["total"]), "squares": np.array(fields["squares"])})

    @property
    def channel_mean(self) -> np.ndarray:
        """Mean of each channel."""
        return self.total / self.values

    @property
    def channel_std(self) -> np.ndarray:
        """Standard deviation of each channel."""
        return np.sqrt(np.maximum(self.squares / self.values - self.channel_mean**2, 0))

    @property
    def mean(self) -> float:
        """Mean of all values."""
        return float(self.channel_mean.mean())

    @property
    def std(self) -> float:
        """Standard deviation of all values, about the mean of all."""
        return float(np.sqrt(max(np.mean(self.squares) / self.values - self.mean**2, 0)))

    def moments(self) -> dict[str, Any]:
        """Return moments and extremes by the names that a store's manifest has for them."""
        return {
            "mean": self.mean,
            "std": self.std,
            "minimum": self.minimum,
            "maximum": self.maximum,
            "channel_mean": tuple(self.channel_mean.tolist()),
            "channel_std": tuple(self.channel_std.tolist()),
        }

    def require_normalised(self, autoencoder: str) -> None:
        """Refuse latents of a scale that noise of unit variance was not meant for (DESIGN 7.10), with the figures."""
        low, high = STD_RANGE
        largest = max(-self.minimum, self.maximum)
        if low <= self.std <= high and abs(self.mean) <= MAX_MEAN and largest <= MAX_VALUE:
            return
        stds = self.channel_std
        raise JLTError(
            f"The latents of {autoencoder!r} are not normalised: their standard deviation is {self.std:.3g} "
            f"(channels from {stds.min():.3g} to {stds.max():.3g}), their mean {self.mean:.3g}, their values from "
            f"{self.minimum:.3g} to {self.maximum:.3g}; a deviation of {low} to {high}, a mean within {MAX_MEAN:g} and "
            f"values within {MAX_VALUE:g} are expected. Check the autoencoder's weights, statistics and scaling factor."
        )
