"""Names of systems: JLT-B/1 predicts x with the base network at patch 1, DiT-B/1 is the same network predicting v."""

from __future__ import annotations

from typing import Any

from jlt.config import FLUX2_IMAGENET256, LatentShape, NetworkConfig, Prediction, TrainConfig
from jlt.errors import unknown_name
from jlt.networks.sizes import SIZES, sized_network

FAMILIES: dict[Prediction, str] = {"x": "JLT", "v": "DiT", "eps": "DiT-eps"}
PATCH_SIZES = (1, 2, 4)


def system_name(prediction: Prediction, size: str, patch_size: int) -> str:
    """Return the name of a prediction with a network's size and patch."""
    return f"{FAMILIES[prediction]}-{size}/{patch_size}"


def preset(name: str, latents: LatentShape = FLUX2_IMAGENET256) -> tuple[Prediction, NetworkConfig]:
    """Return prediction and network of a name such as `JLT-B/1`, for latents of a shape; JLTError for unknown names."""
    systems = {
        system_name(prediction, size, patch_size): (prediction, size, patch_size)
        for prediction in FAMILIES
        for size in SIZES
        for patch_size in PATCH_SIZES
    }
    if name not in systems:
        raise unknown_name("network", name, systems)
    prediction, size, patch_size = systems[name]
    return prediction, sized_network(size, patch_size, latents)


def preset_config(name: str, **settings: Any) -> TrainConfig:
    """Return a training of a named network, such as `JLT-B/1`; UsageError for an unknown name."""
    prediction, network = preset(name)
    return TrainConfig(name=name, prediction=prediction, network=network, flips=True, **settings)
