"""Autoencoders by name."""

from __future__ import annotations

import torch

from jlt.autoencoders.contract import Autoencoder, Posterior
from jlt.errors import JLTError, UsageError, unknown_name
from jlt.storage.weights import ASSETS

AUTOENCODERS = ("flux2", "taef2", "kl", "tiny", "pixels")
USUAL_PLACES = {
    "flux2": "black-forest-labs/FLUX.2-klein-4B",
    "taef2": "madebyollin/taef2",
    "tiny": str(ASSETS / "tiny"),
}
"""Where the weights are that a name alone means."""
SOURCES_IN_PACKAGE = ("bundled", "built in")
"""Sources in an identity that are no place: what has one of them is loaded by its name alone."""


def load_autoencoder(
    name: str, path: str | None = None, device: torch.device | str = "cpu", posterior: Posterior = "mode"
) -> Autoencoder:
    """Load `flux2`, `kl` (any `AutoencoderKL`), `tiny` (bundled, FLUX.2's class in small) or `pixels` onto a device.

    `path` replaces the weights' usual place by another folder or Hub id; `kl` has no usual one. `posterior` is what of
    its distribution the autoencoder returns; only `kl` can sample. UsageError for an unknown name, with the
    nearest ones, and for words that do not go together; JLTError for weights that are missing or of another class.
    """
    if name not in AUTOENCODERS:
        raise unknown_name("autoencoder", name, AUTOENCODERS)
    if posterior == "sample" and name != "kl":
        raise UsageError(f"The autoencoder {name!r} stores the mode: --posterior sample is for kl.")
    if name == "kl":
        return _load_kl(path, posterior).to(device)
    if name == "pixels":
        return _load_pixels(path).to(device)
    if name == "taef2":
        from jlt.autoencoders.taef2 import load_taef2

        return load_taef2(path or USUAL_PLACES[name]).to(device)
    from jlt.autoencoders.flux2 import load_flux2

    autoencoder = load_flux2(name, path or USUAL_PLACES[name])
    if name == "tiny" and path is None:
        # Where the package is installed makes no other autoencoder of it.
        autoencoder.source = "bundled"
    return autoencoder.to(device)


def _load_kl(path: str | None, posterior: Posterior) -> Autoencoder:
    from jlt.autoencoders.kl import load_kl

    if path is None:
        raise UsageError(
            "The autoencoder 'kl' is any AutoencoderKL of diffusers: say which with --autoencoder-path, a folder or a "
            "Hub id such as stabilityai/sd-vae-ft-mse, stabilityai/sdxl-vae or black-forest-labs/FLUX.1-schnell."
        )
    return load_kl("kl", path, posterior)


def _load_pixels(path: str | None) -> Autoencoder:
    from jlt.autoencoders.pixels import PixelAutoencoder

    if path is not None:
        raise JLTError(f"The autoencoder 'pixels' has no weights: leave the path {path} away.")
    return PixelAutoencoder()
