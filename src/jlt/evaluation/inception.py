"""The Inception network of 2015 on which FID is defined, as a feature extractor.

It was trained in TensorFlow. Its weights are read from the file that pytorch-fid publishes, which torch-fidelity uses
too. The peculiarities of the original are kept, since published FIDs depend on them: its resizing, its pooling, and a
max pooling in the last block that no paper describes.

- Heusel et al. 2017, arXiv:1706.08500: FID on `pooled`.
- Salimans et al. 2016, arXiv:1606.03498: the inception score, on `logits`, without the bias as in their program.
- Nash et al. 2021, arXiv:2103.03841: sFID on `spatial`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import convert_conv2d_weight_memory_format

from jlt.errors import JLTError
from jlt.evaluation.extractor import FeatureExtractor, Features
from jlt.evaluation.fetch import INCEPTION, cache_folder
from jlt.runtime.progress import inform
from jlt.storage.files import sha256_file
from jlt.storage.weights import read_weights, require_same_tensors, weights_sha256

INPUT_SIZE = 299
NUM_CLASSES = 1008
SPATIAL_CHANNELS = 7
SPATIAL_SIZE = 17
COUNTER = "num_batches_tracked"
"""A counter of batch normalisation in training; some files contain it, and it has no effect here."""


class Step(NamedTuple):
    """One convolution of a branch: parallel kernels (rows, columns) of `outputs` channels each."""

    outputs: int
    kernels: tuple[tuple[int, int], ...]
    stride: int = 1


class Block(NamedTuple):
    """Parallel branches over one input, and a pooling that a 1x1 convolution maps to `pooled` channels (0: none)."""

    pool: str
    pooled: int
    branches: Mapping[str, tuple[Step, ...]]


ONE, THREE, FIVE = (((size, size),) for size in (1, 3, 5))
ROW, COLUMN, FORK = ((1, 7),), ((7, 1),), ((1, 3), (3, 1))
POOLS = {
    # At a border only the positions inside the image count.
    "average": nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False),
    "max": nn.MaxPool2d(3, stride=1, padding=1),
    "halving": nn.MaxPool2d(3, stride=2),
}


def _block_35(pooled: int) -> Block:
    """Return a block over 35x35 positions."""
    branches = {
        "1x1": (Step(64, ONE),),
        "5x5": (Step(48, ONE), Step(64, FIVE)),
        "3x3dbl": (Step(64, ONE), Step(96, THREE), Step(96, THREE)),
    }
    return Block("average", pooled, branches)


def _block_17(c: int) -> Block:
    """Return a block over 17x17 positions, with c channels inside its branches."""
    branches = {
        "1x1": (Step(192, ONE),),
        "7x7": (Step(c, ONE), Step(c, ROW), Step(192, COLUMN)),
        "7x7dbl": (Step(c, ONE), Step(c, COLUMN), Step(c, ROW), Step(c, COLUMN), Step(192, ROW)),
    }
    return Block("average", 192, branches)


def _block_8(pool: str) -> Block:
    """Return a block over 8x8 positions."""
    branches = {
        "1x1": (Step(320, ONE),),
        "3x3": (Step(384, ONE), Step(384, FORK)),
        "3x3dbl": (Step(448, ONE), Step(384, THREE), Step(384, FORK)),
    }
    return Block(pool, 192, branches)


BLOCKS = {
    "Mixed_5b": _block_35(32),
    "Mixed_5c": _block_35(64),
    "Mixed_5d": _block_35(64),
    "Mixed_6a": Block(
        "halving", 0, {"3x3": (Step(384, THREE, 2),), "3x3dbl": (Step(64, ONE), Step(96, THREE), Step(96, THREE, 2))}
    ),
    "Mixed_6b": _block_17(128),
    "Mixed_6c": _block_17(160),
    "Mixed_6d": _block_17(160),
    "Mixed_6e": _block_17(192),
    "Mixed_7a": Block(
        "halving",
        0,
        {
            "3x3": (Step(192, ONE), Step(320, THREE, 2)),
            "7x7x3": (Step(192, ONE), Step(192, ROW), Step(192, COLUMN), Step(192, THREE, 2)),
        },
    ),
    "Mixed_7b": _block_8("average"),
    "Mixed_7c": _block_8("max"),
}
SPATIAL_BLOCK = "Mixed_6d"
"""ADM's evaluator reads mixed_6/conv:0 of the graph, the first branch of this block; `mixed` is Mixed_5b there."""


class Convolution(nn.Module):
    """A convolution without bias, batch normalisation and ReLU."""

    def __init__(
        self, inputs: int, outputs: int, kernel: tuple[int, int], stride: int = 1, padding: tuple[int, int] = (0, 0)
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: Float[Tensor, "n i h w"]) -> Float[Tensor, "n o hh ww"]:
        """Return the activations; after `fold` the weights contain the normalisation."""
        x = self.conv(x)
        return torch.relu_(x if self.conv.bias is not None else self.bn(x))

    def fold(self) -> None:
        """Put the normalisation into weights and bias, computed in float64; call it once, after loading."""
        conv, bn = self.conv, self.bn
        mean, variance = (bn.get_buffer(name).double() for name in ("running_mean", "running_var"))
        factor = bn.weight.double() / (variance + bn.eps).sqrt()
        weight, bias = conv.weight.double() * factor.view(-1, 1, 1, 1), bn.bias.double() - mean * factor
        conv.weight, conv.bias = (nn.Parameter(tensor.float(), requires_grad=False) for tensor in (weight, bias))


class Mixed(nn.Module):
    """A `Block` with the module names of the public file.

    Step i of the branch `5x5` is `branch5x5_i`, the step of a branch of one step is `branch5x5`, and the two kernels of
    a fork are `a` and `b`.
    """

    def __init__(self, inputs: int, block: Block) -> None:
        super().__init__()
        self._pool = POOLS[block.pool]
        self._branches = []
        self.outputs = block.pooled or inputs
        for branch, steps in block.branches.items():
            width, stages = inputs, []
            for number, step in enumerate(steps, 1):
                name = f"branch{branch}_{number}" if len(steps) > 1 else f"branch{branch}"
                names = [name] if len(step.kernels) == 1 else [f"{name}a", f"{name}b"]
                for module, kernel in zip(names, step.kernels, strict=True):
                    padding = (kernel[0] // 2, kernel[1] // 2) if step.stride == 1 else (0, 0)
                    self.add_module(module, Convolution(width, step.outputs, kernel, step.stride, padding))
                width = step.outputs * len(names)
                stages.append(names)
            self._branches.append(stages)
            self.outputs += width
        self.branch_pool = Convolution(inputs, block.pooled, (1, 1)) if block.pooled else None

    def forward(self, x: Float[Tensor, "n i h w"]) -> Float[Tensor, "n o hh ww"]:
        """Return the channels of all branches and of the pooling."""
        results = []
        for stages in self._branches:
            y = x
            for names in stages:
                outputs = [self.get_submodule(name)(y) for name in names]
                y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)
            results.append(y)
        pooled = self._pool(x)
        results.append(self.branch_pool(pooled) if self.branch_pool else pooled)
        return torch.cat(results, 1)


class InceptionNetwork(nn.Module):
    """The network from 299x299 pixels to pooled features and logits, with the names of the public file."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Convolution(3, 32, (3, 3), stride=2)
        self.Conv2d_2a_3x3 = Convolution(32, 32, (3, 3))
        self.Conv2d_2b_3x3 = Convolution(32, 64, (3, 3), padding=(1, 1))
        self.Conv2d_3b_1x1 = Convolution(64, 80, (1, 1))
        self.Conv2d_4a_3x3 = Convolution(80, 192, (3, 3))
        width = 192
        for name, block in BLOCKS.items():
            mixed = Mixed(width, block)
            self.add_module(name, mixed)
            width = mixed.outputs
        self.fc = nn.Linear(width, NUM_CLASSES)

    def forward(
        self, x: Float[Tensor, "n 3 299 299"]
    ) -> tuple[Float[Tensor, "n 2048"], Float[Tensor, "n 1008"], Float[Tensor, "n 2023"]]:
        """Return pooled features, logits without bias and spatial features of RGB images in [-1, 1)."""
        halve = POOLS["halving"]
        x = halve(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))))
        x = halve(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)))
        for name in BLOCKS:
            x = self.get_submodule(name)(x)
            if name == SPATIAL_BLOCK:
                # In the graph the channels are last.
                spatial = x[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        pooled = x.mean(dim=(2, 3))
        return pooled, functional.linear(pooled, self.fc.weight), spatial


def resize_like_tensorflow1(images: UInt8[Tensor, "n h w c"], size: int) -> Float[Tensor, "n size size c"]:
    """Return images of size x size, still 0..255, as `ResizeBilinear` of TensorFlow 1 computes them.

    Position i of the output is position i * h / size of the input: corners are not aligned, pixel centres are ignored,
    and shrinking does not smooth.
    """
    columns, next_columns, right = _neighbours(images.shape[2], size, images.device)
    # Gathered as 8-bit integers, in a quarter of the memory, and then converted.
    pixels = images.index_select(2, columns).float()
    pixels.lerp_(images.index_select(2, next_columns).float(), right[:, None])
    rows, next_rows, down = _neighbours(images.shape[1], size, images.device)
    return pixels.index_select(1, rows).lerp_(pixels.index_select(1, next_rows), down[:, None, None])


def _neighbours(
    length: int, size: int, device: torch.device
) -> tuple[Int[Tensor, " size"], Int[Tensor, " size"], Float[Tensor, " size"]]:
    """Return, per position of the output, the two positions of the input around it and the weight of the second."""
    # In float32 as in TensorFlow: a position that rounds to just below a whole number belongs to the pixel before.
    places = torch.arange(size, dtype=torch.float32, device=device) * torch.tensor(length / size, dtype=torch.float32)
    first = places.long()
    return first, (first + 1).clamp(max=length - 1), places - first


class InceptionExtractor(FeatureExtractor):
    """An `InceptionNetwork` with weights, always in float32."""

    name = "inception"
    input_size = INPUT_SIZE
    dimension = 2048
    num_classes = NUM_CLASSES
    spatial_dimension = SPATIAL_CHANNELS * SPATIAL_SIZE**2
    resize = "bilinear as in TensorFlow 1"

    def __init__(self, network: InceptionNetwork) -> None:
        weights = network.state_dict()
        # Of the weights in the file, before they are folded.
        self._weights_sha256 = weights_sha256({name: weights[name] for name in weights if COUNTER not in name})
        super().__init__(network)
        for module in self._network.modules():
            if isinstance(module, Convolution):
                module.fold()
        convert_conv2d_weight_memory_format(self._network, torch.channels_last)

    @classmethod
    def load(cls, path: Path | str | None = None) -> InceptionExtractor:
        """Load a file of weights, .pth or .safetensors, or the downloaded one; JLTError if it is not a valid one.

        Pickled code does not run.
        """
        file = cache_folder() / INCEPTION.file if path is None else Path(path).expanduser()
        if not file.is_file():
            raise JLTError(
                f"The file {file} does not exist: download the weights with `jlt fetch inception`, or name their file "
                "with --features-path FILE."
            )
        _check_hash(file)
        weights = read_weights(file)
        # On the meta device, since random initial values for 24 million weights take longer than reading them.
        with torch.device("meta"):
            network = InceptionNetwork()
        expected = network.state_dict()
        compared = {name: tensor for name, tensor in expected.items() if COUNTER not in name or name in weights}
        require_same_tensors(file, weights, compared, "Inception as pytorch-fid names them")
        counters = {name: torch.zeros((), dtype=torch.int64) for name in expected if COUNTER in name}
        network.load_state_dict({**counters, **{name: tensor.float() for name, tensor in weights.items()}}, assign=True)
        return cls(network)

    @torch.no_grad()
    def __call__(self, images: UInt8[Tensor, "n h w 3"]) -> Features:
        """Return features, logits without bias and spatial features; images are resized as TensorFlow 1 does."""

        def outputs(piece: UInt8[Tensor, "_ h w 3"]) -> tuple[Tensor, ...]:
            # Channels stay last in memory, where convolutions are fastest.
            return self._network(resize_like_tensorflow1(piece, INPUT_SIZE).sub_(128).div_(128).permute(0, 3, 1, 2))

        return self._apply_exactly(outputs, images)


def _check_hash(file: Path) -> None:
    """Raise JLTError if a file's hash is not the one in its name; print a line if it is not the published file."""
    found = sha256_file(file)
    # PyTorch's hub appends a dash and the first digits of the SHA-256 to a file's name.
    named = re.search(r"-([0-9a-f]{8,64})\.pth$", file.name)
    if named and not found.startswith(named[1]):
        raise JLTError(
            f"{file} is damaged or another file: its SHA-256 begins with {found[: len(named[1])]}, not with the "
            f"{named[1]} of its name. `jlt fetch inception` downloads it again."
        )
    if not found.startswith(INCEPTION.sha256):
        inform(
            f"{file} is not the published file of weights (SHA-256 {INCEPTION.sha256}...): do not compare its results "
            "with published FIDs."
        )
