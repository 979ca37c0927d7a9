"""The contract of a feature extractor: 8-bit images to a feature vector and class logits, and its identity."""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from jlt.runtime.environment import exact_arithmetic
from jlt.storage.weights import weights_sha256

PIECE_ON_CPU = 16
PIECE_ON_GPU = 256


@dataclass(frozen=True)
class Features:
    """Float32 outputs per image: the feature vector that distances are measured in, and other outputs.

    `logits` of the classes are None for a network that is no classifier, `spatial` features (for sFID) if it has none.
    """

    pooled: Float[Tensor, "n d"]
    logits: Float[Tensor, "n k"] | None = None
    spatial: Float[Tensor, "n s"] | None = None


class FeatureExtractor(abc.ABC):
    """A frozen network; the features of an image depend on that image alone, except for last digits.

    `num_classes` and `spatial_dimension` are the lengths of logits and spatial features, 0 without these outputs.
    `held_out_accuracy` is the share of correct classes, 0..1, on held-out images that the weights' file states, or
    None. `resize` names the rule for images of another size than `input_size`.
    """

    name: str
    input_size: int
    dimension: int
    num_classes: int = 0
    spatial_dimension: int = 0
    held_out_accuracy: float | None = None
    resize: str | None = None

    def __init__(self, network: nn.Module) -> None:
        self._network = network.eval().requires_grad_(False)

    @abc.abstractmethod
    def __call__(self, images: UInt8[Tensor, "n h w 3"]) -> Features:
        """Return the features of RGB images 0..255 of any size, on the extractor's device."""

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self._network.parameters()).device

    def class_logits(self, kind: str | None, class_names: Sequence[str]) -> list[int] | None:  # noqa: ARG002
        """Return the logit of each class of some labels, None if their classes are not those of this network.

        `kind` is that of the image source that defines the labels, None where it is not known.
        """
        return None

    def identity(self) -> dict[str, Any]:
        """Return the name, the sizes, the rule of resizing and the hash of the weights, however they were packed."""
        sizes = {"input_size": self.input_size, "dimension": self.dimension}
        identity = {"name": self.name, "weights_sha256": self._weights_sha256, **sizes}
        return {**identity, "resize": self.resize} if self.resize else identity

    def to(self, device: torch.device | str) -> FeatureExtractor:
        """Move the weights in place and return the extractor."""
        self._network.to(device)
        return self

    @functools.cached_property
    def _weights_sha256(self) -> str:
        return weights_sha256(self._network.state_dict())

    def _apply_exactly(
        self, outputs: Callable[[UInt8[Tensor, "_ h w 3"]], tuple[Tensor, ...]], images: UInt8[Tensor, "n h w 3"]
    ) -> Features:
        """Return the outputs for pieces of the images, in float32 even inside autocast or with TF32 enabled.

        The pieces bound a large network's memory; on a CPU small pieces are as fast as large ones.
        """
        device = self.device
        pieces = images.split(PIECE_ON_CPU if device.type == "cpu" else PIECE_ON_GPU)
        with torch.autocast(device.type, enabled=False), exact_arithmetic(torch.get_num_threads()):
            found = [outputs(piece.to(device)) for piece in pieces]
        return Features(*(torch.cat(parts) for parts in zip(*found, strict=True)))
