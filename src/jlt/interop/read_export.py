"""Exported folders and files back in: their settings and weights, read without running any code that is in them."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from jlt.autoencoders.load import AUTOENCODERS, SOURCES_IN_PACKAGE
from jlt.autoencoders.taef2 import TAEF2
from jlt.autoencoders.taef2 import WEIGHTS_FILE as TAEF2_FILE
from jlt.config import NetworkConfig, TrainConfig
from jlt.errors import JLTError
from jlt.interop.export import read_record, require_file
from jlt.interop.importing import MOST_UPDATES, Imported, imported_latents, require_finite, require_moderate
from jlt.interop.pipeline_settings import (
    HUB_ID,
    INDEX,
    METADATA,
    PIPELINE,
    PREFIX,
    RECORD,
    WEIGHTS,
    FileSettings,
    PipelineSettings,
)
from jlt.networks.transformer import Transformer
from jlt.runtime.progress import inform
from jlt.storage.codec import from_json
from jlt.storage.files import parse_json, read_json, sealed_sha256, sha256_file
from jlt.storage.folders import path_inside
from jlt.storage.weights import read_metadata, require_same_tensors
from jlt.training.checkpoint import average_names
from jlt.training.power_ema import SIGMA_REL, parse_sigma_rel

LARGEST_SETTINGS = 2**24
"""Bytes of a JSON file that is read."""
IDENTITY = ("name", "source", "downsampling", "normalisation", "weights_sha256", "class", "posterior")
"""What is read of the identity of an autoencoder, besides its channels."""
LARGEST_SETTING, LONGEST_LIST = 2**13, 2**8
"""Largest number, and longest list, in the settings of an autoencoder."""
FLOATS = {"F64", "F32", "F16", "BF16"}
COUNTER = ".num_batches_tracked"
"""A batch normalisation counts in whole numbers."""


@dataclass(frozen=True)
class Exported:
    """The settings and files of an exported folder or file."""

    network: NetworkConfig
    settings: PipelineSettings
    weights: Path
    prefix: str
    """What precedes the names of the weights."""
    sha256: str
    """Hash of everything that is read."""
    autoencoder: tuple[Path, Path] | None = None
    """Configuration and weights of an autoencoder that is in the folder."""


def read_export(path: Path, source: str) -> Imported:
    """Read an exported folder or file; `source` is how the user named it.

    JLTError for what is damaged, leads out of its folder, states impossible sizes or does not hold the weights of its
    network, before memory is taken for what the settings claim.
    """
    exported = _read_file(path) if path.is_file() else _read_folder(path)
    settings, network = exported.settings, exported.network
    config, identity = _train_config(settings, network), _autoencoder(settings.autoencoder, exported)
    require_moderate(network, identity["downsampling"])
    names = [settings.id2label[number] for number in sorted(settings.id2label)]
    if len(names) not in (0, network.num_classes) or sorted(settings.id2label) != list(range(len(names))):
        raise JLTError(f"id2label must name each of the {network.num_classes} classes, or none.")
    weights = _read_weights(exported)
    copies = {}
    if exported.autoencoder:
        require_autoencoder(*exported.autoencoder, identity["name"])
        if identity["source"] not in SOURCES_IN_PACKAGE:
            names_of_copies = ("config.json", TAEF2_FILE if identity["name"] == "taef2" else WEIGHTS)
            copies = dict(zip(names_of_copies, exported.autoencoder, strict=True))
    ema, resolution = settings.training.ema, network.height * identity["downsampling"]
    file = "network" if ema == "none" else f"ema_{ema}"
    facts = {"source": source, "sha256": exported.sha256, "step_counts": "updates"}
    latents = imported_latents(identity, settings.training.images, exported.sha256, resolution, names)
    return Imported(config, latents, {file: weights}, settings.training.step, facts, copies)


class _Folder:
    """The files of an exported folder that are read, with their hashes.

    One with its hash in `export.json` may be a link, as in the cache of the Hub. Where diffusers saved the folder there
    are no hashes, and links out of it are refused.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.hashes = folder, dict[str, str]()
        self.recorded: Mapping[str, str] | None = None
        if (folder / RECORD).is_file():
            _require_small(folder / RECORD)
            self.recorded = read_record(folder)["files"]
        else:
            inform(f"{folder} has no {RECORD}, so its files are not checked against their hashes.")

    def file(self, name: str) -> Path:
        """Return a file after checking it."""
        path = self.folder / name
        if self.recorded is None:
            path_inside(self.folder, name)
        elif name not in self.recorded:
            raise JLTError(f"{self.folder / RECORD} does not list {name}: the export is damaged.")
        if path.suffix == ".json" and path.is_file():
            _require_small(path)
        self.hashes[name] = require_file(self.folder, name, self.recorded[name] if self.recorded else None)
        return path

    def json(self, name: str) -> dict[str, Any]:
        """Read a file of settings."""
        return read_json(self.file(name))


def _read_folder(folder: Path) -> Exported:
    """Read the settings of a pipeline folder; JLTError for one that another program wrote, or a damaged one."""
    if not (folder / INDEX).is_file():
        raise JLTError(f"{folder} has no {INDEX}: name a folder that `jlt export` wrote.")
    files = _Folder(folder)
    index = files.json(INDEX)
    if (found := index.get("_class_name")) != list(PIPELINE):
        raise JLTError(f"{folder} holds a pipeline of the class {str(found)[:80]}, not one that `jlt export` wrote.")
    # diffusers adds keys of its own, which begin with an underscore.
    known = {entry.name for entry in fields(PipelineSettings)} | {"transformer", "vae"}
    values = {key: value for key, value in index.items() if key in known or not key.startswith("_")}
    parts = {key: values.pop(key, None) for key in ("transformer", "vae")}
    network = files.json("transformer/config.json")
    weights = files.file(f"transformer/{WEIGHTS}")
    copied = parts["vae"] not in (None, [None, None])
    return Exported(
        from_json(NetworkConfig, {key: value for key, value in network.items() if not key.startswith("_")}),
        from_json(PipelineSettings, values),
        weights,
        PREFIX,
        autoencoder=(files.file("vae/config.json"), files.file(f"vae/{WEIGHTS}")) if copied else None,
        sha256=sealed_sha256(files.hashes),
    )


def _read_file(path: Path) -> Exported:
    """Read the settings in the metadata of an exported file; JLTError for any other file."""
    metadata = read_metadata(path)
    if METADATA not in metadata:
        raise JLTError(f"{path} has no settings in its metadata: name a file that `jlt export` wrote.")
    found = from_json(FileSettings, parse_json(metadata[METADATA].encode(), f"the metadata of {path}"))
    return Exported(found.network, found.settings, path, "", sha256_file(path))


def _require_small(path: Path) -> None:
    if path.stat().st_size > LARGEST_SETTINGS:
        raise JLTError(f"{path} has {path.stat().st_size:,} bytes, too many for a file of settings.")


def _train_config(settings: PipelineSettings, network: NetworkConfig) -> TrainConfig:
    """Return the configuration of the run; settings of the training that no image depends on have their defaults."""
    training = settings.training
    if not 0 <= training.step < MOST_UPDATES:
        raise JLTError(f"training.step must be 0 or more, and less than {MOST_UPDATES:,}.")
    decays, widths = _averages(training.ema)
    config = TrainConfig(
        name=training.name,
        prediction=settings.prediction,
        network=network,
        noise_scale=settings.noise_scale,
        label_dropout=training.label_dropout,
        steps=max(1, training.step),
        ema=decays,
        power_ema=widths,
    )
    # The name becomes part of a file name.
    if [*average_names(config), "none"][0] != training.ema:
        raise JLTError(f"training.ema is no average of weights: {training.ema[:40]!r}.")
    return config


def _averages(ema: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the decays and the widths of which one has this name."""
    if ema == "none":
        return (), ()
    try:
        return ((), (parse_sigma_rel(ema),)) if ema.startswith(SIGMA_REL) else ((float(ema),), ())
    except ValueError:
        raise JLTError(f"training.ema is no average of weights: {ema[:40]!r}.") from None


def _autoencoder(described: Mapping[str, Any], exported: Exported) -> dict[str, Any]:
    """Return the identity of the autoencoder; JLTError for one that no export states."""
    if missing := [key for key in IDENTITY if key not in described]:
        raise JLTError(f"autoencoder.{missing[0]} is missing.")
    name, source, downsampling, normalisation, sha256, *texts = (described[key] for key in IDENTITY)
    channels = exported.network.channels
    if not all(isinstance(text, str) for text in texts):
        raise JLTError("autoencoder.class and autoencoder.posterior must be text.")
    if name not in AUTOENCODERS or described.get("channels") != channels:
        raise JLTError(f"The latents are not of a known autoencoder with {channels} channels: {str(name)[:40]!r}.")
    if type(downsampling) is not int or not 1 <= downsampling <= 2**8:
        raise JLTError(f"autoencoder.downsampling must be from 1 to 256, not {str(downsampling)[:40]}.")
    if not isinstance(normalisation, Mapping) or "coordinates" in normalisation:
        raise JLTError("autoencoder.normalisation names coordinates or is missing, which no export does.")
    if sha256 is not None and not (isinstance(sha256, str) and re.fullmatch(r"[0-9a-f]{64}", sha256)):
        raise JLTError(f"autoencoder.weights_sha256 is no hash: {str(sha256)[:80]!r}.")
    known = isinstance(source, str) and (source in SOURCES_IN_PACKAGE or HUB_ID.fullmatch(source))
    if exported.autoencoder is None and not known:
        raise JLTError(f"autoencoder.source must be the Hub id of the autoencoder, not {str(source)[:80]!r}.")
    return dict(described)


def _read_weights(exported: Exported) -> dict[str, Tensor]:
    """Return the weights of the network in float32, by its own names.

    JLTError unless the file holds them, before a value is read: the settings may state impossible sizes.
    """
    path, network, prefix = exported.weights, exported.network, re.escape(exported.prefix)
    found = read_shapes(path)
    blocks = {int(match[1]) for key in found if (match := re.match(rf"{prefix}blocks\.(\d{{1,9}})\.", key))}
    if network.depth != len(blocks):
        raise JLTError(f"{path} holds {len(blocks)} blocks, and its settings state a depth of {network.depth}.")
    try:
        with torch.device("meta"):
            expected = Transformer(network).state_dict()
    except (RuntimeError, OverflowError, ValueError, MemoryError, TypeError) as error:
        reason = textwrap.shorten(str(error).partition("\n")[0], 160)
        raise JLTError(f"{path} comes with settings of an impossible network ({reason}).") from error
    named = {f"{exported.prefix}{key}": tensor for key, tensor in expected.items()}
    require_same_tensors(path, found, named, "the network in its settings")
    with safe_open(path, framework="pt") as file:
        weights = {name.removeprefix(exported.prefix): file.get_tensor(name).float() for name in found}
    require_finite(path, weights.items())
    return weights


def read_shapes(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file without their values, on the meta device.

    JLTError for a file of another kind, and for numbers of another kind.
    """
    found = {}
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                part = file.get_slice(key)
                if part.get_dtype() not in FLOATS and not key.endswith(COUNTER):
                    raise JLTError(
                        f"{path} holds {key[:80]} as {part.get_dtype()}: weights are floating-point numbers."
                    )
                found[key] = torch.empty(part.get_shape(), device="meta")
    except (SafetensorError, OSError, RuntimeError) as error:
        raise JLTError(f"{path} is not a readable safetensors file ({error}).") from error
    return found


def require_autoencoder(config: Path, weights: Path, name: str) -> None:
    """Raise JLTError unless two files hold the settings and the weights of an autoencoder, by names and shapes.

    The sizes in the settings are limited before the model is built, and that needs no memory.
    """
    described = read_json(config)
    _require_small_values(config, described)
    try:
        with torch.device("meta"):
            expected = _empty_autoencoder(name, described).state_dict()
    # With damaged settings diffusers raises many types of exceptions.
    except Exception as error:
        reason = textwrap.shorten(str(error), 160)
        raise JLTError(f"{config} has no settings of the autoencoder {name!r} ({reason}).") from error
    require_same_tensors(weights, read_shapes(weights), expected, f"the autoencoder {name!r}")


def _empty_autoencoder(name: str, described: Mapping[str, Any]) -> torch.nn.Module:
    if name == "taef2":
        return TAEF2()
    from diffusers import AutoencoderKL, AutoencoderKLFlux2

    model_class: Any = AutoencoderKL if name == "kl" else AutoencoderKLFlux2
    return model_class.from_config(dict(described))


def _require_small_values(path: Path, value: Any) -> None:
    """Raise JLTError for numbers and lists that no autoencoder needs."""
    if isinstance(value, Mapping | list):
        if len(value) > LONGEST_LIST:
            raise JLTError(f"{path} has a list of {len(value):,} values: it is no file of settings.")
        for entry in value.values() if isinstance(value, Mapping) else value:
            _require_small_values(path, entry)
    elif isinstance(value, int | float) and not abs(value) <= LARGEST_SETTING:
        raise JLTError(f"{path} has the value {value}: no autoencoder needs more than {LARGEST_SETTING:,}.")
