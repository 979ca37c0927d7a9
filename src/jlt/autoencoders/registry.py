"""Autoencoders by name."""

from __future__ import annotations

import torch

from jlt.assets.weights import ASSETS
from jlt.autoencoders.contract import Autoencoder
from jlt.errors import JLTError, unknown_name

AUTOENCODERS = ("flux2", "tiny", "pixels")
FLUX2_HUB_ID = "black-forest-labs/FLUX.2-klein-4B"


def load_autoencoder(name: str, path: str | None = None, device: torch.device | str = "cpu") -> Autoencoder:
    """Load `flux2`, `tiny` (bundled, the same class in small) or `pixels` onto a device.

    `path` replaces the weights' usual place by another folder or Hub id. JLTError for an unknown name, with the nearest
    ones, and for weights that are missing or of another class.
    """
    if name not in AUTOENCODERS:
        raise unknown_name("autoencoder", name, AUTOENCODERS)
    if name == "pixels":
        from jlt.autoencoders.pixels import PixelAutoencoder

        if path is not None:
            raise JLTError(f"The autoencoder 'pixels' has no weights: leave the path {path} away.")
        return PixelAutoencoder().to(device)
    from jlt.autoencoders.flux2 import load_flux2

    if name == "tiny" and path is None:
        autoencoder = load_flux2(name, str(ASSETS / "tiny"))
        # Where the package is installed makes no other autoencoder of it.
        autoencoder.source = "bundled"
    else:
        autoencoder = load_flux2(name, path or FLUX2_HUB_ID)
    return autoencoder.to(device)
