"""Feature extractors by name."""

from __future__ import annotations

from pathlib import Path

import torch

from jlt.errors import UsageError, unknown_name
from jlt.evaluation.extractor import FeatureExtractor

EXTRACTORS = ("digits", "squeezenet", "inception", "dinov2")


def load_extractor(name: str, device: torch.device | str = "cpu", path: Path | str | None = None) -> FeatureExtractor:
    """Load `digits`, the bundled classifier, `squeezenet`, `inception`, on which FID is defined, or `dinov2`.

    `path` names weights: a file for squeezenet and inception, a folder or Hub id for dinov2. The default for the last
    two is the place to which they are downloaded. JLTError for weights that are missing or cannot be read; UsageError
    for an unknown name, with the nearest ones.
    """
    if name == "digits":
        from jlt.evaluation.digit_classifier import DigitClassifier

        if path is not None:
            raise UsageError("The extractor 'digits' is bundled and takes no --features-path.")
        return DigitClassifier.load().to(device)
    if name == "squeezenet":
        from jlt.evaluation.squeezenet import SqueezeNetExtractor

        return SqueezeNetExtractor.load(path).to(device)
    if name == "inception":
        from jlt.evaluation.inception import InceptionExtractor

        return InceptionExtractor.load(path).to(device)
    if name == "dinov2":
        from jlt.evaluation.dinov2 import DinoExtractor

        return DinoExtractor.load(path).to(device)
    raise unknown_name("feature extractor", name, EXTRACTORS)
