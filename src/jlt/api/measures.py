"""Measurements of latents and images: `jlt.analyze` and `jlt.FrechetDistance`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from PIL import Image
from torch import Tensor

from jlt.api.images import Images
from jlt.api.latents import LatentDataset
from jlt.config import LatentShape, LossConfig, TimestepConfig, TrainConfig
from jlt.errors import JLTError, UsageError, unknown_name
from jlt.evaluation.extractor import FeatureExtractor
from jlt.evaluation.extractors import NAMES, load_extractor
from jlt.evaluation.metrics import FeatureStatistics
from jlt.evaluation.reference import STATISTICS_SUFFIXES, Reference, check_reference, open_reference
from jlt.evaluation.suite import CHUNK, require_enough
from jlt.experiments.analysis import AnalysisConfig
from jlt.geometry.accumulate import Latents, measure_moments
from jlt.latents.store import LatentStore
from jlt.results.geometry import Geometry, TrainingModel
from jlt.runtime.environment import device_of_float64, usable_device
from jlt.runtime.processes import SingleProcess, rank0_value

ImageBatch = Images | Image.Image | Sequence[Image.Image] | UInt8[Tensor, "n h w 3"] | UInt8[np.ndarray, "n h w 3"]
FeatureBatch = Float[Tensor, "n d"] | Float[np.ndarray, "n d"]


def analyze(
    latents: str | os.PathLike[str] | LatentDataset | LatentStore | Tensor | np.ndarray,
    *,
    patch_size: int | Sequence[int] = (1, 2),
    width: int | Sequence[int] = (768,),
    training: TrainConfig | TrainingModel | None = None,
    labels: Tensor | np.ndarray | None = None,
    device: str | None = None,
) -> Geometry:
    """Measure the target geometry of latents and forecast which prediction suits them, as `jlt analyze` does.

    `latents` is the folder of a latent store, an opened one, or an array (n, c, h, w) with class numbers `labels` (n),
    by default one class for all. `patch_size` and `width` are those of the networks in the forecast. `training` is the
    run to forecast, such as `model.config`; its default is that of `jlt analyze`. Nothing is written.

    Raises JLTError for fewer than two latents, latents without variance or that are not finite, and a patch size that
    does not divide the grid; UsageError for an array of another shape.
    """
    store = _as_latents(latents, labels)
    model = TrainingModel.of(training) if isinstance(training, TrainConfig) else training
    sizes, widths = ((value,) if isinstance(value, int) else tuple(value) for value in (patch_size, width))
    config = AnalysisConfig(sizes, widths, model or TrainingModel(TimestepConfig(), LossConfig().t_eps))
    moments = measure_moments(store, sizes, device_of_float64(usable_device(device)), SingleProcess())
    return config.geometry_of(rank0_value(moments), store)


def _as_latents(latents: Any, labels: Tensor | np.ndarray | None) -> Latents:
    if isinstance(latents, (Tensor, np.ndarray)):
        values = torch.as_tensor(latents)
        if values.ndim != 4 or not values.is_floating_point():
            raise UsageError(f"Latents are floats (n, c, h, w), not {values.dtype} of {tuple(values.shape)}.")
        if not values.isfinite().all():
            raise UsageError("Some of the latents are not finite.")
        numbers = torch.zeros(len(values), dtype=torch.int64) if labels is None else torch.as_tensor(labels).long()
        if numbers.shape != (len(values),) or (len(values) and int(numbers.min()) < 0):
            raise UsageError(f"labels must be {len(values)} class numbers of 0 or more, one for each latent.")
        return _ArrayLatents(values.detach().cpu(), numbers.cpu())
    if labels is not None:
        raise UsageError("The latents of a store have labels: labels are for an array.")
    if isinstance(latents, LatentDataset):
        return latents.store
    return latents if isinstance(latents, LatentStore) else LatentStore.open(Path(latents))


@dataclass(frozen=True, eq=False)
class _ArrayLatents:
    """Latents in memory, as the analysis reads them."""

    latents: Float[Tensor, "n c h w"]
    labels: Int64[Tensor, " n"]

    @property
    def shape(self) -> LatentShape:
        channels, height, width = self.latents.shape[1:]
        return LatentShape(channels, height, width, int(self.labels.max()) + 1 if len(self) else 1)

    def __len__(self) -> int:
        return len(self.latents)

    def gather(self, indices: Int64[np.ndarray, " n"]) -> tuple[Float[Tensor, "n c h w"], Int64[Tensor, " n"]]:
        return self.latents[torch.from_numpy(indices)], self.labels[torch.from_numpy(indices)]

    def identity(self) -> dict[str, Any]:
        return {"source": {"kind": "array", "count": len(self)}, "count": len(self)}


class FrechetDistance:
    """The Frechet distance of images to real ones, in batches: FID in the features of `"inception"`.

    Moments are summed in float64, so batches, merging and their order change only the last digits. `features` names
    an extractor as `jlt evaluate --features` does, with its weights at `features_path`; it is opened at the first
    image. Features may be given instead of images.

    For example:
        distance = jlt.FrechetDistance("digits")
        distance.update(model.sample(num=500))
        distance.compute("digits")
    """

    def __init__(
        self,
        features: str | FeatureExtractor = "digits",
        *,
        device: str | None = None,
        features_path: str | os.PathLike[str] | None = None,
    ) -> None:
        if isinstance(features, str) and features not in NAMES:
            raise unknown_name("feature extractor", features, NAMES)
        self._extractor = None if isinstance(features, str) else features
        self._open = (features, device, features_path)
        self._resolution: int | None = None
        self._statistics: FeatureStatistics | None = None

    def __repr__(self) -> str:
        name = self._extractor.name if self._extractor else self._open[0]
        return f"<{self.count:,} images in the features of {name}>"

    @property
    def extractor(self) -> FeatureExtractor:
        """The feature extractor, opened at the first use; JLTError for missing weights."""
        if self._extractor is None:
            name, device, path = self._open
            self._extractor = load_extractor(str(name), usable_device(device), None if path is None else Path(path))
        return self._extractor

    @property
    def count(self) -> int:
        """Images so far."""
        return 0 if self._statistics is None else int(self._statistics.count or 0)

    def update(self, batch: ImageBatch | FeatureBatch) -> None:
        """Add images or features.

        Images are those of `Model.sample`, a PIL image or several, or levels 0 to 255 (n, h, w, 3) in uint8. Features
        are floats (n, d). JLTError for images of different sizes, another dimension and features that are not finite;
        UsageError for anything else.
        """
        features = self._features_of(batch)
        if self._statistics is None:
            self._statistics = FeatureStatistics(features.shape[1])
        self._require_dimension(features.shape[1])
        self._statistics.update(features)

    def merge(self, other: FrechetDistance) -> None:
        """Add the images of another one, such as that of another process; JLTError if its features are others."""
        if other._statistics is None:
            return
        self._require_alike(other)
        if self._statistics is None:
            self._statistics = FeatureStatistics(other._statistics.dimension)
        self._require_dimension(other._statistics.dimension)
        self._extractor, self._resolution = self._extractor or other._extractor, self._resolution or other._resolution
        self._statistics.merge(other._statistics)

    def compute(self, reference: str | os.PathLike[str] | Reference | FrechetDistance) -> float:
        """Return the squared distance to real images, as `jlt evaluate` reports it.

        `reference` is a file of statistics (`jlt reference`), a collection of images as `--reference` takes it, or
        another FrechetDistance, of real images. A distance of fewer than ten images per dimension is biased upwards.
        JLTError for fewer than 10 images, and for a reference of another extractor, dimension or image size.
        """
        require_enough(self.count)
        assert self._statistics is not None
        theirs = self._statistics_of(reference)
        self._require_dimension(theirs.dimension)
        return theirs.gaussian.distance(self._statistics.gaussian)

    def _statistics_of(self, reference: str | os.PathLike[str] | Reference | FrechetDistance) -> FeatureStatistics:
        if isinstance(reference, FrechetDistance):
            self._require_alike(reference)
            require_enough(reference.count)
            assert reference._statistics is not None
            return reference._statistics
        if not isinstance(reference, Reference):
            place = os.fspath(reference)
            if place.endswith(STATISTICS_SUFFIXES):
                reference = Reference.load(Path(place))
            elif self._resolution is None:
                raise UsageError("Only features were added, of images of unknown size: name a file of statistics.")
            else:
                reference = open_reference(place, self.extractor, self._resolution)
        if self._extractor is not None:
            check_reference(reference, self._extractor, self._resolution)
        return reference.pooled

    def _features_of(self, batch: ImageBatch | FeatureBatch) -> Tensor:
        """Return the features of images on the host, or features as they are."""
        if isinstance(batch, Images):
            values = batch.pixels
        elif isinstance(batch, (Tensor, np.ndarray)):
            values = torch.as_tensor(batch)
        else:
            pictures = [batch] if isinstance(batch, Image.Image) else list(batch)
            if not all(isinstance(picture, Image.Image) for picture in pictures):
                raise UsageError("Images are those of Model.sample, PIL images, or uint8 (n, h, w, 3).")
            pixels = [np.asarray(picture.convert("RGB")) for picture in pictures]
            if len({array.shape for array in pixels}) > 1:
                raise JLTError("The images of a batch differ in size.")
            values = torch.from_numpy(np.stack(pixels)) if pixels else torch.empty(0, 1, 1, 3, dtype=torch.uint8)
        if values.ndim == 2 and values.is_floating_point():
            return values
        if values.ndim != 4 or values.shape[3] != 3 or values.dtype != torch.uint8:
            raise UsageError(
                f"Images are uint8 (n, h, w, 3) and features are floats (n, d), not {values.dtype} of "
                f"{tuple(values.shape)}."
            )
        if len(values) == 0:
            return torch.empty(0, self.extractor.dimension)
        self._require_resolution(values.shape[1])
        self._resolution = values.shape[1]
        return torch.cat([self.extractor(part).pooled.cpu() for part in values.split(CHUNK)])

    def _require_alike(self, other: FrechetDistance) -> None:
        """Raise JLTError for another one whose images have another size or extractor, as far as both are known."""
        if self._extractor and other._extractor and self._extractor.identity() != other._extractor.identity():
            names = f"{self._extractor.name} and {other._extractor.name}"
            raise JLTError(f"Features of different extractors ({names}) cannot be combined or compared.")
        if other._resolution is not None:
            self._require_resolution(other._resolution)

    def _require_resolution(self, resolution: int) -> None:
        if self._resolution not in (None, resolution):
            raise JLTError(f"Images of {resolution} pixels do not fit those of {self._resolution} pixels before.")

    def _require_dimension(self, dimension: int) -> None:
        if self._statistics is not None and self._statistics.dimension != dimension:
            raise JLTError(
                f"Features of dimension {dimension} do not fit those of dimension {self._statistics.dimension}."
            )
