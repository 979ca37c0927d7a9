"""The trainer: its draws, its exactness after a stop, its checkpoints under damage, and what it refuses."""

import dataclasses
import json
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from training_helpers import (
    assert_same_checkpoint,
    config_for,
    logged,
    newest_step,
    start_training,
)

from jlt.config import LossConfig, TrainConfig
from jlt.errors import JLTError
from jlt.latents.loader import SampleOrder
from jlt.runtime.signals import StopRequest
from jlt.storage.codec import from_json, to_json
from jlt.storage.folders import lock_folder
from jlt.training.checkpoint import load_tensors, open_checkpoint, step_folder, verify_checkpoints
from jlt.training.draws import draw_step, draw_steps
from jlt.training.loop import train

GOLDEN_LOSSES = [3.00891, 3.972793, 3.282918, 3.471992, 2.158367, 2.938058]


def test_golden_loss_of_a_tiny_run(store, tmp_path):
    """Guards refactors: the losses of a fixed run. They change only where the arithmetic or the draws are meant to."""
    train(config_for(store), store, tmp_path / "run")
    losses = [loss for _, loss, _ in logged(tmp_path / "run")]
    assert losses == pytest.approx(GOLDEN_LOSSES, rel=1e-5)


def test_loss_falls(store, tmp_path):
    # The images are noise: what can be learnt is their mean and their spread.
    config = config_for(store, steps=150, checkpoint_every=150, log_every=50)
    train(config, store, tmp_path / "run")
    losses = [loss for _, loss, _ in logged(tmp_path / "run")]
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize(("stops", "weighting"), [((3,), "uncertainty"), ((4, 5, 11), "matched")])
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(store, tmp_path, stops, weighting):
    # Three batches of 16 make an epoch of 50 and a bit: every stop is within an epoch.
    config = config_for(store, loss=LossConfig(weighting=weighting))
    train(config, store, tmp_path / "whole")
    for step in (*stops, config.steps):
        train(dataclasses.replace(config, steps=step), store, tmp_path / "parts")
    assert_same_checkpoint(tmp_path / "whole", tmp_path / "parts", config.steps)
    whole, parts = ({s: (loss, norm) for s, loss, norm in logged(tmp_path / run)} for run in ("whole", "parts"))
    shared = [step for step in whole if step in parts and step % 2 == 0 and step not in stops]
    assert all(whole[step][1] == parts[step][1] for step in shared)
    states = [open_checkpoint(tmp_path / name).read_state() for name in ("whole", "parts")]
    assert states[0].draws == states[1].draws


@pytest.mark.slow
def test_killed_at_random_moments_it_still_ends_as_the_uninterrupted_run(store, tmp_path):
    config = config_for(store, steps=90, checkpoint_every=3, log_every=10)
    assert start_training(config, store, tmp_path / "whole").wait() == 0
    generator, kills, saved = np.random.default_rng(0), 0, 0
    while True:
        process = start_training(config, store, tmp_path / "killed")
        # A few saves of progress, then a moment that may be in a step, in a save or in the removal of an old one.
        while process.poll() is None and newest_step(tmp_path / "killed") < saved + 15:
            time.sleep(0.005)
        time.sleep(generator.uniform(0, 0.1))
        if process.poll() is not None:
            assert process.returncode == 0
            break
        process.kill()
        process.wait()
        kills += 1
        assert verify_checkpoints(tmp_path / "killed") == []
        assert newest_step(tmp_path / "killed") >= saved
        saved = newest_step(tmp_path / "killed")
    assert kills >= 2
    assert_same_checkpoint(tmp_path / "whole", tmp_path / "killed", config.steps)


def test_sigterm_saves_and_leaves(store, tmp_path):
    config = config_for(store, steps=100_000, checkpoint_every=100_000, log_every=10)
    process = start_training(config, store, tmp_path / "run")
    while not (tmp_path / "run" / "log.jsonl").exists() or len(logged(tmp_path / "run")) < 2:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) != 0
    checkpoint = open_checkpoint(tmp_path / "run")
    assert checkpoint.step >= 20
    assert verify_checkpoints(checkpoint.folder) == []


def test_draws_are_functions_of_seed_step_and_sample(store):
    config, order = config_for(store), SampleOrder(50, 3)
    whole = draw_step(config, order, 7)
    halves = [whole.part(slice(first, first + 8)) for first in (0, 8)]
    assert np.array_equal(whole.indices, np.concatenate([half.indices for half in halves]))
    assert np.array_equal(whole.flips, np.concatenate([half.flips for half in halves]))
    assert torch.equal(whole.t, torch.cat([half.t for half in halves]))
    assert torch.equal(whole.dropped, torch.cat([half.dropped for half in halves]))
    assert whole.noise_seeds == halves[0].noise_seeds + halves[1].noise_seeds
    assert len(set(whole.noise_seeds + draw_step(config, order, 8).noise_seeds)) == 32
    places = ((7, ""), (8, ""), (7, "a"), (7, "b"))
    digests = {next(draw_steps(config, order, range(step, step + 1), before)).digest for step, before in places}
    assert len(digests) == 4


def test_steps_drawn_from_anywhere_carry_the_same_digests(store):
    config, order = config_for(store), SampleOrder(50, 3)
    whole = [draws.digest for draws in draw_steps(config, order, range(6), "")]
    assert [draws.digest for draws in draw_steps(config, order, range(4, 6), whole[3])] == whole[4:]
    assert len(set(whole)) == 6


def test_share_of_dropped_labels_and_moments_of_times(store):
    config, order = config_for(store, batch_size=4096), SampleOrder(50, 3)
    draws = draw_step(config, order, 0)
    assert draws.dropped.float().mean().item() == pytest.approx(0.1, abs=0.02)
    logits = torch.logit(draws.t.double())
    assert logits.mean().item() == pytest.approx(-0.8, abs=0.05)
    assert logits.std().item() == pytest.approx(0.8, abs=0.04)


@pytest.mark.parametrize("change", ["prediction", "space", "patch"])
def test_draws_do_not_depend_on_what_is_compared(store, tmp_path, change):
    """What makes an ablation matched: another prediction, loss space or patch sees the same draws."""
    config = config_for(store, steps=3)
    other = {
        "prediction": dataclasses.replace(config, prediction="v"),
        "space": dataclasses.replace(config, loss=LossConfig(space="x")),
        "patch": dataclasses.replace(config, network=dataclasses.replace(config.network, patch_size=2)),
    }[change]
    train(config, store, tmp_path / "a")
    train(other, store, tmp_path / "b")
    states = [open_checkpoint(tmp_path / name).read_state() for name in "ab"]
    assert states[0].draws == states[1].draws
    assert (states[0].initial_weights == states[1].initial_weights) is (change != "patch")


@pytest.fixture
def finished(store, tmp_path):
    config = config_for(store, steps=4)
    train(config, store, tmp_path / "run")
    return config, tmp_path / "run"


@pytest.mark.parametrize("damage", ["flip", "zero tail", "truncate", "missing"])
@pytest.mark.parametrize(
    "name", ["network.safetensors", "optimizer.safetensors", "ema_0.9.safetensors", "state.json", "manifest.json"]
)
def test_damaged_checkpoint_is_named_and_refused(finished, store, name, damage):
    config, run = finished
    path = step_folder(run, 4) / name
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
    elif damage == "zero tail":
        content[-8:] = bytes(8)
    path.unlink()
    if damage != "missing":
        path.write_bytes(content[: len(content) // 2] if damage == "truncate" else content)
    assert any(name in problem for problem in verify_checkpoints(run))
    with pytest.raises(JLTError, match=name):
        train(dataclasses.replace(config, steps=8), store, run)


def test_edited_manifest_is_refused(finished, store):
    """A checkpoint that claims another prediction would be sampled as one."""
    config, run = finished
    path = step_folder(run, 4) / "manifest.json"
    path.write_text(path.read_text().replace('"prediction": "x"', '"prediction": "v"'))
    assert any("manifest.json" in problem for problem in verify_checkpoints(run))
    with pytest.raises(JLTError, match="does not match its own SHA-256"):
        train(dataclasses.replace(config, steps=8), store, run)


def test_checkpoint_of_another_run_is_not_continued(finished, store, tmp_path):
    config, run = finished
    other = tmp_path / "other"
    train(dataclasses.replace(config, prediction="v", steps=2), store, other)
    shutil.copytree(step_folder(run, 4), step_folder(other, 4))
    with pytest.raises(JLTError, match=r"manifest.json was copied or renamed, since it was written for .* of the work"):
        train(dataclasses.replace(config, prediction="v", steps=8), store, other)


def test_a_signal_at_the_last_step_is_no_stop(store, tmp_path, monkeypatch):
    config = config_for(store, steps=4)
    answers = iter([False, False, False, True])
    monkeypatch.setattr(StopRequest, "__bool__", lambda self: next(answers))
    train(config, store, tmp_path / "run")
    assert next(answers, None) is None
    assert open_checkpoint(tmp_path / "run").step == 4
    assert '"end"' in (tmp_path / "run" / "log.jsonl").read_text()


def test_second_writer_is_refused(finished, store):
    config, run = finished
    with lock_folder(run), pytest.raises(JLTError, match="Another process"):
        train(dataclasses.replace(config, steps=8), store, run)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"prediction": "v"}, "prediction: 'x' -> 'v'"),
        ({"loss": LossConfig(space="x")}, "loss.space: 'v' -> 'x'"),
        ({"seed": 1}, "seed: 0 -> 1"),
        ({"batch_size": 8}, "batch_size: 16 -> 8"),
    ],
)
def test_another_run_in_the_same_folder_is_refused_with_the_difference(finished, store, change, named):
    config, run = finished
    with pytest.raises(JLTError, match=named):
        train(dataclasses.replace(config, steps=8, **change), store, run)


def test_foreign_folder_is_never_overwritten(store, tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(JLTError, match="other files, such as thesis.tex"):
        train(config_for(store), store, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_network_for_other_latents_is_refused(store, tmp_path):
    config = config_for(store)
    other = dataclasses.replace(config, network=dataclasses.replace(config.network, channels=7))
    with pytest.raises(JLTError, match="7x"):
        train(other, store, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_pickle_in_place_of_weights_is_not_run(finished):
    _, run = finished
    path = step_folder(run, 4) / "network.safetensors"
    flag = run / "executed"
    path.write_bytes(b"cos\nsystem\n(S'touch " + str(flag).encode() + b"'\ntR.")
    with pytest.raises(JLTError, match="not a readable safetensors"):
        load_tensors(path)
    assert not flag.exists()


def test_configuration_survives_json_and_refuses_unknown_keys(store):
    config = config_for(store)
    plain = json.loads(json.dumps(to_json(config)))
    assert from_json(TrainConfig, plain) == config
    with pytest.raises(JLTError, match="network.depth"):
        from_json(TrainConfig, {**plain, "network": {**plain["network"], "dpeth": 3}})
    with pytest.raises(JLTError, match="no prediction named 'velocity': choose from x, eps, v"):
        from_json(TrainConfig, {**plain, "prediction": "velocity"})
    with pytest.raises(JLTError, match="steps must be int"):
        from_json(TrainConfig, {**plain, "steps": "many"})


def test_full_disk_leaves_what_was_saved(finished, store, monkeypatch):
    config, run = finished

    def full(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        train(dataclasses.replace(config, steps=8), store, run)
    assert open_checkpoint(run).step == 4
    assert verify_checkpoints(run) == []
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_0000004"]
