"""FLUX.2's autoencoder through diffusers, at its own size and at the small one that is bundled.

Encoding takes the mode of the posterior, puts p x p positions into channels in the order
(B, C, H/p, p, W/p, p) -> (B, C, p, p, H/p, W/p), and normalises by the autoencoder's own batch-norm statistics,
(latent - running_mean) / sqrt(running_var + batch_norm_eps). Decoding is the exact reverse. p is 2 for FLUX.2.
"""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from jlt.assets.weights import read_metadata, weights_sha256
from jlt.autoencoders.contract import Autoencoder
from jlt.errors import JLTError

if TYPE_CHECKING:
    from diffusers import AutoencoderKLFlux2

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"


class Flux2Autoencoder(Autoencoder):
    """A frozen `AutoencoderKLFlux2` of any size; `source` says where it came from."""

    def __init__(self, vae: AutoencoderKLFlux2, name: str, source: str, held_out_psnr: float | None = None) -> None:
        # Convolutions over channels-last memory are the faster ones, on this project's CPUs by a third.
        self._vae = vae.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self._patch_size: int = vae.config.patch_size[0]
        self.name = name
        self.source = source
        self.held_out_psnr = held_out_psnr
        self.channels = vae.bn.num_features
        self.downsampling = self._patch_size * 2 ** (len(vae.config.block_out_channels) - 1)
        self.device = vae.bn.running_mean.device

    @torch.no_grad()
    def encode(self, images: Float[Tensor, "n 3 hh ww"]) -> Float[Tensor, "n c h w"]:
        """Return the normalised mode of the posterior; JLTError if a side is no multiple of `downsampling`."""
        self.check_images(images)
        images = images.to(self.device, torch.float32).contiguous(memory_format=torch.channels_last)
        mode = self._vae.encode(images).latent_dist.mode().float()
        mean, std = self._moments()
        return ((functional.pixel_unshuffle(mode, self._patch_size) - mean) / std).contiguous()

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 3 hh ww"]:
        """Return the decoded images, clamped to [-1, 1]; JLTError for a wrong channel count."""
        self.check_latents(latents)
        mean, std = self._moments()
        mode = functional.pixel_shuffle(latents.to(self.device, torch.float32) * std + mean, self._patch_size)
        images = self._vae.decode(mode.contiguous(memory_format=torch.channels_last)).sample
        return images.float().clamp(-1, 1).contiguous()

    def identity(self) -> dict[str, Any]:
        """Return names, sizes and the hash of all weights, batch-norm statistics included."""
        return {
            "name": self.name,
            "source": self.source,
            "class": type(self._vae).__name__,
            "weights_sha256": self._weights_sha256,
            "normalisation": {"kind": "batch_norm", "eps": self._vae.bn.eps},
            "channels": self.channels,
            "downsampling": self.downsampling,
            "held_out_psnr": self.held_out_psnr,
        }

    def to(self, device: torch.device | str) -> Flux2Autoencoder:
        """Move the weights in place and return the autoencoder."""
        self._vae.to(device)
        self.device = self._vae.bn.running_mean.device
        return self

    @functools.cached_property
    def _weights_sha256(self) -> str:
        return weights_sha256(self._vae.state_dict())

    def _moments(self) -> tuple[Float[Tensor, "1 c 1 1"], Float[Tensor, "1 c 1 1"]]:
        mean, variance = self._vae.bn.running_mean, self._vae.bn.running_var
        return mean.float().view(1, -1, 1, 1), (variance.float() + self._vae.bn.eps).sqrt().view(1, -1, 1, 1)


def load_flux2(name: str, path: str) -> Flux2Autoencoder:
    """Load an `AutoencoderKLFlux2` as diffusers saves it: a folder, or a folder or Hub id that holds it under `vae`.

    JLTError if there is none, if it cannot be read, or if a single weight is missing or left over.
    """
    from diffusers import AutoencoderKLFlux2

    location, subfolder = _locate(path)
    try:
        with warnings.catch_warnings():
            # diffusers passes huggingface_hub an argument that this one has retired.
            warnings.filterwarnings("ignore", message=".*local_dir_use_symlinks", category=UserWarning)
            vae, loading = AutoencoderKLFlux2.from_pretrained(
                location,
                subfolder=subfolder,
                torch_dtype=torch.float32,
                use_safetensors=True,
                low_cpu_mem_usage=False,
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise JLTError(
            f"{path} could not be loaded as an AutoencoderKLFlux2 ({error}): "
            "name a folder that diffusers saved with --autoencoder-path."
        ) from error
    # diffusers fills what is missing with random numbers and a line in its log.
    if wrong := [*loading["missing_keys"], *loading["unexpected_keys"]]:
        raise JLTError(f"{path} is not an AutoencoderKLFlux2: {len(wrong)} weights do not match, {wrong[0]!r} first.")
    weights = Path(location, subfolder or "", WEIGHTS_FILE)
    psnr = read_metadata(weights).get("held_out_psnr") if weights.is_file() else None
    return Flux2Autoencoder(vae, name, path, float(psnr) if psnr else None)


def _locate(path: str) -> tuple[str, str | None]:
    folder = Path(path).expanduser()
    for subfolder in ("vae", None):
        if (folder / (subfolder or "") / "config.json").is_file():
            return str(folder), subfolder
    if folder.exists() or path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise JLTError(
            f"{path} has no config.json, neither in itself nor in a folder vae: "
            "an autoencoder is a folder that diffusers saved, or a Hub id such as organisation/name."
        )
    return path, "vae"
