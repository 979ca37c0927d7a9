"""DINOv2 as a feature extractor, for a Fréchet distance that agrees with human judgement better than FID does.

Source: Stein et al. 2023, arXiv:2306.04675, and their program dgm-eval. Images are prepared as there: Pillow's bicubic
resize to 224x224 and ImageNet's mean and standard deviation; features are the class token after the last normalisation.
The network is that of transformers, an extra of this package: pip install -e '.[dino]'.
"""

from __future__ import annotations

import math
import textwrap
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional

from jlt.errors import JLTError
from jlt.evaluation.extractor import FeatureExtractor, Features
from jlt.storage.weights import is_hub_id, require_reachable

DEFAULT = "facebook/dinov2-large"
INPUT_SIZE = 224
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
POSITION_OFFSET = 0.1
REMEDY = "name a folder that transformers saved, or a Hub id that can be reached, with --features-path."


class DinoExtractor(FeatureExtractor):
    """A DINOv2 vision transformer with weights, always in float32."""

    name = "dinov2"
    input_size = INPUT_SIZE
    resize = "bicubic and antialiased, to 8 bits"

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.dimension = model.config.hidden_size
        side = INPUT_SIZE // model.config.patch_size
        positions = position_embeddings_for(model.embeddings.position_embeddings.detach(), side)
        model.embeddings.position_embeddings = nn.Parameter(positions, requires_grad=False)

    @classmethod
    def load(cls, path: Path | str | None = None) -> DinoExtractor:
        """Load a folder that transformers saved, or a Hub id (default: facebook/dinov2-large).

        JLTError if transformers is not installed, and for weights that are missing, incomplete or of another network.
        Only safetensors are read, so no pickled code runs.
        """
        try:
            from transformers import Dinov2Model
        except ImportError as error:
            # Raised too if transformers is installed but one of its own imports fails.
            reason = textwrap.shorten(str(error), 200)
            raise JLTError(
                f"DINOv2 needs transformers, which cannot be imported ({reason}): pip install -e '.[dino]'."
            ) from error
        source = str(path or DEFAULT)
        folder = Path(source).expanduser()
        if folder.is_dir():
            source = str(folder)
        elif is_hub_id(source):
            require_reachable(source, ["config.json"], REMEDY)
        else:
            raise JLTError(f"{source} is no folder of DINOv2: {REMEDY}")
        return cls(_load_model(Dinov2Model, source))

    @torch.no_grad()
    def __call__(self, images: UInt8[Tensor, "n h w 3"]) -> Features:
        """Return the class tokens; images of another size are squeezed to 224x224."""
        return self._apply_exactly(
            lambda piece: (self._network(imagenet_input(piece, INPUT_SIZE)).last_hidden_state[:, 0],), images
        )


def resize_like_pillow(images: UInt8[Tensor, "n h w 3"], size: int) -> Float[Tensor, "n 3 size size"]:
    """Return images of size x size, whole numbers 0..255, equal to Pillow's bicubic resize up to single levels."""
    pixels = images.permute(0, 3, 1, 2).float()
    if pixels.shape[-2:] == (size, size):
        return pixels
    # Pillow rounds once between the two directions, and once at the end.
    for sides in ((pixels.shape[2], size), (size, size)):
        if pixels.shape[-2:] != sides:
            pixels = functional.interpolate(pixels, sides, mode="bicubic", antialias=True).round_().clamp_(0, 255)
    return pixels


def position_embeddings_for(embeddings: Float[Tensor, "1 n d"], side: int) -> Float[Tensor, "1 m d"]:
    """Return the embeddings of the class token and of side x side patches, resized as DINOv2's own program does.

    That program, which dgm-eval runs, scales by (side + 0.1) / trained side; transformers scales to the exact side.
    """
    token, patches = embeddings[:, :1], embeddings[:, 1:]
    trained = math.isqrt(patches.shape[1])
    if trained == side:
        return embeddings
    scale = (side + POSITION_OFFSET) / trained
    grid = patches.unflatten(1, (trained, trained)).permute(0, 3, 1, 2)
    resized = functional.interpolate(grid, scale_factor=(scale, scale), mode="bicubic")
    return torch.cat([token, resized.flatten(2).transpose(1, 2)], dim=1)


def imagenet_input(images: UInt8[Tensor, "n h w 3"], size: int) -> Float[Tensor, "n 3 size size"]:
    """Return images resized, and normalised by ImageNet's mean and deviation."""
    mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (MEAN, STD))
    return (resize_like_pillow(images, size) / 255 - mean) / std


def _load_model(model_class: Any, source: str) -> Any:
    # With a damaged folder transformers raises many types of exceptions.
    try:
        config, _ = model_class.config_class.get_config_dict(source)
        kind = config.get("model_type")
        if kind == "dinov2":
            model, loading = model_class.from_pretrained(
                source, use_safetensors=True, dtype=torch.float32, output_loading_info=True
            )
    except Exception as error:
        reason = textwrap.shorten(str(error), 300)
        raise JLTError(f"{source} could not be loaded as DINOv2 ({reason}): {REMEDY}") from error
    if kind != "dinov2":
        raise JLTError(f"{source} holds {kind or 'a model without a type'}, not dinov2: {REMEDY}")
    # transformers fills missing weights with random numbers and only logs a line.
    if missing := sorted(loading["missing_keys"]):
        raise JLTError(f"{source} is incomplete: {len(missing)} weights are missing, {missing[0]!r} first.")
    return model
