"""The autoencoders of diffusers: complete loading, the posterior, the normalisation, the identity.

z is the model's own latent, before normalisation: the mode of its Gaussian posterior or a sample, mean + std * noise.
A latent is (z - mean) * scale / std per channel, after p x p positions of z became channels; decoding is the reverse.

- `AutoencoderKL` (Stable Diffusion 1 to 3, SDXL, FLUX.1): p is 1, and the configuration gives the scale and one shift
  factor, or a mean and std per channel, which then replace the shift as in diffusers' SDXL pipelines.
- `AutoencoderKLFlux2` (FLUX.2, and the small bundled one): p is 2 for FLUX.2. Positions go into channels in the order
  (B, C, H/p, p, W/p, p) -> (B, C, p, p, H/p, W/p). Mean and std are batch-norm statistics among the weights.
"""

from __future__ import annotations

import functools
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from jlt.autoencoders.contract import Autoencoder, Posterior
from jlt.errors import JLTError
from jlt.runtime.random_numbers import normal_per_sample
from jlt.storage.weights import is_hub_id, read_metadata, require_reachable, weights_sha256

if TYPE_CHECKING:
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class Normalisation:
    """Mean, std, scale and p of a latent, and as JSON values those of its numbers that are not weights."""

    mean: Float[Tensor, "1 c 1 1"]
    std: Float[Tensor, "1 c 1 1"]
    identity: dict[str, Any]
    scale: float = 1.0
    patch_size: int = 1

    def undo(self, latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "n z zh zw"]:
        """Return z, as the model decodes it, of float32 latents."""
        packed = latents * self.std.to(latents.device) / self.scale + self.mean.to(latents.device)
        return functional.pixel_shuffle(packed, self.patch_size)


def normalisation_of(vae: Any, source: str) -> Normalisation:
    """Return the normalisation of an `AutoencoderKL` or `AutoencoderKLFlux2`; `source` names it in errors."""
    return _batch_norm(vae) if hasattr(vae, "bn") else _scaling(vae, source)


def _batch_norm(vae: Any) -> Normalisation:
    std = (vae.bn.running_var.float() + vae.bn.eps).sqrt()
    identity = {"kind": "batch_norm", "eps": vae.bn.eps}
    mean = _per_channel(vae.bn.running_mean)
    return Normalisation(mean, _per_channel(std), identity, patch_size=vae.config.patch_size[0])


def _scaling(vae: Any, source: str) -> Normalisation:
    config, channels = vae.config, vae.config.latent_channels
    identity = {"kind": "scale", "scaling_factor": config.scaling_factor, "shift_factor": config.shift_factor}
    mean, std = [config.shift_factor or 0.0] * channels, [1.0] * channels
    if config.latents_mean is not None and config.latents_std is not None:
        mean, std = list(config.latents_mean), list(config.latents_std)
        identity |= {"mean": mean, "std": std}
    if not len(mean) == len(std) == channels:
        raise JLTError(
            f"{source} has {channels} latent channels but {len(mean)} means and {len(std)} deviations: "
            "its config.json is damaged."
        )
    return Normalisation(
        _per_channel(torch.tensor(mean)), _per_channel(torch.tensor(std)), identity, scale=config.scaling_factor
    )


def _per_channel(values: Float[Tensor, " c"]) -> Float[Tensor, "1 c 1 1"]:
    return values.float().view(1, -1, 1, 1)


class PretrainedAutoencoder(Autoencoder):
    """A frozen `AutoencoderKL` or `AutoencoderKLFlux2` of any size; `source` is a full path or a Hub id."""

    def __init__(
        self, model: Any, name: str, source: str, posterior: Posterior = "mode", held_out_psnr: float | None = None
    ) -> None:
        # Convolutions are faster on channels-last memory, on this project's CPUs by a third.
        self._vae = model.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self.name, self.source, self.posterior, self.held_out_psnr = name, source, posterior, held_out_psnr
        self._normalisation = normalisation_of(model, source)
        self.channels = self._normalisation.mean.shape[1]
        self.downsampling = self._normalisation.patch_size * 2 ** (len(model.config.block_out_channels) - 1)
        self.device = self._vae.device

    @property
    def model(self) -> Any:
        """The model of diffusers."""
        return self._vae

    @torch.no_grad()
    def encode(
        self, images: Float[Tensor, "n 3 hh ww"], noise_seeds: Sequence[int] | None = None
    ) -> Float[Tensor, "n c h w"]:
        """Return the normalised mode of the posterior, or a sample drawn from one seed per image.

        Under autocast only the network computes in half precision. JLTError if a side is no multiple of
        `downsampling`; ValueError if a sample is required and there is not one seed per image.
        """
        self.check_images(images)
        images = images.to(self.device, torch.float32).contiguous(memory_format=torch.channels_last)
        distribution = self._vae.encode(images).latent_dist
        z = distribution.mode().float() if self.posterior == "mode" else _sample(distribution, noise_seeds)
        n = self._normalisation
        packed = functional.pixel_unshuffle(z, n.patch_size)
        return ((packed - n.mean.to(z.device)) * n.scale / n.std.to(z.device)).contiguous()

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 3 hh ww"]:
        """Return the decoded images, clamped to [-1, 1]; JLTError for a wrong channel count."""
        self.check_latents(latents)
        z = self._normalisation.undo(latents.to(self.device, torch.float32))
        images = self._vae.decode(z.contiguous(memory_format=torch.channels_last)).sample
        return images.float().clamp(-1, 1).contiguous()

    def identity(self) -> dict[str, Any]:
        """Return names, sizes, normalisation and the hash of all weights, batch-norm statistics included."""
        return {
            **super().identity(),
            "class": type(self._vae).__name__,
            "weights_sha256": self._weights_sha256,
            "normalisation": self._normalisation.identity,
            "held_out_psnr": self.held_out_psnr,
        }

    def to(self, device: torch.device | str) -> PretrainedAutoencoder:
        """Move the weights in place and return the autoencoder."""
        self._vae.to(device)
        self.device = self._vae.device
        return self

    @functools.cached_property
    def _weights_sha256(self) -> str:
        return weights_sha256(self._vae.state_dict())


def _sample(distribution: DiagonalGaussianDistribution, seeds: Sequence[int] | None) -> Float[Tensor, "n z zh zw"]:
    mean, std = distribution.mean.float(), (distribution.logvar.float() / 2).exp()
    if seeds is None or len(seeds) != len(mean):
        raise ValueError(f"{len(mean)} images need {len(mean)} noise seeds, not {0 if seeds is None else len(seeds)}")
    # Drawn on the CPU, so that an image has the same noise on every kind of device.
    return mean + std * normal_per_sample(seeds, mean.shape[1:]).to(mean.device)


def load_pretrained(name: str, path: str, posterior: Posterior = "mode") -> PretrainedAutoencoder:
    """Load `kl`, an `AutoencoderKL`, or else an `AutoencoderKLFlux2`, from a folder or Hub id or from `vae` in it.

    JLTError if there is none, if it is of another class or cannot be read, or if weights are missing or unexpected.
    Only safetensors are read, so no pickled code runs.
    """
    from diffusers import AutoencoderKL, AutoencoderKLFlux2

    model_class: Any = AutoencoderKL if name == "kl" else AutoencoderKLFlux2
    kind = model_class.__name__
    location, subfolders = _places(path)
    with _as_jlt_error(path, kind):
        subfolder, config = _read_config(model_class, location, subfolders)
    if (found := config.get("_class_name", kind)) != kind:
        raise JLTError(
            f"{path} is of the class {found}, not {kind}: name another --autoencoder or another --autoencoder-path."
        )
    with _as_jlt_error(path, kind):
        model, loading = model_class.from_pretrained(
            location,
            subfolder=subfolder,
            torch_dtype=torch.float32,
            use_safetensors=True,
            low_cpu_mem_usage=False,
            output_loading_info=True,
        )
    # diffusers fills missing weights with random numbers and only logs a line.
    if wrong := [*loading["missing_keys"], *loading["unexpected_keys"]]:
        raise JLTError(f"{path} is not an {kind}: {len(wrong)} weights do not match, {wrong[0]!r} first.")
    if (channels := model.config.in_channels) != 3:
        raise JLTError(f"{path} encodes images of {channels} channels: an autoencoder of RGB images is needed.")
    weights = Path(location, subfolder or "", WEIGHTS_FILE)
    psnr = read_metadata(weights).get("held_out_psnr") if weights.is_file() else None
    return PretrainedAutoencoder(model, name, location, posterior, float(psnr) if psnr else None)


@contextmanager
def _as_jlt_error(path: str, kind: str) -> Iterator[None]:
    try:
        with warnings.catch_warnings():
            # diffusers passes an argument that huggingface_hub no longer accepts.
            warnings.filterwarnings("ignore", message=".*local_dir_use_symlinks", category=UserWarning)
            yield
    # With a damaged config.json diffusers raises many types of exceptions.
    except Exception as error:
        raise JLTError(
            f"{path} could not be loaded as an {kind} ({textwrap.shorten(str(error), 300)}): name a folder that "
            "diffusers saved, or a Hub id that can be reached, with --autoencoder-path."
        ) from error


def _read_config(
    model_class: type[Any], location: str, subfolders: Sequence[str | None]
) -> tuple[str | None, dict[str, Any]]:
    """Return the first of the folders that has a configuration, and the configuration."""
    for subfolder in subfolders:
        try:
            config = model_class.load_config(location, subfolder=subfolder)
        except OSError:
            if subfolder == subfolders[-1]:
                raise
            continue
        if isinstance(config, dict):
            return subfolder, config
    raise ValueError("its config.json holds no JSON object")


def _places(path: str) -> tuple[str, tuple[str | None, ...]]:
    """Return a full path or Hub id, and the folders in it that may hold the model; None is the path itself."""
    folder = Path(path).expanduser()
    for subfolder in ("vae", None):
        if (folder / (subfolder or "") / "config.json").is_file():
            return str(folder.resolve()), (subfolder,)
    if not is_hub_id(path):
        raise JLTError(
            f"{path} has no config.json, nor has a folder vae in it: name an autoencoder with --autoencoder-path, "
            "either a folder that diffusers saved or a Hub id such as organisation/name."
        )
    # Pipelines on the Hub hold a folder vae, single autoencoders do not; only a request shows which it is.
    subfolders = ("vae", None)
    configs = [f"{folder}/config.json" if folder else "config.json" for folder in subfolders]
    require_reachable(path, configs, "name a folder that diffusers saved with --autoencoder-path.")
    return path, subfolders
