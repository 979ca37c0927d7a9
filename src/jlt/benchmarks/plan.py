"""What a run will need: arithmetic, memory, disk and hours, each with its source.

Units are bytes, seconds and floating-point operations. A figure is counted, read off a data sheet, measured, or an
assumption that says so.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from jlt.benchmarks.hardware import find_gpu
from jlt.benchmarks.memory import PassMemory, pass_memory
from jlt.config import NetworkConfig, Parallel, TrainConfig
from jlt.errors import JLTError
from jlt.latents.loader import DEPTH
from jlt.latents.manifest import StoreManifest
from jlt.networks.flops import training_flops
from jlt.networks.transformer import Transformer, count_parameters
from jlt.runtime.timing import affordable_size, machine_memory, matmul_rate, peak_memory
from jlt.training.batch_split import BatchSplit, split_batch

DEFAULT_MFU = 0.4
"""An assumption until `jlt benchmark train` measures it on the GPU in question."""
FLOAT32 = 4
MOMENTS = 2
COMPILED_SHARE = 0.8
"""What torch.compile's partitioner saves of the bytes that eager passes with a CPU's normalisation save per image: 0.78
to 0.81 over widths, grids and precisions. It decomposes the normalisation, whatever the device."""
RECOMPUTE_TIME = 4 / 3
"""Four forwards instead of three."""
BATCH_TENSORS = 4
"""x, eps, z and the target of a micro-batch, in float32."""
CUDA_CONTEXT = 2**30
GPU_SLACK = 0.1
"""Share of what the passes take that fragmentation of memory adds: an assumption."""
CPU_SLACK = 0.25
"""The same for the C library's allocator: 23 and 27% in runs of `jlt benchmark train` with a GiB of activations."""
LABEL_BYTES = 16
"""A label and a position in the source, stored with each latent."""

Unit = Literal["count", "bytes", "seconds", "hours", "FLOP", "FLOP/s", "per second", "share"]


@dataclass(frozen=True)
class Figure:
    """A number with its unit and where it comes from."""

    value: float
    unit: Unit
    source: str


Figures = Mapping[str, Figure]


@dataclass(frozen=True)
class Hardware:
    """The machine that a run is planned for; rate and memory are those of one process."""

    name: str
    processes: int
    peak: float
    peak_source: str
    memory: int
    memory_source: str
    outside: int
    """Bytes that the program takes before any tensor of the run."""
    outside_source: str
    slack: float
    """Share of what the passes take that the allocator loses."""

    @property
    def is_gpu(self) -> bool:
        """Whether kernels are a GPU's."""
        return self.name != "cpu"


@dataclass(frozen=True)
class Latents:
    """The latents of a run: how many, and the size of their store."""

    count: int
    value_bytes: int
    store_bytes: int
    source: str


@dataclass(frozen=True)
class NetworkSize:
    """Parameters of a network and of one of its blocks."""

    parameters: int
    block_parameters: int


@dataclass(frozen=True)
class Way:
    """Settings under which a run fits, the memory that it then needs, and how long it takes."""

    settings: Mapping[str, Any]
    bytes: int
    seconds: float


@dataclass(frozen=True)
class Plan:
    """The forecast of a run."""

    config: TrainConfig
    gpu: str
    processes: int
    work: Figures
    memory: Figures
    disk: Figures
    time: Figures
    measured: Figures
    """An update on this machine, where it was requested."""
    fits: bool
    largest_micro_batch_size: int
    """The largest that fits and divides the batch; 0 where none does."""
    ways_to_fit: tuple[Way, ...]


# ---- what is planned ----


def describe_hardware(gpu: str, processes: int, config: TrainConfig) -> Hardware:
    """Return the hardware of a name in `GPUS`, or of this machine for `cpu`, whose cores processes share.

    UsageError for an unknown name, JLTError for less than one process.
    """
    if processes < 1:
        raise JLTError(f"A run needs at least one process, not {processes}.")
    if gpu.lower() != "cpu":
        found = find_gpu(gpu)
        return Hardware(
            name=found.name,
            processes=processes,
            peak=found.peak(config.precision),
            peak_source=f"data sheet: dense {config.precision}",
            memory=found.memory,
            memory_source="data sheet",
            outside=CUDA_CONTEXT,
            outside_source=f"assumption: CUDA context 1 GiB, allocator {GPU_SLACK:.0%} of passes",
            slack=GPU_SLACK,
        )
    outside = peak_memory("cpu")
    dtype = torch.bfloat16 if config.precision == "bfloat16" else torch.float32
    return Hardware(
        name="cpu",
        processes=processes,
        peak=matmul_rate(dtype, "cpu", size=affordable_size(dtype, "cpu", 1.0)) / processes,
        peak_source="measured here: a matrix product" + (", shared among the processes" if processes > 1 else ""),
        memory=machine_memory() // processes,
        memory_source="this machine's" + (", shared among the processes" if processes > 1 else ""),
        outside=outside,
        outside_source=f"measured: this process now, and {CPU_SLACK:.0%} of the passes",
        slack=CPU_SLACK,
    )


def describe_latents(config: TrainConfig, images: int, manifest: StoreManifest | None) -> Latents:
    """Return the latents of a store, or of one that would be made of `images` images in float16."""
    network = config.network
    if manifest:
        size = {"float16": 2, "float32": 4}[manifest.dtype]
        return Latents(manifest.count, size, sum(shard.bytes for shard in manifest.shards), "the store's manifest")
    orientations = 2 if config.flips else 1
    values = network.channels * network.height * network.width
    source = f"{images:,} x {network.channels}x{network.height}x{network.width} x 2 bytes"
    total = images * (values * 2 * orientations + LABEL_BYTES)
    return Latents(images, 2, total, source + (", both orientations" if config.flips else ""))


def count_network(config: NetworkConfig) -> NetworkSize:
    """Return a network's size, counted without making its weights."""
    with torch.device("meta"):
        network = Transformer(config)
    return NetworkSize(count_parameters(network), count_parameters(network.blocks[0]))


# ---- the plan ----


def make_plan(
    config: TrainConfig, latents: Latents, hardware: Hardware, mfu: float, measured: Figures | None = None
) -> Plan:
    """Return the forecast of a run at a share `mfu` in (0, 1] of the peak rate; JLTError for an impossible batch."""
    if not 0 < mfu <= 1:
        raise JLTError(f"mfu is a share of the peak rate and lies in (0, 1], not {mfu}.")
    split = split_batch(config, hardware.processes)
    size = count_network(config.network)
    memory = memory_figures(config, split, size, hardware, latents)
    fits = memory["total"].value <= memory["available"].value
    return Plan(
        config=config,
        gpu=hardware.name,
        processes=hardware.processes,
        work=work_figures(config, split, size, latents.count),
        memory=memory,
        disk=disk_figures(config, size.parameters, latents),
        time=time_figures(config, split, size.parameters, hardware, mfu),
        measured=measured or {},
        fits=fits,
        largest_micro_batch_size=largest_micro_batch(config, size, hardware, latents),
        ways_to_fit=() if fits else tuple(_ways_to_fit(config, size, hardware, latents, mfu)),
    )


def work_figures(config: TrainConfig, split: BatchSplit, size: NetworkSize, images: int) -> Figures:
    """Return how much there is to compute."""
    flops, seen = training_flops(config.network), config.steps * config.batch_size
    return {
        "parameters": Figure(size.parameters, "count", "counted on the network"),
        "operations_per_image": Figure(flops, "FLOP", "products of the network, three forwards"),
        "operations_of_the_run": Figure(flops * seen, "FLOP", "per image x images seen"),
        "steps": Figure(config.steps, "count", "the run's settings"),
        "images_seen": Figure(seen, "count", "steps x batch size"),
        "epochs": Figure(seen / images, "count", f"images seen / {images:,} latents"),
        "batch_size": Figure(config.batch_size, "count", "the run's settings"),
        "micro_batch_size": Figure(split.micro_batch_size, "count", "batch size / accumulation / processes"),
        "accumulation": Figure(split.accumulation, "count", "micro-batches per update"),
    }


def time_figures(config: TrainConfig, split: BatchSplit, parameters: int, hardware: Hardware, mfu: float) -> Figures:
    """Return how long the run takes, and what its processes send each other."""
    rate = img_per_second(config, hardware, mfu)
    seconds = config.steps * config.batch_size / rate
    assumed = "assumption until measured: jlt benchmark train" if mfu == DEFAULT_MFU else "given with --mfu"
    recomputed = ", x 3/4 for recomputed blocks" if config.gradient_checkpointing else ""
    return {
        "peak_rate": Figure(hardware.peak, "FLOP/s", hardware.peak_source),
        "mfu": Figure(mfu, "share", assumed),
        "img_per_second": Figure(rate, "per second", f"peak rate x MFU x processes / per image{recomputed}"),
        "seconds_per_step": Figure(config.batch_size / rate, "seconds", "batch size / images per second"),
        "hours": Figure(seconds / 3600, "hours", "steps x seconds per step; no saving, sampling, evaluation"),
        "gpu_hours": Figure(seconds / 3600 * hardware.processes, "hours", "hours x processes"),
        "sent_per_step": sent_per_step(config, split, parameters, hardware.processes),
    }


def img_per_second(config: TrainConfig, hardware: Hardware, mfu: float) -> float:
    """Return the images per second of all processes together, at an MFU that counts three forwards per image."""
    recomputing = RECOMPUTE_TIME if config.gradient_checkpointing else 1.0
    return hardware.peak * hardware.processes * mfu / training_flops(config.network) / recomputing


def sent_per_step(config: TrainConfig, split: BatchSplit, parameters: int, processes: int) -> Figure:
    """Return the bytes that each process sends for an update, in rings: (W-1)/W of the parameters per collective."""
    ring = parameters * FLOAT32 * (processes - 1) / processes
    if config.parallel == "ddp":
        return Figure(2 * ring, "bytes", "ring all-reduce: 2 (W-1)/W x gradients, per process")
    source = "fsdp: two gathers, one scatter of (W-1)/W per micro-batch"
    return Figure(3 * ring * split.accumulation, "bytes", source)


# ---- memory ----


def memory_figures(
    config: TrainConfig, split: BatchSplit, size: NetworkSize, hardware: Hardware, latents: Latents
) -> Figures:
    """Return the bytes of one process at the peak of an update, by part, with their total and what there is."""
    passes = run_passes(config, split.micro_batch_size, hardware.is_gpu)
    saving = f"what autograd saves, {'GPU' if hardware.is_gpu else 'CPU'} normalisation"
    if config.gradient_checkpointing:
        saving = "what autograd saves: the blocks' inputs"
    elif config.compile:
        saving = f"what autograd saves eagerly x {COMPILED_SHARE:g}, compiled"
    batch = {
        "activations": Figure(passes.activations, "bytes", saving),
        "weight_copies_and_tables": Figure(
            passes.copies_and_tables, "bytes", "saved for any batch: autocast, rotary tables"
        ),
        "working_memory": Figure(passes.working, "bytes", "formula: peak of the passes above what is saved"),
        "latents_and_noise": _batch_figure(config, split, latents),
    }
    lost = hardware.slack * sum(part.value for part in batch.values())
    outside = Figure(int(hardware.outside + lost), "bytes", hardware.outside_source)
    state = _state_figures(config, split, size, passes, hardware.processes)
    parts = {**state, **batch, "outside_the_network": outside}
    total = Figure(sum(part.value for part in parts.values()), "bytes", "sum of the above")
    return {**parts, "total": total, "available": Figure(hardware.memory, "bytes", hardware.memory_source)}


def _state_figures(
    config: TrainConfig, split: BatchSplit, size: NetworkSize, passes: PassMemory, processes: int
) -> dict[str, Figure]:
    """Return weights, gradients, moments and averages, all in float32."""
    sharded = config.parallel == "fsdp" and processes > 1
    whole = size.parameters * FLOAT32
    share = -(-whole // processes) if sharded else whole
    how = f"parameters x 4 bytes / {processes} processes" if sharded else "parameters x 4 bytes"
    gradients = Figure(share, "bytes", how)
    if processes == 1 and split.accumulation == 1:
        # They appear as activations are freed: the peak grows where they are more than those.
        gradients = Figure(max(0, share - passes.saved), "bytes", "what of them exceeds the activations they replace")
    averages = [f"ema_{decay:g}" for decay in config.ema] + [f"power_ema_{width:g}" for width in config.power_ema]
    figures = {
        "weights": Figure(share, "bytes", how),
        "gradients": gradients,
        "adamw_moments": Figure(MOMENTS * share, "bytes", f"2 x {how}"),
        **{name: Figure(share, "bytes", how) for name in averages},
    }
    if sharded:
        outside_blocks = size.parameters - config.network.depth * size.block_parameters
        gathered = FLOAT32 * (outside_blocks + 3 * size.block_parameters)
        source = "assumption: two blocks' weights, one's gradients whole"
        figures["gathered_by_fsdp"] = Figure(gathered, "bytes", source)
    return figures


def _batch_figure(config: TrainConfig, split: BatchSplit, latents: Latents) -> Figure:
    network = config.network
    values = network.channels * network.height * network.width * split.micro_batch_size
    total = DEPTH * split.accumulation * values * latents.value_bytes + BATCH_TENSORS * FLOAT32 * values
    return Figure(total, "bytes", "two stored batches; x, eps, z, target in float32")


def run_passes(config: TrainConfig, images: int, gpu: bool) -> PassMemory:
    """Return the memory of the network's passes for a micro-batch, with a GPU's normalisation or a CPU's."""
    recomputes, bfloat16 = config.gradient_checkpointing, config.precision == "bfloat16"
    # What the compiler saves of recomputed blocks is still their inputs.
    compiled = config.compile and not recomputes
    passes = pass_memory(config.network, images, bfloat16, recomputes, fused_norm=gpu and not compiled)
    if compiled:
        passes = dataclasses.replace(passes, activations=round(COMPILED_SHARE * passes.activations))
    return passes


def largest_micro_batch(config: TrainConfig, size: NetworkSize, hardware: Hardware, latents: Latents) -> int:
    """Return the largest micro-batch that fits and divides each process's share of the batch; 0 where none does."""
    share = config.batch_size // hardware.processes

    def fits(micro: int) -> bool:
        figures = memory_figures(config, BatchSplit(micro, share // micro), size, hardware, latents)
        return figures["total"].value <= hardware.memory

    return next((micro for micro in range(share, 0, -1) if share % micro == 0 and fits(micro)), 0)


def _ways_to_fit(
    config: TrainConfig, size: NetworkSize, hardware: Hardware, latents: Latents, mfu: float
) -> Iterator[Way]:
    """Yield the changes that make a run fit, each with the largest micro-batch that it allows."""
    share = config.batch_size // hardware.processes
    layouts: tuple[Parallel, ...] = (config.parallel,)
    if config.parallel == "ddp" and hardware.processes > 1:
        layouts += ("fsdp",)
    recomputing = (True,) if config.gradient_checkpointing else (False, True)
    for parallel, recomputes in itertools.product(layouts, recomputing):
        changed = dataclasses.replace(config, parallel=parallel, gradient_checkpointing=recomputes)
        micro = largest_micro_batch(changed, size, hardware, latents)
        if not micro:
            continue
        changed = dataclasses.replace(changed, micro_batch_size=micro, accumulation=share // micro)
        total = memory_figures(changed, BatchSplit(micro, share // micro), size, hardware, latents)["total"]
        seconds = config.steps * config.batch_size / img_per_second(changed, hardware, mfu)
        yield Way(_settings_to_change(config, changed), int(total.value), seconds)


def _settings_to_change(before: TrainConfig, after: TrainConfig) -> dict[str, Any]:
    """Return the settings that turn one run into another, without those that follow from the others."""
    names = ["parallel", "gradient_checkpointing"]
    if (before.micro_batch_size, before.accumulation) != (0, 0) or after.accumulation > 1:
        names += ["micro_batch_size"]
    names += ["accumulation"] if before.accumulation else []
    return {name: getattr(after, name) for name in names if getattr(before, name) != getattr(after, name)}


# ---- disk ----


def disk_figures(config: TrainConfig, parameters: int, latents: Latents) -> Figures:
    """Return what the run puts on disk: its latents, the checkpoints that it keeps and the snapshots."""
    weights = parameters * FLOAT32
    tensors = 1 + MOMENTS + len(config.ema) + len(config.power_ema)
    at_once, snapshots = checkpoints_at_once(config), config.steps // config.snapshot_every * len(config.power_ema)
    sizes = latents.store_bytes, at_once * tensors * weights, snapshots * weights
    return {
        "latent_store": Figure(sizes[0], "bytes", latents.source),
        "checkpoint": Figure(tensors * weights, "bytes", "network, both moments, every average in float32"),
        "checkpoints_at_once": Figure(at_once, "count", "kept by keep_last, keep_every, and the one being written"),
        "checkpoints": Figure(sizes[1], "bytes", "checkpoints at once x checkpoint"),
        "snapshots_written": Figure(snapshots, "count", "every snapshot_every steps, one per power_ema"),
        "snapshots": Figure(sizes[2], "bytes", "snapshots written x parameters x 4 bytes"),
        "disk_needed": Figure(sum(sizes), "bytes", "store + checkpoints + snapshots"),
    }


def checkpoints_at_once(config: TrainConfig) -> int:
    """Return how many checkpoints are on the disk at most: a new one is complete before an old one is removed."""
    saved = sorted({*range(config.checkpoint_every, config.steps + 1, config.checkpoint_every), config.steps})
    if not config.keep_last:
        return len(saved)
    newest = saved[-config.keep_last - 1 :]
    marked = [step for step in saved if config.keep_every and step % config.keep_every == 0]
    return len({*newest, *marked})
