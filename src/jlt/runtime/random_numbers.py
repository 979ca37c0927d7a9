"""Random numbers as pure functions of a seed, a purpose, and a step, sample or image.

Nothing depends on how many numbers were drawn before, so every process and every restart draws the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor


def derive_seed(seed: int, purpose: str, *indices: int) -> int:
    """Return a 63-bit seed for one purpose and place; different arguments give unrelated seeds."""
    key = f"{seed}/{purpose}/{'/'.join(map(str, indices))}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1


def generator(seed: int, purpose: str, *indices: int) -> torch.Generator:
    """Return a fresh CPU generator for one purpose and place."""
    return torch.Generator().manual_seed(derive_seed(seed, purpose, *indices))


def normal_per_sample(
    seeds: Sequence[int], shape: Sequence[int], device: torch.device | str = "cpu"
) -> Float[Tensor, "n *shape"]:
    """Return standard normal float32 noise, row i a function of seeds[i], the shape and the kind of device."""
    noise = torch.empty(len(seeds), *shape, device=device)
    stream = torch.Generator(device=device)
    for row, seed in zip(noise.unbind(0), seeds, strict=True):
        row.normal_(generator=stream.manual_seed(seed))
    return noise


def random_subset(count: int, most: int) -> Int64[np.ndarray, " m"]:
    """Return the indices of at most `most` of `count` images, ascending: a fixed random choice.

    Equal distances would miss classes where labels repeat, as in i mod K.
    """
    if count <= most:
        return np.arange(count)
    return np.sort(np.random.RandomState(2020).permutation(count)[:most])
