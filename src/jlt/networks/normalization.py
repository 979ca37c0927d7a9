"""Root-mean-square normalisation (Zhang and Sennrich 2019), accumulated in float32 in every precision.

PyTorch fuses it on a GPU and when compiling; eagerly on a CPU it runs a dozen separate operations over all tokens. The
function below needs two there and four in the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

NORM_EPS = 1e-6


def rms_normalise(x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
    """Return x / sqrt(mean(x^2) + 1e-6), the mean over the last axis, in x's precision."""
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
