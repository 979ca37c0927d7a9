"""Sampling and evaluation in several processes: the same images for any number of them, also after kills."""

import dataclasses
import json
import os
import shutil
import signal
import time

import numpy as np
import pytest
from training_helpers import ends_of, run_processes, start_processes

from jlt.cli.main import main
from jlt.errors import JLTError
from jlt.evaluation.extractors import load_extractor
from jlt.evaluation.image_files import open_images
from jlt.experiments.checkpoint_evaluation import evaluate_files
from jlt.experiments.make_reference import make_reference
from jlt.experiments.recipes import resolve_recipe
from jlt.images.digits import Digits
from jlt.latents.store import LatentStore
from jlt.storage.folders import lock_folder
from jlt.training.loop import train

pytestmark = pytest.mark.slow
ARGUMENTS = ["--num", "200", "--batch-size", "24", "--steps", "3", "--cfg-scale", "1.5"]


@pytest.fixture(scope="module")
def place(digit_latents, tmp_path_factory):
    """A folder with a small run on digits and a reference."""
    folder = tmp_path_factory.mktemp("processes")
    shutil.copytree(digit_latents, folder / "latents")
    store = LatentStore.open(folder / "latents")
    small = {"steps": 30, "batch_size": 16, "checkpoint_every": 15, "keep_last": 0}
    config = dataclasses.replace(resolve_recipe("digits", store.shape), **small)
    train(config, store, folder / "run")
    make_reference(Digits(), load_extractor("digits"), 32, folder / "digits.npz", "cpu")
    return folder


@pytest.fixture(scope="module")
def alone(place):
    """What a process by itself draws."""
    assert main(["sample", "--checkpoint", str(place / "run"), "--out", str(place / "alone"), *ARGUMENTS]) == 0
    return stack(place / "alone")


def stack(path):
    return np.concatenate([images.numpy() for images, _ in open_images(path).batches(64)])


def sample_arguments(place, out, *arguments):
    return ["sample", "--checkpoint", str(place / "run"), "--out", str(out), *ARGUMENTS, *arguments]


@pytest.mark.parametrize(("count", "form"), [(2, "png"), (3, "npz")])
def test_any_number_of_processes_draws_the_same_images(place, alone, tmp_path, count, form):
    run_processes(count, sample_arguments(place, tmp_path / "out", "--format", form))
    found = stack(tmp_path / "out" if form == "png" else tmp_path / "out" / "samples.npz")
    assert found.shape == alone.shape
    assert abs(found.astype(int) - alone).max() <= 1
    if form == "npz":
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["protocol.json", "samples.npz"]


SLOW = """
import time
from jlt.storage.rows import RowTable
write = RowTable.write
def slow(self, *arguments):
    write(self, *arguments)
    print("written", flush=True, file=__import__("sys").stderr)
    time.sleep(0.5)
RowTable.write = slow
"""


def rows_written(folder):
    checks = list(folder.rglob(".checks"))
    return int((np.fromfile(checks[0], dtype=np.uint32) != 0).sum()) if checks else 0


def wait_for_rows(folder, started, count=24):
    deadline = time.monotonic() + 60
    while rows_written(folder) < count:
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in started)
        time.sleep(0.02)


def test_a_killed_process_ends_all_and_another_number_of_them_goes_on(place, alone, tmp_path):
    arguments = sample_arguments(place, tmp_path / "out", "--format", "npz")
    started = start_processes(3, arguments, SLOW)
    wait_for_rows(tmp_path / "out", started)
    started[1].kill()
    codes, printed = ends_of(started, timeout=60)
    assert codes[1] == -signal.SIGKILL
    assert codes[0] == codes[2] == 1, printed
    assert 0 < rows_written(tmp_path / "out") < 200
    run_processes(2, arguments)
    assert abs(stack(tmp_path / "out" / "samples.npz").astype(int) - alone).max() <= 1


HANGS = """
import jlt.runtime.watchdog as h; h.BEAT_SECONDS, h.SILENT_SECONDS = 0.2, 3.0
import os, time
from jlt.storage.rows import RowTable
write, calls = RowTable.write, []
def hanging(self, *arguments):
    calls.append(None)
    if os.environ["RANK"] == "1" and len(calls) == 4:
        time.sleep(1000)
    write(self, *arguments)
RowTable.write = hanging
"""


def test_a_process_that_hangs_ends_all_and_the_same_command_resumes(place, alone, tmp_path):
    arguments = sample_arguments(place, tmp_path / "out", "--format", "npz")
    codes, printed = ends_of(start_processes(2, arguments, HANGS), timeout=60)
    assert codes == [1, 1], printed
    assert any("it hangs" in text for text in printed), printed
    assert 0 < rows_written(tmp_path / "out") < 200
    assert main(arguments) == 0
    assert abs(stack(tmp_path / "out" / "samples.npz").astype(int) - alone).max() <= 1


NEWER = """
import os, pathlib
from jlt.interop import sources
from jlt.training import checkpoint
opened = checkpoint.open_checkpoint
def newer(path):
    found = opened(path)
    return found if os.environ["RANK"] == "0" else opened(path / "checkpoints" / "step_0000015")
checkpoint.open_checkpoint = sources.open_checkpoint = newer
"""


@pytest.mark.parametrize("command", ["sample", "evaluate"])
def test_processes_that_mean_other_checkpoints_are_refused(place, tmp_path, command):
    """A run that still trains while they start has another newest checkpoint for each."""
    arguments = sample_arguments(place, tmp_path / "out") if command == "sample" else evaluate_arguments(place)
    codes, printed = ends_of(start_processes(2, arguments, NEWER), timeout=60)
    assert codes == [1, 1], printed
    assert any("Process 1 would" in text and "checkpoint" in text for text in printed), printed


def test_a_signal_while_numbers_are_measured_stops_the_evaluation(place, tmp_path):
    clear(place)
    slow = """
import time, jlt.experiments.checkpoint_evaluation as e
measure = e.measure
def slow(*arguments):
    open("MARK", "w").close()
    time.sleep(2)
    return measure(*arguments)
e.measure = slow
"""
    started = start_processes(1, evaluate_arguments(place), slow.replace("MARK", str(tmp_path / "measuring")))
    while not (tmp_path / "measuring").exists():
        assert started[0].poll() is None
        time.sleep(0.02)
    started[0].send_signal(signal.SIGTERM)
    assert ends_of(started, timeout=60)[0] == [os.EX_TEMPFAIL]
    assert main(evaluate_arguments(place)) == 0
    assert len(results(place)) == 1


def evaluate_arguments(place, *arguments):
    paths = ["--checkpoint", str(place / "run"), "--reference", str(place / "digits.npz")]
    return ["evaluate", *paths, *ARGUMENTS, *arguments]


def results(place):
    return [json.loads(path.read_text()) for path in (place / "run" / "evaluations").glob("*.json")]


def clear(place):
    for path in (place / "run").glob("evaluations/*.json"):
        path.unlink()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_one_process_that_receives_a_request_to_stop_stops_the_evaluation_in_all_and_it_goes_on(place, alone, number):
    clear(place)
    started = start_processes(2, evaluate_arguments(place), SLOW)
    drawn = place / "run" / "evaluations" / ".drawn"
    wait_for_rows(drawn, started)
    started[1].send_signal(number)
    codes, printed = ends_of(started, timeout=60)
    assert codes == [os.EX_TEMPFAIL] * 2, printed
    before = rows_written(drawn)
    assert 0 < before < 200
    started = start_processes(1, evaluate_arguments(place), SLOW)
    codes, printed = ends_of(started)
    assert codes == [0], printed
    assert f"{before} of 200 images were drawn before" in printed[0]
    assert not drawn.exists()
    # The number is that of the images that one process draws at once, but for single levels.
    (result,) = results(place)
    whole = evaluate_files(place / "alone", str(place / "digits.npz"), load_extractor("digits"))
    assert result["metrics"]["frechet_distance"] == pytest.approx(whole.metrics.frechet_distance, rel=1e-3)


FAILING = """
import os
from jlt.sampling import sampler
decode = sampler.decode_to_uint8
def failing(*arguments):
    if os.environ["RANK"] == "1":
        raise RuntimeError("no kernel for this")
    return decode(*arguments)
sampler.decode_to_uint8 = failing
"""


def test_an_error_of_one_process_ends_all_and_is_named(place):
    clear(place)
    codes, printed = ends_of(start_processes(2, evaluate_arguments(place), FAILING), timeout=60)
    assert codes == [1, 1], printed
    assert "process 1 failed (runtimeerror: no kernel for this)" in printed[0].lower()
    assert "no kernel for this" in printed[1]
    assert results(place) == []


def test_refusals_are_printed_once_and_at_once(place, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    codes, printed = ends_of(start_processes(2, sample_arguments(place, tmp_path / "out")), timeout=60)
    assert codes == [1, 1]
    assert sum("thesis.tex" in text for text in printed) == 1


def test_what_others_wrote_elsewhere_is_missed_and_not_taken_for_black(place, tmp_path):
    """Two machines that do not share the folder: each sees the rows of its own processes alone."""
    plant = """
import os, pathlib
from jlt.storage.rows import RowTable
begin = RowTable.__init__
def elsewhere(self, folder, *arguments):
    begin(self, folder if os.environ["RANK"] == "0" else pathlib.Path(str(folder) + "-elsewhere"), *arguments)
RowTable.__init__ = elsewhere
"""
    codes, printed = ends_of(
        start_processes(2, sample_arguments(place, tmp_path / "out", "--format", "npz"), plant), timeout=60
    )
    assert codes == [1, 1], printed
    assert "all processes must share this folder" in printed[0]
    assert not (tmp_path / "out" / "samples.npz").exists()


def test_a_smaller_evaluation_leaves_what_a_larger_one_has_drawn(place):
    clear(place)
    started = start_processes(2, evaluate_arguments(place), SLOW)
    drawn = place / "run" / "evaluations" / ".drawn"
    wait_for_rows(drawn, started, 100)
    started[0].send_signal(signal.SIGTERM)
    assert ends_of(started, timeout=60)[0] == [os.EX_TEMPFAIL] * 2
    before = rows_written(drawn)
    assert main(evaluate_arguments(place, "--num", "20")) == 0
    assert rows_written(drawn) >= before
    assert main(evaluate_arguments(place)) == 0
    assert not drawn.exists()


def test_features_of_checkpoints_that_are_gone_go(place):
    clear(place)
    drawn = place / "run" / "evaluations" / ".drawn"
    gone, held = drawn / "step_0000007-0123", drawn / "step_0000008-0123"
    for folder in (gone, held):
        folder.mkdir(parents=True)
        (folder / ".pooled.rows").write_bytes(b"0")
    with lock_folder(held):
        assert main(evaluate_arguments(place, "--num", "20")) == 0
    assert (gone.exists(), held.exists()) == (False, True)
    assert main(evaluate_arguments(place, "--num", "30")) == 0
    assert not drawn.exists()


def test_an_unfinished_folder_is_not_measured(place, alone, tmp_path):
    shutil.copytree(place / "alone", tmp_path / "part")
    (tmp_path / "part" / "000199.png").unlink()
    with pytest.raises(JLTError, match="holds 199 of 200 images"):
        evaluate_files(tmp_path / "part", str(place / "digits.npz"), load_extractor("digits"))
