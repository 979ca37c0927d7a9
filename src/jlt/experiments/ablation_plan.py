"""What an ablation compares: its axes, and the runs that follow from them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from jlt.config import (
    LossSpace,
    Prediction,
    SampleConfig,
    TimeDistribution,
    TrainConfig,
    Weighting,
    canonical_prediction,
)
from jlt.errors import UsageError
from jlt.experiments.recipes import vary
from jlt.ranges import Ranged


@dataclass(frozen=True, kw_only=True)
class AblationAxes(Ranged):
    """The axes of an ablation; they may get more points when it is run again."""

    prediction: tuple[Prediction, ...] = ("x", "v")
    """Axis: x, eps, v, edm, skip=S or mix=R."""
    loss_space: tuple[LossSpace, ...] = ("v",)
    """Axis: spaces of the loss."""
    patch_size: tuple[int, ...] = ()
    """Axis: patch sizes. Default: that of the recipe."""
    seed: tuple[int, ...] = (0,)
    """Axis: seeds of the training."""
    anisotropy: tuple[float, ...] = ()
    """Axis: coordinates in which eigenvalues are raised to these powers; 0 is whitened, 1 is unchanged."""
    width: tuple[int, ...] = ()
    """Axis: network widths. Default: the recipe's."""
    weighting: tuple[Weighting, ...] = ()
    """Axis: weights over time. Default: the recipe's."""
    times: tuple[TimeDistribution, ...] = ()
    """Axis: training times. Default: the recipe's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for axis in ("prediction", "loss_space"):
            object.__setattr__(self, axis, tuple(map(canonical_prediction, getattr(self, axis))))
        for axis in sorted(GROWING):
            points = getattr(self, axis)
            # As in the names of folders.
            names = {f"{point:g}" if isinstance(point, float) else point for point in points}
            if not (points or axis in OPTIONAL or axis == "patch_size") or len(names) < len(points):
                raise UsageError(f"{axis.replace('_', ' ')} needs one value or more, each of them once.")


OPTIONAL = {"anisotropy": "a", "width": "w", "weighting": "", "times": ""}
"""Axes that may have no points, with what stands before one in the name of a run's folder."""
GROWING = {axis.name for axis in fields(AblationAxes)}


@dataclass(frozen=True, kw_only=True)
class AblationConfig(AblationAxes):
    """Which systems are compared, and how they are measured."""

    train: TrainConfig
    sample: SampleConfig
    evaluations: int
    """Points of each training curve; the last is the end of the training."""
    extractor: str
    features_path: str = ""
    """Where the extractor's weights are, if not in the usual place."""
    reference: str = ""
    """Real images, or an .npz of their statistics; empty takes the images that the store was made from."""
    title: str
    recipe: str

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.patch_size:
            object.__setattr__(self, "patch_size", (self.train.network.patch_size,))
        if self.train.sample_every or self.train.evaluate_every:
            raise UsageError("An ablation evaluates its runs itself: set --evaluations instead.")

    def reference_path(self, out: Path) -> Path:
        """Return the file of the reference statistics, which may have to be measured first."""
        return Path(self.reference) if self.reference.endswith(".npz") else out / "reference.npz"


@dataclass(frozen=True)
class AblationRun:
    """One run of an ablation: what is trained, where, and how it is measured. Sent to worker processes."""

    ablation: AblationConfig
    config: TrainConfig
    run: Path
    latents: Path
    reference: Path
    point: Mapping[str, Any]
    """Where it is on each axis of OPTIONAL; None where that is no axis of the ablation."""

    @property
    def variant(self) -> str:
        """The point on the axes that the network's name does not show, as text; empty if there is no such axis."""
        return ", ".join(f"{axis} {_text(value)}" for axis, value in self.point.items() if value is not None)

    @property
    def setting(self) -> tuple[str, int, LossSpace]:
        """Variant, patch size and loss space: systems that share them share a forecast."""
        return self.variant, self.config.network.patch_size, self.config.loss.space

    @property
    def evaluated_steps(self) -> list[int]:
        """Steps at which the run is measured: its checkpoints."""
        every, steps = self.config.checkpoint_every, self.config.steps
        return [*range(every, steps, every), steps]


def systems_of(config: AblationConfig, latents: Path, out: Path) -> list[AblationRun]:
    """Return the runs of an ablation, the longest first, so that all workers end at about the same time."""
    # The evaluations need every checkpoint.
    every = math.ceil(config.train.steps / config.evaluations)
    base = replace(config.train, checkpoint_every=every, keep_last=0)
    optional = [getattr(config, axis) or (None,) for axis in OPTIONAL]
    axes = itertools.product(config.seed, config.patch_size, *optional, config.loss_space, config.prediction)
    systems = []
    for seed, patch_size, *values, loss_space, prediction in axes:
        point = dict(zip(OPTIONAL, values, strict=True))
        anisotropy = point["anisotropy"]
        further = "".join(f"-{OPTIONAL[axis]}{_text(at)}" for axis, at in point.items() if at is not None)
        system = AblationRun(
            config,
            vary(base, prediction, loss_space, patch_size, seed, point),
            run=out / "runs" / f"{prediction}-{loss_space}-p{patch_size}{further}-s{seed}",
            latents=latents if anisotropy is None else coordinates_folder(out, patch_size, anisotropy),
            reference=config.reference_path(out),
            point=point,
        )
        systems.append(system)
    return sorted(systems, key=lambda system: (system.config.network.patch_size, -system.config.network.hidden_size))


def _text(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:g}"


def coordinates_folder(out: Path, patch_size: int, anisotropy: float) -> Path:
    """Return where an ablation keeps the latents in other coordinates."""
    return out / "coordinates" / f"a{anisotropy:g}-p{patch_size}"
