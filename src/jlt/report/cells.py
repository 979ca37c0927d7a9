"""The cells of prediction x loss space: what the network outputs, and the space of its loss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from jlt.report.palette import NAMES, SYMBOL
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
            where = f"patch {system.patch_size}{f' ({system.variant})' if system.variant else ''}"
            found.setdefault(where, {})[system.prediction, system.loss_space] = value
    return {where: here for where, here in found.items() if len({space for _, space in here}) > 1}


def cell_sentences(found: Mapping[str, Cells]) -> list[str]:
    """Say how much the prediction and how much the loss space moves the distance, the other one being equal."""
    texts = []
    for where, here in found.items():
        by_space: dict[str, list[float]] = {}
        by_prediction: dict[str, list[float]] = {}
        for (prediction, space), value in here.items():
            by_space.setdefault(f"with a loss in {SYMBOL[space]}-space", []).append(value.mean)
            by_prediction.setdefault(f"for {NAMES[prediction]}", []).append(value.mean)
        if len(by_prediction) > 1:
            for what, groups in (("prediction", by_space), ("loss space", by_prediction)):
                if factors := [f"{number(_factor(means))} {name}" for name, means in groups.items() if len(means) > 1]:
                    grows = f"at {where} the Fréchet distance grows by a factor of {listed(factors)}"
                    texts.append(f"From the best {what} to the worst {grows}.")
    return texts


def _factor(means: Sequence[float]) -> float:
    return max(means) / min(means) if min(means) > 0 else math.inf
