"""Names of systems and recipes: named functions from the shape of a latent space to a resolved training run.

JLT-B/1 predicts x with the base network at patch 1; DiT-B/1 is the same network predicting v.

All systems of a family differ in the prediction and the patch size and in nothing else. The loss is the matched one
(eq. 5); the authors' own is `--loss.weighting published`, and their script's times for velocity prediction
`--timesteps.P-mean 0 --timesteps.P-std 1`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from jlt.config import (
    FLUX2_IMAGENET256,
    NAMED,
    LatentShape,
    LossSpace,
    NetworkConfig,
    OptimizerConfig,
    Prediction,
    SampleConfig,
    TrainConfig,
)
from jlt.errors import JLTError, UsageError, unknown_name
from jlt.networks.sizes import SIZES, size_name, sized_network
from jlt.results.run import LOG
from jlt.storage.codec import from_json
from jlt.storage.files import read_json, read_marker, without_seal


@dataclass(frozen=True)
class Recipe:
    """A training as a function of the shape of its latents, with the shape and the number it was made for."""

    make: Callable[[LatentShape], TrainConfig]
    latents: LatentShape
    images: int
    purpose: str
    """What it is for, in short."""


FAMILIES: dict[Prediction, str] = {"x": "JLT", "v": "DiT"}
"""The two names of Fu et al. 2026; other predictions are named in the name, as in DiT-eps."""
PATCH_SIZES = (1, 2, 4)


def system_name(prediction: Prediction, size: str, patch_size: int) -> str:
    """Return the name of a prediction with a network's size and patch."""
    return f"{FAMILIES.get(prediction, f'DiT-{prediction}')}-{size}/{patch_size}"


def preset(name: str, latents: LatentShape = FLUX2_IMAGENET256) -> tuple[Prediction, NetworkConfig]:
    """Return prediction and network of a name such as `JLT-B/1`, for latents of a shape; JLTError for unknown names."""
    systems = {system_name(*point): point for point in itertools.product(NAMED, SIZES, PATCH_SIZES)}
    if name not in systems:
        raise unknown_name("network", name, systems)
    prediction, size, patch_size = systems[name]
    return prediction, sized_network(size, patch_size, latents)


def preset_config(name: str, **settings: Any) -> TrainConfig:
    """Return a training of a named network, such as `JLT-B/1`; UsageError for an unknown name."""
    prediction, network = preset(name)
    return TrainConfig(name=name, prediction=prediction, network=network, flips=True, **settings)


def imagenet256(prediction: Prediction, size: str, patch_size: int, latents: LatentShape) -> TrainConfig:
    """Return the published recipe: 250K steps at batch 1024, constant learning rate after 5 epochs of warm-up."""
    batch_size = 1024
    return TrainConfig(
        name=system_name(prediction, size, patch_size),
        prediction=prediction,
        network=sized_network(size, patch_size, latents),
        optimizer=OptimizerConfig(learning_rate=5e-5 * batch_size / 256, warmup_epochs=5),
        batch_size=batch_size,
        steps=250_000,
        flips=True,
    )


def digits(prediction: Prediction, patch_size: int, latents: LatentShape) -> TrainConfig:
    """Return the recipe of the quickstart: minutes on two CPU cores, the same for every prediction."""
    return TrainConfig(
        name=system_name(prediction, "XS", patch_size),
        prediction=prediction,
        network=sized_network("XS", patch_size, latents),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=50),
        batch_size=64,
        steps=1500,
        ema=(0.99,),
        precision="float32",
        log_every=50,
        checkpoint_every=250,
        keep_last=0,
        snapshot_every=100,
    )


@dataclass(frozen=True)
class Scale:
    """Size of the network, batch, length and learning rate that a resolution can afford."""

    size: str
    batch_size: int
    steps: int
    learning_rate: float


IMAGENETTE = {
    64: Scale("T", batch_size=64, steps=2000, learning_rate=5e-4),
    128: Scale("T", batch_size=64, steps=8000, learning_rate=5e-4),
    256: Scale("B", batch_size=256, steps=4000, learning_rate=2e-4),
}
"""By side of the images in pixels: the first two are for two CPU cores, the last is for a GPU."""


def imagenette(resolution: int, prediction: Prediction, patch_size: int, latents: LatentShape) -> TrainConfig:
    """Return the recipe of Imagenette's photographs at a resolution in `IMAGENETTE`."""
    scale = IMAGENETTE[resolution]
    return TrainConfig(
        name=system_name(prediction, scale.size, patch_size),
        prediction=prediction,
        network=sized_network(scale.size, patch_size, latents),
        optimizer=OptimizerConfig(learning_rate=scale.learning_rate, warmup_steps=100),
        batch_size=scale.batch_size,
        steps=scale.steps,
        flips=True,
        ema=(0.995, 0.999),
        precision="float32" if scale.size == "T" else "bfloat16",
        log_every=50,
        checkpoint_every=1000,
        snapshot_every=500,
    )


def photographs(scale: Scale, patch_size: int, latents: LatentShape) -> TrainConfig:
    """Return the recipe for the user's own photographs at a scale that the user's machine can afford."""
    gpu = scale.size != "T"
    return TrainConfig(
        name=system_name("x", scale.size, patch_size),
        prediction="x",
        network=sized_network(scale.size, patch_size, latents),
        optimizer=OptimizerConfig(learning_rate=scale.learning_rate, warmup_steps=200),
        batch_size=scale.batch_size,
        # At 256 pixels half of the batch is estimated to take 11 GiB.
        accumulation=2 if gpu else 0,
        steps=scale.steps,
        flips=True,
        ema=(0.999, 0.9999) if gpu else (0.995, 0.999),
        precision="bfloat16" if gpu else "float32",
        log_every=50,
        checkpoint_every=1000,
        snapshot_every=500,
    )


YOUR_PHOTOGRAPHS = LatentShape(128, 16, 16, num_classes=10)
"""FLUX.2's latents at 256 pixels, of which `jlt plan` estimates."""
ONE_GPU = Scale("S", batch_size=256, steps=20_000, learning_rate=2e-4)
LAPTOP = Scale("T", batch_size=64, steps=4000, learning_rate=5e-4)
PUBLISHED: list[tuple[Prediction, str, int]] = [
    (prediction, size, patch_size) for size in ("B", "L") for patch_size in (1, 2) for prediction in ("x", "v")
]
RECIPES = {
    "digits": Recipe(partial(digits, "x", 1), LatentShape(16, 4, 4, 10), 1_797, "the bundled digits, minutes on a CPU"),
    "laptop": Recipe(partial(photographs, LAPTOP, 2), YOUR_PHOTOGRAPHS, 10_000, "your photographs, without a GPU"),
    "photos": Recipe(partial(photographs, ONE_GPU, 1), YOUR_PHOTOGRAPHS, 10_000, "your photographs, on one GPU"),
    **{
        f"imagenet256-{system_name(*run).lower().replace('/', '')}": Recipe(
            partial(imagenet256, *run), FLUX2_IMAGENET256, 1_281_167, f"ImageNet at 256 px, {system_name(*run)}"
        )
        for run in PUBLISHED
    },
    **{
        f"imagenette{side}": Recipe(
            partial(imagenette, side, "x", 1),
            LatentShape(128, side // 16, side // 16, num_classes=10),
            9_469,
            f"Imagenette at {side} px, JLT-{scale.size}/1",
        )
        for side, scale in IMAGENETTE.items()
    },
}


def resolve_recipe(name: str, latents: LatentShape | None = None) -> TrainConfig:
    """Return a recipe's run for latents of a shape, by default those that it was made for; JLTError for unknown names.

    The `config.json` of a run is a recipe too: it returns that run, for any latents.
    """
    if name.endswith(".json"):
        recorded = _recorded(Path(name))
        try:
            return from_json(TrainConfig, {key: value for key, value in recorded.items() if key != "latents"})
        except JLTError as error:
            raise JLTError(f"{name} is no recipe: {error}") from error
    if name not in RECIPES:
        raise unknown_name("recipe", name, RECIPES)
    recipe = RECIPES[name]
    return recipe.make(latents or recipe.latents)


def images_of_recipe(name: str) -> int:
    """Return the number of latents that a recipe was made for."""
    if name.endswith(".json"):
        latents = _recorded(Path(name)).get("latents")
        count = latents.get("count") if isinstance(latents, dict) else None
        if type(count) is not int:
            raise JLTError(
                f"{name} does not say how many latents there are, as that of an imported run: name some with --latents."
            )
        return count
    return RECIPES[name].images


def _recorded(path: Path) -> dict[str, Any]:
    """Return the content of a run's `config.json`; a copy outside of the run may be edited, so it needs no seal."""
    in_run = (path.parent / LOG).exists() or (path.parent / "checkpoints").is_dir()
    return read_marker(path)[0] if in_run else without_seal(read_json(path))


def vary(
    base: TrainConfig,
    prediction: Prediction,
    loss_space: LossSpace,
    patch_size: int,
    seed: int,
    point: Mapping[str, Any] = MappingProxyType({}),
) -> TrainConfig:
    """Return a run that differs from `base` in the axes of an ablation and in nothing else.

    `point` may name a width, a weighting and a distribution of times. A network of another width has heads of the same
    size; JLTError for a width that is no multiple of it.
    """
    network = dataclasses.replace(base.network, patch_size=patch_size)
    if (width := point.get("width")) is not None:
        head = network.hidden_size // network.num_heads
        if width < head or width % head:
            raise UsageError(f"A width of {width} is no multiple of the {head} values of a head.")
        network = dataclasses.replace(network, hidden_size=width, num_heads=width // head)
    weighting, distribution = point.get("weighting"), point.get("times")
    varied = dataclasses.replace(
        base,
        prediction=prediction,
        network=network,
        loss=dataclasses.replace(base.loss, space=loss_space, weighting=weighting or base.loss.weighting),
        timesteps=dataclasses.replace(base.timesteps, distribution=distribution or base.timesteps.distribution),
        seed=seed,
    )
    return renamed(varied)


def renamed(config: TrainConfig) -> TrainConfig:
    """Return the run with the name that its prediction, size and patch give it."""
    network = config.network
    return dataclasses.replace(config, name=system_name(config.prediction, size_name(network), network.patch_size))


DIGITS_SAMPLING = SampleConfig(num=1000, steps=20, solver="heun", batch_size=100)
"""The sampling of the quickstart: without guidance, equal counts per class."""
