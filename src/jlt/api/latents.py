"""A latent store as a data set of PyTorch: `jlt.open_latents`."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.utils.data import Dataset

from jlt.config import LatentShape
from jlt.errors import JLTError
from jlt.latents.loader import SampleOrder, read_ahead
from jlt.latents.store import LatentStore


def open_latents(folder: str | os.PathLike[str]) -> LatentDataset:
    """Open the latent store in a folder; JLTError if it is unfinished or damaged."""
    return LatentDataset(Path(folder))


class LatentDataset(Dataset[tuple[Tensor, int]]):
    """Normalised latents and their labels; item i is a float32 latent (c, h, w) and its class number.

    It may be handed to a `torch.utils.data.DataLoader` with any number of workers, each of which opens the store
    itself. `batches` is the loader of this project's own training.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._store, self._process = LatentStore.open(folder), os.getpid()

    @property
    def store(self) -> LatentStore:
        """The store itself, opened in this process."""
        # Neither the threads that read nor the positions of files survive a fork.
        if self._process != os.getpid():
            self._store, self._process = LatentStore.open(self.folder), os.getpid()
        return self._store

    def __reduce__(self) -> tuple[type[LatentDataset], tuple[Path]]:
        return LatentDataset, (self.folder,)

    def __len__(self) -> int:
        return len(self._store)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.__getitems__([range(len(self))[operator.index(index)]])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, int]]:
        """Return several items by one reading, as a DataLoader requests them; IndexError for one out of range."""
        latents, labels = self.store.gather(np.asarray(indices, dtype=np.int64))
        return list(zip(latents.float(), labels.tolist(), strict=True))

    def batches(
        self,
        batch_size: int,
        seed: int | None = None,
        *,
        epochs: int | None = 1,
        flips: bool = False,
        device: torch.device | str = "cpu",
    ) -> Iterator[tuple[Float[Tensor, "n c h w"], Int64[Tensor, " n"]]]:
        """Yield latents, in float32, and class numbers, on a device; the next batch is read while this one is used.

        With a `seed` the order is that of a training with this seed: every latent once in each epoch, and batches
        continue across epochs. Without one it is the order of the store. `epochs` None is endless; otherwise the last
        batch may be smaller. With `flips`, half of the latents are those of mirrored images, chosen by the seed.

        Raises JLTError for a batch size or a number of epochs below 1, a seed outside 0..2^64 - 1, flips without a
        seed, flips that are not stored and a file that cannot be read.
        """
        if batch_size < 1 or (epochs is not None and epochs < 1):
            raise JLTError(f"batch_size and epochs must be 1 or more, not {batch_size} and {epochs}.")
        if seed is not None and not 0 <= seed < 2**64:
            raise JLTError(f"The seed of an order must be from 0 to 2^64 - 1, not {seed}.")
        if flips and seed is None:
            raise JLTError("Mirrored latents are chosen by a seed: give one, or leave out flips.")
        if flips and not self.store.manifest.flips:
            raise JLTError(f"{self.folder} holds no mirrored latents: encode with flips, or leave out flips.")
        # No buffer larger than what is read.
        size = batch_size if epochs is None else min(batch_size, epochs * len(self))
        return self._read(self._requests(size, seed, epochs, flips), size, device)

    def _read(
        self, requests: Iterator[_Request], batch_size: int, device: torch.device | str
    ) -> Iterator[tuple[Float[Tensor, "n c h w"], Int64[Tensor, " n"]]]:
        # On a CPU the latents are in a buffer that the next batch overwrites.
        for _, latents, labels in read_ahead(self.store, requests, batch_size, device):
            yield latents.to(torch.float32, copy=True), labels.to(device)

    def _requests(self, batch_size: int, seed: int | None, epochs: int | None, flips: bool) -> Iterator[_Request]:
        size, start = len(self), 0
        order = None if seed is None else SampleOrder(size, seed)
        while epochs is None or start < epochs * size:
            count = batch_size if epochs is None else min(batch_size, epochs * size - start)
            indices = np.arange(start, start + count) % size if order is None else order.indices(start, count)
            mirrored = order.flips(start, count) if order is not None and flips else np.zeros(count, dtype=bool)
            yield _Request(indices, mirrored)
            start += count

    @property
    def shape(self) -> LatentShape:
        """The shape of a latent, and the number of classes."""
        return self._store.shape

    @property
    def classes(self) -> list[str]:
        """The names of the classes."""
        return list(self._store.class_names)

    @property
    def labels(self) -> Int64[Tensor, " n"]:
        """The class numbers of all latents."""
        return torch.from_numpy(self._store.labels.copy())

    @property
    def autoencoder(self) -> str:
        """The name of the autoencoder that made the latents; `store.manifest` holds all other facts."""
        return str(self._store.manifest.autoencoder["name"])

    def __repr__(self) -> str:
        size = f"{self.shape.channels}x{self.shape.height}x{self.shape.width}"
        return f"<{len(self):,} latents of {size} by {self.autoencoder}, {self.shape.num_classes} classes>"


@dataclass(frozen=True)
class _Request:
    """Which latents a batch holds, and which of them are mirrored."""

    indices: Int64[np.ndarray, " n"]
    flips: Bool[np.ndarray, " n"]
