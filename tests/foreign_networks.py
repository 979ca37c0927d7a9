"""Checkpoints in the form of the JLT authors' and of JiT's programs, and JiT's forward pass, written from its facts."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open

GOLDEN = Path(__file__).parent / "golden"


def golden(name):
    """Return the settings and the tensors of a file of golden numbers."""
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        return json.loads(file.metadata()["config"]), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def authors_args(settings, **changes):
    args = {
        "model": "JLT-B/1",
        "img_size": settings["grid"] * 16,
        "vae_type": "flux2",
        "flow_matching": False,
        "P_mean": -0.7,
        "P_std": 0.9,
        "noise_scale": 1.5,
        "t_eps": 0.04,
        "label_drop_prob": 0.2,
        "ema_decay1": 0.999,
        "ema_decay2": 0.99,
        "lr": 1e-4,
        "blr": 5e-5,
        "class_num": settings["classes"],
        "batch_size": 128,
        **changes,
    }
    return argparse.Namespace(**{name: value for name, value in args.items() if value is not ...})


def authors_content(name="patch1", **changes):
    """Return the dictionary of a checkpoint with golden weights as its first average; `changes` are of its args."""
    settings, tensors = golden(name)
    weights = {key: value for key, value in tensors.items() if key.startswith("net.")}
    steps = {index: {"step": torch.tensor(1234.0), "exp_avg": torch.zeros(3)} for index in range(2)}
    return {
        "model": {key: value + 1 for key, value in weights.items()},
        "model_ema1": dict(weights),
        "model_ema2": {key: value + 2 for key, value in weights.items()},
        "optimizer": {"state": steps, "param_groups": [{"lr": 1e-4, "params": [0, 1]}]},
        "epoch": 4,
        "args": authors_args(settings, **changes),
    }


def saved(path, content):
    torch.save(content, path)
    return path


JIT = {"classes": 5, "side": 16, "patch": 4, "width": 32, "depth": 6, "heads": 2, "bottleneck": 7, "context": 3}


def jit_weights(seed=0, depth=6, patch=4, side=16, drift=0.0):
    """Return random weights under JiT's names, with positions that are off the fixed ones by up to `drift`."""
    generator = torch.Generator().manual_seed(seed)
    d, pca, mlp, head = (
        JIT["width"],
        JIT["bottleneck"],
        int(int(JIT["width"] * 4) * 2 / 3),
        JIT["width"] // JIT["heads"],
    )
    shapes = {
        "x_embedder.proj1.weight": (pca, 3, patch, patch),
        "x_embedder.proj2.weight": (d, pca, 1, 1),
        "x_embedder.proj2.bias": (d,),
        "in_context_posemb": (1, JIT["context"], d),
        "t_embedder.mlp.0.weight": (d, 256),
        "t_embedder.mlp.0.bias": (d,),
        "t_embedder.mlp.2.weight": (d, d),
        "t_embedder.mlp.2.bias": (d,),
        "y_embedder.embedding_table.weight": (JIT["classes"] + 1, d),
        "final_layer.norm_final.weight": (d,),
        "final_layer.linear.weight": (patch * patch * 3, d),
        "final_layer.linear.bias": (patch * patch * 3,),
        "final_layer.adaLN_modulation.1.weight": (2 * d, d),
        "final_layer.adaLN_modulation.1.bias": (2 * d,),
    }
    for block in (f"blocks.{index}." for index in range(depth)):
        shapes |= {block + name: (d,) for name in ("norm1.weight", "norm2.weight", "attn.proj.bias", "mlp.w3.bias")}
        shapes |= {block + name: (head,) for name in ("attn.q_norm.weight", "attn.k_norm.weight")}
        shapes |= {block + "attn.qkv.weight": (3 * d, d), block + "attn.qkv.bias": (3 * d,)}
        shapes |= {block + "attn.proj.weight": (d, d), block + "mlp.w3.weight": (d, mlp)}
        shapes |= {block + "mlp.w12.weight": (2 * mlp, d), block + "mlp.w12.bias": (2 * mlp,)}
        shapes |= {block + "adaLN_modulation.1.weight": (6 * d, d), block + "adaLN_modulation.1.bias": (6 * d,)}
    weights = {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    positions = jit_positions(d, side // patch).float()[None]
    weights["pos_embed"] = positions + drift * (2 * torch.rand(positions.shape, generator=generator) - 1)
    return weights


def jit_positions(width, grid):
    """Return the fixed positions in float64: sines, then cosines, of the column, then of the row."""
    row, column = torch.meshgrid(*2 * [torch.arange(grid, dtype=torch.float64)], indexing="ij")
    rate = 1 / 10_000 ** (torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    angles = [axis.reshape(-1, 1) * rate for axis in (column, row)]
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1)


def jit_forward(w, z, t, labels, depth=6, patch=4, start=2):
    """Return JiT's output, one plain operation after another and each weight under its name."""

    def linear(x, name):
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(x, name):
        return w[f"{name}.weight"] * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    n, d, heads = len(z), JIT["width"], JIT["heads"]
    rate = torch.exp(-math.log(10_000) * torch.arange(128) / 128)
    angles = t[:, None] * rate
    time = linear(torch.cat((angles.cos(), angles.sin()), 1), "t_embedder.mlp.0")
    label = w["y_embedder.embedding_table.weight"][labels]
    condition = F.silu(linear(F.silu(time), "t_embedder.mlp.2") + label)

    narrow = F.conv2d(z, w["x_embedder.proj1.weight"], stride=patch)
    x = F.conv2d(narrow, w["x_embedder.proj2.weight"], w["x_embedder.proj2.bias"])
    grid = x.shape[-1]
    x = x.flatten(2).transpose(1, 2) + w["pos_embed"]

    half = d // heads // 2
    turns = 1 / 10_000 ** (torch.arange(0, half, 2) / half)
    table = torch.cat(
        [
            (torch.arange(grid)[:, None, None] * turns).expand(grid, grid, -1),
            (torch.arange(grid)[None, :, None] * turns).expand(grid, grid, -1),
        ],
        dim=2,
    ).reshape(grid * grid, half)

    def turned(q, table):
        """Rotate the pairs of neighbouring values; q is (n, heads, tokens, values)."""
        a, b = q[..., 0::2], q[..., 1::2]
        pairs = (a * table.cos() - b * table.sin(), b * table.cos() + a * table.sin())
        return torch.stack(pairs, dim=-1).flatten(-2)

    for index in range(depth):
        block = f"blocks.{index}"
        if index == start:
            x = torch.cat((label[:, None] + w["in_context_posemb"], x), dim=1)
            table = torch.cat((torch.zeros(JIT["context"], half), table))
        parts = linear(condition, f"{block}.adaLN_modulation.1")[:, None].chunk(6, dim=-1)
        y = norm(x, f"{block}.norm1") * (1 + parts[1]) + parts[0]
        q, k, v = linear(y, f"{block}.attn.qkv").view(n, -1, 3, heads, d // heads).permute(2, 0, 3, 1, 4)
        q, k = turned(norm(q, f"{block}.attn.q_norm"), table), turned(norm(k, f"{block}.attn.k_norm"), table)
        mixed = (q @ k.mT / math.sqrt(d // heads)).softmax(-1) @ v
        x = x + parts[2] * linear(mixed.transpose(1, 2).reshape(n, -1, d), f"{block}.attn.proj")
        y = norm(x, f"{block}.norm2") * (1 + parts[4]) + parts[3]
        gate, up = linear(y, f"{block}.mlp.w12").chunk(2, -1)
        x = x + parts[5] * linear(F.silu(gate) * up, f"{block}.mlp.w3")

    shift, scale = linear(condition, "final_layer.adaLN_modulation.1")[:, None].chunk(2, dim=-1)
    out = linear(norm(x[:, -grid * grid :], "final_layer.norm_final") * (1 + scale) + shift, "final_layer.linear")
    pixels = out.view(n, grid, grid, patch, patch, 3).permute(0, 5, 1, 3, 2, 4)
    return pixels.reshape(n, 3, grid * patch, grid * patch)
