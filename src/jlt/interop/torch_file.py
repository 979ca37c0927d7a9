"""Files that `torch.save` wrote, read without running any of their code and without copying their tensors."""

from __future__ import annotations

import argparse
import re
import textwrap
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jlt.errors import JLTError

LARGEST_PICKLE = 64 << 20
"""Bytes of the part of a file that is not tensors; a checkpoint of 1,000 tensors has 100 kB."""
OTHER_FILE = "name a checkpoint that torch.save wrote, such as checkpoint-last.pth"


def read_torch_file(path: Path) -> dict[str, Any]:
    """Return the dictionary in a file of `torch.save`; its tensors are mapped from the file, not read.

    Besides tensors and plain Python types it may hold an `argparse.Namespace`. JLTError for a file that holds any
    other class, whose name it states, and for a file that is damaged or of another kind. No code of the file runs.
    """
    _require_archive(path)
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            # PyTorch warns of unusual files before it refuses them.
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    # A damaged or hostile file makes the unpickler raise almost any exception.
    except Exception as error:
        if foreign := re.search(r"GLOBAL (\S+)", str(error)):
            name = re.sub(r"[^\w.]", "?", foreign[1])[:80]
            raise JLTError(
                f"{path} holds {name}, which is neither a tensor nor a plain value. None of its code was run: "
                f"{OTHER_FILE}."
            ) from error
        reason = textwrap.shorten(str(error).partition("\n")[0], 160)
        raise JLTError(f"{path} is damaged, or no file of PyTorch's ({reason}): {OTHER_FILE}.") from error
    if not isinstance(content, dict):
        raise JLTError(f"{path} holds no dictionary but {type(content).__name__}: {OTHER_FILE}.")
    return content


def _require_archive(path: Path) -> None:
    """Raise JLTError unless a file is an archive that can be mapped, with parts of a plausible size."""
    if not path.is_file():
        raise JLTError(f"{path} is not a file." if path.exists() else f"{path} does not exist.")
    with path.open("rb") as file:
        head = file.read(9)
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size:
        raise JLTError(f"{path} is a safetensors file, which holds no settings of a training: {OTHER_FILE}.")
    if head[:1] == b"\x80":
        raise JLTError(
            f"{path} is a pickle, as PyTorch wrote before version 1.6, and cannot be read in parts: load it with "
            "PyTorch where you trust it, and save it again with torch.save."
        )
    if head[:2] != b"PK":
        raise JLTError(f"{path} is not a file of PyTorch's: {OTHER_FILE}.")
    try:
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise JLTError(f"{path} is truncated or damaged ({error}): download or copy it again.") from error
    if any(part.compress_type != zipfile.ZIP_STORED for part in parts):
        raise JLTError(f"{path} is compressed, which torch.save does not do: {OTHER_FILE}.")
    if any(part.file_size > LARGEST_PICKLE for part in parts if part.filename.endswith(".pkl")):
        raise JLTError(f"{path} holds more than {LARGEST_PICKLE >> 20} MiB of values outside tensors: {OTHER_FILE}.")


def require_tensors(path: Path, name: str, values: Any) -> dict[str, Tensor]:
    """Return a part of a file as named tensors that hold all the values of their shapes.

    JLTError for anything else: a shape may claim more memory than the file has.
    """
    if not isinstance(values, Mapping) or not all(isinstance(key, str) for key in values):
        raise JLTError(f"{path} holds no named tensors as {name}: {OTHER_FILE}.")
    total = 0
    for key, value in values.items():
        if not isinstance(value, Tensor):
            raise JLTError(f"{path} holds {type(value).__name__} as {key[:80]!r} in {name}, and no tensor.")
        plain = value.layout == torch.strided and value.device.type == "cpu" and value.is_floating_point()
        plain = plain and not value.is_nested
        size = value.numel() * value.element_size()
        if not plain or size > value.untyped_storage().nbytes():
            raise JLTError(f"{path} holds {key[:80]!r} in {name} as no plain tensor of floating-point numbers.")
        total += size
    if total > path.stat().st_size:
        raise JLTError(f"{path} has {path.stat().st_size} bytes, and the tensors in {name} claim {total}.")
    return {key: value.detach() for key, value in values.items()}
