"""Averages of the weights in float32: exponential ones and power functions of time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from jlt.config import TrainConfig
from jlt.training.checkpoint import average_names
from jlt.training.parallel import copy_full, local_shard
from jlt.training.power_ema import decay, gamma_from_sigma_rel


class EMA:
    """average <- beta average + (1 - beta) weights after every update, one average by each rule for beta.

    Named by their decay (`0.9999`), or by their relative width (`sigma_rel=0.05`) where beta grows with the updates.
    """

    def __init__(self, network: nn.Module, config: TrainConfig) -> None:
        self._weights = dict(network.named_parameters())
        names = average_names(config)
        rules: list[Callable[[int], float]] = [lambda _, beta=beta: beta for beta in config.ema]  # type: ignore[misc]
        rules += [partial(decay, gamma=gamma_from_sigma_rel(width)) for width in config.power_ema]
        self._betas = dict(zip(names, rules, strict=True))
        self._power = names[len(config.ema) :]
        self.averages: dict[str, dict[str, Tensor]] = {
            name: {key: weight.detach().float().clone() for key, weight in self._weights.items()}
            for name in self._betas
        }

    def power_averages(self) -> dict[str, dict[str, Tensor]]:
        """Return the power-function averages, from which others can be rebuilt."""
        return {name: self.averages[name] for name in self._power}

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """Move every average towards the present weights, the result of this many updates."""
        weights = [local_shard(weight.detach()) for weight in self._weights.values()]
        with record_function("jlt::averages"):
            for name, average in self.averages.items():
                torch._foreach_lerp_(list(map(local_shard, average.values())), weights, 1 - self._betas[name](updates))

    @torch.no_grad()
    def distances(self) -> dict[str, Tensor]:
        """Return the squared L2 distance of this process's shard of the weights from each average."""
        weights = [local_shard(weight.detach()) for weight in self._weights.values()]
        return {
            name: _squared_norm(torch._foreach_sub(weights, list(map(local_shard, average.values()))))
            for name, average in self.averages.items()
        }

    @torch.no_grad()
    def squared_norm(self) -> Tensor:
        """Return the squared L2 norm of this process's shard of the weights."""
        return _squared_norm([local_shard(weight.detach()) for weight in self._weights.values()])

    @torch.no_grad()
    def load(self, name: str, values: Mapping[str, Tensor]) -> None:
        """Replace one average by stored values of the same names and shapes."""
        for key, average in self.averages[name].items():
            copy_full(average, values[key])


def _constant(beta: float, updates: int) -> float:
    del updates
    return beta


def _squared_norm(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack(torch._foreach_norm(list(tensors))).square().sum()
