"""The cells of prediction x loss space: what the network outputs, and the space of its loss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from jlt.report.palette import SYMBOL, WORDS
from jlt.report.study import Spread, Study
from jlt.report.wording import listed, number

Cells = Mapping[tuple[str, str], Spread]
"""Frechet distances at the final step by prediction and loss space."""


def cells(study: Study) -> dict[str, Cells]:
    """Return the cells of every patch size and variant that has several loss spaces, by their names."""
    found: dict[str, dict[tuple[str, str], Spread]] = {}
    for system in study.systems:
        value = system.measured("frechet_distance", study.final_step)
        if value is not None:
            name = f"patch {system.patch_size}{f' ({system.variant})' if system.variant else ''}"
            found.setdefault(name, {})[system.prediction, system.loss_space] = value
    return {name: here for name, here in found.items() if len(_spaces(here)) > 1}


def cell_sentences(found: Mapping[str, Cells]) -> list[str]:
    """State how much the distance changes with the prediction, and with the loss space, the other one being equal."""
    return [text for where, here in found.items() for text in _sentences(where, here)]


def _sentences(where: str, here: Cells) -> list[str]:
    spaces, predictions = _spaces(here), list(dict.fromkeys(prediction for prediction, _ in here))
    if len(predictions) < 2:
        return []
    by_prediction = {
        f"{SYMBOL[space]}-space": [here[p, space] for p in predictions if (p, space) in here] for space in spaces
    }
    by_space = {WORDS[p]: [here[p, space] for space in spaces if (p, space) in here] for p in predictions}
    factors = {
        "From the best prediction to the worst": _factors(by_prediction, "with a loss in"),
        "From the best loss space to the worst": _factors(by_space, "for"),
    }
    grows = f"at {where} the Fréchet distance grows by a factor of"
    return [f"{what} {grows} {text}." for what, text in factors.items() if text]


def _factors(cells_by: Mapping[str, Sequence[Spread]], joined: str) -> str:
    """Return the factor within each group of more than one, empty without any."""
    return listed([f"{number(_factor(some))} {joined} {name}" for name, some in cells_by.items() if len(some) > 1])


def _factor(values: Sequence[Spread]) -> float:
    means = [value.mean for value in values]
    return max(means) / min(means) if min(means) > 0 else math.inf


def _spaces(here: Cells) -> list[str]:
    return list(dict.fromkeys(space for _, space in here))
