"""Exact arithmetic: equal inputs give equal bits on equal devices."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def exact_arithmetic(threads: int) -> Iterator[None]:
    """Compute, for the duration of a block, so that equal inputs give equal bits on equal devices.

    On a CPU the number of threads decides the last bits. On a GPU, TF32 is off and cuDNN uses deterministic kernels.
    """
    cudnn, products = torch.backends.cudnn, torch.backends.cuda.matmul
    convolutions: Any = cudnn.conv  # type: ignore[attr-defined]
    before = torch.get_num_threads(), convolutions.fp32_precision, products.fp32_precision, cudnn.deterministic
    try:
        torch.set_num_threads(threads)
        convolutions.fp32_precision = products.fp32_precision = "ieee"
        cudnn.deterministic = True
        yield
    finally:
        torch.set_num_threads(before[0])
        convolutions.fp32_precision, products.fp32_precision, cudnn.deterministic = before[1:]
