"""One network in several processes, by PyTorch's own engines: DDP keeps all of it in each, FSDP2 a shard.

The state is read and written as full tensors, so checkpoints do not depend on the engine.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from jlt.config import TrainConfig
from jlt.networks.transformer import Transformer
from jlt.runtime.processes import Group


def shard(network: Transformer, size: int) -> None:
    """Keep only this process's shard of each parameter, of `size` by FSDP; the modules gather them as they run."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    # The output is a view that no code writes into.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(next(network.parameters()).device.type, (size,))
    for block in network.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)


class Parallel:
    """A network's forward in this process, whose gradients become the mean over all processes.

    Call it within `accumulating` for every micro-batch of an update.
    """

    def __init__(self, network: Transformer, config: TrainConfig, group: Group) -> None:
        self.network = network
        network.checkpoint_blocks = config.gradient_checkpointing
        # Block by block, gradients are ready one after the other, and are exchanged while the rest is computed.
        units = network.blocks if group.size > 1 else [network]
        for module in units if config.compile else ():
            module.compile()
        self._bfloat16 = config.precision == "bfloat16"
        self._sharded = group.size > 1 and config.parallel == "fsdp"
        self._ddp: nn.parallel.DistributedDataParallel | None = None
        if group.size > 1 and not self._sharded:
            device = next(network.parameters()).device
            ids = [device.index] if device.type == "cuda" else None
            # The buffers are constant tables.
            self._ddp = nn.parallel.DistributedDataParallel(
                network, device_ids=ids, gradient_as_bucket_view=True, broadcast_buffers=False
            )

    def __call__(self, z: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """Return the network's output, in float32, computed in the run's precision."""
        with torch.autocast(z.device.type, torch.bfloat16, enabled=self._bfloat16):
            return (self._ddp or self.network)(z, t, labels).float()

    @contextlib.contextmanager
    def accumulating(self, more: bool) -> Iterator[None]:
        """Keep gradients in this process during a block, if more micro-batches of the update follow."""
        if self._sharded:
            self.network.set_requires_gradient_sync(not more)  # type: ignore[operator]
        with self._ddp.no_sync() if self._ddp and more else contextlib.nullcontext():
            yield

    def rehearse(self, micro_batch_size: int) -> None:
        """Make one pass on zeros and drop its gradients.

        DDP rebuilds its buckets after the first backward pass, and with them the order of summation. After a rehearsal,
        a new run and a resumed one sum in the same order.
        """
        config = self.network.config
        device = next(self.network.parameters()).device
        z = torch.zeros(micro_batch_size, config.channels, config.height, config.width, device=device)
        labels = torch.zeros(micro_batch_size, dtype=torch.int64, device=device)
        self(z, z.new_zeros(micro_batch_size), labels).sum().backward()
        self.network.zero_grad(set_to_none=True)


def full_tensor(tensor: Tensor) -> Tensor:
    """Return all of a tensor that may be sharded; every process has to call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_shard(tensor: Tensor) -> Tensor:
    """Return this process's shard of a tensor, which shares its memory; all of one that is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def copy_full(tensor: Tensor, values: Tensor) -> None:
    """Copy full values into a tensor that may be sharded."""
    if isinstance(tensor, DTensor):
        # Every process has the same values, so each takes its shard of its own copy.
        values = distribute_tensor(values.to(tensor.device), tensor.device_mesh, tensor.placements, src_data_rank=None)
    tensor.copy_(values)


def sum_over(tensor: Tensor, group: Group) -> Tensor:
    """Sum a tensor over all processes in place, without waiting for the device, and return it."""
    if group.size > 1:
        dist.all_reduce(tensor)
    return tensor
