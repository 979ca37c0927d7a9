"""What `jlt analyze` writes: geometry.json of the latents, and inside.json of the networks that learnt them.

Variances are in units of the noise's. Lists over directions run from the largest eigenvalue to the smallest, tables
have a row for each time. d is the dimension of a token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

from jlt.config import (
    ADDED_LATER,
    PREDICTIONS,
    LossSpace,
    Prediction,
    TimestepConfig,
    TrainConfig,
    Weighting,
    canonical_prediction,
)
from jlt.errors import UsageError
from jlt.ranges import require_ranges
from jlt.results.files import ResultFile
from jlt.storage.codec import Count, NonNegative, Size

GEOMETRY = "geometry.json"
INSIDE = "inside.json"

Values = tuple[float, ...]
Table = tuple[Values, ...]
Outcome = str
"""The prediction that is expected to win; even: x and v need about as much; undecided: the model is not sure."""
CautionKind = Literal[
    "constant_channels", "one_class", "few_for_classes", "few_latents", "few_tokens", "large_errors",
    "constant_directions", "few_for_frequencies",
]  # fmt: skip


@dataclass(frozen=True)
class TrainingModel:
    """The times, the loss (t_eps = 0 is eq. 13 as it stands) and the noise of the training to forecast."""

    timesteps: TimestepConfig
    t_eps: float
    loss_space: LossSpace = "v"
    noise_scale: float = 1.0
    """Standard deviation of the noise, in whose units spectra are."""
    weighting: Weighting = field(default="matched", metadata=ADDED_LATER)
    further: tuple[Prediction, ...] = field(default=(), metadata=ADDED_LATER)
    """Predictions to forecast in addition to x, eps and v."""

    @classmethod
    def of(cls, train: TrainConfig, further: tuple[Prediction, ...] = ()) -> TrainingModel:
        """Return the model of a run; a loss that is published, or weighted by uncertainty, is taken as matched."""
        weighting: Weighting = "min_snr" if train.loss.weighting == "min_snr" else "matched"
        return cls(train.timesteps, train.loss.t_eps, train.loss.space, train.noise_scale, weighting, further)

    @property
    def predictions(self) -> tuple[Prediction, ...]:
        """All predictions to forecast."""
        return (*PREDICTIONS, *self.further)

    def __post_init__(self) -> None:
        require_ranges(self)
        # x, eps and v are always there, and a prediction has one name.
        further = dict.fromkeys(map(canonical_prediction, self.further))
        object.__setattr__(self, "further", tuple(name for name in further if name not in PREDICTIONS))
        object.__setattr__(self, "loss_space", canonical_prediction(self.loss_space))
        if not 0 <= self.t_eps < 0.5 or (self.t_eps == 0 and self.timesteps.distribution != "logit_normal"):
            raise UsageError(
                "t_eps must be in [0, 0.5), and above 0 for times that are not logit-normal: without a clamp the risk "
                "of a clean prediction has no mean there."
            )


@dataclass(frozen=True)
class Advice:
    """What a forecast means for networks of one width: the directions needed as shares of it, and the loss floor."""

    width: Size
    width_share: dict[Prediction, float]
    loss_floor: dict[Prediction, float]
    """The training loss, a mean over elements, does not fall below it: the last layer is narrower than a token."""
    words: str = ""
    """The advice as text, in files of earlier versions only."""


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """How many directions each prediction needs for the same error (eq. 13), and which one is expected to win."""

    order: tuple[Prediction, ...]
    """From the prediction that needs the fewest directions."""
    margin: float
    """Directions that the second needs more than the first, as a share of d."""
    clean_over_velocity: float
    """Directions that velocity needs more than the clean latent, as a share of d."""
    call: Outcome
    outcome: Outcome
    """The outcome by the numbers alone, without regard to the confidence."""
    confidence: float
    """Share of the variations of the model with this outcome."""
    sphericity: float
    stated_share: float
    needed: dict[str, dict[Prediction, float]]
    """Directions needed, by the share of the unavoidable risk that the excess risk is allowed to be."""
    advice: tuple[Advice, ...]

    @property
    def needed_directions(self) -> dict[Prediction, float]:
        """Directions needed at the stated share."""
        return self.needed[f"{self.stated_share:g}"]


@dataclass(frozen=True, kw_only=True)
class TokenForecast(Forecast):
    """A forecast with the capacity curves behind it."""

    unavoidable_risk: float
    ranks: tuple[int, ...]
    curves: dict[Prediction, Values]
    """Excess risk by rank; in `curves_one_subspace` for directions that are the same at all times."""
    curves_one_subspace: dict[Prediction, Values]
    needed_by_estimate: dict[str, dict[Prediction, float]]
    """Directions needed at the stated share, by estimate of the covariance."""
    enough: bool
    variations: int
    skip: NonNegative | None = None
    """The s of `skip=S` that needs the fewest directions at the stated share, 0 for x; None in older files."""
    skip_directions: NonNegative | None = None
    """How many it needs."""


@dataclass(frozen=True, kw_only=True)
class SettingForecast(Forecast):
    """A forecast for the systems of an ablation that share all but the prediction and the seed."""

    variant: str
    anisotropy: float | None
    """The power that eigenvalues are raised to, where it is an axis of the ablation."""
    patch_size: Size
    loss_space: LossSpace
    width: Size
    dimension: Size
    before_training: bool

    @classmethod
    def of(cls, forecast: Forecast, **setting: Any) -> SettingForecast:
        """Return the part of a forecast that an ablation keeps, with the fields of its setting."""
        return cls(**{entry.name: getattr(forecast, entry.name) for entry in fields(Forecast)}, **setting)

    @property
    def setting(self) -> tuple[str, int, LossSpace]:
        """Variant, patch size and loss space of the systems that it is for."""
        return self.variant, self.patch_size, self.loss_space


@dataclass(frozen=True)
class ShareBelow:
    """The directions whose variance is below a threshold, and their share of the total variance (0 to 1)."""

    directions: Count
    variance_share: float


@dataclass(frozen=True, kw_only=True)
class SpectrumSummary:
    """A spectrum in a few numbers, None where it is not known whole or nothing varies."""

    effective_rank: float | None = None
    """exp of the entropy of lam / sum(lam) (Roy and Vetterli 2007)."""
    participation_ratio: float | None = None
    """sum(lam)^2 / sum(lam^2)."""
    anisotropy: float | None = None
    """Largest over smallest eigenvalue; None (infinite) where the smallest is 0 to the rounding of latents."""
    sphericity: float | None = None
    """Geometric over arithmetic mean of the eigenvalues (Mauchly 1940); 1 is isotropic, 0 degenerate."""
    share_below: dict[str, ShareBelow] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class LocalSpectrum(SpectrumSummary):
    """The spectrum of tokens within classes, or within neighbourhoods."""

    eigenvalues: Values
    variance_share: float
    """Of the variance of all tokens."""
    relative_sampling_errors: Values


@dataclass(frozen=True, kw_only=True)
class TokenGeometry(SpectrumSummary):
    """The tokens of one patch size: their spectrum, eq. 9-12 on it, and the forecast."""

    patch_size: Size
    dimension: Size
    count: Size
    images: int
    independent_samples: float
    """Independent samples that would give errors as large, since the tokens of a latent depend on each other."""
    relative_sampling_error: float
    """The median over directions with variance of `relative_sampling_errors`."""
    relative_sampling_errors: Values
    mean: Values
    eigenvalues: Values
    excess_kurtosis: Values
    excess_kurtosis_error: Values
    sample: int
    """Latents that the errors, the kurtosis and the neighbourhoods were estimated from."""
    channel_variance: Values
    local: dict[str, LocalSpectrum]
    target_variance: dict[Prediction, Values]
    directions: tuple[int, ...]
    """Indices of the eigenvalues that the following tables have columns for."""
    coefficient: dict[Prediction, Table]
    conditional_variance: dict[Prediction, Table]
    explained_power: dict[Prediction, Table]
    forecast: TokenForecast


@dataclass(frozen=True, kw_only=True)
class StationarySpectrum(SpectrumSummary):
    """The eigenvalues of whole latents by spatial frequency, at some ranks."""

    ranks: tuple[int, ...]
    eigenvalues: Values
    relative_sampling_error: float


@dataclass(frozen=True)
class StationaryGeometry:
    """Whole latents, as if their positions were a torus on which none is special."""

    dimension: Size
    spectra: dict[str, StationarySpectrum]


@dataclass(frozen=True, kw_only=True)
class WholeGeometry(SpectrumSummary):
    """The leading directions of whole latents, and the variance of all others together."""

    method: Literal["exact", "gram", "sketch"]
    dimension: Size
    eigenvalues: Values
    variance: float
    tail_variance: float
    relative_sampling_error: float


@dataclass(frozen=True)
class Caution:
    """A reason to trust a geometry less, with the numbers behind it."""

    kind: CautionKind
    numbers: Mapping[str, float] = field(default_factory=dict)
    channels: tuple[int, ...] = ()


@dataclass(frozen=True)
class Geometry(ResultFile):
    """geometry.json: the target geometry of latents, and the forecast for one training and some widths."""

    SCHEMA: ClassVar[int] = 3

    latents: dict[str, Any]
    patch_sizes: tuple[int, ...]
    widths: tuple[int, ...]
    training: TrainingModel
    times: Values
    tokens: dict[int, TokenGeometry]
    """By patch size."""
    stationary: StationaryGeometry
    whole: WholeGeometry
    cautions: tuple[Caution, ...] = ()
    warnings: tuple[str, ...] = ()
    """The cautions as text, in files of earlier versions only."""


@dataclass(frozen=True)
class Band:
    """The velocity error of a network at every time, summed over directions with a variance from `low` up to `high`."""

    directions: Count
    error: Values
    beyond_optimum: Values
    """The part above what a token by itself leaves unknown (eq. 11)."""
    low: float = 0.0
    high: float | None = None
    """None is infinite."""
    name: str = ""
    """The range as text, in files of earlier versions only."""


@dataclass(frozen=True)
class SampleSpectrum:
    """The variance of a network's samples, and of the states on the way to them, over that of the data's own path."""

    count: Size
    steps: Size
    """Of the Heun solver, without guidance."""
    times: Values
    spread: Table
    """By time and direction; the row of the last time, 1, is that of the samples."""
    by_frequency: Values
    """Of the samples, by whole cycles per latent."""


@dataclass(frozen=True)
class DecoderSensitivity:
    """The mean squared change of a pixel (-1 to 1) per unit of variance along some directions in every token."""

    directions: tuple[int, ...]
    """Indices of the eigenvalues."""
    change: Values


@dataclass(frozen=True)
class NetworkError:
    """The squared velocity error of a trained network, by time and direction."""

    name: str
    run: str
    step: Count
    prediction: Prediction
    checkpoint: str
    """SHA-256 of its manifest."""
    ema: str
    error: Table
    standard_error: Table
    bands: tuple[Band, ...]
    ema_rebuilt: dict[str, Any] = field(default_factory=dict)
    """How a post-hoc EMA was combined."""
    calibration: Table = ()
    """Cov(v^, v) / Var(v^): 1 for a conditional mean, above 1 where outputs are too small, below 1 where they err."""
    samples: SampleSpectrum | None = None


@dataclass(frozen=True)
class ErrorDifference:
    """The error of a network less that of the first on the same noise, with its standard error."""

    difference: Table
    error: Table


@dataclass(frozen=True)
class ErrorByDirection(ResultFile):
    """inside.json: the velocity error of networks by direction of the tokens and by time, on `count` latents."""

    SCHEMA: ClassVar[int] = 1

    patch_size: Size
    latents: dict[str, Any]
    count: Size
    seed: int
    times: Values
    eigenvalues: Values
    optimum: Table
    """What a token by itself leaves unknown (eq. 11); in `whole_optimum` a whole latent as one Gaussian."""
    whole_optimum: Table
    whole_estimate: Literal["exact", "stationary"]
    networks: tuple[NetworkError, ...]
    beyond_the_first: tuple[ErrorDifference, ...]
    decoder: DecoderSensitivity | None = None
