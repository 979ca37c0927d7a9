"""Everything a run resolves to, as frozen data: no tensors and no defaults hidden elsewhere.

A `TrainConfig` round-trips through JSON; a key or a value that does not exist is an error with the nearest name.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from jlt.errors import JLTError, unknown_name

Prediction = Literal["x", "eps", "v"]
LossSpace = Literal["x", "eps", "v"]
Weighting = Literal["published", "matched"]
PREDICTIONS: tuple[Prediction, ...] = typing.get_args(Prediction)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise JLTError(message)


@dataclass(frozen=True)
class NetworkConfig:
    """The transformer of DESIGN 3; its optional parts are off by default."""

    channels: int
    """Latent channels C."""
    height: int
    """Latent grid height."""
    width: int
    """Latent grid width."""
    num_classes: int
    patch_size: int = 1
    hidden_size: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    """SwiGLU's hidden size is 2/3 of mlp_ratio * hidden_size."""
    bottleneck_size: int = 0
    """Width of the linear bottleneck in the patch embedding (JiT); 0 embeds directly."""
    fixed_positions: bool = False
    """Add fixed sin-cos positions to the tokens, besides the rotary ones."""
    context_tokens: int = 0
    """In-context class tokens (JiT); 0 uses none."""
    context_start: int = 0
    """Block before which the in-context class tokens enter."""
    checkpoint_blocks: bool = False
    """Recompute each block in the backward pass: less memory, about a third more compute."""

    def __post_init__(self) -> None:
        p = self.patch_size
        _require(
            p >= 1 and self.height % p == 0 and self.width % p == 0,
            f"patch_size {p} does not divide the latent grid {self.height}x{self.width}.",
        )
        _require(
            self.hidden_size % self.num_heads == 0 and self.hidden_size // self.num_heads % 4 == 0,
            f"hidden_size {self.hidden_size} over {self.num_heads} heads must be a multiple of 4: "
            "rotary positions turn pairs of values along two axes.",
        )
        _require(
            0 <= self.context_start < self.depth,
            f"context_start {self.context_start} lies outside the {self.depth} blocks.",
        )

    @property
    def tokens(self) -> int:
        """Image tokens N = (height / patch) * (width / patch)."""
        return self.height // self.patch_size * (self.width // self.patch_size)

    @property
    def mlp_hidden_size(self) -> int:
        """SwiGLU's hidden size: 2/3 of the nominal ratio, so that its three matrices cost what two did."""
        return int(int(self.hidden_size * self.mlp_ratio) * 2 / 3)


@dataclass(frozen=True)
class LossConfig:
    """Where the error is measured and how it is weighted over time (eq. 5)."""

    space: LossSpace = "v"
    weighting: Weighting = "matched"
    t_eps: float = 0.05

    def __post_init__(self) -> None:
        _require(
            0 < self.t_eps < 1, f"t_eps must lie in (0, 1), not {self.t_eps}: a loss divides by max(1 - t, t_eps)."
        )


@dataclass(frozen=True)
class TimestepConfig:
    """The distribution of training times (eq. 6)."""

    distribution: Literal["logit_normal", "uniform"] = "logit_normal"
    P_mean: float = -0.8
    P_std: float = 0.8
    shift: float = 1.0
    """a in t -> t / (t + a (1 - t)); 1 changes nothing."""

    def __post_init__(self) -> None:
        _require(self.P_std > 0, f"P_std must be positive, not {self.P_std}.")
        _require(self.shift > 0, f"shift must be positive, not {self.shift}.")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up, then a constant learning rate."""

    learning_rate: float = 2e-4
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    warmup_steps: int = 0
    grad_clip: float = 1.0

    def __post_init__(self) -> None:
        _require(self.learning_rate > 0, f"learning_rate must be positive, not {self.learning_rate}.")
        _require(self.grad_clip > 0, f"grad_clip must be positive, not {self.grad_clip}.")


@dataclass(frozen=True)
class TrainConfig:
    """One training run, resolved."""

    name: str
    prediction: Prediction
    network: NetworkConfig
    loss: LossConfig = field(default_factory=LossConfig)
    timesteps: TimestepConfig = field(default_factory=TimestepConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    noise_scale: float = 1.0
    """s in eq. 1."""
    batch_size: int = 1024
    """Global batch: samples per update over all processes."""
    steps: int = 250_000
    label_dropout: float = 0.1
    """Share of labels replaced by the null class, for guidance."""
    flips: bool = False
    """Train on stored mirror images too, chosen at random for each sample."""
    ema: tuple[float, ...] = (0.9999, 0.9996)
    seed: int = 0
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    """bfloat16 is autocast: weights, optimiser and EMA stay in float32."""
    compile: bool = False
    """torch.compile the network; needs a C++ compiler on a CPU."""
    log_every: int = 100
    checkpoint_every: int = 10_000

    def __post_init__(self) -> None:
        _require(self.batch_size > 0 and self.steps > 0, "batch_size and steps must be positive.")
        _require(self.log_every > 0 and self.checkpoint_every > 0, "log_every and checkpoint_every must be positive.")
        _require(0 <= self.label_dropout < 1, f"label_dropout must lie in [0, 1), not {self.label_dropout}.")
        _require(self.noise_scale > 0, f"noise_scale must be positive, not {self.noise_scale}.")
        _require(all(0 < decay < 1 for decay in self.ema), f"EMA decays must lie in (0, 1), not {self.ema}.")


Solver = Literal["euler", "heun"]
SampleFormat = Literal["png", "npz", "grid"]


@dataclass(frozen=True)
class SampleConfig:
    """How images are drawn from a checkpoint: the sampler's part of a protocol."""

    num: int = 64
    solver: Solver = "heun"
    steps: int = 50
    cfg_scale: float = 1.0
    """w in eq. 7; 1 is unguided."""
    cfg_interval: tuple[float, float] = (0.0, 1.0)
    t_eps: float = 0.0
    """Clamp of the readout (eq. 3) while sampling; 0.05 is the published behaviour and leaves noise in the result."""
    labels: str = "equal"
    """equal, random, or a list such as 3,7,7 that is repeated."""
    seed: int = 0
    ema: str = ""
    """Decay of the EMA to sample from, `none` for the raw weights; empty takes the first one of the run."""
    batch_size: int = 250
    precision: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        low, high = self.cfg_interval
        _require(0 <= low < high <= 1, f"cfg_interval must satisfy 0 <= low < high <= 1, not {low} {high}.")
        _require(self.num > 0 and self.steps > 0 and self.batch_size > 0, "num, steps and batch_size must be positive.")
        _require(0 <= self.t_eps < 1, f"t_eps must lie in [0, 1), not {self.t_eps}.")


C = TypeVar("C")


def to_dict(config: Any) -> dict[str, Any]:
    """Return a configuration as plain JSON types."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in _shallow(config).items()}


def _shallow(config: Any) -> dict[str, Any]:
    values = {entry.name: getattr(config, entry.name) for entry in dataclasses.fields(config)}
    return {key: to_dict(value) if dataclasses.is_dataclass(value) else value for key, value in values.items()}


def from_dict(kind: type[C], values: Mapping[str, Any], where: str = "") -> C:
    """Build a configuration from plain JSON types; an unknown key or an impossible value is a JLTError."""
    hints = typing.get_type_hints(kind)
    for key in values:
        if key not in hints:
            raise unknown_name("setting", f"{where}{key}", [f"{where}{known}" for known in hints])
    return kind(**{key: _convert(hints[key], value, f"{where}{key}") for key, value in values.items()})


def _convert(hint: Any, value: Any, where: str) -> Any:
    """Return `value` as `hint` wants it: nested data classes, tuples and literals are the only cases in use."""
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return from_dict(typing.cast(type, hint), value, f"{where}.")
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple and isinstance(value, (list, tuple)):
        _require(Ellipsis in arguments or len(value) == len(arguments), f"{where} must have {len(arguments)} values.")
        return tuple(_convert(arguments[0], entry, where) for entry in value)
    if origin is Literal:
        _require(value in arguments, f"{where} must be one of {', '.join(map(str, arguments))}, not {value!r}.")
        return value
    if origin in (typing.Union, types.UnionType):
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    _require(
        isinstance(value, hint) and (hint is bool or not isinstance(value, bool)),
        f"{where} must be {hint.__name__}, not {value!r}.",
    )
    return value
