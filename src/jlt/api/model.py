"""A trained network to draw images with, and to look into: `jlt.load`."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TypedDict, Unpack

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor, nn

from jlt.api.images import Images, to_pil
from jlt.config import (
    SAMPLERS,
    InferencePrecision,
    LatentShape,
    NamedSampler,
    Prediction,
    SampleConfig,
    Solver,
    TrainConfig,
)
from jlt.errors import JLTError, UsageError, unknown_name
from jlt.images.crop import centre_crop
from jlt.interop.sources import open_source
from jlt.prediction import clean_from_velocity
from jlt.results.evaluation import Evaluation
from jlt.results.files import read_result
from jlt.results.run import evaluation_files
from jlt.runtime.environment import machine_memory, usable_device
from jlt.sampling.labels import RULES, class_number, readable_names
from jlt.sampling.sampler import (
    ImageSampler,
    Weights,
    decode_to_uint8,
    matching_autoencoder,
    open_weights,
    with_config,
)
from jlt.storage.codec import from_json
from jlt.training.checkpoint import Checkpoint

Label = int | str | np.integer
"""A class by its number or its name."""
Labels = Label | Sequence[Label] | Int[Tensor, "..."] | Int[np.ndarray, "..."]
"""One class, or several."""


class SampleSettings(TypedDict, total=False):
    """The settings of `jlt.config.SampleConfig` that `Model.sample` takes by keyword, for type checkers."""

    solver: Solver
    steps: int
    shift: float
    grid: tuple[float, ...]
    cfg_scale: float
    cfg_interval: tuple[float, float]
    autoguide: str
    autoguide_ema: str
    t_eps: float
    seed: int
    ema: str
    decoder: str | None
    batch_size: int
    precision: InferencePrecision
    compile: bool
    sampler: NamedSampler | None


def _without_names(settings: SampleSettings) -> dict[str, object]:
    """Return settings with those that a named sampler stands for; UsageError for both, and for an unknown name."""
    plain: dict[str, object] = {**settings}
    sampler = plain.pop("sampler", None)
    if sampler is None:
        return plain
    if sampler not in SAMPLERS:
        raise unknown_name("sampler", str(sampler), SAMPLERS)
    if twice := SAMPLERS[sampler].keys() & plain.keys():
        raise UsageError(f"The sampler {sampler!r} sets {', '.join(sorted(twice))}, too: leave one of them out.")
    return {**plain, **SAMPLERS[sampler]}


def load(
    source: str | os.PathLike[str],
    *,
    ema: str = "",
    device: str | None = None,
    autoencoder_path: str | None = None,
) -> Model:
    """Open a run folder (its newest checkpoint), a checkpoint folder, or what `jlt export` wrote.

    `hub:user/name` is an exported folder on the Hub. An export becomes a run in the cache first ($JLT_CACHE, or
    ~/.cache/jlt), which needs its size on the disk once more.

    `ema` names the weights, as `jlt sample --ema` does: a stored average (`"0.9999"`), a length to rebuild
    (`"sigma_rel=0.07"`), or `"none"`; the default is the run's first average. The device is a GPU if there is one. The
    autoencoder is opened when it is needed: the one that made the latents, or the same one from `autoencoder_path`.

    Raises JLTError for a folder without a complete checkpoint, a damaged file, an unknown average and a device that
    this machine does not have.
    """
    checkpoint, device = open_source(source), usable_device(device)
    return Model(checkpoint, open_weights(checkpoint, ema, device), ema, device, autoencoder_path)


class Model:
    """A network with the weights of one checkpoint. Make one with `jlt.load`."""

    def __init__(
        self, checkpoint: Checkpoint, weights: Weights, ema: str, device: str, autoencoder_path: str | None = None
    ) -> None:
        self.checkpoint, self.device = checkpoint, device
        self._weights, self._ema = weights, ema
        identity = dict(checkpoint.latents["autoencoder"])
        self._autoencoder = functools.cache(
            lambda decoder: matching_autoencoder(identity, autoencoder_path, device, decoder, checkpoint.run)
        )
        self._latest: ImageSampler | None = None

    def __repr__(self) -> str:
        size = "x".join(map(str, (self.shape.channels, self.shape.height, self.shape.width)))
        step = f"step {self.checkpoint.step:,}, weights {self._weights.identity['ema']}"
        return f"<{self.config.name} predicts {self.prediction}: {step}, latents {size}, {len(self.classes)} classes>"

    def sample(self, labels: Labels = "equal", num: int | None = None, **settings: Unpack[SampleSettings]) -> Images:
        """Draw images: the same ones as `jlt sample` draws with the same settings, bit for bit.

        `labels` is a class, a sequence of classes, or one of the rules `"equal"` (counts per class) and `"random"`. A
        class is a number or a name, as in `["tench", 217]`. `num` is the number of images: by default one for each
        class given, and 64 by a rule; a sequence repeats. The other settings are those of `jlt.config.SampleConfig`.
        Image i of a seed has the same noise for any number of images; other batch sizes may move its last digits.

        What is open stays open: only another `ema`, autoguide or decoder reads files again.

        Raises UsageError for an unknown class or setting, with the nearest name; JLTError for a value out of range,
        guidance of a network without a null class, images that do not fit the memory, and an autoencoder that is not
        available.
        """
        given: dict[str, object] = {"ema": self._ema, **_without_names(settings)}
        if isinstance(labels, str) and labels in RULES:
            given["labels"] = labels
        else:
            numbers = self._class_numbers(labels, RULES)
            if not numbers:
                raise UsageError("labels is empty: name at least one class, or a rule.")
            given |= {"labels": ",".join(map(str, numbers)), "num": len(numbers)}
        if num is not None:
            given["num"] = num
        plain = {name: value.item() if isinstance(value, np.generic) else value for name, value in given.items()}
        config = from_json(SampleConfig, plain)
        self._require_memory(config.num)
        sampler = self.sampler(config)
        drawn = [(sampler.decode(batch), batch.latents.float().cpu()) for batch in sampler.latent_batches()]
        pixels, latents = torch.cat([images.images for images, _ in drawn]), torch.cat([part for _, part in drawn])
        return Images(pixels, latents, torch.cat([images.labels for images, _ in drawn]), sampler)

    def denoise(
        self,
        z: Float[Tensor, "n c h w"],
        t: float | Float[Tensor, " n"],
        labels: Labels | None,
    ) -> Float[Tensor, "n c h w"]:
        """Return the clean prediction x^ (eq. 4) of noisy latents z at time t, on the model's device.

        `t` in [0, 1) is one time, or one for each latent. `labels` is a class for all, or one for each; None is the
        null class of guidance. Gradients reach z where it requires them. UsageError for other shapes or times, and for
        an unknown class.
        """
        z, times, numbers = self._batch(z, t, labels)
        return clean_from_velocity(self._weights.denoiser.velocity(z, times, numbers), z, times)

    def velocity(
        self,
        z: Float[Tensor, "n c h w"],
        t: float | Float[Tensor, " n"],
        labels: Labels | None,
    ) -> Float[Tensor, "n c h w"]:
        """Return the velocity v^ that follows from the network's output (eq. 3); arguments as for `denoise`."""
        return self._weights.denoiser.velocity(*self._batch(z, t, labels))

    def decode(self, latents: Float[Tensor, "n c h w"], decoder: str | None = None) -> list[Image.Image]:
        """Return the images of latents, such as a clean prediction; `decoder` is that of `SampleConfig`."""
        return to_pil(decode_to_uint8(self._autoencoder(decoder), self._checked(latents)))

    def encode(self, images: Image.Image | Sequence[Image.Image]) -> Float[Tensor, "n c h w"]:
        """Return the normalised latents of images, float32 on the model's device, by the autoencoder of the training.

        Each image is scaled and cropped to `resolution` as `jlt encode` does. JLTError for an image that cannot be
        cropped, and for an autoencoder that is not available; UsageError for what is no image of PIL.
        """
        listed = list(images) if isinstance(images, Iterable) else [images]
        if not listed:
            raise UsageError("There are no images to encode: name at least one.")
        if not all(isinstance(image, Image.Image) for image in listed):
            raise UsageError("Images to encode are of PIL: open a file with PIL.Image.open.")
        pixels = torch.from_numpy(np.stack([centre_crop(image, self.resolution) for image in listed]))
        # Where a latent is drawn from a distribution, image i has the noise of seed i.
        return self._autoencoder(None).encode(pixels.permute(0, 3, 1, 2) / 127.5 - 1, range(len(listed)))

    def class_number(self, label: Label) -> int:
        """Return the number of a class from its number or name; UsageError with the nearest name for an unknown one."""
        return class_number(label, self._stored_names, self.shape.num_classes)

    @property
    def config(self) -> TrainConfig:
        """Every setting of the training."""
        return self.checkpoint.config

    @property
    def prediction(self) -> Prediction:
        """What the network outputs: x, eps, v, or another member of their lines (eq. 2)."""
        return self.config.prediction

    @property
    def network(self) -> nn.Module:
        """The network, which maps (z, t, class numbers) to its prediction."""
        return self._weights.denoiser.network

    @property
    def classes(self) -> list[str]:
        """The names of the classes, or their numbers where the latents came without names."""
        count = self.shape.num_classes
        return list(readable_names(self._stored_names, count)) or list(map(str, range(count)))

    @property
    def shape(self) -> LatentShape:
        """The shape of a latent, and the number of classes."""
        return self.config.network.latent_shape

    @property
    def resolution(self) -> int:
        """Height of the images in pixels."""
        return self.shape.height * int(self.checkpoint.latents["autoencoder"]["downsampling"])

    @property
    def evaluations(self) -> list[Evaluation]:
        """The evaluations in the run's folder with their protocols, by step."""
        found = [read_result(Evaluation, path) for path in evaluation_files(self.checkpoint.run)]
        return sorted(found, key=lambda evaluation: evaluation.step or 0)

    @property
    def _stored_names(self) -> list[str]:
        return self.checkpoint.latents.get("class_names") or []

    def sampler(self, config: SampleConfig) -> ImageSampler:
        """Return a sampler with these settings that shares what is open; JLTError as for `sample`."""
        loaded = SampleConfig(ema=self._ema)
        opened = self._latest
        if opened is None or (config.ema == self._ema and opened.config.ema != self._ema):
            opened = ImageSampler(self.checkpoint, self._weights, None, self._autoencoder(None), loaded, self.device)
        self._latest = replace(with_config(opened, config), autoencoder=self._autoencoder(config.decoder))
        return self._latest

    def _batch(
        self,
        z: Float[Tensor, "n c h w"],
        t: float | Float[Tensor, " n"],
        labels: Labels | None,
    ) -> tuple[Float[Tensor, "n c h w"], Float[Tensor, " n"], Int[Tensor, " n"]]:
        """Return latents, times and class numbers of one batch on the device."""
        z = self._checked(z)
        count = len(z)
        times = torch.as_tensor(t, dtype=torch.float32, device=self.device)
        if times.shape not in ((), (count,)) or not ((times >= 0) & (times < 1)).all():
            raise UsageError("t must be one time, or one for each latent, in [0, 1): at t = 1 z is the data itself.")
        if labels is None:
            if self.config.label_dropout == 0:
                raise UsageError("This network was trained without dropping labels (label_dropout 0): name a class.")
            numbers = [self._weights.denoiser.null_label]
        else:
            numbers = self._class_numbers(labels)
        if len(numbers) not in (1, count):
            raise UsageError(f"There are {len(numbers)} labels for {count} latents: give one for all, or one for each.")
        return z, times.expand(count), torch.tensor(numbers, device=self.device).expand(count)

    def _checked(self, latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """Return latents in float32 on the device; UsageError for another shape than the network's."""
        latents, shape = torch.as_tensor(latents), (self.shape.channels, self.shape.height, self.shape.width)
        if latents.ndim != 4 or latents.shape[1:] != shape or not len(latents):
            found = tuple(latents.shape)
            raise UsageError(f"Latents of this network are (n, {', '.join(map(str, shape))}), n > 0, not {found}.")
        return latents.to(self.device, torch.float32)

    def _class_numbers(self, labels: Labels, rules: Sequence[str] = ()) -> list[int]:
        """Return the number of each class; an unknown name is an error that offers `rules`, too."""
        listed = labels.tolist() if isinstance(labels, (Tensor, np.ndarray, np.generic)) else labels
        if isinstance(listed, str) or not isinstance(listed, Iterable):
            listed = [listed]
        return [class_number(label, self._stored_names, self.shape.num_classes, rules) for label in listed]

    def _require_memory(self, num: int) -> None:
        """Raise JLTError for more images than the memory of this machine holds with their latents."""
        latent = self.shape.channels * self.shape.height * self.shape.width
        most = machine_memory() // (latent * 4 + self.resolution**2 * 3)
        if num > most:
            raise JLTError(
                f"{num:,} images do not fit the memory of this machine, {most:,} would: "
                "draw fewer in a call, with another seed in each."
            )
