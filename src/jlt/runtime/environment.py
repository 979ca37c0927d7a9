"""The versions and the machine behind a result."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

from jlt import __version__
from jlt.runtime.processes import local_rank, world_size


def versions() -> dict[str, str]:
    """Return the versions that can change a number."""
    return {"jlt": __version__, "torch": torch.__version__, "python": platform.python_version()}


def machine(device: torch.device | str = "cpu") -> dict[str, str | int]:
    """Return the processor, the number of cores that this process may use, and the device."""
    kind = torch.device(device)
    accelerator = torch.cuda.get_device_name(kind) if kind.type == "cuda" else kind.type
    return {"cpu": _processor(), "cores": cores(), "device": accelerator}


def cores() -> int:
    """Return how many processors this process may use."""
    # Only some systems report the cores of a process; all report those of the machine.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line[:10] == "model name"]
        if names:
            return names[0]
    return platform.processor() or platform.machine()


def default_device() -> str:
    """Return `cuda` if there is a GPU, else `cpu`; each process of a machine gets its own GPU."""
    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{local_rank() % torch.cuda.device_count()}" if world_size() > 1 else "cuda"
