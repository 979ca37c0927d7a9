"""Feature extractors by name."""

from __future__ import annotations

from pathlib import Path

import torch

from jlt.errors import UsageError, unknown_name
from jlt.evaluation.extractor import FeatureExtractor

EXTRACTORS = ("digits", "inception", "dinov2")


def load_extractor(name: str, device: torch.device | str = "cpu", path: Path | str | None = None) -> FeatureExtractor:
    """Load `digits`, the bundled classifier, `inception`, on which FID is defined, or `dinov2`.

    `path` says where weights are that are not bundled: a file for inception, a folder or Hub id for dinov2; without it
    they are looked for where they are fetched to. JLTError for weights that cannot be had or read, and for an unknown
    name, with the nearest ones.
    """
    if name == "digits":
        from jlt.evaluation.digit_classifier import DigitClassifier

        if path is not None:
            raise UsageError("The extractor 'digits' is bundled and takes no --features-path.")
        return DigitClassifier.load().to(device)
    if name == "inception":
        from jlt.evaluation.inception import InceptionExtractor

        return InceptionExtractor.load(path).to(device)
    if name == "dinov2":
        from jlt.evaluation.dinov2 import DinoExtractor

        return DinoExtractor.load(path).to(device)
    raise unknown_name("feature extractor", name, EXTRACTORS)
