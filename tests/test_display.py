"""What a person sees of a training: on a terminal, in a log, in a silenced process."""

from __future__ import annotations

import io
import re

import pytest

from jlt.runtime import progress
from jlt.training.display import figures, training_display

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
    """A stderr that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def plain(text: str) -> list[str]:
    """Return the lines of terminal output without escape sequences."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "\n", text).split("\n")


def test_a_log_gets_a_line_at_most_every_ten_seconds(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with training_display("run", 1000, 1500) as display:
        for step, seconds in ((1050, 5.0), (1100, 5.0), (1150, 5.0), (1200, 1.0), (1500, 1.0)):
            clock.now += seconds
            display.show({**STEP, "step": step})
    shown = capsys.readouterr().err.splitlines()
    assert [re.search(r"step ([\d,]+) of 1,500", line)[1] for line in shown] == ["1,050", "1,150", "1,500"]
    assert shown[1] == (
        "run: step 1,150 of 1,500, after 15 s, 35 s left "
        "(loss 0.8123, 1,204 img/s, MFU 41%, 12.3 GiB, learning rate 0.0002, gradient 0.312)"
    )


def test_a_step_is_shown_when_asked_for(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with training_display("run", 0, 1500) as display:
        display.show({"step": 10, "loss": 1.0})
        display.show({"step": 20, "loss": 1.0})
        display.show({"step": 30, "loss": 1.0}, force=True)
    assert [line[:11] for line in capsys.readouterr().err.splitlines()] == ["run: step 1", "run: step 3"]


def test_time_left_counts_this_session_alone_and_runs_down(clock: Clock) -> None:
    pace = progress.Pace(1500)
    pace.read(1000)
    assert pace.seconds_left() is None
    clock.now += 20
    pace.read(1100)
    assert pace.seconds_left() == pytest.approx(80)
    clock.now += 30
    assert pace.seconds_left() == pytest.approx(50)
    clock.now += 100
    assert pace.seconds_left() == 0


@pytest.mark.parametrize("columns", [40, 80, 120])
def test_no_line_of_a_terminal_is_wrapped(clock: Clock, monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    stderr = Terminal()
    monkeypatch.setattr("sys.stderr", stderr)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(columns))
    with training_display("imagenet256-jlt-b1-with-a-long-name", 1000, 250_000) as display:
        clock.now += 10
        display.show(STEP)
        display.note("Saved.")
    lines = plain(stderr.getvalue())
    assert max(map(len, lines)) <= columns
    assert "Saved." in lines
    last = [line for line in lines if line.strip()][-2:]
    assert last[1].startswith("loss 0.8123, 1,204 img/s")
    if columns >= 80:
        assert "0.4%    1,050/250,000  13 h 49 min left" in last[0]
        assert "12.3 GiB" in last[1]


def test_a_silenced_process_shows_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress, "_silent", True)
    with training_display("run", 0, 10) as display:
        display.show(STEP, force=True)
        display.note("Saved.")
    assert capsys.readouterr() == ("", "")


def test_nothing_is_written_to_stdout(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with training_display("run", 0, 1050) as display:
        display.show(STEP)
        display.note("Saved.")
    assert capsys.readouterr().out == ""


def test_missing_numbers_are_left_out_and_waiting_is_shown_where_it_matters() -> None:
    assert figures({"step": 1}) == ""
    assert figures({"step": 1, "loss": None, "mfu": None, "img_per_second": 3.21}) == "3.2 img/s"
    assert figures({"loss": 1.0, "img_per_second": 120.0, "waiting": 0.2}) == "loss 1, 120 img/s, waiting for data 20%"
    assert figures({"waiting": 0.2}) == "waiting for data 20%"


def test_a_list_is_cut_between_its_entries() -> None:
    assert progress.fitting("loss 1, 2 img/s, MFU 3%", 16) == "loss 1, 2 img/s"
    assert progress.fitting("loss 1", 3) == ""
