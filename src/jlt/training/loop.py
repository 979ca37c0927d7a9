"""The training loop: read, update, judge, average, log, save, watch."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jlt.autoencoders.coordinates import copy_coordinates
from jlt.config import TrainConfig
from jlt.errors import JLTError
from jlt.latents.loader import SampleOrder, read_ahead
from jlt.latents.store import LatentStore, ShardCheck
from jlt.runtime.processes import Group, SingleProcess, lost_process_as_error
from jlt.runtime.progress import inform
from jlt.runtime.random_numbers import derive_seed
from jlt.runtime.signals import Stopped, StopRequest, stop_on_signal
from jlt.storage.folders import Claim
from jlt.training.checkpoint import list_checkpoints, open_checkpoint, require_own_folders, step_folder
from jlt.training.draws import StepDraws, draw_steps
from jlt.training.journal import Journal
from jlt.training.meter import Meter, precision_warning
from jlt.training.saver import Saver
from jlt.training.state import TrainState, initial_state, resume, run_claim
from jlt.training.step import BatchSplit, Outcome, Stepper, Verdict, float32_products, split_batch


class NotFiniteError(JLTError):
    """Too many updates in a row have a loss or a gradient that is not finite; the message names the step."""


@dataclass
class Watcher:
    """Something that looks at a run's checkpoints at intervals, such as an evaluation."""

    due: Callable[[int], bool]
    """Whether it looks at the checkpoint of a step; the same in all processes."""
    look: Callable[[Path, Group], dict[str, Any] | None]
    """Looks at a checkpoint, and returns an `event` and its values for the log; None if the log has them already.

    Every process of the group calls it, and all return or raise alike."""


def train(
    config: TrainConfig,
    store: LatentStore,
    run: Path,
    device: torch.device | str = "cpu",
    group: Group | None = None,
    watchers: Sequence[Watcher] = (),
) -> Path:
    """Train to the run's last step, resuming from the newest checkpoint in `run`; return the last one's folder.

    Every process of a group calls it with the same arguments but for its device. Lengths are in steps (`in_steps`).
    Raises JLTError if the store does not fit the network, the batch does not divide, the folder holds another run or
    the loss stays not finite; Stopped, after saving, if any process received a signal.
    """
    group = group or SingleProcess()
    if config.epochs or config.optimizer.warmup_epochs is not None:
        raise ValueError("train takes lengths in steps: resolve the epochs with jlt.config.in_steps first")
    with contextlib.ExitStack() as held, float32_products(config.precision), stop_on_signal() as stop:
        claim = run_claim(run, config, store.identity())
        split, complete = group.on_rank0(lambda: _hold(held, claim, config, store, group.size))
        state = initial_state(config, device, group, resumed=bool(complete))
        if complete:
            resume(state, open_checkpoint(complete[-1]), config, store.identity())
        group.on_rank0(lambda: _begin(claim, store))
        with Journal(run, config, state.step, group.rank) as journal:
            training = Training(config, store, run, state, split, group, journal, watchers, stop)
            try:
                # The last session may have ended between a save and a look.
                training.show_checkpoint()
                if state.step < config.steps:
                    training.run_steps()
            except Stopped:
                # A launcher may kill the other processes once the first one has left.
                group.pulse.leaving = True
                group.wait()
                raise
    return step_folder(run, state.step)


def _hold(
    held: contextlib.ExitStack, claim: Claim, config: TrainConfig, store: LatentStore, processes: int
) -> tuple[BatchSplit, list[Path]]:
    """Refuse what cannot be trained, and hold the run's folder for as long as the stack does.

    Return the split of a batch, and the run's checkpoints.
    """
    wanted, latents = config.network.latent_shape, store.shape
    if config.flips and not store.manifest.flips:
        raise JLTError(f"{store.folder} holds no mirrored latents: encode with flips, or train with --no-flips.")
    if wanted != latents:
        raise JLTError(
            f"The network takes latents of {wanted.channels}x{wanted.height}x{wanted.width} with {wanted.num_classes} "
            f"classes, the store holds {latents.channels}x{latents.height}x{latents.width} with {latents.num_classes}."
        )
    split = split_batch(config, processes)
    held.enter_context(claim.hold())
    require_own_folders(claim.folder)
    return split, list_checkpoints(claim.folder)


def _begin(claim: Claim, store: LatentStore) -> None:
    """Make a folder that was held the run's."""
    claim.begin()
    # With them the run can be moved, and sampled without its store.
    copy_coordinates(store.manifest.autoencoder, store.folder, claim.folder)


@dataclass
class Training:
    """One process's part in the remaining steps of a run."""

    config: TrainConfig
    store: LatentStore
    run: Path
    state: TrainState
    split: BatchSplit
    group: Group
    journal: Journal
    watchers: Sequence[Watcher]
    stop: StopRequest
    pending: Verdict | None = None
    stopping: bool = False

    def run_steps(self) -> None:
        """Make the remaining updates."""
        config, state, group = self.config, self.state, self.group
        with lost_process_as_error():
            self.stepper = Stepper(config, state, self.split, group)
        self.meter = Meter(config, state, group)
        self.saver = Saver(self.run, config, self.store.identity(), state, group, partial(self._log, "saved"))
        self._log(
            "start",
            processes=group.size,
            micro_batch_size=self.split.micro_batch_size,
            accumulation=self.split.accumulation,
            parallel=config.parallel,
            device=state.device.type,
            matmul_gflops=self.meter.matmul_rate / 1e9,
            initial_weights=state.initial_weights,
            draws=state.draws_digest,
        )
        if group.rank == 0 and (warning := precision_warning(config.precision, state.device)):
            inform(warning)
        self.journal.show()
        self.check = ShardCheck(self.store, group.rank, group.size)
        with self.saver, self.check, contextlib.closing(self._batches()) as batches:
            while state.step < config.steps:
                with _step_in_errors(state.step + 1):
                    self._step(batches)
                group.pulse.step()
            group.pulse.leaving = True
            self.saver.wait()
        self._log("end", seconds=state.seconds, draws=state.draws_digest)

    def _batches(self) -> Generator[tuple[StepDraws, Tensor, Tensor], None, None]:
        """Yield draws, latents and labels of this process's share of the remaining steps, as `read_ahead` does."""
        share, state = self.split.share, self.state
        mine = slice(self.group.rank * share, (self.group.rank + 1) * share)
        order = SampleOrder(len(self.store), derive_seed(self.config.seed, "order"))
        steps = draw_steps(self.config, order, range(state.step, self.config.steps), state.draws_digest)
        return read_ahead(self.store, (draws.part(mine) for draws in steps), share, state.device)

    def _step(self, batches: Iterator[tuple[StepDraws, Tensor, Tensor]]) -> None:
        """Make one update; then log, save and look where it is time."""
        config, state = self.config, self.state
        before = time.perf_counter()
        draws, latents, labels = next(batches)
        self.meter.waited += time.perf_counter() - before
        outcome = self.stepper.differentiate(draws, latents, labels, self.stop)
        self._settle()
        self.check.raise_found()
        self.pending = self.stepper.apply(outcome)
        state.draws_digest = draws.digest
        if state.device.type == "cpu":
            # The verdict is there: a step can take so long that a request to stop must not wait for the next one.
            self._settle()
        self.journal.advance(state.step)
        self.meter.add(outcome)
        if state.step % config.log_every == 0 or self._last:
            self._settle()
            self._log("step", **self.meter.read())
        if state.step == config.steps:
            # Before the run counts as finished.
            self.check.wait()
        self._save()
        if self.stopping and state.step < config.steps:
            self.saver.wait()
            self._log("stopped")
            raise Stopped(
                f"Stopped at step {state.step} of {config.steps}; {step_folder(self.run, state.step)} is saved."
            )

    @property
    def _last(self) -> bool:
        """Whether no update follows in this session; `_settle` may change the answer."""
        return self.stopping or self.state.step == self.config.steps

    def _settle(self) -> None:
        """Read the verdict on the last update: move the averages, or count it as skipped."""
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
        """Log the processes and samples for which an update was skipped; NotFiniteError after too many in a row."""
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
            raise NotFiniteError(
                f"{what} That is update {self.state.skipped_in_a_row} in a row that is not finite; none of them was "
                "applied or saved. Lower the learning rate, or look for values in the latents that are not finite."
            )

    def _save(self) -> None:
        """Write what is due at this step, and show it to the watchers that are due."""
        config, step = self.config, self.state.step
        self.saver.check()
        snapshot = step % config.snapshot_every == 0 and bool(config.power_ema)
        watched = any(watcher.due(step) for watcher in self.watchers)
        checkpoint = watched or step % config.checkpoint_every == 0
        if not (checkpoint or snapshot or self._last):
            return
        self._settle()
        with self.group.pulse.other_work():
            # The first process may still write the last save; all wait for it here, where no limit of time holds.
            self.saver.wait()
            self.group.wait()
            self.saver.save(checkpoint or self._last, snapshot)
            if watched and not self.stopping:
                before = time.perf_counter()
                self.saver.wait()
                self.show_checkpoint()
                self.meter.pause(time.perf_counter() - before)

    def show_checkpoint(self) -> None:
        """Show the checkpoint of the present step to the watchers that are due; their errors are only logged."""
        step, device = self.state.step, self.state.device
        for watcher in self.watchers:
            if not watcher.due(step):
                continue
            try:
                with self.journal.hidden(), float32_products("float32"):
                    seen = watcher.look(step_folder(self.run, step), self.group)
                if seen:
                    self._log(**seen)
            except Stopped:
                raise
            except (Exception, SystemExit) as error:
                self._log("failed", error=f"{error or type(error).__name__}")
            if device.type == "cuda":
                # The memory of the look is no part of the training's peak.
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(device)

    def _log(self, event: str, **values: Any) -> None:
        self.journal.write(event, **{"step": self.state.step, **values})


@contextlib.contextmanager
def _step_in_errors(step: int) -> Iterator[None]:
    """Name the step in an error of a block."""
    try:
        with lost_process_as_error():
            yield
    except torch.OutOfMemoryError as error:
        raise JLTError(
            f"Step {step}: there is not enough memory ({error}). Take a smaller --micro-batch-size, "
            "--gradient-checkpointing, or --parallel fsdp with more processes."
        ) from error
    except (NotFiniteError, Stopped):
        raise
    except Exception as error:
        error.add_note(f"at step {step}")
        raise
