"""Named sizes: JLT-S/B/L/H with patch 1, 2 or 4, and DiT-... for the same network with velocity prediction."""

from __future__ import annotations

from jlt.config import NetworkConfig, Prediction
from jlt.data.shape import FLUX2_IMAGENET256, LatentShape
from jlt.errors import unknown_name

PRESETS = {
    # hidden size, depth, heads
    "XS": (64, 3, 4),
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "H": (1280, 32, 16),
}
FAMILIES: dict[str, Prediction] = {"JLT": "x", "DiT": "v", "DiT-eps": "eps"}
PATCH_SIZES = (1, 2, 4)


def preset_names() -> list[str]:
    """Return every name that `preset` knows."""
    return [f"{family}-{size}/{patch}" for family in FAMILIES for size in PRESETS for patch in PATCH_SIZES]


def preset(name: str, latents: LatentShape = FLUX2_IMAGENET256) -> tuple[Prediction, NetworkConfig]:
    """Return prediction and network of a name such as `JLT-B/1`, for latents of a shape; JLTError for unknown names."""
    if name not in preset_names():
        raise unknown_name("network", name, preset_names())
    system, patch = name.split("/")
    family, _, size = system.rpartition("-")
    return FAMILIES[family], sized_network(size, int(patch), latents)


def sized_network(size: str, patch_size: int, latents: LatentShape) -> NetworkConfig:
    """Return the network of a size (`B`) and patch for latents of a shape."""
    hidden_size, depth, num_heads = PRESETS[size]
    return NetworkConfig(
        channels=latents.channels,
        height=latents.height,
        width=latents.width,
        num_classes=latents.num_classes,
        patch_size=patch_size,
        hidden_size=hidden_size,
        depth=depth,
        num_heads=num_heads,
    )


def system_name(prediction: Prediction, size: str, patch_size: int) -> str:
    """Return the name of a prediction with a size and patch: the inverse of `preset`."""
    family = next(family for family, known in FAMILIES.items() if known == prediction)
    return f"{family}-{size}/{patch_size}"
