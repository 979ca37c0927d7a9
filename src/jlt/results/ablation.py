"""`ablation.json`: the matched systems, what was expected of them, and what was found equal between their runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from jlt.config import LossSpace, Prediction
from jlt.results.files import ResultFile
from jlt.results.geometry import SettingForecast
from jlt.storage.codec import NonNegative, Size


@dataclass(frozen=True, kw_only=True)
class SystemRun:
    """One run of an ablation: its point on every axis, and its folder."""

    name: str
    prediction: Prediction
    loss_space: LossSpace
    patch_size: Size
    variant: str = ""
    """The point on the axes that `name` does not show, as text; empty where there is no such axis."""
    anisotropy: float | None = None
    width: Size | None = None
    seed: int
    run: str
    """Relative to the folder of the ablation."""


@dataclass(frozen=True)
class Matched:
    """What was found equal in the finished runs, and the settings in which they differ."""

    checked: tuple[str, ...]
    differs: tuple[str, ...]
    initial_weights: Mapping[str, str]
    """SHA-256 by the name of the run's folder."""
    draws: Mapping[str, str]
    """SHA-256 of sample order, noise seeds, times and label drops, by the name of the run's folder."""


@dataclass(frozen=True, kw_only=True)
class Ablation(ResultFile):
    """The `ablation.json` of a folder; `seconds` and `matched` are None until all runs have ended."""

    FILE: ClassVar[str] = "ablation.json"
    SCHEMA: ClassVar[int] = 2

    command: str = ""
    """The command that repeats it."""
    title: str
    recipe: str
    created: str
    machine: Mapping[str, Any]
    latents: Mapping[str, Any]
    autoencoder_psnr: float | None
    classifier_accuracy: float | None
    systems: tuple[SystemRun, ...]
    forecasts: tuple[SettingForecast, ...] = ()
    seconds: NonNegative | None = None
    """Training time of all runs."""
    matched: Matched | None = None
