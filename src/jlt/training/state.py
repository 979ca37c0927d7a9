"""The state of a training: all that changes, and so all that a checkpoint holds; how it begins, and how it resumes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from jlt.config import OptimizerConfig, TrainConfig
from jlt.errors import JLTError
from jlt.networks.transformer import Transformer, build_network
from jlt.results.run import CONFIG
from jlt.runtime.processes import Group
from jlt.runtime.progress import inform
from jlt.runtime.random_numbers import derive_seed
from jlt.storage.codec import to_json
from jlt.storage.files import difference, format_difference, recorded
from jlt.storage.folders import Claim
from jlt.storage.weights import weights_sha256
from jlt.training.averages import EMA, choose_weights
from jlt.training.checkpoint import Checkpoint, open_checkpoint
from jlt.training.loss_by_time import LossByTime
from jlt.training.parallel import copy_full, shard

FREE_TO_CHANGE = {
    *("name", "max_skipped", "micro_batch_size", "accumulation", "parallel", "compile", "gradient_checkpointing"),
    *("log_every", "checkpoint_every", "keep_last", "keep_every", "snapshot_every"),
    *("sample_every", "evaluate_every", "evaluation", "tensorboard", "wandb"),
    # The hash of the store's manifest covers them, and older runs do not have them.
    *("latents.exif", "latents.skipped"),
}
"""Settings of how a run is executed, saved and watched; a resumed run may change them."""
CLASSES = "class_embedding.weight"


@dataclass
class TrainState:
    """The state after `step` steps, of which `updates` changed the weights."""

    network: Transformer
    optimizer: torch.optim.AdamW
    ema: EMA
    initial_weights: str
    """Hash of the weights that training began with."""
    loss_by_time: LossByTime | None = None
    """What the weighting `uncertainty` divides by."""
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
        moments = {
            f"{key}/{name}": value
            for name, parameter in self.network.named_parameters()
            for key, value in self.optimizer.state[parameter].items()
        }
        if self.loss_by_time:
            moments["loss_by_time"] = self.loss_by_time.sums
        return {"network": network, "optimizer": moments, **averages}

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

    @torch.no_grad()
    def restore(self, checkpoint: Checkpoint) -> None:
        """Load a checkpoint's tensors and counts."""
        for file, tensors in self.tensors().items():
            stored = checkpoint.read(f"{file}.safetensors")
            for name, tensor in tensors.items():
                copy_full(tensor, stored[name])
        facts = checkpoint.read_state()
        self.step, self.updates = checkpoint.step, facts.updates
        self.skipped_in_a_row, self.draws_digest = facts.skipped_in_a_row, facts.draws
        self.initial_weights, self.seconds = facts.initial_weights, facts.seconds


def initial_state(
    config: TrainConfig, device: torch.device | str, group: Group | None = None, resumed: bool = False
) -> TrainState:
    """Return the state before the first update: a function of the configuration alone.

    A `resumed` run restores its weights later, so `config.init_from` is not read.
    """
    network = build_network(config.network, derive_seed(config.seed, "weights"))
    if config.init_from and not resumed:
        _start_from(network, config)
    initial_weights = weights_sha256(network.state_dict())
    network.to(device)
    if config.parallel == "fsdp" and group is not None and group.size > 1:
        shard(network, group.size)
    loss_by_time = LossByTime(device) if config.loss.weighting == "uncertainty" else None
    optimizer = build_optimizer(network, config.optimizer)
    return TrainState(network, optimizer, EMA(network, config), initial_weights, loss_by_time)


def build_optimizer(network: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Return fused AdamW with weight decay on the parameters that `config.decayed` names."""
    matrices = {module.weight for module in network.modules() if isinstance(module, nn.Linear)}
    decayed = [p for p in network.parameters() if config.decayed == "all" or p in matrices]
    others = [p for p in network.parameters() if config.decayed != "all" and p not in matrices]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}]
    groups += [{"params": others, "weight_decay": 0.0}] if others else []
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)
    # Made before the first update, so that every checkpoint has the same tensors.
    for parameter in network.parameters():
        zeros = {key: torch.zeros_like(parameter, requires_grad=False) for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.zeros((), device=parameter.device), **zeros}
    return optimizer


def _start_from(network: Transformer, config: TrainConfig) -> None:
    """Load the weights of `init_from`: positions are computed, so any grid fits."""
    checkpoint = open_checkpoint(Path(config.init_from))
    if checkpoint.config.prediction != config.prediction:
        raise JLTError(
            f"{checkpoint.folder} predicts {checkpoint.config.prediction}, and this run predicts {config.prediction}. "
            "Start from a checkpoint of the same prediction."
        )
    chosen, source, target = choose_weights(checkpoint, config.init_ema), checkpoint.folder, network.state_dict()
    weights = {name: value.float() for name, value in chosen.tensors.items()}
    if CLASSES in weights and len(weights[CLASSES]) != len(target[CLASSES]):
        inform(
            f"{source} has {len(weights[CLASSES]) - 1} classes. "
            f"The embeddings of this run's {len(target[CLASSES]) - 1} classes are initialised again."
        )
        # All but that of the null class, which is the last one.
        weights[CLASSES] = torch.cat((target[CLASSES][:-1], weights[CLASSES][-1:]))
    theirs, mine = ({name: tuple(value.shape) for name, value in side.items()} for side in (weights, target))
    if wrong := difference(theirs, mine):
        name, found, wanted = wrong[0]
        more = f", and {len(wrong) - 1} more tensors differ" if len(wrong) > 1 else ""
        raise JLTError(
            f"The weights of {source} do not fit this network: {name} is {found or 'absent'} there and "
            f"{wanted or 'absent'} here{more}."
        )
    network.load_state_dict(weights)
    inform(f"Starting from the weights ({chosen.ema}) of {source}.")


def run_claim(run: Path, config: TrainConfig, latents: Mapping[str, Any]) -> Claim:
    """Return the claim of a training on its run folder."""
    return Claim(run, CONFIG, run_identity(config, latents), free=free_to_change(config))


def run_identity(config: TrainConfig, latents: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of a run's `config.json`: every setting, and the identity of its latents."""
    return recorded({**to_json(config), "latents": dict(latents)})


def free_to_change(config: TrainConfig) -> set[str]:
    """Return the settings that a resumed run may change."""
    # A cosine schedule fixes the length.
    return FREE_TO_CHANGE | ({"steps"} if config.optimizer.schedule == "constant" else set())


def resume(state: TrainState, checkpoint: Checkpoint, config: TrainConfig, latents: Mapping[str, Any]) -> None:
    """Resume from a checkpoint of this run; JLTError if its configuration or latents are of another one."""
    old, new = run_identity(checkpoint.config, checkpoint.latents), run_identity(config, latents)
    if differences := difference(old, new, free=free_to_change(config)):
        raise JLTError(f"{checkpoint.folder} is of another run, which differs in: {format_difference(differences)}.")
    stored = checkpoint.read_state()
    if stored.device != state.device.type:
        inform(f"The run used {stored.device} until now. Noise depends on the kind of device, so it changes here.")
    if not config.init_from and stored.initial_weights != state.initial_weights:
        inform("Another version of PyTorch made the initial weights of this run; it resumes from its checkpoint.")
    state.restore(checkpoint)
