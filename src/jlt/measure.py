"""What this machine does while work runs on it: its rate of arithmetic, the time that work takes, and memory."""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

MATMUL_SIZES = {"cpu": 2048, "cuda": 8192}
SMALL_MATMUL = 256


def matmul_rate(dtype: torch.dtype, device: torch.device | str, repeats: int = 7, size: int | None = None) -> float:
    """Return the best rate of a square matrix product in operations per second."""
    n = size or MATMUL_SIZES[torch.device(device).type]
    a, b = torch.ones(2, n, n, device=device, dtype=dtype)
    return 2 * n**3 / min(seconds_of(lambda: a @ b, device) for _ in range(repeats))


def quick_matmul_rate(dtype: torch.dtype, device: torch.device | str) -> float:
    """Return `matmul_rate`, of a small product where the usual one takes more than a second."""
    # Some processors have no instructions for bfloat16 and are hundreds of times slower in it.
    rate = matmul_rate(dtype, device, repeats=2, size=SMALL_MATMUL)
    return rate if 2 * MATMUL_SIZES[torch.device(device).type] ** 3 / rate > 1 else matmul_rate(dtype, device)


def seconds_of(work: Callable[[], Any], device: torch.device | str) -> float:
    """Return how long some work takes, on its device too."""
    _finish(device)
    start = time.perf_counter()
    work()
    _finish(device)
    return time.perf_counter() - start


def peak_memory(device: torch.device | str) -> int:
    """Return the peak memory in bytes: of the GPU where there is one, of the process elsewhere."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        # Rather than getrusage, whose figure a process on Linux inherits from the one that started it.
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def machine_memory() -> int:
    """Return this machine's memory in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _finish(device: torch.device | str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
