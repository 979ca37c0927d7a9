"""The ranges of numbers: one table of those that a user can set, by their names, and the one error for all.

Numbers that only files hold are annotated with a range where their field is declared (`jlt.storage.codec`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from jlt.errors import UsageError

MAX_SIGMA_REL = 0.28
"""Just below 12**-0.5, the relative width of a plain average over all of training."""


@dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high`; `above` excludes the lower end, `below` the upper one. NaN is in no range."""

    low: float
    high: float = math.inf
    above: bool = False
    below: bool = False

    def __contains__(self, value: float) -> bool:
        from_low = self.low < value if self.above else self.low <= value
        return from_low and (value < self.high if self.below else value <= self.high)

    def __str__(self) -> str:
        low, high = (f"{end:,}" if isinstance(end, int) else f"{end:g}" for end in (self.low, self.high))
        if self.high == math.inf:
            return f"above {low}" if self.above else f"{low} or more"
        to = f"{'and' if self.above else 'to'} below" if self.below else "and at most" if self.above else "to"
        return f"{'above' if self.above else 'from'} {low} {to} {high}"


class RangeError(UsageError):
    """A number outside the range of its setting, which `name` names."""

    def __init__(self, name: str, values: Range, found: float) -> None:
        # All arguments go to the base class, so that the error can be pickled in a worker process.
        super().__init__(name, values, found)
        self.name, self.values, self.found = name, values, found

    def __str__(self) -> str:
        found = f"{self.found:,}" if isinstance(self.found, int) else f"{self.found:g}"
        return f"{self.name} must be {self.values}, not {found}."


_POSITIVE = Range(0, 1_000, above=True)
_NONNEGATIVE = Range(0, 1_000)
_SHARE = Range(0, 1, below=True)
_OPEN_SHARE = Range(0, 1, above=True, below=True)
_SEED = Range(0, 2**63 - 2)
_BATCH = Range(1, 2**20)
_BATCH_OR_NONE = Range(0, 2**20)
_STEPS = Range(1, 10**9)
_STEPS_OR_NONE = Range(0, 10**9)
_COUNT = Range(1, 10**7)
_COUNT_OR_NONE = Range(0, 10**7)
_SIZE = Range(1, 2**16)
_SIZE_OR_NONE = Range(0, 2**16)

RANGES: Mapping[str, Range] = {
    # Networks
    **dict.fromkeys(("channels", "height", "width", "patch_size", "hidden_size", "num_heads"), _SIZE),
    **dict.fromkeys(("bottleneck_size", "context_tokens", "context_start"), _SIZE_OR_NONE),
    "num_classes": Range(1, 10**6),
    "depth": Range(1, 2**12),
    "mlp_ratio": Range(0, 64, above=True),
    # Training
    "learning_rate": _POSITIVE,
    "betas": _SHARE,
    "weight_decay": _NONNEGATIVE,
    "grad_clip": Range(0, 10**12, above=True),
    "warmup_steps": _STEPS_OR_NONE,
    **dict.fromkeys(("epochs", "warmup_epochs"), Range(0, 10**6)),
    "P_mean": Range(-100, 100),
    "P_std": Range(0, 100, above=True),
    "label_dropout": _SHARE,
    "ema": _OPEN_SHARE,
    "power_ema": Range(0, MAX_SIGMA_REL, above=True, below=True),
    "max_skipped": Range(1, 10**6),
    **dict.fromkeys(("TrainConfig.steps", "Quickstart.steps", "TrainBenchmark.steps"), _STEPS),
    **dict.fromkeys(("log_every", "checkpoint_every", "snapshot_every"), _STEPS),
    **dict.fromkeys(("keep_last", "keep_every", "sample_every", "evaluate_every", "loop_steps"), _STEPS_OR_NONE),
    "TrainConfig.accumulation": _BATCH_OR_NONE,
    **dict.fromkeys(("batch_size", "accumulation"), _BATCH),
    "micro_batch_size": _BATCH_OR_NONE,
    # Sampling and evaluation
    **dict.fromkeys(("num", "coarse_num"), _COUNT),
    # Errors of means need several latents.
    **dict.fromkeys(("Analyze.num", "Networks.num"), Range(2, 10**7)),
    "samples": _COUNT_OR_NONE,
    "steps": Range(1, 10_000),
    "shift": Range(0, 10**6, above=True),
    **dict.fromkeys(("grid", "cfg_interval"), Range(0, 1)),
    "cfg_scale": _NONNEGATIVE,
    "t_eps": _SHARE,
    "LossConfig.t_eps": _OPEN_SHARE,
    "noise_scale": _POSITIVE,
    **dict.fromkeys(("seed", "seeds", "confirm_seed"), _SEED),
    "confirm": Range(1, 100),
    "refine": Range(0, 10),
    "evaluations": Range(1, 10_000),
    "max_evaluations": Range(1, 10**6),
    "anisotropy": Range(0, 3),
    # Images, latents and machines
    "resolution": Range(1, 4096),
    "shard_size": Range(1, 10**8),
    "threads": Range(1, 1024),
    "workers": Range(1, 1024),
    "EncodeConfig.workers": Range(0, 1024),
    "count": Range(2, 10**6),
    "seconds": Range(0, 3600, above=True),
    "gpus": Range(1, 10**6),
    "mfu": Range(0, 1, above=True),
    "port": Range(1, 65535),
}
"""By the name of a setting, or by CLASS.NAME where a class has a range of its own."""


@functools.cache
def ranges_of(kind: type) -> Mapping[str, Range]:
    """Return the ranges of the settings of a data class, by name."""
    found = {}
    for name in (entry.name for entry in dataclasses.fields(kind)):
        keys = [*(f"{ancestor.__name__}.{name}" for ancestor in kind.__mro__), name]
        if (key := next((key for key in keys if key in RANGES), None)) is not None:
            found[name] = RANGES[key]
    return found


def require_ranges(settings: Any) -> None:
    """Raise RangeError for the first number of a data class that is outside the range of its setting."""
    for name, values in ranges_of(cast(Any, type(settings))).items():
        value = getattr(settings, name)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int | float) and number not in values:
                raise RangeError(name, values, number)


class Ranged:
    """The base of data classes whose numbers are compared with their ranges when an object is made."""

    def __post_init__(self) -> None:
        require_ranges(self)
