"""How a global batch is divided: among processes, and in each of them into micro-batches."""

from __future__ import annotations

from dataclasses import dataclass

from jlt.config import TrainConfig
from jlt.errors import JLTError


@dataclass(frozen=True)
class BatchSplit:
    """batch_size = micro_batch_size * accumulation * processes."""

    processes: int
    micro_batch_size: int
    accumulation: int

    @property
    def share(self) -> int:
        """Samples of one process in one update."""
        return self.micro_batch_size * self.accumulation


def split_batch(config: TrainConfig, processes: int) -> BatchSplit:
    """Return how the global batch is divided among processes; JLTError where the three numbers do not multiply up."""
    micro, accumulation = config.micro_batch_size, config.accumulation
    if not micro:
        micro = config.batch_size // (processes * (accumulation or 1))
    if not accumulation:
        accumulation = config.batch_size // (processes * micro) if micro else 0
    if micro * accumulation * processes != config.batch_size or not micro:
        samples = _words(config.micro_batch_size, "samples at a time")
        raise JLTError(
            f"A global batch of {config.batch_size} is not {samples} times "
            f"{_words(config.accumulation, 'micro-batches')} times {processes} processes: change --batch-size, "
            "--micro-batch-size, --accumulation or the number of processes so that they multiply up."
        )
    return BatchSplit(processes, micro, accumulation)


def _words(number: int, what: str) -> str:
    return f"{number} {what}" if number else f"a whole number of {what}"
