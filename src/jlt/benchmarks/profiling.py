"""Where the time of a training step goes: the operations, or a GPU's kernels, that PyTorch's profiler records."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

SHOWN = 15
"""Operations that are listed; the rest is one entry."""


def profile_steps(step: Callable[[], None], steps: int, seconds_per_step: float, device: str) -> dict[str, Any]:
    """Profile some steps on a device, after the caller has warmed it up.

    Returns `shares` of the time by name, the largest first: on a CPU each operation without those that it calls, on a
    GPU each kernel. `idle` is the share of `seconds_per_step` in which a GPU ran no kernel; these seconds are measured
    without the profiler.
    """
    cuda = torch.device(device).type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as profiler:
        for _ in range(steps):
            step()
        if cuda:
            torch.cuda.synchronize(device)
    kind = DeviceType.CUDA if cuda else DeviceType.CPU
    # An annotation on a GPU spans the kernels within it, which are counted themselves.
    entries = [
        (entry.key, (entry.self_device_time_total if cuda else entry.self_cpu_time_total) / 1e6)
        for entry in profiler.key_averages()
        if entry.device_type == kind and not (cuda and entry.is_user_annotation)
    ]
    entries.sort(key=lambda entry: -entry[1])
    total = sum(seconds for _, seconds in entries)
    shares = {name: seconds / total for name, seconds in entries[:SHOWN]}
    return {
        "steps": steps,
        "shares": {**shares, "everything else": max(0.0, 1 - sum(shares.values()))},
        "idle": max(0.0, 1 - total / steps / seconds_per_step) if cuda else None,
    }
