"""Drawn images with their latents and labels, and the path on which they came about."""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor

from jlt.errors import UsageError
from jlt.images.contact_sheet import SheetText, draw_sheet
from jlt.sampling.sampler import ImageSampler, batches_of
from jlt.sampling.save import MIN_SIDE
from jlt.timesteps import sampling_grid


@dataclass(frozen=True, eq=False)
class State:
    """Where some images are on the path at time t: z, and the clean prediction x^ there (eq. 4), in host memory."""

    t: float
    z: Float[Tensor, "n c h w"]
    clean: Float[Tensor, "n c h w"]


class Trajectory:
    """The states of the images by time, from noise at t = 0 to the latents at t = 1.

    `trajectory[0.4]` is the state at the nearest of `times`, the steps of the solver; iteration yields all states in
    order. The first access draws the images again, which takes as long as drawing them, and keeps every state: two
    latents for each image and step. `watch` is called at each evaluation of the network; what it raises ends the
    drawing.
    """

    def __init__(self, sampler: ImageSampler, watch: Callable[[], None] = lambda: None) -> None:
        self.times: tuple[float, ...] = tuple(sampling_grid(sampler.config))
        self._sampler, self._watch = sampler, watch

    def __len__(self) -> int:
        return len(self.times)

    def __iter__(self) -> Iterator[State]:
        return iter(self._states.values())

    def __getitem__(self, t: float) -> State:
        """Return the state at the time nearest to t, 0..1; UsageError for another t."""
        if not 0 <= t <= 1:
            raise UsageError(f"A path leads from time 0 to 1: it has no state at {t}.")
        return self._states[min(self.times, key=lambda time: abs(time - t))]

    @functools.cached_property
    def _states(self) -> dict[float, State]:
        drawing, config = self._sampler.latent_sampler, self._sampler.config
        seen: dict[float, list[tuple[Tensor, Tensor]]] = {t: [] for t in self.times}
        for part in batches_of(config.num, config.batch_size):
            at: dict[float, tuple[Tensor, Tensor]] = {}

            def observe(t: float, z: Tensor, clean: Tensor, part: range = part, at: Any = at) -> None:
                self._watch()
                # A stage of a solver at the time of the next step is replaced by the step itself.
                if t in seen:
                    at[t] = z[: len(part)].cpu(), clean[: len(part)].cpu()

            latents = drawing.flow(drawing.start(self._sampler.drawn_with(part)), observe)[: len(part)].float().cpu()
            at[self.times[-1]] = latents, latents
            for t, state in at.items():
                seen[t].append(state)
        return {t: State(t, *(torch.cat(tensors) for tensors in zip(*seen[t], strict=True))) for t in seen}


@dataclass(frozen=True, eq=False)
class Images(Sequence[Image.Image]):
    """Drawn images: a sequence of PIL images, with what they were made from, in host memory."""

    pixels: UInt8[Tensor, "n hh ww 3"]
    """Levels 0 to 255, as in the files of `jlt sample`."""
    latents: Float[Tensor, "n c h w"]
    """Normalised latents, in float32."""
    labels: Int[Tensor, " n"]
    """Class numbers."""
    sampler: ImageSampler
    """What drew them."""

    def __len__(self) -> int:
        return len(self.pixels)

    @overload
    def __getitem__(self, index: int) -> Image.Image: ...
    @overload
    def __getitem__(self, index: slice) -> list[Image.Image]: ...
    def __getitem__(self, index: int | slice) -> Image.Image | list[Image.Image]:
        if isinstance(index, slice):
            return to_pil(self.pixels[index])
        # Not the error of torch, so that iteration ends.
        return Image.fromarray(self.pixels[range(len(self))[index]].numpy())

    def __repr__(self) -> str:
        return f"<{len(self)} images of {'x'.join(map(str, self.pixels.shape[1:3]))} pixels>"

    @property
    def names(self) -> list[str]:
        """The class name of each image, or its class number where the classes have no names."""
        return [self.sampler.class_name(label) for label in self.labels.tolist()]

    @functools.cached_property
    def trajectory(self) -> Trajectory:
        """The path of the images from noise to data."""
        return Trajectory(self.sampler)

    @property
    def protocol(self) -> dict[str, Any]:
        """Everything that decides which images these are, as result files record it."""
        return self.sampler.protocol()

    def _repr_png_(self) -> bytes:
        """Return the grid as a notebook shows it."""
        file = io.BytesIO()
        self.grid().save(file, "PNG")
        return file.getvalue()

    def grid(self, columns: int = 0) -> Image.Image:
        """Return one picture of all images with their class names; by default about as wide as high."""
        text = SheetText(self.sampler.decoder_note, captions=self.names)
        return draw_sheet(self.pixels.numpy(), columns or math.ceil(math.sqrt(len(self))), text, MIN_SIDE)


def to_pil(pixels: UInt8[Tensor, "n hh ww 3"]) -> list[Image.Image]:
    """Return images as PIL images."""
    return [Image.fromarray(image) for image in pixels.cpu().numpy()]
