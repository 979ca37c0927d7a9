"""Networks under the names of the JLT authors' program, and of JiT's, to this project's configuration and names.

JiT (Li and He 2025, arXiv 2511.13720) is the program that theirs is based on: its networks also have a bottleneck
in the patch embedding, positions that are added to the tokens, and in-context class tokens.

Besides the names, three layouts differ, and each is a permutation of rows or columns:
- their patch embedding is a convolution, (d, C, p, p), ours a matrix over the same order of values, (d, C p p);
- their output patches run over (row, column, channel), ours over (channel, row, column) as the input's do;
- their rotary positions pair neighbouring values of a head, ours values half a head apart.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor

from jlt.config import NetworkConfig, swiglu_size
from jlt.errors import JLTError
from jlt.networks.layers import FREQUENCIES, RotaryPositions, sincos_positions

NAMES = {
    "x_embedder.proj": "patch_embedding",
    "x_embedder.proj1": "patch_embedding.0",
    "x_embedder.proj2": "patch_embedding.1",
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
ADDED = {"pos_embed": "learned_positions", "in_context_posemb": "context.positions"}
"""Tensors with a leading axis of length 1 that are added to tokens."""
UNUSED = {"mask_token"}
"""Parameters that the authors' network holds and never reads."""
ROTARY = tuple(f"{table}.freqs_{part}" for table in ("feat_rope", "feat_rope_incontext") for part in ("cos", "sin"))
"""Rotary tables, which follow from the sizes: their program computes them, and some files hold them too."""
COMPUTED_POSITIONS = 1e-5
"""Positions that differ from the fixed ones by no more than this are the fixed ones, rounded."""
ROUNDED_ANGLES = 1e-2
"""Largest difference between rotary tables of the same positions, which a file may hold in bfloat16."""

Shape = tuple[int, ...]


def read_config(weights: Mapping[str, Tensor], side: int, context_start: int) -> NetworkConfig:
    """Return the configuration of a network from the shapes of its weights, under their names without a prefix.

    `side` is that of the latents where the file holds no positions, whose number decides otherwise. Class tokens enter
    before block `context_start`. Positions count as learnt; see `holds_fixed_positions`.

    Raises JLTError naming the first weight that is missing, unexpected or of another shape.
    """
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    bottleneck = "x_embedder.proj1.weight" in shapes
    embedding = "x_embedder.proj1.weight" if bottleneck else "x_embedder.proj.weight"
    first, channels, patch_size, _ = _shape_of(shapes, embedding, 4)
    (hidden_size,) = _shape_of(shapes, "final_layer.norm_final.weight", 1)
    (head_size,) = _shape_of(shapes, "blocks.0.attn.q_norm.weight", 1)
    _, mlp_size = _shape_of(shapes, "blocks.0.mlp.w3.weight", 2)
    classes, _ = _shape_of(shapes, "y_embedder.embedding_table.weight", 2)
    context_tokens = _shape_of(shapes, "in_context_posemb", 3)[1] if "in_context_posemb" in shapes else 0
    if positions := "pos_embed" in shapes:
        tokens = _shape_of(shapes, "pos_embed", 3)[1]
        side = math.isqrt(tokens) * patch_size
        if math.isqrt(tokens) ** 2 != tokens:
            raise JLTError(f"pos_embed holds {tokens} positions, which are not those of a square.")
    config = NetworkConfig(
        channels=channels,
        height=side,
        width=side,
        num_classes=classes - 1,
        patch_size=patch_size,
        hidden_size=hidden_size,
        depth=len({found[1] for name in shapes if (found := re.match(r"blocks\.(\d+)\.", name))}),
        num_heads=max(1, hidden_size // head_size),
        mlp_ratio=_mlp_ratio(hidden_size, mlp_size),
        bottleneck_size=first if bottleneck else 0,
        context_tokens=context_tokens,
        context_start=context_start if context_tokens else 0,
        learned_positions=positions,
    )
    tables = {name: (config.tokens + _unturned(config, name), head_size) for name in ROTARY if name in shapes}
    _require_shapes(shapes, _their_shapes(config, mlp_size) | tables)
    for name in tables:
        if not (weights[name].float() - _rotary_table(config, name)).abs().max() <= ROUNDED_ANGLES:
            raise JLTError(f"{name} holds other rotary positions than those of this network.")
    return config


def holds_fixed_positions(weights: Mapping[str, Tensor], config: NetworkConfig) -> bool:
    """Return whether the positions in a file of weights are the fixed sin-cos ones, up to rounding."""
    side = config.height // config.patch_size
    fixed = sincos_positions(config.hidden_size, side, side)
    return bool((weights["pos_embed"].float() - fixed).abs().max() <= COMPUTED_POSITIONS)


def import_authors_weights(weights: Mapping[str, Tensor], config: NetworkConfig) -> dict[str, Tensor]:
    """Return a state dict for `Transformer(config)` from weights under the authors' names, without their prefix.

    Raises JLTError naming a weight that has no place here.
    """
    state = {}
    for name, weight in weights.items():
        if name in UNUSED or name in ROTARY or name.endswith(("attn.q_norm.weight", "attn.k_norm.weight")):
            continue
        if name in ADDED:
            if name != "pos_embed" or config.learned_positions:
                state[ADDED[name]] = weight.squeeze(0)
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
    if module.startswith("x_embedder.") and kind == "weight":
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


def _shape_of(shapes: Mapping[str, Shape], name: str, axes: int) -> Shape:
    """Return the shape of a weight that decides a size; JLTError unless it is there with this number of axes."""
    if name not in shapes:
        raise JLTError(f"{name} is missing.{_similar(name, shapes)}")
    if len(shapes[name]) != axes or 0 in shapes[name]:
        raise JLTError(f"{name} has the shape {shapes[name]}, and {axes} axes are expected, none of them empty.")
    return shapes[name]


def _require_shapes(found: Mapping[str, Shape], wanted: Mapping[str, Shape]) -> None:
    """Raise JLTError naming the first weight that is missing, of another shape, or unexpected."""
    unexpected = [name for name in found if name not in wanted and name not in UNUSED]
    for name, shape in wanted.items():
        if name not in found:
            raise JLTError(f"{name} is missing.{_similar(name, unexpected)}")
        if found[name] != shape:
            raise JLTError(f"{name} has the shape {found[name]} instead of {shape}.")
    if unexpected:
        raise JLTError(f"{unexpected[0][:80]!r} is unexpected: this network has no such weight.")


def _similar(name: str, names: Iterable[str]) -> str:
    """Return a second sentence about a name that stands where `name` is expected, which may be a renamed weight."""
    group = name.rpartition(".")[0].rpartition(".")[0]
    # A name after a prefix, such as that of a compiled network, is nearer than another one of the same group.
    prefixed = [other for other in names if other.endswith(f".{name}")]
    near = prefixed or [other for other in names if group and other.startswith(f"{group}.")]
    return f" The file has {near[0][:80]!r} in its place." if near else ""


def _their_shapes(config: NetworkConfig, mlp_size: int) -> dict[str, Shape]:
    """Return the shape of every weight of a network, under their names and in the order of the network."""
    d, p, channels = config.hidden_size, config.patch_size, config.channels
    bottleneck, head_size = config.bottleneck_size, config.hidden_size // config.num_heads
    shapes: dict[str, Shape] = {}
    if bottleneck:
        shapes["x_embedder.proj1.weight"] = (bottleneck, channels, p, p)
        shapes |= _with_bias("x_embedder.proj2", d, bottleneck, 1, 1)
    else:
        shapes |= _with_bias("x_embedder.proj", d, channels, p, p)
    if config.learned_positions:
        shapes["pos_embed"] = (1, config.tokens, d)
    if config.context_tokens:
        shapes["in_context_posemb"] = (1, config.context_tokens, d)
    shapes |= _with_bias("t_embedder.mlp.0", d, FREQUENCIES) | _with_bias("t_embedder.mlp.2", d, d)
    shapes["y_embedder.embedding_table.weight"] = (config.num_classes + 1, d)
    for block in (f"blocks.{index}" for index in range(config.depth)):
        shapes |= {f"{block}.norm1.weight": (d,), f"{block}.norm2.weight": (d,)}
        shapes |= {f"{block}.attn.{which}_norm.weight": (head_size,) for which in "qk"}
        shapes |= _with_bias(f"{block}.attn.qkv", 3 * d, d) | _with_bias(f"{block}.attn.proj", d, d)
        shapes |= _with_bias(f"{block}.mlp.w12", 2 * mlp_size, d) | _with_bias(f"{block}.mlp.w3", d, mlp_size)
        shapes |= _with_bias(f"{block}.adaLN_modulation.1", 6 * d, d)
    shapes["final_layer.norm_final.weight"] = (d,)
    shapes |= _with_bias("final_layer.adaLN_modulation.1", 2 * d, d)
    return shapes | _with_bias("final_layer.linear", p * p * channels, d)


def _with_bias(module: str, *shape: int) -> dict[str, Shape]:
    return {f"{module}.weight": shape, f"{module}.bias": shape[:1]}


def _rotary_table(config: NetworkConfig, name: str) -> Float[Tensor, "n k"]:
    """Return a table of theirs: each angle twice, and class tokens, which are not turned, in front."""
    side = config.height // config.patch_size
    ours = RotaryPositions(config.hidden_size // config.num_heads, side, side)
    cosines = name.endswith("cos")
    half = (ours.cos if cosines else ours.sin)[:, ours.pair_offset :]
    return F.pad(half.repeat_interleave(2, dim=1), (0, 0, _unturned(config, name), 0), value=float(cosines))


def _unturned(config: NetworkConfig, name: str) -> int:
    """Return the class tokens in front of a rotary table."""
    return config.context_tokens if "incontext" in name else 0


def _mlp_ratio(hidden_size: int, mlp_size: int) -> float:
    """Return the nominal ratio of a perceptron: 4, or the smallest one that gives its size."""
    for nominal in (4 * hidden_size, -(-3 * mlp_size // 2), -(-3 * mlp_size // 2) + 1):
        ratio = nominal / hidden_size
        if swiglu_size(hidden_size, ratio) == mlp_size:
            return ratio
    raise JLTError(f"blocks.0.mlp.w3.weight has {mlp_size} columns, which no ratio to {hidden_size} gives.")
