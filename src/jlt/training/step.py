"""One update of the weights: add noise, predict, differentiate, judge, apply; without waiting for the device.

The device decides whether an update's loss and gradient are finite, and the optimiser reads the verdict there. The
host reads it one step later, and then moves the averages or counts the step as skipped. So the host stays a step ahead
of the device, and no skipped update enters an average.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.profiler import record_function

from jlt.config import Precision, TrainConfig
from jlt.errors import UsageError
from jlt.loss import denoising_loss
from jlt.path import interpolate
from jlt.runtime.processes import Group
from jlt.runtime.random_numbers import normal_per_sample
from jlt.runtime.signals import StopRequest
from jlt.training.draws import StepDraws
from jlt.training.parallel import Parallel, full_tensor, sum_over
from jlt.training.state import TrainState


@dataclass(frozen=True)
class BatchSplit:
    """The part of one process in an update."""

    micro_batch_size: int
    """Samples in one pass through the network."""
    accumulation: int
    """Micro-batches whose gradients are summed."""

    @property
    def share(self) -> int:
        """Samples of one process in one update."""
        return self.micro_batch_size * self.accumulation


def split_batch(config: TrainConfig, processes: int) -> BatchSplit:
    """Return the split of `config.batch_size` over processes; a setting of 0 follows from the others.

    If micro_batch_size and accumulation are both 0, accumulation is 1. JLTError, with the nearest numbers that work, if
    the product is not the batch size.
    """
    if processes < 1:
        raise UsageError(f"A batch needs at least one process, not {processes}.")
    batch, micro, accumulation = config.batch_size, config.micro_batch_size, config.accumulation
    if batch % processes:
        below = batch // processes * processes
        near = " or ".join(str(multiple) for multiple in (below, below + processes) if multiple)
        raise UsageError(
            f"batch_size {batch} cannot be shared equally among {processes} processes: take batch_size {near}."
        )
    share = batch // processes
    if micro and accumulation and micro * accumulation != share:
        pairs = " or ".join(f"{near} and {share // near}" for near in _nearest_divisors(share, micro))
        raise UsageError(
            f"micro_batch_size {micro} * accumulation {accumulation} * processes {processes} is "
            f"{micro * accumulation * processes}, and batch_size is {batch}: leave micro_batch_size or accumulation at "
            f"0, or take {pairs}."
        )
    if not micro:
        micro = _quotient("accumulation", accumulation or 1, share)
    return BatchSplit(micro, _quotient("micro_batch_size", micro, share))


def _quotient(name: str, divisor: int, share: int) -> int:
    if share % divisor:
        near = " or ".join(map(str, _nearest_divisors(share, divisor)))
        raise UsageError(
            f"{name} {divisor} does not divide the {share} samples that each process has of a batch: "
            f"take {name} {near}."
        )
    return share // divisor


def _nearest_divisors(share: int, near: int) -> list[int]:
    """Return the divisors of a share that are nearest to a number, at most one on either side."""
    divisors = [n for n in range(1, share + 1) if share % n == 0]
    return sorted({*[n for n in divisors if n <= near][-1:], *[n for n in divisors if n >= near][:1]})


@dataclass(frozen=True)
class Outcome:
    """The result of a step before its update is applied; tensors are on the device.

    `loss` and `grad_norm` (before clipping) are those of the global batch, `losses` those of this process's samples,
    before the weight `uncertainty`.
    `not_finite` says, the same in all processes, that the update must not be applied. `stop_requests` counts the
    processes that received a signal.
    """

    step: int
    """Its number, from 1 on."""
    draws: StepDraws
    losses: Float[Tensor, "share"]
    loss: Float[Tensor, ""]
    grad_norm: Float[Tensor, ""]
    not_finite: Bool[Tensor, ""]
    stop_requests: Float[Tensor, ""]


@dataclass(frozen=True)
class Verdict:
    """An outcome on its way to the host."""

    outcome: Outcome
    values: Float[Tensor, "2"]
    arrived: torch.cuda.Event | None

    def read(self) -> tuple[bool, bool]:
        """Return whether the update was skipped, and whether to stop; waits for the copy."""
        if self.arrived is not None:
            self.arrived.synchronize()
        skipped, stop = (value > 0 for value in self.values.tolist())
        return skipped, stop


class Stepper:
    """Makes the updates of a run in one process, for its share of every batch."""

    def __init__(self, config: TrainConfig, state: TrainState, split: BatchSplit, group: Group) -> None:
        self.config, self.state, self.split, self.group = config, state, split, group
        self.parallel = Parallel(state.network, config, group)
        if group.size > 1:
            self.parallel.rehearse(split.micro_batch_size)

    def differentiate(
        self,
        draws: StepDraws,
        latents: Float[Tensor, "share c h w"],
        labels: Int64[Tensor, "share"],
        stop: bool | StopRequest,
    ) -> Outcome:
        """Leave the clipped gradient of the global batch's loss in the parameters.

        `stop` is this process's request, which may arrive while the gradient is computed.
        """
        losses = []
        for start in range(0, self.split.share, self.split.micro_batch_size):
            part = slice(start, start + self.split.micro_batch_size)
            with self.parallel.accumulating(part.stop < self.split.share):
                losses.append(self._accumulate(draws.part(part), latents[part], labels[part]))
        share = torch.cat(losses)
        requested = torch.full_like(share[0], float(bool(stop)))
        local = torch.stack((share.sum(), (~share.isfinite().all()).float(), requested))
        by_time = self.state.loss_by_time
        if by_time:
            local = torch.cat((local, by_time.collect(draws.t.to(share), share).flatten()))
        total, failed, stop_requests, *_ = summed = sum_over(local, self.group)
        with record_function("jlt::clipping"):
            parameters = list(self.state.network.parameters())
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            grad_norm = full_tensor(get_total_norm(gradients))
            clip_grads_with_norm_(parameters, self.config.optimizer.grad_clip, grad_norm)
        loss = total / self.config.batch_size
        not_finite = ~(grad_norm.isfinite() & loss.isfinite() & (failed == 0))
        if by_time:
            by_time.update(summed[3:].view_as(by_time.sums), not_finite)
        return Outcome(self.state.step + 1, draws, share, loss, grad_norm, not_finite, stop_requests)

    def apply(self, outcome: Outcome) -> Verdict:
        """Update the weights, unless the outcome is not finite; start the copy of the verdict to the host."""
        optimizer = self.state.optimizer
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.state.step)
        # The protocol of PyTorch's gradient scaler: a fused optimiser changes nothing where this is 1.
        optimizer.grad_scale, optimizer.found_inf = None, outcome.not_finite.float()  # type: ignore[attr-defined]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self.state.step += 1
        values = torch.stack((outcome.not_finite.float(), outcome.stop_requests))
        if values.device.type != "cuda":
            return Verdict(outcome, values, None)
        host = torch.empty(2, pin_memory=True).copy_(values, non_blocking=True)
        return Verdict(outcome, host, torch.cuda.current_stream(values.device).record_event())

    def _accumulate(self, draws: StepDraws, latents: Tensor, labels: Tensor) -> Float[Tensor, "micro"]:
        x, config = latents.float(), self.config
        with record_function("jlt::noise"):
            eps = config.noise_scale * normal_per_sample(draws.noise_seeds, x.shape[1:], x.device)
        # The null class replaces the dropped labels.
        labels = torch.where(draws.dropped, config.network.num_classes, labels).to(x.device, non_blocking=True)
        sample = interpolate(x, eps, draws.t.to(x.device, non_blocking=True))
        output = self.parallel(sample.z, sample.t, labels)
        losses = denoising_loss(config.prediction, output, sample, config.loss)
        by_time = self.state.loss_by_time
        weighted = losses / by_time.mean(sample.t) if by_time else losses
        # Engines take the mean over processes, and each process has the same number of samples.
        (weighted.sum() / self.split.share).backward()
        return losses.detach()


def learning_rate(config: TrainConfig, step: int) -> float:
    """Return the learning rate of the update after `step` steps: linear warm-up, then the schedule."""
    settings = config.optimizer
    warmup = settings.warmup_steps or 0
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    if settings.schedule == "constant":
        return settings.learning_rate
    progress = (step - warmup) / max(1, config.steps - warmup)
    return settings.learning_rate * (1 + math.cos(math.pi * min(1.0, progress))) / 2


@contextlib.contextmanager
def float32_products(precision: Precision) -> Iterator[None]:
    """Let a GPU multiply float32 matrices in TF32 for the precision `tf32`, in IEEE otherwise, during a block."""
    products = torch.backends.cuda.matmul
    before = products.fp32_precision
    products.fp32_precision = "tf32" if precision == "tf32" else "ieee"
    try:
        yield
    finally:
        products.fp32_precision = before
