"""Progress and the figures of a training: on a terminal, in a log, in a silenced process."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest

from jlt.config import NetworkConfig, TrainConfig
from jlt.runtime import progress
from jlt.training.journal import Journal, figures

STEP = {
    "event": "step",
    "step": 1050,
    "loss": 0.81234,
    "img_per_second": 1204.3,
    "mfu": 0.412,
    "memory_gib": 12.34,
    "learning_rate": 2e-4,
    "grad_norm": 0.3123,
    "waiting": 0.004,
}


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress.time, "monotonic", clock)
    return clock


class Terminal(io.StringIO):
    """A stderr that reports itself as a terminal."""

    def isatty(self) -> bool:
        return True


def plain(text: str) -> list[str]:
    """Return the lines of terminal output without escape sequences."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "\n", re.sub(r"\x1b\[[0-9;]*m", "", text)).split("\n")


def test_a_log_gets_a_line_at_most_every_ten_seconds(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress.bar("run", 1500, "step") as shown:
        shown.show(1000)
        for step, seconds in ((1050, 5.0), (1100, 5.0), (1150, 5.0), (1200, 1.0)):
            clock.now += seconds
            shown.show(step, figures({**STEP, "step": step}))
        shown.show(1500, force=True)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("run: step 1,100 of 1,500, after 10 s, 40 s left (loss 0.8123")
    assert lines[1:] == ["run: step 1,500 of 1,500, after 16 s, 0 s left"]


def test_a_training_shows_its_first_and_its_last_step(
    tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    network = NetworkConfig(channels=4, height=2, width=2, num_classes=2)
    config = TrainConfig(name="run", prediction="x", network=network, steps=40)
    with Journal(tmp_path, config, step=0, rank=0) as journal:
        journal.show()
        for step in (10, 20, 30, 40):
            clock.now += 1
            journal.write(**{**STEP, "step": step})
        journal.write("saved", step=40, pause_seconds=0.1)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert [line.partition(",")[0] for line in shown.err.splitlines()] == [
        "run: step 10 of 40",
        "run: step 40 of 40",
        "Step 40 is saved; training paused for 0.1 s.",
    ]
    assert shown.err.splitlines()[0] == (
        "run: step 10 of 40, after 1 s "
        "(loss 0.8123, 1,204 img/s, MFU 41%, 12.3 GiB, learning rate 0.0002, gradient 0.312)"
    )


def test_time_left_counts_this_session_alone(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress.bar("run", 1500, "step") as shown:
        shown.show(1000)
        clock.now += 20
        shown.show(1100, force=True)
    assert capsys.readouterr().err == "run: step 1,100 of 1,500, after 20 s, 1 min 20 s left\n"


def test_work_without_steps_shows_a_percentage(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress.bar("reading", 8) as shown:
        shown.show(2, force=True)
    with progress.bar("reading", None) as shown:
        shown.show(2, "a file", force=True)
    assert capsys.readouterr().err.splitlines() == ["reading: 25%, after 0 s", "reading: 2, after 0 s (a file)"]


@pytest.mark.parametrize("columns", [40, 80, 120])
def test_no_line_of_a_terminal_is_wrapped(clock: Clock, monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    stderr = Terminal()
    monkeypatch.setattr("sys.stderr", stderr)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(columns))
    with progress.bar("imagenet256-jlt-b1-with-a-long-name", 250_000, "step") as shown:
        shown.show(1000)
        clock.now += 10
        shown.show(1050, figures(STEP))
        progress.inform("Saved.")
    lines = plain(stderr.getvalue())
    assert max(map(len, lines)) <= columns
    assert "Saved." in [line.strip() for line in lines]
    last = [line for line in lines if line.strip()][-2:]
    assert last[0].startswith("imagen")
    assert "1050/250000 13:49:50 left" in last[0]
    assert last[1].startswith("loss 0.8123, 1,204 img/s")
    if columns >= 80:
        assert "12.3 GiB" in last[1]


def test_a_silenced_process_shows_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress, "_silent", True)
    with progress.bar("run", 10, "step") as shown:
        shown.show(5, figures(STEP), force=True)
        progress.inform("Saved.")
    assert capsys.readouterr() == ("", "")


def test_missing_numbers_are_left_out_and_waiting_is_shown_where_it_matters() -> None:
    assert figures({"step": 1}) == ""
    assert figures({"step": 1, "loss": None, "mfu": None, "img_per_second": 3.21}) == "3.2 img/s"
    assert figures({"loss": 1.0, "img_per_second": 120.0, "waiting": 0.2}) == "loss 1, 120 img/s, waiting for data 20%"
    assert figures({"waiting": 0.2}) == "waiting for data 20%"
