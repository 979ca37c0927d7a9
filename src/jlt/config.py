"""Everything a run resolves to, as frozen data: no tensors, and no defaults anywhere else.

The docstring of a field is the help text of its option. An unknown key or value in a file is an error with the nearest
name (`jlt.storage.codec`).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import InitVar, dataclass, field
from itertools import pairwise
from typing import Any, Literal

from jlt.errors import UsageError, unknown_name
from jlt.ranges import require_ranges

Prediction = str
"""The name of a target: x, eps, v, edm, or a point of a line through x, skip=S or mix=R (eq. 2)."""
LossSpace = Prediction
Weighting = Literal["published", "matched", "min_snr", "uncertainty"]
TimeDistribution = Literal["logit_normal", "uniform", "half_cauchy"]
Precision = Literal["float32", "tf32", "bfloat16"]
InferencePrecision = Literal["float32", "bfloat16"]
Parallel = Literal["ddp", "fsdp"]
Solver = Literal["euler", "heun", "midpoint", "dpmpp_2m", "ancestral"]
NamedSampler = Literal["published", "fast"]
SampleFormat = Literal["png", "npz", "grid"]
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
PREDICTIONS: tuple[Prediction, ...] = ("x", "eps", "v")
"""The three targets of Fu et al. 2026; further ones are members of the two lines."""
NAMED: dict[Prediction, tuple[str, float]] = {
    "x": ("mix", 0.0),
    "eps": ("eps", 0.0),
    "v": ("mix", 1.0),
    "edm": ("skip", 1.0),
}
"""Predictions with a name of their own, as points of lines; both lines begin at x."""
ADDED_LATER = {"omit_default": True}
"""Metadata of a setting that files do not hold where it has its default, so that older runs still compare equal."""
MOST_TOKENS = 2**20


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UsageError(message)


def parse_prediction(name: Prediction) -> tuple[str, float]:
    """Return the line of a prediction, mix, skip or eps, and its point on it, 0 or more; UsageError for other names."""
    if name in NAMED:
        return NAMED[name]
    line, _, text = name.partition("=")
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if line not in ("mix", "skip") or not 0 <= value < math.inf:
        raise unknown_name("prediction", name, [*NAMED, "skip=0.3", "mix=0.5"])
    return (line, value) if value else NAMED["x"]


def canonical_prediction(name: Prediction) -> Prediction:
    """Return the one name of a prediction: skip=1.0 is edm, and skip=0.10 is skip=0.1."""
    point = parse_prediction(name)
    own_names = {point: own_name for own_name, point in NAMED.items()}
    return own_names.get(point, f"{point[0]}={point[1]:g}")


@dataclass(frozen=True)
class LatentShape:
    """Channels, grid height and width of one latent, and the number of classes that label it."""

    channels: int
    height: int
    width: int
    num_classes: int


FLUX2_IMAGENET256 = LatentShape(channels=128, height=16, width=16, num_classes=1000)
"""ImageNet at 256x256 through FLUX.2's autoencoder: the published setting (Fu et al. 2026, arXiv 2605.27102)."""


@dataclass(frozen=True)
class NetworkConfig:
    """The transformer of Fu et al. 2026 (arXiv 2605.27102); its optional parts, from JiT, are off by default."""

    channels: int
    """Latent channels C."""
    height: int
    """Latent height H."""
    width: int
    """Latent width W."""
    num_classes: int
    """Classes that label the latents."""
    patch_size: int = 1
    """Side of a patch in latent positions; each patch is one token."""
    hidden_size: int = 768
    """Width of the network: values per token."""
    depth: int = 12
    """Transformer blocks."""
    num_heads: int = 12
    """Attention heads per block."""
    mlp_ratio: float = 4.0
    """Nominal ratio of the MLP; SwiGLU's hidden size is 2/3 of mlp_ratio * hidden_size."""
    bottleneck_size: int = 0
    """Width of the linear bottleneck in the patch embedding (JiT); 0 embeds directly."""
    fixed_positions: bool = False
    """Add fixed sin-cos positions to the tokens, in addition to the rotary ones."""
    context_tokens: int = 0
    """In-context class tokens (JiT); 0 uses none."""
    context_start: int = 0
    """Block before which the in-context class tokens enter."""
    learned_positions: bool = field(default=False, metadata=ADDED_LATER)
    """Add learnt positions to the tokens instead of fixed ones; imported files of JiT have them."""

    @property
    def latent_shape(self) -> LatentShape:
        """The shape of the latents, and the number of classes that label them."""
        return LatentShape(self.channels, self.height, self.width, self.num_classes)

    def __post_init__(self) -> None:
        require_ranges(self)
        p = self.patch_size
        _require(
            self.height % p == 0 and self.width % p == 0,
            f"patch_size {p} does not divide the latent grid {self.height}x{self.width}.",
        )
        _require(self.tokens <= MOST_TOKENS, f"{self.tokens} tokens are more than {MOST_TOKENS}.")
        _require(
            self.hidden_size % self.num_heads == 0 and self.hidden_size // self.num_heads % 4 == 0,
            f"hidden_size {self.hidden_size} over {self.num_heads} heads must be a multiple of 4: "
            "rotary positions turn pairs of values along two axes.",
        )
        _require(
            0 <= self.context_start < self.depth,
            f"context_start must be one of the {self.depth} blocks, 0 to {self.depth - 1}, not {self.context_start}.",
        )
        _require(
            not (self.fixed_positions and self.learned_positions),
            "fixed_positions and learned_positions exclude each other: choose one of them.",
        )

    @property
    def tokens(self) -> int:
        """Image tokens N = (height / patch) * (width / patch)."""
        return self.height // self.patch_size * (self.width // self.patch_size)

    @property
    def mlp_hidden_size(self) -> int:
        """SwiGLU's hidden size: 2/3 of the nominal one, so that three matrices cost as much as two."""
        return swiglu_size(self.hidden_size, self.mlp_ratio)


def swiglu_size(hidden_size: int, mlp_ratio: float) -> int:
    """Return the hidden size of a SwiGLU perceptron in a network of a width, for a nominal ratio."""
    return int(int(hidden_size * mlp_ratio) * 2 / 3)


@dataclass(frozen=True)
class LossConfig:
    """The space of the error and its weight over time (eq. 5)."""

    space: LossSpace = "v"
    """Space in which the error is measured, independent of the prediction; any prediction's name."""
    weighting: Weighting = "matched"
    """Weight over time: published is the authors'; matched, min_snr and uncertainty are equal for all predictions."""
    t_eps: float = 0.05
    """Smallest denominator of a readout (eq. 3) in the loss."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "space", canonical_prediction(self.space))
        # A loss divides by max(1 - t, t_eps), so t_eps is not 0 here.
        require_ranges(self)


@dataclass(frozen=True)
class TimestepConfig:
    """The distribution of training times (eq. 6)."""

    distribution: TimeDistribution = "logit_normal"
    """Distribution of training times (eq. 6); half_cauchy counts errors as sampling does (eq. 14)."""
    P_mean: float = -0.8
    """Mean of logit(t) in the logit-normal distribution."""
    P_std: float = 0.8
    """Standard deviation of logit(t)."""
    shift: float = 1.0
    """a in t -> t / (t + a (1 - t)), applied to the training times; 1 is no shift."""

    def __post_init__(self) -> None:
        require_ranges(self)


SAMPLERS: dict[NamedSampler, dict[str, Any]] = {
    "published": {"solver": "heun", "steps": 50, "shift": 1.0, "grid": ()},
    "fast": {"solver": "dpmpp_2m", "steps": 16, "shift": 1.0, "grid": ()},
}
"""Named settings of the sampler: the published one (eq. 8), and one of few steps (docs/photographs.md)."""


@dataclass(frozen=True)
class SampleConfig:
    """Settings of the sampler."""

    num: int = 64
    """Number of images."""
    solver: Solver = "heun"
    """ODE solver: euler, heun (eq. 8), midpoint, dpmpp_2m (few steps) or ancestral (new noise at every step)."""
    steps: int = 50
    """Steps of the solver from noise to data."""
    shift: float = 1.0
    """a in t -> t / (t + a (1 - t)), applied to the times of the steps; 1 is uniform."""
    grid: tuple[float, ...] = ()
    """Explicit times that rise from 0 to 1, instead of --steps and --shift."""
    cfg_scale: float = 1.0
    """Guidance scale w (eq. 7); 1 is none."""
    cfg_interval: tuple[float, float] = (0.0, 1.0)
    """Guidance interval: low and high time (eq. 7)."""
    autoguide: str = ""
    """Run or checkpoint folder of a weaker network that replaces the null class in guidance (autoguidance)."""
    autoguide_ema: str = ""
    """Weights of the weaker network, as for --ema. Without --autoguide, they are weights of the same checkpoint."""
    t_eps: float = 0.0
    """Smallest denominator of the readout (eq. 3); the published 0.05 leaves noise in the images."""
    labels: str = "equal"
    """Labels: equal counts, random, or a list that repeats: 3,7 or cat,dog (no commas in names)."""
    seed: int = 0
    """Seed of the noise and of random labels."""
    ema: str = ""
    """Weights: an EMA decay (0.9999), a length to rebuild (sigma_rel=0.07), or none. Default: the first EMA."""
    decoder: str | None = None
    """Decoder: flux2 or taef2, which share a latent space, or NAME:PLACE. Default: the autoencoder of the latents."""
    batch_size: int = 256
    """Images generated at a time."""
    precision: InferencePrecision = "float32"
    """Precision of the network; bfloat16 is autocast."""
    compile: bool = False
    """torch.compile the network: faster for many images; needs a C++ compiler on a CPU."""
    sampler: InitVar[NamedSampler | None] = None
    """Solver and steps: published (50-step Heun) or fast."""

    def __post_init__(self, sampler: NamedSampler | None) -> None:
        # Only the settings are kept, so that a protocol is the same for both ways to write them.
        for key, value in (SAMPLERS[sampler] if sampler else {}).items():
            object.__setattr__(self, key, value)
        require_ranges(self)
        low, high = self.cfg_interval
        if self.grid:
            rising = all(t < t_next for t, t_next in pairwise(self.grid))
            _require(
                len(self.grid) > 1 and rising and (self.grid[0], self.grid[-1]) == (0, 1),
                f"grid must rise from 0 to 1, not {self.grid}.",
            )
            _require(self.shift == 1, "An explicit grid is not shifted: leave shift at 1.")
            # A protocol records the steps too, so they follow from the grid.
            object.__setattr__(self, "steps", len(self.grid) - 1)
        _require(0 <= low < high <= 1, f"cfg_interval must satisfy 0 <= low < high <= 1, not {low} {high}.")

    @property
    def autoguided(self) -> bool:
        """Whether a weaker network guides instead of the null class."""
        return bool(self.autoguide or self.autoguide_ema)


@dataclass(frozen=True)
class EvaluationConfig:
    """Settings of sample grids and evaluations during training."""

    sample: SampleConfig = field(default_factory=lambda: SampleConfig(num=1000))
    """Settings of the sampler."""
    reference: str = ""
    """Real images, or an .npz of their statistics. Default: the images that the latents were encoded from."""
    features: str = "digits"
    """Feature extractor: digits, squeezenet, inception (on which FID is defined) or dinov2."""
    features_path: str = ""
    """Weights: a file, or for dinov2 a folder or Hub id. Default: downloaded ones; squeezenet has no default."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up, then a constant learning rate or half a cosine down to zero at the last step."""

    learning_rate: float = 2e-4
    """Learning rate after the warm-up."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decays of AdamW's moments."""
    weight_decay: float = 0.0
    """Weight decay of AdamW."""
    decayed: Literal["matrices", "all"] = "matrices"
    """Parameters that weight decay acts on: matrices of linear layers, or all (biases, scales and embeddings too)."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate after the warm-up: constant, or half a cosine down to zero at the last step."""
    warmup_steps: int | None = None
    """Warm-up in steps; None is no warm-up."""
    warmup_epochs: float | None = None
    """Warm-up in epochs of the latent store, instead of warmup_steps."""
    grad_clip: float = 1.0
    """Largest norm of the gradient; larger gradients are scaled down to it."""

    def __post_init__(self) -> None:
        require_ranges(self)
        _require(
            self.warmup_steps is None or self.warmup_epochs is None,
            "The warm-up is in steps or in epochs: set the other one to None, as in --optimizer.warmup-epochs None.",
        )


@dataclass(frozen=True)
class TrainConfig:
    """The settings of one training run."""

    name: str
    """Name of the system; it follows from prediction, size and patch."""
    prediction: Prediction
    """What the network outputs: x, eps, v, edm, skip=S (from x to edm and beyond) or mix=R (x - R eps)."""
    network: NetworkConfig
    """The transformer."""
    loss: LossConfig = field(default_factory=LossConfig)
    """The loss (eq. 5)."""
    timesteps: TimestepConfig = field(default_factory=TimestepConfig)
    """The distribution of training times (eq. 6)."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW and its learning rate."""
    noise_scale: float = 1.0
    """Standard deviation s of the noise (eq. 1)."""
    batch_size: int = 1024
    """Global batch: samples per update over all processes, micro_batch_size * accumulation * processes."""
    steps: int = 250_000
    """Length of the training in updates."""
    epochs: float = 0.0
    """Length in epochs of the latent store, which replaces steps; 0 keeps steps."""
    label_dropout: float = 0.1
    """Share of labels that the null class replaces, for guidance."""
    flips: bool = False
    """Train on stored mirror images too, chosen at random for each sample."""
    ema: tuple[float, ...] = (0.9999, 0.9996)
    """Decays of the exponential moving averages of the weights."""
    power_ema: tuple[float, ...] = (0.05, 0.1)
    """Relative widths sigma_rel of power-function averages (Karras et al. 2024); snapshots of them yield any other."""
    seed: int = 0
    """Seed of the initial weights, the sample order, the noise and the times."""
    precision: Precision = "bfloat16"
    """bfloat16 is autocast: weights, optimiser and EMA stay in float32. tf32 is float32 with a GPU's fast products."""
    init_from: str = ""
    """Run or checkpoint folder of the initial weights; other class counts and grids are adapted."""
    init_ema: str = ""
    """Weights of --init-from: an EMA, or none for the raw ones. Default: its first EMA."""
    max_skipped: int = 10
    """Consecutive updates that may be skipped for a loss or gradient that is not finite, before the run ends."""
    micro_batch_size: int = 0
    """Samples per process in one forward pass; 0 follows from the other numbers."""
    accumulation: int = 0
    """Micro-batches whose gradients make one update; 0 follows from the other numbers."""
    parallel: Parallel = "ddp"
    """Data parallelism: with ddp each process holds the whole state, with fsdp a part of it (large networks)."""
    compile: bool = False
    """torch.compile the network; needs a C++ compiler on a CPU."""
    gradient_checkpointing: bool = False
    """Recompute each block in the backward pass: less memory, about a third more compute."""
    log_every: int = 100
    """Steps between lines of the log."""
    checkpoint_every: int = 10_000
    """Steps between checkpoints."""
    keep_last: int = 3
    """Newest checkpoints that are kept; 0 keeps all."""
    keep_every: int = 0
    """Also keep checkpoints at multiples of this step; 0 keeps none of them."""
    snapshot_every: int = 10_000
    """Steps between snapshots of the power-function averages."""
    sample_every: int = 0
    """Steps between sample grids of the same noise and labels; 0 draws them with checkpoints where that is cheap."""
    evaluate_every: int = 0
    """Steps between evaluations; 0 makes none."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Settings of sample grids and evaluations during training."""
    tensorboard: bool = False
    """Also write the log for TensorBoard, into RUN/tensorboard."""
    wandb: Literal["off", "online", "offline"] = "off"
    """Send the log to Weights & Biases, or write it into RUN/wandb for later."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "prediction", canonical_prediction(self.prediction))
        require_ranges(self)
        for name in ("ema", "power_ema"):
            values = getattr(self, name)
            _require(len(set(values)) == len(values), f"{name} names an average twice: {values}.")


def in_steps(config: TrainConfig, images: int) -> TrainConfig:
    """Return the run with its length and warm-up in steps, where they are in epochs of `images` samples."""
    optimizer, per_epoch = config.optimizer, images / config.batch_size
    if optimizer.warmup_epochs is not None:
        warmup = round(optimizer.warmup_epochs * per_epoch)
        optimizer = dataclasses.replace(optimizer, warmup_steps=warmup, warmup_epochs=None)
    steps = max(1, round(config.epochs * per_epoch)) if config.epochs else config.steps
    return dataclasses.replace(config, optimizer=optimizer, steps=steps, epochs=0.0)
