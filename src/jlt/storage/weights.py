"""Files of weights: bundled ones (float16 safetensors whose metadata holds their origin), and those on the Hub."""

from __future__ import annotations

import errno
import hashlib
import os
import pickle
import shutil
import socket
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from torch import Tensor

from jlt.errors import JLTError
from jlt.storage.files import atomic_path, fsync_path, partial_path

ASSETS = Path(__file__).parent.parent / "assets"


def save_weights(path: Path, weights: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write floating-point weights as float16; batch-norm statistics and whole numbers keep their precision."""

    def stored(name: str, tensor: Tensor) -> Tensor:
        keep = "running_" in name or not tensor.is_floating_point()
        return tensor.detach().to(tensor.dtype if keep else torch.float16)

    # diffusers requires the format.
    write_tensors(path, {name: stored(name, tensor) for name, tensor in weights.items()}, {"format": "pt", **metadata})


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file atomically; OSError where the disk is full."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    # The library writes to a name of its own, which a killed process would leave behind: here in a folder of ours.
    folder = partial_path(path)
    folder.mkdir(parents=True)
    try:
        with atomic_path(folder / path.name) as temporary:
            values = {key: value.contiguous() for key, value in tensors.items()}
            save_file(values, temporary, dict(metadata) if metadata else None)
        (folder / path.name).replace(path)
        fsync_path(path.parent)
    except SafetensorError as error:
        if f"os error {errno.ENOSPC}" in str(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


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
        raise JLTError(f"{file} is not a plain file of weights; its code was not run: name another file.") from error
    # For other files these readers raise many types of exceptions.
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError, KeyError) as error:
        reason = textwrap.shorten(str(error), 200)
        raise JLTError(f"{file} could not be read as a file of weights ({reason}): name another file.") from error
    if not isinstance(content, Mapping) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise JLTError(f"{file} holds no named tensors: name a file of weights.")
    return dict(content)


def require_same_tensors(file: Path, found: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str) -> None:
    """Raise JLTError with the first names that are missing, unexpected or misshapen; `what` names the network."""
    misshapen = [
        f"{name} of {tuple(found[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in found and found[name].shape != tensor.shape
    ]
    kinds = {
        "missing": [name for name in expected if name not in found],
        "unexpected": [name for name in found if name not in expected],
        "misshapen": misshapen,
    }
    if faults := [f"{len(names)} {kind}, such as {names[0][:160]}" for kind, names in kinds.items() if names]:
        raise JLTError(f"{file} does not hold the weights of {what}: {'; '.join(faults)}.")


def is_hub_id(path: str) -> bool:
    """Return whether a text that names no existing file or folder has the form of a Hub id, organisation/name."""
    return path.count("/") == 1 and not path.startswith((".", "/", "~")) and not Path(path).exists()


def require_reachable(repository: str, files: Sequence[str], remedy: str) -> None:
    """Raise a JLTError at once if the Hub is not reachable; its library would retry for a minute first.

    There is no check if one of the files is in the Hub's cache; `remedy` ends the message with what to do.
    """
    from huggingface_hub import constants, try_to_load_from_cache

    cached = any(isinstance(try_to_load_from_cache(repository, file), str) for file in files)
    if cached or constants.HF_HUB_OFFLINE or getproxies():
        return
    hub = urlsplit(constants.ENDPOINT)
    try:
        socket.create_connection((hub.hostname or "", hub.port or 443), timeout=10.0).close()
    except OSError as error:
        raise JLTError(
            f"{repository} is not a local folder, and the Hub at {hub.hostname} cannot be reached ({error}): {remedy}"
        ) from error


def hub_file(repository: str, name: str, remedy: str) -> Path:
    """Return the local path of a file of a Hub repository, downloaded if the cache does not have it.

    JLTError if it cannot be had; `remedy` ends the message with what to do.
    """
    from huggingface_hub import hf_hub_download

    require_reachable(repository, [name], remedy)
    try:
        return Path(hf_hub_download(repository, name))
    except (OSError, ValueError) as error:
        reason = textwrap.shorten(str(error), 200)
        raise JLTError(f"{repository} on the Hub has no {name} that can be downloaded ({reason}): {remedy}") from error


def hub_folder(repository: str, name: str, patterns: Sequence[str], remedy: str) -> Path:
    """Return a local folder with the files of a Hub repository that match patterns, downloaded where they are missing.

    `name` is one of the files; JLTError if they cannot be had, and `remedy` ends the message with what to do.
    """
    from huggingface_hub import snapshot_download

    require_reachable(repository, [name], remedy)
    try:
        return Path(snapshot_download(repository, allow_patterns=list(patterns)))
    except (OSError, ValueError) as error:
        reason = textwrap.shorten(str(error), 200)
        raise JLTError(f"{repository} on the Hub cannot be downloaded ({reason}): {remedy}") from error
