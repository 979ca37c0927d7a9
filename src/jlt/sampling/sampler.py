"""A checkpoint, an autoencoder and a sampling configuration as one thing that yields images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Int, UInt8
from torch import Tensor

from jlt.autoencoders.contract import Autoencoder
from jlt.autoencoders.registry import SOURCES_IN_PACKAGE, USUAL_PLACES, load_autoencoder
from jlt.config import SampleConfig, TrainConfig, to_dict
from jlt.errors import JLTError
from jlt.networks.transformer import build_network
from jlt.progress import say
from jlt.protocol import versions
from jlt.sampling.generate import decode_to_uint8, labels_for, sample_latents
from jlt.sampling.guidance import NOISE_END, Denoiser
from jlt.training.averages import choose_weights
from jlt.training.checkpoint import Checkpoint


@dataclass(frozen=True)
class ImageBatch:
    """Decoded images `start` to `start + n`, with the labels they were drawn for."""

    start: int
    images: UInt8[Tensor, "n hh ww 3"]
    labels: Int[Tensor, "n"]


@dataclass(frozen=True)
class ImageSampler:
    """Draws the numbered images of one protocol."""

    checkpoint: Checkpoint
    denoiser: Denoiser
    autoencoder: Autoencoder
    config: SampleConfig
    ema: Mapping[str, Any]
    """What a protocol says of the weights: the words that name them and, where they were rebuilt, what from."""
    device: str

    def batches(self, done: Callable[[range], bool] | None = None) -> Iterator[ImageBatch]:
        """Yield exactly `config.num` images, in order, but for batches whose numbers `done` answers for."""
        network, train = self.checkpoint.config.network, self.checkpoint.config
        shape = (network.channels, network.height, network.width)
        for batch in sample_latents(
            self.denoiser, shape, network.num_classes, self.config, self.device, train.noise_scale, done
        ):
            images = decode_to_uint8(self.autoencoder, batch.latents)
            yield ImageBatch(batch.start, images.cpu(), batch.labels.cpu())

    @property
    def resolution(self) -> int:
        """Height of the images in pixels."""
        return self.checkpoint.config.network.height * self.autoencoder.downsampling

    def protocol(self) -> dict[str, Any]:
        """Return everything that decides which images these are; batch sizes move them by float rounding alone."""
        settings = {key: value for key, value in to_dict(self.config).items() if key not in ("num", "batch_size")}
        return {
            "checkpoint": self.checkpoint.sha256,
            **settings,
            "eps_first_time": NOISE_END,
            **self.ema,
            "count": self.config.num,
            "device": self.device,
            "autoencoder": self.autoencoder.identity(),
            "versions": versions(),
        }


def open_sampler(
    checkpoint: Checkpoint, config: SampleConfig, device: str = "cpu", autoencoder_path: str | None = None
) -> ImageSampler:
    """Build the sampler of a checkpoint with the autoencoder that its latents came from.

    Raises JLTError for an unknown EMA or label rule, a damaged checkpoint, or an autoencoder with other weights.
    """
    train = checkpoint.config
    check_guidance(train, config)
    chosen = choose_weights(checkpoint, config.ema)
    network = build_network(train.network, seed=0)
    network.load_state_dict(chosen.tensors)
    network.to(device).eval().requires_grad_(False)
    denoiser = Denoiser(network, train.prediction, train.network.num_classes, config.t_eps)
    autoencoder = matching_autoencoder(checkpoint.latents["autoencoder"], autoencoder_path, device)
    ema = {"ema": chosen.ema} | ({"ema_rebuilt": dict(chosen.rebuilt)} if chosen.rebuilt else {})
    return ImageSampler(checkpoint, denoiser, autoencoder, config, ema, device)


def check_guidance(train: TrainConfig, config: SampleConfig) -> None:
    """Raise a JLTError for labels that a run's network does not know, and guidance that it was not trained for."""
    labels_for(config.labels, range(1), train.network.num_classes, config.seed)
    if config.cfg_scale != 1 and train.label_dropout == 0:
        raise JLTError(
            "This network was trained without dropping labels (label_dropout 0): guidance needs its null class."
        )


def matching_autoencoder(identity: dict[str, Any], path: str | None, device: str) -> Autoencoder:
    """Load the autoencoder that made some latents, from `path` or from where it was loaded when it made them.

    JLTError if what is found decodes otherwise: by its weights, its normalisation or its sizes. Latents that were
    adopted name no weights: any of the right sizes are taken, and a line says so.
    """
    autoencoder = load_autoencoder(identity["name"], path or _recorded_place(identity), device)
    found = autoencoder.identity()
    decisive = ["channels", "downsampling"]
    if identity["weights_sha256"] is None and found["weights_sha256"] is not None:
        say(f"The latents name no weights of their autoencoder: those from {found['source']} decode them unchecked.")
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
    """Return the folder or Hub id of an identity; None, the usual place, if it is none or a folder that is gone."""
    name, source = identity["name"], identity["source"]
    gone = Path(source).is_absolute() and not Path(source).exists()
    if source in SOURCES_IN_PACKAGE or (gone and name in USUAL_PLACES):
        return None
    return source
