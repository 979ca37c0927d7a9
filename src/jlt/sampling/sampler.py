"""A checkpoint, an autoencoder and a sampling configuration as one thing that yields images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from jlt.autoencoders.contract import Autoencoder
from jlt.autoencoders.coordinates import CoordinateAutoencoder, coordinates_of
from jlt.autoencoders.load import SOURCES_IN_PACKAGE, USUAL_PLACES, load_autoencoder
from jlt.config import LatentShape, SampleConfig, TrainConfig
from jlt.errors import JLTError
from jlt.networks.transformer import build_network
from jlt.runtime.environment import versions
from jlt.runtime.progress import inform
from jlt.sampling.generate import LatentBatch, LatentSampler, batches_of, decode_to_uint8, labels_for
from jlt.sampling.guidance import NOISE_END, Denoiser
from jlt.sampling.solvers import network_evaluations
from jlt.storage.codec import to_json
from jlt.storage.files import difference, format_difference
from jlt.training.averages import choose_name, choose_weights, require_ema
from jlt.training.checkpoint import Checkpoint, open_checkpoint


@dataclass(frozen=True)
class ImageBatch:
    """Decoded images `start` to `start + n`, with the labels they were drawn for."""

    start: int
    images: UInt8[Tensor, "n hh ww 3"]
    labels: Int[Tensor, "n"]


@dataclass(frozen=True)
class Weights:
    """A network ready to sample with, and what a protocol records of its weights."""

    denoiser: Denoiser
    identity: Mapping[str, Any]


@dataclass(frozen=True)
class ImageSampler:
    """Draws the numbered images of one protocol."""

    checkpoint: Checkpoint
    weights: Weights
    guide: Weights | None
    autoencoder: Autoencoder
    config: SampleConfig
    device: str

    def batches(self, numbers: Iterable[range] | None = None) -> Iterator[ImageBatch]:
        """Yield the images of these ranges of numbers, a batch each; without them all `config.num`, in order."""
        ranges = list(batches_of(self.config.num, self.config.batch_size)) if numbers is None else list(numbers)
        # A compiled network would be compiled again for a shorter last batch, which takes longer than to fill it.
        filled = [range(part.start, part.start + self.config.batch_size) for part in ranges]
        drawn = self.latents(filled if self.config.compile else ranges)
        for part, batch in zip(ranges, drawn, strict=True):
            images = decode_to_uint8(self.autoencoder, batch.latents[: len(part)])
            yield ImageBatch(batch.start, images.cpu(), batch.labels[: len(part)].cpu())

    def latents(self, numbers: Iterable[range] | None = None) -> Iterator[LatentBatch]:
        """Yield what `batches` decodes."""
        return self.latent_sampler.batches(numbers)

    @property
    def latent_sampler(self) -> LatentSampler:
        """What draws the latents."""
        guide, scale = self.guide.denoiser if self.guide else None, self.checkpoint.config.noise_scale
        return LatentSampler(self.weights.denoiser, self.shape, self.config, self.device, scale, guide)

    @property
    def shape(self) -> LatentShape:
        """The shape of a latent, and the number of classes."""
        network = self.checkpoint.config.network
        return LatentShape(network.channels, network.height, network.width, network.num_classes)

    @property
    def resolution(self) -> int:
        """Height of the images in pixels."""
        return self.shape.height * self.autoencoder.downsampling

    @property
    def classes(self) -> str:
        """The kind of image source whose classes the labels are."""
        return self.checkpoint.latents["source"]["kind"]

    def class_name(self, label: int) -> str:
        """Return the name of a class, or its number where the latents came without names."""
        names = self.checkpoint.latents.get("class_names") or []
        return names[label] if label < len(names) else str(label)

    def protocol(self) -> dict[str, Any]:
        """Return everything that decides which images these are; batch sizes and compilation change rounding alone."""
        free = ("num", "batch_size", "compile", "autoguide", "autoguide_ema")
        settings = {key: value for key, value in to_json(self.config).items() if key not in free}
        guide = {"autoguide": dict(self.guide.identity)} if self.guide else {}
        return {
            **settings,
            **self.weights.identity,
            **guide,
            "nfe": network_evaluations(self.config.solver, self.config.steps),
            "eps_first_time": NOISE_END,
            "count": self.config.num,
            "device": torch.device(self.device).type,
            "autoencoder": self.autoencoder.identity(),
            "versions": versions(),
        }


def open_sampler(
    checkpoint: Checkpoint, config: SampleConfig, device: str = "cpu", autoencoder_path: str | None = None
) -> ImageSampler:
    """Build the sampler of a checkpoint with the autoencoder that its latents came from.

    Raises JLTError for an unknown EMA or label rule, a damaged checkpoint, a guide of another kind of latents, or an
    autoencoder with other weights.
    """
    check_guidance(checkpoint.config, config)
    guide = _open_guide(checkpoint, config, device) if config.autoguided else None
    weights = open_weights(checkpoint, config.ema, device, config.t_eps, config.compile)
    autoencoder = matching_autoencoder(checkpoint.latents["autoencoder"], autoencoder_path, device)
    return ImageSampler(checkpoint, weights, guide, autoencoder, config, device)


def with_config(sampler: ImageSampler, config: SampleConfig) -> ImageSampler:
    """Return a sampler of the same checkpoint with other settings, opening only what they change.

    Raises JLTError as `open_sampler` does.
    """
    checkpoint, device = sampler.checkpoint, sampler.device

    def changed(*keys: str) -> bool:
        return any(getattr(config, key) != getattr(sampler.config, key) for key in keys)

    check_guidance(checkpoint.config, config)
    weights, guide = sampler.weights, sampler.guide if config.autoguided else None
    if changed("ema", "t_eps", "compile"):
        weights = open_weights(checkpoint, config.ema, device, config.t_eps, config.compile)
    if config.autoguided:
        check_guide(checkpoint, config)
        if guide is None or changed("autoguide", "autoguide_ema", "t_eps", "compile"):
            guide = _open_guide(checkpoint, config, device)
    return replace(sampler, weights=weights, guide=guide, config=config)


def open_weights(checkpoint: Checkpoint, ema: str, device: str, t_eps: float = 0.0, compiled: bool = False) -> Weights:
    """Return a checkpoint's network with the weights that `ema` names (see `choose_weights`), as a denoiser."""
    train = checkpoint.config
    chosen = choose_weights(checkpoint, ema)
    network = build_network(train.network, seed=0)
    network.load_state_dict(chosen.tensors)
    network.to(device).eval().requires_grad_(False)
    if compiled:
        network.compile(dynamic=False)
    denoiser = Denoiser(network, train.prediction, train.network.num_classes, t_eps)
    rebuilt = {"ema_rebuilt": dict(chosen.rebuilt)} if chosen.rebuilt else {}
    return Weights(denoiser, {"checkpoint": checkpoint.sha256, "ema": chosen.ema, **rebuilt})


def _open_guide(checkpoint: Checkpoint, config: SampleConfig, device: str) -> Weights:
    guide = check_guide(checkpoint, config)
    return open_weights(guide, config.autoguide_ema, device, config.t_eps, config.compile)


def check_guide(checkpoint: Checkpoint, config: SampleConfig) -> Checkpoint:
    """Return the checkpoint of the weaker network of autoguidance.

    JLTError if its latents, classes or noise differ from those of the other, or if both are the same weights.
    """
    guide = open_checkpoint(Path(config.autoguide)) if config.autoguide else checkpoint
    mine, theirs = (_sampled_space(side) for side in (checkpoint, guide))
    if differences := difference(mine, theirs):
        raise JLTError(f"{guide.folder} cannot guide, since it draws other latents: {format_difference(differences)}.")
    require_ema(guide, config.autoguide_ema)
    mine_ema = choose_name(checkpoint, config.ema)
    if guide.sha256 == checkpoint.sha256 and choose_name(guide, config.autoguide_ema) == mine_ema:
        raise JLTError(f"A network cannot guide itself: name weaker weights than {mine_ema} with --autoguide-ema.")
    return guide


def _sampled_space(checkpoint: Checkpoint) -> dict[str, Any]:
    train = checkpoint.config
    sizes = {key: getattr(train.network, key) for key in ("channels", "height", "width", "num_classes")}
    decoded = {key: checkpoint.latents["autoencoder"][key] for key in ("name", "weights_sha256", "normalisation")}
    return {**sizes, "noise_scale": train.noise_scale, "autoencoder": decoded}


def check_guidance(train: TrainConfig, config: SampleConfig) -> None:
    """Raise a JLTError for labels that a run's network does not know, and guidance that it was not trained for."""
    labels_for(config.labels, range(1), train.network.num_classes, config.seed)
    if config.autoguided and config.cfg_scale == 1:
        raise JLTError("A guide has no effect at cfg_scale 1: choose another scale with --cfg-scale.")
    if config.cfg_scale != 1 and train.label_dropout == 0 and not config.autoguided:
        raise JLTError(
            "This network was trained without dropping labels (label_dropout 0): guidance needs its null class."
        )


def matching_autoencoder(identity: dict[str, Any], path: str | None, device: str) -> Autoencoder:
    """Load the autoencoder that made some latents, from `path` or from where it was loaded when it made them.

    JLTError if its weights, normalisation or sizes are others. Adopted latents record no weights: any autoencoder of
    the right sizes is accepted, and a message reports it.
    """
    autoencoder = load_autoencoder(identity["name"], path or _recorded_place(identity), device)
    if coordinates := coordinates_of(identity):
        autoencoder = CoordinateAutoencoder(autoencoder, coordinates)
    found = autoencoder.identity()
    decisive = ["channels", "downsampling"]
    if identity["weights_sha256"] is None and found["weights_sha256"] is not None:
        inform(
            f"The latents record no weights of their autoencoder: those from {found['source']} decode them unchecked."
        )
    else:
        decisive = ["weights_sha256", "normalisation", *decisive]
    for key in decisive:
        if found[key] != identity[key]:
            raise JLTError(
                f"The latents were made by the autoencoder {identity['name']!r} with {key} {identity[key]}, "
                f"the one from {found['source']} has {found[key]}: name the right one with --autoencoder-path."
            )
    return autoencoder


def _recorded_place(identity: dict[str, Any]) -> str | None:
    """Return the folder or Hub id of an identity; None, for the usual place, without one or if the folder is gone."""
    name, source = identity["name"], identity["source"]
    gone = Path(source).is_absolute() and not Path(source).exists()
    if source in SOURCES_IN_PACKAGE or (gone and name in USUAL_PLACES):
        return None
    return source
