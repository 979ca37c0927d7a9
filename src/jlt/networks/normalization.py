"""Root-mean-square normalisation (Zhang and Sennrich 2019), accumulated in float32 in every precision.

PyTorch fuses it on a GPU and when compiling; eagerly on a CPU it runs a dozen separate operations over all tokens. The
function below needs two there and four in the backward pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

NORM_EPS = 1e-6
_keeps_input = False


def rms_normalise(x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
    """Return x / sqrt(mean(x^2) + 1e-6), the mean over the last axis, in x's precision."""
    if x.is_cuda or torch.compiler.is_compiling():
        # A GPU's autocast would hand back float32; the kernel accumulates in float32 in either case.
        with torch.autocast(x.device.type, enabled=False):
            return F.rms_norm(x, x.shape[-1:], eps=NORM_EPS)
    return _RMSNormalise.apply(x, _keeps_input)


@contextlib.contextmanager
def saving_as_on_a_gpu() -> Iterator[None]:
    """Within, a CPU keeps for the backward pass what a GPU's fused kernel keeps: the input, and not the result.

    For counting a GPU's memory where there is none; values and gradients are the same.
    """
    global _keeps_input
    before, _keeps_input = _keeps_input, True
    try:
        yield
    finally:
        _keeps_input = before


class _RMSNormalise(torch.autograd.Function):
    """y = x r with r = 1 / rms(x), and dL/dx = r (g - y mean(g y)) for g = dL/dy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, keeps_input: bool) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=max_precision(x))
        r = (norm.square() / x.shape[-1] + NORM_EPS).rsqrt()
        y = _multiply(x, r)
        ctx.keeps_input = keeps_input
        ctx.save_for_backward(x if keeps_input else y, r)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (g,) = gradients
        kept, r = ctx.saved_tensors
        y = _multiply(kept, r) if ctx.keeps_input else kept
        along = (g * y).mean(dim=-1, keepdim=True, dtype=r.dtype)
        return _multiply(torch.addcmul(g, y, along.to(y.dtype), value=-1), r), None


def max_precision(x: Tensor) -> torch.dtype:
    """Return float32, or the tensor's own precision where that is higher."""
    return torch.promote_types(x.dtype, torch.float32)


def _multiply(x: Tensor, factor: Tensor) -> Tensor:
    """Return x * factor, computed in the factor's precision and rounded once to x's."""
    return torch.mul(x, factor, out=torch.empty_like(x))
