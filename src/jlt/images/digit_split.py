"""The digits that trained the bundled networks, and the held-out digits that measured them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from jlt.images.crop import centre_crop
from jlt.images.digits import Digits

HELD_OUT_EVERY = 6


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
