"""A checkpoint of the JLT authors' program or of JiT's: its parts, its settings, and what it leaves open."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from jlt.config import NetworkConfig
from jlt.errors import JLTError, UsageError, unknown_name
from jlt.images.sharded import read_class_names
from jlt.interop.authors import holds_fixed_positions, import_authors_weights, read_config
from jlt.interop.import_config import ImportConfig
from jlt.interop.importing import (
    IMPORTED,
    LARGEST_SIDE,
    MOST_UPDATES,
    Imported,
    imported_latents,
    require_finite,
    require_moderate,
)
from jlt.interop.settings import Arguments, is_number, read_prediction, require_plain_order, shown, train_config
from jlt.interop.torch_file import read_torch_file, require_tensors
from jlt.latents.adoption import USUAL, adopted_identity
from jlt.runtime.progress import inform
from jlt.sampling.labels import readable_names
from jlt.storage.files import sha256_file

STATES = ("model", "model_ema1", "model_ema2")
AVERAGES = {"model_ema1": ("ema_decay1", 0.9999), "model_ema2": ("ema_decay2", 0.9996)}
"""The averages of a file, with the names and published values of their decays."""
VAE_TYPES = {"flux2": "flux2", "identity": "pixels"}
"""Autoencoders by their names in the authors' program."""
MOST_BLOCKS = 10_000


def read_authors_file(path: Path, source: str, options: ImportConfig) -> Imported:
    """Read a checkpoint of the JLT authors' program or of JiT's; `source` is how the user named it.

    Raises JLTError for a file of another kind or architecture, and for one whose settings have no meaning here;
    UsageError for options that contradict it.
    """
    if path.is_dir():
        raise JLTError(f"{path} is no folder of `jlt export`: name one, or a file such as checkpoint-last.pth.")
    content = read_torch_file(path)
    states = {name: _plain_names(require_tensors(path, name, content[name])) for name in STATES if name in content}
    if not states:
        raise JLTError(f"{path} holds none of {', '.join(STATES)}: it is no checkpoint of JLT's authors or of JiT.")
    try:
        arguments = Arguments(content.get("args"))
        require_plain_order(arguments)
        prediction = read_prediction(arguments, options.prediction)
        network, identity, resolution = _read_network(states, arguments, options)
        updates, counted = _updates(content)
        decays = {name: arguments.number(*AVERAGES[name]) for name in STATES[1:] if name in states}
        config = train_config(arguments, prediction, network, tuple(decays.values()), updates)
        class_names = _class_names(network.num_classes, options.class_names)
    except UsageError:
        raise
    except JLTError as error:
        raise JLTError(f"{path} cannot be imported: {error}") from error
    for name, weights in states.items():
        require_finite(path, ((f"{key} of {name}", weight) for key, weight in weights.items()))
    files = {"network": next(iter(states)), **{f"ema_{decay!r}": name for name, decay in decays.items()}}
    sha256 = sha256_file(path)
    facts = {
        "source": source,
        "sha256": sha256,
        "epoch": _count(content.get("epoch")),
        "step_counts": counted,
        "patch_embedding": "x_embedder.proj1 and x_embedder.proj2" if network.bottleneck_size else "x_embedder.proj",
        "network_from": files["network"],
        "assumed": arguments.assumed,
        "not_reproduced": arguments.used_otherwise,
    }
    latents = imported_latents(identity, IMPORTED, sha256, resolution, class_names)
    converted = Conversions({file: states[name] for file, name in files.items()}, network)
    return Imported(config, latents, converted, updates, facts)


class Conversions(Mapping[str, Mapping[str, Tensor]]):
    """Files of weights in this program's layout and float32, converted when they are read, so one at a time."""

    def __init__(self, files: Mapping[str, Mapping[str, Tensor]], network: NetworkConfig) -> None:
        self.files, self.network = files, network

    def __len__(self) -> int:
        return len(self.files)

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __getitem__(self, name: str) -> Mapping[str, Tensor]:
        weights = {key: weight.float() for key, weight in self.files[name].items()}
        state = import_authors_weights(weights, self.network)
        # Tensors that share memory cannot be written as they are.
        users = Counter(tensor.untyped_storage().data_ptr() for tensor in state.values())
        return {
            key: tensor.clone() if users[tensor.untyped_storage().data_ptr()] > 1 else tensor
            for key, tensor in state.items()
        }


def _plain_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("net."): weight for name, weight in weights.items()}


def _read_network(
    states: Mapping[str, Mapping[str, Tensor]], arguments: Arguments, options: ImportConfig
) -> tuple[NetworkConfig, dict[str, Any], int]:
    """Return the network, the identity of its autoencoder, and the side of its images in pixels."""
    first = next(iter(states.values()))
    name = options.autoencoder or _autoencoder_name(first, arguments)
    if name not in USUAL:
        raise unknown_name("autoencoder", name, USUAL)
    downsampling, resolution = USUAL[name].downsampling, _resolution(arguments, options)
    stated = options.resolution is not None or arguments.values.get("img_size") is not None
    if resolution % downsampling or not resolution:
        raise JLTError(
            f"its images have {resolution} pixels a side, which is no multiple of the {downsampling} of {name!r}: "
            "name another --autoencoder."
        )
    start, networks = _context_start(first, arguments, options), set()
    for which, weights in states.items():
        try:
            networks.add(read_config(weights, resolution // downsampling, start))
        except JLTError as error:
            raise JLTError(f"in {which}, {error}") from error
    if len(networks) > 1:
        raise JLTError(f"{', '.join(states)} are networks of different sizes.")
    (network,) = networks
    require_moderate(network, downsampling)
    side = network.height * downsampling
    if stated and side != resolution:
        raise JLTError(
            f"its pos_embed has {network.tokens} positions, and images of {resolution} pixels through {name!r} have "
            f"{(resolution // downsampling // network.patch_size) ** 2}: name another --autoencoder or --resolution."
        )
    if network.learned_positions and all(holds_fixed_positions(weights, network) for weights in states.values()):
        network = replace(network, learned_positions=False, fixed_positions=True)
    return network, _autoencoder(name, network, options.autoencoder_path), side


def _autoencoder_name(weights: Mapping[str, Tensor], arguments: Arguments) -> str:
    """Return the autoencoder that a file states as `vae_type`, or which the channels of its latents suggest.

    One that the file states and that is unknown here is not it, so what takes its place is recorded as assumed.
    """
    stated = arguments.values.get("vae_type")
    if isinstance(stated, str) and stated in VAE_TYPES:
        return VAE_TYPES[stated]
    embedding = weights.get("x_embedder.proj.weight", weights.get("x_embedder.proj1.weight"))
    name = "pixels" if embedding is not None and embedding.ndim == 4 and embedding.shape[1] == 3 else "flux2"
    if stated is not None:
        arguments.assumed["autoencoder"] = f"{name} for args.vae_type {shown(stated)}"
    return name


def _resolution(arguments: Arguments, options: ImportConfig) -> int:
    if options.resolution is None:
        return arguments.whole("img_size", 256, LARGEST_SIDE)
    stated = arguments.whole("img_size", options.resolution, LARGEST_SIDE, published=False)
    if stated != options.resolution:
        raise UsageError(f"The file states images of {stated} pixels: leave out --resolution {options.resolution}.")
    return stated


def _context_start(weights: Mapping[str, Tensor], arguments: Arguments, options: ImportConfig) -> int:
    """Return the block before which class tokens enter, which no tensor shows: 4 of 12, 8 of 24 and 10 of 32 in JiT."""
    if "in_context_posemb" not in weights:
        if options.context_start is not None:
            raise UsageError("The file has no class tokens (in_context_posemb): leave out --context-start.")
        return 0
    if options.context_start is not None:
        return options.context_start
    third = len({name.split(".")[1] for name in weights if name.startswith("blocks.")}) // 3
    return arguments.whole("in_context_start", third, MOST_BLOCKS)


def _autoencoder(name: str, network: NetworkConfig, place: str | None) -> dict[str, Any]:
    """Return the identity of the autoencoder; a message reports one that has other channels than the network."""
    usual = USUAL[name]
    if name == "pixels" and place is not None:
        raise UsageError(f"The autoencoder 'pixels' has no weights: leave out the path {place}.")
    source = place or usual.source
    if source is None:
        raise UsageError(f"The autoencoder {name!r} is any {usual.class_name}: name one with --autoencoder-path.")
    if place is None and usual.channels not in (None, network.channels):
        inform(
            f"{name} has {usual.channels} channels and this network {network.channels}, so its autoencoder is another "
            "one: name it with --autoencoder and --autoencoder-path to decode samples."
        )
    return adopted_identity(name, source, network.channels, usual.downsampling)


def _updates(content: Mapping[str, Any]) -> tuple[int, str]:
    """Return how far the training was, and what this counts.

    The optimizer counts its updates. Without it the finished epochs are the only count, and an epoch's updates are
    unknown.
    """
    optimizer = content.get("optimizer")
    states = optimizer.get("state") if isinstance(optimizer, Mapping) else None
    if isinstance(states, Mapping):
        counts = {_count(state.get("step")) for state in states.values() if isinstance(state, Mapping)}
        if len(counts) == 1 and (updates := counts.pop()) is not None:
            return updates, "updates"
    epoch = _count(content.get("epoch"))
    return (0, "nothing") if epoch is None else (epoch + 1, "epochs")


def _count(value: Any) -> int | None:
    """Return a whole number of a file, which may be a tensor, None for anything else."""
    if isinstance(value, Tensor):
        value = value.item() if value.device.type == "cpu" and value.numel() == 1 else None
    return int(value) if is_number(value) and value == int(value) and 0 <= value < MOST_UPDATES else None


def _class_names(count: int, file: Path | None) -> list[str]:
    if file is None:
        return list(readable_names([str(number) for number in range(count)], count))
    names = read_class_names(file)
    if len(names) != count:
        raise UsageError(f"{file} names {len(names)} classes, and the network has {count}.")
    return list(names)
