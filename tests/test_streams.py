"""Terminals and streams: names are data, any encoding shows any text, and a stream that is lost is one sentence."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from jlt.cli.main import main
from jlt.errors import unknown_name
from jlt.images.contact_sheet import SheetText, draw_sheet
from jlt.report.wording import text_table
from jlt.runtime import processes, progress
from jlt.runtime.streams import LONGEST_MESSAGE, harmless, prepare_streams, say

MARKUP = st.text(st.sampled_from("[]/bolder:bug #\\'\"é—…\x1b\x9b\u202e\ud800mk"), min_size=1, max_size=30)
PRINT = ["train", "digits", "--print-config", "--json"]
BAD_LAUNCHERS = [
    {"RANK": "abc"},
    {"RANK": "1"},
    {"RANK": "-1", "WORLD_SIZE": "2"},
    {"WORLD_SIZE": "2"},
    {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost"},
    {"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"},
    {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "70000"},
    {"WORLD_SIZE": "0"},
]


@given(text=st.text() | MARKUP, encoding=st.sampled_from(["ascii", "latin-1", "cp1252", "utf-8", "koi8-r"]))
def test_every_text_is_shown_in_every_encoding(text, encoding):
    prepare_streams()
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="jlt")
    stream.write(harmless(text))
    stream.flush()
    shown = stream.buffer.getvalue().decode(encoding)
    assert not any(letter in shown for letter in "\x1b\x07\x9b\x00")


def test_letters_lose_their_accents_and_signs_become_ascii():
    prepare_streams()
    assert "Fréchet ± 0.1 \N{MULTIPLICATION SIGN} 10⁻³ — ε…".encode("ascii", "jlt") == b"Frechet +- 0.1 x 10-3 - eps..."


def visible(text: str) -> str:
    """Return what a terminal certainly shows of a text."""
    return "".join(letter for letter in text if letter in "[]/bolder:ug#'\"mk")


@given(MARKUP)
def test_names_in_tables_and_bars_are_no_markup(name):
    assert visible(name) in visible(text_table(["?", "?"], [[f"<{name}>", "1"]]))
    # A long description is cut.
    with progress.bar(name[:8], 2) as bar:
        console = Console(file=io.StringIO(), width=200)
        console.print(bar._progress)
    assert visible(harmless(name[:8])) in visible(console.file.getvalue())


def test_a_name_of_a_megabyte_takes_no_time_and_little_room(capsys):
    name = "x" * 2**20
    images = np.zeros((2, 16, 16, 3), np.uint8)
    sheet = draw_sheet(images, 2, SheetText(name, [name], [name, "a\nb"], [name, "\n" * 2**20]))
    assert max(sheet.size) < 2000
    assert len(str(unknown_name("class", name, [name, "cat"]))) < 1000
    say(name)
    assert len(capsys.readouterr().err) <= LONGEST_MESSAGE + 2


def run(*arguments: str, **options) -> subprocess.CompletedProcess[str]:
    program = [str(Path(sys.executable).with_name("jlt")), *arguments]
    return subprocess.run(program, stderr=subprocess.PIPE, text=True, timeout=60, check=False, **options)


@pytest.mark.parametrize("arguments", [["--help"], PRINT])
@pytest.mark.parametrize("lost", ["full", "closed", "pipe"])
def test_a_lost_stdout_is_one_sentence(arguments, lost):
    if lost == "full":
        with Path("/dev/full").open("w") as stream:
            done = run(*arguments, stdout=stream)
    elif lost == "closed":
        done = run(*arguments, preexec_fn=lambda: os.close(1))
    else:
        reading, writing = os.pipe()
        os.close(reading)
        done = run(*arguments, stdout=writing)
        os.close(writing)
    assert done.returncode == 1
    assert done.stderr.startswith("jlt: stdout cannot be written (")
    assert done.stderr.count("\n") == 1


def test_a_lost_stderr_ends_no_work():
    program = [str(Path(sys.executable).with_name("jlt")), *PRINT]
    with Path("/dev/full").open("w") as stream:
        done = subprocess.run(program, stdout=subprocess.PIPE, stderr=stream, timeout=60, check=False)
    assert done.returncode == 0
    assert done.stdout.startswith(b"{")


def test_a_terminal_of_ascii_shows_a_table(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    assert main(["plan", "digits"]) == 0
    assert b"It fits" in stream.buffer.getvalue()


@pytest.mark.parametrize("variables", BAD_LAUNCHERS)
def test_wrong_variables_of_a_launcher_are_named(variables, monkeypatch, capsys):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert main(PRINT) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "unset" in message
    assert any(name in message for name in variables)


def test_workers_without_semaphores_are_a_sentence(monkeypatch):
    def refuse(*arguments: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("multiprocessing.synchronize._multiprocessing.SemLock", refuse)
    with pytest.raises(processes.JLTError, match=r"/dev/shm \(Read-only file system\)"):
        processes.spawn_context()
