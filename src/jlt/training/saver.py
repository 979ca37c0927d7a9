"""Saving behind the training: the state is copied to host memory, and a thread writes, hashes and flushes the copy."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from jlt.config import TrainConfig
from jlt.runtime.processes import Group
from jlt.training.checkpoint import prune_checkpoints, save_checkpoint, save_snapshot
from jlt.training.parallel import whole
from jlt.training.state import TrainState

HostTensors = dict[str, dict[str, Tensor]]


class Saver:
    """Writes the checkpoints and snapshots of a run, one at a time, in the first of its processes.

    A context manager: leaving it waits for what is being written. What fails while writing is raised by the next call.
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
        """`on_saved` is told, by the thread that calls, of each checkpoint that is on disk: its step and the times."""
        self._run, self._config, self._latents = run, config, latents
        self._state, self._writes, self._on_saved = state, group.rank == 0, on_saved
        self._buffers: HostTensors = {}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="jlt-saver")
        self._writing: Future[Any] | None = None
        if self._writes:
            self._writing = self._pool.submit(self._make_buffers, state.tensors())

    def save(self, checkpoint: bool, snapshot: bool) -> None:
        """Save the state as it is now. Every process has to call it; only the copying takes their time."""
        start = time.perf_counter()
        averages = {f"ema_{name}": values for name, values in self._state.ema.power_averages().items()}
        copies = self._copy(self._state.tensors() if checkpoint else averages)
        if copies is not None:
            facts = {"step": self._state.step, **self._state.facts()}
            pause = time.perf_counter() - start
            snapshots = {name: copies[name] for name in averages} if snapshot else {}
            self._writing = self._pool.submit(self._write, copies if checkpoint else {}, snapshots, facts, pause)

    def check(self) -> None:
        """Raise what has failed in the meantime."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Return when nothing is being written any more."""
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
        # Fresh memory costs far more than the copy: it is touched here, beside the first steps, and used again.
        for file, values in tensors.items():
            self._buffers[file] = {name: _host_buffer(value) for name, value in values.items()}

    def _copy(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> HostTensors | None:
        """Copy tensors to the host in the first process; gathering those that are shared out takes all of them."""
        copies: HostTensors = {}
        for file, values in tensors.items():
            for name, value in values.items():
                gathered = whole(value)
                if self._writes:
                    buffer = self._buffers[file][name]
                    copies.setdefault(file, {})[name] = buffer.copy_(gathered, non_blocking=True)
        if not self._writes:
            return None
        if self._state.device.type == "cuda":
            torch.cuda.synchronize(self._state.device)
        return copies

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True)
        if error is None:
            self.wait()


def _host_buffer(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda").zero_()
