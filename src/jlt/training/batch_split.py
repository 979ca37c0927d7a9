"""The split of the global batch: batch_size = micro_batch_size * accumulation * processes."""

from __future__ import annotations

from dataclasses import dataclass

from jlt.config import TrainConfig
from jlt.errors import JLTError


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
        raise JLTError(f"A batch needs at least one process, not {processes}.")
    batch, micro, accumulation = config.batch_size, config.micro_batch_size, config.accumulation
    if batch % processes:
        raise JLTError(
            f"batch_size {batch} cannot be shared equally among {processes} processes: "
            f"take {_multiples(batch, processes)}."
        )
    share = batch // processes
    if micro and accumulation and micro * accumulation != share:
        pairs = " or ".join(f"{near} and {share // near}" for near in _nearest_divisors(share, micro))
        raise JLTError(
            f"micro_batch_size {micro} * accumulation {accumulation} * processes {processes} is "
            f"{micro * accumulation * processes}, and batch_size is {batch}: leave micro_batch_size or accumulation at "
            f"0, or take {pairs}."
        )
    if not micro:
        micro = _quotient("accumulation", accumulation or 1, share)
    return BatchSplit(micro, _quotient("micro_batch_size", micro, share))


def _quotient(name: str, divisor: int, share: int) -> int:
    """Return share / divisor; JLTError if it is not a whole number."""
    if share % divisor:
        near = " or ".join(map(str, _nearest_divisors(share, divisor)))
        raise JLTError(
            f"{name} {divisor} does not divide the {share} samples that each process has of a batch: "
            f"take {name} {near}."
        )
    return share // divisor


def _nearest_divisors(share: int, near: int) -> list[int]:
    """Return the divisors of a share that are nearest to a number, at most one on either side."""
    divisors = [n for n in range(1, share + 1) if share % n == 0]
    return sorted({*[n for n in divisors if n <= near][-1:], *[n for n in divisors if n >= near][:1]})


def _multiples(value: int, of: int) -> str:
    """Return the nearest multiples below and above, for a message."""
    below, above = value // of * of, -(-value // of) * of
    return f"batch_size {below} or {above}" if below else f"batch_size {above}"
