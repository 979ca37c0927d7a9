"""The shape of a latent space, as networks and recipes need it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LatentShape:
    """Channels, grid height and width of one latent, and the number of classes that label it."""

    channels: int
    height: int
    width: int
    num_classes: int


FLUX2_IMAGENET256 = LatentShape(channels=128, height=16, width=16, num_classes=1000)
"""ImageNet at 256x256 through FLUX.2's autoencoder: the published setting (DESIGN 3)."""
