"""Where the time of a training step goes: what PyTorch's profiler records, in a few groups.

On a CPU an operation counts without those that it calls; on a GPU the kernels count, and not the calls that start them.
Names are matched by the patterns below, in their order, after the ranges that the trainer names by itself.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

OTHER = "other"
COMMUNICATION, NOISE, UPDATE = "communication", "noise", "optimiser, averages, clipping"

RANGES: Mapping[str, str] = {
    "jlt::noise": NOISE,
    "jlt::clipping": UPDATE,
    "jlt::averages": UPDATE,
    "Optimizer.step#": UPDATE,
    "Optimizer.zero_grad#": UPDATE,
}
"""Groups by the beginning of the name of a range that encloses the work."""

PATTERNS: Sequence[tuple[str, str]] = (
    # nccl and gloo are libraries, c10d is PyTorch's name for its own layer above them.
    (COMMUNICATION, r"nccl|gloo|c10d|all_?reduce|all_?gather|reduce_?scatter"),
    ("attention, backward", r"attention\w*backward|flash\w*bwd|fmha(\w*bwd|_cutlassB)|sdpa\w*(bprop|bwd)"),
    ("attention, forward", r"^aten::\w*attention|flash\w*fwd|fmha(\w*fwd|_cutlassF)|sdpa\w*(fprop|fwd)"),
    # cuBLAS calls its kernels nvjet, gemm, xmma or splitK; a template of Triton's for products begins with triton_tem.
    ("matrix products", r"^aten::(mm|addmm|bmm|baddbmm|mv|addmv|dot|_scaled_mm|_addmm_activation)$"),
    ("matrix products", r"gemm|gemv|cutlass|xmma|nvjet|cublas|splitk|^triton_(tem|mm)|mkl\w*linear|linear_pointwise"),
    # What the compiler has joined. Its kernels for a CPU have no names and count to the graph that calls them.
    ("fused", r"^triton_|cpp_fused|CompiledFxGraph|^CompiledFunction|Torch-Compiled Region"),
    (UPDATE, r"fused_adam|multi_tensor_apply|aten::lerp_|FusedAdam"),
    (NOISE, r"normal_|distribution_(elementwise|nullary)|philox"),
    ("conversions and copies", r"copy|memcpy|memset|fillfunctor|CatArray|^aten::(cat|stack|fill_|zero_|roll|index)"),
    ("normalisation and elementwise", r"elementwise|reduce_kernel|softmax|(layer|rms|RMS)_?norm"),
    (
        "normalisation and elementwise",
        r"^aten::(mul|add|sub|div|addcmul|sum|mean|pow|square|silu|silu_backward|sigmoid|neg|rsqrt|sqrt|exp|where|clamp"
        r"|cos|sin|maximum|minimum|reciprocal|linalg_vector_norm|norm)_?$",
    ),
)
"""Groups by regular expressions on names, case ignored; the first that is found decides."""

GROUPS = tuple(dict.fromkeys([*(group for group, _ in PATTERNS), OTHER]))


@dataclass(frozen=True)
class Work:
    """Something that was recorded: its name, the ranges around it, and the seconds that it took by itself."""

    name: str
    ranges: tuple[str, ...]
    seconds: float


def group_of(name: str, ranges: Iterable[str] = ()) -> str:
    """Return the group of an operation or kernel, by the ranges that enclose it and by its name; `other` for none."""
    for enclosing in (name, *ranges):
        for beginning, group in RANGES.items():
            if enclosing.startswith(beginning):
                return group
    return next((group for group, pattern in PATTERNS if re.search(pattern, name, re.IGNORECASE)), OTHER)


def shares(work: Iterable[Work]) -> dict[str, float]:
    """Return the share of each group in the sum of all seconds, in the order of GROUPS; they add up to 1.

    ValueError where no time was recorded.
    """
    seconds: dict[str, float] = defaultdict(float)
    for item in work:
        seconds[group_of(item.name, item.ranges)] += item.seconds
    total = sum(seconds.values())
    if not total:
        raise ValueError("nothing was recorded that took time")
    return {group: seconds[group] / total for group in GROUPS}


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """Return the length of the union of intervals: how long a device worked, whatever ran side by side."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(intervals):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def profile_steps(step: Callable[[], None], steps: int, seconds_per_step: float, device: str) -> dict[str, Any]:
    """Profile some steps, warmed up before, on a device.

    Returns `shares` by group, the names that took most of `other` with their shares, and on a GPU `idle`: the share of
    `seconds_per_step`, which is measured without the profiler and its cost, in which no kernel ran (None on a CPU).
    """
    cuda = torch.device(device).type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as profiler:
        for _ in range(steps):
            with record_function("jlt::update"):
                step()
        if cuda:
            torch.cuda.synchronize(device)
    events = list(profiler.events())
    kernels = [event for event in events if event.device_type == DeviceType.CUDA and not event.is_user_annotation]
    work = device_work(kernels, _annotations(events)) if cuda else host_work(events)
    busy = covered((event.time_range.start, event.time_range.end) for event in kernels) / 1e6 / steps
    return {
        "steps": steps,
        "shares": shares(work),
        "unrecognised": unrecognised(work),
        "idle": max(0.0, 1 - busy / seconds_per_step) if cuda else None,
    }


def unrecognised(work: Iterable[Work], count: int = 5) -> dict[str, float]:
    """Return the names in `other` that took most time, with their shares of all time."""
    seconds: dict[str, float] = defaultdict(float)
    total = 0.0
    for item in work:
        total += item.seconds
        if group_of(item.name, item.ranges) == OTHER:
            seconds[item.name] += item.seconds
    most = sorted(seconds.items(), key=lambda entry: -entry[1])[:count]
    return {name: spent / total for name, spent in most}


def host_work(events: Iterable[FunctionEvent]) -> list[Work]:
    """Return what ran on a CPU, each operation without those that it calls."""
    return [Work(event.name, _ancestors(event), event.self_cpu_time_total / 1e6) for event in events]


def device_work(kernels: Iterable[Any], annotations: Sequence[tuple[float, float, str]]) -> list[Work]:
    """Return what ran on a GPU; a range encloses the kernels that begin between its own ends on the device."""
    return [
        Work(
            kernel.name,
            tuple(name for start, end, name in annotations if start <= kernel.time_range.start < end),
            (kernel.time_range.end - kernel.time_range.start) / 1e6,
        )
        for kernel in kernels
    ]


def _annotations(events: Iterable[FunctionEvent]) -> list[tuple[float, float, str]]:
    """Return begin, end and name of the ranges that decide a group, where the device passed through them."""
    return [
        (event.time_range.start, event.time_range.end, event.name)
        for event in events
        if event.device_type == DeviceType.CUDA and event.is_user_annotation and event.name.startswith(tuple(RANGES))
    ]


def _ancestors(event: FunctionEvent) -> tuple[str, ...]:
    names = []
    while event.cpu_parent is not None:
        event = event.cpu_parent
        names.append(event.name)
    return tuple(names)
