"""Named sizes of the transformer."""

from __future__ import annotations

from jlt.config import LatentShape, NetworkConfig

SIZES = {
    # hidden size, depth, heads
    "XS": (64, 3, 4),
    "T": (192, 4, 3),
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "H": (1280, 32, 16),
}


def sized_network(size: str, patch_size: int, latents: LatentShape) -> NetworkConfig:
    """Return the network of a size in `SIZES` and a patch size, for latents of a shape."""
    hidden_size, depth, num_heads = SIZES[size]
    return NetworkConfig(
        **vars(latents), patch_size=patch_size, hidden_size=hidden_size, depth=depth, num_heads=num_heads
    )


def size_name(config: NetworkConfig) -> str:
    """Return the name of a network's size, or its hidden size and depth where it has none."""
    shape = (config.hidden_size, config.depth, config.num_heads)
    return next((name for name, known in SIZES.items() if known == shape), f"{config.hidden_size}x{config.depth}")
