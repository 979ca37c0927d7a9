"""The settings of the authors' and of JiT's training program, which their checkpoints hold as `args`."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from typing import Any

from jlt.config import LossConfig, NetworkConfig, OptimizerConfig, Prediction, TimestepConfig, TrainConfig
from jlt.errors import JLTError, UsageError

UNSUPPORTED = ("attn_dropout", "proj_dropout", "mask_prob", "async_timesteps", "ema_feat_align_weight")
"""Settings of their training that have no effect on a finished network, and that this program does not have."""


class Arguments:
    """The values of `args`, by name, with a record of those that were absent and got the published default."""

    def __init__(self, args: Any) -> None:
        values = vars(args) if isinstance(args, argparse.Namespace) else args
        if values is not None and not isinstance(values, Mapping):
            raise JLTError(f"args is {type(args).__name__}, and an argparse.Namespace is expected.")
        self.values: Mapping[str, Any] = values or {}
        self.assumed: dict[str, Any] = {}

    def number(self, name: str, default: float, published: bool = True) -> float:
        """Return a finite number; an absent one is recorded as assumed unless `published` is False."""
        if self.values.get(name) is None:
            if published:
                self.assumed[name] = default
            return default
        value = self.values[name]
        if not is_number(value):
            raise JLTError(f"args.{name} is {shown(value)}, and a number is expected.")
        return float(value)

    def whole(self, name: str, default: int, limit: int, published: bool = True) -> int:
        """Return a whole number from 0 to `limit`."""
        value = self.number(name, default, published)
        if value != int(value) or not 0 <= value <= limit:
            raise JLTError(f"args.{name} is {value:g}, and a whole number from 0 to {limit} is expected.")
        return int(value)

    @property
    def used_otherwise(self) -> list[str]:
        """The settings of `UNSUPPORTED` that the training used."""
        return [
            name for name in UNSUPPORTED if isinstance(self.values.get(name), (bool, int, float)) and self.values[name]
        ]


def is_number(value: Any) -> bool:
    """Return whether a value of a file is a finite number of a usual size."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return value.bit_length() < 64 if isinstance(value, int) else math.isfinite(value)


def shown(value: Any) -> str:
    """Return a value of a file, or its type where it may be long or nested."""
    if isinstance(value, str):
        return repr(value[:40])
    if isinstance(value, int) and value.bit_length() >= 64:
        return f"a number of {value.bit_length()} bits"
    return repr(value) if isinstance(value, (int, float)) else type(value).__name__


def read_prediction(arguments: Arguments, chosen: Prediction | None) -> Prediction:
    """Return what the network outputs; UsageError if `chosen` contradicts the file."""
    stated = arguments.values.get("flow_matching")
    if stated is None:
        if chosen is None:
            arguments.assumed["prediction"] = "x"
        return chosen or "x"
    if not isinstance(stated, bool):
        raise JLTError(f"args.flow_matching is {shown(stated)}, and True or False is expected.")
    found: Prediction = "v" if stated else "x"
    if chosen not in (None, found):
        raise UsageError(f"The file states that its network predicts {found}: leave out --prediction {chosen}.")
    return found


def require_plain_order(arguments: Arguments) -> None:
    """Raise JLTError for a network that passes some of its blocks several times."""
    indices, count = arguments.values.get("loop_indices"), arguments.number("loop_count", 0, published=False)
    if count > 1 and isinstance(indices, (str, list, tuple)) and len(indices) > 0:
        raise JLTError("args.loop_count is above 1: this network passes some blocks several times, which jlt does not.")


def train_config(
    arguments: Arguments, prediction: Prediction, network: NetworkConfig, averages: tuple[float, ...], updates: int
) -> TrainConfig:
    """Return the configuration of the training of a network, as far as this program has its settings."""
    rate, base = arguments.number("lr", 2e-4, published=False), arguments.number("blr", 5e-5, published=False)
    # Their learning rate is blr * batch / 256, and no other setting has the batch over all processes.
    batch = rate * 256 / base if base > 0 else 0
    if "lr" not in arguments.values or not 1 <= batch <= 1 << 20:
        arguments.assumed["batch_size"] = batch = 1024
    optimizer = OptimizerConfig(
        learning_rate=rate,
        weight_decay=arguments.number("weight_decay", 0.0, published=False),
        warmup_epochs=arguments.number("warmup_epochs", 5, published=False),
        grad_clip=arguments.number("grad_clip", 1.0, published=False) or 1.0,
    )
    return TrainConfig(
        name="imported",
        prediction=prediction,
        network=network,
        loss=LossConfig(space="v", weighting="published", t_eps=arguments.number("t_eps", 0.05)),
        timesteps=TimestepConfig(P_mean=arguments.number("P_mean", -0.8), P_std=arguments.number("P_std", 0.8)),
        optimizer=optimizer,
        noise_scale=arguments.number("noise_scale", 1.0),
        batch_size=round(batch),
        steps=max(1, updates),
        label_dropout=arguments.number("label_drop_prob", 0.1),
        flips=True,
        ema=averages,
        power_ema=(),
    )
