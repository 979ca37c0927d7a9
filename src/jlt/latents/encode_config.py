"""The settings of an encoding; free of torch, so that the command line is built from it quickly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jlt.config import InferencePrecision
from jlt.ranges import Ranged


@dataclass(frozen=True)
class EncodeConfig(Ranged):
    """The images, the autoencoder, and the format of the latents."""

    images: str
    """Images: a folder of class folders, of images, of parquet or of tar files, or the bundled set digits."""
    autoencoder: str
    """Autoencoder: flux2, taef2 (small, same latent space), kl (any AutoencoderKL), pixels, or tiny (for digits)."""
    autoencoder_path: str | None = None
    """Weights of the autoencoder: a folder or Hub id. Default: the published ones; kl has no default."""
    split: str | None = None
    """Split of a folder that holds several, such as train for train/ or train-00000-of-00294. Default: the only one."""
    class_names: str | None = None
    """Text file with one class name per line. Default: the names that the images come with."""
    resolution: int = 256
    """Side of the centre crop in pixels."""
    exif: Literal["ignore", "apply"] = "ignore"
    """Rotation recorded by a camera; the standard ImageNet protocol ignores it."""
    posterior: Literal["mode", "sample"] = "mode"
    """Mode of kl's posterior, or a sample that is fixed per image."""
    precision: InferencePrecision = "float32"
    """Precision of the autoencoder; bfloat16 is autocast."""
    threads: int = 2
    """Threads of the autoencoder on a CPU; their number changes the last bits of the latents."""
    batch_size: int = 32
    """Images per pass through the autoencoder."""
    shard_size: int = 8192
    """Images per file; an interrupted encoding repeats at most the file that it was writing."""
    flips: bool = True
    """Mirrored images are stored too, unless --no-flips is given."""
    dtype: Literal["float16", "float32"] = "float16"
    """Number format of the stored latents."""
    on_bad_image: Literal["stop", "skip"] = "stop"
    """Images that do not decode: stop and name the first, or skip them and list them in the manifest."""
    workers: int | None = None
    """Processes that decode images. Default: one per core; none for a bundled set."""
    preview: bool = False
    """First write preview.png: images above their reconstructions."""
    repair: bool = False
    """Make the damaged shards of a finished store again, with the same bytes."""
