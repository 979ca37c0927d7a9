"""Several processes under torchrun: the same store as from one process, also after a process was killed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import forked
import pytest
import torch
from data_helpers import CONFIG, NoiseSource, PatchAutoencoder, file_bytes, make_store
from PIL import Image
from training_helpers import ends_of, run_processes, start_processes

from jlt.errors import JLTError
from jlt.images.registry import open_source
from jlt.latents.encoding import encode_source
from jlt.latents.encoding_job import EncodingJob
from jlt.latents.store import verify_store
from jlt.runtime.environment import default_device
from jlt.runtime.processes import Group, SingleProcess
from jlt.runtime.watchdog import SILENT_SECONDS, Pulse

COUNT = 400
ARGUMENTS = ["--autoencoder", "tiny", "--resolution", "32", "--dtype", "float32", "--no-flips", "--batch-size", "16"]
ARGUMENTS += ["--threads", "1", "--workers", "0", "--shard-size", "32"]


def torchrun(count: int, *arguments: str) -> list[str]:
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    return [*run, "-m", "jlt", "encode", *arguments]


def environment() -> dict[str, str]:
    """As a shell has it: torchrun gives its processes one thread each, a process by itself gets all cores."""
    return {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The arguments that select some digits."""
    folder, source = tmp_path_factory.mktemp("digits"), open_source("digits")
    for number in range(COUNT):
        image, label = source[number]
        (folder / str(label)).mkdir(exist_ok=True)
        image.save(folder / str(label) / f"{number:04d}.png")
    return ["--images", str(folder)]


@pytest.fixture(scope="module")
def alone(digits: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files that a single process makes."""
    out = tmp_path_factory.mktemp("alone") / "store"
    run_processes(1, ["encode", *digits, *ARGUMENTS, "--out", str(out)])
    return file_bytes(out)


@pytest.mark.slow
def test_processes_under_torchrun_make_the_same_bytes(
    tmp_path: Path, digits: list[str], alone: dict[str, bytes]
) -> None:
    arguments = torchrun(2, *digits, *ARGUMENTS, "--out", str(tmp_path / "store"))
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment(), timeout=120)
    assert done.returncode == 0, done.stderr
    assert file_bytes(tmp_path / "store") == alone
    # The result is printed once.
    assert done.stdout.count(f"{COUNT} latents") == 1


@pytest.mark.slow
def test_any_number_of_processes_makes_the_same_bytes(
    tmp_path: Path, digits: list[str], alone: dict[str, bytes]
) -> None:
    arguments = ["encode", *digits, *ARGUMENTS, "--out", str(tmp_path / "store")]
    started = start_processes(3, arguments)
    assert sum(process.communicate(timeout=120)[0].count(f"{COUNT} latents") for process in started) == 1
    assert [process.returncode for process in started] == [0, 0, 0]
    assert file_bytes(tmp_path / "store") == alone


SLOWLY = """
import time
from jlt.latents import encoding_job
write = encoding_job.write_text
encoding_job.write_text = lambda *arguments: (write(*arguments), time.sleep(0.3))[0]
"""


@pytest.mark.slow
def test_a_killed_process_ends_all_and_another_number_of_them_resumes(
    tmp_path: Path, digits: list[str], alone: dict[str, bytes]
) -> None:
    out = tmp_path / "store"
    arguments = ["encode", *digits, *ARGUMENTS, "--out", str(out)]
    started = start_processes(2, arguments, SLOWLY)
    deadline = time.monotonic() + 60
    while not list((out / ".encoding").glob("shard-*.json")) and time.monotonic() < deadline:
        time.sleep(0.02)
    started[1].kill()
    began = time.monotonic()
    codes, outputs = ends_of(started, timeout=60)
    assert time.monotonic() - began < 60
    assert codes == [1, -signal.SIGKILL], outputs
    assert not (out / "manifest.json").exists()
    run_processes(3, arguments)
    assert file_bytes(out) == alone


def workers_of(parent: int) -> list[int]:
    """The child processes, oldest first."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == parent:
                found.append(int(folder.name))
    return sorted(found)


@pytest.mark.slow
def test_an_error_of_one_process_is_printed_by_it_and_ends_all(tmp_path: Path) -> None:
    folder = tmp_path / "images" / "class"
    folder.mkdir(parents=True)
    for number in range(8):
        Image.new("RGB", (8, 8), (30 * number, 200, 9)).save(folder / f"{number}.png")
    (folder / "6.png").write_bytes(b"not an image")
    arguments = ["encode", "--images", str(folder.parent), "--autoencoder", "pixels", "--resolution", "8"]
    arguments += ["--shard-size", "2", "--workers", "0", "--out", str(tmp_path / "store")]
    began = time.monotonic()
    codes, outputs = ends_of(start_processes(2, arguments))
    assert time.monotonic() - began < 60
    assert codes == [1, 1], outputs
    assert f"[process 1] jlt: {folder / '6.png'}" in outputs[1]
    assert "Traceback" not in "".join(outputs)
    run_processes(2, [*arguments, "--on-bad-image", "skip"])
    assert verify_store(tmp_path / "store") == []


@pytest.mark.slow
def test_refusals_are_printed_once(tmp_path: Path, digits: list[str]) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    codes, outputs = ends_of(start_processes(2, ["encode", *digits, *ARGUMENTS, "--out", str(tmp_path)]))
    assert codes == [1, 1]
    assert "".join(outputs).count("holds other files") == 1


class Pair(SingleProcess):
    """A group of two, of which the test plays the other."""

    size = 2

    def __init__(self, theirs: object) -> None:
        super().__init__()
        self.theirs = theirs

    def gather(self, value: object) -> list[object]:
        return [value, self.theirs]


def test_processes_that_found_different_images_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = EncodingJob(NoiseSource(36), PatchAutoencoder(), CONFIG, tmp_path).arguments()

    @contextlib.contextmanager
    def join_group() -> object:
        yield Pair(other)

    monkeypatch.setattr("jlt.latents.encoding.join_group", join_group)
    with pytest.raises(JLTError, match=r"Process 1 would encode something else.*source.count: 37 -> 36"):
        encode_source(NoiseSource(37), PatchAutoencoder(), CONFIG, tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_processes_of_one_machine_share_its_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert default_device() == "cuda"
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_RANK", "6")
    assert default_device() == "cuda:2"


def test_one_process_is_a_group_of_its_own(tmp_path: Path) -> None:
    group: Group = SingleProcess()
    assert (group.rank, group.size, group.gather(3), group.on_rank0(lambda: 4)) == (0, 1, [3], 4)
    assert [group.add("images", 2), group.add("other", 5), group.add("images", 1)] == [2, 5, 3]
    make_store(tmp_path / "store")
    assert verify_store(tmp_path / "store") == []


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images that take a while to decode."""
    folder = tmp_path_factory.mktemp("photographs") / "class"
    folder.mkdir()
    noise = Image.effect_noise((500, 500), 60).convert("RGB")
    for number in range(120):
        noise.rotate(number, expand=False).save(folder / f"{number:03d}.jpg", quality=95)
    return folder.parent


def photograph_arguments(photographs: Path, out: Path) -> list[str]:
    arguments = ["encode", "--images", str(photographs), "--autoencoder", "pixels", "--resolution", "64"]
    return [*arguments, "--batch-size", "4", "--shard-size", "12", "--workers", "2", "--out", str(out)]


@pytest.fixture(scope="module")
def uninterrupted(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of the photographs, encoded by an undisturbed process."""
    out = tmp_path_factory.mktemp("uninterrupted") / "store"
    run_processes(1, photograph_arguments(photographs, out))
    return file_bytes(out)


@pytest.mark.slow
@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_signal_leaves_no_process_behind_and_the_same_command_resumes(
    tmp_path: Path, photographs: Path, uninterrupted: dict[str, bytes], signal_number: int
) -> None:
    out = tmp_path / "store"
    arguments = photograph_arguments(photographs, out)
    run = forked.start(arguments, environment())
    try:
        deadline = time.monotonic() + 60
        while len(list((out / ".encoding").glob("shard-*.json"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        children = workers_of(run.pid)
        run.send_signal(signal_number)
        _, outputs = run.communicate(timeout=30)
    finally:
        run.kill()
    assert len(children) >= 2
    if signal_number == signal.SIGKILL:
        assert run.returncode == -signal.SIGKILL
    else:
        assert run.returncode == os.EX_TEMPFAIL
        assert "Run the same command again to resume." in outputs
        assert not list(out.glob(".shard-*"))
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{child}").exists() for child in children) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [child for child in children if Path(f"/proc/{child}").exists()]
    assert not (out / "manifest.json").exists()
    codes, (outputs,) = ends_of(start_processes(1, arguments))
    assert codes == [0]
    assert "10 shards are already complete" in outputs
    assert file_bytes(out) == uninterrupted


def test_steps_are_watched_within_other_work_and_leave_no_trace(monkeypatch):
    """An evaluation within a training: its items are watched too, and do not count as steps of the training."""
    now = [100.0]
    monkeypatch.setattr("jlt.runtime.watchdog.time.monotonic", lambda: now[0])
    pulse = Pulse()
    for _ in range(3):
        pulse.step()
        now[0] += 1
    with pulse.other_work():
        now[0] += 1000
        assert not pulse.hanging()
        with pulse.other_work():
            for _ in range(2):
                pulse.step()
                now[0] += 60
            assert not pulse.hanging()
            now[0] += 300
            assert pulse.hanging()
        now[0] += 1000
        assert not pulse.hanging()
    assert not pulse.hanging()
    now[0] += SILENT_SECONDS + 1
    assert pulse.hanging()
