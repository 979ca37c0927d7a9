"""What can be chosen about an encoding; free of torch, so that a command line can be built from it quickly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class EncodeConfig:
    """Which images go through which autoencoder, and how the latents are stored."""

    images: str
    """A folder of class folders, or the name of a bundled set (digits)."""
    autoencoder: str
    """flux2, tiny or pixels."""
    autoencoder_path: str | None = None
    """Where the autoencoder's weights are: a local folder or a Hub id."""
    resolution: int = 256
    """Side of the square centre crop in pixels."""
    batch_size: int = 32
    """Images per pass through the autoencoder."""
    shard_size: int = 8192
    """Latents per file; an interrupted encoding continues from its last whole file."""
    flips: bool = True
    """Store the horizontally flipped orientation of every image too."""
    dtype: Literal["float16", "float32"] = "float16"
    """Number format of the latents on disk."""
