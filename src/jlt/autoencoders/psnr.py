"""Reconstruction error."""

from __future__ import annotations

import math

from jaxtyping import Float
from torch import Tensor


def psnr(images: Float[Tensor, "n 3 h w"], reconstructions: Float[Tensor, "n 3 h w"]) -> float:
    """Return the peak signal-to-noise ratio in dB of images in [-1, 1], from the mean squared error over all of them.

    It is below the mean of the images' own ratios, in which easy images hide hard ones.
    """
    error = (images.double() - reconstructions.double()).square().mean().item()
    return math.inf if error == 0 else 10 * math.log10(4 / error)
