"""The numbers of a log line, summed over the steps since the last one. Sums stay on the device until they are read."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor

from jlt.config import Precision, TrainConfig
from jlt.networks.transformer import training_flops
from jlt.runtime.environment import affordable_size, compare_precisions, matmul_rate, peak_memory, resident_memory
from jlt.runtime.processes import Group
from jlt.training.parallel import sum_over
from jlt.training.state import TrainState
from jlt.training.step import Outcome, learning_rate

TIME_BINS = 10
"""Equal parts of [0, 1] in which the loss is logged separately."""
RATE_SIZE = {"cpu": 1024, "mps": 4096, "cuda": 8192}
"""Side of the matrices whose product gives the rate that utilisation is measured against."""
PRODUCT_SECONDS = 0.2
"""The most time for one product; a slower device multiplies smaller matrices."""


class Meter:
    """Sums of a run in one process."""

    def __init__(self, config: TrainConfig, state: TrainState, group: Group) -> None:
        self._config, self._state, self._group = config, state, group
        dtype = torch.bfloat16 if config.precision == "bfloat16" else torch.float32
        size = affordable_size(dtype, state.device, PRODUCT_SECONDS, RATE_SIZE[state.device.type])
        self.matmul_rate = matmul_rate(dtype, state.device, repeats=2, size=size)
        """Operations per second of a matrix product in the run's precision, in this process."""
        self._edges = torch.arange(TIME_BINS)
        self._begun = time.perf_counter() - state.seconds
        self._reset()

    def _reset(self) -> None:
        zeros = torch.zeros(2, device=self._state.device)
        self._loss: Tensor = zeros
        self._by_time = torch.zeros(2, TIME_BINS, device=self._state.device)
        self._grad_norm: Tensor = zeros[0]
        self._steps = 0
        self.waited = 0.0
        """Seconds in which steps waited for data, which the caller counts."""
        self._since = time.perf_counter()

    def pause(self, seconds: float) -> None:
        """Do not count time that other work took, such as drawing samples."""
        self._since += seconds
        self._begun += seconds

    def add(self, outcome: Outcome) -> None:
        """Count a step."""
        finite_update = ~outcome.not_finite
        losses = torch.where(finite_update, outcome.loss, 0.0)
        self._loss = self._loss + torch.stack((losses, finite_update.float()))
        self._grad_norm = outcome.grad_norm
        bins = (outcome.draws.t * TIME_BINS).long().clamp(max=TIME_BINS - 1)
        inside = (bins == self._edges[:, None]).float().to(outcome.losses.device, non_blocking=True)
        finite = outcome.losses.isfinite()
        sums = inside @ torch.where(finite, outcome.losses, 0.0)
        self._by_time = self._by_time + torch.stack((sums, inside @ finite.float()))
        self._steps += 1
        self._state.seconds = time.perf_counter() - self._begun

    def read(self) -> dict[str, Any]:
        """Return the values of a log line and reset the sums. Every process has to call it."""
        config, device = self._config, self._state.device
        by_time = sum_over(self._by_time, self._group).tolist()
        ema = self._state.ema
        # With FSDP, each process has the squares of its shard.
        squares = sum_over(ema.squares(), self._group) if config.parallel == "fsdp" else ema.squares()
        norm, *distances = squares.sqrt().tolist()
        loss, finite_updates = self._loss.tolist()
        grad_norm = self._grad_norm.item()
        seconds = time.perf_counter() - self._since
        rate = self._steps * config.batch_size / seconds
        resident = resident_memory()
        values = {
            "loss": loss / finite_updates if finite_updates else None,
            "loss_by_time": [total / count if count else None for total, count in zip(*by_time, strict=True)],
            "learning_rate": learning_rate(config, self._state.step - 1),
            "grad_norm": grad_norm if math.isfinite(grad_norm) else None,
            "ema_distance": {
                name: distance / norm
                for name, distance in zip(ema.averages, distances, strict=True)
                if norm and math.isfinite(distance / norm)
            },
            "img_per_second": rate,
            "mfu": rate * training_flops(config.network) / (self.matmul_rate * self._group.size),
            "memory_gib": peak_memory(device) / 2**30,
            "resident_gib": resident / 2**30 if resident is not None else None,
            "waiting": self.waited / seconds,
            "seconds": self._state.seconds,
        }
        self._reset()
        return values


def precision_warning(precision: Precision, device: torch.device) -> str:
    """Return a sentence for a run in bfloat16 on a device that multiplies float32 faster; empty otherwise."""
    return compare_precisions(device, PRODUCT_SECONDS).warning if precision == "bfloat16" else ""
