"""The sentences about a forecast follow from the numbers, also where the forecast failed."""

import dataclasses
from pathlib import Path

import pytest

from jlt.report.expected import (
    check_sentences,
    check_table,
    checks,
    expected_figure,
    floor_sentences,
    rank_correlation,
)
from jlt.report.findings import cell_sentences, cells
from jlt.report.study import Spread, Study, System
from jlt.report.training_figures import cells_figure
from jlt.results.ablation import Ablation
from jlt.results.evaluation import Evaluation, Metrics
from jlt.results.geometry import Advice, SettingForecast
from jlt.results.run import Log, LoggedStep, Run, read_log


def run(seed, distance):
    evaluation = Evaluation(100, Metrics(frechet_distance=distance, count=1000), {})
    return Run(Path("run"), seed, {}, read_log(Path("missing.jsonl")), (evaluation,), None)


def study(distances, forecasts):
    """Distances by (prediction, variant), one for each seed."""
    systems = tuple(
        System("name", prediction, "v", 1, tuple(run(seed, value) for seed, value in enumerate(values)), variant)
        for (prediction, variant), values in distances.items()
    )
    return Study(Path("study"), "title", systems, ablation([forecast(*setting) for setting in forecasts]))


def ablation(forecasts):
    """An ablation of which only the forecasts are known."""
    return Ablation(
        title="title", recipe="digits", created="", machine={}, latents={}, autoencoder_psnr=None,
        classifier_accuracy=None, systems=(), forecasts=tuple(forecasts),
    )  # fmt: skip


def forecast(variant, power, expected, **changes):
    """A forecast for tokens of 16 values at patch 1."""
    call = "even" if abs(expected) < 0.1 else "x" if expected > 0 else "v"
    settings = {
        "variant": variant, "anisotropy": power, "patch_size": 1, "loss_space": "v", "width": 64, "dimension": 16,
        "order": ("x", "v", "eps"), "margin": expected, "clean_over_velocity": expected, "call": call, "outcome": call,
        "confidence": 1.0, "sphericity": 0.1, "stated_share": 0.05, "needed": {},
        "advice": (Advice(64, {}, {"x": 0.0, "eps": 1.0, "v": 0.5}),), "before_training": True, **changes,
    }  # fmt: skip
    return SettingForecast(**settings)


DISTANCES = {
    ("x", "white"): [4.0, 5.0],
    ("v", "white"): [4.4, 4.0],
    ("x", "steep"): [2.0, 2.5],
    ("v", "steep"): [6.0, 5.0],
    ("x", "turned"): [3.0, 3.0],
    ("v", "turned"): [2.0, 1.5],
}
FORECASTS = [("white", 0.0, 0.05), ("steep", 1.0, 0.5), ("turned", 1.5, 0.6)]


def test_pairs_of_seeds_are_compared():
    found = {check.setting: check for check in checks(study(DISTANCES, FORECASTS))}
    assert found["patch 1 (steep)"].ratio == Spread(2.5, 2.0, 3.0, 2)
    assert found["patch 1 (steep)"].measured_first == found["patch 1 (steep)"].expected_first == "x"
    assert found["patch 1 (white)"].expected_first is None
    assert found["patch 1 (white)"].measured_first is None
    assert (found["patch 1 (turned)"].expected_first, found["patch 1 (turned)"].measured_first) == ("x", "v")


def test_forecasts_that_failed_are_listed():
    found = checks(study(DISTANCES, FORECASTS))
    first, even, correlation = check_sentences(found)
    assert "In 1 of 2 settings" in first
    assert first.endswith("; not at patch 1 (turned).")
    assert "Expected to be even" in even
    assert "0.950 at patch 1 (white)" in even
    # Expected white < steep < turned, measured turned < white < steep.
    assert "is -0.50 over 3 settings" in correlation
    assert check_table(found).rows[0] == ("patch 1 (white)", "even, 5.0%", "0.950", "0.800 to 1.10")
    assert len(expected_figure(found).panels) == 2


def test_widths_are_what_needs_are_compared_with():
    narrow = {("x", "width 32"): [2.0], ("v", "width 32"): [8.0], ("x", "width 64"): [2.0], ("v", "width 64"): [3.0]}
    expected = [forecast("width 32", None, 0.5, width=32), forecast("width 64", None, 0.5)]
    found = checks(dataclasses.replace(study(narrow, []), ablation=ablation(expected)))
    assert [check.needed(of_width=True) for check in found] == [0.25, 0.125]
    along, against = expected_figure(found).panels
    assert along.alt.endswith("against the width: 4.00 at patch 1 (width 32) and 1.50 at patch 1 (width 64).")
    assert "expected 25.0%, measured 4.00" in against.alt


def test_the_loss_floor_of_narrow_networks_is_compared_with_the_loss():
    steps = tuple(LoggedStep(step, loss) for step, loss in [(10, 3.0), (20, 0.625)])
    logged = dataclasses.replace(run(0, 2.0), log=Log(steps))
    system = System("name", "v", "v", 1, (logged,), "steep")

    def sentences(**changes):
        return floor_sentences(
            Study(Path("study"), "title", (system,), ablation([forecast("steep", 1.0, 0.5, **changes)]))
        )

    assert sentences() == []
    (text,) = sentences(width=8)
    assert "cannot output 16 directions. The v-space loss ended at v 0.625, of which 80% was forecast to be" in text
    assert "of which 80% is, by the latents alone, out of reach" in sentences(width=8, before_training=False)[0]


def cell(prediction, space, values):
    runs = tuple(run(seed, value) for seed, value in enumerate(values))
    return System("name", prediction, space, 1, runs)


def test_cells_of_prediction_and_loss_space():
    systems = tuple(
        cell(prediction, space, values)
        for prediction, space, values in [
            ("x", "x", [2.0, 4.0]),
            ("x", "v", [2.0, 2.0]),
            ("v", "x", [9.0, 9.0]),
            ("v", "v", [5.0, 7.0]),
        ]
    )
    found = cells(Study(Path("study"), "title", systems))
    assert found == {"patch 1": {
        ("x", "x"): Spread(3.0, 2.0, 4.0, 2),
        ("x", "v"): Spread(2.0, 2.0, 2.0, 2),
        ("v", "x"): Spread(9.0, 9.0, 9.0, 2),
        ("v", "v"): Spread(6.0, 5.0, 7.0, 2),
    }}  # fmt: skip
    by_prediction, by_space = cell_sentences(found)
    assert "3.00 with a loss in x-space and 3.00 with a loss in v-space" in by_prediction
    assert "1.50 for clean prediction (x) and 1.50 for velocity prediction (v)" in by_space
    # A cell without a partner has no factor.
    three = {key: value for key, value in found["patch 1"].items() if key != ("v", "x")}
    assert [text.partition("factor of ")[2] for text in cell_sentences({"patch 1": three})] == [
        "3.00 with a loss in v-space.",
        "1.50 for clean prediction (x).",
    ]
    assert "clean (x) with a loss in x-space 3.00" in cells_figure(found).panels[0].alt
    assert cells(Study(Path("study"), "title", systems[1:2] + systems[3:])) == {}
    assert cells_figure({}) is None


def test_single_seeds_and_seeds_that_disagree_decide_nothing():
    distances = {("x", "near"): [2.0], ("v", "near"): [2.02], ("x", "split"): [2.0, 2.0], ("v", "split"): [1.0, 4.0]}
    found = checks(study(distances, [("near", None, 0.5), ("split", None, 0.6)]))
    assert [check.measured_first for check in found] == [None, None]
    (text,) = check_sentences(found)
    assert text.startswith("Expected to differ, but not decided by the measurements")
    assert "1.01 at patch 1 (near) and 1.25 at patch 1 (split)" in text


def test_seeds_without_a_partner_are_left_out():
    lonely = {("x", "steep"): [2.0, 2.5], ("v", "steep"): [6.0]}
    (found,) = checks(study(lonely, FORECASTS))
    assert found.ratio == Spread(3.0, 3.0, 3.0, 1)
    assert checks(study({("x", "steep"): [2.0]}, FORECASTS)) == []
    assert check_sentences([]) == []
    assert checks(study(DISTANCES, [])) == []
    assert expected_figure([found]) is None


@pytest.mark.parametrize(
    ("a", "b", "known"),
    [([1, 2, 3], [10, 20, 30], 1), ([1, 2, 3], [3, 2, 1], -1), ([1, 2, 3], [5, 5, 5], 0), ([1, 1, 2], [1, 1, 9], 1)],
)
def test_rank_correlations(a, b, known):
    assert rank_correlation(a, b) == pytest.approx(known)
