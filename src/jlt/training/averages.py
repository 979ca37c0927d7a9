"""Averages of the weights: updated during the training, read from a checkpoint by name, or rebuilt from snapshots."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from jlt.config import TrainConfig
from jlt.errors import JLTError, unknown_name
from jlt.runtime.progress import inform
from jlt.storage.files import sealed_sha256
from jlt.training import power_ema
from jlt.training.checkpoint import Checkpoint, average_names, list_snapshots
from jlt.training.parallel import local_shard
from jlt.training.power_ema import SIGMA_REL, Snapshot, parse_sigma_rel

NOTABLE_RESIDUAL = 0.05
"""A larger residual of a rebuilt average is reported."""


class EMA:
    """average <- beta average + (1 - beta) weights after every update, one average by each rule for beta.

    Named by their decay (`0.9999`), or by their relative width (`sigma_rel=0.05`) where beta grows with the updates.
    """

    def __init__(self, network: nn.Module, config: TrainConfig) -> None:
        self._weights = dict(network.named_parameters())
        gammas = map(power_ema.gamma_from_sigma_rel, config.power_ema)
        rules: list[Callable[[int], float]] = [lambda _, beta=beta: beta for beta in config.ema]  # type: ignore[misc]
        rules += [partial(power_ema.decay, gamma=gamma) for gamma in gammas]
        self._betas = dict(zip(average_names(config), rules, strict=True))
        self.averages: dict[str, dict[str, Tensor]] = {
            name: {key: weight.detach().float().clone() for key, weight in self._weights.items()}
            for name in self._betas
        }

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """Move every average towards the present weights, the result of this many updates."""
        weights = _shards(self._weights)
        with record_function("jlt::averages"):
            for name, average in self.averages.items():
                torch._foreach_lerp_(_shards(average), weights, 1 - self._betas[name](updates))

    @torch.no_grad()
    def squares(self) -> Tensor:
        """Return the squared L2 norm of the weights and their squared distance from each average, in this shard."""
        weights = _shards(self._weights)
        differences = (torch._foreach_sub(weights, _shards(average)) for average in self.averages.values())
        return torch.stack([_squared_norm(weights), *map(_squared_norm, differences)])


def _shards(tensors: Mapping[str, Tensor]) -> list[Tensor]:
    return [local_shard(tensor.detach()) for tensor in tensors.values()]


def _squared_norm(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack(torch._foreach_norm(list(tensors))).square().sum()


@dataclass(frozen=True)
class ChosenWeights:
    """A network's weights, their name, and the origin of rebuilt ones (else None)."""

    tensors: dict[str, Tensor]
    ema: str
    rebuilt: Mapping[str, Any] | None


def choose_name(checkpoint: Checkpoint, ema: str) -> str:
    """Return the name of the chosen weights, and read none; an empty name becomes the first average, or `none`.

    JLTError for an unknown name.
    """
    names = [*checkpoint.ema_names(), "none"]
    if ema and ema not in names:
        if not ema.startswith(SIGMA_REL):
            raise unknown_name("EMA in this checkpoint", ema, [*names, f"{SIGMA_REL}0.07"])
        parse_sigma_rel(ema)
    return ema or names[0]


def choose_weights(checkpoint: Checkpoint, ema: str) -> ChosenWeights:
    """Return weights by name: a stored average, `sigma_rel=0.07`, `none`; the first average if empty.

    JLTError for an unknown name, for damaged files, and if there is no average to rebuild from.
    """
    chosen = choose_name(checkpoint, ema)
    if chosen not in (*checkpoint.ema_names(), "none"):
        return _rebuild(checkpoint, chosen)
    file = "network" if chosen == "none" else f"ema_{chosen}"
    return ChosenWeights(checkpoint.read(f"{file}.safetensors"), chosen, None)


def _rebuild(checkpoint: Checkpoint, name: str) -> ChosenWeights:
    width = parse_sigma_rel(name)
    earlier = [folder for folder in list_snapshots(checkpoint.run) if folder.step < checkpoint.step]
    stored: list[tuple[Snapshot, Callable[[], Mapping[str, Tensor]]]] = [
        (Snapshot(folder.updates, parse_sigma_rel(average)), partial(folder.read, f"ema_{average}.safetensors"))
        for folder in (*earlier, checkpoint)
        for average in folder.ema_names()
        if average.startswith(SIGMA_REL) and folder.updates
    ]
    if not stored:
        raise JLTError(
            f"{checkpoint.folder} holds no power-function average to rebuild {name} from: "
            "train with --power-ema 0.05 0.1."
        )
    combination = power_ema.coefficients([snapshot for snapshot, _ in stored], checkpoint.updates, width)
    tensors = power_ema.reconstruct(zip(combination.coefficients.tolist(), [read for _, read in stored], strict=True))
    if combination.residual > NOTABLE_RESIDUAL:
        inform(
            f"{name} is rebuilt from {len(stored)} stored averages with a residual of {combination.residual:.0%}. "
            "More frequent snapshots (--snapshot-every) or a length nearer to a stored one would lower it."
        )
    hashes = sealed_sha256({folder.folder.name: folder.sha256 for folder in earlier})
    origin = {"averages": len(stored), "residual": round(combination.residual, 6), "snapshots_sha256": hashes}
    return ChosenWeights(tensors, name, origin)
