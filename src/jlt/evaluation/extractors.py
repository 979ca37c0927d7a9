"""Feature extractors by name; the bundled classifier of digits, and the digits that trained and measured it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import convert_conv2d_weight_memory_format

from jlt.errors import UsageError, unknown_name
from jlt.evaluation.dinov2 import DinoExtractor
from jlt.evaluation.extractor import FeatureExtractor, Features
from jlt.evaluation.inception import InceptionExtractor
from jlt.evaluation.squeezenet import SqueezeNetExtractor
from jlt.images.crop import centre_crop, to_rgb
from jlt.images.digits import Digits
from jlt.images.source import ImageSource
from jlt.storage.weights import ASSETS, read_metadata

EXTRACTORS: dict[str, type[SqueezeNetExtractor | InceptionExtractor | DinoExtractor]] = {
    "squeezenet": SqueezeNetExtractor,
    "inception": InceptionExtractor,
    "dinov2": DinoExtractor,
}
"""Extractors whose weights are not bundled."""
NAMES = ("digits", *EXTRACTORS)
WEIGHTS_FILE = ASSETS / "digit_classifier.safetensors"
HELD_OUT_EVERY = 6


def load_extractor(name: str, device: torch.device | str = "cpu", path: Path | str | None = None) -> FeatureExtractor:
    """Load `digits`, the bundled classifier, `squeezenet`, `inception`, on which FID is defined, or `dinov2`.

    `path` names weights: a file for squeezenet and inception, a folder or Hub id for dinov2. The default for the last
    two is the place to which they are downloaded. JLTError for weights that are missing or cannot be read; UsageError
    for an unknown name, with the nearest ones, and for a path that is required or does not apply.
    """
    if name == "digits":
        if path is not None:
            raise UsageError("The extractor 'digits' is bundled and takes no --features-path.")
        return DigitClassifier.load().to(device)
    if name not in EXTRACTORS:
        raise unknown_name("feature extractor", name, NAMES)
    return EXTRACTORS[name].load(path).to(device)


def shows_digits(source: ImageSource) -> bool:
    """Return whether images are scanned digits: the bundled ones, or grey ones of the classes 0 to 9."""
    if not {*source.class_names} <= {*map(str, range(DigitNetwork.num_classes))}:
        return False
    red, green, blue = to_rgb(source[0][0]).split()
    return red.tobytes() == green.tobytes() == blue.tobytes()


class DigitNetwork(nn.Module):
    """Five convolutions over a grey image of 32x32, averaged over positions to 64 features, and a linear layer."""

    input_size = 32
    dimension = 64
    num_classes = 10

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_convolution(1, 32, kernel_size=5, stride=2),
            *_convolution(32, 32),
            *_convolution(32, 64, stride=2),
            *_convolution(64, 64),
            *_convolution(64, 64),
        )
        self.head = nn.Linear(self.dimension, self.num_classes)

    def forward(self, images: Float[Tensor, "n 3 32 32"]) -> tuple[Float[Tensor, "n 64"], Float[Tensor, "n 10"]]:
        """Return the pooled features and the logits of RGB images in [-1, 1]."""
        pooled = self.body(images.mean(dim=1, keepdim=True)).mean(dim=(2, 3))
        return pooled, self.head(pooled)


def _convolution(inputs: int, outputs: int, kernel_size: int = 3, stride: int = 1) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(inputs, outputs, kernel_size, stride, padding=kernel_size // 2, bias=False)
    return convolution, nn.BatchNorm2d(outputs), nn.ReLU()


class DigitClassifier(FeatureExtractor):
    """A trained `DigitNetwork`; `held_out_accuracy` is its share of correct digits, 0..1, on held-out ones."""

    name = "digits"
    input_size = DigitNetwork.input_size
    dimension = DigitNetwork.dimension
    num_classes = DigitNetwork.num_classes

    def __init__(self, network: DigitNetwork, held_out_accuracy: float) -> None:
        super().__init__(network)
        convert_conv2d_weight_memory_format(self._network, torch.channels_last)
        self.held_out_accuracy = held_out_accuracy

    @classmethod
    def load(cls, path: Path = WEIGHTS_FILE) -> DigitClassifier:
        """Load the weights that the training script wrote; JLTError if the file cannot be read."""
        from safetensors.torch import load_file

        metadata = read_metadata(path)
        network = DigitNetwork()
        network.load_state_dict(load_file(path))
        return cls(network, float(metadata["held_out_accuracy"]))

    def class_logits(self, kind: str | None, class_names: Sequence[str]) -> list[int] | None:  # noqa: ARG002
        """Return all logits for labels of the bundled digits, and for labels of an unknown kind."""
        return list(range(self.num_classes)) if kind in (None, "digits") else None

    @torch.no_grad()
    def __call__(self, images: UInt8[Tensor, "n h w 3"]) -> Features:
        """Return features and logits; images of another size than 32x32 are resized, bilinear and antialiased."""
        pixels = images.to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1
        size = (self.input_size, self.input_size)
        if pixels.shape[-2:] != size:
            pixels = functional.interpolate(pixels, size, mode="bilinear", antialias=True)
        return Features(*self._network(pixels))


@dataclass(frozen=True)
class LabelledImages:
    """RGB images 0..255 and their labels."""

    images: UInt8[Tensor, "n size size 3"]
    labels: Int64[Tensor, " n"]


def digit_split(size: int = 32) -> tuple[LabelledImages, LabelledImages]:
    """Return the digits for training and the held-out ones, brought to `size` pixels by the project's crop.

    Every sixth image of each class, in the order of the source, is held out. So both parts contain all classes and all
    writers, and the split depends on no random generator.
    """
    source = Digits()
    pairs = [source[index] for index in range(len(source))]
    images = torch.from_numpy(np.stack([centre_crop(image, size) for image, _ in pairs]))
    labels = torch.tensor([label for _, label in pairs])
    held_out = torch.zeros(len(source), dtype=torch.bool)
    for label in range(len(source.class_names)):
        members = torch.nonzero(labels == label).flatten()
        held_out[members[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]] = True
    return LabelledImages(images[~held_out], labels[~held_out]), LabelledImages(images[held_out], labels[held_out])
