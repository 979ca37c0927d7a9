"""Exponential moving averages of the weights, in float32 beside the network."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class EMA:
    """One average per decay: average <- decay * average + (1 - decay) * weights after every update."""

    def __init__(self, network: nn.Module, decays: tuple[float, ...]) -> None:
        self._weights = dict(network.named_parameters())
        self.averages = {
            decay: {name: weight.detach().float().clone() for name, weight in self._weights.items()} for decay in decays
        }

    @torch.no_grad()
    def update(self) -> None:
        """Move every average towards the network's current weights."""
        weights = [weight.detach() for weight in self._weights.values()]
        for decay, average in self.averages.items():
            torch._foreach_lerp_(list(average.values()), weights, 1 - decay)

    @torch.no_grad()
    def load(self, decay: float, values: Mapping[str, Tensor]) -> None:
        """Replace one average by stored values of the same names and shapes."""
        for name, average in self.averages[decay].items():
            average.copy_(values[name])
