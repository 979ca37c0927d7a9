"""The transformer's layers.

Shapes: b batch, n tokens, d hidden size, h heads, k = d / h values per head.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

FREQUENCIES = 256
"""Values of the sinusoidal embedding of time."""
NORM_EPS = 1e-6


def rms_normalise(x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
    """Return x / sqrt(mean(x^2) + 1e-6), the mean over the last axis and in float32, in x's precision.

    PyTorch fuses it (Zhang and Sennrich 2019) on a GPU and when compiling; eagerly on a CPU it runs a dozen separate
    operations over all tokens. The function below needs two there and four in the backward pass.
    """
    if x.is_cuda or torch.compiler.is_compiling():
        # A GPU's autocast would return float32; the kernel accumulates in float32 in either case.
        with torch.autocast(x.device.type, enabled=False):
            return F.rms_norm(x, x.shape[-1:], eps=NORM_EPS)
    return _RMSNormalise.apply(x)


class _RMSNormalise(torch.autograd.Function):
    """y = x r with r = 1 / rms(x), and dL/dx = r (g - y mean(g y)) for g = dL/dy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        # Float32, or x's own precision where that is higher.
        precision = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=precision)
        r = (norm.square() / x.shape[-1] + NORM_EPS).rsqrt()
        y = _multiply(x, r)
        ctx.save_for_backward(y, r)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (g,) = gradients
        y, r = ctx.saved_tensors
        along = (g * y).mean(dim=-1, keepdim=True, dtype=r.dtype)
        return _multiply(torch.addcmul(g, y, along.to(y.dtype), value=-1), r)


def _multiply(x: Tensor, factor: Tensor) -> Tensor:
    """Return x * factor, computed in the factor's precision and rounded once to x's."""
    return torch.mul(x, factor, out=torch.empty_like(x))


class ModulatedNorm(nn.Module):
    """RMS normalisation with a learnt scale, then a shift and a scale per sample (adaLN, Peebles and Xie 2023).

    The learnt scale (Zhang and Sennrich 2019) is folded into the sample's, which is small, instead of being
    multiplied into every token.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(
        self, x: Float[Tensor, "b n d"], shift: Float[Tensor, "b d"], scale: Float[Tensor, "b d"]
    ) -> Float[Tensor, "b n d"]:
        """Return the normalised tokens times weight (1 + scale), plus shift."""
        normalised = rms_normalise(x)
        factor = (self.weight * (1 + scale)).to(x.dtype)
        return torch.addcmul(shift.unsqueeze(1).to(x.dtype), normalised, factor.unsqueeze(1))


class TimeEmbedding(nn.Module):
    """Sinusoids of t in [0, 1] at geometric frequencies from 1 down to 1e-4, through a two-layer perceptron."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.input = nn.Linear(FREQUENCIES, hidden_size)
        self.output = nn.Linear(hidden_size, hidden_size)
        exponents = torch.arange(FREQUENCIES // 2) / (FREQUENCIES // 2)
        self.register_buffer("frequencies", torch.exp(-math.log(10_000) * exponents), persistent=False)
        self.frequencies: Tensor

    def forward(self, t: Float[Tensor, "b"]) -> Float[Tensor, "b d"]:
        """Embed times in [0, 1]."""
        angles = t[:, None].float() * self.frequencies
        sinusoids = torch.cat((angles.cos(), angles.sin()), dim=1).to(self.input.weight.dtype)
        return self.output(F.silu(self.input(sinusoids)))


class RotaryPositions(nn.Module):
    """2-D rotary positions (Su et al. 2021): half of a head's values turn with the row, half with the column.

    Value i is paired with value i + k/2, so that a rotation is one roll. Tokens that stand before the image's (the
    in-context class tokens) are not turned.
    """

    def __init__(self, head_size: int, height: int, width: int) -> None:
        super().__init__()
        self.pair_offset = head_size // 2
        frequencies = 10_000.0 ** (-torch.arange(0, self.pair_offset, 2) / self.pair_offset)
        rows = torch.arange(height)[:, None].expand(height, width).reshape(-1, 1)
        columns = torch.arange(width)[None, :].expand(height, width).reshape(-1, 1)
        angles = torch.cat((rows * frequencies, columns * frequencies), dim=1)
        self.register_buffer("cos", torch.cat((angles.cos(), angles.cos()), dim=1), persistent=False)
        self.register_buffer("sin", torch.cat((-angles.sin(), angles.sin()), dim=1), persistent=False)
        self.cos: Tensor
        self.sin: Tensor

    def forward(self, x: Float[Tensor, "b n s h k"], scale: Float[Tensor, "s k"]) -> Float[Tensor, "b n s h k"]:
        """Return `scale * x` turned by each token's position; s runs over queries and keys."""
        cos, sin = self.cos, self.sin
        if before := x.shape[1] - len(cos):
            cos, sin = F.pad(cos, (0, 0, before, 0), value=1.0), F.pad(sin, (0, 0, before, 0))
        # (scale x) cos + roll(scale x) sin, with the learnt scale folded into the small tables.
        cos = (cos[:, None] * scale).unsqueeze(2)
        sin = (sin[:, None] * scale.roll(self.pair_offset, dims=-1)).unsqueeze(2)
        return torch.addcmul(x * cos.to(x.dtype), x.roll(self.pair_offset, dims=-1), sin.to(x.dtype))


class Attention(nn.Module):
    """Self-attention with normalised, rotated queries and keys; PyTorch's own kernel."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        head_size = hidden_size // num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.query_key_scale = nn.Parameter(torch.ones(2, head_size))
        self.projection = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Float[Tensor, "b n d"], positions: RotaryPositions) -> Float[Tensor, "b n d"]:
        """Mix the tokens of each sample."""
        b, n, d = x.shape
        qkv = self.qkv(x).view(b, n, 3, self.num_heads, d // self.num_heads)
        query_key, value = qkv.split((2, 1), dim=2)
        query_key = rms_normalise(query_key)
        query, key = positions(query_key, self.query_key_scale).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value.squeeze(2).transpose(1, 2))
        return self.projection(mixed.transpose(1, 2).reshape(b, n, d))


class SwiGLU(nn.Module):
    """Gated perceptron, down(silu(gate x) * up x) (Shazeer 2020)."""

    def __init__(self, size: int, hidden_size: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(size, 2 * hidden_size)
        self.down = nn.Linear(hidden_size, size)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """Map each token by itself."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """Attention and perceptron, each modulated before and gated after by the condition (adaLN-zero)."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_hidden_size: int) -> None:
        super().__init__()
        self.attention_norm = ModulatedNorm(hidden_size)
        self.attention = Attention(hidden_size, num_heads)
        self.mlp_norm = ModulatedNorm(hidden_size)
        self.mlp = SwiGLU(hidden_size, mlp_hidden_size)
        self.modulation = nn.Linear(hidden_size, 6 * hidden_size)

    def forward(
        self, x: Float[Tensor, "b n d"], condition: Float[Tensor, "b d"], positions: RotaryPositions
    ) -> Float[Tensor, "b n d"]:
        """Return the tokens after the block; `condition` has been through its SiLU."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(condition).chunk(6, dim=1)
        attended = self.attention(self.attention_norm(x, shift_a, scale_a), positions)
        x = torch.addcmul(x, gate_a.unsqueeze(1), attended)
        return torch.addcmul(x, gate_m.unsqueeze(1), self.mlp(self.mlp_norm(x, shift_m, scale_m)))


class FinalLayer(nn.Module):
    """Modulated normalisation and the linear map from tokens to patches."""

    def __init__(self, hidden_size: int, patch_values: int) -> None:
        super().__init__()
        self.norm = ModulatedNorm(hidden_size)
        self.modulation = nn.Linear(hidden_size, 2 * hidden_size)
        self.linear = nn.Linear(hidden_size, patch_values)

    def forward(self, x: Float[Tensor, "b n d"], condition: Float[Tensor, "b d"]) -> Float[Tensor, "b n patch"]:
        """Return a patch of output for each token."""
        shift, scale = self.modulation(condition).chunk(2, dim=1)
        return self.linear(self.norm(x, shift, scale))


class ContextTokens(nn.Module):
    """In-context class tokens: the class embedding repeated, each copy with a learnt position (Li and He 2025)."""

    def __init__(self, hidden_size: int, count: int) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.empty(count, hidden_size))

    def forward(self, x: Float[Tensor, "b n d"], class_embedding: Float[Tensor, "b d"]) -> Float[Tensor, "b m d"]:
        """Return the tokens with the context put before them."""
        return torch.cat((class_embedding.unsqueeze(1) + self.positions, x), dim=1)


def sincos_positions(hidden_size: int, height: int, width: int) -> Float[Tensor, "n d"]:
    """Return fixed 2-D sin-cos positions: half of the values for the row, half for the column."""
    frequencies = 10_000.0 ** (-torch.arange(hidden_size // 4) / (hidden_size // 4))
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    angles = [axis.reshape(-1, 1) * frequencies for axis in (columns, rows)]
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1)
