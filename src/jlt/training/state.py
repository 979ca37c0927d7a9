"""The state of a training: all that changes, and so all that a checkpoint holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from jlt.config import TrainConfig
from jlt.networks.transformer import Transformer, build_network
from jlt.runtime.processes import Group
from jlt.runtime.progress import inform
from jlt.runtime.random_numbers import derive_seed
from jlt.storage.weights import weights_sha256
from jlt.training.checkpoint import Checkpoint
from jlt.training.ema import EMA
from jlt.training.finetune import start_from
from jlt.training.optimizer import build_optimizer
from jlt.training.parallel import copy_full, shard
from jlt.training.run_folder import require_same_run


@dataclass
class TrainState:
    """The state after `step` steps, of which `updates` changed the weights."""

    network: Transformer
    optimizer: torch.optim.AdamW
    ema: EMA
    initial_weights: str
    """Hash of the weights that training began with."""
    step: int = 0
    updates: int = 0
    skipped_in_a_row: int = 0
    draws_digest: str = ""
    seconds: float = 0.0
    """Time spent in training, over all sessions."""

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.network.parameters()).device

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return every tensor to save, by file and name; of sharded ones, this process's shard."""
        network = {name: weight.detach() for name, weight in self.network.state_dict().items()}
        averages = {f"ema_{name}": values for name, values in self.ema.averages.items()}
        return {"network": network, "optimizer": self._moments(), **averages}

    def facts(self) -> dict[str, Any]:
        """Return the content of `state.json`, all but the step."""
        return {
            "updates": self.updates,
            "skipped_in_a_row": self.skipped_in_a_row,
            "draws": self.draws_digest,
            "initial_weights": self.initial_weights,
            "seconds": self.seconds,
            "device": self.device.type,
        }

    def _moments(self) -> dict[str, Tensor]:
        return {
            f"{key}/{name}": value
            for name, parameter in self.network.named_parameters()
            for key, value in self.optimizer.state[parameter].items()
        }

    @torch.no_grad()
    def restore(self, checkpoint: Checkpoint) -> None:
        """Load a checkpoint's tensors and counts."""
        weights = checkpoint.read("network.safetensors")
        for name, parameter in self.network.state_dict().items():
            copy_full(parameter, weights[name])
        moments = checkpoint.read("optimizer.safetensors")
        for name, value in self._moments().items():
            copy_full(value, moments[name])
        for name in self.ema.averages:
            self.ema.load(name, checkpoint.read(f"ema_{name}.safetensors"))
        facts = checkpoint.read_state()
        self.step, self.updates = checkpoint.step, facts["updates"]
        self.skipped_in_a_row, self.draws_digest = facts["skipped_in_a_row"], facts["draws"]
        self.initial_weights, self.seconds = facts["initial_weights"], facts["seconds"]


def initial_state(
    config: TrainConfig, device: torch.device | str, group: Group | None = None, resumed: bool = False
) -> TrainState:
    """Return the state before the first update: a function of the configuration alone.

    A `resumed` run restores its weights later, so `config.init_from` is not read.
    """
    network = build_network(config.network, derive_seed(config.seed, "weights"))
    if config.init_from and not resumed:
        start_from(network, config)
    initial_weights = weights_sha256(network.state_dict())
    network.to(device)
    if config.parallel == "fsdp" and group is not None and group.size > 1:
        shard(network, group.size)
    return TrainState(network, build_optimizer(network, config.optimizer), EMA(network, config), initial_weights)


def resume(state: TrainState, checkpoint: Checkpoint, config: TrainConfig, latents: Mapping[str, Any]) -> None:
    """Resume from a checkpoint of this run; JLTError if it is of another one."""
    require_same_run(checkpoint, config, latents)
    stored = checkpoint.read_state()
    if stored["device"] != state.device.type:
        inform(f"The run used {stored['device']} until now. Noise depends on the kind of device, so it changes here.")
    if not config.init_from and stored["initial_weights"] != state.initial_weights:
        inform("Another version of PyTorch made the initial weights of this run; it resumes from its checkpoint.")
    state.restore(checkpoint)
