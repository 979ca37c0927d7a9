"""Files of bundled weights: float16 safetensors whose metadata holds their origin and measurements."""

from __future__ import annotations

import hashlib
import pickle
import textwrap
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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


def read_weights(file: Path) -> dict[str, Tensor]:
    """Read a file of weights, .safetensors or a .pth of PyTorch's, as named tensors; JLTError if it is none.

    A pickle runs no code: what holds anything but tensors is refused.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if file.suffix == ".safetensors":
            content: Any = load_file(file)
        else:
            with warnings.catch_warnings():
                # PyTorch warns of unusual pickles before it refuses them.
                warnings.simplefilter("ignore")
                content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise JLTError(f"{file} is not a plain file of weights, and its code is not run: name another one.") from error
    # A file of another kind can fail in any way.
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError, KeyError) as error:
        reason = textwrap.shorten(str(error), 200)
        raise JLTError(f"{file} could not be read as a file of weights ({reason}): name another one.") from error
    if not isinstance(content, Mapping) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise JLTError(f"{file} holds no names with tensors: name a file of weights.")
    return dict(content)


def require_same_tensors(file: Path, found: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str) -> None:
    """Raise JLTError with the first names that are missing, unexpected or misshapen; `what` names the network."""
    kinds = {
        "missing": [name for name in expected if name not in found],
        "unexpected": [name for name in found if name not in expected],
        "of another shape": [
            f"{name} {tuple(found[name].shape)} instead of {tuple(tensor.shape)}"
            for name, tensor in expected.items()
            if name in found and found[name].shape != tensor.shape
        ],
    }
    if faults := [f"{len(names)} {kind}, such as {names[0]}" for kind, names in kinds.items() if names]:
        raise JLTError(f"{file} does not hold the weights of {what}: {'; '.join(faults)}.")
