"""Saving: killed at every phase, on a full disk, kept and removed, in parallel with the training."""

import dataclasses
import os
import shutil
import signal
import subprocess
import time

import pytest
from training_helpers import (
    assert_same_checkpoint,
    config_for,
    ends_of,
    events,
    files_of,
    newest_step,
    run_processes,
    start_processes,
    train_arguments,
)

from jlt.errors import JLTError
from jlt.training import saver
from jlt.training.checkpoint import list_checkpoints, list_snapshots, open_checkpoint, step_of, verify_checkpoints
from jlt.training.loop import train

ARGUMENTS = ["--ema", "0.9", "0.5", "--power-ema", "0.1", "--snapshot-every", "3", "--flips", "--checkpoint-every", "2"]
ARGUMENTS += ["--keep-last", "2"]

# Each makes the process kill itself at one moment of the third save.
PHASES = {
    "copying": "from jlt.training.saver import Saver as place; name = '_copy'",
    "first file": "import jlt.training.checkpoint as place; name = 'write_tensors'",
    "state": "import jlt.training.checkpoint as place; name = 'write_json'",
    "hashing": "import jlt.training.checkpoint as place; name = 'sha256_file'",
    "manifest": "import jlt.training.checkpoint as place; name = 'write_text'",
    "renamed": "import jlt.storage.folders as place; name = 'fsync_path'",
    "pruning": "import jlt.training.saver as place; name = 'prune_checkpoints'",
    "removing": "import jlt.training.checkpoint as place; name = 'remove_folder'",
}
KILL = """
import os, signal, jlt.training.checkpoint, jlt.training.saver
{phase}
real, calls = getattr(place, name), []
def deadly(*arguments, **named):
    result = real(*arguments, **named) if {after} else None
    calls.append(None)
    if os.path.isdir({run!r} + "/checkpoints/step_0000004"):
        os.kill(os.getpid(), signal.SIGKILL)
    return result if {after} else real(*arguments, **named)
setattr(place, name, deadly)
"""


@pytest.fixture(scope="module")
def whole(store, tmp_path_factory):
    run = tmp_path_factory.mktemp("whole") / "run"
    run_processes(1, train_arguments(store, run, *ARGUMENTS, "--steps", "9"))
    return run


@pytest.mark.slow
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("phase", PHASES)
def test_killed_at_each_phase_of_a_save(store, whole, tmp_path, phase, after):
    run = tmp_path / "run"
    arguments = train_arguments(store, run, *ARGUMENTS, "--steps", "9")
    plant = KILL.format(phase=PHASES[phase], after=after, run=str(run))
    codes, outputs = ends_of(start_processes(1, arguments, plant))
    assert codes == [-signal.SIGKILL], outputs
    assert verify_checkpoints(run) == []
    assert newest_step(run) >= 4
    run_processes(1, arguments)
    assert_same_checkpoint(whole, run, 9)
    assert not list(run.rglob(".step_*"))
    assert verify_checkpoints(run) == []


@pytest.mark.slow
def test_a_full_disk_ends_the_run_and_leaves_what_was_saved(store, whole, tmp_path):
    if os.geteuid() != 0 or not shutil.which("mount"):
        pytest.skip("only root may make a small disk")
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small disk could not be mounted")
    try:
        arguments = train_arguments(store, disk / "run", *ARGUMENTS, "--steps", "9")
        codes, outputs = ends_of(start_processes(1, [*arguments, "--keep-last", "0"]))
        assert codes == [1]
        assert "disk is full" in outputs[0]
        saved = newest_step(disk / "run")
        assert 2 <= saved < 9
        assert verify_checkpoints(disk / "run") == []
        subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
        run_processes(1, arguments)
        assert_same_checkpoint(whole, disk / "run", 9)
    finally:
        subprocess.run(["umount", str(disk)], check=False)


def steps_of(folders):
    return [step_of(folder) for folder in folders]


@pytest.mark.parametrize(
    ("keep", "left"),
    [
        ({"keep_last": 2}, [9, 10]),
        ({"keep_last": 1, "keep_every": 4}, [4, 8, 10]),
        ({"keep_last": 0}, list(range(1, 11))),
        ({"keep_last": 3, "keep_every": 5}, [5, 8, 9, 10]),
    ],
)
def test_the_newest_and_every_so_many_are_kept(store, tmp_path, keep, left):
    train(config_for(store, steps=10, checkpoint_every=1, **keep), store, tmp_path / "run")
    assert steps_of(list_checkpoints(tmp_path / "run")) == left
    assert verify_checkpoints(tmp_path / "run") == []


def test_snapshots_are_taken_at_their_steps_and_taken_again_by_a_run_that_goes_back(store, tmp_path):
    config = config_for(store, steps=12, checkpoint_every=5, snapshot_every=3)
    train(config, store, tmp_path / "run")
    assert [(folder.step, folder.updates) for folder in list_snapshots(tmp_path / "run")] == [
        (step, step) for step in (3, 6, 9, 12)
    ]
    before = {folder.step: folder.sha256 for folder in list_snapshots(tmp_path / "run")}
    for step in (10, 12):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step_{step:07d}")
    train(config, store, tmp_path / "run")
    assert {folder.step: folder.sha256 for folder in list_snapshots(tmp_path / "run")} == before


def test_training_goes_on_while_a_checkpoint_is_written(store, tmp_path, monkeypatch):
    real = saver.save_checkpoint

    def slow(*arguments):
        time.sleep(0.5)
        return real(*arguments)

    monkeypatch.setattr(saver, "save_checkpoint", slow)
    train(config_for(store, steps=11, checkpoint_every=10, log_every=1), store, tmp_path / "run")
    first, last = events(tmp_path / "run", "saved")
    assert first["write_seconds"] > 0.5
    assert first["pause_seconds"] < 0.3
    # It waited for the first one, which is no part of its own pause.
    assert last["pause_seconds"] < 0.3
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    places = [place for place, line in enumerate(lines) if '"step": 11' in line and '"step"' in line[:16]]
    assert places[0] < next(place for place, line in enumerate(lines) if '"saved"' in line)


def test_a_snapshot_at_the_same_step_does_not_hold_the_training_up(store, tmp_path, monkeypatch):
    real = saver.save_snapshot
    monkeypatch.setattr(saver, "save_snapshot", lambda *arguments: (time.sleep(0.5), real(*arguments))[1])
    config = config_for(store, steps=11, checkpoint_every=10, snapshot_every=10)
    train(config, store, tmp_path / "run")
    assert events(tmp_path / "run", "saved")[0]["pause_seconds"] < 0.3
    assert [folder.step for folder in list_snapshots(tmp_path / "run")] == [10]


def test_what_was_copied_is_what_is_written(store, tmp_path, monkeypatch):
    """The writer is slow, so that the weights have moved on when it reads its copy."""
    train(config_for(store, steps=6, checkpoint_every=2, keep_last=0), store, tmp_path / "quick")
    real = saver.save_checkpoint
    monkeypatch.setattr(saver, "save_checkpoint", lambda *arguments: (time.sleep(0.2), real(*arguments))[1])
    train(config_for(store, steps=6, checkpoint_every=2, keep_last=0), store, tmp_path / "slow")
    for step in (2, 4, 6):
        assert_same_checkpoint(tmp_path / "quick", tmp_path / "slow", step)


def test_a_writer_that_fails_ends_the_run(store, tmp_path, monkeypatch):
    def failing(*arguments):
        raise JLTError("the writer has failed")

    config = config_for(store, steps=4, checkpoint_every=4)
    train(config, store, tmp_path / "run")
    monkeypatch.setattr(saver, "save_checkpoint", failing)
    with pytest.raises(JLTError, match="the writer has failed"):
        train(dataclasses.replace(config, steps=400, checkpoint_every=6), store, tmp_path / "run")
    assert newest_step(tmp_path / "run") == 4
    assert max(event["step"] for event in events(tmp_path / "run", "step")) < 400


@pytest.mark.parametrize("damage", ["flip", "missing"])
def test_a_damaged_snapshot_is_named_and_refused(store, tmp_path, damage):
    from jlt.training.averages import choose_weights

    train(config_for(store, steps=6, snapshot_every=2), store, tmp_path / "run")
    path = tmp_path / "run" / "snapshots" / "step_0000004" / "ema_sigma_rel=0.1.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    path.unlink()
    if damage == "flip":
        path.write_bytes(content)
    assert any(str(path) in problem for problem in verify_checkpoints(tmp_path / "run"))
    with pytest.raises(JLTError, match="step_0000004"):
        choose_weights(open_checkpoint(tmp_path / "run"), "sigma_rel=0.07")
    assert files_of(tmp_path / "run", 6)
