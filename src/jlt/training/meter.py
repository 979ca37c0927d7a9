"""What a line of the log says of the steps since the last one. Sums stay on the device until they are read."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from jlt.config import TrainConfig
from jlt.networks.flops import training_flops
from jlt.runtime.processes import Group
from jlt.runtime.timing import affordable_size, compare_precisions, matmul_rate, peak_memory, resident_memory
from jlt.training.batch_split import BatchSplit
from jlt.training.optimizer import learning_rate
from jlt.training.parallel import sum_over
from jlt.training.state import TrainState
from jlt.training.step import Outcome

TIME_BINS = 10
"""Equal parts of [0, 1] in which the loss is told apart."""
RATE_SIZE = {"cpu": 1024, "cuda": 8192}
"""Side of the matrices whose product gives the rate that utilisation is measured against."""
PRODUCT_SECONDS = 0.2
"""How long one product may take; a device that would need longer is measured with smaller matrices."""


class Meter:
    """Sums of a run in one process."""

    def __init__(self, config: TrainConfig, state: TrainState, split: BatchSplit, group: Group) -> None:
        self._config, self._state, self._split, self._group = config, state, split, group
        self.matmul_rate = product_rate(config, state.device)
        """Operations per second of a matrix product in the run's precision, in this process."""
        self._edges = torch.arange(TIME_BINS)
        self._begun = time.perf_counter() - state.seconds
        self._reset()

    def _reset(self) -> None:
        zeros = torch.zeros(2, device=self._state.device)
        self._loss: Tensor = zeros
        self._by_time = torch.zeros(2, TIME_BINS, device=self._state.device)
        self._grad_norm: Tensor = zeros[0]
        self._steps, self._waited = 0, 0.0
        self._since = time.perf_counter()

    def waited(self, seconds: float) -> None:
        """Count time in which nothing could be computed for want of data."""
        self._waited += seconds

    def pause(self, seconds: float) -> None:
        """Leave time out that was spent on something else, such as drawing samples."""
        self._since += seconds
        self._begun += seconds

    def add(self, outcome: Outcome) -> None:
        """Count a step."""
        sound = ~outcome.unsound
        self._loss = self._loss + torch.stack((torch.where(sound, outcome.loss, 0.0), sound.float()))
        self._grad_norm = outcome.grad_norm
        bins = (outcome.draws.t * TIME_BINS).long().clamp(max=TIME_BINS - 1)
        inside = (bins == self._edges[:, None]).float().to(outcome.losses.device, non_blocking=True)
        finite = outcome.losses.isfinite()
        sums = inside @ torch.where(finite, outcome.losses, 0.0)
        self._by_time = self._by_time + torch.stack((sums, inside @ finite.float()))
        self._steps += 1
        self._state.seconds = time.perf_counter() - self._begun

    def read(self) -> dict[str, Any]:
        """Return the values of a log line and begin anew. Every process has to call it."""
        config, device = self._config, self._state.device
        by_time = sum_over(self._by_time, self._group).tolist()
        distances = self._ema_distances()
        loss, sound = self._loss.tolist()
        grad_norm = self._grad_norm.item()
        seconds = time.perf_counter() - self._since
        rate = self._steps * config.batch_size / seconds
        resident = resident_memory()
        values = {
            "loss": loss / sound if sound else None,
            "loss_by_time": [total / count if count else None for total, count in zip(*by_time, strict=True)],
            "learning_rate": learning_rate(config, self._state.step - 1),
            "grad_norm": _or_none(grad_norm),
            "ema_distance": distances,
            "img_per_second": rate,
            "mfu": rate * training_flops(config.network) / (self.matmul_rate * self._group.size),
            "memory_gib": peak_memory(device) / 2**30,
            "resident_gib": resident / 2**30 if resident is not None else None,
            "waiting": self._waited / seconds,
            "seconds": self._state.seconds,
        }
        self._reset()
        return values

    def _ema_distances(self) -> dict[str, float]:
        """Return the distance of the weights from each average, relative to the weights' norm."""
        ema = self._state.ema
        squares = torch.stack((ema.squared_norm(), *ema.distances().values()))
        if self._config.parallel == "fsdp":
            # Each process has seen its part.
            squares = sum_over(squares, self._group)
        whole, *apart = squares.sqrt().tolist()
        return {name: distance / whole for name, distance in zip(ema.averages, apart, strict=True)}


def product_rate(config: TrainConfig, device: torch.device) -> float:
    """Measure the rate of a matrix product in the precision that a run multiplies in."""
    dtype = torch.bfloat16 if config.precision == "bfloat16" else torch.float32
    size = affordable_size(dtype, device, PRODUCT_SECONDS, RATE_SIZE[device.type])
    return matmul_rate(dtype, device, repeats=2, size=size)


def precision_warning(config: TrainConfig, device: torch.device) -> str:
    """Return a sentence where a run multiplies in bfloat16 on a device that is slower at it; empty elsewhere."""
    return compare_precisions(device, PRODUCT_SECONDS).warning if config.precision == "bfloat16" else ""


def _or_none(value: float) -> float | None:
    """Return a number that JSON can hold."""
    return value if abs(value) < float("inf") else None
