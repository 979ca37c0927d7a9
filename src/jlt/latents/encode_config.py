"""What can be chosen about an encoding; free of torch, so that a command line can be built from it quickly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class EncodeConfig:
    """Which images go through which autoencoder, and how the latents are stored."""

    images: str
    """Folder of class folders, parquet or tar files; or digits."""
    autoencoder: str
    """flux2, kl, pixels, or tiny (bundled, for digits)."""
    autoencoder_path: str | None = None
    """Its weights: a local folder or a Hub id."""
    split: str | None = None
    """One of several splits in a folder (train of train-00000-of-00294)."""
    class_names: str | None = None
    """Text file that names the classes, one a line."""
    resolution: int = 256
    """Side of the centre crop in pixels."""
    exif: Literal["ignore", "apply"] = "ignore"
    """A camera's note on rotation; the field's protocol ignores it."""
    posterior: Literal["mode", "sample"] = "mode"
    """What to store of kl's posterior; a sample is fixed per image."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the autoencoder's arithmetic; bfloat16 means autocast."""
    threads: int = 2
    """Of the autoencoder on a CPU; they decide last bits."""
    batch_size: int = 32
    """Images per pass through the autoencoder."""
    shard_size: int = 8192
    """Images per file, the unit of a restart."""
    flips: bool = True
    """Whether mirrored images are stored too."""
    dtype: Literal["float16", "float32"] = "float16"
    """Number format on disk."""
    on_bad_image: Literal["stop", "skip"] = "stop"
    """Stop and name it, or list it in the manifest and go on."""
    workers: int | None = None
    """Processes that decode images (default: one per core)."""
    preview: bool = False
    """First write preview.png: images over their reconstructions."""
    repair: bool = False
    """Make damaged shards of a finished store again, to the same bytes."""
