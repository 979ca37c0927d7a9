"""What a feature extractor is here: 8-bit images to a feature vector and class logits, and which one it is."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

PIECE_ON_CPU = 16
PIECE_ON_GPU = 256


@dataclass(frozen=True)
class Features:
    """Per image, in float32: the feature vector that distances are measured in, and what else the network tells.

    `logits` of the classes are None where it is no classifier, `spatial` features (for sFID) where it has none.
    """

    pooled: Float[Tensor, "n d"]
    logits: Float[Tensor, "n k"] | None = None
    spatial: Float[Tensor, "n s"] | None = None


class FeatureExtractor(abc.ABC):
    """A frozen network; an image's features depend on that image alone, but for last digits on those beside it.

    `num_classes` and `spatial_dimension` are the lengths of logits and spatial features, 0 where it gives none.
    `classes_of` is the kind of image source whose labels its classes are, None where there is no such source.
    `held_out_accuracy` is its share of right answers on images that it never saw, None where its makers did not say.
    """

    name: str
    dimension: int
    num_classes: int = 0
    spatial_dimension: int = 0
    classes_of: str | None = None
    held_out_accuracy: float | None = None

    @abc.abstractmethod
    def __call__(self, images: UInt8[Tensor, "n h w 3"]) -> Features:
        """Return the features of RGB images 0..255 of any size, on the extractor's device."""

    @abc.abstractmethod
    def identity(self) -> dict[str, Any]:
        """Return what makes this extractor this one, as JSON values: name, weights_sha256, input_size, dimension."""

    @abc.abstractmethod
    def to(self, device: torch.device | str) -> FeatureExtractor:
        """Move the weights in place and return the extractor."""


def pieces(images: UInt8[Tensor, "n h w 3"], device: torch.device) -> tuple[UInt8[Tensor, "_ h w 3"], ...]:
    """Split images so that a large network's memory stays bounded; on a CPU small pieces are also as fast as any."""
    return images.split(PIECE_ON_CPU if device.type == "cpu" else PIECE_ON_GPU)
