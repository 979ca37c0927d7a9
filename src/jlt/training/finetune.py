"""Fine-tuning: the start from the weights of another run, whose classes and grid may differ."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from jlt.config import TrainConfig
from jlt.errors import JLTError
from jlt.networks.transformer import Transformer
from jlt.runtime.progress import inform
from jlt.training.averages import choose_weights
from jlt.training.checkpoint import open_checkpoint

CLASSES = "class_embedding.weight"


def start_from(network: Transformer, config: TrainConfig) -> None:
    """Load the weights that a run starts from.

    Positions are computed, so any grid fits. With another number of classes, the null class is kept and the others stay
    as initialised. JLTError for another prediction and for weights of other shapes.
    """
    checkpoint = open_checkpoint(Path(config.init_from))
    if checkpoint.config.prediction != config.prediction:
        raise JLTError(
            f"{checkpoint.folder} predicts {checkpoint.config.prediction}, and this run predicts {config.prediction}. "
            "Start from a checkpoint of the same prediction."
        )
    chosen = choose_weights(checkpoint, config.init_ema)
    network.load_state_dict(adapt_weights(chosen.tensors, network.state_dict(), str(checkpoint.folder)))
    inform(f"Starting from the weights ({chosen.ema}) of {checkpoint.folder}.")


def adapt_weights(weights: Mapping[str, Tensor], target: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Return `weights` in the shapes of `target`; JLTError names a shape that differs in more than the classes."""
    adapted = dict(weights)
    if CLASSES in weights and len(weights[CLASSES]) != len(target[CLASSES]):
        classes = target[CLASSES].clone()
        # The null class is the last one.
        classes[-1] = weights[CLASSES][-1]
        adapted[CLASSES] = classes
        inform(
            f"{source} has {len(weights[CLASSES]) - 1} classes. "
            f"The embeddings of this run's {len(classes) - 1} classes are initialised again."
        )
    shapes = [{name: tuple(value.shape) for name, value in side.items()} for side in (adapted, target)]
    wrong = sorted(name for name in shapes[0].keys() | shapes[1].keys() if shapes[0].get(name) != shapes[1].get(name))
    if wrong:
        name = wrong[0]
        found, wanted = (side.get(name, "absent") for side in shapes)
        more = f", and {len(wrong) - 1} more tensors differ" if len(wrong) > 1 else ""
        raise JLTError(
            f"The weights of {source} do not fit this network: {name} is {found} there and {wanted} here{more}."
        )
    return {name: value.to(torch.float32) for name, value in adapted.items()}
