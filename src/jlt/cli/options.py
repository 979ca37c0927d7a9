"""Options that several commands share: a single one is an annotated type, a group is a data class."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import arg

from jlt.cli.command import Positional

if TYPE_CHECKING:
    from jlt.evaluation.extractor import FeatureExtractor

CheckpointPath = Annotated[Path, arg(help="Run folder (its newest checkpoint) or checkpoint folder.")]
LatentsPath = Annotated[Path, arg(help="Folder of the latent store.")]
AutoencoderPath = Annotated[
    str | None,
    arg(help="Weights of the autoencoder: a folder or Hub id. Default: those that made the latents."),
]
Folder = Annotated[Path, Positional, arg(metavar="DIR")]
SystemWorkers = Annotated[int | None, arg(help="Systems that train at the same time. Default: 2 on a CPU, 1 on a GPU.")]


@dataclass(frozen=True)
class FeatureOptions:
    """The feature extractor of the metrics."""

    features: str = "digits"
    """Feature extractor: digits, inception (on which FID is defined) or dinov2."""
    features_path: Path | None = None
    """Weights of the extractor: a file for inception, a folder or Hub id for dinov2. Default: the downloaded ones."""

    def load(self, device: str) -> FeatureExtractor:
        """Load the extractor onto a device; JLTError for an unknown name and for weights that are missing."""
        from jlt.evaluation.extractors import load_extractor

        return load_extractor(self.features, device, self.features_path)


@dataclass(frozen=True)
class MetricOptions(FeatureOptions):
    """The feature extractor of the metrics, and the real images that samples are compared with."""

    reference: str = "digits"
    """Real images: an .npz of their statistics (jlt reference), a folder of class folders, or the bundled digits."""
