"""One evaluation of samples: its numbers, and the protocol that decides with which others they may be compared."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from jlt.errors import JLTError
from jlt.results.files import ResultFile
from jlt.storage.codec import Count, NonNegative, Share, Size
from jlt.storage.files import Difference, difference

OWN_TO_A_RUN = frozenset({"checkpoint", "ema_rebuilt"})
"""Keys of a protocol that name the evaluated weights, not the method; all others must agree within a table."""
LOWER_IS_BETTER = frozenset({"frechet_distance", "spatial_frechet_distance", "kernel_distance"})
SHARES = frozenset({"precision", "recall", "coverage", "label_agreement"})
"""Metrics from 0 to 1 that are written as percentages."""
SPREAD_OF = {
    "frechet_distance": "frechet_distance_error",
    "inception_score": "inception_score_std",
    "kernel_distance": "kernel_distance_std",
}
"""Metrics with the name of their standard error or standard deviation."""


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """What was measured on `count` images; None is what the extractor, the reference or the images do not allow.

    `frechet_distance_error` is its standard error. `frechet_distance_bias` estimates by how much the distance is too
    large because there are few samples. Precision, recall, density, coverage and the kernel distance, which has no bias
    and so may be negative, use at most 10,000 images.
    """

    frechet_distance: NonNegative
    frechet_distance_error: NonNegative | None = None
    frechet_distance_bias: float | None = None
    inception_score: NonNegative | None = None
    inception_score_std: NonNegative | None = None
    inception_score_whole: NonNegative | None = None
    spatial_frechet_distance: NonNegative | None = None
    kernel_distance: float | None = None
    kernel_distance_std: NonNegative | None = None
    precision: Share | None = None
    recall: Share | None = None
    density: NonNegative | None = None
    coverage: Share | None = None
    label_agreement: Share | None = None
    count: Size

    def __getitem__(self, metric: str) -> float | None:
        """Return a metric by its name."""
        return getattr(self, metric)


IMAGES_PER_DIMENSION = 10
"""Fewer images than this per dimension of the features bias a Frechet distance visibly: as dimension / count."""


def bias_text(metrics: Metrics, dimension: int) -> str:
    """State that few images bias a Frechet distance in so many dimensions; empty for enough of them."""
    enough = IMAGES_PER_DIMENSION * dimension
    if metrics.count >= enough:
        return ""
    bias = metrics.frechet_distance_bias
    amount = "" if bias is None else f" by about {bias:.2g} of {metrics.frechet_distance:.4g}"
    return (
        f"A Frechet distance of {metrics.count} images in {dimension} dimensions is biased upwards{amount}: "
        f"use {enough} images or more."
    )


@dataclass(frozen=True)
class Jackknife:
    """What gives the error of the difference of two evaluations that start from the same noise."""

    frechet_distance: tuple[NonNegative, ...]
    """The distance without one group of images each."""
    sizes: tuple[Count, ...]
    """Images of each group."""


@dataclass(frozen=True)
class Evaluation(ResultFile):
    """One `evaluations/step_*.json` of a run, or one `points/*.json` of a sweep."""

    SCHEMA: ClassVar[int] = 1

    step: Count | None
    """Training step of the checkpoint; None for images that were not drawn from one."""
    metrics: Metrics
    protocol: Mapping[str, Any]
    """Everything that decides the numbers: checkpoint, sampler, extractor, reference, versions."""
    jackknife: Jackknife | None = None

    def __post_init__(self) -> None:
        for key in ("autoencoder", "autoguide", "extractor", "reference"):
            if not isinstance(self.protocol.get(key) or {}, Mapping):
                raise JLTError(f"protocol.{key} must be an object with named fields.")

    @property
    def shared_protocol(self) -> dict[str, Any]:
        """The protocol without the evaluated weights, and without the coordinates that the network was trained in.

        Coordinates are undone before decoding, so images are compared with images.
        """
        kept = {key: value for key, value in self.protocol.items() if key not in OWN_TO_A_RUN}
        match kept.get("autoencoder"):
            case {"normalisation": {"coordinates": _, **plain}, **others}:
                kept["autoencoder"] = {**others, "normalisation": plain}
        return kept

    @property
    def method(self) -> str:
        """How it was evaluated, as text that is equal for evaluations that may be compared."""
        kept = self.shared_protocol
        guide, reference = kept.get("autoguide") or {}, kept.get("reference") or {}
        if guide.get("checkpoint") == self.protocol.get("checkpoint"):
            kept["autoguide"] = guide.get("ema")
        if "images" in reference:
            # The last digits of its moments, and so its hash, depend on how many processes measured the same images.
            kept["reference"] = {key: value for key, value in reference.items() if key != "sha256"}
        return json.dumps(kept, sort_keys=True)

    def differences(self, other: Evaluation) -> list[Difference]:
        """Return (dotted key, this value, the other value) of everything in which the shared protocols differ."""
        return difference(self.shared_protocol, other.shared_protocol)
