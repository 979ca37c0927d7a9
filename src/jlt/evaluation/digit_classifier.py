"""The bundled classifier of handwritten digits, whose features replace Inception's on that set."""

from __future__ import annotations

from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import convert_conv2d_weight_memory_format

from jlt.evaluation.extractor import Features, NetworkExtractor
from jlt.storage.weights import ASSETS, read_metadata

WEIGHTS_FILE = ASSETS / "digit_classifier.safetensors"


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


class DigitClassifier(NetworkExtractor):
    """A trained `DigitNetwork`; `held_out_accuracy` is its share of correct digits, 0..1, on held-out ones."""

    name = "digits"
    classes_of = "digits"
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

    @torch.no_grad()
    def __call__(self, images: UInt8[Tensor, "n h w 3"]) -> Features:
        """Return features and logits; images of another size than 32x32 are resized, bilinear and antialiased."""
        pixels = images.to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1
        size = (self.input_size, self.input_size)
        if pixels.shape[-2:] != size:
            pixels = functional.interpolate(pixels, size, mode="bilinear", antialias=True)
        return Features(*self._network(pixels))
