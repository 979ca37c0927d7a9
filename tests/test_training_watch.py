"""Watchers of a run: when they look, at what, and what happens when they fail."""

import dataclasses
import json
from pathlib import Path

import pytest
from training_helpers import config_for, events, run_processes, train_arguments

from jlt.cli.main import main
from jlt.config import EvaluationConfig, SampleConfig
from jlt.errors import JLTError
from jlt.evaluation.extractors import load_extractor
from jlt.experiments.checkpoint_evaluation import evaluate_checkpoint
from jlt.experiments.recipes import images_of_recipe, resolve_recipe
from jlt.experiments.run_training import train_and_watch, warn_ignored_settings
from jlt.runtime.processes import stop_together
from jlt.runtime.signals import Stopped
from jlt.storage.codec import to_json
from jlt.training.checkpoint import list_checkpoints, open_checkpoint, step_folder
from jlt.training.loop import Watcher, train


class Looker(Watcher):
    """Looks at every third step and at the last, and notes what it saw."""

    def __init__(self, fails=None):
        self.seen, self.fails = [], fails

    def due(self, step):
        return step > 0 and step % 3 == 0

    def look(self, checkpoint, group):
        if self.fails is not None:
            raise self.fails
        opened = open_checkpoint(checkpoint)
        if opened.step in self.seen:
            return None
        self.seen.append(opened.step)
        return {"event": "seen", "updates": opened.updates}


def test_watchers_are_shown_whole_checkpoints_at_their_steps(store, tmp_path):
    looker = Looker()
    train(config_for(store, steps=8, checkpoint_every=100, keep_last=2), store, tmp_path / "run", watchers=[looker])
    assert looker.seen == [3, 6]
    assert [(event["step"], event["updates"]) for event in events(tmp_path / "run", "seen")] == [(3, 3), (6, 6)]
    assert [folder.name for folder in list_checkpoints(tmp_path / "run")] == ["step_0000006", "step_0000008"]


def test_looking_changes_nothing(store, tmp_path):
    config = config_for(store, steps=7)
    train(config, store, tmp_path / "plain")
    train(config, store, tmp_path / "watched", watchers=[Looker()])
    hashes = {open_checkpoint(step_folder(tmp_path / name, 7)).sha256 for name in ("plain", "watched")}
    assert len(hashes) == 1


def test_a_run_that_ended_between_a_save_and_a_look_is_looked_at_when_it_continues(store, tmp_path):
    config = config_for(store, steps=6)
    with pytest.raises(KeyboardInterrupt):
        train(config, store, tmp_path / "run", watchers=[Looker(KeyboardInterrupt())])
    assert open_checkpoint(tmp_path / "run").step == 3
    looker = Looker()
    train(config, store, tmp_path / "run", watchers=[looker])
    assert looker.seen == [3, 6]
    # The last step too, of a run that has nothing else left to do.
    late = Looker()
    train(config, store, tmp_path / "run", watchers=[late])
    assert late.seen == [6]


@pytest.mark.parametrize(
    "error", [JLTError("Some of the images are not finite."), RuntimeError("no kernel"), ValueError("eigenvalues")]
)
def test_a_watcher_that_fails_is_logged_and_the_training_goes_on(store, tmp_path, error):
    train(config_for(store, steps=7), store, tmp_path / "run", watchers=[Looker(error)])
    assert open_checkpoint(tmp_path / "run").step == 7
    assert [(event["step"], event["error"]) for event in events(tmp_path / "run", "failed")] == [
        (3, str(error)),
        (6, str(error)),
    ]


def test_a_stop_during_a_look_ends_the_run_with_its_checkpoint(store, tmp_path):
    with pytest.raises(Stopped):
        train(config_for(store, steps=7), store, tmp_path / "run", watchers=[Looker(Stopped("now"))])
    assert open_checkpoint(tmp_path / "run").step == 3


@pytest.fixture(scope="module")
def digits(digit_latents):
    return digit_latents


SAMPLE = SampleConfig(num=20, steps=2, batch_size=20)


def watched(**changes):
    recipe = resolve_recipe("digits")
    settings = {"steps": 4, "batch_size": 8, "sample_every": 2, "evaluate_every": 3, "log_every": 1, **changes}
    return dataclasses.replace(recipe, evaluation=EvaluationConfig(sample=SAMPLE), **settings)


def test_grids_and_evaluations_along_a_run(digits, tmp_path):
    run = tmp_path / "run"
    train_and_watch(watched(tensorboard=False), digits, run)
    assert sorted(path.name for path in (run / "samples").iterdir()) == ["step_0000002.png", "step_0000004.png"]
    assert [event["step"] for event in events(run, "sampled")] == [2, 4]
    found = {event["step"]: event for event in events(run, "evaluated")}
    assert list(found) == [3, 4]
    # The same number as afterwards, from the command for one checkpoint.
    later = evaluate_checkpoint(open_checkpoint(step_folder(run, 4)), "digits", load_extractor("digits"), SAMPLE, None)
    assert to_json(later.metrics) == found[4]["metrics"]
    assert later.protocol == json.loads((run / found[4]["file"]).read_text())["protocol"]


def test_what_exists_is_not_drawn_again(digits, tmp_path):
    run = tmp_path / "run"
    train_and_watch(watched(), digits, run)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.suffix in (".png", ".json")}
    train_and_watch(watched(), digits, run)
    assert {path: path.stat().st_mtime_ns for path in before if path.name != "config.json"} == {
        path: time for path, time in before.items() if path.name != "config.json"
    }


def test_a_reference_that_cannot_be_had_is_refused_before_the_first_step(digits, tmp_path):
    config = watched()
    config = dataclasses.replace(
        config, evaluation=dataclasses.replace(config.evaluation, reference=str(tmp_path / "none.npz"))
    )
    with pytest.raises(JLTError, match=r"none\.npz"):
        train_and_watch(config, digits, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("sample", "named"),
    [
        ({"autoguide": "nowhere", "cfg_scale": 2.0}, "nowhere"),
        ({"num": 9}, "at least 10 images"),
        ({"ema": "0.77"}, "no EMA in this run"),
        ({"labels": "3,10"}, "no class 10"),
        ({"ema": "sigma_rel=7"}, "length"),
    ],
)
def test_samples_that_cannot_be_drawn_are_refused_before_the_first_step(digits, tmp_path, sample, named):
    config = watched()
    evaluation = dataclasses.replace(config.evaluation, sample=dataclasses.replace(SAMPLE, **sample))
    with pytest.raises(JLTError, match=named):
        train_and_watch(dataclasses.replace(config, evaluation=evaluation), digits, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_first_of_several_processes_looks_and_the_others_wait(digits, tmp_path):
    class Place:
        folder = digits

    arguments = ["--steps", "4", "--sample-every", "2", "--evaluate-every", "4", "--evaluation.sample.num", "10"]
    arguments += ["--evaluation.sample.steps", "2"]
    run_processes(2, train_arguments(Place, tmp_path / "run", *arguments))
    assert [event["step"] for event in events(tmp_path / "run", "sampled")] == [2, 4]
    assert [event["step"] for event in events(tmp_path / "run", "evaluated")] == [4]


def test_the_configuration_of_a_run_repeats_it(store, tmp_path):
    config = config_for(store, steps=3)
    train(config, store, tmp_path / "run")
    assert resolve_recipe(str(tmp_path / "run" / "config.json")) == config
    assert images_of_recipe(str(tmp_path / "run" / "config.json")) == len(store)
    arguments = ["train", str(tmp_path / "run" / "config.json"), "--latents", str(store.folder)]
    assert main([*arguments, "--out", str(tmp_path / "again"), "--json"]) == 0
    hashes = {open_checkpoint(tmp_path / name).sha256 for name in ("run", "again")}
    assert len(hashes) == 1


def test_settings_of_a_launcher_that_have_no_effect_are_named(monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    warn_ignored_settings()
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    warn_ignored_settings()
    assert "use --precision instead" in capsys.readouterr().err


def failing_once():
    """Return a watcher that fails in one process alone, before the processes come together."""

    def look(checkpoint, group):
        with stop_together(group):
            if group.rank == 1:
                raise RuntimeError("no memory here")
        raise AssertionError("no process comes here")

    return Watcher(lambda step: step == 2, look)


def test_a_look_that_fails_in_one_process_alone_fails_in_all_and_the_training_goes_on(store, tmp_path):
    plant = """
import sys
sys.path.insert(0, TESTS)
import jlt.experiments.run_training as place
from test_training_watch import failing_once
place.watchers_of = lambda *arguments: [failing_once()]
""".replace("TESTS", repr(str(Path(__file__).parent)))
    run_processes(2, train_arguments(store, tmp_path / "run", "--steps", "4"), plant)
    assert [event["step"] for event in events(tmp_path / "run", "failed")] == [2]
    assert "Process 1 failed (RuntimeError: no memory here)" in events(tmp_path / "run", "failed")[0]["error"]
    assert open_checkpoint(tmp_path / "run").step == 4
