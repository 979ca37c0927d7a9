"""The report's figures, colours and numbers."""

from __future__ import annotations

import base64
import itertools
import re
from pathlib import Path

import numpy as np
import pytest
from fake_results import config, protocol, write_ablation, write_log, write_run, write_sealed

from jlt.report import palette
from jlt.report.figures import moving_average
from jlt.report.geometry_figures import geometry_figures
from jlt.report.study import read_study
from jlt.report.training_figures import training_figure
from jlt.report.wording import listed, number, percent
from jlt.storage.files import work_of, write_marker
from jlt.storage.seals import seal_file


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
    for colour in map(palette.PREDICTION.__getitem__, ("x", "eps", "v")):
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


def imagenet_run(folder: Path, name: str, extractor: str) -> Path:
    """Write a run of a network of the paper that was evaluated four times so far."""
    prediction = "v" if name.startswith("DiT") else "x"
    write_run(folder, prediction, 1, 0, 4.0)
    write_marker(folder / "config.json", {**config(prediction, 1, 0), "name": name, "steps": 250_000})
    seal_file(folder / "samples" / "grid.png", "grid.png", work_of(folder))
    for path in (folder / "evaluations").iterdir():
        path.unlink()
    events = [{"event": "start", "step": 0}]
    for step, distance in [(25_000, 40.0), (50_000, 13.0), (100_000, 5.2), (150_000, 3.9)]:
        metrics = {"frechet_distance": distance, "inception_score": 250 - 5 * distance, "count": 50_000}
        found_by = {**protocol(str(step)), "extractor": {"name": extractor}}
        evaluation = {"schema": 1, "step": step, "metrics": metrics, "protocol": found_by}
        write_sealed(folder / "evaluations" / f"step_{step:07d}.json", evaluation)
        events.append({"event": "step", "step": step, "loss": 1 / step**0.1, "learning_rate": 2e-4, "grad_norm": 0.3})
    write_log(folder, *events)
    return folder


@pytest.mark.parametrize(
    ("name", "extractor", "drawn"),
    [("JLT-B/1", "inception", True), ("JLT-B/1", "dinov2", False), ("JLT-S/1", "inception", False)],
)
def test_published_curves_are_drawn_for_the_systems_that_they_are_of(tmp_path, name, extractor, drawn) -> None:
    figure = training_figure(read_study(imagenet_run(tmp_path / "run", name, extractor)))
    assert figure is not None
    distance = figure.panels[0]
    assert ("as published ends at 2.56" in distance.alt) is drawn
    assert ("JLT-B/1 as published ends at 221" in figure.panels[1].alt) is drawn
    assert ("Fu et al. 2026" in figure.caption) is drawn
    # Four points of ours, five of theirs.
    curves = [
        line.count("L ")
        for line in re.findall(r'<path d="(M [^"]*)"[^>]*stroke-width: 1', svg(distance.light), re.DOTALL)
    ]
    assert curves.count(4) == drawn
    assert curves.count(3) == 1
