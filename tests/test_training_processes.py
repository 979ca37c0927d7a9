"""Training in several processes: the same run as in one, and one that fails, dies or hangs ends all."""

import os
import signal
import subprocess
import sys
import time

import pytest
from training_helpers import (
    assert_same_checkpoint,
    ends_of,
    events,
    files_of,
    newest_step,
    run_processes,
    start_processes,
    train_arguments,
)

from jlt.training.checkpoint import open_checkpoint, verify_checkpoints

pytestmark = pytest.mark.slow

ARGUMENTS = [
    *["--ema", "0.9", "0.5", "--power-ema", "0.1", "--snapshot-every", "5", "--flips", "--checkpoint-every", "4"],
    # It holds a state of its own, which processes must share.
    *["--loss.weighting", "uncertainty"],
]


def losses(run):
    return [event["loss"] for event in events(run, "step")]


def digest(run):
    return open_checkpoint(run).read_state().draws


@pytest.fixture(scope="module")
def alone(store, tmp_path_factory):
    """The run of one process: 9 steps of 16 over 50 samples, almost three epochs."""
    run = tmp_path_factory.mktemp("alone") / "run"
    run_processes(1, train_arguments(store, run, *ARGUMENTS, "--steps", "9"))
    return run


@pytest.mark.parametrize(
    ("count", "options"), [(2, []), (4, []), (2, ["--accumulation", "4"]), (2, ["--parallel", "fsdp"])]
)
def test_any_number_of_processes_trains_the_same_run(store, alone, tmp_path, count, options):
    run_processes(count, train_arguments(store, tmp_path / "run", *ARGUMENTS, "--steps", "9", *options))
    assert digest(tmp_path / "run") == digest(alone)
    assert losses(tmp_path / "run") == pytest.approx(losses(alone), rel=1e-6)
    ours, theirs = files_of(tmp_path / "run", 9), files_of(alone, 9)
    assert ours.keys() == theirs.keys()
    for name in ("network.safetensors", "ema_0.9.safetensors", "ema_sigma_rel=0.1.safetensors"):
        for key, value in ours[name].items():
            assert (value - theirs[name][key]).abs().max() < 1e-4, (name, key)
    distances = [events(run, "step")[-1]["ema_distance"]["0.9"] for run in (tmp_path / "run", alone)]
    assert distances[0] == pytest.approx(distances[1], rel=1e-4)


@pytest.mark.parametrize("count", [2, 4])
def test_stopped_three_times_in_mid_epoch_it_ends_bit_for_bit_the_same(store, tmp_path, count):
    options = [*ARGUMENTS, "--accumulation", "2"]
    run_processes(count, train_arguments(store, tmp_path / "whole", *options, "--steps", "9"))
    for steps in (2, 5, 7, 9):
        run_processes(count, train_arguments(store, tmp_path / "parts", *options, "--steps", str(steps)))
    assert_same_checkpoint(tmp_path / "whole", tmp_path / "parts", 9)
    assert digest(tmp_path / "whole") == digest(tmp_path / "parts")
    assert verify_checkpoints(tmp_path / "parts") == []


def test_a_run_continues_on_another_number_of_processes_and_keeps_its_draws(store, alone, tmp_path):
    run_processes(2, train_arguments(store, tmp_path / "run", *ARGUMENTS, "--parallel", "fsdp", "--steps", "3"))
    run_processes(4, train_arguments(store, tmp_path / "run", *ARGUMENTS, "--steps", "6"))
    run_processes(1, train_arguments(store, tmp_path / "run", *ARGUMENTS, "--steps", "9"))
    assert digest(tmp_path / "run") == digest(alone)
    assert losses(tmp_path / "run") == pytest.approx(losses(alone), rel=1e-6)
    assert [event["processes"] for event in events(tmp_path / "run", "start")] == [2, 4, 1]


def test_under_torchrun_results_and_refusals_are_printed_once(store, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "jlt"]
    options = train_arguments(store, tmp_path / "run", "--steps", "2")
    codes, outputs = ends_of(start_processes(2, [*options, "--batch-size", "15"]))
    assert codes == [2, 2]
    assert "".join(outputs).count("batch_size 15 cannot be shared equally among 2 processes") == 1
    assert not (tmp_path / "run").exists()
    done = subprocess.run([*launcher, *options], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Trained:") == 1


NAN_IN_ONE = """
import os
from jlt.latents.store import LatentStore
gather, calls = LatentStore.gather, []
def poisoned(self, *options):
    latents, labels = gather(self, *options)
    calls.append(None)
    if os.environ["RANK"] == "1" and len(calls) - 1 in {steps}:
        latents[2, 0, 0, 0] = float("nan")
    return latents, labels
LatentStore.gather = poisoned
"""


def test_nan_in_one_process_skips_the_update_in_all_and_is_logged_with_its_samples(store, tmp_path):
    options = [*ARGUMENTS, "--checkpoint-every", "1", "--keep-last", "0", "--steps", "5", "--max-skipped", "2"]
    run_processes(2, train_arguments(store, tmp_path / "run", *options), NAN_IN_ONE.replace("{steps}", "{3}"))
    (skipped,) = events(tmp_path / "run", "skipped")
    assert (skipped["step"], skipped["processes"], len(skipped["samples"])) == (4, [1], 1)
    before, after = files_of(tmp_path / "run", 3), files_of(tmp_path / "run", 4)
    for name, tensors in before.items():
        assert all(value.equal(after[name][key]) for key, value in tensors.items()), name
    assert not files_of(tmp_path / "run", 5)["network.safetensors"]["final.linear.weight"].equal(
        after["network.safetensors"]["final.linear.weight"]
    )
    assert open_checkpoint(tmp_path / "run").updates == 4


def test_nan_that_stays_ends_all_processes_naming_step_and_process(store, tmp_path):
    options = [*ARGUMENTS, "--checkpoint-every", "1", "--steps", "50", "--max-skipped", "3"]
    plant = NAN_IN_ONE.replace("{steps}", "range(3, 99)")
    codes, outputs = ends_of(start_processes(2, train_arguments(store, tmp_path / "run", *options), plant), timeout=60)
    assert codes == [1, 1]
    for number, text in enumerate(outputs):
        assert f"[process {number}] jlt: Step 6:" in text
        assert "in process 1" in text
        assert "3 in a row" in text
    assert newest_step(tmp_path / "run") <= 5
    assert open_checkpoint(tmp_path / "run").updates == 3
    assert verify_checkpoints(tmp_path / "run") == []


ERROR_IN_ONE = """
import os, torch
from jlt.latents.store import LatentStore
gather, calls = LatentStore.gather, []
def failing(self, *options):
    calls.append(None)
    if os.environ["RANK"] == "1" and len(calls) == 5:
        ACT
    return gather(self, *options)
LatentStore.gather = failing
"""


@pytest.mark.parametrize(
    ("act", "named"),
    [
        ("raise OSError(5, 'Input/output error', 'shard-00000.safetensors')", "shard-00000.safetensors (at step 5)"),
        ("raise torch.OutOfMemoryError('the device')", "Step 5: there is not enough memory"),
        ("os.kill(os.getpid(), 9)", None),
    ],
)
def test_a_process_that_fails_or_dies_ends_all_within_a_minute(store, tmp_path, act, named):
    options = train_arguments(
        store, tmp_path / "run", "--batch-size", "18", "--steps", "100000", "--checkpoint-every", "2"
    )
    codes, outputs = ends_of(start_processes(3, options, ERROR_IN_ONE.replace("ACT", act)), timeout=60)
    assert all(code != 0 for code in codes), outputs
    assert codes[1] == (1 if named else -signal.SIGKILL)
    assert named is None or "[process 1] jlt: " in outputs[1]
    assert named is None or named in outputs[1]
    assert all("Another process of this work ended early" in outputs[rank] for rank in (0, 2)), outputs
    assert verify_checkpoints(tmp_path / "run") == []


QUICK = "import jlt.runtime.watchdog as h; h.BEAT_SECONDS, h.SILENT_SECONDS = 0.2, 3.0\n"


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_process_ends_all(store, tmp_path, frozen):
    """The first process too, which holds the store that the others talk over."""
    options = train_arguments(store, tmp_path / "run", "--steps", "100000", "--checkpoint-every", "2")
    started = start_processes(2, options, QUICK)
    while newest_step(tmp_path / "run") < 4:
        time.sleep(0.05)
    started[frozen].send_signal(signal.SIGSTOP)
    assert started[1 - frozen].wait(timeout=30) == 1
    assert "This process ends" in started[1 - frozen].stderr.read()
    started[frozen].kill()
    ends_of(started)
    assert verify_checkpoints(tmp_path / "run") == []


def test_a_process_whose_work_hangs_ends_all(store, tmp_path):
    act = "__import__('time').sleep(1000)"
    options = train_arguments(store, tmp_path / "run", "--steps", "100000")
    started = start_processes(2, options, QUICK + ERROR_IN_ONE.replace("ACT", act))
    codes, outputs = ends_of(started, timeout=60)
    assert codes == [1, 1]
    # The first one to notice reports it; the other may notice that end before its own watchdog does.
    assert any("it hangs, or it waits for one that hangs" in text for text in outputs), outputs
    assert all("This process ends" in text or "Another process of this work ended early" in text for text in outputs), (
        outputs
    )


SLOW_SAVE = """
import time, jlt.training.saver as place
real = place.save_checkpoint
place.save_checkpoint = lambda *options: (time.sleep(SECONDS), real(*options))[1]
"""


def test_a_slow_save_is_no_hang(store, tmp_path):
    options = train_arguments(store, tmp_path / "run", "--steps", "6", "--checkpoint-every", "3")
    run_processes(2, options, QUICK + SLOW_SAVE.replace("SECONDS", "4"))
    assert newest_step(tmp_path / "run") == 6


def test_a_process_that_freezes_while_others_wait_for_its_save_ends_all(store, tmp_path):
    options = train_arguments(store, tmp_path / "run", "--steps", "100", "--checkpoint-every", "3")
    started = start_processes(2, options, QUICK + SLOW_SAVE.replace("SECONDS", "1000"))
    while len(events(tmp_path / "run", "step")) < 6:
        time.sleep(0.05)
    started[0].send_signal(signal.SIGSTOP)
    assert started[1].wait(timeout=30) == 1
    assert "another process has died or does not answer" in started[1].stderr.read()
    started[0].kill()
    ends_of(started)


def test_further_signals_do_not_stop_the_save(store, tmp_path):
    """A cluster signals all processes, and then a launcher its own."""
    options = train_arguments(store, tmp_path / "run", "--steps", "100000", "--checkpoint-every", "50000")
    started = start_processes(2, options, SLOW_SAVE.replace("SECONDS", "2"))
    while len(events(tmp_path / "run", "step")) < 2:
        time.sleep(0.05)
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM):
        for process in started:
            process.send_signal(number)
        time.sleep(0.5)
    codes, outputs = ends_of(started, timeout=60)
    assert codes == [os.EX_TEMPFAIL] * 2, outputs
    assert newest_step(tmp_path / "run") > 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_one_process_that_receives_a_signal_stops_all_at_one_step(store, tmp_path, number):
    options = train_arguments(store, tmp_path / "run", *ARGUMENTS, "--steps", "100000", "--checkpoint-every", "50000")
    started = start_processes(2, options)
    while len(events(tmp_path / "run", "step")) < 2:
        time.sleep(0.05)
    started[1].send_signal(number)
    codes, outputs = ends_of(started, timeout=60)
    assert codes == [os.EX_TEMPFAIL] * 2, outputs
    assert all("Run the same command again to resume." in text for text in outputs)
    stopped = open_checkpoint(tmp_path / "run")
    assert verify_checkpoints(tmp_path / "run") == []
    assert events(tmp_path / "run", "stopped")[0]["step"] == stopped.step
    run_processes(2, train_arguments(store, tmp_path / "run", *ARGUMENTS, "--steps", str(stopped.step + 3)))
    assert newest_step(tmp_path / "run") == stopped.step + 3
