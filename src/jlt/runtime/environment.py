"""The environment of a result: versions, the machine, its rates and memory, and arithmetic with equal bits."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from jlt import __version__
from jlt.errors import JLTError, UsageError
from jlt.runtime.device import chosen_device
from jlt.runtime.processes import local_rank, world_size
from jlt.runtime.progress import inform

MATMUL_SIZES = {"cpu": 2048, "mps": 4096, "cuda": 8192}
"""Side of the matrices whose product gives a device's rate, if the device is fast enough."""
SMALLEST_MATMUL = 256
CLEARLY_SLOWER = 0.9
"""Below this share of the float32 rate bfloat16 counts as slower: rates of a busy machine vary."""
PROC = Path("/proc/self")


def versions() -> dict[str, str]:
    """Return the versions that can change a number."""
    return {"jlt": __version__, "torch": torch.__version__, "python": platform.python_version()}


def machine(device: torch.device | str = "cpu") -> dict[str, str | int]:
    """Return the processor, the number of cores that this process may use, and the device."""
    kind = torch.device(device)
    accelerator = torch.cuda.get_device_name(kind) if kind.type == "cuda" else kind.type
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    cpu = next(names, None) or platform.processor() or platform.machine()
    return {"cpu": cpu, "cores": cores(), "device": accelerator}


def measured_on(device: torch.device | str) -> dict[str, Any]:
    """Return the machine and the versions of a benchmark, as entries of its result."""
    return {"machine": machine(device), "versions": versions()}


def cores() -> int:
    """Return how many processors this process may use."""
    # Only some systems report the cores of a process; all report those of the machine.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine_memory() -> int:
    """Return the bytes of memory that this machine, or the container around this process, has."""
    whole, limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else ""
    return min(whole, int(text)) if text.isdecimal() else whole


def require_memory(needed: int, what: str) -> None:
    """Raise UsageError for a part of the work that needs more bytes than this machine has.

    Allocating them would succeed at first on many systems, which then end the process.
    """
    if needed > machine_memory():
        found, most = (f"{size / 2**30:,.1f} GiB" for size in (needed, machine_memory()))
        raise UsageError(f"{what} needs {found} of memory or more, and this machine has {most}: choose less.")


def default_device() -> str:
    """Return the device that the user chose, by default `cuda` if there is a GPU, else `mps` or `cpu`.

    Each process of a machine gets its own GPU. JLTError for a device that this machine does not have.
    """
    chosen = chosen_device()
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available() and world_size() == 1}
    if not present.get(chosen, True):
        raise JLTError(f"This machine has no device {chosen} for this work: choose --device auto or cpu.")
    kind = next((name for name, there in present.items() if there), "cpu") if chosen == "auto" else chosen
    if kind == "mps":
        _warn_untested()
    return f"cuda:{local_rank() % torch.cuda.device_count()}" if kind == "cuda" and world_size() > 1 else kind


@functools.cache
def _warn_untested() -> None:
    inform("This machine's Apple GPU (mps) computes. No test of jlt has run on one: compare with --device cpu.")


def device_of_float64(device: str) -> str:
    """Return the device for arithmetic in float64, which Apple's GPUs do not have."""
    return "cpu" if torch.device(device).type == "mps" else device


def usable_device(name: str | None) -> str:
    """Return a device by its name, the default for None; UsageError for one that PyTorch does not have here."""
    if name is None:
        return default_device()
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError):
        raise UsageError(f"There is no device {name!r} here: leave it out, or choose cpu.") from None
    return name


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


def matmul_rate(
    dtype: torch.dtype, device: torch.device | str, repeats: int = 7, size: int | None = None, seconds: float = 0.05
) -> float:
    """Return the best rate of a square matrix product in operations per second.

    The product is repeated at least `repeats` times and for `seconds`: on a busy machine the threads of a short product
    seldom run at the same time, so a few repeats may all be slow.
    """
    n = size or MATMUL_SIZES[torch.device(device).type]
    a, b = torch.ones(2, n, n, device=device, dtype=dtype)
    times: list[float] = []
    while len(times) < repeats or sum(times) < seconds:
        times.append(seconds_of(lambda: a @ b, device))
    return 2 * n**3 / min(times)


def affordable_size(dtype: torch.dtype, device: torch.device | str, seconds: float, largest: int | None = None) -> int:
    """Return the side of the largest square matrix product, up to `largest`, that takes no more than `seconds`.

    The search doubles a small side, so it takes about `seconds` too. It returns at least the smallest side.
    """
    size = SMALLEST_MATMUL
    while size < (largest or MATMUL_SIZES[torch.device(device).type]):
        # The next size takes eight times the arithmetic, at the rate of this one.
        if 8 * 2 * size**3 / matmul_rate(dtype, device, 2, size) > seconds:
            break
        size *= 2
    return size


@dataclass(frozen=True)
class ProductRates:
    """Operations per second of a product of square matrices, in two precisions."""

    float32: float
    bfloat16: float

    @property
    def warning(self) -> str:
        """A sentence if bfloat16 is the slower precision; otherwise empty."""
        if self.bfloat16 >= CLEARLY_SLOWER * self.float32:
            return ""
        return (
            f"This machine multiplies float32 matrices {self.float32 / self.bfloat16:.3g} times as fast as bfloat16 "
            f"ones ({self.float32 / 1e9:.3g} against {self.bfloat16 / 1e9:.3g} GFLOP/s): "
            "--precision float32 is faster here."
        )


def compare_precisions(device: torch.device | str, seconds: float = 0.2) -> ProductRates:
    """Measure products in float32 and bfloat16, of the largest matrices whose product takes no more than `seconds`.

    Smaller products would measure how the threads of a busy machine wait for each other.
    """
    sizes = {dtype: affordable_size(dtype, device, seconds) for dtype in (torch.float32, torch.bfloat16)}
    return ProductRates(*(matmul_rate(dtype, device, 3, size) for dtype, size in sizes.items()))


def seconds_of(work: Callable[[], Any], device: torch.device | str) -> float:
    """Return how long some work takes, until its device has finished."""
    _finish(device)
    start = time.perf_counter()
    work()
    _finish(device)
    return time.perf_counter() - start


def peak_memory(device: torch.device | str) -> int:
    """Return the peak memory in bytes: of the GPU for a GPU, of the process for a CPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # On Linux, getrusage reports a figure that a process inherits from its parent.
    peak, unit = _status_bytes("VmHWM"), 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit if peak is None else peak


def reset_peak_memory(device: torch.device | str) -> None:
    """Reset the peak to the present use; without Linux's `/proc` the peak of a process stays."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            (PROC / "clear_refs").write_text("5")


def resident_memory() -> int | None:
    """Return the resident host memory of this process in bytes; None if the system does not report it."""
    return _status_bytes("VmRSS")


def _status_bytes(name: str) -> int | None:
    status = PROC / "status"
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)


def _finish(device: torch.device | str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    elif torch.device(device).type == "mps":
        torch.mps.synchronize()
