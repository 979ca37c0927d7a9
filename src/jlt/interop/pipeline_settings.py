"""What an exported network states of itself, in `model_index.json` and in the metadata of a single file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from jlt.config import NetworkConfig, Prediction
from jlt.ranges import Ranged

ExportFormat = Literal["diffusers", "safetensors"]
PIPELINE = ("pipeline", "JLTPipeline")
TRANSFORMER = ("transformer_jlt", "JLTTransformer")
TAEF2 = ("autoencoder_taef2", "AutoencoderTAEF2")
"""Module and class of the parts whose code is in the folder."""
INDEX = "model_index.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
RECORD = "export.json"
"""What was exported, with the SHA-256 of every file but the model card's; sealed."""
SCHEMA = 1
PREFIX = "network."
"""What precedes the names of the weights in a folder: its class holds the transformer under this name."""
METADATA = "jlt"
"""Key of the settings in the metadata of a single file."""
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
IN_FOLDER = "vae"
"""Source of an autoencoder that is known by its copy in the folder alone."""


@dataclass(frozen=True)
class TrainingFacts:
    """How the weights were made, as far as an image, a label or a table of results depends on it."""

    name: str
    step: int
    ema: str
    checkpoint: str
    """Identity of the checkpoint, as evaluations record it."""
    label_dropout: float
    images: str
    """Kind of the image source, whose classes the labels are."""


@dataclass(frozen=True)
class PipelineSettings:
    """The settings of the pipeline besides its network."""

    prediction: Prediction
    noise_scale: float
    id2label: Mapping[int, str]
    """Names of the classes, empty where the latents came without names."""
    autoencoder: Mapping[str, Any]
    """Identity of the autoencoder; its `source` is a Hub id, `bundled`, `built in` or `vae`, and never a path."""
    training: TrainingFacts


@dataclass(frozen=True)
class FileSettings:
    """The settings in the metadata of a single file."""

    network: NetworkConfig
    settings: PipelineSettings


@dataclass(frozen=True, kw_only=True)
class ExportConfig(Ranged):
    """What is exported, and what the model card shows."""

    ema: str = ""
    """Weights: an EMA decay (0.9999), a length to rebuild (sigma_rel=0.07), or none. Default: the run's first EMA."""
    with_vae: bool = False
    """Copy the autoencoder into the folder, instead of naming its Hub id."""
    vae: str = ""
    """Hub id of the autoencoder, where the latents were encoded with one from a folder."""
    samples: int = 16
    """Images that the pipeline draws for the model card; 0 draws none."""
    steps: int = 50
    """Steps of the solver for these images, and in the example of the model card."""
    cfg_scale: float = 1.0
    """Guidance scale of the same."""
    cfg_interval: tuple[float, float] = (0.0, 1.0)
    """Guidance interval of the same."""
    license: str = ""
    """Licence of the weights, as the Hub abbreviates it. Default: apache-2.0, and unknown for an imported run."""
