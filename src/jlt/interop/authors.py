"""Weights under the names of the JLT authors' own program, to this project's names.

Besides the names, three layouts differ, and each is a permutation of rows or columns:
- their patch embedding is a convolution, (d, C, p, p), ours a matrix over the same order of values, (d, C p p);
- their output patches run over (row, column, channel), ours over (channel, row, column) as the input's do;
- their rotary positions pair neighbouring values of a head, ours values half a head apart.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from jaxtyping import Shaped
from torch import Tensor

from jlt.config import NetworkConfig
from jlt.errors import JLTError

NAMES = {
    "x_embedder.proj": "patch_embedding",
    "t_embedder.mlp.0": "time_embedding.input",
    "t_embedder.mlp.2": "time_embedding.output",
    "y_embedder.embedding_table": "class_embedding",
    "final_layer.norm_final": "final.norm",
    "final_layer.linear": "final.linear",
    "final_layer.adaLN_modulation.1": "final.modulation",
}
BLOCK_NAMES = {
    "norm1": "attention_norm",
    "attn.qkv": "attention.qkv",
    "attn.proj": "attention.projection",
    "norm2": "mlp_norm",
    "mlp.w12": "mlp.gate_up",
    "mlp.w3": "mlp.down",
    "adaLN_modulation.1": "modulation",
}
UNUSED = {"mask_token"}
"""Parameters that the authors' network holds and never reads."""


def import_authors_weights(weights: Mapping[str, Tensor], config: NetworkConfig) -> dict[str, Tensor]:
    """Return a state dict for `Transformer(config)` from weights under the authors' names, without their prefix.

    Raises JLTError naming a weight that has no place here.
    """
    state = {}
    for name, weight in weights.items():
        if name in UNUSED or name.endswith(("attn.q_norm.weight", "attn.k_norm.weight")):
            continue
        module, _, kind = name.rpartition(".")
        state[f"{_our_module(module)}.{kind}"] = _our_layout(module, kind, weight, config)
    for index in range(config.depth):
        scales = [weights[f"blocks.{index}.attn.{which}_norm.weight"] for which in "qk"]
        state[f"blocks.{index}.attention.query_key_scale"] = torch.stack(scales)[:, _pair_order(len(scales[0]))]
    return state


def _our_module(module: str) -> str:
    block = re.fullmatch(r"blocks\.(\d+)\.(.+)", module)
    if block and block[2] in BLOCK_NAMES:
        return f"blocks.{block[1]}.{BLOCK_NAMES[block[2]]}"
    if module in NAMES:
        return NAMES[module]
    raise JLTError(f"The weight {module!r} has no place in this network: is it a checkpoint of another architecture?")


def _our_layout(module: str, kind: str, weight: Tensor, config: NetworkConfig) -> Tensor:
    if module == "x_embedder.proj" and kind == "weight":
        return weight.flatten(1)
    if module == "final_layer.linear":
        p = config.patch_size
        return weight.unflatten(0, (p, p, config.channels)).permute(2, 0, 1, *range(3, weight.ndim + 2)).flatten(0, 2)
    if module.endswith("attn.qkv"):
        return _reorder_query_key(weight, config)
    return weight


def _reorder_query_key(weight: Shaped[Tensor, "d3 ..."], config: NetworkConfig) -> Shaped[Tensor, "d3 ..."]:
    head_size = config.hidden_size // config.num_heads
    query_key, value = weight.split([2 * config.hidden_size, config.hidden_size])
    turned = query_key.unflatten(0, (2 * config.num_heads, head_size))[:, _pair_order(head_size)]
    return torch.cat((turned.flatten(0, 1), value))


def _pair_order(head_size: int) -> Tensor:
    """Return the order that puts the first value of each neighbouring pair in front, then the second ones."""
    return torch.arange(head_size).view(-1, 2).T.reshape(-1)
