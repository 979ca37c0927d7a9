"""One pass over a latent store, by any number of processes, that collects the moments for all covariance estimates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from jlt.config import LatentShape
from jlt.errors import JLTError
from jlt.geometry.covariance import ClassMeans, LeadingSketch, StationaryCovariance, TokenCovariance
from jlt.runtime.processes import Group, stop_together
from jlt.runtime.progress import bar
from jlt.runtime.random_numbers import random_subset

BATCH_VALUES = 2**22
"""Values of a batch: 32 MB in float64."""
EXACT_DIMENSION = 2048
"""Whole latents of no more values have their covariance formed."""
SAMPLE = 4096
SAMPLE_BYTES = 2**28
"""The sample has at most so many latents, and no more than fit these bytes in float32."""


@runtime_checkable
class Latents(Protocol):
    """The part of a latent store that the analysis needs."""

    @property
    def shape(self) -> LatentShape:
        """The latents' shape and number of classes."""

    def __len__(self) -> int:
        """Return the number of latents."""

    def gather(self, indices: Int64[np.ndarray, " n"]) -> tuple[Float[Tensor, "n c h w"], Int64[Tensor, " n"]]:
        """Return latents and labels by number."""

    def identity(self) -> dict[str, Any]:
        """Return the identity of the store: its source, autoencoder and count."""


def sample_numbers(count: int, values: int) -> Int64[np.ndarray, " m"]:
    """Return the numbers of the sampled latents of a store with `values` values each; always the same."""
    return random_subset(count, max(2, min(SAMPLE, SAMPLE_BYTES // (4 * values))))


class Sample:
    """Latents of given numbers, in float32, taken from batches."""

    def __init__(self, numbers: Int64[np.ndarray, " m"], shape: tuple[int, int, int]) -> None:
        self._wanted = numbers
        # In one piece: many small ones among large buffers would fragment the memory.
        self._kept: Float[Tensor, "m c h w"] = torch.empty(len(numbers), *shape)
        self._found = torch.zeros(len(numbers), dtype=torch.bool)

    def update(self, first: int, latents: Float[Tensor, "n c h w"]) -> None:
        """Take the sampled latents of a batch of consecutive ones, of which the first has this number."""
        low, high = np.searchsorted(self._wanted, (first, first + len(latents)))
        self._kept[low:high] = latents[self._wanted[low:high] - first].float().cpu()
        self._found[low:high] = True

    def merge(self, other: Sample) -> None:
        """Add the latents of another sample with the same numbers."""
        self._kept[other._found] = other._kept[other._found]
        self._found |= other._found

    @property
    def latents(self) -> Float[Tensor, "m c h w"]:
        """All of them, in the order of numbers; ValueError while some are missing."""
        if not self._found.all():
            raise ValueError(f"{int((~self._found).sum())} of {len(self._found)} latents are missing")
        return self._kept


class Moments:
    """Sums over a store, whose size does not depend on its number of latents, and a sample of its latents."""

    def __init__(
        self, count: int, shape: LatentShape, patch_sizes: Sequence[int], device: torch.device | str = "cpu"
    ) -> None:
        size = (shape.channels, shape.height, shape.width)
        values = int(np.prod(size))
        self.tokens = {p: TokenCovariance(shape.channels, p, device) for p in dict.fromkeys(patch_sizes)}
        self.stationary = StationaryCovariance(*size, device)
        self.classes = ClassMeans(shape.num_classes, *size, device)
        self.sample = Sample(sample_numbers(count, values), size)
        self.whole: TokenCovariance | LeadingSketch = (
            TokenCovariance(values, 1, device) if values <= EXACT_DIMENSION else LeadingSketch(values, device=device)
        )

    def update(self, first: int, latents: Float[Tensor, "n c h w"], labels: Int64[Tensor, " n"]) -> None:
        """Add consecutive latents, of which the first has this number; JLTError for one that is not finite."""
        self.sample.update(first, latents)
        latents = latents.to(self.stationary.device)
        for tokens in self.tokens.values():
            tokens.update(latents, first)
        self.stationary.update(latents)
        self.classes.update(latents, labels)
        exact = isinstance(self.whole, TokenCovariance)
        self.whole.update(latents.flatten(1)[:, :, None, None] if exact else latents)

    def merge(self, other: Moments) -> None:
        """Add the moments of another process."""
        for patch_size, tokens in self.tokens.items():
            tokens.merge(other.tokens[patch_size])
        self.stationary.merge(other.stationary)
        self.classes.merge(other.classes)
        self.sample.merge(other.sample)
        self.whole.merge(other.whole)  # type: ignore[arg-type]


def measure_moments(
    store: Latents, patch_sizes: Sequence[int], device: torch.device | str, group: Group, batch_size: int = 0
) -> Moments | None:
    """Read a store once, shared among processes, and return its moments in the first of them, None in the others.

    JLTError in all processes for fewer than two latents, for one that is not finite and for a patch size that does not
    divide the grid; Stopped on request. The number of processes and the batch size change the last digits.
    """
    count, shape = len(store), store.shape
    if count < 2:
        raise JLTError(f"There are {count} latents: a covariance needs at least 2, a good one thousands.")
    size = batch_size or max(1, BATCH_VALUES // (shape.channels * shape.height * shape.width))
    ranges = [range(start, min(start + size, count)) for start in range(0, count, size)]
    mine = Moments(count, shape, patch_sizes, device)
    seen = group.begin()
    with stop_together(group) as until_stopped, bar("measuring the latents", count) as shown:
        for numbers in until_stopped(ranges[group.rank :: group.size]):
            latents, labels = store.gather(np.arange(numbers.start, numbers.stop))
            mine.update(numbers.start, latents, labels)
            shown.show(group.add(seen, len(numbers)))
    return group.reduce_to_rank0(mine, Moments.merge)
