"""`price.json`: how few evaluations of the network reach the distance of the published sampler."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from jlt.config import Solver
from jlt.errors import JLTError
from jlt.results.evaluation import Metrics
from jlt.results.sweep import SearchResult
from jlt.storage.codec import NonNegative, Size


@dataclass(frozen=True)
class SamplerSetting:
    """A way to walk from noise to data, and when guidance acts on it."""

    solver: Solver
    steps: Size
    shift: float
    cfg_interval: tuple[float, float]

    @property
    def name(self) -> str:
        """A name for files and progress lines."""
        low, high = self.cfg_interval
        return f"{self.solver}-{self.steps}-shift{self.shift:.6g}-from{low:.6g}to{high:.6g}"


@dataclass(frozen=True)
class Priced(SamplerSetting):
    """One measurement of a setting, against the published sampler on the same noise."""

    evaluations: Size
    """Evaluations of the network per image, both branches of guidance counted."""
    value: NonNegative
    """Frechet distance."""
    error: NonNegative | None
    difference: float
    """The distance minus that of the published sampler."""
    difference_error: NonNegative | None
    """Standard error of the difference; smaller than that of a distance, since both start from the same noise."""
    within: bool
    """Whether the difference is at most the standard error of the published sampler's distance."""
    metrics: Metrics
    protocol: Mapping[str, Any]
    seconds: NonNegative | None = None
    """Seconds per image without decoding; measured for confirmed settings alone."""

    @property
    def setting(self) -> SamplerSetting:
        """The setting, without the measurement."""
        return SamplerSetting(self.solver, self.steps, self.shift, self.cfg_interval)


@dataclass(frozen=True)
class Price(SearchResult):
    """The `price.json` of a folder."""

    FILE: ClassVar[str] = "price.json"
    SCHEMA: ClassVar[int] = 1

    cfg_scale: float
    num: Size
    seed: int
    """Seed of the images of the search."""
    confirm_seed: int
    points: tuple[Priced, ...]
    """The published sampler first, then the others, the cheapest first."""
    choice: SamplerSetting | None
    """The cheapest setting within the error; None if there is none."""
    confirmed: tuple[Priced, ...]
    """The published sampler and the choice, on images of the other seed; empty without a choice."""
    reproduce: str
    """The command that measures the choice, or else the published sampler, again."""

    def __post_init__(self) -> None:
        if not self.points or len(self.confirmed) != (2 if self.choice else 0):
            raise JLTError("a price has points, and two confirmed settings if one was chosen.")
