"""One update of the weights: draw, predict, weigh, differentiate, judge, apply; without waiting for the device.

The device decides whether an update's loss and gradient are finite, and the optimiser reads the verdict there. The
host reads it one step later, and then moves the averages or counts the step as skipped. So the host stays a step ahead
of the device, and no skipped update enters an average.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.profiler import record_function

from jlt.config import Precision, TrainConfig
from jlt.loss import denoising_loss
from jlt.path import interpolate
from jlt.runtime.processes import Group
from jlt.runtime.random_numbers import normal_per_sample
from jlt.training.batch_split import BatchSplit
from jlt.training.draws import StepDraws
from jlt.training.optimizer import learning_rate
from jlt.training.parallel import Parallel, sum_over
from jlt.training.state import TrainState


@dataclass(frozen=True)
class Outcome:
    """The result of a step before its update is applied; tensors are on the device.

    `loss` and `grad_norm` (before clipping) are those of the global batch, `losses` those of this process's samples.
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

    @classmethod
    def of(cls, outcome: Outcome) -> Verdict:
        """Start the copy of an outcome's verdict and stop requests to the host."""
        values = torch.stack((outcome.not_finite.float(), outcome.stop_requests))
        if values.device.type != "cuda":
            return cls(outcome, values, None)
        host = torch.empty(2, pin_memory=True).copy_(values, non_blocking=True)
        return cls(outcome, host, torch.cuda.current_stream(values.device).record_event())

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
        self, draws: StepDraws, latents: Float[Tensor, "share c h w"], labels: Int64[Tensor, "share"], stop: bool
    ) -> Outcome:
        """Leave the clipped gradient of the global batch's loss in the parameters; `stop` is this process's request."""
        losses = []
        for part in micro_batches(self.split):
            more = part.stop < self.split.share
            with self.parallel.accumulating(more):
                losses.append(self._accumulate(draws.part(part), latents[part], labels[part]))
        share = torch.cat(losses)
        local = torch.stack((share.sum(), (~share.isfinite().all()).float(), torch.full_like(share[0], float(stop))))
        total, failed, stop_requests = sum_over(local, self.group)
        with record_function("jlt::clipping"):
            grad_norm = self._clip()
        loss = total / self.config.batch_size
        not_finite = ~(grad_norm.isfinite() & loss.isfinite() & (failed == 0))
        return Outcome(self.state.step + 1, draws, share, loss, grad_norm, not_finite, stop_requests)

    def apply(self, outcome: Outcome) -> Verdict:
        """Update the weights, unless the outcome is not finite."""
        optimizer = self.state.optimizer
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.state.step)
        # The protocol of PyTorch's gradient scaler: a fused optimiser changes nothing where this is 1.
        optimizer.grad_scale, optimizer.found_inf = None, outcome.not_finite.float()  # type: ignore[attr-defined]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self.state.step += 1
        return Verdict.of(outcome)

    def _accumulate(self, draws: StepDraws, latents: Tensor, labels: Tensor) -> Float[Tensor, "micro"]:
        x, eps, labels = prepare_batch(self.config, draws, latents, labels)
        sample = interpolate(x, eps, draws.t.to(x.device, non_blocking=True))
        output = self.parallel(sample.z, sample.t, labels)
        losses = denoising_loss(self.config.prediction, output, sample, self.config.loss)
        # Engines take the mean over processes, and each process has the same number of samples.
        (losses.sum() / self.split.share).backward()
        return losses.detach()

    def _clip(self) -> Float[Tensor, ""]:
        parameters = list(self.state.network.parameters())
        norm = get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        clip_grads_with_norm_(parameters, self.config.optimizer.grad_clip, norm)
        return norm


def micro_batches(split: BatchSplit) -> Iterator[slice]:
    """Yield the micro-batches of a process's share, in order."""
    for start in range(0, split.share, split.micro_batch_size):
        yield slice(start, start + split.micro_batch_size)


def prepare_batch(
    config: TrainConfig, draws: StepDraws, latents: Float[Tensor, "b c h w"], labels: Int64[Tensor, "b"]
) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c h w"], Int64[Tensor, "b"]]:
    """Return clean float32 latents, scaled noise and labels (dropped ones the null class) on the latents' device."""
    x = latents.float()
    with record_function("jlt::noise"):
        eps = config.noise_scale * normal_per_sample(draws.noise_seeds, x.shape[1:], x.device)
    labels = torch.where(draws.dropped, config.network.num_classes, labels)
    return x, eps, labels.to(x.device, non_blocking=True)


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
