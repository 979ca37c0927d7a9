"""Numbered images of a checkpoint: noise and label of image i are functions of the seed and i, whatever else is drawn.

The image itself is then the same up to float rounding, which depends on the shapes of matrix products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from jlt.autoencoders.contract import Autoencoder, require_identity
from jlt.autoencoders.coordinates import CoordinateAutoencoder, coordinates_of
from jlt.autoencoders.load import (
    AUTOENCODERS,
    IN_RUN,
    SHARED_SPACES,
    SOURCES_IN_PACKAGE,
    USUAL_PLACES,
    load_autoencoder,
    parse_decoder,
)
from jlt.config import LatentShape, SampleConfig, TrainConfig
from jlt.errors import JLTError, UsageError
from jlt.networks.transformer import build_network, fewest_parameters
from jlt.prediction import clean_from_velocity
from jlt.runtime.environment import require_memory, versions
from jlt.runtime.progress import inform
from jlt.runtime.random_numbers import derive_seed, normal_per_sample
from jlt.sampling.guidance import NOISE_END, Denoiser, guided
from jlt.sampling.labels import labels_for, number_labels
from jlt.sampling.solvers import Noise, network_evaluations, no_noise, solve
from jlt.storage.codec import to_json
from jlt.storage.files import difference, format_difference
from jlt.storage.folders import path_inside
from jlt.storage.weights import require_same_tensors
from jlt.timesteps import sampling_grid
from jlt.training.averages import choose_name, choose_weights
from jlt.training.checkpoint import Checkpoint, open_checkpoint

Observer = Callable[[float, Float[Tensor, "n c h w"], Float[Tensor, "n c h w"]], None]
"""Receives a time of the path, the state z and the clean prediction x^ there."""


@dataclass(frozen=True)
class Start:
    """What numbered images begin with: their noise, their labels, and what a stochastic solver adds at each step."""

    noise: Float[Tensor, "n c h w"]
    labels: Int[Tensor, "n"]
    fresh: Noise = no_noise


@dataclass(frozen=True)
class LatentBatch:
    """Latents of the images `start` to `start + n`, with the labels they were drawn for."""

    start: int
    latents: Float[Tensor, "n c h w"]
    labels: Int[Tensor, "n"]


@dataclass(frozen=True)
class LatentSampler:
    """Draws numbered latents of one shape from a denoiser, and from a guide where there is one."""

    denoiser: Denoiser
    shape: LatentShape
    config: SampleConfig
    device: torch.device | str = "cpu"
    noise_scale: float = 1.0
    guide: Denoiser | None = None

    def batches(self, numbers: Iterable[range] | None = None) -> Iterator[LatentBatch]:
        """Yield a batch for each range of `numbers`; without them all `config.num`, in order.

        JLTError for latents that are not finite.
        """
        for indices in batches_of(self.config.num, self.config.batch_size) if numbers is None else numbers:
            start = self.start(indices)
            latents = self.flow(start)
            if not latents.isfinite().all():
                which = f"{indices[0]} to {indices[-1]}"
                raise JLTError(f"Some of the images {which} are not finite: has training diverged?")
            yield LatentBatch(indices[0], latents, start.labels)

    @torch.inference_mode()
    def start(self, indices: Sequence[int]) -> Start:
        """Return what numbered images begin with."""
        shape, seed = (self.shape.channels, self.shape.height, self.shape.width), self.config.seed

        def draw(purpose: str, *step: int) -> Float[Tensor, "n c h w"]:
            seeds = [derive_seed(seed, purpose, index, *step) for index in indices]
            return self.noise_scale * normal_per_sample(seeds, shape, self.device)

        labels = labels_for(self.config.labels, indices, self.shape.num_classes, seed).to(self.device)
        return Start(draw("image"), labels, lambda step: draw("image step", step))

    @torch.inference_mode()
    def flow(self, start: Start, observe: Observer | None = None) -> Float[Tensor, "n c h w"]:
        """Carry noise to latents; `observe` receives z and x^ (eq. 4) at every time at which the velocity is evaluated.

        Of two stages of a solver at one time, the one on the path itself comes last.
        """
        config = self.config
        velocity = guided(self.denoiser, start.labels, config.cfg_scale, config.cfg_interval, self.guide)

        def observed(z: Float[Tensor, "n c h w"], t: float) -> Float[Tensor, "n c h w"]:
            v = velocity(z, t)
            if observe is not None:
                observe(t, z, clean_from_velocity(v, z, t))
            return v

        with torch.autocast(start.noise.device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
            return solve(config.solver, observed, start.noise, sampling_grid(config), start.fresh)


def batches_of(num: int, batch_size: int) -> list[range]:
    """Return the numbers 0 to num - 1 in consecutive ranges of batch_size; the last may be shorter."""
    return [range(start, min(start + batch_size, num)) for start in range(0, num, batch_size)]


@torch.inference_mode()
def decode_to_uint8(autoencoder: Autoencoder, latents: Float[Tensor, "n c h w"]) -> UInt8[Tensor, "n hh ww 3"]:
    """Decode latents to images with levels 0 to 255, rounded to the nearest."""
    images = autoencoder.decode(latents)
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


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

    def clamped(self, t_eps: float) -> Weights:
        """Return the same network with another clamp of its readout (eq. 3)."""
        return replace(self, denoiser=replace(self.denoiser, t_eps=t_eps))


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
        return map(self.decode, self.latent_batches(numbers))

    def latent_batches(self, numbers: Iterable[range] | None = None) -> Iterator[LatentBatch]:
        """Yield the latents of the same images, on the device."""
        ranges = batches_of(self.config.num, self.config.batch_size) if numbers is None else list(numbers)
        drawn = self.latent_sampler.batches([self.drawn_with(part) for part in ranges])
        for part, batch in zip(ranges, drawn, strict=True):
            yield LatentBatch(batch.start, batch.latents[: len(part)], batch.labels[: len(part)])

    def drawn_with(self, numbers: range) -> range:
        """Return the numbers of the images that are drawn together with these.

        A compiled network would be compiled again for a shorter last batch, which takes longer than to fill it.
        """
        return range(numbers.start, numbers.start + self.config.batch_size) if self.config.compile else numbers

    def decode(self, batch: LatentBatch) -> ImageBatch:
        """Return the images of latents, in host memory."""
        return ImageBatch(batch.start, decode_to_uint8(self.autoencoder, batch.latents).cpu(), batch.labels.cpu())

    @property
    def latent_sampler(self) -> LatentSampler:
        """What draws the latents."""
        guide, scale = self.guide.denoiser if self.guide else None, self.checkpoint.config.noise_scale
        return LatentSampler(self.weights.denoiser, self.shape, self.config, self.device, scale, guide)

    @property
    def shape(self) -> LatentShape:
        """The shape of a latent, and the number of classes."""
        return self.checkpoint.config.network.latent_shape

    @property
    def resolution(self) -> int:
        """Height of the images in pixels."""
        return self.shape.height * self.autoencoder.downsampling

    @property
    def decoder_note(self) -> str:
        """What a picture states of its decoder; empty for the autoencoder that made the latents."""
        return f"decoded by {self.autoencoder.name}" if self.config.decoder else ""

    @property
    def classes(self) -> str:
        """The kind of image source whose classes the labels are."""
        return self.checkpoint.latents["source"]["kind"]

    @property
    def class_names(self) -> list[str]:
        """The names of the classes, empty where the latents came without names."""
        return self.checkpoint.latents.get("class_names") or []

    def class_name(self, label: int) -> str:
        """Return the name of a class, or its number where the latents came without names."""
        names = self.class_names
        return names[label] if label < len(names) else str(label)

    def protocol(self) -> dict[str, Any]:
        """Return everything that decides which images these are; batch sizes and compilation change rounding alone."""
        free = ("num", "batch_size", "compile", "autoguide", "autoguide_ema", "decoder")
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
    """Build the sampler of a checkpoint; its decoder is the one in `config`, or the autoencoder that made its latents.

    Raises JLTError for an unknown EMA or label rule, a damaged checkpoint, a guide of another kind of latents, or an
    autoencoder with other weights.
    """
    config = with_numbered_labels(checkpoint, config)
    check_guidance(checkpoint.config, config)
    guide = None
    if config.autoguided:
        weaker = check_guide(checkpoint, config)
        guide = open_weights(weaker, config.autoguide_ema, device, config.t_eps, config.compile)
    weights = open_weights(checkpoint, config.ema, device, config.t_eps, config.compile)
    identity = checkpoint.latents["autoencoder"]
    autoencoder = matching_autoencoder(identity, autoencoder_path, device, config.decoder, checkpoint.run)
    network, pixels = checkpoint.config.network, 3 * autoencoder.downsampling**2
    # A batch and its noise as latents and as images, in float32.
    values = network.height * network.width * (2 * network.channels + pixels)
    count = min(config.num, config.batch_size)
    require_memory(4 * count * values, f"A batch of {count:,} images")
    return ImageSampler(checkpoint, weights, guide, autoencoder, config, device)


def with_config(sampler: ImageSampler, config: SampleConfig) -> ImageSampler:
    """Return a sampler of the same checkpoint and decoder with other settings, opening only what they change.

    Raises JLTError as `open_sampler` does, which also checks the memory that a batch takes.
    """
    checkpoint, device = sampler.checkpoint, sampler.device

    def changed(*keys: str) -> bool:
        return any(getattr(config, key) != getattr(sampler.config, key) for key in keys)

    config = with_numbered_labels(checkpoint, config)
    check_guidance(checkpoint.config, config)
    weights, guide = sampler.weights, sampler.guide if config.autoguided else None
    if changed("ema", "compile"):
        weights = open_weights(checkpoint, config.ema, device, compiled=config.compile)
    if config.autoguided:
        weaker = check_guide(checkpoint, config)
        if guide is None or changed("autoguide", "autoguide_ema", "compile"):
            guide = open_weights(weaker, config.autoguide_ema, device, compiled=config.compile)
    weights, guide = weights.clamped(config.t_eps), guide and guide.clamped(config.t_eps)
    return replace(sampler, weights=weights, guide=guide, config=config)


def with_numbered_labels(checkpoint: Checkpoint, config: SampleConfig) -> SampleConfig:
    """Return the settings with class numbers for class names, since a protocol records numbers."""
    names = checkpoint.latents.get("class_names") or []
    return replace(config, labels=number_labels(config.labels, names, checkpoint.config.network.num_classes))


def open_weights(checkpoint: Checkpoint, ema: str, device: str, t_eps: float = 0.0, compiled: bool = False) -> Weights:
    """Return a checkpoint's network with the weights that `ema` names (see `choose_weights`), as a denoiser."""
    train = checkpoint.config
    chosen = choose_weights(checkpoint, ema)
    held, fewest = sum(tensor.numel() for tensor in chosen.tensors.values()), fewest_parameters(train.network)
    # Before memory is taken for what a manifest claims.
    if held < fewest:
        raise JLTError(f"{checkpoint.folder} holds {held:,} weights, and its network would have {fewest:,} or more.")
    network = build_network(train.network, seed=0)
    require_same_tensors(checkpoint.folder, chosen.tensors, network.state_dict(), train.name)
    network.load_state_dict(chosen.tensors)
    network.to(device).eval().requires_grad_(False)
    if compiled:
        network.compile(dynamic=False)
    denoiser = Denoiser(network, train.prediction, train.network.num_classes, t_eps)
    rebuilt = {"ema_rebuilt": dict(chosen.rebuilt)} if chosen.rebuilt else {}
    return Weights(denoiser, {"checkpoint": checkpoint.sha256, "ema": chosen.ema, **rebuilt})


def check_guide(checkpoint: Checkpoint, config: SampleConfig) -> Checkpoint:
    """Return the checkpoint of the weaker network of autoguidance.

    JLTError if its latents, classes or noise differ from those of the other, or if both are the same weights.
    """
    guide = open_checkpoint(Path(config.autoguide)) if config.autoguide else checkpoint
    mine, theirs = (_sampled_space(side) for side in (checkpoint, guide))
    if differences := difference(mine, theirs):
        raise JLTError(f"{guide.folder} cannot guide, since it draws other latents: {format_difference(differences)}.")
    guide_ema, mine_ema = choose_name(guide, config.autoguide_ema), choose_name(checkpoint, config.ema)
    if guide.sha256 == checkpoint.sha256 and guide_ema == mine_ema:
        raise UsageError(f"A network cannot guide itself: name weaker weights than {mine_ema} with --autoguide-ema.")
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
        raise UsageError("A guide has no effect at cfg_scale 1: choose another scale with --cfg-scale.")
    if config.cfg_scale != 1 and train.label_dropout == 0 and not config.autoguided:
        raise JLTError(
            "This network was trained without dropping labels (label_dropout 0): guidance needs its null class."
        )


HERE = Path()


def matching_autoencoder(
    identity: dict[str, Any], path: str | None, device: str, decoder: str | None = None, folder: Path = HERE
) -> Autoencoder:
    """Load the autoencoder that made some latents, from `path` or from where it was loaded when it made them.

    `folder` is that of the store or run that records the identity: files that it holds itself are named inside it. An
    autoencoder whose recorded folder is gone is loaded from its usual place, where it has one. `decoder` names
    another one of the same latent space, or the same one in another place: NAME or NAME:PLACE.

    JLTError if its weights, normalisation or sizes are others. Adopted latents record no weights: any autoencoder of
    the right sizes is accepted, and a message reports it.
    """
    require_identity(identity)
    name, source = identity["name"], identity["source"]
    if decoder:
        other, place = parse_decoder(decoder)
        if path and place:
            raise UsageError(f"The place of the decoder is named twice: {place} in --decoder, {path}.")
        path = path or place
        if other != name:
            return _other_decoder(identity, folder, other, path, device)
    if source.startswith(IN_RUN) and not path:
        autoencoder = load_autoencoder(name, str(path_inside(folder, source)), device)
        autoencoder.source = source
    else:
        gone = Path(source).is_absolute() and not Path(source).exists()
        usual = source in SOURCES_IN_PACKAGE or (gone and name in USUAL_PLACES)
        autoencoder = load_autoencoder(name, path or (None if usual else source), device)
    if coordinates := coordinates_of(identity):
        autoencoder = CoordinateAutoencoder(autoencoder, folder, coordinates)
    found = autoencoder.identity()
    decisive = ["channels", "downsampling"]
    if identity["weights_sha256"] is None and found["weights_sha256"] is not None:
        unchecked = f"those from {found['source']} decode them unchecked."
        inform(f"The latents record no weights of their autoencoder: {unchecked}")
    else:
        decisive = ["weights_sha256", "normalisation", *decisive]
    for key in decisive:
        if found[key] != identity[key]:
            raise JLTError(
                f"The latents were made by the autoencoder {name!r} with {key} {identity[key]}, "
                f"the one from {found['source']} has {found[key]}: name the right one with --autoencoder-path."
            )
    return autoencoder


def _other_decoder(identity: dict[str, Any], folder: Path, name: str, path: str | None, device: str) -> Autoencoder:
    """Load an autoencoder that decodes the latents of another one; JLTError unless they share a latent space."""
    if name in AUTOENCODERS and not any({name, identity["name"]} <= space for space in SHARED_SPACES):
        raise JLTError(f"{name} cannot decode latents of {identity['name']}, which are of another latent space.")
    decoder = load_autoencoder(name, path, device)
    for key in ("channels", "downsampling"):
        if decoder.identity()[key] != identity[key]:
            raise JLTError(f"{name} has {key} {decoder.identity()[key]}, the latents have {identity[key]}.")
    coordinates = coordinates_of(identity)
    return CoordinateAutoencoder(decoder, folder, coordinates) if coordinates else decoder
