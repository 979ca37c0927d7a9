"""Exported folders and files back in, as a run folder with one checkpoint. No code that is in them is run."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from jlt.autoencoders.load import AUTOENCODERS, IN_RUN, SOURCES_IN_PACKAGE
from jlt.autoencoders.taef2 import TAEF2
from jlt.autoencoders.taef2 import WEIGHTS_FILE as TAEF2_FILE
from jlt.config import NetworkConfig, TrainConfig
from jlt.errors import JLTError
from jlt.interop.export import read_record, require_intact
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
from jlt.storage.files import read_json, write_json
from jlt.storage.folders import Claim, atomic_folder, path_inside
from jlt.storage.weights import read_metadata, require_same_tensors
from jlt.training.checkpoint import average_names, open_checkpoint, save_checkpoint, step_folder
from jlt.training.power_ema import SIGMA_REL, parse_sigma_rel
from jlt.training.state import run_identity

LARGEST_JSON = 2**24
"""Bytes of a JSON file that is read."""
LARGEST_LATENT, MOST_TOKENS = 2**24, 2**16
"""Values of a latent, and tokens, that settings may ask for: the size of no weight depends on them."""
LARGEST_SETTING, LONGEST_LIST = 2**13, 2**8
"""Largest number, and longest list, in the settings of an autoencoder."""
FLOATS = {"F64", "F32", "F16", "BF16"}
COUNTER = ".num_batches_tracked"
"""A batch normalisation counts in whole numbers."""
NETWORK_CONFIG, NETWORK_WEIGHTS = "transformer/config.json", f"transformer/{WEIGHTS}"
VAE_CONFIG, VAE_WEIGHTS = "vae/config.json", f"vae/{WEIGHTS}"


@dataclass(frozen=True)
class Exported:
    """What an exported folder or file holds."""

    network: NetworkConfig
    settings: PipelineSettings
    weights: Path
    prefix: str
    """What precedes the names of the weights."""
    vae: tuple[Path, Path] | None = None
    """Configuration and weights of an autoencoder that is in the folder."""


def import_pipeline(source: Path, out: Path) -> Path:
    """Turn an exported folder, or an exported file, into a run folder at `out`, and return it.

    The run has one checkpoint with the exported weights. A folder that the same import wrote is kept. JLTError, before
    memory is allocated, for what is damaged, leads out of its folder, states impossible sizes or does not hold the
    weights of its network; and for an `out` that holds anything else.
    """
    exported = read_exported_file(source) if source.is_file() else read_exported_folder(source)
    config, latents = _train_config(exported), _latents(exported)
    weights = read_weights(exported.weights, exported.network, exported.prefix)
    if exported.vae:
        require_autoencoder(*exported.vae, exported.settings.autoencoder["name"])

    identity, step = run_identity(config, latents), exported.settings.training.step
    if Claim(out, "config.json", identity).is_begun():
        _require_same_weights(step_folder(out, step), weights)
        return out
    with atomic_folder(out) as partial:
        facts = {"skipped_in_a_row": 0, "draws": "", "initial_weights": "", "seconds": 0.0, "device": "cpu"}
        ema = exported.settings.training.ema
        file = "network" if ema == "none" else f"ema_{ema}"
        save_checkpoint(partial, config, latents, {file: weights}, {"step": step, "updates": step, **facts})
        if exported.vae:
            names = ("config.json", TAEF2_FILE if exported.settings.autoencoder["name"] == "taef2" else WEIGHTS)
            (partial / "vae").mkdir()
            for path, name in zip(exported.vae, names, strict=True):
                shutil.copyfile(path, partial / "vae" / name)
        write_json(partial / "config.json", identity)
    return out


def _require_same_weights(folder: Path, weights: Mapping[str, Tensor]) -> None:
    """Raise JLTError unless the only weights of an imported checkpoint are these."""
    checkpoint = open_checkpoint(folder)
    names = [name for name in checkpoint.files if name.endswith(".safetensors")]
    stored = checkpoint.read(names[0]) if len(names) == 1 else {}
    if stored.keys() != weights.keys() or not all(torch.equal(stored[name], weights[name]) for name in stored):
        raise JLTError(f"{folder} holds other weights: choose a new or empty folder.")


def read_exported_folder(folder: Path) -> Exported:
    """Read the settings of a pipeline folder; JLTError for one that another program wrote, or a damaged one.

    A folder that diffusers saved has no hashes: a message reports it.
    """
    if not (folder / INDEX).is_file():
        raise JLTError(f"{folder} has no {INDEX}: name a folder that `jlt export` wrote.")
    listed = None
    if (folder / RECORD).is_file():
        _require_small(folder / RECORD)
        listed = set(read_record(folder)["files"])
        require_intact(folder)
    else:
        inform(f"{folder} has no {RECORD}, so its files are not checked against their hashes.")
    index = _read_json(_member(folder, INDEX, listed))
    if (found := index.get("_class_name")) != list(PIPELINE):
        raise JLTError(f"{folder} holds a pipeline of the class {found}, not one that `jlt export` wrote.")
    known = {entry.name for entry in fields(PipelineSettings)} | {"transformer", "vae"}
    values = {key: value for key, value in index.items() if key in known or not key.startswith("_")}
    parts = {key: values.pop(key, None) for key in ("transformer", "vae")}
    network = _read_json(_member(folder, NETWORK_CONFIG, listed))
    vae = None
    if parts["vae"] not in (None, [None, None]):
        vae = (_member(folder, VAE_CONFIG, listed), _member(folder, VAE_WEIGHTS, listed))
        _require_small(vae[0])
    return Exported(
        from_json(NetworkConfig, {key: value for key, value in network.items() if not key.startswith("_")}),
        from_json(PipelineSettings, values),
        _member(folder, NETWORK_WEIGHTS, listed),
        PREFIX,
        vae,
    )


def read_exported_file(path: Path) -> Exported:
    """Read the settings in the metadata of an exported file; JLTError for any other file."""
    text = read_metadata(path).get(METADATA, "")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise JLTError(f"{path} has no settings in its metadata: name a file that `jlt export` wrote.") from error
    if not isinstance(content, dict):
        raise JLTError(f"{path} has no settings in its metadata: name a file that `jlt export` wrote.")
    found = from_json(FileSettings, content)
    return Exported(found.network, found.settings, path, prefix="")


def _member(folder: Path, name: str, listed: set[str] | None) -> Path:
    """Return a file of a folder: one with a known hash, to which a link may lead, or one that is in it."""
    if listed is not None and name not in listed:
        raise JLTError(f"{folder / RECORD} does not list {name}: the export is damaged.")
    path = folder / name if listed is not None else path_inside(folder, name)
    if not path.is_file():
        raise JLTError(f"{path} is missing: the folder is not complete.")
    return path


def _require_small(path: Path) -> None:
    if path.stat().st_size > LARGEST_JSON:
        raise JLTError(f"{path} has {path.stat().st_size:,} bytes, too many for a file of settings.")


def _read_json(path: Path) -> dict[str, Any]:
    _require_small(path)
    try:
        return read_json(path)
    except RecursionError as error:
        raise JLTError(f"{path} is nested too deeply for a file of settings.") from error


def _train_config(exported: Exported) -> TrainConfig:
    """Return the configuration of the run; settings of the training that no image depends on have their defaults."""
    settings, training = exported.settings, exported.settings.training
    if training.step < 0:
        raise JLTError(f"training.step must be 0 or more, not {training.step}.")
    decays, widths = _averages(training.ema)
    config = TrainConfig(
        name=training.name,
        prediction=settings.prediction,
        network=exported.network,
        noise_scale=settings.noise_scale,
        label_dropout=training.label_dropout,
        steps=max(1, training.step),
        ema=decays,
        power_ema=widths,
    )
    # The name becomes a part of a file's.
    if [*average_names(config), "none"][0] != training.ema:
        raise JLTError(f"training.ema is no average of weights: {training.ema!r}.")
    return config


def _averages(ema: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the decays and the widths of which one has this name."""
    if ema == "none":
        return (), ()
    if ema.startswith(SIGMA_REL):
        return (), (parse_sigma_rel(ema),)
    try:
        return (float(ema),), ()
    except ValueError:
        raise JLTError(f"training.ema is no average of weights: {ema!r}.") from None


def _latents(exported: Exported) -> dict[str, Any]:
    """Return what a checkpoint states of its latents; JLTError for impossible sizes, names and sources."""
    network, settings = exported.network, exported.settings
    size = network.channels * network.height * network.width
    if not 0 < size <= LARGEST_LATENT or network.tokens > MOST_TOKENS:
        raise JLTError(
            f"Latents of {network.channels} x {network.height} x {network.width} are too large, or empty: "
            "the settings are damaged."
        )
    names = [settings.id2label.get(number) for number in range(len(settings.id2label))]
    if None in names or len(names) not in (0, network.num_classes):
        raise JLTError(f"id2label must name each of the {network.num_classes} classes, or none.")
    identity = _autoencoder(settings.autoencoder, network, copied=exported.vae is not None)
    return {
        "autoencoder": identity,
        "source": {"kind": settings.training.images},
        "resolution": network.height * identity["downsampling"],
        "class_names": names,
    }


def _autoencoder(described: Mapping[str, Any], network: NetworkConfig, copied: bool) -> dict[str, Any]:
    """Return the identity of the autoencoder, whose source is its copy in the run where there is one."""
    name, source, sha256 = (described.get(key) for key in ("name", "source", "weights_sha256"))
    downsampling = described.get("downsampling")
    normalisation = described.get("normalisation")
    if name not in AUTOENCODERS or described.get("channels") != network.channels:
        raise JLTError(f"The latents are not of a known autoencoder with {network.channels} channels: {name!r}.")
    if not isinstance(downsampling, int) or not 1 <= downsampling <= 2**8:
        raise JLTError(f"autoencoder.downsampling must be from 1 to 256, not {downsampling!r}.")
    if not isinstance(normalisation, Mapping) or "coordinates" in normalisation:
        raise JLTError("autoencoder.normalisation names coordinates or is missing, which no export does.")
    if sha256 is not None and not (isinstance(sha256, str) and re.fullmatch(r"[0-9a-f]{64}", sha256)):
        raise JLTError(f"autoencoder.weights_sha256 is no hash: {sha256!r}.")
    if source in SOURCES_IN_PACKAGE:
        return dict(described)
    if copied:
        return {**described, "source": f"{IN_RUN}vae"}
    if not isinstance(source, str) or not HUB_ID.fullmatch(source):
        raise JLTError(f"autoencoder.source must be the Hub id of the autoencoder, not {source!r}.")
    return dict(described)


def read_weights(path: Path, network: NetworkConfig, prefix: str = "") -> dict[str, Tensor]:
    """Return the float32 weights of a network from a safetensors file.

    JLTError, before memory is allocated, with the first names that are missing, unexpected or misshapen.
    """
    _require_fit(path, read_shapes(path), network, prefix)
    with safe_open(path, framework="pt") as file:
        return {key.removeprefix(prefix): file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118


def read_shapes(path: Path) -> dict[str, Tensor]:
    """Return the floating-point tensors of a safetensors file without their values, on the meta device.

    JLTError for a file of another kind, and for numbers of another kind.
    """
    found = {}
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                part = file.get_slice(key)
                if part.get_dtype() not in FLOATS and not key.endswith(COUNTER):
                    raise JLTError(f"{path} holds {key} as {part.get_dtype()}: weights are floating-point numbers.")
                found[key] = torch.empty(part.get_shape(), device="meta")
    except (SafetensorError, OSError) as error:
        raise JLTError(f"{path} is not a readable safetensors file ({error}).") from error
    return found


def _require_fit(path: Path, found: Mapping[str, Tensor], network: NetworkConfig, prefix: str) -> None:
    """Raise JLTError unless a file holds the weights of a network, whose settings may state impossible sizes."""
    blocks = {int(match[1]) for key in found if (match := re.match(rf"{re.escape(prefix)}blocks\.(\d+)\.", key))}
    if network.depth != len(blocks):
        raise JLTError(f"{path} holds {len(blocks)} blocks, and its settings state a depth of {network.depth}.")
    try:
        with torch.device("meta"):
            expected = Transformer(network).state_dict()
    except (RuntimeError, OverflowError, ValueError, MemoryError, TypeError) as error:
        raise JLTError(f"{path} comes with settings of an impossible network ({error}).") from error
    named = {f"{prefix}{key}": tensor for key, tensor in expected.items()}
    require_same_tensors(path, found, named, "the network in its settings")


def require_autoencoder(config: Path, weights: Path, name: str) -> None:
    """Raise JLTError unless two files hold the settings and the weights of an autoencoder, by names and shapes.

    The sizes in the settings are limited before the model is built, and that needs no memory.
    """
    described = _read_json(config)
    _require_moderate(config, described)
    try:
        with torch.device("meta"):
            expected = _empty_autoencoder(name, described).state_dict()
    # With damaged settings diffusers raises many types of exceptions.
    except Exception as error:
        raise JLTError(f"{config} has no settings of the autoencoder {name!r} ({error}).") from error
    require_same_tensors(weights, read_shapes(weights), expected, f"the autoencoder {name!r}")


def _empty_autoencoder(name: str, described: Mapping[str, Any]) -> torch.nn.Module:
    if name == "taef2":
        return TAEF2()
    from diffusers import AutoencoderKL, AutoencoderKLFlux2

    model_class: Any = AutoencoderKL if name == "kl" else AutoencoderKLFlux2
    return model_class.from_config(dict(described))


def _require_moderate(path: Path, value: Any) -> None:
    """Raise JLTError for numbers and lists that no autoencoder needs."""
    if isinstance(value, Mapping | list):
        if len(value) > LONGEST_LIST:
            raise JLTError(f"{path} has a list of {len(value):,} values: it is no file of settings.")
        for entry in value.values() if isinstance(value, Mapping) else value:
            _require_moderate(path, entry)
    elif isinstance(value, int | float) and not abs(value) <= LARGEST_SETTING:
        raise JLTError(f"{path} has the value {value}: no autoencoder needs more than {LARGEST_SETTING:,}.")
