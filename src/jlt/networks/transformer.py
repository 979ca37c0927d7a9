"""The one network of the project: JLT and DiT are this transformer and differ only in what its output means."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from jlt.config import NetworkConfig
from jlt.networks.layers import (
    FREQUENCIES,
    Block,
    ContextTokens,
    FinalLayer,
    RotaryPositions,
    TimeEmbedding,
    sincos_positions,
)
from jlt.patches import patchify, unpatchify


class Transformer(nn.Module):
    """Class-conditional transformer over latent patches: (z, t, label) -> an output shaped like z.

    It knows nothing of paths, prediction targets or guidance. Label `num_classes` is the null class.
    """

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpoint_blocks = False
        """Recompute each block in the backward pass: less memory, about a third more compute."""
        size, patch_values = config.hidden_size, config.channels * config.patch_size**2
        rows, columns = config.height // config.patch_size, config.width // config.patch_size

        self.patch_embedding = patch_embedding(patch_values, size, config.bottleneck_size)
        self.time_embedding = TimeEmbedding(size)
        self.class_embedding = nn.Embedding(config.num_classes + 1, size)
        self.rotary_positions = RotaryPositions(size // config.num_heads, rows, columns)
        sincos = sincos_positions(size, rows, columns) if config.fixed_positions or config.learned_positions else None
        self.learned_positions = nn.Parameter(sincos) if sincos is not None and config.learned_positions else None
        self.register_buffer("fixed_positions", sincos if config.fixed_positions else None, persistent=False)
        self.context = ContextTokens(size, config.context_tokens) if config.context_tokens else None
        self.blocks = nn.ModuleList(Block(size, config.num_heads, config.mlp_hidden_size) for _ in range(config.depth))
        self.final = FinalLayer(size, patch_values)
        initialise(self)

    def forward(
        self, z: Float[Tensor, "b c hh ww"], t: Float[Tensor, "b"], labels: Int[Tensor, "b"]
    ) -> Float[Tensor, "b c hh ww"]:
        """Return the output for noisy latents z at times t in [0, 1] with labels in [0, num_classes]."""
        config = self.config
        tokens = self.patch_embedding(patchify(z, config.patch_size))
        for positions in (self.fixed_positions, self.learned_positions):
            if positions is not None:
                tokens = tokens + positions
        class_embedding = self.class_embedding(labels)
        condition = F.silu(self.time_embedding(t) + class_embedding)

        for index, block in enumerate(self.blocks):
            if self.context is not None and index == config.context_start:
                tokens = self.context(tokens, class_embedding)
            if self.checkpoint_blocks and self.training:
                tokens = checkpoint(
                    block, tokens, condition, self.rotary_positions, use_reentrant=False, preserve_rng_state=False
                )
            else:
                tokens = block(tokens, condition, self.rotary_positions)

        patches = self.final(tokens[:, -config.tokens :], condition)
        return unpatchify(patches, config.patch_size, config.height, config.width)


def patch_embedding(patch_values: int, hidden_size: int, bottleneck_size: int) -> nn.Module:
    """Return the linear map from patches to tokens, through a bottleneck where its size is not 0 (Li and He 2025)."""
    if not bottleneck_size:
        return nn.Linear(patch_values, hidden_size)
    return nn.Sequential(nn.Linear(patch_values, bottleneck_size, bias=False), nn.Linear(bottleneck_size, hidden_size))


def initialise(network: Transformer) -> None:
    """Xavier-uniform matrices, small normal embeddings, and zeros where adaLN-zero and the output begin."""
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    small = [network.class_embedding.weight, network.time_embedding.input.weight, network.time_embedding.output.weight]
    if network.context is not None:
        small.append(network.context.positions)
    for weight in small:
        nn.init.normal_(weight, std=0.02)
    gates = [module.modulation for module in network.modules() if isinstance(module, Block | FinalLayer)]
    for layer in [network.final.linear, *gates]:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)


def build_network(config: NetworkConfig, seed: int) -> Transformer:
    """Return a network whose initial weights are a function of (config, seed) and of nothing else."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Transformer(config)


def count_parameters(network: nn.Module) -> int:
    """Return the number of trainable values."""
    return sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)


def fewest_parameters(config: NetworkConfig) -> int:
    """Return a number that no network of these sizes has fewer trainable values than, without making one."""
    width, blocks = config.hidden_size, config.depth
    embedded = config.channels * config.patch_size**2 * (config.bottleneck_size or width)
    return blocks * width * (4 * width + 3 * config.mlp_hidden_size) + config.num_classes * width + embedded


@functools.cache
def count_network(config: NetworkConfig) -> int:
    """Return the parameters of a network, counted without making its weights."""
    with torch.device("meta"):
        return count_parameters(Transformer(config))


def forward_flops(config: NetworkConfig) -> float:
    """Return the floating-point operations of one forward pass for one image.

    Matrix products and attention are counted, a multiply-add as two operations.
    """
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
