"""`sweep.json`: the stages of a search over guidance and averages of the weights, the choice and its confirmation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from jlt.config import Metric
from jlt.errors import JLTError
from jlt.results.evaluation import Metrics
from jlt.results.files import ResultFile
from jlt.storage.codec import Count, NonNegative, Size

WHOLE_INTERVAL = (0.0, 1.0)


@dataclass(frozen=True)
class Setting:
    """A point of the grid."""

    cfg_scale: float
    cfg_interval: tuple[float, float]
    ema: str

    @property
    def name(self) -> str:
        """A name for files and progress lines."""
        low, high = self.cfg_interval
        return f"{self.ema}-cfg{self.cfg_scale:.6g}-from{low:.6g}to{high:.6g}"

    @property
    def guided(self) -> bool:
        """Whether guidance has any effect."""
        return self.cfg_scale != 1

    def on_line(self, cfg_interval: tuple[float, float], ema: str) -> bool:
        """Whether it has this average and, unless it is unguided, this interval."""
        return self.ema == ema and (not self.guided or self.cfg_interval == cfg_interval)


@dataclass(frozen=True)
class Behind:
    """By how much a measurement is worse than the best of its stage, with the standard error of the difference."""

    difference: float
    error: NonNegative | None


@dataclass(frozen=True)
class SweepPoint(Setting):
    """One measurement of a setting; `value` is the metric that is searched by."""

    num: Size
    seed: int
    value: float
    error: NonNegative | None
    behind: Behind | None
    metrics: Metrics
    protocol: Mapping[str, Any] | None = None
    """None in the `choice`, which a stage holds too."""

    @property
    def setting(self) -> Setting:
        """The point of the grid, without the measurement."""
        return Setting(self.cfg_scale, self.cfg_interval, self.ema)


@dataclass(frozen=True)
class SweepStage:
    """Measurements with equal counts of images, best first, and how many of them went on."""

    name: Literal["coarse", "halving", "refinement"]
    num: Size
    kept: Size
    points: tuple[SweepPoint, ...]


@dataclass(frozen=True)
class SweptCheckpoint:
    """What was sampled."""

    step: Count
    sha256: str


@dataclass(frozen=True)
class SweepAxes:
    """The grid."""

    cfg_scale: tuple[float, ...]
    cfg_interval: tuple[tuple[float, float], ...]
    ema: tuple[str, ...]


@dataclass(frozen=True)
class SearchImages:
    """The images that settings were chosen by: their seed, and how many in the first and in the last stage."""

    seed: int
    coarse_num: Size
    num: Size


@dataclass(frozen=True)
class ConfirmationImages:
    """The images of another seed that give the reported numbers."""

    seed: int
    num: Size


@dataclass(frozen=True)
class SearchResult(ResultFile):
    """What every search over settings of one checkpoint states of itself."""

    created: str
    command: str
    machine: Mapping[str, Any]
    latents: Mapping[str, Any]
    title: str
    checkpoint: SweptCheckpoint


@dataclass(frozen=True)
class Sweep(SearchResult):
    """The `sweep.json` of a folder."""

    FILE: ClassVar[str] = "sweep.json"
    SCHEMA: ClassVar[int] = 2
    UNREAD: ClassVar[frozenset[str]] = frozenset({"rule"})

    metric: Metric
    lower_is_better: bool
    axes: SweepAxes
    search: SearchImages
    confirmation: ConfirmationImages
    choice: SweepPoint
    confirmed: tuple[SweepPoint, ...]
    """The choice first, then the settings that the search could not distinguish from it."""
    stages: tuple[SweepStage, ...]
    reproduce: str
    """The command that measures the confirmed number again."""
    growth: int = 2
    """By how much the images of a setting grow from stage to stage."""
    errors: float = 2.0
    """A setting is clearly worse if the difference exceeds this many of its standard errors."""

    def __post_init__(self) -> None:
        if not (self.confirmed and self.stages and all(stage.points for stage in self.stages)):
            raise JLTError("a sweep has a stage, points in every stage, and a confirmed setting.")
