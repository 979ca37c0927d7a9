"""Arithmetic of the network: multiply-adds count as two operations, matrix products and attention are counted."""

from __future__ import annotations

from jlt.config import NetworkConfig
from jlt.networks.layers import FREQUENCIES


def forward_flops(config: NetworkConfig) -> float:
    """Return the floating-point operations of one forward pass for one image."""
    size, patch_values = config.hidden_size, config.channels * config.patch_size**2
    embedding = _embedding_products(patch_values, size, config.bottleneck_size) * config.tokens
    condition = FREQUENCIES * size + size * size
    blocks = sum(_block_products(config, _tokens_in_block(config, index)) for index in range(config.depth))
    final = size * patch_values * config.tokens + 2 * size * size
    return 2.0 * (embedding + condition + blocks + final)


def training_flops(config: NetworkConfig) -> float:
    """Return the operations of one forward and backward pass for one image: three forwards, by the usual count."""
    return 3 * forward_flops(config)


def _embedding_products(patch_values: int, size: int, bottleneck: int) -> int:
    return patch_values * size if not bottleneck else bottleneck * (patch_values + size)


def _tokens_in_block(config: NetworkConfig, index: int) -> int:
    return config.tokens + (config.context_tokens if index >= config.context_start else 0)


def _block_products(config: NetworkConfig, tokens: int) -> int:
    size = config.hidden_size
    per_token = 4 * size * size + 3 * size * config.mlp_hidden_size
    attention = 2 * tokens * tokens * size
    modulation = 6 * size * size
    return tokens * per_token + attention + modulation
