"""The mean loss by time, whose inverse is the weight `uncertainty` of eq. 5.

EDM2 (Karras et al. 2024, arXiv 2312.02696, eq. 14) trains a function u(t) on E[loss(t) / exp(u) + u] together with
the network and drops it afterwards. Its minimum is exp(u(t)) = E[loss(t)]; that mean is followed here directly.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

KNOTS = 33
"""Points of a piecewise linear function of logit(t)."""
REACH = 6.0
"""Logits of its first and last point, as a size."""
MEMORY = 0.99
"""Share of the sums that an update keeps."""
PRIOR = 1e-3
"""Weight, in samples, of a loss of 1 at every point, for times that were not drawn yet."""


class LossByTime:
    """A running mean of the losses of the global batches, as sums of losses and of samples at each point."""

    def __init__(self, device: torch.device | str) -> None:
        self.sums = torch.zeros(2, KNOTS, device=device)

    def mean(self, t: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
        """Return the mean loss at times in [0, 1]."""
        losses, samples = self.sums + PRIOR
        return _shares(t) @ (losses / samples)

    def collect(self, t: Float[Tensor, "n"], losses: Float[Tensor, "n"]) -> Float[Tensor, "2 knots"]:
        """Return what some samples add to the sums."""
        shares = _shares(t)
        return torch.stack((losses @ shares, shares.sum(dim=0)))

    def update(self, collected: Float[Tensor, "2 knots"], skip: Bool[Tensor, ""]) -> None:
        """Add what all samples of a batch collected, unless the batch is skipped."""
        self.sums.copy_(torch.where(skip, self.sums, MEMORY * self.sums + collected))


def _shares(t: Float[Tensor, "n"]) -> Float[Tensor, "n knots"]:
    """Return how times are shared between the points on either side; rows add up to one."""
    place = (torch.logit(t).clamp(-REACH, REACH) + REACH) * ((KNOTS - 1) / (2 * REACH))
    return (1 - (place[:, None] - torch.arange(KNOTS, device=t.device)).abs()).clamp_min(0)
