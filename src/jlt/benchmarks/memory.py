"""Memory of the network's forward and backward pass, by a formula for each part.

In the formulas n is the number of tokens, d the hidden size, m that of the perceptron, b the bytes of a value and r
those of a value between blocks. Attention saves what a flash kernel does: queries, keys, values, result and log-sums.
What a kernel allocates for itself while it runs is not counted.
"""

from __future__ import annotations

from dataclasses import dataclass

from jlt.config import NetworkConfig
from jlt.networks.layers import FREQUENCIES
from jlt.networks.transformer import tokens_in_block

FLOAT32, BFLOAT16 = 4, 2


@dataclass(frozen=True)
class PassMemory:
    """Bytes of one forward and backward pass, without weights, their gradients, and the latents that come in."""

    activations: int
    """What autograd saves for the images, the output included."""
    copies_and_tables: int
    """What it saves for any number of images: bfloat16 copies of weights under autocast, and rotary tables."""
    working: int
    """The peak of the passes above what is saved."""

    @property
    def saved(self) -> int:
        """Bytes in use between the two passes."""
        return self.activations + self.copies_and_tables


def pass_memory(
    config: NetworkConfig, images: int, bfloat16: bool, checkpoint_blocks: bool, fused_norm: bool
) -> PassMemory:
    """Return the memory of a network's eager passes for a number of images.

    `bfloat16` is autocast, and `checkpoint_blocks` recomputes each block in the backward pass. A GPU's RMS
    normalisation (`fused_norm`) saves its input as well as its result, which the one of a CPU saves alone.
    """
    b, d, m = BFLOAT16 if bfloat16 else FLOAT32, config.hidden_size, config.mlp_hidden_size
    blocks = [_saved_by_block(config, index, b, fused_norm) for index in range(config.depth)]
    inputs = [tokens_in_block(config, index) * d * _residual_bytes(config, index, b) for index in range(config.depth)]
    ends, one_block, all_blocks = (_copied(config, count) if bfloat16 else 0 for count in (0, 1, config.depth))
    n, r = tokens_in_block(config, config.depth - 1), _residual_bytes(config, config.depth - 1, b)
    # The difference to the target, its square, and the gradients of both, in float32.
    loss = images * 5 * FLOAT32 * config.tokens * _patch_values(config)
    # In a block: gradients within the perceptron, or one of its weights.
    within = 2 * m * b - (3 if fused_norm else 2) * d * r
    gradients = max(images * n * within, images * (1 if fused_norm else 2) * n * d * r + d * m * FLOAT32)
    if checkpoint_blocks:
        recomputed = images * (max(blocks) - (max(inputs) if fused_norm else 0))
        forward = all_blocks - ends + images * n * max(10 * d, 4 * m + d) * b
        backward = one_block - ends + recomputed + gradients
        saved = _saved_by_ends(config, b, fused_norm) + sum(inputs)
        return PassMemory(images * saved, ends, max(loss, forward, backward))
    saved = _saved_by_ends(config, b, fused_norm) + sum(blocks)
    tables = sum(_rotary_tables(config, index, b) for index in range(config.depth))
    return PassMemory(images * saved, all_blocks + tables, max(loss, gradients, images * 3 * n * d * r))


def _residual_bytes(config: NetworkConfig, index: int, b: int) -> int:
    """Return the bytes of a value that enters a block: positions and context tokens are float32."""
    added = config.fixed_positions or config.learned_positions or tokens_in_block(config, index) > config.tokens
    return FLOAT32 if added else b


def _patch_values(config: NetworkConfig) -> int:
    return config.channels * config.patch_size**2


def _saved_by_block(config: NetworkConfig, index: int, b: int, fused_norm: bool) -> int:
    """Return the bytes that autograd saves in a block for an image."""
    n, r = tokens_in_block(config, index), _residual_bytes(config, index, b)
    d, m, heads = config.hidden_size, config.mlp_hidden_size, config.num_heads
    # Results of both normalisations, and where they are fused their inputs.
    norms = n * d * r * (4 if fused_norm else 2)
    # Modulated inputs of both branches 2, queries, keys and values 3, queries and keys normalised 2, rolled 2 and
    # rotated 2, attention 1, results of both branches 2; gate and up 2, SiLU of the gate 1, their product 1.
    branches = n * (14 * d + 4 * m) * b
    # Inverse norms of the tokens 2, of queries and keys by head 2, log-sums by head 1.
    statistics = n * (2 + 3 * heads) * FLOAT32
    # Shifts, scales and gates 6, 1 + scale 2, its product with the learnt scale 2; the condition that autocast copies.
    modulation = d * (8 * b + 2 * r + (b if b == BFLOAT16 else 0))
    return norms + branches + statistics + modulation


def _saved_by_ends(config: NetworkConfig, b: int, fused_norm: bool) -> int:
    """Return the bytes that autograd saves in the embeddings and the final layer for an image, and the output."""
    n, d, patch = config.tokens, config.hidden_size, _patch_values(config)
    r = _residual_bytes(config, config.depth - 1, b)
    embedding = n * (patch + config.bottleneck_size) * b
    # Sinusoids, the perceptron's values before and after SiLU, their sum with the class, and the condition.
    condition = (FREQUENCIES + 3 * d) * b + d * FLOAT32
    normalised = n * (d * r + FLOAT32) + (tokens_in_block(config, config.depth - 1) * d * r if fused_norm else 0)
    final = normalised + n * d * b + d * (b + r)
    return embedding + condition + final + n * patch * b


def _copied(config: NetworkConfig, blocks: int) -> int:
    """Return the bytes of bfloat16 copies of the matrices whose inputs have gradients, of some blocks and both ends."""
    d, patch = config.hidden_size, _patch_values(config)
    block = 10 * d * d + 3 * d * config.mlp_hidden_size
    return BFLOAT16 * (blocks * block + 3 * d * d + d * (patch + config.bottleneck_size))


def _rotary_tables(config: NetworkConfig, index: int, b: int) -> int:
    """Return the bytes of a block's cosines and sines times learnt scales, and of tables padded for context tokens."""
    n, head_size = tokens_in_block(config, index), config.hidden_size // config.num_heads
    padded = 2 * n * head_size * FLOAT32 if n > config.tokens else 0
    return 4 * n * head_size * b + padded
