"""Everything a run resolves to, as frozen data: no tensors and no defaults hidden elsewhere.

A `TrainConfig` round-trips through JSON; a key or a value that does not exist is an error with the nearest name.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

from jlt.errors import JLTError

Prediction = Literal["x", "eps", "v"]
LossSpace = Literal["x", "eps", "v"]
Weighting = Literal["published", "matched"]
Precision = Literal["float32", "tf32", "bfloat16"]
Parallel = Literal["ddp", "fsdp"]
Metric = Literal[
    "frechet_distance",
    "spatial_frechet_distance",
    "kernel_distance",
    "inception_score",
    "precision",
    "recall",
    "density",
    "coverage",
    "label_agreement",
]
PREDICTIONS: tuple[Prediction, ...] = typing.get_args(Prediction)
MAX_SIGMA_REL = 0.28
"""Just below 12**-0.5, the relative width of a plain average over all of training."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise JLTError(message)


@dataclass(frozen=True)
class LatentShape:
    """Channels, grid height and width of one latent, and the number of classes that label it."""

    channels: int
    height: int
    width: int
    num_classes: int


FLUX2_IMAGENET256 = LatentShape(channels=128, height=16, width=16, num_classes=1000)
"""ImageNet at 256x256 through FLUX.2's autoencoder: the published setting (DESIGN 3)."""


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


Solver = Literal["euler", "heun", "midpoint", "dpmpp_2m", "ancestral"]
SampleFormat = Literal["png", "npz", "grid"]


@dataclass(frozen=True)
class SampleConfig:
    """How images are drawn from a checkpoint: the sampler's part of a protocol."""

    num: int = 64
    solver: Solver = "heun"
    """euler, heun (eq. 8) and midpoint; dpmpp_2m for few evaluations; ancestral draws fresh noise at every step."""
    steps: int = 50
    shift: float = 1.0
    """a in t -> t / (t + a (1 - t)), applied to the equally spaced times of the steps; 1 changes nothing."""
    grid: tuple[float, ...] = ()
    """The times themselves, rising from 0 to 1, in place of steps and shift."""
    cfg_scale: float = 1.0
    """w in eq. 7; 1 is unguided."""
    cfg_interval: tuple[float, float] = (0.0, 1.0)
    autoguide: str = ""
    """Run or checkpoint of a weaker network that guides in the place of the null class (autoguidance)."""
    autoguide_ema: str = ""
    """Which of its weights; without --autoguide, weights of the same checkpoint, such as a shorter average."""
    t_eps: float = 0.0
    """Clamp of the readout (eq. 3) while sampling; 0.05 is the published behaviour and leaves noise in the result."""
    labels: str = "equal"
    """equal, random, or a list such as 3,7,7 that is repeated."""
    seed: int = 0
    ema: str = ""
    """An EMA decay (0.9999), a length to rebuild (sigma_rel=0.07) or none; empty takes the run's first decay."""
    batch_size: int = 256
    precision: Literal["float32", "bfloat16"] = "float32"
    compile: bool = False
    """torch.compile the network, which pays for many images; needs a C++ compiler on a CPU."""

    def __post_init__(self) -> None:
        low, high = self.cfg_interval
        _require(0 < self.shift < math.inf, f"shift must be positive, not {self.shift}.")
        _require(math.isfinite(self.cfg_scale), f"cfg_scale must be a number, not {self.cfg_scale}.")
        if self.grid:
            rising = all(t < t_next for t, t_next in pairwise(self.grid))
            _require(
                len(self.grid) > 1 and rising and (self.grid[0], self.grid[-1]) == (0, 1),
                f"grid must rise from 0 to 1, not {self.grid}.",
            )
            _require(self.shift == 1, "An explicit grid is taken as it is: leave shift at 1.")
            # One truth: the steps are those of the grid.
            object.__setattr__(self, "steps", len(self.grid) - 1)
        _require(0 <= low < high <= 1, f"cfg_interval must satisfy 0 <= low < high <= 1, not {low} {high}.")
        _require(self.num > 0 and self.steps > 0 and self.batch_size > 0, "num, steps and batch_size must be positive.")
        _require(0 <= self.t_eps < 1, f"t_eps must lie in [0, 1), not {self.t_eps}.")

    @property
    def autoguided(self) -> bool:
        """Whether a weaker network guides, and not the null class."""
        return bool(self.autoguide or self.autoguide_ema)


@dataclass(frozen=True)
class EvaluationConfig:
    """What a training run draws and measures at intervals."""

    sample: SampleConfig = field(default_factory=lambda: SampleConfig(num=1000))
    reference: str = ""
    """Real images or an .npz of their statistics; empty takes the images that the latents were made from."""
    features: str = "digits"
    """Feature extractor."""
    features_path: str = ""
    """Where its weights are, if not in the usual place."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up, then a constant learning rate or half a cosine down to zero at the last step."""

    learning_rate: float = 2e-4
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    decayed: Literal["matrices", "all"] = "matrices"
    """What weight_decay shrinks: the matrices of linear layers, or biases, scales and embeddings too."""
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: int | None = None
    warmup_epochs: float | None = None
    """Warm-up in epochs of the latent store, instead of warmup_steps; with neither there is none."""
    grad_clip: float = 1.0

    def __post_init__(self) -> None:
        _require(self.learning_rate > 0, f"learning_rate must be positive, not {self.learning_rate}.")
        _require(self.grad_clip > 0, f"grad_clip must be positive, not {self.grad_clip}.")
        _require(self.weight_decay >= 0, f"weight_decay must not be negative, and is {self.weight_decay}.")
        _require(min(self.warmup_steps or 0, self.warmup_epochs or 0) >= 0, "A warm-up cannot be negative.")
        _require(
            self.warmup_steps is None or self.warmup_epochs is None,
            "The warm-up is in steps or in epochs: set the one that is not meant to None, as in "
            "--optimizer.warmup-epochs None.",
        )


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
    """Global batch: samples per update over all processes, micro_batch_size * accumulation * processes."""
    steps: int = 250_000
    epochs: float = 0.0
    """Length in epochs of the latent store, which replaces steps; 0 leaves them."""
    label_dropout: float = 0.1
    """Share of labels replaced by the null class, for guidance."""
    flips: bool = False
    """Train on stored mirror images too, chosen at random for each sample."""
    ema: tuple[float, ...] = (0.9999, 0.9996)
    """Decays of the exponential moving averages of the weights."""
    power_ema: tuple[float, ...] = (0.05, 0.1)
    """Relative widths sigma_rel of the power-function averages (Karras et al. 2024), from whose snapshots any other
    length is rebuilt after training."""
    seed: int = 0
    precision: Precision = "bfloat16"
    """bfloat16 is autocast: weights, optimiser and EMA stay in float32. tf32 is float32 with a GPU's fast products."""
    init_from: str = ""
    """Run or checkpoint whose weights training starts from; other class counts and grids are adapted."""
    init_ema: str = ""
    """Which of its weights: an EMA, `none` for the raw ones; empty takes the first EMA."""
    max_skipped: int = 10
    """Updates in a row that may be skipped for a loss or gradient that is not finite, before the run ends."""
    micro_batch_size: int = 0
    """Samples that one process puts through the network at a time; 0 follows from the other numbers."""
    accumulation: int = 0
    """Micro-batches whose gradients make one update; 0 follows from the other numbers."""
    parallel: Parallel = "ddp"
    """How several processes share the work: ddp keeps the whole state in each, fsdp a part of it (large networks)."""
    compile: bool = False
    """torch.compile the network; needs a C++ compiler on a CPU."""
    gradient_checkpointing: bool = False
    """Recompute each block in the backward pass: less memory, about a third more compute."""
    log_every: int = 100
    checkpoint_every: int = 10_000
    keep_last: int = 3
    """Newest checkpoints that are kept; 0 keeps all."""
    keep_every: int = 0
    """Checkpoints at multiples of this step are kept too; 0 is none."""
    snapshot_every: int = 10_000
    """Steps between snapshots of the power-function averages."""
    sample_every: int = 0
    """Steps between grids of samples from the same noise and labels; 0 draws none."""
    evaluate_every: int = 0
    """Steps between evaluations; 0 makes none."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """How sample grids are drawn and evaluations made."""
    tensorboard: bool = False
    """Write the log for TensorBoard too, into RUN/tensorboard."""
    wandb: Literal["off", "online", "offline"] = "off"
    """Send the log to Weights & Biases, or write it into RUN/wandb for later."""

    def __post_init__(self) -> None:
        _require(self.batch_size > 0 and self.steps > 0, "batch_size and steps must be positive.")
        _require(self.epochs >= 0, f"epochs must not be negative, and is {self.epochs}.")
        _require(
            self.log_every > 0 and self.checkpoint_every > 0 and self.snapshot_every > 0,
            "log_every, checkpoint_every and snapshot_every must be positive.",
        )
        counts = ("micro_batch_size", "accumulation", "keep_last", "keep_every", "sample_every", "evaluate_every")
        for name in counts:
            _require(getattr(self, name) >= 0, f"{name} must not be negative, and is {getattr(self, name)}.")
        _require(self.max_skipped > 0, f"max_skipped must be positive, not {self.max_skipped}.")
        _require(0 <= self.label_dropout < 1, f"label_dropout must lie in [0, 1), not {self.label_dropout}.")
        _require(self.noise_scale > 0, f"noise_scale must be positive, not {self.noise_scale}.")
        _require(all(0 < decay < 1 for decay in self.ema), f"EMA decays must lie in (0, 1), not {self.ema}.")
        for name in ("ema", "power_ema"):
            values = getattr(self, name)
            _require(len(set(values)) == len(values), f"{name} names an average twice: {values}.")
        _require(
            all(0 < width < MAX_SIGMA_REL for width in self.power_ema),
            f"power_ema widths must lie in (0, {MAX_SIGMA_REL}), not {self.power_ema}.",
        )


def in_steps(config: TrainConfig, images: int) -> TrainConfig:
    """Return the run with its length and warm-up in steps, where they are in epochs of `images` samples."""
    optimizer, per_epoch = config.optimizer, images / config.batch_size
    if optimizer.warmup_epochs is not None:
        warmup = round(optimizer.warmup_epochs * per_epoch)
        optimizer = dataclasses.replace(optimizer, warmup_steps=warmup, warmup_epochs=None)
    steps = max(1, round(config.epochs * per_epoch)) if config.epochs else config.steps
    return dataclasses.replace(config, optimizer=optimizer, steps=steps, epochs=0.0)
