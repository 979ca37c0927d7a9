"""Prices: the cheapest sampler within the published one's error is found, confirmed and reported."""

import json
import shlex
from dataclasses import replace

import pytest
from training_helpers import run_on_few_digits

from jlt.cli.main import main
from jlt.config import SampleConfig
from jlt.errors import UsageError
from jlt.evaluation.metrics import jackknife
from jlt.experiments import price as pricing
from jlt.experiments.price import PriceConfig
from jlt.report.page import write_report
from jlt.report.price_text import verdict
from jlt.results.evaluation import Evaluation, Jackknife, Metrics
from jlt.results.files import read_result, write_result
from jlt.results.price import Price, SamplerSetting

WHOLE = (0.0, 1.0)


def config_of(**changes):
    settings = {
        "sample": SampleConfig(num=40, seed=7, cfg_scale=2.0, batch_size=10),
        "solver": ("heun", "euler"),
        "steps": (2, 3),
        "shift": (1.0,),
        "cfg_interval": (WHOLE,),
        "max_evaluations": 12,
        "confirm_seed": 8,
        **changes,
    }
    return PriceConfig(**settings)


def test_settings_are_sorted_by_evaluations_of_both_branches():
    config = config_of(cfg_interval=(WHOLE, (0.6, 1.0)))
    # Heun with n steps evaluates at 2n - 1 times; guidance doubles those inside the interval.
    assert [(s.solver, s.steps, s.cfg_interval[0], config.evaluations(s)) for s in config.candidates()] == [
        ("euler", 2, 0.6, 2),
        ("heun", 2, 0.6, 3),
        ("euler", 2, 0.0, 4),
        ("euler", 3, 0.6, 4),
        ("heun", 2, 0.0, 6),
        ("euler", 3, 0.0, 6),
        ("heun", 3, 0.6, 7),
        ("heun", 3, 0.0, 10),
    ]
    assert config.published == SamplerSetting("heun", 50, 1.0, WHOLE)
    assert config.evaluations(config.published) == 198


def test_without_guidance_an_interval_is_measured_once():
    config = config_of(sample=SampleConfig(num=40, seed=7), cfg_interval=(WHOLE, (0.6, 1.0)))
    assert {setting.cfg_interval for setting in config.candidates()} == {WHOLE}
    assert config.evaluations(config.published) == 99


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": ()}, "--steps needs one value or more"),
        ({"shift": (1.0, 1.0)}, "--shift needs one value or more"),
        ({"confirm_seed": 7}, "must differ from the seed of the search"),
        ({"max_evaluations": 3}, "No setting needs 3 evaluations or fewer"),
    ],
)
def test_grids_without_a_meaning_are_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        config_of(**changes)


def measured(values, error=1.0):
    parts = Jackknife(tuple(values), (4,) * len(values))
    distance = sum(values) / len(values)
    return Evaluation(1, Metrics(frechet_distance=distance, frechet_distance_error=error, count=40), {}, parts)


def test_a_setting_is_within_one_error_of_the_published_distance():
    published, setting = measured([10.0, 12.0]), SamplerSetting("euler", 2, 1.0, WHOLE)
    near = pricing._priced(setting, 4, measured([11.0, 12.9]), published)
    far = pricing._priced(setting, 4, measured([12.0, 14.1]), published)
    assert (near.within, far.within) == (True, False)
    assert near.difference == pytest.approx(0.95)
    # The same noise: only the difference of each group counts.
    assert near.difference_error == pytest.approx(jackknife(0.95, [1.0, 0.9], (4, 4))[0])
    assert near.difference_error < near.error


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return run_on_few_digits(tmp_path_factory.mktemp("price"))


@pytest.fixture
def arguments(place):
    run, reference = str(place / "run"), str(place / "reference.npz")
    axes = ["--solver", "euler", "heun", "--steps", "2", "6", "--shift", "1", "0.5", "--max-evaluations", "20"]
    sampling = ["--num", "40", "--batch-size", "10", "--cfg-scale", "2", "--seed", "7"]
    return ["price", "--checkpoint", run, "--reference", reference, *axes, *sampling]


def test_a_price_of_a_run(arguments, place, capsys):
    out = place / "run" / "prices" / "step_0000004"
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["folder"] == str(out)
    result = read_result(Price, out / "price.json")
    first, *others = result.points
    assert (first.solver, first.steps, first.evaluations, first.difference) == ("heun", 50, 198, 0.0)
    assert [point.evaluations for point in others] == sorted(point.evaluations for point in others)
    assert {(point.solver, point.steps) for point in others} == {("euler", 2), ("heun", 2), ("euler", 6)}
    for point in result.points:
        protocol = point.protocol
        assert (protocol["solver"], protocol["steps"], protocol["shift"]) == (point.solver, point.steps, point.shift)
        assert (protocol["seed"], protocol["count"], point.seconds) == (7, 40, None)
        assert point.difference == point.value - first.value
        assert point.within == (point.difference <= first.error)
    chosen = [point for point in others if point.within][:1]
    assert [point.setting for point in chosen] == [result.choice]
    again, choice = result.confirmed
    assert (again.setting, choice.setting) == (first.setting, result.choice)
    assert {point.protocol["seed"] for point in result.confirmed} == {8}
    assert 0 < choice.seconds < again.seconds
    # The choice is confirmed only by the images that it was not made with.
    confirmed = "suffice." if choice.within else "other images do not confirm it"
    assert verdict(result).startswith(f"{choice.evaluations} evaluations instead of 198")
    assert confirmed in verdict(result)
    assert sorted(path.name for path in out.iterdir()) == [
        "plan.json", "points", "price.json", "report.html",
    ]  # fmt: skip

    # Its command gives the same number, and the same call draws nothing.
    before = {path: path.stat().st_mtime_ns for path in (out / "points").iterdir()}
    assert main([*shlex.split(result.reproduce)[1:], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"]["frechet_distance"] == choice.value
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "Within error" in printed
    assert verdict(result) in printed
    assert "…" not in printed
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert main([*arguments, "--seed", "9"]) == 1
    assert "holds other work" in capsys.readouterr().err


def test_the_page_says_when_nothing_suffices(arguments, place, tmp_path):
    out = place / "run" / "prices" / "step_0000004"
    if not out.exists():
        assert main(arguments) == 0
    page = write_report(out).read_text()
    assert page.count("<picture>") == 1
    assert "The ring marks the choice." in page
    result = read_result(Price, out / "price.json")
    far = tuple(replace(point, within=False) for point in result.points)
    none = replace(result, choice=None, confirmed=(), points=far)
    write_result(tmp_path / "price.json", none)
    page = write_report(tmp_path).read_text()
    assert "No setting comes within the error of the published sampler" in page
    assert "No setting reaches the band." in page
    assert 'id="confirmed"' not in page
