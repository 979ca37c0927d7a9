"""What a run will need: arithmetic, memory, disk and hours, each with its source.

Units are bytes, seconds and floating-point operations. Each figure names its source: a count, a data sheet, a
measurement, a formula or an assumption.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from jlt.benchmarks.hardware import find_gpu
from jlt.benchmarks.memory import FLOAT32, PassMemory, pass_memory
from jlt.config import Parallel, TrainConfig
from jlt.errors import JLTError, UsageError
from jlt.latents.loader import DEPTH
from jlt.latents.manifest import StoreManifest
from jlt.networks.transformer import count_network, training_flops
from jlt.report.benchmark_table import refusal
from jlt.runtime.environment import affordable_size, machine_memory, matmul_rate, peak_memory
from jlt.runtime.progress import inform
from jlt.storage.codec import to_json
from jlt.training.step import BatchSplit, split_batch

DEFAULT_MFU = 0.4
"""An assumption until `jlt benchmark train` measures it on the GPU in question."""
MOMENTS = 2
COMPILED_SHARE = 0.8
"""What torch.compile's partitioner saves of the bytes that eager passes with a CPU's normalisation save per image: 0.78
to 0.81 over widths, grids and precisions. It decomposes the normalisation on every device."""
RECOMPUTE_TIME = 4 / 3
"""Four forwards instead of three."""
BATCH_TENSORS = 4
"""x, eps, z and the target of a micro-batch, in float32."""
CUDA_CONTEXT = 2**30
GPU_SLACK = 0.1
"""Share of what the passes take that fragmentation of memory adds: an assumption."""
CPU_SLACK = 0.25
"""The same for the C library's allocator: 23 and 27% in runs of `jlt benchmark train` with a GiB of activations."""
WARN_HOURS = 24
SLOW_RATE = 1e10
"""Operations per second that any machine reaches."""
MANY_TOKENS = 1024
LABEL_BYTES = 16
"""A label and a position in the source, stored with each latent."""


@dataclass(frozen=True)
class Figure:
    """A number with its unit and where it comes from."""

    value: float
    source: str
    unit: Literal["count", "bytes", "seconds", "hours", "FLOP", "FLOP/s", "per second", "share"] = "bytes"


Figures = Mapping[str, Figure]


@dataclass(frozen=True)
class Hardware:
    """The machine that a run is planned for; rate and memory are those of one process."""

    name: str
    processes: int
    peak: Figure
    memory: Figure
    outside: Figure
    """What the program takes before any tensor of the run."""
    slack: float
    """Share of what the passes take that the allocator loses."""


@dataclass(frozen=True)
class Latents:
    """The latents of a run: how many, the bytes of a value, and the size of their store."""

    count: int
    value_bytes: int
    store: Figure


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


def describe_hardware(gpu: str, processes: int, config: TrainConfig) -> Hardware:
    """Return the hardware of a name in `GPUS`, or of this machine for `cpu`, whose cores processes share.

    UsageError for an unknown name, and for less than one process.
    """
    if processes < 1:
        raise UsageError(f"A run needs at least one process, not {processes}.")
    if gpu.lower() != "cpu":
        found = find_gpu(gpu)
        peak = Figure(found.peak[config.precision], f"data sheet: dense {config.precision}", "FLOP/s")
        context = f"assumption: CUDA context 1 GiB, allocator {GPU_SLACK:.0%} of passes"
        memory, outside = Figure(found.memory, "data sheet"), Figure(CUDA_CONTEXT, context)
        return Hardware(found.name, processes, peak, memory, outside, GPU_SLACK)
    return describe_machine("cpu", processes, measured_rate(config, "cpu"))


def measured_rate(config: TrainConfig, device: str) -> float:
    """Return the operations per second of a matrix product in a run's precision on a device of this machine."""
    dtype = torch.bfloat16 if config.precision == "bfloat16" else torch.float32
    return matmul_rate(dtype, device, size=affordable_size(dtype, device, 1.0))


def describe_machine(device: str, processes: int, rate: float, together: int = 1) -> Hardware:
    """Return what each of some processes has of this machine, where `together` runs share it at a time."""
    gpu, sharing = torch.device(device).type == "cuda", processes * together
    shared = ", shared among the processes" if sharing > 1 else ""
    product = f"measured here: a matrix product{shared}"
    if gpu:
        memory = Figure(torch.cuda.mem_get_info(device)[1] // together, f"the GPU's{shared}")
        outside = Figure(CUDA_CONTEXT, f"assumption: CUDA context 1 GiB, allocator {GPU_SLACK:.0%} of passes")
        return Hardware("this GPU", processes, Figure(rate / together, product, "FLOP/s"), memory, outside, GPU_SLACK)
    outside = Figure(peak_memory("cpu"), f"measured: this process now, and {CPU_SLACK:.0%} of the passes")
    memory = Figure(machine_memory() // sharing, f"this machine's{shared}")
    return Hardware("cpu", processes, Figure(rate / sharing, product, "FLOP/s"), memory, outside, CPU_SLACK)


def check_affordable(
    configs: Sequence[TrainConfig], manifest: StoreManifest, device: str, processes: int = 1, together: int = 1
) -> None:
    """Refuse trainings that do not fit on this machine with a JLTError, and warn of those that take above a day.

    Each has so many processes, and `together` trainings share the machine at a time.
    """

    def plans(rate: float) -> list[Plan]:
        hardware = describe_machine(device, processes, rate, together)
        latents = [describe_latents(config, manifest.count, manifest) for config in configs]
        return [make_plan(*run, hardware, DEFAULT_MFU) for run in zip(configs, latents, strict=True)]

    def hours(plans: Sequence[Plan]) -> float:
        return sum(plan.time["hours"].value for plan in plans) / together

    found = plans(SLOW_RATE)
    fits = all(plan.fits for plan in found)
    # The rate takes a second to measure.
    if not fits or hours(found) > WARN_HOURS:
        found = plans(measured_rate(configs[0], device))
    if not fits:
        raise JLTError(refusal(to_json(next(plan for plan in found if not plan.fits)), together))
    if hours(found) > WARN_HOURS:
        inform(f"This will take about {hours(found) / 24:.2g} days here, by the speed of this machine (see jlt plan).")
    tokens = max(config.network.tokens for config in configs)
    if tokens >= MANY_TOKENS and torch.device(device).type == "cpu":
        inform(f"{tokens:,} tokens per image are slow on a CPU: a patch size twice as large has a quarter of them.")


def describe_latents(config: TrainConfig, images: int, manifest: StoreManifest | None) -> Latents:
    """Return the latents of a store, or of one that would be made of `images` images in float16."""
    network = config.network
    if manifest:
        stored = sum(shard.bytes for shard in manifest.shards)
        size = {"float16": 2, "float32": 4}[manifest.dtype]
        return Latents(manifest.count, size, Figure(stored, "the store's manifest"))
    values = network.channels * network.height * network.width
    total = images * (values * 2 * (2 if config.flips else 1) + LABEL_BYTES)
    source = f"{images:,} x {network.channels}x{network.height}x{network.width} x 2 bytes"
    return Latents(images, 2, Figure(total, source + (", both orientations" if config.flips else "")))


def make_plan(
    config: TrainConfig, latents: Latents, hardware: Hardware, mfu: float, measured: Figures | None = None
) -> Plan:
    """Return the forecast of a run at a share `mfu` in (0, 1] of the peak rate; JLTError for an impossible batch."""
    if not 0 < mfu <= 1:
        raise UsageError(f"mfu is a share of the peak rate and must be in (0, 1], not {mfu}.")
    run = _Run(config, latents, hardware, mfu)
    memory = run.memory()
    fits = memory["total"].value <= memory["available"].value
    return Plan(
        config=config,
        gpu=hardware.name,
        processes=hardware.processes,
        work=run.work(),
        memory=memory,
        disk=run.disk(),
        time=run.time(),
        measured=measured or {},
        fits=fits,
        largest_micro_batch_size=run.largest_micro_batch(),
        ways_to_fit=() if fits else tuple(run.ways_to_fit()),
    )


@dataclass(frozen=True)
class _Run:
    """A run with the machine that it is planned for."""

    config: TrainConfig
    latents: Latents
    hardware: Hardware
    mfu: float

    @property
    def split(self) -> BatchSplit:
        return split_batch(self.config, self.hardware.processes)

    @property
    def parameters(self) -> int:
        return count_network(self.config.network)

    def work(self) -> Figures:
        """Return how much there is to compute."""
        config, images = self.config, self.latents.count
        flops, processed = training_flops(config.network), config.steps * config.batch_size
        return {
            "parameters": Figure(self.parameters, "counted on the network", "count"),
            "operations_per_image": Figure(flops, "products of the network, three forwards", "FLOP"),
            "operations_of_the_run": Figure(flops * processed, "per image x images seen", "FLOP"),
            "steps": Figure(config.steps, "the run's settings", "count"),
            "images_seen": Figure(processed, "steps x batch size", "count"),
            "epochs": Figure(processed / images, f"images seen / {images:,} latents", "count"),
            "batch_size": Figure(config.batch_size, "the run's settings", "count"),
            "micro_batch_size": Figure(self.split.micro_batch_size, "batch size / accumulation / processes", "count"),
            "accumulation": Figure(self.split.accumulation, "micro-batches per update", "count"),
        }

    def time(self) -> Figures:
        """Return how long the run takes, and what its processes send each other."""
        hours, step = self.seconds() / 3600, self.seconds() / self.config.steps
        assumed = "assumption until measured: jlt benchmark train" if self.mfu == DEFAULT_MFU else "given with --mfu"
        rate = "peak rate x MFU x processes / per image"
        rate += ", x 3/4 for recomputed blocks" if self.config.gradient_checkpointing else ""
        return {
            "peak_rate": self.hardware.peak,
            "mfu": Figure(self.mfu, assumed, "share"),
            "img_per_second": Figure(self.config.batch_size / step, rate, "per second"),
            "seconds_per_step": Figure(step, "batch size / images per second", "seconds"),
            "hours": Figure(hours, "steps x seconds per step; no saving, sampling, evaluation", "hours"),
            "gpu_hours": Figure(hours * self.hardware.processes, "hours x processes", "hours"),
            "sent_per_step": self.sent_per_step(),
        }

    def seconds(self) -> float:
        """Return the seconds of all steps, at an MFU that counts three forwards per image."""
        config = self.config
        operations = config.steps * config.batch_size * training_flops(config.network)
        recomputing = RECOMPUTE_TIME if config.gradient_checkpointing else 1.0
        return operations * recomputing / (self.hardware.peak.value * self.hardware.processes * self.mfu)

    def sent_per_step(self) -> Figure:
        """Return the bytes that each process sends for an update, in rings: (W-1)/W of the weights per collective."""
        processes = self.hardware.processes
        ring = self.parameters * FLOAT32 * (processes - 1) / processes
        if self.config.parallel == "ddp":
            return Figure(2 * ring, "ring all-reduce: 2 (W-1)/W x gradients, per process")
        source = "fsdp: two gathers, one scatter of (W-1)/W per micro-batch"
        return Figure(3 * ring * self.split.accumulation, source)

    def memory(self) -> Figures:
        """Return the bytes of one process at the peak of an update, by part, with their total and what there is."""
        config, hardware = self.config, self.hardware
        gpu = hardware.name != "cpu"
        passes = run_passes(config, self.split.micro_batch_size, gpu)
        saving = f"what autograd saves, {'GPU' if gpu else 'CPU'} normalisation"
        if config.gradient_checkpointing:
            saving = "what autograd saves: the blocks' inputs"
        elif config.compile:
            saving = f"what autograd saves eagerly x {COMPILED_SHARE:g}, compiled"
        copies = "saved for any batch: autocast, rotary tables"
        values = config.network.channels * config.network.height * config.network.width * self.split.micro_batch_size
        stored = DEPTH * self.split.accumulation * self.latents.value_bytes
        batch = {
            "activations": Figure(passes.activations, saving),
            "weight_copies_and_tables": Figure(passes.copies_and_tables, copies),
            "working_memory": Figure(passes.working, "by formula: peak of the passes above what is saved"),
            "latents_and_noise": Figure(
                values * (stored + BATCH_TENSORS * FLOAT32), "two stored batches; x, eps, z, target in float32"
            ),
        }
        outside = int(hardware.outside.value + hardware.slack * sum(part.value for part in batch.values()))
        parts = {**self.state(passes), **batch, "outside_the_network": replace(hardware.outside, value=outside)}
        total = Figure(sum(part.value for part in parts.values()), "sum of the above")
        return {**parts, "total": total, "available": hardware.memory}

    def state(self, passes: PassMemory) -> dict[str, Figure]:
        """Return weights, gradients, moments and averages, all in float32."""
        config, parameters, processes = self.config, self.parameters, self.hardware.processes
        sharded = config.parallel == "fsdp" and processes > 1
        whole = parameters * FLOAT32
        share = -(-whole // processes) if sharded else whole
        how = f"parameters x 4 bytes / {processes} processes" if sharded else "parameters x 4 bytes"
        gradients = Figure(share, how)
        if processes == 1 and self.split.accumulation == 1:
            # They appear as activations are freed: the peak grows where they are more than those.
            exceeding = max(0, share - passes.saved)
            gradients = Figure(exceeding, "what of them exceeds the activations they replace")
        averages = [f"ema_{decay:g}" for decay in config.ema] + [f"power_ema_{width:g}" for width in config.power_ema]
        figures = {
            "weights": Figure(share, how),
            "gradients": gradients,
            "adamw_moments": Figure(MOMENTS * share, f"2 x {how}"),
            **{name: Figure(share, how) for name in averages},
        }
        if sharded:
            # What is outside the blocks, and three of them.
            block = count_network(replace(config.network, depth=config.network.depth + 1)) - parameters
            gathered = FLOAT32 * (parameters + (3 - config.network.depth) * block)
            figures["gathered_by_fsdp"] = Figure(gathered, "assumption: two blocks' weights, one's gradients whole")
        return figures

    def disk(self) -> Figures:
        """Return what the run puts on disk: its latents, the checkpoints that it keeps and the snapshots."""
        config, weights = self.config, self.parameters * FLOAT32
        tensors = 1 + MOMENTS + len(config.ema) + len(config.power_ema)
        at_once, snapshots = checkpoints_at_once(config), config.steps // config.snapshot_every * len(config.power_ema)
        checkpoints, needed = at_once * tensors * weights, "store + checkpoints + snapshots"
        return {
            "latent_store": self.latents.store,
            "checkpoint": Figure(tensors * weights, "network, both moments, every average in float32"),
            "checkpoints_at_once": Figure(at_once, "kept by keep_last, keep_every, and the one being written", "count"),
            "checkpoints": Figure(checkpoints, "checkpoints at once x checkpoint"),
            "snapshots_written": Figure(snapshots, "every snapshot_every steps, one per power_ema", "count"),
            "snapshots": Figure(snapshots * weights, "snapshots written x parameters x 4 bytes"),
            "disk_needed": Figure(self.latents.store.value + checkpoints + snapshots * weights, needed),
        }

    def with_settings(self, **settings: Any) -> _Run:
        """Return the run with other settings."""
        return replace(self, config=replace(self.config, **settings))

    def with_micro_batch(self, size: int) -> _Run:
        """Return the run with another micro-batch for the same batch."""
        return self.with_settings(micro_batch_size=size, accumulation=self.split.share // size)

    def largest_micro_batch(self) -> int:
        """Return the largest micro-batch that fits and divides each process's share; 0 where none does."""
        share = self.split.share
        divisors = (size for size in range(share, 0, -1) if share % size == 0)
        available = self.hardware.memory.value
        return next((n for n in divisors if self.with_micro_batch(n).memory()["total"].value <= available), 0)

    def ways_to_fit(self) -> Iterator[Way]:
        """Yield the changes that make the run fit, each with the largest micro-batch that it allows."""
        layouts: tuple[Parallel, ...] = (self.config.parallel,)
        if self.config.parallel == "ddp" and self.hardware.processes > 1:
            layouts += ("fsdp",)
        recomputing = (True,) if self.config.gradient_checkpointing else (False, True)
        for parallel, recomputes in itertools.product(layouts, recomputing):
            changed = self.with_settings(parallel=parallel, gradient_checkpointing=recomputes)
            if micro := changed.largest_micro_batch():
                changed = changed.with_micro_batch(micro)
                settings = _settings_to_change(self.config, changed.config)
                yield Way(settings, int(changed.memory()["total"].value), changed.seconds())


def run_passes(config: TrainConfig, images: int, gpu: bool) -> PassMemory:
    """Return the memory of the network's passes for a micro-batch, with a GPU's normalisation or a CPU's."""
    recomputes, bfloat16 = config.gradient_checkpointing, config.precision == "bfloat16"
    # What the compiler saves of recomputed blocks is still their inputs.
    compiled = config.compile and not recomputes
    passes = pass_memory(config.network, images, bfloat16, recomputes, fused_norm=gpu and not compiled)
    return replace(passes, activations=round(COMPILED_SHARE * passes.activations)) if compiled else passes


def _settings_to_change(before: TrainConfig, after: TrainConfig) -> dict[str, Any]:
    """Return the settings that turn one run into another, without those that follow from the others."""
    names = ["parallel", "gradient_checkpointing"]
    if (before.micro_batch_size, before.accumulation) != (0, 0) or after.accumulation > 1:
        names += ["micro_batch_size"]
    names += ["accumulation"] if before.accumulation else []
    return {name: getattr(after, name) for name in names if getattr(before, name) != getattr(after, name)}


def checkpoints_at_once(config: TrainConfig) -> int:
    """Return how many checkpoints are on the disk at most: a new one is complete before an old one is removed."""
    saved = sorted({*range(config.checkpoint_every, config.steps + 1, config.checkpoint_every), config.steps})
    if not config.keep_last:
        return len(saved)
    newest = saved[-config.keep_last - 1 :]
    marked = [step for step in saved if config.keep_every and step % config.keep_every == 0]
    return len({*newest, *marked})
