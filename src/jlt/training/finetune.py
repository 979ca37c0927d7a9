"""Starting from the weights of another run, whose classes and grid may be others."""

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

    Positions are computed, so that another grid needs nothing. Another number of classes keeps the null class and
    leaves the others as they were initialised. JLTError for another prediction and for weights of other shapes.
    """
    checkpoint = open_checkpoint(Path(config.init_from))
    if checkpoint.config.prediction != config.prediction:
        raise JLTError(
            f"{checkpoint.folder} predicts {checkpoint.config.prediction}, and this run {config.prediction}: "
            "the same output means something else. Start from a checkpoint of the same prediction."
        )
    chosen = choose_weights(checkpoint, config.init_ema)
    network.load_state_dict(adapt_weights(chosen.tensors, network.state_dict(), str(checkpoint.folder)))
    inform(f"Starting from the weights ({chosen.ema}) of {checkpoint.folder}.")


def adapt_weights(weights: Mapping[str, Tensor], target: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Return `weights` in the shapes of `target`; JLTError names what does not fit but for the number of classes."""
    adapted = dict(weights)
    if CLASSES in weights and len(weights[CLASSES]) != len(target[CLASSES]):
        classes = target[CLASSES].clone()
        # The null class is the last one.
        classes[-1] = weights[CLASSES][-1]
        adapted[CLASSES] = classes
        inform(f"{source} knows {len(weights[CLASSES]) - 1} classes: the {len(classes) - 1} of this run start anew.")
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
