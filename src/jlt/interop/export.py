"""Export of checkpoints: a folder that diffusers loads without jlt, or one file of weights. Upload of such a folder.

DIR/
    model_index.json, pipeline.py               settings, and the sampling loop
    app.py                                      a page that draws images, which needs gradio
    transformer/                                config.json, weights, transformer_jlt.py
    vae/                                        the autoencoder, where it is not named by its Hub id
    README.md, samples.png                      the model card
    export.json                                 what was exported, and the hashes of all files but the card's
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jlt import __version__
from jlt.autoencoders.contract import Autoencoder
from jlt.autoencoders.coordinates import coordinates_of
from jlt.autoencoders.load import SOURCES_IN_PACKAGE
from jlt.config import SampleConfig
from jlt.errors import JLTError, UsageError, without_credentials
from jlt.interop.model_card import Card, write_card
from jlt.interop.pipeline_settings import (
    HUB_ID,
    IN_FOLDER,
    INDEX,
    METADATA,
    PIPELINE,
    PREFIX,
    RECORD,
    SCHEMA,
    TAEF2,
    TRANSFORMER,
    WEIGHTS,
    ExportConfig,
    FileSettings,
    PipelineSettings,
    TrainingFacts,
)
from jlt.interop.standalone import standalone
from jlt.runtime.progress import inform
from jlt.sampling.labels import readable_names
from jlt.sampling.sampler import check_guidance, matching_autoencoder
from jlt.storage.codec import to_json
from jlt.storage.files import (
    difference,
    format_difference,
    read_sealed_json,
    sealed_text,
    sha256_file,
    write_json,
    write_text,
)
from jlt.storage.folders import LOCK, remove_leftovers, stays_inside, whole_folder
from jlt.storage.weights import read_metadata, write_tensors
from jlt.training.averages import ChosenWeights, choose_name, choose_weights
from jlt.training.checkpoint import Checkpoint, load_tensors

SOURCES = "jlt.interop.exported"
APP = Path(__file__).with_name("exported") / "app.py"
"""It uses no module of this package, so it is copied as it is."""


@dataclass(frozen=True)
class VaePlan:
    """Where the pipeline has its autoencoder from: `source` as the settings state it, and whether it is copied."""

    source: str
    copied: bool


def export_folder(
    checkpoint: Checkpoint,
    out: Path,
    config: ExportConfig,
    device: str = "cpu",
    autoencoder_path: str | None = None,
    place: str = "",
) -> Path:
    """Write the pipeline folder of a checkpoint and return it; a complete one of the same export stays as it is.

    `place` is what the model card loads in its example, by default the folder's name. The folder appears whole, by a
    rename. JLTError for an unknown EMA, for an autoencoder that cannot be named or copied, for samples that the network
    cannot draw, and for a folder that holds anything else, another export, or a damaged one.
    """
    _check_card(checkpoint, config)
    identity = checkpoint.latents["autoencoder"]
    plan = plan_vae(identity, config)
    if autoencoder_path and not plan.copied:
        raise UsageError("--autoencoder-path names the weights to copy: add --with-vae, or leave it out.")
    export = {
        "jlt": __version__,
        "checkpoint": checkpoint.sha256,
        "autoencoder": asdict(plan),
        **to_json(config),
        "ema": choose_name(checkpoint, config.ema),
    }
    if _exists_already(out, export):
        return out
    chosen = choose_weights(checkpoint, config.ema)
    settings = settings_of(checkpoint, chosen.ema, plan)
    autoencoder = None
    if plan.copied:
        autoencoder = matching_autoencoder(identity, autoencoder_path, "cpu", folder=checkpoint.run)

    # Another process may be faster: its folder must be the same export.
    with whole_folder(out.resolve(), lambda: _exists_already(out, export)) as partial:
        _write_pipeline(partial, checkpoint, chosen, settings, autoencoder)
        written = sorted(path for path in partial.rglob("*") if path.is_file() and path.name != LOCK)
        files = {str(path.relative_to(partial)): sha256_file(path) for path in written}
        write_card(partial, Card(checkpoint, settings, config, plan.copied, place or out.name), device)
        write_text(partial / RECORD, sealed_text({"schema": SCHEMA, "export": export, "files": files}))
    return out


def _check_card(checkpoint: Checkpoint, config: ExportConfig) -> None:
    """Raise JLTError for settings of the card's samples and example that the pipeline would refuse."""
    sampling = SampleConfig(steps=config.steps, cfg_scale=config.cfg_scale, cfg_interval=config.cfg_interval)
    check_guidance(checkpoint.config, sampling)


def export_file(checkpoint: Checkpoint, out: Path, config: ExportConfig) -> Path:
    """Write the network's weights as one safetensors file, with all settings in its metadata, and return it.

    JLTError for an unknown EMA, and where another file or a folder has the name.
    """
    if out.suffix != ".safetensors":
        raise UsageError(f"--format safetensors writes one file: let the name {out.name} end with .safetensors.")
    chosen = choose_weights(checkpoint, config.ema)
    settings = settings_of(checkpoint, chosen.ema, plan_vae(checkpoint.latents["autoencoder"], config))
    # Of several entries, safetensors writes one or another first.
    metadata = {METADATA: json.dumps(to_json(FileSettings(checkpoint.config.network, settings)))}
    remove_leftovers(out.parent, out.name)
    if out.exists():
        if out.is_dir() or read_metadata(out) != metadata or not _same(load_tensors(out), chosen.tensors):
            raise JLTError(f"{out} exists and is not this export: choose another name.")
        return out
    write_tensors(out, chosen.tensors, metadata)
    return out


def _same(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def plan_vae(identity: Mapping[str, Any], config: ExportConfig) -> VaePlan:
    """Decide where the pipeline has its autoencoder from.

    JLTError for a network that was trained in other coordinates, for an autoencoder that is only known by a path of
    this machine, and for an id that does not have the form of one.
    """
    name, source = identity["name"], identity["source"]
    if coordinates_of(dict(identity)):
        raise JLTError("This network was trained in other coordinates of its latent space: it cannot be exported.")
    if config.vae and (config.with_vae or not HUB_ID.fullmatch(config.vae)):
        reason = "cannot be combined with --with-vae" if config.with_vae else f"takes a Hub id, not {config.vae!r}"
        raise UsageError(f"--vae {reason}.")
    if name == "pixels":
        return VaePlan(source, copied=False)
    public = bool(HUB_ID.fullmatch(source)) and not Path(source).exists()
    if source in SOURCES_IN_PACKAGE or config.with_vae or name == "taef2":
        return VaePlan(source if public or source in SOURCES_IN_PACKAGE else IN_FOLDER, copied=True)
    if config.vae or public:
        return VaePlan(config.vae or source, copied=False)
    raise JLTError(
        f"The autoencoder {name!r} of this network was loaded from a folder of this machine: "
        "copy it with --with-vae, or name its Hub id with --vae."
    )


def settings_of(checkpoint: Checkpoint, ema: str, plan: VaePlan) -> PipelineSettings:
    """Return what an exported network states of itself."""
    config, latents = checkpoint.config, checkpoint.latents
    facts = TrainingFacts(
        name=config.name,
        step=checkpoint.step,
        ema=ema,
        checkpoint=checkpoint.sha256,
        label_dropout=config.label_dropout,
        images=latents["source"]["kind"],
    )
    return PipelineSettings(
        prediction=config.prediction,
        noise_scale=config.noise_scale,
        id2label=dict(enumerate(readable_names(latents.get("class_names") or [], config.network.num_classes))),
        autoencoder={**latents["autoencoder"], "source": plan.source},
        training=facts,
    )


def _write_pipeline(
    folder: Path,
    checkpoint: Checkpoint,
    chosen: ChosenWeights,
    settings: PipelineSettings,
    autoencoder: Autoencoder | None,
) -> None:
    """Write everything that decides an image."""
    from diffusers import __version__ as diffusers_version

    weights = {f"{PREFIX}{name}": tensor.float() for name, tensor in chosen.tensors.items()}
    network = {"_class_name": TRANSFORMER[1], "_diffusers_version": diffusers_version}
    _write_model(folder / "transformer", {**network, **to_json(checkpoint.config.network)}, weights)
    _write_code(folder / "transformer", TRANSFORMER)
    vae: tuple[str | None, str | None] = (None, None)
    if autoencoder is not None:
        vae = _write_vae(folder / "vae", autoencoder)
    _write_code(folder, PIPELINE)
    write_text(folder / "app.py", APP.read_text(encoding="utf-8"))
    parts = {"_class_name": PIPELINE, "_diffusers_version": diffusers_version, "transformer": TRANSFORMER, "vae": vae}
    write_json(folder / INDEX, {**parts, **to_json(settings)})


def _write_vae(folder: Path, autoencoder: Any) -> tuple[str, str]:
    """Write the autoencoder as diffusers reads it; return where its class is, and the class."""
    model = autoencoder.model
    if autoencoder.name == "taef2":
        _write_model(folder, {"_class_name": TAEF2[1]}, model.state_dict())
        _write_code(folder, TAEF2)
        return TAEF2
    config = json.loads(model.to_json_string())
    # The place that it was loaded from is of this machine.
    config.pop("_name_or_path", None)
    _write_model(folder, config, model.state_dict())
    return "diffusers", type(model).__name__


def _write_model(folder: Path, config: Mapping[str, Any], weights: Mapping[str, Any]) -> None:
    write_json(folder / "config.json", config)
    write_tensors(folder / WEIGHTS, weights, {"format": "pt"})


def _write_code(folder: Path, part: tuple[str, str]) -> None:
    write_text(folder / f"{part[0]}.py", standalone(f"{SOURCES}.{part[0]}"))


def _exists_already(out: Path, export: Mapping[str, Any]) -> bool:
    """Return whether the folder is a complete export of the same; JLTError if it is anything else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if not (out / RECORD).is_file():
        raise JLTError(f"{out} exists and is no export: choose a new or empty folder.")
    record = read_record(out)
    if differences := difference(record["export"], export):
        raise JLTError(
            f"{out} holds another export, which differs in: {format_difference(differences)}. Choose another folder."
        )
    require_intact(out, record)
    return True


def read_record(folder: Path) -> dict[str, Any]:
    """Read `export.json`; JLTError for one that is damaged, of another schema, or names a file outside its folder."""
    record = read_sealed_json(folder / RECORD)
    if record.get("schema") != SCHEMA or not isinstance(record.get("files"), dict):
        raise JLTError(f"{folder / RECORD} is no record of schema {SCHEMA}: another version of jlt wrote it.")
    for name, sha256 in record["files"].items():
        if not isinstance(sha256, str):
            raise JLTError(f"{folder / RECORD} has no hash of {name[:80]!r}: it is damaged.")
        if not stays_inside(name):
            raise JLTError(f"{folder / RECORD} names {name[:80]!r}: it may name only files in its own folder.")
    return record


def require_intact(folder: Path, record: Mapping[str, Any] | None = None) -> None:
    """Raise JLTError for a file of an export that is missing, or has another content than recorded.

    `record` is what `read_record` returned, where it was read already.
    """
    for name, sha256 in (record or read_record(folder))["files"].items():
        require_file(folder, name, sha256)


def require_file(folder: Path, name: str, sha256: str | None) -> str:
    """Return the SHA-256 of a file of an export; JLTError if it is missing, or has another one than recorded.

    Links are followed, as the Hub's cache needs: what they lead to must have the hash.
    """
    path = folder / name
    if not path.is_file():
        raise JLTError(f"{path} is missing: the export is not complete; delete the folder and export again.")
    found = sha256_file(path)
    if sha256 not in (None, found):
        raise JLTError(f"{path} was edited or damaged: its content does not match the hash in {RECORD}.")
    return found


def require_repository(name: str) -> None:
    """Raise UsageError unless a name has the form user/name of a repository on the Hub."""
    if not HUB_ID.fullmatch(name):
        raise UsageError(f"--push takes user/name of a repository on the Hub, not {name!r}.")


def push_folder(folder: Path, repository: str, private: bool = False) -> str:
    """Upload an exported folder to the Hub and return its address; the repository is created if it is missing.

    huggingface_hub finds the token itself. JLTError if the upload fails; the folder is complete in any case.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        address = api.create_repo(repository, repo_type="model", private=private or None, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message=f"Export of jlt {__version__}")
    # The library raises its own classes, those of its HTTP client and ValueError.
    except Exception as error:
        reason = textwrap.shorten(without_credentials(str(error)), 200)
        raise JLTError(
            f"{folder} is complete, but could not be uploaded to {repository} ({reason}): log in with `hf auth login`, "
            "and run the same command again."
        ) from error
    inform(f"Uploaded {folder} to {repository}.")
    return str(address)
