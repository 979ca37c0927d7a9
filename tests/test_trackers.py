"""Trackers: what they are given, that a continued run continues them, and that nothing they do ends a training."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jlt.config import NetworkConfig, TrainConfig
from jlt.training.journal import Tracker, Trackers, flat_numbers, open_trackers

CONFIG = TrainConfig(
    name="run", prediction="x", network=NetworkConfig(channels=4, height=4, width=4, num_classes=3), ema=(0.99,)
)
TENSORBOARD = dataclasses.replace(CONFIG, tensorboard=True)
OFFLINE = dataclasses.replace(CONFIG, wandb="offline")
ONLINE = dataclasses.replace(CONFIG, wandb="online")

needs_tensorboard = pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed"
)
needs_wandb = pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")

STAND_IN = """
import json, os
from pathlib import Path

CALLS = Path(os.environ["STAND_IN_CALLS"])

def note(what, **options):
    if os.environ.get("STAND_IN_FAILS") == what:
        raise OSError(f"{what} failed\\nand printed more")
    with CALLS.open("a") as file:
        file.write(json.dumps({"call": what, **options}) + "\\n")

class Settings:
    def __init__(self, **options):
        self.options = options

def setup(settings):
    note("setup", **settings.options)

def login(prompt):
    note("login", prompt=prompt)
    return "STAND_IN_KEY" in os.environ

def Image(path):
    return f"image {Path(path).name}"

class Run:
    def log(self, values, step):
        note("log", values=values, step=step)

    def finish(self):
        note("finish")

def init(settings, **options):
    note("init", **options)
    return Run()
"""


class Recorder:
    """A tracker that fails from a given call on."""

    def __init__(self, fails_at: int = 1000) -> None:
        self.calls: list[str] = []
        self.fails_at = fails_at
        self.tracker = Tracker("Recorder", self.log, self.image, self.close)

    def _note(self, what: str) -> None:
        self.calls.append(what)
        if len(self.calls) >= self.fails_at:
            raise ConnectionError("the server is down")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._note(f"log {step} {sorted(values)}")

    def image(self, step: int, name: str, path: Path) -> None:
        self._note(f"image {step} {name} {path.name}")

    def close(self) -> None:
        self._note("close")


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "grid.png"
    Image.new("RGB", (24, 16), (200, 10, 30)).save(path)
    return path


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Put a stand-in for wandb in its place, and return the file into which it writes its calls."""
    (tmp_path / "packages" / "wandb").mkdir(parents=True)
    (tmp_path / "packages" / "wandb" / "__init__.py").write_text(textwrap.dedent(STAND_IN))
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setenv("STAND_IN_CALLS", str(tmp_path / "calls.jsonl"))
    yield tmp_path / "calls.jsonl"
    sys.modules.pop("wandb", None)


def read(calls: Path) -> list[dict]:
    return [json.loads(line) for line in calls.read_text().splitlines()]


def test_nested_numbers_get_names_with_slashes() -> None:
    values = {"event": "step", "loss": 1, "ema": {"0.99": 0.5}, "by_time": [1.0, None, 3.0], "mfu": None, "on": True}
    assert flat_numbers(values) == {"loss": 1.0, "ema/0.99": 0.5, "by_time/0": 1.0, "by_time/2": 3.0}


def test_a_tracker_that_fails_is_named_once_and_the_others_go_on(
    picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken, sound = Recorder(fails_at=2), Recorder()
    trackers = Trackers([broken.tracker, sound.tracker])
    for step in (1, 2, 3):
        trackers.log(step, {"loss": 0.5})
    trackers.image(3, "samples", picture)
    trackers.close()
    trackers.log(4, {"loss": 0.5})
    assert broken.calls == ["log 1 ['loss']", "log 2 ['loss']"]
    assert sound.calls == [*(f"log {step} ['loss']" for step in (1, 2, 3)), "image 3 samples grid.png", "close"]
    assert capsys.readouterr() == ("", "Recorder is off for the rest of this training: the server is down.\n")


def test_a_run_without_trackers_opens_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trackers = open_trackers(CONFIG, tmp_path, 0)
    trackers.log(1, {"loss": 1.0})
    trackers.close()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().err == ""


def test_packages_that_are_missing_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    open_trackers(dataclasses.replace(TENSORBOARD, wandb="offline"), tmp_path, 0).log(1, {"loss": 1.0})
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" is off")[0] for line in lines] == ["TensorBoard", "Weights & Biases"]
    assert all("pip install -e '.[trackers]'" in line for line in lines)


def test_other_processes_than_the_first_open_none(tmp_path: Path, calls: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    open_trackers(OFFLINE, tmp_path / "run", 0).log(1, {"loss": 1.0})
    assert not calls.exists()


def test_importing_loads_neither_tracker() -> None:
    code = "import sys, jlt.training.journal; print([m for m in ('wandb', 'tensorboard', 'torch') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# TensorBoard


def read_scalars(folder: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0}).Reload()


@needs_tensorboard
def test_event_files_hold_what_was_logged(tmp_path: Path, picture: Path) -> None:
    trackers = open_trackers(TENSORBOARD, tmp_path / "run", 0)
    for step in (1, 2):
        trackers.log(step, {"loss": 1 / step, "ema_distance": {"0.99": 0.25}, "mfu": None})
    trackers.image(2, "samples", picture)
    trackers.close()
    events = read_scalars(tmp_path / "run" / "tensorboard")
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1.0), (2, 0.5)]
    assert sorted(events.Tags()["scalars"]) == ["ema_distance/0.99", "loss"]
    (image,) = events.Images("samples")
    assert (image.step, image.width, image.height) == (2, 24, 16)
    with Image.open(io.BytesIO(image.encoded_image_string)) as stored:
        assert np.array_equal(np.asarray(stored.convert("RGB")), np.asarray(Image.open(picture)))


@needs_tensorboard
def test_a_continued_run_withdraws_what_it_does_again(tmp_path: Path) -> None:
    for resumed, value in ((0, 1.0), (2, 2.0)):
        trackers = open_trackers(TENSORBOARD, tmp_path, resumed)
        for step in range(resumed + 1, resumed + 4):
            trackers.log(step, {"loss": value})
        trackers.close()
    events = read_scalars(tmp_path / "tensorboard").Scalars("loss")
    assert [(event.step, event.value) for event in events] == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0), (5, 2.0)]


@needs_tensorboard
def test_a_folder_that_cannot_be_written_ends_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tensorboard").write_text("a file where the folder belongs")
    trackers = open_trackers(TENSORBOARD, tmp_path, 0)
    trackers.log(1, {"loss": 1.0})
    trackers.close()
    assert capsys.readouterr().err.startswith("TensorBoard is off for the rest of this training: ")


@needs_tensorboard
def test_a_picture_that_is_gone_switches_off_and_ends_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trackers = open_trackers(TENSORBOARD, tmp_path, 0)
    trackers.image(1, "samples", tmp_path / "none.png")
    trackers.log(1, {"loss": 1.0})
    trackers.close()
    assert capsys.readouterr().err.count("TensorBoard is off") == 1


# Weights & Biases


def test_a_continued_run_keeps_its_identity(tmp_path: Path, calls: Path, picture: Path) -> None:
    for resumed in (0, 2):
        trackers = open_trackers(OFFLINE, tmp_path / "run", resumed)
        trackers.log(resumed + 1, {"loss": 1.0, "ema_distance": {"0.99": 0.25}})
        trackers.image(resumed + 1, "samples", picture)
        trackers.close()
    made = [call for call in read(calls) if call["call"] == "init"]
    assert len(made) == 2
    assert made[0] == made[1]
    assert (made[0]["resume"], made[0]["mode"], made[0]["name"]) == ("allow", "offline", "run")
    assert made[0]["id"] == (tmp_path / "run" / "wandb" / "id").read_text()
    assert made[0]["dir"] == str(tmp_path / "run")
    assert made[0]["config"]["network"]["channels"] == 4
    logged = [call for call in read(calls) if call["call"] == "log"]
    assert logged[0] == {"call": "log", "values": {"loss": 1.0, "ema_distance/0.99": 0.25}, "step": 1}
    assert logged[1] == {"call": "log", "values": {"samples": "image grid.png"}, "step": 1}
    assert read(calls)[-1]["call"] == "finish"


def test_it_may_not_wait_for_long_or_write_between_the_lines(tmp_path: Path, calls: Path) -> None:
    open_trackers(OFFLINE, tmp_path / "run", 0)
    settings = read(calls)[0]
    assert (settings["silent"], settings["console"]) == (True, "off")
    assert 0 < settings["init_timeout"] <= 60
    assert 0 < settings["finish_timeout"] <= 60


def test_a_missing_key_is_reported_without_a_prompt(
    tmp_path: Path, calls: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    open_trackers(ONLINE, tmp_path / "run", 0).log(1, {"loss": 1.0})
    assert [call["call"] for call in read(calls)] == ["setup", "login"]
    assert read(calls)[1]["prompt"] is False
    assert "there is no API key" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["setup", "login", "init", "log", "finish"])
def test_whatever_fails_is_one_sentence(
    what: str, tmp_path: Path, calls: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STAND_IN_FAILS", what)
    monkeypatch.setenv("STAND_IN_KEY", "1")
    trackers = open_trackers(ONLINE, tmp_path / "run", 0)
    for step in (1, 2):
        trackers.log(step, {"loss": 1.0})
    trackers.close()
    assert capsys.readouterr() == ("", f"Weights & Biases is off for the rest of this training: {what} failed.\n")


@needs_wandb
def test_the_real_one_works_without_a_network_and_prints_nothing(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; import test_trackers as t;"
        "trackers = t.open_trackers(t.OFFLINE, Path(sys.argv[1]), 0);"
        "trackers.log(1, {'loss': 1.0}); trackers.close()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        cwd=Path(__file__).parent,
    )
    assert (done.stdout, done.stderr) == ("", "")
    identity = (tmp_path / "wandb" / "id").read_text()
    assert list((tmp_path / "wandb").glob(f"offline-run-*-{identity}/run-{identity}.wandb"))
