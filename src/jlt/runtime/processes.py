"""Several processes that do one piece of work, started by torchrun or any launcher that sets the same variables.

They exchange only what they must agree on, over gloo, which needs no GPU. Gradients go through PyTorch's own engines.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import resource
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from multiprocessing.context import SpawnContext
from typing import TYPE_CHECKING, Any, TypeVar

from jlt.errors import JLTError, UsageError
from jlt.runtime.signals import Stopped, stop_on_signal, until
from jlt.runtime.watchdog import Pulse, Watchdog
from jlt.storage.files import difference, format_difference

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup, Store

T = TypeVar("T")
NO_TIMEOUT = timedelta(days=7)
"""Processes may finish their shares hours apart; the watchdog notices those that are gone."""
LAST_PORT = 65535
UNSET = "start several processes with torchrun, or unset the variable for a single one."


LAUNCHED = "JLT_LAUNCHED"
"""Environment variable of processes that `jlt --processes` started: the folder in which they record failures."""
LOST = 76
"""Exit code of such a process that ends because another one did."""


class LostProcessError(JLTError):
    """Another process of the work has ended."""


def rank() -> int:
    """Return the number of this process among all; 0 if it is the only one."""
    return _from_launcher("RANK", 0)


def world_size() -> int:
    """Return how many processes work together."""
    return _from_launcher("WORLD_SIZE", 1)


def local_rank() -> int:
    """Return the number of this process among those of its machine."""
    return _from_launcher("LOCAL_RANK", 0)


def local_world_size() -> int:
    """Return how many of the processes run on this machine."""
    return max(1, _from_launcher("LOCAL_WORLD_SIZE", 1))


def _from_launcher(name: str, default: int) -> int:
    text = os.environ.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdecimal()):
        raise UsageError(f"The environment variable {name} is {text!r} instead of a number: {UNSET}")
    return int(text)


def require_launcher() -> None:
    """Raise UsageError for variables of a launcher that do not fit together."""
    if rank() >= world_size():
        raise UsageError(f"RANK is {rank()} and WORLD_SIZE is {world_size()} in the environment: {UNSET}")
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if world_size() > 1 and missing:
        raise UsageError(f"WORLD_SIZE is {world_size()} in the environment, without {' and '.join(missing)}: {UNSET}")
    if _from_launcher("MASTER_PORT", 0) > LAST_PORT:
        raise UsageError(f"MASTER_PORT is {os.environ['MASTER_PORT']} in the environment, and no port: {UNSET}")


def prepare_process() -> None:
    """Prepare a program and all processes that it starts, before it imports torch.

    None of them looks for a module in the current folder. The threads of a computation wait without spinning, and as
    many files may be open as the system permits.
    """
    # A worker starts as `python -c`, which looks for every module in the current folder first, be it a data set.
    os.environ["PYTHONSAFEPATH"] = "1"
    # By default a thread that waits for others keeps its core busy, the core that one of those may need.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def spawn_context() -> SpawnContext:
    """Return the context in which all worker processes start; JLTError if the system has no semaphores for them."""
    prepare_process()
    context = multiprocessing.get_context("spawn")
    try:
        context.Lock()
    except OSError as error:
        raise JLTError(
            f"Worker processes need semaphores, which are files in /dev/shm ({error.strerror}): make it writable, "
            "or leave the workers out with --workers 0, where images are decoded."
        ) from error
    return context


def notice_dead_workers(pool: ProcessPoolExecutor) -> None:
    """Make a pool notice the death of any of its processes; call it after the last submission.

    Python's pool wakes its watching thread before it starts a process for a submission, so the thread overlooks that
    process until the next submission or result.
    """
    pool.submit(int)


class Group:
    """The processes that work together, as one of them sees them: its number `rank` of `size`. Here it is alone.

    `pulse` records this process's progress for the watchdog.
    """

    rank = 0
    size = 1

    def __init__(self) -> None:
        self.pulse = Pulse()
        self._counts: dict[str, int] = {}
        self._sections = 0

    def begin(self) -> str:
        """Return a name for a section of the work, the same in all processes: all reach the sections in one order."""
        self._sections += 1
        return f"section {self._sections}"

    def on_rank0(self, work: Callable[[], T]) -> T:
        """Run `work` in the first process and return its result in all; its error ends all, and is printed once."""
        return work()

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all processes, by rank."""
        return [value]

    def reduce_to_rank0(self, value: T, merge: Callable[[T, T], object]) -> T | None:  # noqa: ARG002
        """Merge the values of all processes into that of the first, one at a time, by rank; None in the others."""
        return value

    def add(self, name: str, amount: int) -> int:
        """Add to a number that all processes share, and return its new value."""
        self._counts[name] = self._counts.get(name, 0) + amount
        return self._counts[name]

    def wait(self) -> None:
        """Return when every process has called this; JLTError if one has died."""


class SingleProcess(Group):
    """A process by itself."""


class _DistributedGroup(Group):
    """Several processes, connected by gloo."""

    def __init__(self, store: Store, rank: int, size: int, control: ProcessGroup | None) -> None:
        """`control` is the gloo group over which they agree; None is the default group."""
        super().__init__()
        self._store, self.rank, self.size, self._control = store, rank, size, control

    def on_rank0(self, work: Callable[[], T]) -> T:
        import torch.distributed as dist

        # The result, and what the other processes raise instead.
        outcome: list[Any] = [None, None]
        failure: Exception | None = None
        if self.rank == 0:
            try:
                outcome[0] = work()
            except Exception as error:
                failure = error
                code = 2 if isinstance(error, UsageError) else 1
                outcome[1] = Stopped("Stopped on request.") if isinstance(error, Stopped) else SystemExit(code)
        with lost_process_as_error():
            dist.broadcast_object_list(outcome, src=0, group=self._control)
        if ending := failure or outcome[1]:
            raise ending
        return outcome[0]

    def gather(self, value: Any) -> list[Any]:
        import torch.distributed as dist

        values: list[Any] = [None] * self.size
        with lost_process_as_error():
            dist.all_gather_object(values, value, group=self._control)
        return values

    def reduce_to_rank0(self, value: T, merge: Callable[[T, T], object]) -> T | None:
        import torch.distributed as dist

        with lost_process_as_error():
            if self.rank:
                dist.send_object_list([value], dst=0, group=self._control)
                return None
            for other in range(1, self.size):
                received: list[Any] = [None]
                dist.recv_object_list(received, src=other, group=self._control)
                merge(value, received[0])
        return value

    def add(self, name: str, amount: int) -> int:
        return self._store.add(f"jlt/{name}", amount)

    def wait(self) -> None:
        self.gather(None)


def rank0_value(value: T | None) -> T:
    """Return what `Group.reduce_to_rank0` returned in the first process; ValueError in the others."""
    if value is None:
        raise ValueError("only the first process has the reduced value")
    return value


@contextlib.contextmanager
def lost_process_as_error() -> Iterator[None]:
    """Turn the broken connection that a process sees when another one has ended into a JLTError."""
    try:
        yield
    except RuntimeError as error:
        import torch.distributed as dist

        # gloo raises a plain RuntimeError, so only PyTorch's text tells a lost connection from other errors.
        if not (isinstance(error, dist.DistError) or any(part in str(error) for part in ("gloo", "NCCL", "onnection"))):
            raise
        raise LostProcessError(
            f"Another process of this work ended early, so process {rank()} ends too: see the error of that process "
            f"({str(error).strip().splitlines()[0]})."
        ) from error


@contextlib.contextmanager
def stop_together(group: Group) -> Iterator[Callable[[Iterable[T]], Iterator[T]]]:
    """Give a block `until_stopped`, which passes items on until any process receives a signal, fails or hangs.

    Every process reaches the end of the block, and all leave it alike: finished, stopped, or with the error of one.
    """
    error: Exception | None = None
    section = group.begin()
    with stop_on_signal() as stop:

        def until_stopped(items: Iterable[T]) -> Iterator[T]:
            with group.pulse.other_work():
                for item in until(items, lambda: group.add(section, int(bool(stop))) > 0):
                    group.pulse.step()
                    yield item

        try:
            yield until_stopped
        except Exception as raised:
            error = raised
            group.add(section, 1)
        with group.pulse.other_work():
            # A process that is done waits for the others as long as it takes. A signal during the last item counts.
            failure = None
            if error is not None and not isinstance(error, Stopped):
                failure = str(error) if isinstance(error, JLTError) else f"{type(error).__name__}: {error}"
            ends = group.gather((error is not None or bool(stop), failure))
    failures = [f"Process {rank} failed ({failure}), so all end." for rank, (_, failure) in enumerate(ends) if failure]
    if failures and (error is None or isinstance(error, Stopped)):
        raise JLTError(failures[0])
    if error is None and any(ended for ended, _ in ends):
        error = Stopped("Stopped on request.")
    if error is not None:
        # All leave now: a connection that breaks is no fault.
        group.pulse.leaving |= isinstance(error, Stopped)
        raise error


def require_same_arguments(group: Group, arguments: Mapping[str, Any], action: str) -> None:
    """Raise a JLTError unless all processes have the same JSON `arguments`; `action` goes into the message."""
    everywhere = group.gather(arguments)
    for rank, theirs in enumerate(everywhere):
        if differences := difference(everywhere[0], theirs):
            raise JLTError(
                f"Process {rank} would {action} something else than process 0: {format_difference(differences)}. "
                "Start all processes with the same arguments."
            )


@contextlib.contextmanager
def join_group(device: str = "cpu") -> Iterator[Group]:
    """Connect this process with the others of its launcher for the duration of a block; alone, it is a group of one.

    They agree over gloo, and sum tensors on `device` over its fastest backend. A process that dies ends all, and so
    does one that hangs in a step of a training or between the items of `stop_together`.
    """
    require_launcher()
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
    backend = "nccl" if on_gpu else "gloo"
    # NCCL keeps its own timeout: only the steps of a training use its group.
    settings: dict[str, Any] = {"device_id": torch.device(device)} if on_gpu else {"timeout": NO_TIMEOUT}
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group(backend, store=dist.PrefixStore(backend, store), rank=number, world_size=size, **settings)
    control = dist.new_group(backend="gloo", timeout=NO_TIMEOUT) if on_gpu else None
    group = _DistributedGroup(store, number, size, control)
    with Watchdog(number, size, group.pulse):
        yield group
        # A process that leaves early looks like one that died.
        group.wait()
    # Not after an error: taking the group down would wait for a process that is gone.
    dist.destroy_process_group()
