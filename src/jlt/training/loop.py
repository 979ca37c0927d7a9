"""The training loop: read, update, judge, average, log, save, watch."""

from __future__ import annotations

import abc
import contextlib
import time
from collections.abc import Generator, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from jlt.config import TrainConfig, in_steps
from jlt.errors import JLTError
from jlt.latents.loader import read_ahead
from jlt.latents.order import SampleOrder
from jlt.latents.store import LatentStore
from jlt.runtime.processes import Group, SingleProcess, lost_process_as_error
from jlt.runtime.progress import inform
from jlt.runtime.random_numbers import derive_seed
from jlt.runtime.signals import Stopped, StopRequest, stop_on_signal
from jlt.storage.files import lock_folder
from jlt.training.batch_split import split_batch
from jlt.training.checkpoint import (
    list_checkpoints,
    open_checkpoint,
    remove_later_snapshots,
    remove_partial_saves,
    step_folder,
)
from jlt.training.draws import StepDraws, draw_steps
from jlt.training.journal import Journal
from jlt.training.meter import Meter, precision_warning
from jlt.training.run_folder import prepare_run
from jlt.training.saver import Saver
from jlt.training.state import initial_state, resume
from jlt.training.step import Outcome, Stepper, Verdict, float32_products

DrawnBatch = tuple[StepDraws, Float[Tensor, "share c h w"], Int64[Tensor, "share"]]
"""The draws of this process's share of a step, with the latents and labels that they ask for."""


class Watcher(abc.ABC):
    """Something that looks at a run's checkpoints at intervals, such as an evaluation."""

    @abc.abstractmethod
    def due(self, step: int) -> bool:
        """Whether the checkpoint of this step is looked at: a function of the step, the same in all processes."""

    @abc.abstractmethod
    def look(self, checkpoint: Path, group: Group) -> dict[str, Any] | None:
        """Look at a checkpoint, and return what the log says of it: an `event` and its values; None if it was before.

        Called in every process of the group, all of which return or raise alike.
        """


def train(
    config: TrainConfig,
    store: LatentStore,
    run: Path,
    device: torch.device | str = "cpu",
    group: Group | None = None,
    watchers: Sequence[Watcher] = (),
) -> Path:
    """Train to the run's last step, continuing from the newest checkpoint in `run`; return the last one's folder.

    Every process of a group calls it with the same arguments but for its device. Raises JLTError where the store does
    not fit the network, the batch does not divide, the folder holds another run or the loss stays not finite, and
    Stopped after saving when any process was asked to end.
    """
    group = group or SingleProcess()
    config = in_steps(config, len(store))
    with contextlib.ExitStack() as held, float32_products(config.precision), stop_on_signal() as asked:
        group.on_rank0(lambda: _claim(held, run, config, store, group.size))
        return Training(config, store, run, torch.device(device), group, watchers, asked).to_the_end()


def _claim(held: contextlib.ExitStack, run: Path, config: TrainConfig, store: LatentStore, processes: int) -> None:
    """Refuse what cannot be trained, and make the folder this run's for as long as the stack holds."""
    check_store(config, store)
    split_batch(config, processes)
    prepare_run(run, config, store.identity())
    held.enter_context(lock_folder(run))
    remove_partial_saves(run)


class Training:
    """One process's part in a run."""

    def __init__(
        self,
        config: TrainConfig,
        store: LatentStore,
        run: Path,
        device: torch.device,
        group: Group,
        watchers: Sequence[Watcher],
        asked: StopRequest,
    ) -> None:
        self.config, self.store, self.run, self.group = config, store, run, group
        self.split, self.watchers, self.asked = split_batch(config, group.size), watchers, asked
        complete = group.on_rank0(lambda: list_checkpoints(run))
        self.state = initial_state(config, device, group, resumed=bool(complete))
        if complete:
            resume(self.state, open_checkpoint(complete[-1]), config, store.identity())
        self.journal = Journal(run, config, self.state.step) if group.rank == 0 else None
        self.pending: Verdict | None = None
        self.stopping = False

    def to_the_end(self) -> Path:
        """Make the remaining updates and return the folder of the last checkpoint."""
        try:
            with self.journal or contextlib.nullcontext():
                # A run that ended between a save and a look.
                self._watch()
                if self.state.step < self.config.steps:
                    self._train()
        except Stopped:
            # Whoever started the processes may kill the rest of them when the first has left.
            self.group.pulse.leaving = True
            self.group.wait()
            raise
        return step_folder(self.run, self.state.step)

    def _train(self) -> None:
        config, state, group = self.config, self.state, self.group
        if group.rank == 0:
            remove_later_snapshots(self.run, state.step)
        with lost_process_as_error():
            self.stepper = Stepper(config, state, self.split, group)
        self.meter = Meter(config, state, self.split, group)
        self.saver = Saver(self.run, config, self.store.identity(), state, group, partial(self._log, "saved"))
        self._log_start()
        if self.journal is not None:
            if warning := precision_warning(config, state.device):
                inform(warning)
            self.journal.show()
        with self.saver, contextlib.closing(self._batches()) as batches:
            while state.step < config.steps:
                with _telling(state.step + 1):
                    self._step(batches)
                group.pulse.step()
            group.pulse.leaving = True
            self.saver.wait()
        self._log("end", seconds=state.seconds, draws=state.draws_digest)

    def _log_start(self) -> None:
        self._log(
            "start",
            processes=self.group.size,
            micro_batch_size=self.split.micro_batch_size,
            accumulation=self.split.accumulation,
            parallel=self.config.parallel,
            device=self.state.device.type,
            matmul_gflops=self.meter.matmul_rate / 1e9,
            initial_weights=self.state.initial_weights,
            draws=self.state.draws_digest,
        )

    def _batches(self) -> Generator[DrawnBatch, None, None]:
        """Yield this process's share of the remaining steps; while one is computed, a thread prepares the next."""
        share = self.split.share
        begin = self.group.rank * share
        order = SampleOrder(len(self.store), derive_seed(self.config.seed, "order"))
        steps = draw_steps(self.config, order, range(self.state.step, self.config.steps), self.state.draws_digest)
        return read_ahead(
            self.store, (draws.part(slice(begin, begin + share)) for draws in steps), share, self.state.device
        )

    def _step(self, batches: Iterator[DrawnBatch]) -> None:
        """Make one update; then log, save and look where it is time."""
        config, state = self.config, self.state
        before = time.perf_counter()
        draws, latents, labels = next(batches)
        self.meter.waited(time.perf_counter() - before)
        outcome = self.stepper.differentiate(draws, latents, labels, bool(self.asked))
        self._settle()
        self.pending = self.stepper.apply(outcome)
        state.draws_digest = draws.digest
        self.meter.add(outcome)
        if state.step % config.log_every == 0 or self._last:
            self._settle()
            self._log("step", **self.meter.read())
        self._save()
        if self.stopping and state.step < config.steps:
            self.saver.wait()
            self._log("stopped")
            raise Stopped(
                f"Stopped at step {state.step} of {config.steps}; {step_folder(self.run, state.step)} is saved."
            )

    @property
    def _last(self) -> bool:
        """Whether no update follows in this process; what it says may change with `_settle`."""
        return self.stopping or self.state.step == self.config.steps

    def _settle(self) -> None:
        """Take in whether the last update was sound: move the averages, or count it as skipped."""
        if self.pending is None:
            return
        verdict, self.pending = self.pending, None
        skipped, stop = verdict.read()
        self.stopping = self.group.pulse.leaving = self.stopping or stop
        if not skipped:
            self.state.skipped_in_a_row = 0
            self.state.updates += 1
            self.state.ema.update(self.state.updates)
            return
        self.state.skipped_in_a_row += 1
        self._report_skipped(verdict.outcome)

    def _report_skipped(self, outcome: Outcome) -> None:
        """Log which processes and samples an update was skipped for; JLTError if too many were, one after the other."""
        bad = (~outcome.losses.isfinite()).cpu().numpy()
        found = self.group.gather(outcome.draws.indices[bad].tolist())
        processes = [rank for rank, samples in enumerate(found) if samples]
        samples = [sample for share in found for sample in share]
        loss, grad_norm = outcome.loss.item(), outcome.grad_norm.item()
        where = f" in process {', '.join(map(str, processes))}" if processes else ""
        which = f", at the samples {', '.join(map(str, samples[:8]))}" if samples else ""
        what = f"Step {outcome.step}: the loss is {loss:g} and the gradient norm {grad_norm:g}{where}{which}."
        self._log("skipped", step=outcome.step, processes=processes, samples=samples, what=what)
        if self.state.skipped_in_a_row >= self.config.max_skipped:
            raise JLTError(
                f"{what} That is update {self.state.skipped_in_a_row} in a row that is not finite; none of them was "
                "applied or saved. Lower the learning rate, or look for values in the latents that are not finite."
            )

    def _save(self) -> None:
        """Write what is due at this step, and let those look who are waiting for it."""
        config, step = self.config, self.state.step
        self.saver.check()
        snapshot = step % config.snapshot_every == 0 and bool(config.power_ema)
        watched = any(watcher.due(step) for watcher in self.watchers)
        checkpoint = watched or step % config.checkpoint_every == 0
        if not (checkpoint or snapshot or self._last):
            return
        self._settle()
        with self.group.pulse.busy():
            # All wait, in a place where that may take long, for what the first process is still writing.
            self.saver.wait()
            self.group.wait()
            self.saver.save(checkpoint or self._last, snapshot)
            if watched and not self.stopping:
                before = time.perf_counter()
                self.saver.wait()
                self._watch()
                self.meter.pause(time.perf_counter() - before)

    def _watch(self) -> None:
        """Show the newest checkpoint to the watchers that wait for it."""
        for watcher in self.watchers:
            if watcher.due(self.state.step):
                self._look(watcher)

    def _look(self, watcher: Watcher) -> None:
        aside = self.journal.aside() if self.journal is not None else contextlib.nullcontext()
        try:
            with aside, float32_products("float32"):
                seen = watcher.look(step_folder(self.run, self.state.step), self.group)
            if seen:
                self._log(**seen)
        except Stopped:
            raise
        except (Exception, SystemExit) as error:
            # What only looks on never ends a training.
            self._log("failed", error=f"{error or type(error).__name__}")
        if self.state.device.type == "cuda":
            # What the look has taken is given back, and is no part of the training's peak.
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.state.device)

    def _log(self, event: str, **values: Any) -> None:
        if self.journal is not None:
            self.journal.write(event, **{"step": self.state.step, **values})


@contextlib.contextmanager
def _telling(step: int) -> Iterator[None]:
    """Say in an error at which step it came."""
    try:
        with lost_process_as_error():
            yield
    except torch.OutOfMemoryError as error:
        raise JLTError(
            f"Step {step}: there is not enough memory ({error}). Take a smaller --micro-batch-size, "
            "--gradient-checkpointing, or --parallel fsdp with more processes."
        ) from error
    except Exception as error:
        if not str(error).startswith("Step"):
            error.add_note(f"at step {step}")
        raise


def check_store(config: TrainConfig, store: LatentStore) -> None:
    """Raise a JLTError unless the run was made for latents of the store's shape, classes and orientations."""
    network, latents = config.network, store.shape
    if config.flips and not store.manifest.flips:
        raise JLTError(f"{store.folder} holds no mirrored latents: encode with flips, or train with --no-flips.")
    wanted = (network.channels, network.height, network.width, network.num_classes)
    found = (latents.channels, latents.height, latents.width, latents.num_classes)
    if wanted != found:
        raise JLTError(
            f"The network takes latents of {wanted[0]}x{wanted[1]}x{wanted[2]} with {wanted[3]} classes, "
            f"the store holds {found[0]}x{found[1]}x{found[2]} with {found[3]}."
        )
