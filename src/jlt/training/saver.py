"""Saving in the background: the state is copied to host memory, and a thread writes, hashes and flushes the copy."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jlt.config import TrainConfig
from jlt.runtime.processes import Group
from jlt.training.checkpoint import prune_checkpoints, remove_later_snapshots, save_checkpoint, save_snapshot
from jlt.training.parallel import full_tensor
from jlt.training.power_ema import SIGMA_REL
from jlt.training.state import TrainState

HostTensors = dict[str, dict[str, Tensor]]


class Saver(contextlib.AbstractContextManager["Saver"]):
    """Writes the checkpoints and snapshots of a run, one at a time, in the first of its processes.

    A context manager: leaving it waits for the writer. An error of the writer is raised by the next call.
    """

    def __init__(
        self,
        run: Path,
        config: TrainConfig,
        latents: Mapping[str, Any],
        state: TrainState,
        group: Group,
        on_saved: Callable[..., None],
    ) -> None:
        """`on_saved` is called, in the caller's thread, with the step and the times of each checkpoint on disk."""
        self._run, self._config, self._latents = run, config, latents
        self._state, self._writes, self._on_saved = state, group.rank == 0, on_saved
        self._buffers: HostTensors = {}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="jlt-saver")
        self._writing: Future[Any] | None = None
        if self._writes:
            remove_later_snapshots(run, state.step)
            self._writing = self._pool.submit(self._make_buffers, state.tensors())

    def save(self, checkpoint: bool, snapshot: bool) -> None:
        """Save the present state. Every process has to call it; the caller waits for the copy only."""
        start = time.perf_counter()
        tensors = self._state.tensors()
        averages = {name: values for name, values in tensors.items() if name.startswith(f"ema_{SIGMA_REL}")}
        copies = self._copy(tensors if checkpoint else averages)
        if copies:
            facts = {"step": self._state.step, **self._state.facts()}
            pause = time.perf_counter() - start
            snapshots = {name: copies[name] for name in averages} if snapshot else {}
            self._writing = self._pool.submit(self._write, copies if checkpoint else {}, snapshots, facts, pause)

    def check(self) -> None:
        """Raise the error of a writer that has failed since the last call."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Return when the writer is idle."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            if saved := writing.result():
                self._on_saved(**saved)

    def _write(
        self, checkpoint: HostTensors, snapshot: HostTensors, facts: dict[str, Any], pause: float
    ) -> dict[str, Any] | None:
        start = time.perf_counter()
        if snapshot:
            save_snapshot(self._run, snapshot, facts)
        if not checkpoint:
            return None
        save_checkpoint(self._run, self._config, self._latents, checkpoint, facts)
        prune_checkpoints(self._run, self._config.keep_last, self._config.keep_every)
        seconds = round(time.perf_counter() - start, 3)
        return {"step": facts["step"], "pause_seconds": round(pause, 3), "write_seconds": seconds}

    def _make_buffers(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        # Fresh memory costs far more than the copy, so buffers are touched here, during the first steps, and reused.
        for file, values in tensors.items():
            self._buffers[file] = {
                name: torch.empty(value.shape, dtype=value.dtype, pin_memory=value.device.type == "cuda").zero_()
                for name, value in values.items()
            }

    def _copy(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> HostTensors:
        """Copy tensors to the host in the first process; all processes gather those that are sharded."""
        copies: HostTensors = {}
        for file, values in tensors.items():
            for name, value in values.items():
                gathered = full_tensor(value)
                if self._writes:
                    buffer = self._buffers[file][name]
                    copies.setdefault(file, {})[name] = buffer.copy_(gathered, non_blocking=True)
        if copies and self._state.device.type == "cuda":
            torch.cuda.synchronize(self._state.device)
        return copies

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._pool.shutdown(wait=True)
        if error is None:
            self.wait()
