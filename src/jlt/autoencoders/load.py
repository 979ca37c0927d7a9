"""Autoencoders by name, and pixels as their own latents."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from jlt.autoencoders.contract import Autoencoder, Posterior
from jlt.autoencoders.pretrained import load_pretrained
from jlt.errors import UsageError, unknown_name
from jlt.storage.weights import ASSETS

AUTOENCODERS = ("flux2", "taef2", "kl", "tiny", "pixels")
USUAL_PLACES = {
    "flux2": "black-forest-labs/FLUX.2-klein-4B",
    "taef2": "madebyollin/taef2",
    "tiny": str(ASSETS / "tiny"),
}
"""The place of the weights that a name alone means."""
SHARED_SPACES = ({"flux2", "taef2"},)
"""Autoencoders that decode each other's latents."""
SOURCES_IN_PACKAGE = ("bundled", "built in")
"""Sources in an identity that are no place: such an autoencoder is loaded by its name alone."""
IN_RUN = "./"
"""Begins a source in an identity that is in the run folder which records the identity."""


def load_autoencoder(
    name: str, path: str | None = None, device: torch.device | str = "cpu", posterior: Posterior = "mode"
) -> Autoencoder:
    """Load `flux2`, `taef2`, `kl` (any `AutoencoderKL`), `tiny` (bundled, FLUX.2's class, small) or `pixels`.

    `path` is a folder or Hub id with other weights than the usual ones; `kl` has no usual ones. `posterior` selects the
    mode of the latent distribution or a sample of it, which only `kl` supports. UsageError for an unknown name, with
    the nearest ones, and for arguments that do not fit the name; JLTError for weights that are missing or of another
    class.
    """
    if name not in AUTOENCODERS:
        raise unknown_name("autoencoder", name, AUTOENCODERS)
    if posterior == "sample" and name != "kl":
        raise UsageError(f"The autoencoder {name!r} stores the mode: --posterior sample is for kl.")
    if name == "pixels":
        if path is not None:
            raise UsageError(f"The autoencoder 'pixels' has no weights: leave out the path {path}.")
        return PixelAutoencoder().to(device)
    if name == "taef2":
        from jlt.autoencoders.taef2 import load_taef2

        return load_taef2(path or USUAL_PLACES[name]).to(device)
    if name == "kl" and path is None:
        raise UsageError(
            "The autoencoder 'kl' is any AutoencoderKL of diffusers: name one with --autoencoder-path, a folder or "
            "a Hub id such as stabilityai/sd-vae-ft-mse, stabilityai/sdxl-vae or black-forest-labs/FLUX.1-schnell."
        )
    autoencoder = load_pretrained(name, path or USUAL_PLACES[name], posterior)
    if name == "tiny" and path is None:
        # The identity does not depend on where the package is installed.
        autoencoder.source = "bundled"
    return autoencoder.to(device)


def parse_decoder(text: str) -> tuple[str, str | None]:
    """Return name and place, None where it is the usual one, of a decoder given as NAME or NAME:PLACE."""
    name, _, place = text.partition(":")
    return name, place or None


class PixelAutoencoder(Autoencoder):
    """The identity map: a latent is the image in [-1, 1], one position per pixel, not normalised."""

    name = "pixels"
    source = "built in"
    channels = 3
    downsampling = 1

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    def encode(
        self,
        images: Float[Tensor, "n 3 h w"],
        noise_seeds: Sequence[int] | None = None,  # noqa: ARG002
    ) -> Float[Tensor, "n 3 h w"]:
        """Return the images themselves."""
        return images.to(self.device, torch.float32)

    def decode(self, latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 3 h w"]:
        """Return the latents clamped to [-1, 1]; JLTError unless they have 3 channels."""
        self.check_latents(latents)
        return latents.to(self.device, torch.float32).clamp(-1, 1)

    def to(self, device: torch.device | str) -> PixelAutoencoder:
        """Make encode and decode return their results on `device`."""
        self.device = torch.device(device)
        return self
