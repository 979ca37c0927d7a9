"""A pipeline of diffusers for the transformers of JLT: class labels to images, without jlt.

    from diffusers import DiffusionPipeline
    pipe = DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)
    pipe([3, 7], guidance_scale=2.0, guidance_interval=(0.1, 1.0)).images[0].save("3.png")

z = t x + (1-t) eps is the noisy latent at time t, from noise (t = 0) to data (t = 1). A solver walks from the one to
the other along the velocity x - eps, which is read out of the network's output. No scheduler is involved.
"""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin
from diffusers.utils.torch_utils import randn_tensor
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from jlt.autoencoders.pretrained import normalisation_of
from jlt.config import Solver
from jlt.runtime.random_numbers import derive_seed, normal_per_sample
from jlt.sampling.guidance import Denoiser, guided
from jlt.sampling.solvers import SOLVERS, State, solve
from jlt.storage.weights import weights_sha256
from jlt.timesteps import uniform_grid

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
Generators = torch.Generator | list[torch.Generator] | None


class JLTPipeline(DiffusionPipeline):
    """Draws images of classes.

    `transformer` predicts what `prediction` names, such as the clean latent x or the velocity v. `vae` decodes
    latents; where it is None, the autoencoder that `autoencoder` describes is loaded for the first image.
    `noise_scale` is the standard deviation of the noise, `id2label` holds the names of the classes, and `training` how
    the weights were made.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components: ClassVar[list[str]] = ["vae"]

    def __init__(
        self,
        transformer: ModelMixin,
        vae: ModelMixin | None = None,
        prediction: str = "x",
        noise_scale: float = 1.0,
        id2label: dict[str, str] | None = None,
        autoencoder: dict[str, Any] | None = None,
        training: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae)
        self.register_to_config(
            prediction=prediction,
            noise_scale=noise_scale,
            id2label=id2label or {},
            autoencoder=autoencoder or {},
            training=training or {},
        )

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str],
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        solver: Solver = "heun",
        seed: int = 0,
        generator: Generators = None,
        output_type: str = "pil",
        callback_on_step_end: Callable[[Any, int, float, dict[str, Any]], dict[str, Any] | None] | None = None,
        return_dict: bool = True,
        first_number: int = 0,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Return an image for each label.

        `class_labels` are numbers or names of classes. Image i of a `seed` is image i of `jlt sample` with that seed
        on the same kind of device, whatever else is drawn; `first_number` is the number of the first image. A
        `generator` of torch, or one for each image, draws the noise in its place. Guidance of `guidance_scale`, where
        1 is none, applies at times in `guidance_interval`. `solver` is euler, heun, midpoint, dpmpp_2m or ancestral.
        `output_type` is pil, np or pt (images in [0, 1]) or latent. `callback_on_step_end` receives the pipeline, the
        number of the step, its time and {"latents": z}; it may return another z under that name.
        ValueError for an argument that is out of range.
        """
        labels = label_numbers(class_labels, self.config.id2label, self.transformer.config.num_classes)
        check_arguments(num_inference_steps, guidance_interval, solver, output_type)
        if guidance_scale != 1 and self.config.training.get("label_dropout") == 0:
            raise ValueError("This network was trained without dropping labels: guidance needs its null class.")
        device, count = self._execution_device, len(labels)
        shape = [getattr(self.transformer.config, side) for side in ("channels", "height", "width")]

        def noise(*purpose: Any) -> State:
            if generator is not None:
                normal = randn_tensor((count, *shape), generator=generator, device=device, dtype=torch.float32)
            else:
                name, *step = purpose
                numbers = range(first_number, first_number + count)
                normal = normal_per_sample([derive_seed(seed, name, i, *step) for i in numbers], shape, device)
            return self.config.noise_scale * normal

        denoiser = Denoiser(self.transformer, self.config.prediction, self.transformer.config.num_classes)
        classes = torch.tensor(labels, device=device)
        velocity = guided(denoiser, classes, guidance_scale, guidance_interval)
        grid = uniform_grid(num_inference_steps).tolist()

        with self.progress_bar(total=num_inference_steps) as bar:

            def step_end(number: int, z: State) -> State:
                bar.update()
                if callback_on_step_end is None:
                    return z
                return (callback_on_step_end(self, number, grid[number], {"latents": z}) or {}).get("latents", z)

            latents = solve(solver, velocity, noise("image"), grid, lambda k: noise("image step", k), step_end)

        images = latents if output_type == "latent" else as_type(self.decode(latents), output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 3 hh ww"]:
        """Return the float32 images of latents, in [-1, 1]; the normalisation of the latents is undone first."""
        described = self.config.autoencoder
        if described["class"] == "PixelAutoencoder":
            return latents.clamp(-1, 1)
        if self.vae is None:
            vae = load_autoencoder(described)
            self.register_modules(vae=vae.to(self._execution_device, self.transformer.dtype))
        vae, z = self.vae, latents.float()
        # TAEF2 decodes normalised latents.
        if described["class"] != "TAEF2":
            z = normalisation_of(vae, described["class"]).undo(z)
        z = z.to(vae.dtype).contiguous(memory_format=torch.channels_last)
        return vae.decode(z).sample.float().clamp(-1, 1)

    def save_config(self, save_directory: str, push_to_hub: bool = False, **kwargs: Any) -> None:  # noqa: ARG002
        """Write `model_index.json`, and the code that a folder needs to be loaded again."""
        super().save_config(save_directory)
        path = Path(save_directory, self.config_name)
        index = json.loads(path.read_text(encoding="utf-8"))
        index["_class_name"] = copy_code(self, path.parent)
        for name in ("transformer", "vae"):
            part = getattr(self, name)
            if part is not None and not type(part).__module__.startswith("diffusers."):
                index[name] = copy_code(part, path.parent / name)
        # The place that this pipeline was loaded from is of no use elsewhere.
        index.pop("_name_or_path", None)
        path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def label_numbers(labels: int | str | Sequence[int | str], names: Mapping[str, str], num_classes: int) -> list[int]:
    """Return the numbers of classes that are given as numbers or names; ValueError for those that do not exist.

    A name is that of `names` or one of its synonyms, which commas separate, in any case; the whole name goes before
    the first synonym, and that before others. A text of digits is a number.
    """
    given = [labels] if isinstance(labels, str) or not hasattr(labels, "__iter__") else list(labels)
    if not given:
        raise ValueError("class_labels is empty: name at least one class.")
    return [_label_number(label, names, num_classes) for label in given]


def _label_number(label: Any, names: Mapping[str, str], num_classes: int) -> int:
    if isinstance(label, str) and not label.strip().isdecimal():
        return _named(label, names, num_classes)
    try:
        number = -1 if isinstance(label, bool) else int(label) if isinstance(label, str) else label.__index__()
    except (AttributeError, TypeError):
        raise ValueError(f"A class is a number or a name, not {label!r}.") from None
    if not 0 <= number < num_classes:
        raise ValueError(f"There is no class {label}: the network knows the classes 0 to {num_classes - 1}.")
    return number


def _named(label: str, names: Mapping[str, str], num_classes: int) -> int:
    wanted = label.strip().casefold()
    synonyms = {int(number): [part.strip().casefold() for part in name.split(",")] for number, name in names.items()}
    whole = {number: [", ".join(parts)] for number, parts in synonyms.items()}
    first = {number: parts[:1] for number, parts in synonyms.items()}
    for spelled in (whole, first, synonyms):
        found = [number for number, parts in spelled.items() if wanted in parts]
        if len(found) > 1:
            raise ValueError(f"Several classes are named {label!r}: choose one of the numbers {found}.")
        if found:
            return found[0]
    near = difflib.get_close_matches(wanted, [part for parts in synonyms.values() for part in parts], n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"name a number from 0 to {num_classes - 1}."
    raise ValueError(f"There is no class named {label!r}: {hint}")


def check_arguments(steps: int, interval: tuple[float, float], solver: str, output_type: str) -> None:
    """Raise ValueError for arguments that no image can be drawn with."""
    low, high = interval
    if steps < 1:
        raise ValueError(f"num_inference_steps must be 1 or more, not {steps}.")
    if not 0 <= low < high <= 1:
        raise ValueError(f"guidance_interval must satisfy 0 <= low < high <= 1, not {low} {high}.")
    for kind, name, choices in (("solver", solver, tuple(SOLVERS)), ("output_type", output_type, OUTPUT_TYPES)):
        if name not in choices:
            raise ValueError(f"{kind} must be one of {', '.join(choices)}, not {name!r}.")


def as_type(images: Float[Tensor, "n 3 hh ww"], output_type: str) -> Any:
    """Return images in [-1, 1] as PIL images with the nearest of 256 levels, or in [0, 1] as an array or tensor."""
    if output_type == "pil":
        levels = ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        return [Image.fromarray(image) for image in levels.permute(0, 2, 3, 1).cpu().numpy()]
    unit = images / 2 + 0.5
    return unit if output_type == "pt" else unit.permute(0, 2, 3, 1).cpu().numpy()


def load_autoencoder(described: Mapping[str, Any]) -> ModelMixin:
    """Load the autoencoder of a Hub id, in float32; ValueError if its weights are not those of the training."""
    kind, source = getattr(diffusers, described["class"]), described["source"]
    options = {"use_safetensors": True, "low_cpu_mem_usage": False}
    try:
        try:
            vae = kind.from_pretrained(source, subfolder="vae", **options)
        except OSError:
            vae = kind.from_pretrained(source, **options)
    except OSError as error:
        raise OSError(
            f"The autoencoder {source} could not be loaded: give one with from_pretrained(..., vae=...), or draw "
            f"latents with output_type='latent'. ({error})"
        ) from error
    expected = described["weights_sha256"]
    if expected is not None and weights_sha256(vae.float().state_dict()) != expected:
        raise ValueError(f"{source} has other weights than the autoencoder that made the latents of this network.")
    return vae


def copy_code(part: Any, folder: Path) -> list[str]:
    """Write the module of an object's class into a folder; return what `model_index.json` states of the class."""
    module: Any = sys.modules[type(part).__module__]
    path = folder / Path(module.__file__).name
    path.write_text(module.SOURCE, encoding="utf-8")
    return [path.stem, type(part).__name__]
