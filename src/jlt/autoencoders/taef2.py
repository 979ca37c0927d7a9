"""TAEF2: the tiny distilled autoencoder of FLUX.2's latent space (Ollin Boer Bohan, `madebyollin/taef2`).

Both networks have 64 channels everywhere. A block is relu(x + c(x)), where c is three 3x3 convolutions with ReLU
between them. The three blocks at 1/8 of the resolution first add a branch with group normalisation to x. TAEF2 is
distilled from FLUX.2's batch-normalised latents, so its own latents need no normalisation. Encoding packs 2x2
positions into channels, in the order of FLUX.2's autoencoder; decoding unpacks them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import convert_conv2d_weight_memory_format

from jlt.autoencoders.contract import Autoencoder
from jlt.errors import JLTError
from jlt.storage.weights import hub_file, is_hub_id, read_weights, require_same_tensors, weights_sha256

WIDTH = 64
LATENTS = 32
PATCH_SIZE = 2
GROUPS = 4
WEIGHTS_FILE = "taef2.safetensors"
PIXELS_AT_ONCE = 2 * 256**2
"""Pixels of a piece on a CPU, whose caches do not hold larger ones: 1.15 times as fast as a whole batch."""
OLDER = {4: "TAESD or TAESDXL", 16: "TAESD3 or TAEF1"}
"""Tiny autoencoders of other latent spaces, by their latent channels."""


class Block(nn.Module):
    """relu(x + three 3x3 convolutions of x); with `pooling`, x is x plus a 1x1 bottleneck with group normalisation."""

    def __init__(self, pooling: bool = False) -> None:
        super().__init__()
        self.conv = nn.Sequential(_conv(), nn.ReLU(), _conv(), nn.ReLU(), _conv())
        self.pool: nn.Sequential | None = None
        if pooling:
            wide = GROUPS * WIDTH
            self.pool = nn.Sequential(
                nn.Conv2d(WIDTH, wide, 1, bias=False),
                nn.GroupNorm(GROUPS, wide),
                nn.ReLU(),
                nn.Conv2d(wide, WIDTH, 1, bias=False),
            )

    def forward(self, x: Float[Tensor, "n 64 h w"]) -> Float[Tensor, "n 64 h w"]:
        """Return features of the same shape."""
        if self.pool is not None:
            x = x + self.pool(x)
        return functional.relu(x + self.conv(x))


class Encoder(nn.Module):
    """Images in [0, 1] to latents at 1/8 of the resolution."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(_conv(3), Block(), *_down(), *_down(), *_down(pooling=True), _conv(WIDTH, LATENTS))

    def forward(self, images: Float[Tensor, "n 3 hh ww"]) -> Float[Tensor, "n 32 h w"]:
        """Return the latents."""
        return self.layers(images)


class Decoder(nn.Module):
    """Latents to images, nearly in [0, 1], at eight times the resolution."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(_conv(LATENTS), nn.ReLU(), *_up(pooling=True), *_up(), *_up(), Block(), _conv(WIDTH, 3))
        )

    def forward(self, latents: Float[Tensor, "n 32 h w"]) -> Float[Tensor, "n 3 hh ww"]:
        """Return the images; latents are first bounded smoothly to (-3, 3)."""
        return self.layers(3 * torch.tanh(latents / 3))


class TAEF2(nn.Module):
    """Both networks, under the names of the public file."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = Encoder(), Decoder()


def _conv(inputs: int = WIDTH, outputs: int = WIDTH, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=bias)


def _down(pooling: bool = False) -> list[nn.Module]:
    return [_conv(stride=2, bias=False), *(Block(pooling) for _ in range(3))]


def _up(pooling: bool = False) -> list[nn.Module]:
    return [*(Block(pooling) for _ in range(3)), nn.Upsample(scale_factor=2), _conv(bias=False)]


class TAEF2Autoencoder(Autoencoder):
    """The frozen codec: 128 channels at 1/16 of the resolution, in the order and units of FLUX.2's latents."""

    name = "taef2"
    channels = LATENTS * PATCH_SIZE**2
    downsampling = 8 * PATCH_SIZE

    def __init__(self, network: TAEF2, source: str) -> None:
        self._network = network.eval().requires_grad_(False)
        # Convolutions over channels-last memory are faster on a CPU.
        convert_conv2d_weight_memory_format(self._network, torch.channels_last)
        self.source = source
        self.device = torch.device("cpu")

    @property
    def model(self) -> TAEF2:
        """Both networks."""
        return self._network

    @torch.no_grad()
    def encode(
        self,
        images: Float[Tensor, "n 3 hh ww"],
        noise_seeds: Sequence[int] | None = None,  # noqa: ARG002
    ) -> Float[Tensor, "n 128 h w"]:
        """Return the latents; JLTError if a side is no multiple of 16."""
        self.check_images(images)
        rgb = images.to(self.device, torch.float32).contiguous(memory_format=torch.channels_last) / 2 + 0.5
        z = self._in_pieces(self._network.encoder, rgb, rgb[0, 0].numel())
        return functional.pixel_unshuffle(z, PATCH_SIZE).contiguous()

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 3 hh ww"]:
        """Return the images, clamped to [-1, 1]; JLTError for a wrong channel count."""
        self.check_latents(latents)
        z = functional.pixel_shuffle(latents.to(self.device, torch.float32), PATCH_SIZE)
        z = z.contiguous(memory_format=torch.channels_last)
        rgb = self._in_pieces(self._network.decoder, z, 8 * 8 * z[0, 0].numel())
        return (2 * rgb - 1).clamp(-1, 1).contiguous()

    def _in_pieces(self, network: nn.Module, x: Float[Tensor, "n c h w"], pixels: int) -> Float[Tensor, "n d hh ww"]:
        """Apply a network to images of some pixels each, in pieces on a CPU."""
        size = len(x) if self.device.type != "cpu" else max(1, PIXELS_AT_ONCE // pixels)
        return torch.cat([network(piece).float() for piece in x.split(size)])

    def identity(self) -> dict[str, Any]:
        """Return names, sizes and the hash of all weights; the latents need no normalisation."""
        return {**super().identity(), "class": "TAEF2", "weights_sha256": self._weights_sha256}

    def to(self, device: torch.device | str) -> TAEF2Autoencoder:
        """Move the weights in place and return the autoencoder."""
        self._network.to(device)
        self.device = torch.device(device)
        return self

    @functools.cached_property
    def _weights_sha256(self) -> str:
        return weights_sha256(self._network.state_dict())


def load_taef2(path: str) -> TAEF2Autoencoder:
    """Load TAEF2 from a file, a folder that holds `taef2.safetensors`, or a Hub id such as `madebyollin/taef2`.

    JLTError if there is none, if it cannot be read, or if it holds the weights of another network, such as TAESD and
    TAEF1 (4 and 16 latent channels).
    """
    file, source = _find_weights(path)
    weights, network = read_weights(file), TAEF2()
    # The older networks differ in these two layers alone.
    latents = len(weights.get("encoder.layers.14.bias", ()))
    if latents in OLDER:
        raise JLTError(f"{file} holds {OLDER[latents]}, with {latents} latent channels: TAEF2 has {LATENTS}.")
    require_same_tensors(file, weights, network.state_dict(), "TAEF2")
    network.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    return TAEF2Autoencoder(network, source)


def _find_weights(path: str) -> tuple[Path, str]:
    """Return the file of weights, and what the identity names as its source: a full path or a Hub id."""
    place = Path(path).expanduser()
    file = place / WEIGHTS_FILE if place.is_dir() else place
    if file.is_file():
        return file, str(place.resolve())
    remedy = f"name a folder with {WEIGHTS_FILE}, or a Hub id, with --autoencoder-path."
    if not is_hub_id(path):
        raise JLTError(f"{path} is no file of weights and no folder with {WEIGHTS_FILE}: {remedy}")
    return hub_file(path, WEIGHTS_FILE, remedy), path
