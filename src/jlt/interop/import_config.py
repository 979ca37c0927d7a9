"""What the user may state about a file that `jlt import` reads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from jlt.config import Prediction
from jlt.ranges import Ranged


@dataclass(frozen=True)
class ImportConfig(Ranged):
    """Facts about a file; of those that it states itself, only the autoencoder and `context_start` can be changed."""

    autoencoder: str = ""
    """Autoencoder of the latents: flux2, taef2, kl, tiny or pixels. Default: pixels for 3 channels, or else flux2."""
    autoencoder_path: str | None = None
    """Weights of the autoencoder: a folder or Hub id. Default: the published ones; kl has no default."""
    prediction: Prediction | None = None
    """What the network outputs, for a file that does not state it. Default: x."""
    resolution: int | None = None
    """Side of the images in pixels, for a file that does not state it. Default: 256."""
    context_start: int | None = None
    """Block before which JiT's class tokens enter. Default: a third of the depth, as in all published networks."""
    class_names: Path | None = None
    """Text file with one class name per line. Default: ImageNet's names for 1,000 classes, or else the numbers."""
