"""Arithmetic of the network: multiply-adds count as two operations, matrix products and attention are counted."""

from __future__ import annotations

from jlt.config import NetworkConfig
from jlt.networks.layers import FREQUENCIES


def forward_flops(config: NetworkConfig) -> float:
    """Return the floating-point operations of one forward pass for one image."""
    size, patch_values = config.hidden_size, config.channels * config.patch_size**2
    embedding = config.bottleneck_size * (patch_values + size) if config.bottleneck_size else patch_values * size
    condition = FREQUENCIES * size + size * size
    final = size * patch_values * config.tokens + 2 * size * size
    blocks = 0
    for index in range(config.depth):
        tokens = tokens_in_block(config, index)
        per_token = 4 * size * size + 3 * size * config.mlp_hidden_size
        attention, modulation = 2 * tokens * tokens * size, 6 * size * size
        blocks += tokens * per_token + attention + modulation
    return 2.0 * (embedding * config.tokens + condition + blocks + final)


def training_flops(config: NetworkConfig) -> float:
    """Return the operations of one forward and backward pass for one image: three forwards, by the usual count."""
    return 3 * forward_flops(config)


def tokens_in_block(config: NetworkConfig, index: int) -> int:
    """Return the tokens of a block: those of the image, and the context tokens where they have entered."""
    return config.tokens + (config.context_tokens if index >= config.context_start else 0)
