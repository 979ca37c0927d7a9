"""What can be chosen about an encoding; free of torch, so that a command line can be built from it quickly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

OnBadImage = Literal["stop", "skip"]


@dataclass(frozen=True)
class EncodeConfig:
    """Which images go through which autoencoder, and how the latents are stored."""

    images: str
    """A folder of class folders, of parquet files or of tar shards, or the name of a bundled set (digits)."""
    autoencoder: str
    """flux2, kl, tiny or pixels."""
    autoencoder_path: str | None = None
    """Where the autoencoder's weights are: a local folder or a Hub id."""
    split: str | None = None
    """Which split to encode, where the files of several lie in one folder (train of train-00000-of-00294.parquet)."""
    class_names: str | None = None
    """A text file with one class name a line, for images whose labels are bare numbers."""
    resolution: int = 256
    """Side of the square centre crop in pixels."""
    exif: Literal["ignore", "apply"] = "ignore"
    """Whether the rotation that a camera noted is applied; the field's protocol ignores it."""
    posterior: Literal["mode", "sample"] = "mode"
    """What to store of an autoencoder's posterior (kl): its mode, or a sample that is fixed per image."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the autoencoder; bfloat16 is autocast, several times faster on a GPU and a little less exact."""
    batch_size: int = 32
    """Images per pass through the autoencoder."""
    shard_size: int = 8192
    """Images per file; an interrupted encoding continues from its last whole file."""
    flips: bool = True
    """Store the horizontally flipped orientation of every image too."""
    dtype: Literal["float16", "float32"] = "float16"
    """Number format of the latents on disk."""
    on_bad_image: OnBadImage = "stop"
    """What to do about an image that does not decode: stop and name it, or skip it and list it in the manifest."""
    workers: int | None = None
    """Processes that decode images, for each encoding process (default: one per core that it has)."""
    preview: bool = False
    """Write preview.png into the store's folder before encoding: images over their reconstructions, with the PSNR."""
    repair: bool = False
    """Read a finished store whole, and make its damaged shards again; they have to become what its hashes say."""
