"""Files of bundled weights: float16 safetensors whose metadata holds their origin and measurements."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from jlt.errors import JLTError
from jlt.storage.files import atomic_path

ASSETS = Path(__file__).parent.parent / "assets"


def save_weights(path: Path, weights: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write floating-point weights as float16; batch-norm statistics and whole numbers keep their precision."""
    from safetensors.torch import save

    def stored(name: str, tensor: Tensor) -> Tensor:
        keep = "running_" in name or not tensor.is_floating_point()
        return tensor.detach().to(tensor.dtype if keep else torch.float16).contiguous()

    rounded = {name: stored(name, tensor) for name, tensor in weights.items()}
    # diffusers requires the format. safetensors' own save_file makes files that only their owner can read, and other
    # users read an installed package.
    content = save(rounded, metadata={"format": "pt", **metadata})
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def read_metadata(path: Path) -> dict[str, str]:
    """Return the metadata of a safetensors file, empty if it has none; JLTError if it cannot be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise JLTError(f"{path} is not a readable safetensors file ({error}).") from error


def weights_sha256(weights: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 over name, dtype, shape and bytes of every tensor in order of name.

    It is a hash of the loaded weights, so it does not depend on how they are split into files.
    """
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        # A scalar has no bytes to view before it has a dimension.
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
