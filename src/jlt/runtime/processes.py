"""Several processes that do one piece of work: started by torchrun (or anything that sets the same variables).

Only what they must agree on goes between them, over gloo, which needs no GPU. A process that dies breaks the
connection, so that the others fail at their next agreement instead of waiting for ever.
"""

from __future__ import annotations

import abc
import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from jlt.errors import JLTError
from jlt.runtime.signals import Stopped, stop_on_signal, until
from jlt.runtime.watchdog import Pulse, Watchdog
from jlt.storage.files import difference, format_difference

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup, Store

T = TypeVar("T")
# Processes may finish their shares far apart; a dead one is noticed by its connection, not by the clock.
PATIENCE = timedelta(days=7)


def rank() -> int:
    """Return the number of this process among all, 0 where it is the only one."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Return how many processes work together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """Return the number of this process among those of its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """Return how many of the processes run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def notice_dead_workers(pool: ProcessPoolExecutor) -> None:
    """Make sure that the death of any process of a pool is noticed: call it after the last submission.

    Python's pool wakes its watching thread for a submission before it starts a process for it, so that this process may
    be overlooked until the next submission or result.
    """
    pool.submit(int)


class Group(abc.ABC):
    """The processes that work together, as one of them sees them: its number `rank` of `size`.

    `pulse` is what this process tells of its own progress.
    """

    rank: int
    size: int

    def __init__(self) -> None:
        self.pulse = Pulse()
        self._sections = 0

    def begin(self) -> str:
        """Return a name for a section of the work, the same in all processes: they come to sections in one order."""
        self._sections += 1
        return f"section {self._sections}"

    @abc.abstractmethod
    def on_rank0(self, work: Callable[[], T]) -> T:
        """Run `work` in the first process and return its result in all; its error ends all, said once."""

    @abc.abstractmethod
    def gather(self, value: Any) -> list[Any]:
        """Return the values of all processes, by rank."""

    @abc.abstractmethod
    def reduce_to_rank0(self, value: T, merge: Callable[[T, T], object]) -> T | None:
        """Merge the values of all processes into that of the first, one at a time, by rank; None in the others."""

    @abc.abstractmethod
    def add(self, name: str, amount: int) -> int:
        """Add to a number that all processes share, and return what it is now."""

    @abc.abstractmethod
    def wait(self) -> None:
        """Return when every process has come here; JLTError if one has died."""


class SingleProcess(Group):
    """A process by itself."""

    rank = 0
    size = 1

    def __init__(self) -> None:
        super().__init__()
        self._counts: dict[str, int] = {}

    def on_rank0(self, work: Callable[[], T]) -> T:
        """Return the result of `work`."""
        return work()

    def gather(self, value: Any) -> list[Any]:
        """Return a list of the value."""
        return [value]

    def reduce_to_rank0(self, value: T, merge: Callable[[T, T], object]) -> T | None:  # noqa: ARG002
        """Return the value."""
        return value

    def add(self, name: str, amount: int) -> int:
        """Add to a number and return what it is now."""
        self._counts[name] = self._counts.get(name, 0) + amount
        return self._counts[name]

    def wait(self) -> None:
        """Return at once."""


class DistributedGroup(Group):
    """Several processes, connected."""

    def __init__(self, store: Store, rank: int, size: int) -> None:
        super().__init__()
        self._store, self.rank, self.size = store, rank, size
        self.control: ProcessGroup | None = None
        """The group of torch.distributed over which they agree; None is the one of all work."""

    def on_rank0(self, work: Callable[[], T]) -> T:
        """Run `work` in the first process and return its result in all; its error ends all, said once."""
        import torch.distributed as dist

        outcome: list[Any] = [None, ""]
        failure: Exception | None = None
        if self.rank == 0:
            try:
                outcome = [work(), ""]
            except Exception as error:
                failure, outcome = error, [None, "stopped" if isinstance(error, Stopped) else "failed"]
        with lost_process_as_error():
            dist.broadcast_object_list(outcome, src=0, group=self.control)
        if failure:
            raise failure
        if outcome[1] == "stopped":
            raise Stopped("Stopped on request.")
        if outcome[1] == "failed":
            raise SystemExit(1)
        return outcome[0]

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all processes, by rank."""
        import torch.distributed as dist

        values: list[Any] = [None] * self.size
        with lost_process_as_error():
            dist.all_gather_object(values, value, group=self.control)
        return values

    def reduce_to_rank0(self, value: T, merge: Callable[[T, T], object]) -> T | None:
        """Merge the values of all processes into that of the first, one at a time, by rank; None in the others."""
        import torch.distributed as dist

        with lost_process_as_error():
            if self.rank:
                dist.send_object_list([value], dst=0, group=self.control)
                return None
            for other in range(1, self.size):
                received: list[Any] = [None]
                dist.recv_object_list(received, src=other, group=self.control)
                merge(value, received[0])
        return value

    def add(self, name: str, amount: int) -> int:
        """Add to a number that all processes share, and return what it is now."""
        return self._store.add(f"jlt/{name}", amount)

    def wait(self) -> None:
        """Return when every process has come here; JLTError if one has died."""
        import torch.distributed as dist

        with lost_process_as_error():
            dist.barrier(group=self.control)


def rank0_value(value: T | None) -> T:
    """Return what `Group.fold` left with the first process; ValueError in the others."""
    if value is None:
        raise ValueError("what was folded is with the first process")
    return value


@contextlib.contextmanager
def lost_process_as_error() -> Iterator[None]:
    """Turn the broken connection that a process sees when another one has ended into a JLTError."""
    try:
        yield
    except RuntimeError as error:
        if not _is_broken_connection(error):
            raise
        raise JLTError(
            f"Another process of this work ended early, so process {rank()} ends too: see what that one said "
            f"({str(error).strip().splitlines()[0]})."
        ) from error


def _is_broken_connection(error: RuntimeError) -> bool:
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or any(word in str(error) for word in ("gloo", "NCCL", "onnection"))


@contextlib.contextmanager
def stop_together(group: Group) -> Iterator[Callable[[Iterable[T]], Iterator[T]]]:
    """Give a block `until_stopped`, which passes items on until any process was asked to stop, has failed or hangs.

    Every process reaches the end of the block, and all leave it alike: whole, stopped, or with the error of one.
    """
    error: Exception | None = None
    section = group.begin()
    with stop_on_signal() as asked:

        def until_stopped(items: Iterable[T]) -> Iterator[T]:
            # Whoever hangs in one item ends all; whoever is done waits for the others as long as it takes.
            with group.pulse.stepping():
                for item in until(items, lambda: group.add(section, int(bool(asked))) > 0):
                    group.pulse.step()
                    yield item

        try:
            yield until_stopped
        except Exception as raised:
            error = raised
            group.add(section, 1)
        with group.pulse.busy():
            # A request that came with the last item is one too.
            ends = group.gather((error is not None or bool(asked), _said(error)))
    failures = [f"Process {rank} failed ({said}), so all end." for rank, (_, said) in enumerate(ends) if said]
    if failures and (error is None or isinstance(error, Stopped)):
        raise JLTError(failures[0])
    if error is None and any(ended for ended, _ in ends):
        error = Stopped("Stopped on request.")
    if error is not None:
        # Whoever hears that another one has gone already, since all go, is not to make an alarm of it.
        group.pulse.leaving |= isinstance(error, Stopped)
        raise error


def require_same_arguments(group: Group, words: Mapping[str, Any], verb: str) -> None:
    """Raise a JLTError unless all processes mean the same work, told by JSON `words`; `verb` is what they would do."""
    all_words = group.gather(words)
    for rank, theirs in enumerate(all_words):
        if lines := difference(all_words[0], theirs):
            raise JLTError(f"Process {rank} would {verb} something else than process 0: {format_difference(lines)}.")


def _said(error: Exception | None) -> str | None:
    if error is None or isinstance(error, Stopped):
        return None
    return str(error) if isinstance(error, JLTError) else f"{type(error).__name__}: {error}"


@contextlib.contextmanager
def join_group(device: str = "cpu") -> Iterator[Group]:
    """Connect this process with those started beside it, for the duration of a block; alone, it is a group of one.

    They agree over gloo, and add up what lies on `device` over what is fast there. One that dies ends all, and so does
    one that hangs where steps are told of: in a training, and between the items of `stop_together`.
    """
    if world_size() == 1:
        yield SingleProcess()
        return
    import torch
    import torch.distributed as dist

    on_gpu = torch.device(device).type == "cuda"
    if on_gpu and local_world_size() > torch.cuda.device_count():
        raise JLTError(
            f"{local_world_size()} processes on this machine have {torch.cuda.device_count()} GPUs: start one for each."
        )
    store, number, size = next(iter(dist.rendezvous("env://")))
    store.set_timeout(PATIENCE)
    group = DistributedGroup(store, number, size)
    with Watchdog(store.clone(), number, size, group.pulse):
        kind = "nccl" if on_gpu else "gloo"
        own: dict[str, Any] = {"store": dist.PrefixStore(kind, store), "rank": number, "world_size": size}
        if on_gpu:
            torch.cuda.set_device(device)
            own["device_id"] = torch.device(device)
        # Whoever is missing is noticed by the heartbeat and not by the clock.
        dist.init_process_group(kind, timeout=PATIENCE, **own)
        if on_gpu:
            group.control = dist.new_group(backend="gloo", timeout=PATIENCE)
        yield group
        # Whoever leaves first would seem to have died.
        group.wait()
    # Not after an error: where a process is missing, taking the group down together may wait for it.
    dist.destroy_process_group()
