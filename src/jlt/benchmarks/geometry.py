"""The speed and memory of measuring a space, against a bare matrix product over the same tokens in the same run."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from jlt.benchmarks.rounds import time_in_turn
from jlt.config import FLUX2_IMAGENET256, LatentShape
from jlt.geometry.accumulate import BATCH_VALUES, measure_moments
from jlt.geometry.covariance import TokenCovariance
from jlt.patches import patch_tokens
from jlt.runtime.environment import default_device, measured_on, peak_memory, reset_peak_memory, seconds_of
from jlt.runtime.processes import SingleProcess

ROUNDS = 5
DISTINCT = 512
"""Random latents that exist; a larger store repeats them, so that nothing is read from a disk."""
IMAGENET = 1_281_167


class RandomLatents:
    """A store of any number of random latents."""

    def __init__(self, shape: LatentShape, count: int) -> None:
        self.shape, self._count = shape, count
        size = (min(DISTINCT, count), shape.channels, shape.height, shape.width)
        self._latents = torch.randn(size, generator=torch.Generator().manual_seed(0)).half()

    def __len__(self) -> int:
        return self._count

    def gather(self, indices: Int64[np.ndarray, " n"]) -> tuple[Float[Tensor, "n c h w"], Int64[Tensor, " n"]]:
        """Return latents and labels by number."""
        return self._latents[indices % len(self._latents)], torch.from_numpy(indices % self.shape.num_classes)

    def identity(self) -> dict[str, Any]:
        """Return an identity that names no data."""
        return {"source": "random", "count": self._count}


def benchmark_geometry(
    patch_sizes: Sequence[int], count: int, shape: LatentShape = FLUX2_IMAGENET256
) -> dict[str, Any]:
    """Time the token covariance of every patch size and a whole pass over `count` latents; forecast one of ImageNet."""
    device = default_device()
    store = RandomLatents(shape, count)
    batch = max(1, BATCH_VALUES // (shape.channels * shape.height * shape.width))
    latents = store.gather(np.arange(batch))[0].to(device)
    tokens = {str(patch_size): _against_product(latents, patch_size, device) for patch_size in patch_sizes}
    reset_peak_memory(device)
    rate = count / seconds_of(partial(measure_moments, store, patch_sizes, device, SingleProcess()), device)
    return {
        "shape": [shape.channels, shape.height, shape.width],
        "classes": shape.num_classes,
        "batch_size": batch,
        "tokens": tokens,
        "count": count,
        "latents_per_second": rate,
        "imagenet_minutes": IMAGENET / rate / 60,
        "peak_memory_mib": peak_memory(device) / 2**20,
        **measured_on(device),
    }


def _against_product(latents: Float[Tensor, "n c h w"], patch_size: int, device: str) -> dict[str, Any]:
    """Return latents per second of the covariance and of the product of the same tokens in float64, in turn."""
    matrix = patch_tokens(latents, patch_size).double()

    def update() -> float:
        covariance = TokenCovariance(latents.shape[1], patch_size, device)
        return seconds_of(partial(covariance.update, latents), device)

    ways = {"product": lambda: seconds_of(lambda: matrix.T @ matrix, device), "covariance": update}
    rounds = time_in_turn(ways, ROUNDS, f"token covariance, patch {patch_size}")
    return {
        "dimension": matrix.shape[1],
        "latents_per_second": len(latents) / rounds.seconds("covariance"),
        "product_latents_per_second": len(latents) / rounds.seconds("product"),
        "ratio": rounds.ratio("covariance", "product"),
        "ratio_by_round": rounds.ratios("covariance", "product"),
    }
