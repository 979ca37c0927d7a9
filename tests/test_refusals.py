"""A command that is refused leaves everything as it was: for invalid settings, and while another process writes."""

from __future__ import annotations

import json
import os
import random
import shutil
import stat
import string
from pathlib import Path

import pytest
from every_command import COMMANDS, ONCE, make_inputs
from hypothesis import given, settings
from hypothesis import strategies as st

from jlt.cli.main import main
from jlt.errors import without_credentials
from jlt.storage.folders import lock_folder

SECRET = "s3cret-" + "".join(random.choices(string.ascii_letters, k=12))
INVALID = {
    "train": ["--init-from", "nonsense"],
    "sample": ["--labels", "nothing"],
    "sample npz": ["--ema", "0.123"],
    "sample grid": ["--cfg-scale", "2", "--autoguide", "nowhere"],
    "sample strip": ["--decoder", "flux2"],
    "evaluate": ["--reference", "nowhere.npz"],
    "analyze": ["--ema", "0.123"],
    "sweep": ["--reference", "nowhere.npz"],
    "price": ["--reference", "nowhere.npz"],
    "ablate": ["--reference", "nowhere.npz"],
    "reference": ["--features", "nonsense"],
    "encode": ["--resolution", "0"],
    "export": ["--ema", "0.123"],
    "export file": ["--ema", "0.123"],
}
"""What makes each command of COMMANDS invalid where only opening the inputs shows it."""
WRITES_INTO = {"evaluate": "", "reference": "", "import": "", "export": "", "export file": "", "report": "", "plan": ""}
WRITES_INTO |= {"sweep": "run/sweeps/step_0000004", "price": "run/prices/step_0000004", "encode": "out/.encoding"}
"""The folder that a command locks, where it is not `out`; empty where it replaces whole files or folders."""

LONG = ("ablate", "price")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("refusals"))


@pytest.fixture
def folder(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(inputs)
    return inputs


def everything(folder: Path) -> dict[str, object]:
    """Return mode, time of change and content of every entry of a folder."""
    return {
        str(path.relative_to(folder)): (
            path.lstat().st_mode,
            path.lstat().st_mtime_ns,
            path.is_file() and path.read_bytes(),
        )
        for path in sorted(folder.rglob("*"))
    }


@pytest.mark.parametrize("name", INVALID)
def test_invalid_settings_change_nothing(
    name: str, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(inputs, tmp_path / "work")
    monkeypatch.chdir(folder)
    # Where nothing is yet, and where the valid command has finished.
    for finished in (False, True) if name not in LONG else (False,):
        assert not finished or main(COMMANDS[name]) == 0
        before = everything(folder)
        assert main([*COMMANDS[name], *INVALID[name]]) in (1, 2)
        assert everything(folder) == before


@pytest.mark.parametrize("name", [name for name in COMMANDS if WRITES_INTO.get(name, "out")])
def test_a_folder_that_another_process_writes_into_stays_as_it_is(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with lock_folder(folder / WRITES_INTO.get(name, "out")):
        before = everything(folder)
        assert main(COMMANDS[name]) == 1
        assert "Another process is writing into" in capsys.readouterr().err
        assert everything(folder) == before


def test_a_run_that_is_trained_keeps_its_settings(folder: Path) -> None:
    """Settings that may change were written before the lock was tried."""
    train = ["train", "run/config.json", "--latents", "latents", "--out", "run", "--steps", "6", "--log-every", "7"]
    with lock_folder(folder / "run"):
        before = everything(folder)
        assert main(train) == 1
        assert everything(folder) == before


def test_the_corrected_command_begins_where_a_refused_one_was(folder: Path) -> None:
    train = ["train", "digits", "--latents", "latents", "--out", "corrected", "--steps", "1", *ONCE]
    assert main([*train, "--init-from", "nonsense"]) == 1
    assert not (folder / "corrected").exists()
    assert main([*train, "--init-from", "run"]) == 0
    # A refusal tells how to start over.
    assert main([*train, "--seed", "1"]) == 1


def test_a_refusal_shows_how_to_start_over(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = ["train", "run/config.json", "--latents", "latents", "--out", "run", "--seed", "5"]
    before = everything(folder)
    assert main(train) == 1
    assert "or delete this one to start over" in capsys.readouterr().err
    assert everything(folder) == before


# Credentials


URLS = st.builds(
    "{}://{}{}{}host{}/a.npz{}".format,
    st.sampled_from(["https", "http", "s3", "ftp"]),
    st.sampled_from(["", "user", "me@work"]),
    st.just(f":{SECRET}"),
    st.just("@"),
    st.sampled_from(["", ":8080", ".example.org"]),
    st.sampled_from(["", "?token=a", "?a=1&X-Amz-Signature=b"]),
)
SIGNED = st.builds(
    "https://host/a.npz?{}={}{}".format,
    st.sampled_from(["token", "X-Amz-Signature", "sig", "anything"]),
    st.just(SECRET),
    st.sampled_from(["", "&b=2", "#part"]),
)


@given(url=URLS | SIGNED, before=st.text(max_size=8), after=st.sampled_from(["", " and more", "'", ", more"]))
def test_no_text_shows_credentials(url: str, before: str, after: str) -> None:
    shown = without_credentials(f"{before} {url}{after}")
    assert SECRET not in shown
    assert without_credentials(shown) == shown
    assert SECRET not in without_credentials(str(Path(url).absolute()))


@pytest.mark.parametrize("name", COMMANDS)
def test_credentials_in_an_argument_are_neither_stored_nor_printed(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = everything(folder)
    for argument in (f"--reference=https://user:{SECRET}@host/a.npz", f"https://host/a?token={SECRET}"):
        assert main([*COMMANDS[name], argument, "--debug"]) == 2
    streams = capsys.readouterr()
    assert SECRET not in streams.out + streams.err
    assert "has credentials" in streams.err
    assert everything(folder) == before


def test_credentials_in_settings_reach_no_file(folder: Path, tmp_path: Path) -> None:
    """As from Python, or from the config.json of another program."""
    recipe = json.loads((folder / "run" / "config.json").read_text())
    recipe["evaluation"]["reference"] = f"https://user:{SECRET}@host/a.npz?token={SECRET}"
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    train = ["train", str(tmp_path / "recipe.json"), "--latents", "latents", "--out", str(tmp_path / "run")]
    for steps in ("1", "2"):
        assert main([*train, "--steps", steps]) == 0
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert not [path for path in written if SECRET.encode() in path.read_bytes()]
    assert "https://***@host/a.npz?***" in (tmp_path / "run" / "config.json").read_text()


# Modes


@settings(max_examples=4, deadline=None)
@given(umask=st.sampled_from([0o000, 0o002, 0o022, 0o027, 0o077]))
def test_files_have_the_mode_of_the_umask(umask: int, inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    out = tmp_path_factory.mktemp("modes")
    latents, run = str(inputs / "latents"), str(inputs / "run")
    before = os.umask(umask)
    try:
        assert main(["train", "digits", "--latents", latents, "--out", str(out / "run"), "--steps", "1", *ONCE]) == 0
        assert main(["export", run, "--out", str(out / "a.safetensors"), "--format", "safetensors"]) == 0
    finally:
        os.umask(before)
    files = [path for path in out.rglob("*") if path.is_file()]
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o666 & ~umask}
    assert {path.suffix for path in files} == {".safetensors", ".json", ".jsonl"}
