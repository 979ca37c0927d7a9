"""AdamW over groups of parameters, and the learning rate of each step."""

from __future__ import annotations

import math

import torch
from torch import nn

from jlt.config import OptimizerConfig, TrainConfig


def build_optimizer(network: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Return fused AdamW with weight decay on the parameters that `config.decayed` names."""
    matrices = {module.weight for module in network.modules() if isinstance(module, nn.Linear)}
    decayed = [p for p in network.parameters() if config.decayed == "all" or p in matrices]
    others = [p for p in network.parameters() if config.decayed != "all" and p not in matrices]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    filled = [group for group in groups if group["params"]]
    optimizer = torch.optim.AdamW(filled, lr=config.learning_rate, betas=config.betas, fused=True)
    # Made before the first update, so that every checkpoint has the same tensors.
    for parameter in network.parameters():
        zeros = {key: torch.zeros_like(parameter, requires_grad=False) for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.zeros((), device=parameter.device), **zeros}
    return optimizer


def learning_rate(config: TrainConfig, step: int) -> float:
    """Return the learning rate of the update after `step` steps: linear warm-up, then the schedule."""
    settings = config.optimizer
    warmup = settings.warmup_steps or 0
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    if settings.schedule == "constant":
        return settings.learning_rate
    progress = (step - warmup) / max(1, config.steps - warmup)
    return settings.learning_rate * (1 + math.cos(math.pi * min(1.0, progress))) / 2
