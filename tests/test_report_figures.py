"""The report's figures, colours and numbers."""

from __future__ import annotations

import base64
import itertools
import re
from pathlib import Path

import numpy as np
import pytest
from fake_results import write_ablation

from jlt.report import palette
from jlt.report.figures import moving_average, training_figure
from jlt.report.geometry_figures import geometry_figures
from jlt.report.results import read_study
from jlt.report.wording import listed, number, percent


def svg(uri: str) -> str:
    return base64.b64decode(uri.removeprefix("data:image/svg+xml;base64,")).decode()


def test_dark_drawings_are_the_light_ones_in_dark_colours(tmp_path: Path) -> None:
    study = read_study(write_ablation(tmp_path))
    assert study.geometry is not None
    training = training_figure(study)
    assert training is not None
    roles = [*palette.PREDICTION.values(), palette.INK, palette.MUTED, palette.LINE]
    for panel in [panel for figure in (training, *geometry_figures(study.geometry)) for panel in figure.panels]:
        light, dark = svg(panel.light), svg(panel.dark)
        assert not [role for role in roles if role.light in dark or role.dark in light]
        assert re.sub("#[0-9a-f]{6}", "", light) == re.sub("#[0-9a-f]{6}", "", dark)
    for colour in palette.PREDICTION.values():
        assert all(colour.light in svg(panel.light) and colour.dark in svg(panel.dark) for panel in training.panels)


# Machado, Oliveira and Fernandes 2009, severity 1, on linear RGB.
COLOUR_VISION = {
    "all cones": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}
TO_XYZ = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.072175], [0.0193339, 0.119192, 0.9503041]]


def linear_rgb(colour: str) -> np.ndarray:
    values = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    xyz = np.array(TO_XYZ) @ rgb.clip(0, 1) / [0.95047, 1.0, 1.08883]
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("mode", ["light", "dark"])
@pytest.mark.parametrize("vision", COLOUR_VISION)
def test_predictions_stay_apart_for_every_eye(mode: str, vision: str) -> None:
    matrix = np.array(COLOUR_VISION[vision])
    seen = [lab(matrix @ linear_rgb(getattr(colour, mode))) for colour in palette.PREDICTION.values()]
    assert min(np.linalg.norm(one - other) for one, other in itertools.combinations(seen, 2)) > 25  # CIE76


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_lines_stand_out_from_the_paper(mode: str) -> None:
    weights = np.array(TO_XYZ[1])
    paper = weights @ linear_rgb(getattr(palette.PAPER, mode))
    for colour in [*palette.PREDICTION.values(), *palette.TIME]:
        low, high = sorted((paper, weights @ linear_rgb(getattr(colour, mode))))
        assert (high + 0.05) / (low + 0.05) >= 3  # WCAG 2 for graphics


def test_moving_average_is_the_trailing_mean() -> None:
    values = [float(value) for value in range(60)]
    assert moving_average(values)[:3] == [0, 0.5, 1]
    assert moving_average(values)[-1] == 58
    assert moving_average([]) == []


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (20.14, "20.1"), (7.451, "7.45"), (310.4, "310"), (1240.6, "1,240"), (0.0008, "0.000800"), (9.996, "10.0"),
        (0.0, "0"),
        (-3.14159, "-3.14"), (3.2e-7, "3.20 \N{MULTIPLICATION SIGN} 10⁻⁷"), (None, "—"), (float("inf"), "—"),
    ],
)  # fmt: skip
def test_numbers(value: float | None, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(("share", "text"), [(0.971, "97.1%"), (1.0, "100.0%"), (0.00034, "0.034%"), (0.0, "0.0%")])
def test_percentages(share: float, text: str) -> None:
    assert percent(share) == text


def test_lists() -> None:
    assert [listed(list("abc")), listed(["a", "b"]), listed(["a"]), listed([])] == ["a, b and c", "a and b", "a", ""]
