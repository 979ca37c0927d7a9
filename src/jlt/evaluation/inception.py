"""The Inception network of 2015 on which FID is defined, as a feature extractor.

It was trained in TensorFlow. Its weights are read from the file that pytorch-fid publishes, which torch-fidelity uses
too, and all that the original does in its own way is kept: how it resizes, how it pools, and a max pooling in its last
block that no paper describes. In all of this a published FID is at stake.

- Heusel et al. 2017, arXiv:1706.08500: FID on `pooled`.
- Salimans et al. 2016, arXiv:1606.03498: the inception score, on `logits`, which leave the bias out as theirs do.
- Nash et al. 2021, arXiv:2103.03841: sFID on `spatial`.
"""

from __future__ import annotations

import pickle
import re
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import convert_conv2d_weight_memory_format

from jlt.errors import JLTError
from jlt.evaluation.extractor import FeatureExtractor, Features, pieces
from jlt.evaluation.fetch import INCEPTION, cache_folder
from jlt.runtime.arithmetic import exact_arithmetic
from jlt.runtime.progress import inform
from jlt.storage.files import sha256_file
from jlt.storage.weights import weights_sha256

INPUT_SIZE = 299
NUM_CLASSES = 1008
SPATIAL_CHANNELS = 7
SPATIAL_SIZE = 17
COUNTER = "num_batches_tracked"
"""What batch normalisation counts while it trains; some files have it, and it changes nothing here."""


class Step(NamedTuple):
    """One convolution of a branch: its kernels side by side (rows, columns), of `outputs` channels each."""

    outputs: int
    kernels: tuple[tuple[int, int], ...]
    stride: int = 1


def square(outputs: int, size: int, stride: int = 1) -> Step:
    """Return a convolution with a square kernel."""
    return Step(outputs, ((size, size),), stride)


def row(outputs: int, size: int = 7) -> Step:
    """Return a convolution along rows."""
    return Step(outputs, ((1, size),))


def column(outputs: int, size: int = 7) -> Step:
    """Return a convolution along columns."""
    return Step(outputs, ((size, 1),))


def fork(outputs: int) -> Step:
    """Return a convolution along rows and one along columns, of the same input."""
    return Step(outputs, ((1, 3), (3, 1)))


class Convolution(nn.Module):
    """A convolution without bias, batch normalisation and ReLU."""

    def __init__(
        self, inputs: int, outputs: int, kernel: tuple[int, int], stride: int = 1, padding: tuple[int, int] = (0, 0)
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: Float[Tensor, "n i h w"]) -> Float[Tensor, "n o hh ww"]:
        """Return the activations; without normalisation where `fold` has put it into the weights."""
        x = self.conv(x)
        return torch.relu_(x if self.conv.bias is not None else self.bn(x))

    def fold(self) -> None:
        """Put the normalisation into weights and bias, computed in float64: for use alone, after loading."""
        conv, bn = self.conv, self.bn
        mean, variance = (bn.get_buffer(name).double() for name in ("running_mean", "running_var"))
        factor = bn.weight.double() / (variance + bn.eps).sqrt()
        weight, bias = conv.weight.double() * factor.view(-1, 1, 1, 1), bn.bias.double() - mean * factor
        conv.weight, conv.bias = (nn.Parameter(tensor.float(), requires_grad=False) for tensor in (weight, bias))


def average_pool(x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
    """Average 3x3 neighbours; at a border only those inside the image count."""
    return functional.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def max_pool(x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
    """Return the largest of 3x3 neighbours."""
    return functional.max_pool2d(x, 3, stride=1, padding=1)


def halving_pool(x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c hh ww"]:
    """Return the largest of each 3x3 neighbourhood, at every other position."""
    return functional.max_pool2d(x, 3, stride=2)


POOLS = {"average": average_pool, "max": max_pool, "halving": halving_pool}


class Mixed(nn.Module):
    """Branches of convolutions over one input, side by side in the order given, and at last a pooling.

    Step i of the branch `5x5` is the module `branch5x5_i`, a branch of one step is `branch5x5`, and the two kernels of
    a fork are `a` and `b`: so the public file has them. `pooled` channels are made of the pooling; 0 passes it on.
    """

    def __init__(self, inputs: int, pool: str, pooled: int, **branches: tuple[Step, ...]) -> None:
        super().__init__()
        self._pool = POOLS[pool]
        self._branches = []
        outputs = 0
        for name, steps in branches.items():
            width, stages = inputs, []
            for number, step in enumerate(steps, 1):
                base = f"{name}_{number}" if len(steps) > 1 else name
                names = [base] if len(step.kernels) == 1 else [f"{base}a", f"{base}b"]
                for module, kernel in zip(names, step.kernels, strict=True):
                    padding = (kernel[0] // 2, kernel[1] // 2) if step.stride == 1 else (0, 0)
                    self.add_module(module, Convolution(width, step.outputs, kernel, step.stride, padding))
                width = step.outputs * len(names)
                stages.append(names)
            self._branches.append(stages)
            outputs += width
        self.branch_pool = Convolution(inputs, pooled, (1, 1)) if pooled else None
        self.outputs = outputs + (pooled or inputs)

    def forward(self, x: Float[Tensor, "n i h w"]) -> Float[Tensor, "n o hh ww"]:
        """Return the channels of all branches and of the pooling."""
        found = []
        for stages in self._branches:
            y = x
            for names in stages:
                outputs = [self.get_submodule(name)(y) for name in names]
                y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)
            found.append(y)
        pooled = self._pool(x)
        found.append(self.branch_pool(pooled) if self.branch_pool else pooled)
        return torch.cat(found, 1)


def mixed_35(inputs: int, pooled: int) -> Mixed:
    """Return a block over 35x35 positions."""
    return Mixed(
        inputs,
        "average",
        pooled,
        branch1x1=(square(64, 1),),
        branch5x5=(square(48, 1), square(64, 5)),
        branch3x3dbl=(square(64, 1), square(96, 3), square(96, 3)),
    )


def mixed_17(inputs: int, c: int) -> Mixed:
    """Return a block over 17x17 positions, with c channels inside its branches."""
    return Mixed(
        inputs,
        "average",
        192,
        branch1x1=(square(192, 1),),
        branch7x7=(square(c, 1), row(c), column(192)),
        branch7x7dbl=(square(c, 1), column(c), row(c), column(c), row(192)),
    )


def mixed_8(inputs: int, pool: str) -> Mixed:
    """Return a block over 8x8 positions."""
    return Mixed(
        inputs,
        pool,
        192,
        branch1x1=(square(320, 1),),
        branch3x3=(square(384, 1), fork(384)),
        branch3x3dbl=(square(448, 1), square(384, 3), fork(384)),
    )


class InceptionNetwork(nn.Module):
    """The network from 299x299 pixels to pooled features and logits, with the names of the public file."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Convolution(3, 32, (3, 3), stride=2)
        self.Conv2d_2a_3x3 = Convolution(32, 32, (3, 3))
        self.Conv2d_2b_3x3 = Convolution(32, 64, (3, 3), padding=(1, 1))
        self.Conv2d_3b_1x1 = Convolution(64, 80, (1, 1))
        self.Conv2d_4a_3x3 = Convolution(80, 192, (3, 3))
        self.Mixed_5b = mixed_35(192, 32)
        self.Mixed_5c = mixed_35(self.Mixed_5b.outputs, 64)
        self.Mixed_5d = mixed_35(self.Mixed_5c.outputs, 64)
        self.Mixed_6a = Mixed(
            self.Mixed_5d.outputs,
            "halving",
            0,
            branch3x3=(square(384, 3, stride=2),),
            branch3x3dbl=(square(64, 1), square(96, 3), square(96, 3, stride=2)),
        )
        self.Mixed_6b = mixed_17(self.Mixed_6a.outputs, 128)
        self.Mixed_6c = mixed_17(self.Mixed_6b.outputs, 160)
        self.Mixed_6d = mixed_17(self.Mixed_6c.outputs, 160)
        self.Mixed_6e = mixed_17(self.Mixed_6d.outputs, 192)
        self.Mixed_7a = Mixed(
            self.Mixed_6e.outputs,
            "halving",
            0,
            branch3x3=(square(192, 1), square(320, 3, stride=2)),
            branch7x7x3=(square(192, 1), row(192), column(192), square(192, 3, stride=2)),
        )
        self.Mixed_7b = mixed_8(self.Mixed_7a.outputs, "average")
        self.Mixed_7c = mixed_8(self.Mixed_7b.outputs, "max")
        self.fc = nn.Linear(self.Mixed_7c.outputs, NUM_CLASSES)

    def forward(
        self, x: Float[Tensor, "n 3 299 299"]
    ) -> tuple[Float[Tensor, "n 2048"], Float[Tensor, "n 1008"], Float[Tensor, "n 2023"]]:
        """Return pooled features, logits without bias and spatial features of RGB images in [-1, 1)."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = halving_pool(x)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = halving_pool(x)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))
        # What ADM's evaluator reads is the graph's mixed_6/conv:0, the ReLU of the branch that comes first in this
        # block: the graph counts its blocks from `mixed`, which is Mixed_5b here. Channels are last in it.
        spatial = x[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))
        pooled = x.mean(dim=(2, 3))
        return pooled, functional.linear(pooled, self.fc.weight), spatial


def resize_like_tensorflow1(images: UInt8[Tensor, "n h w c"], size: int) -> Float[Tensor, "n size size c"]:
    """Return images of size x size, still 0..255, as `ResizeBilinear` of TensorFlow 1 makes them.

    Position i of the output lies at i * h / size of the input: the corners are not aligned, centres of pixels are not
    heeded, and nothing is smoothed where images shrink.
    """
    columns, next_columns, right = _neighbours(images.shape[2], size, images.device)
    # Integers of 8 bits are gathered, which is a quarter of the memory, and become floats then.
    pixels = images.index_select(2, columns).float()
    pixels.lerp_(images.index_select(2, next_columns).float(), right[:, None])
    rows, next_rows, down = _neighbours(images.shape[1], size, images.device)
    return pixels.index_select(1, rows).lerp_(pixels.index_select(1, next_rows), down[:, None, None])


def _neighbours(
    length: int, size: int, device: torch.device
) -> tuple[Int[Tensor, " size"], Int[Tensor, " size"], Float[Tensor, " size"]]:
    """Return, per position of the output, the two positions of the input around it and the weight of the second."""
    # In float32, as there: a position that comes out just below a whole number counts for the pixel before.
    places = torch.arange(size, dtype=torch.float32, device=device) * torch.tensor(length / size, dtype=torch.float32)
    first = places.long()
    return first, (first + 1).clamp(max=length - 1), places - first


class InceptionExtractor(FeatureExtractor):
    """An `InceptionNetwork` with weights, in float32 whatever autocast or TF32 say around it."""

    name = "inception"
    dimension = 2048
    num_classes = NUM_CLASSES
    spatial_dimension = SPATIAL_CHANNELS * SPATIAL_SIZE**2

    def __init__(self, network: InceptionNetwork) -> None:
        weights = network.state_dict()
        self._weights_sha256 = weights_sha256({name: weights[name] for name in weights if COUNTER not in name})
        self._network = network.eval().requires_grad_(False)
        for module in self._network.modules():
            if isinstance(module, Convolution):
                module.fold()
        convert_conv2d_weight_memory_format(self._network, torch.channels_last)

    @classmethod
    def load(cls, path: Path | str | None = None) -> InceptionExtractor:
        """Load a file of weights, .pth or .safetensors, or the fetched one; JLTError if it is not what it should be.

        A pickle runs no code.
        """
        file = cache_folder() / INCEPTION.file if path is None else Path(path).expanduser()
        if not file.is_file():
            raise JLTError(
                f"There is no file {file}: get the weights with `jlt fetch inception`, or name a file of them with "
                "--features-path FILE."
            )
        _check_hash(file)
        weights = _read_weights(file)
        # Without storage of its own, since random numbers for 24 million weights take longer than reading them.
        with torch.device("meta"):
            network = InceptionNetwork()
        expected = network.state_dict()
        _check_names(file, weights, expected)
        counters = {name: torch.zeros((), dtype=torch.int64) for name in expected if COUNTER in name}
        network.load_state_dict({**counters, **{name: tensor.float() for name, tensor in weights.items()}}, assign=True)
        return cls(network)

    @torch.no_grad()
    def __call__(self, images: UInt8[Tensor, "n h w 3"]) -> Features:
        """Return features, logits without bias and spatial features; images are resized as TensorFlow 1 does."""
        device = self._network.fc.weight.device
        with torch.autocast(device.type, enabled=False), exact_arithmetic(torch.get_num_threads()):
            found = [self._network(_network_input(piece.to(device))) for piece in pieces(images, device)]
        pooled, logits, spatial = (torch.cat(parts) for parts in zip(*found, strict=True))
        return Features(pooled, logits, spatial)

    def identity(self) -> dict[str, Any]:
        """Return the name, the sizes, the rule of resizing and the hash of the weights, however they were packed."""
        return {
            "name": self.name,
            "weights_sha256": self._weights_sha256,
            "input_size": INPUT_SIZE,
            "dimension": self.dimension,
            "resize": "bilinear as in TensorFlow 1",
        }

    def to(self, device: torch.device | str) -> InceptionExtractor:
        """Move the weights in place and return the extractor."""
        self._network.to(device)
        return self


def _network_input(images: UInt8[Tensor, "n h w 3"]) -> Float[Tensor, "n 3 299 299"]:
    # Channels stay last in memory, where convolutions are fastest.
    return resize_like_tensorflow1(images, INPUT_SIZE).sub_(128).div_(128).permute(0, 3, 1, 2)


def _check_hash(file: Path) -> None:
    """Raise JLTError if a file is not what the hash in its name says; say so if it is not the published one."""
    found = sha256_file(file)
    # PyTorch's hub names files so: a dash and the first digits of their SHA-256.
    named = re.search(r"-([0-9a-f]{8,64})\.pth$", file.name)
    if named and not found.startswith(named[1]):
        raise JLTError(
            f"{file} is damaged or another file: its SHA-256 begins with {found[: len(named[1])]}, not with the "
            f"{named[1]} of its name. `jlt fetch inception` gets it anew."
        )
    if not found.startswith(INCEPTION.sha256):
        inform(
            f"{file} is not the published file of weights (SHA-256 {INCEPTION.sha256}...): figures made with it cannot "
            "be compared with published FIDs."
        )


def _read_weights(file: Path) -> Mapping[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        content = (
            load_file(file)
            if file.suffix == ".safetensors"
            else torch.load(file, map_location="cpu", weights_only=True)
        )
    except pickle.UnpicklingError as error:
        raise JLTError(
            f"{file} is not a plain file of weights, and code in it is not run: name another one."
        ) from error
    # What is no file of weights can fail in any way at all.
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError, KeyError) as error:
        reason = textwrap.shorten(str(error), 200)
        raise JLTError(f"{file} could not be read as a file of weights ({reason}): name another one.") from error
    if not isinstance(content, Mapping) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise JLTError(f"{file} holds no names with tensors: name a file of weights.")
    return content


def _check_names(file: Path, weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise JLTError with the first names that are missing, left over or of another shape."""
    missing = [name for name in expected if name not in weights and COUNTER not in name]
    unexpected = [name for name in weights if name not in expected]
    misshapen = [
        f"{name} of {tuple(weights[name].shape)} instead of {tuple(expected[name].shape)}"
        for name in expected
        if name in weights and weights[name].shape != expected[name].shape
    ]
    kinds = {"missing": missing, "unexpected": unexpected, "misshapen": misshapen}
    if faults := [f"{len(names)} {kind}, such as {names[0]}" for kind, names in kinds.items() if names]:
        raise JLTError(f"{file} does not hold the weights of Inception as pytorch-fid names them: {'; '.join(faults)}.")
