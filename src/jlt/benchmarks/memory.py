"""Memory of the network's forward and backward pass, counted on tensors without data.

The real network runs on PyTorch's fake tensors, whose operations make storages of the right sizes and compute nothing.
What autograd saves is what is alive when the forward pass is over; peaks are found by watching every storage come and
go. The count is exact for PyTorch's operations and does not see what a kernel takes for itself while it runs. Attention
is counted as a CPU's flash kernel saves it, which is what a GPU's saves: queries, keys, values, result and log-sums.

What is saved is affine in the number of images and of blocks. A peak is the largest of several such functions, one for
each moment at which it may fall, so it is followed along a line for few images and along one for many.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from jlt.config import NetworkConfig
from jlt.networks.normalization import saving_as_on_a_gpu
from jlt.networks.transformer import Transformer

FEW_IMAGES, MANY_IMAGES = 2, 256
"""Not one image: some rearrangements are then views that are copies otherwise."""
COUNTED_BLOCKS = 1


@dataclass(frozen=True)
class PassMemory:
    """Bytes of one forward and backward pass, without weights, their gradients, and the latents that come in."""

    saved: int
    """Alive between the two passes: what autograd saved, the output among it."""
    forward_peak: int
    backward_peak: int

    def combine(self, other: PassMemory, rule: Callable[[int, int], int]) -> PassMemory:
        """Return what a rule makes of each pair of figures."""
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return PassMemory(*(rule(ours, theirs) for ours, theirs in pairs))


@dataclass(frozen=True)
class Line:
    """Memory that is affine in the images that go through the network at a time."""

    per_image: PassMemory
    per_pass: PassMemory

    def at(self, images: int) -> PassMemory:
        """Return the memory for a number of images."""
        return self.per_pass.combine(self.per_image, lambda fixed, each: fixed + images * each)


@dataclass(frozen=True)
class PassModel:
    """Memory of the passes as a function of the images that go through the network at a time."""

    few: Line
    many: Line

    @property
    def saved_per_image(self) -> int:
        """Bytes saved for each image."""
        return self.few.per_image.saved

    @property
    def saved_per_pass(self) -> int:
        """Bytes saved whatever the images: bfloat16 copies of weights under autocast, tables of positions."""
        return self.few.per_pass.saved

    def at(self, images: int) -> PassMemory:
        """Return the memory for a number of images."""
        return self.few.at(images).combine(self.many.at(images), max)


@functools.cache
def measure_passes(config: NetworkConfig, bfloat16: bool, checkpoint_blocks: bool, gpu: bool) -> PassModel:
    """Return the memory of a network's passes, eager, counted on networks with its widths and fewer blocks.

    `bfloat16` is autocast, `checkpoint_blocks` recomputes each block in the backward pass, and `gpu` counts RMS
    normalisation as a GPU's fused kernel saves it, where a CPU's own is counted otherwise.
    """

    def measured(images: int) -> PassMemory:
        shallow = min(config.depth, config.context_start + COUNTED_BLOCKS)
        depths = [shallow] if shallow == config.depth else [shallow, shallow + 1]
        found = [
            simulate_passes(dataclasses.replace(config, depth=depth), images, bfloat16, checkpoint_blocks, gpu)
            for depth in depths
        ]
        more = config.depth - shallow
        return found[0].combine(found[-1], lambda first, second: first + more * (second - first))

    def line(images: int) -> Line:
        here, next_to_it = measured(images), measured(images + 1)
        each = here.combine(next_to_it, lambda first, second: second - first)
        return Line(each, here.combine(each, lambda total, slope: total - images * slope))

    return PassModel(line(FEW_IMAGES), line(MANY_IMAGES))


def simulate_passes(
    config: NetworkConfig, images: int, bfloat16: bool, checkpoint_blocks: bool, gpu: bool
) -> PassMemory:
    """Return the memory of one forward and backward pass that adds to gradients which are there already."""
    saving = saving_as_on_a_gpu() if gpu else contextlib.nullcontext()
    with FakeTensorMode(), saving:
        network = Transformer(config)
        network.checkpoint_blocks = checkpoint_blocks
        for parameter in network.parameters():
            parameter.grad = torch.zeros_like(parameter)
        z = torch.randn(images, config.channels, config.height, config.width)
        t, labels = torch.rand(images), torch.zeros(images, dtype=torch.long)
        held = [*network.parameters(), *(p.grad for p in network.parameters()), *network.buffers(), z, t, labels]
        with _StorageWatch(held) as watch:
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                output = network(z, t, labels)
            saved, forward_peak = watch.alive, watch.peak
            watch.peak = watch.alive
            (output.float() - z).square().mean().backward()
        return PassMemory(saved, forward_peak, watch.peak)


class _StorageWatch(TorchDispatchMode):
    """Bytes of the storages that operations make: those alive now, and the most that were alive at once."""

    def __init__(self, held: Iterable[Tensor | None]) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._held = {tensor.untyped_storage()._cdata: tensor for tensor in held if tensor is not None}
        self._made: dict[int, tuple[int, weakref.ref[Any]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._held or key in self._made:
            return
        self._made[key] = storage.nbytes(), weakref.ref(storage, lambda _: self._forget(key))
        self.alive += storage.nbytes()
        self.peak = max(self.peak, self.alive)

    def _forget(self, key: int) -> None:
        self.alive -= self._made.pop(key)[0]
