"""SqueezeNet 1.1 (Iandola et al. 2016) as a feature extractor: trained on ImageNet, and small enough for a laptop.

The network and its parameter names are torchvision's `squeezenet1_1`. Distances in its features are not FID.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn.utils import convert_conv2d_weight_memory_format

from jlt.errors import UsageError
from jlt.evaluation.dinov2 import imagenet_input
from jlt.evaluation.extractor import FeatureExtractor, Features
from jlt.storage.weights import ASSETS, read_weights, require_same_tensors

WEIGHTS_FILE = "squeezenet1_1.safetensors"


class Fire(nn.Module):
    """A 1x1 convolution to few channels, then a 1x1 and a 3x3 convolution side by side, ReLU after each."""

    def __init__(self, inputs: int, squeezed: int, expanded: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(inputs, squeezed, 1)
        self.expand1x1 = nn.Conv2d(squeezed, expanded, 1)
        self.expand3x3 = nn.Conv2d(squeezed, expanded, 3, padding=1)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d h w"]:
        """Return 2 * expanded channels."""
        x = self.squeeze(x).relu()
        return torch.cat([self.expand1x1(x), self.expand3x3(x)], dim=1).relu()


class SqueezeNet(nn.Module):
    """Eight fire modules between three poolings, and a 1x1 convolution to 1,000 classes."""

    def __init__(self) -> None:
        super().__init__()
        pool = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.features = nn.Sequential(
            *(nn.Conv2d(3, 64, 3, 2), nn.ReLU(), pool),
            *(Fire(64, 16, 64), Fire(128, 16, 64), pool),
            *(Fire(128, 32, 128), Fire(256, 32, 128), pool),
            *(Fire(256, 48, 192), Fire(384, 48, 192), Fire(384, 64, 256), Fire(512, 64, 256)),
        )
        # The convolution has the index 1 in torchvision's classifier, after a dropout.
        self.classifier = nn.Sequential(nn.Identity(), nn.Conv2d(512, 1000, 1))

    def forward(self, x: Float[Tensor, "n 3 224 224"]) -> tuple[Float[Tensor, "n 512"], Float[Tensor, "n 1000"]]:
        """Return the mean of the last features over positions, and the logits."""
        features = self.features(x)
        return features.mean(dim=(2, 3)), self.classifier(features).relu().mean(dim=(2, 3))


class SqueezeNetExtractor(FeatureExtractor):
    """A `SqueezeNet` with weights, always in float32."""

    name = "squeezenet"
    input_size = 224
    dimension = 512
    num_classes = 1000
    resize = "bicubic and antialiased, to 8 bits"

    def __init__(self, network: SqueezeNet) -> None:
        super().__init__(network)
        convert_conv2d_weight_memory_format(self._network, torch.channels_last)

    @classmethod
    def load(cls, path: Path | str | None = None) -> SqueezeNetExtractor:
        """Load a file of weights, .pth or .safetensors, or a folder with `squeezenet1_1.safetensors`.

        JLTError for a file that is missing, cannot be read or holds other weights. Pickled code does not run.
        """
        if path is None:
            raise UsageError(
                "The extractor 'squeezenet' needs --features-path: torchvision's squeezenet1_1 weights, a .pth or "
                ".safetensors file."
            )
        place = Path(path).expanduser()
        file = place / WEIGHTS_FILE if place.is_dir() else place
        weights, network = read_weights(file), SqueezeNet()
        require_same_tensors(file, weights, network.state_dict(), "torchvision's squeezenet1_1")
        network.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
        return cls(network)

    def class_logits(self, kind: str | None, class_names: Sequence[str]) -> list[int] | None:
        """Return the logits of classes with ImageNet's names, by the first of each class's synonyms; all for no names.

        Two names (crane, maillot) mean two classes each: they are known with their wnid, or in the list of all classes.
        """
        known = (ASSETS / "imagenet_classes.txt").read_text(encoding="utf-8").splitlines()
        names = [name.partition(",")[0].strip() for name in class_names]
        if (not names and kind is None) or names == [name.partition(" (")[0] for name in known]:
            return list(range(len(known)))
        places = {name: place for place, name in enumerate(known)}
        return [places[name] for name in names] if names and places.keys() >= set(names) else None

    @torch.no_grad()
    def __call__(self, images: UInt8[Tensor, "n h w 3"]) -> Features:
        """Return features and logits; images of another size are resized to 224x224."""
        return self._apply_exactly(lambda piece: self._network(imagenet_input(piece, self.input_size)), images)
