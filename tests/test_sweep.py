"""Sweeps: the search finds a known optimum, chooses and confirms by different images, and resumes."""

import dataclasses
import itertools
import json
import shlex
import shutil
import signal

import forked
import pytest
from data_helpers import file_bytes
from training_helpers import run_on_few_digits

from jlt.cli.evaluation import parse_interval
from jlt.cli.main import main
from jlt.config import SampleConfig
from jlt.errors import JLTError, UsageError
from jlt.evaluation.metrics import jackknife
from jlt.experiments import measured_settings
from jlt.experiments import sweep as sweeping
from jlt.experiments.search import Measured, SweepConfig, default_coarse_num, keep, search, to_confirm
from jlt.report import palette
from jlt.report.page import write_report
from jlt.results.evaluation import Evaluation, Metrics
from jlt.results.sweep import Setting
from jlt.sampling.sampler import ImageSampler, open_sampler, with_config
from jlt.storage.files import sealed_text
from jlt.training.checkpoint import open_checkpoint

WHOLE = (0.0, 1.0)
NOTHING = Evaluation(0, Metrics(frechet_distance=0.0, count=0), {})
"""The search reads no evaluation."""

# ---- the search, on functions whose optimum is known ----


def config_of(**changes):
    settings = {
        "sample": SampleConfig(num=800, seed=3),
        "cfg_scale": (1.0, 1.5, 2.0, 3.0, 4.0),
        "cfg_interval": (WHOLE, (0.25, 1.0)),
        "ema": ("0.999", "none"),
        "coarse_num": 100,
        "confirm_seed": 4,
        **changes,
    }
    return SweepConfig(**settings)


class Landscape:
    """Measures a bowl whose bottom is guidance 1.8 for t from 0.25 with the average, and records its measurements."""

    def __init__(self, error=0.05, sign=1):
        self.error, self.sign, self.measured, self.dropped = error, sign, [], []

    def cost(self, setting):
        away = 0.0 if setting.cfg_interval == (0.25, 1.0) else 0.3
        return 2 + (setting.cfg_scale - 1.8) ** 2 + away + (0.7 if setting.ema == "none" else 0)

    def measure(self, stage, settings, num):
        self.measured += [(stage, setting, num) for setting in settings]
        error = self.error * (100 / num) ** 0.5
        # Too large for want of images, as a Frechet distance is.
        values = [self.sign * (self.cost(setting) + 40 / num) for setting in settings]
        return [
            Measured(setting, num, 3, value, error, self.sign > 0, NOTHING)
            for setting, value in zip(settings, values, strict=True)
        ]

    def drop(self, setting):
        self.dropped.append(setting)


@pytest.mark.parametrize("sign", [1, -1], ids=["lower is better", "higher is better"])
def test_the_search_finds_the_bottom_and_refines_it(sign):
    land, config = Landscape(sign=sign), config_of(refine=2)
    stages = search(config, land.measure, land.drop)
    # The grid has 2.0 as its best; 1.75 is between 1.5 and 2, and then 1.625 and 1.875.
    assert stages[0].measured[0].setting == Setting(2.0, (0.25, 1.0), "0.999")
    best = stages[-1].measured[0]
    assert best.setting == Setting(1.75, (0.25, 1.0), "0.999")
    assert [stage.round.kind for stage in stages][-2:] == ["refinement", "refinement"]
    for stage in stages:
        assert len({point.num for point in stage.measured}) == 1
        costs = [point.cost for point in stage.measured]
        assert costs == sorted(costs)


def test_unguided_settings_are_measured_once_whatever_the_interval():
    settings = config_of().settings()
    assert len(settings) == len(set(settings)) == 2 * (2 * 4 + 1)
    assert [setting.cfg_interval for setting in settings if setting.cfg_scale == 1] == [WHOLE, WHOLE]


def test_a_stage_drops_only_what_is_in_the_worse_half_and_worse_by_more_than_the_errors():
    def point(value, error):
        return Measured(Setting(value, WHOLE, "none"), 10, 0, value, error, True, NOTHING)

    # 2 errors of the difference are 2 * hypot(0.1, 0.1) = 0.283.
    ranked = [point(value, 0.1) for value in (1.0, 1.9, 2.0, 2.5)]
    assert keep(ranked) == ranked[:2]
    close = [point(value, 0.1) for value in (1.0, 1.1, 1.2, 1.28, 1.29)]
    assert keep(close) == close[:4]
    exact = [point(value, 0.0) for value in (1.0, 1.0, 1.0, 1.1)]
    assert keep(exact) == exact[:3]


def test_settings_that_become_better_and_worse_together_are_distinguished():
    """The error of a difference is that of the differences, not of the two numbers."""

    def point(scale, values, common):
        parts = tuple(value + wave for value, wave in zip(values, common, strict=True))
        whole = sum(parts) / len(parts)
        return Measured(Setting(scale, WHOLE, "none"), 100, 0, whole, 1.0, True, NOTHING, parts, (10,) * 10)

    wave = [0.3 * (-1) ** part for part in range(10)]
    best = point(2.0, [1.0 + 0.001 * part for part in range(10)], wave)
    near = point(2.5, [1.1] * 10, wave)
    far = point(3.0, [1.1] * 10, wave[::-1])
    # By its definition, sqrt((g - 1) / g * sum of squares).
    assert near.difference_error(best) == pytest.approx((0.9 * sum((0.001 * (i - 4.5)) ** 2 for i in range(10))) ** 0.5)
    assert near.clearly_worse(best)
    assert far.difference_error(best) > 50 * near.difference_error(best)
    assert not far.clearly_worse(best)
    assert not near.clearly_worse(near)


def test_dropped_settings_are_not_measured_again_and_others_with_more_images():
    land, config = Landscape(error=0.02), config_of(refine=0)
    stages = search(config, land.measure, land.drop)
    for stage, following in itertools.pairwise(stages):
        kept = {point.setting for point in stage.measured[: stage.kept]}
        assert {point.setting for point in following.measured} == kept
        assert following.measured[0].num == 2 * stage.measured[0].num
    assert len(land.dropped) == len(set(land.dropped)) == len(config.settings()) - len(stages[-1].measured)


def test_indistinguishable_settings_are_all_measured_in_full():
    land, config = Landscape(error=100.0), config_of(refine=0)
    stages = search(config, land.measure, land.drop)
    assert [stage.measured[0].num for stage in stages] == [100, 200, 400, 800]
    assert not land.dropped
    assert len(to_confirm(config, stages[-1])) == config.confirm == 2


def test_only_settings_indistinguishable_from_the_best_are_confirmed_too():
    land, config = Landscape(error=0.0), config_of(refine=1)
    stages = search(config, land.measure, land.drop)
    assert [point.setting.cfg_scale for point in to_confirm(config, stages[-1])] == [1.75]


def test_networks_are_opened_once_a_stage():
    land = Landscape(error=100.0)
    search(config_of(refine=0), land.measure, land.drop)
    for stage in {stage for stage, _, _ in land.measured}:
        emas = [setting.ema for name, setting, _ in land.measured if name == stage]
        assert emas == sorted(emas)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cfg_scale": ()}, "cfg-scale needs one"),
        ({"ema": ("none", "none")}, "each of them once"),
        ({"coarse_num": 9}, "between 10 and"),
        ({"coarse_num": 900}, "between 10 and"),
        ({"confirm_seed": 3}, "must differ from the seed of the search"),
        ({"confirm": 0}, "confirm must be from 1 to 100, not 0"),
        ({"cfg_interval": ((0.5, 0.2),)}, "low < high"),
    ],
)
def test_impossible_arguments_are_refused(changes, message):
    with pytest.raises(JLTError, match=message):
        config_of(**changes)


def test_intervals_are_pairs():
    assert parse_interval("0.1,1") == (0.1, 1.0)
    for arguments in ("0.1", "a,b", "0,0.5,1"):
        with pytest.raises(UsageError, match="pairs low,high"):
            parse_interval(arguments)


def test_the_first_stage_has_whole_batches():
    assert default_coarse_num(SampleConfig(num=50_000, batch_size=256), 2048) == 4096
    assert default_coarse_num(SampleConfig(num=50_000, batch_size=300), 2048) == 4200
    assert default_coarse_num(SampleConfig(num=1000, batch_size=64), 64) == 128
    assert default_coarse_num(SampleConfig(num=50, batch_size=256), 64) == 50


# ---- on a run ----


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return run_on_few_digits(tmp_path_factory.mktemp("sweep"))


@pytest.fixture
def arguments(place):
    run, reference = str(place / "run"), str(place / "reference.npz")
    axes = ["--cfg-scale", "1", "2", "4", "--cfg-interval", "0,1", "0.2,0.9", "--ema", "0.99", "sigma_rel=0.07"]
    sampling = ["--num", "40", "--coarse-num", "20", "--batch-size", "10", "--solver", "euler", "--steps", "2"]
    return ["sweep", "--checkpoint", run, "--reference", reference, *axes, *sampling, "--seed", "7"]


@pytest.fixture
def few(arguments):
    """A sweep of three settings."""
    return [*arguments, "--cfg-interval", "0,1", "--ema", "0.99", "--refine", "1"]


@pytest.fixture(scope="module")
def few_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("few") / "sweep"


@pytest.fixture
def few_results(few_folder, few):
    """What a sweep of three settings finds when nothing disturbs it."""
    if not few_folder.exists():
        assert main([*few, "--out", str(few_folder)]) == 0
    return results(few_folder)


@pytest.fixture(scope="module")
def whole(place, tmp_path_factory):
    """What an undisturbed sweep leaves; tests must not change it."""
    return tmp_path_factory.mktemp("whole") / "sweep"


@pytest.fixture
def swept(whole, arguments):
    if not whole.exists():
        assert main([*arguments, "--out", str(whole)]) == 0
    return json.loads((whole / "sweep.json").read_text())


def results(folder):
    content = json.loads((folder / "sweep.json").read_text())
    return {key: value for key, value in content.items() if key not in ("created", "command", "sha256")}


def parts_of(stored):
    return stored["jackknife"]["frechet_distance"], stored["jackknife"]["sizes"]


def test_a_sweep_of_a_run(whole, swept):
    first = swept["stages"][0]
    assert (first["name"], first["num"], len(first["points"])) == ("coarse", 20, 2 * (1 + 2 * 2))
    searched = [point for stage in swept["stages"] for point in stage["points"]]
    assert {point["seed"] for point in searched} == {7}
    assert {(point["seed"], point["num"]) for point in swept["confirmed"]} == {(8, 40)}
    assert (swept["search"]["seed"], swept["confirmation"]["seed"]) == (7, 8)
    for point in [*searched, *swept["confirmed"]]:
        protocol, metrics = point["protocol"], point["metrics"]
        same = ("cfg_scale", "cfg_interval", "ema", "seed")
        assert {key: protocol[key] for key in same} == {key: point[key] for key in same}
        assert (protocol["count"], metrics["count"]) == (point["num"], point["num"])
        assert point["value"] == metrics["frechet_distance"]
        assert point["error"] == metrics["frechet_distance_error"]
    for stage in swept["stages"]:
        best, *others = stage["points"]
        assert best["behind"] is None
        for point in others:
            assert point["behind"]["difference"] == point["value"] - best["value"] >= 0
            assert point["behind"]["error"] > 0
    for path in (whole / "points").iterdir():
        stored = json.loads(path.read_text())
        error, _ = jackknife(stored["metrics"]["frechet_distance"], *parts_of(stored))
        assert error == pytest.approx(stored["metrics"]["frechet_distance_error"], rel=1e-9)
    chosen = min(swept["stages"][-1]["points"], key=lambda point: point["value"])
    assert all(swept["confirmed"][0][key] == chosen[key] for key in ("cfg_scale", "cfg_interval", "ema"))
    # Features go when they are no longer needed, and so does all else that is no result.
    assert sorted(path.name for path in whole.iterdir()) == [
        "plan.json", "points", "report.html", "sweep.json",
    ]  # fmt: skip


def test_the_command_measures_the_same_number_to_the_last_digit(swept, capsys):
    capsys.readouterr()
    assert main([*shlex.split(swept["reproduce"])[1:], "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["metrics"] == swept["confirmed"][0]["metrics"]
    assert again["protocol"] == swept["confirmed"][0]["protocol"]


def test_the_page(whole, swept):
    before = (whole / "report.html").read_text()
    page = write_report(whole).read_text()
    assert page == before
    assert "that took no part in the choice" in page
    assert "Seed 7 chose, seed 8 confirmed." in page
    assert page.count("<picture>") >= 2
    assert "Guidance for t from 0.2 to 0.9" not in page  # It is within the pictures.
    for text in ("went on", "chosen", "--cfg-scale"):
        assert text in page


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_numbers_can_be_read_in_every_cell_of_a_map(mode):
    def luminance(colour):
        values = [int(getattr(colour, mode)[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in values]
        return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    for level, colour in enumerate(palette.SCALE):
        low, high = sorted((luminance(colour), luminance(palette.PAPER if level < palette.DEEP else palette.INK)))
        assert (high + 0.05) / (low + 0.05) >= 4.5  # WCAG 2 for text
    assert len({colour.light for colour in palette.SCALE}) == len(palette.SCALE)


def test_a_damaged_result_is_named(whole, swept, tmp_path):
    edited = {**swept, "stages": []}
    (tmp_path / "sweep.json").write_text(json.dumps(edited))
    with pytest.raises(JLTError, match="edited or damaged"):
        write_report(tmp_path)
    del edited["sha256"]
    (tmp_path / "sweep.json").write_text(json.dumps(edited))
    with pytest.raises(JLTError, match="carries no hash of itself"):
        write_report(tmp_path)
    (tmp_path / "sweep.json").write_text(sealed_text(edited))
    with pytest.raises(JLTError, match="damaged or was written by another version"):
        write_report(tmp_path)


def test_no_image_is_drawn_twice_and_features_go_early(arguments, tmp_path, monkeypatch):
    drawn, draw, drop = [], ImageSampler.batches, sweeping.Sweeper.drop

    def batches(self, numbers=None):
        setting = (self.config.cfg_scale, self.config.cfg_interval, self.config.ema, self.config.seed)
        numbers = list(numbers)
        drawn.extend((*setting, number) for part in numbers for number in part)
        return draw(self, numbers)

    dropped = []

    def dropping(self, setting):
        drop(self, setting)
        dropped.append(setting)
        assert not list((tmp_path / "out" / ".drawn").glob(f"{setting.name}-*"))

    monkeypatch.setattr(ImageSampler, "batches", batches)
    monkeypatch.setattr(sweeping.Sweeper, "drop", dropping)
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 0
    assert dropped
    assert len(drawn) == len(set(drawn))
    content = json.loads((tmp_path / "out" / "sweep.json").read_text())
    sizes = {}
    for stage in content["stages"]:
        for point in stage["points"]:
            sizes[(point["cfg_scale"], tuple(point["cfg_interval"]), point["ema"])] = point["num"]
    assert len(drawn) == sum(sizes.values()) + 40 * len(content["confirmed"])


PLANT = """
import os, signal
from jlt.experiments import measured_settings
write, left = measured_settings.write_result, [{count}]
def writing(path, value):
    left[0] -= path.parent.name == "points"
    if left[0] < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, value)
measured_settings.write_result = writing
"""


def test_a_killed_sweep_resumes_and_ends_the_same(few, few_results, tmp_path):
    out = tmp_path / "out"
    killed = forked.start([*few, "--out", str(out)], plant=PLANT.format(count=4))
    _, message = killed.communicate(timeout=120)
    assert killed.returncode == -signal.SIGKILL, message
    assert len(list((out / "points").iterdir())) == 4
    before = {path: path.stat().st_mtime_ns for path in (out / "points").iterdir()}
    assert main([*few, "--out", str(out)]) == 0
    assert results(out) == few_results
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_stopped_sweep_exits_with_75_and_resumes(few, few_results, tmp_path, monkeypatch):
    evaluate, calls = measured_settings.evaluate_sampler, []

    def stopping(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGTERM)
        return evaluate(*arguments, **options)

    out = tmp_path / "out"
    monkeypatch.setattr(measured_settings, "evaluate_sampler", stopping)
    assert main([*few, "--out", str(out)]) == 75
    assert main([*few, "--out", str(out)]) == 0
    assert results(out) == few_results
    # The point that was under way when the signal came was finished, and no other was measured again.
    assert len(calls) == len(list((out / "points").iterdir()))


def test_a_changed_argument_is_refused(arguments, whole, swept, capsys):
    before = file_bytes(whole)
    for changed in (["--seed", "6"], ["--num", "50"], ["--refine", "0"], ["--steps", "3"]):
        assert main([*arguments, "--out", str(whole), *changed]) == 1
        assert "holds other work" in capsys.readouterr().err
    assert file_bytes(whole) == before


@pytest.mark.parametrize(
    ("changed", "message", "code"),
    [
        (["--ema", "0.77"], "no EMA in this checkpoint", 2),
        (["--ema", "sigma_rel=7"], "does not name a length", 2),
        (["--autoguide-ema", "0.99"], "cannot guide itself", 2),
        (["--cfg-interval", "0.3"], "pairs low,high", 2),
        (["--metric", "spatial_frechet_distance"], "cannot be measured", 1),
    ],
)
def test_what_cannot_be_drawn_is_refused(arguments, tmp_path, capsys, changed, message, code):
    assert main([*arguments, "--out", str(tmp_path / "out"), *changed]) == code
    assert message in capsys.readouterr().err
    if "metric" not in changed[0]:
        assert not (tmp_path / "out").exists()


def test_other_settings_of_an_open_sampler_are_those_of_one_that_is_opened_for_them(place):
    checkpoint = open_checkpoint(place / "run")
    base = SampleConfig(num=4, steps=2, cfg_scale=2.0)
    sampler = open_sampler(checkpoint, base)
    for changes in ({"cfg_scale": 3.0}, {"ema": "none"}, {"autoguide_ema": "none"}, {"t_eps": 0.05}, {"seed": 2}):
        config = dataclasses.replace(base, **changes)
        ours, theirs = with_config(sampler, config), open_sampler(checkpoint, config)
        assert ours.protocol() == theirs.protocol()
        assert ours.autoencoder is sampler.autoencoder
        # Another clamp changes how the output is read, and not the network.
        same = config.ema == sampler.config.ema
        assert (ours.weights.denoiser.network is sampler.weights.denoiser.network) == same
        assert ours.weights.denoiser.t_eps == config.t_eps
        assert next(ours.latent_sampler.batches()).latents.equal(next(theirs.latent_sampler.batches()).latents)
        sampler = ours


def test_a_checkpoint_outside_of_a_run_needs_a_place(place, arguments, tmp_path, capsys):
    copy = tmp_path / "copied" / "here"
    shutil.copytree(open_checkpoint(place / "run").folder, copy)
    assert main([*arguments, "--checkpoint", str(copy)]) == 2
    assert "name a folder for the sweep with --out" in capsys.readouterr().err
