"""One update: how batches are divided, what is skipped, what decays, which weights a run starts from and ends with."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from training_helpers import config_for, events, files_of, logged, run_processes, train_arguments

from jlt.config import OptimizerConfig, TimestepConfig, in_steps
from jlt.errors import JLTError
from jlt.latents.store import LatentStore
from jlt.training.averages import choose_weights
from jlt.training.checkpoint import open_checkpoint, save_checkpoint, step_folder
from jlt.training.loop import train
from jlt.training.state import build_optimizer, initial_state
from jlt.training.step import learning_rate, split_batch


@pytest.mark.parametrize("accumulation", [2, 4, 16])
def test_accumulated_micro_batches_equal_the_large_batch(store, tmp_path, accumulation):
    config = config_for(store, steps=6)
    train(config, store, tmp_path / "whole")
    train(dataclasses.replace(config, accumulation=accumulation), store, tmp_path / "parts")
    losses, parts = ([(loss, norm) for _, loss, norm in logged(tmp_path / name)] for name in ("whole", "parts"))
    assert np.array(parts) == pytest.approx(np.array(losses), rel=1e-6)
    whole, parts = (files_of(tmp_path / name, 6)["optimizer.safetensors"] for name in ("whole", "parts"))
    for key, value in whole.items():
        assert (value - parts[key]).norm() <= 1e-5 * value.norm(), key


@pytest.mark.slow
def test_how_a_run_is_executed_does_not_change_it(store, tmp_path):
    for name, arguments in {"plain": [], "other": ["--compile", "--gradient-checkpointing"]}.items():
        run_processes(1, train_arguments(store, tmp_path / name, "--steps", "3", "--network.depth", "1", *arguments))
    plain, other = (logged(tmp_path / name) for name in ("plain", "other"))
    assert np.array(other) == pytest.approx(np.array(plain), rel=1e-5)


def plant(monkeypatch, steps, value=float("nan")):
    """Let the latents of some steps hold a bad value."""
    gather, calls = LatentStore.gather, []

    def poisoned(self, *arguments):
        latents, labels = gather(self, *arguments)
        if len(calls) in steps:
            latents[3, 0, 0, 0] = value
        calls.append(None)
        return latents, labels

    monkeypatch.setattr(LatentStore, "gather", poisoned)


@pytest.mark.parametrize("value", [float("nan"), 1e30])
def test_an_update_that_is_not_finite_changes_nothing_and_is_logged(store, tmp_path, monkeypatch, value):
    plant(monkeypatch, {2, 3, 5}, value)
    config = config_for(store, steps=8, checkpoint_every=1, keep_last=0, max_skipped=3, log_every=1)
    train(config, store, tmp_path / "run")
    skipped = events(tmp_path / "run", "skipped")
    assert [event["step"] for event in skipped] == [3, 4, 6]
    files = {step: files_of(tmp_path / "run", step) for step in range(1, 9)}

    def same(a, b):
        return all(value.equal(files[b][name][key]) for name in files[a] for key, value in files[a][name].items())

    assert [same(step, step + 1) for step in range(1, 8)] == [False, True, True, False, True, False, False]
    states = [open_checkpoint(step_folder(tmp_path / "run", step)) for step in range(1, 9)]
    assert [checkpoint.updates for checkpoint in states] == [1, 2, 2, 2, 3, 3, 4, 5]
    losses = [event["loss"] for event in events(tmp_path / "run", "step")]
    assert [loss is None for loss in losses] == [step in (3, 4, 6) for step in range(1, 9)]


def test_the_sample_that_is_not_finite_is_named(store, tmp_path, monkeypatch):
    plant(monkeypatch, {1})
    train(config_for(store, steps=3, max_skipped=2), store, tmp_path / "run")
    (skipped,) = events(tmp_path / "run", "skipped")
    assert skipped["processes"] == [0]
    (sample,) = skipped["samples"]
    assert 0 <= sample < len(store)


def test_too_many_in_a_row_end_the_run_and_a_resumed_run_goes_on_counting(store, tmp_path, monkeypatch):
    plant(monkeypatch, set(range(2, 99)))
    config = config_for(store, steps=50, checkpoint_every=3, max_skipped=4)
    with pytest.raises(JLTError, match=r"Step 6: the loss is nan.* 4 in a row"):
        train(config, store, tmp_path / "run")
    assert open_checkpoint(tmp_path / "run").step == 3
    assert open_checkpoint(tmp_path / "run").read_state().skipped_in_a_row == 1


@pytest.mark.parametrize(
    ("batch_size", "processes", "micro", "accumulation", "expected"),
    [
        (16, 1, 0, 0, (16, 1)),
        (16, 2, 0, 0, (8, 1)),
        (1024, 8, 32, 0, (32, 4)),
        (1024, 8, 0, 2, (64, 2)),
        (24, 3, 4, 2, (4, 2)),
    ],
)
def test_batches_multiply_up(store, batch_size, processes, micro, accumulation, expected):
    config = config_for(store, batch_size=batch_size, micro_batch_size=micro, accumulation=accumulation)
    split = split_batch(config, processes)
    assert (split.micro_batch_size, split.accumulation) == expected
    assert split.share * processes == batch_size


@pytest.mark.parametrize(
    ("batch_size", "processes", "micro", "accumulation"),
    [(16, 3, 0, 0), (16, 1, 5, 0), (16, 1, 0, 3), (16, 2, 4, 4), (16, 2, 16, 0), (4, 8, 0, 0), (16, 1, 32, 0)],
)
def test_batches_that_do_not_multiply_up_are_refused(store, batch_size, processes, micro, accumulation):
    config = config_for(store, batch_size=batch_size, micro_batch_size=micro, accumulation=accumulation)
    with pytest.raises(JLTError, match=str(batch_size)):
        split_batch(config, processes)


def test_warmup_is_linear_then_constant(store):
    config = config_for(store, optimizer=OptimizerConfig(learning_rate=1.0, warmup_steps=4))
    assert [learning_rate(config, step) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_cosine_ends_near_zero(store):
    optimizer = OptimizerConfig(learning_rate=2.0, warmup_steps=2, schedule="cosine")
    config = config_for(store, optimizer=optimizer, steps=12)
    rates = [learning_rate(config, step) for step in range(12)]
    assert rates[:3] == [1.0, 2.0, 2.0]
    assert rates[7] == pytest.approx(1.0)
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert rates[-1] == pytest.approx(1 + math.cos(math.pi * 0.9))


def test_a_cosine_binds_the_length_of_a_run(store, tmp_path):
    config = config_for(store, optimizer=OptimizerConfig(learning_rate=1e-3, schedule="cosine"), steps=4)
    train(config, store, tmp_path / "run")
    with pytest.raises(JLTError, match="steps: 4 -> 8"):
        train(dataclasses.replace(config, steps=8), store, tmp_path / "run")


def test_epochs_become_steps_of_the_store(store):
    optimizer = OptimizerConfig(learning_rate=1e-3, warmup_epochs=2)
    config = in_steps(config_for(store, optimizer=optimizer, epochs=3), len(store))
    assert (config.steps, config.optimizer.warmup_steps) == (round(150 / 16), round(100 / 16))
    assert in_steps(config, len(store)) == config
    with pytest.raises(JLTError, match="in steps or in epochs"):
        OptimizerConfig(warmup_epochs=2, warmup_steps=7)


def test_the_first_decay_is_the_default_in_whatever_order_they_come(store, tmp_path):
    train(config_for(store, steps=2, ema=(0.9, 0.5, 0.7), power_ema=(0.1, 0.05)), store, tmp_path / "run")
    last = open_checkpoint(tmp_path / "run")
    assert last.ema_names() == ["0.9", "0.5", "0.7", "sigma_rel=0.1", "sigma_rel=0.05"]
    assert choose_weights(last, "").ema == "0.9"
    with pytest.raises(JLTError, match="names an average twice"):
        config_for(store, ema=(0.9, 0.9))


@pytest.mark.parametrize("decayed", ["matrices", "all"])
def test_weight_decay_reaches_what_it_names(store, decayed):
    config = config_for(store, optimizer=OptimizerConfig(learning_rate=0.1, weight_decay=0.5, decayed=decayed))
    network = initial_state(config, "cpu").network
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.fill_(1.0)
            parameter.grad = torch.zeros_like(parameter)
    build_optimizer(network, config.optimizer).step()
    shrunk = {name for name, value in network.named_parameters() if (value - 0.95).abs().max() < 1e-6}
    kept = {name for name, value in network.named_parameters() if (value == 1).all()}
    assert shrunk | kept == {name for name, _ in network.named_parameters()}
    linear = {f"{name}.weight" for name, module in network.named_modules() if isinstance(module, torch.nn.Linear)}
    assert shrunk == (linear if decayed == "matrices" else shrunk | kept)
    assert decayed == "all" or {"class_embedding.weight", "blocks.0.attention.query_key_scale"} <= kept


def test_clipping_bounds_the_gradient_and_the_norm_before_it_is_logged(store, tmp_path):
    config = config_for(store, optimizer=OptimizerConfig(learning_rate=1e-3, grad_clip=1e-4), steps=1, log_every=1)
    train(config, store, tmp_path / "run")
    ((_, _, norm),) = logged(tmp_path / "run")
    assert norm > 1e-3
    moments = files_of(tmp_path / "run", 1)["optimizer.safetensors"]
    clipped = torch.sqrt(
        sum((value / (1 - 0.9)).square().sum() for key, value in moments.items() if key.startswith("exp_avg/"))
    )
    assert clipped.item() == pytest.approx(1e-4, rel=1e-2)


def test_averages_are_the_brute_force_ones_and_lengths_are_rebuilt(store, tmp_path):
    """Every average of a real run against the sum over the weights after each of its updates."""
    config = config_for(
        store, steps=40, checkpoint_every=1, keep_last=0, snapshot_every=4, ema=(0.9,), power_ema=(0.05, 0.1)
    )
    train(config, store, tmp_path / "run")
    last = open_checkpoint(tmp_path / "run")
    key = "blocks.0.attention.qkv.weight"
    history = [initial_state(config, "cpu").network.state_dict()[key].double()]
    for step in range(1, 41):
        history.append(files_of(tmp_path / "run", step)["network.safetensors"][key].double())
    exponential = [0.9**40, *(0.1 * 0.9 ** (40 - step) for step in range(1, 41))]
    expected = sum(weight * value for weight, value in zip(exponential, history, strict=True))
    torch.testing.assert_close(choose_weights(last, "0.9").tensors[key].double(), expected, rtol=0, atol=1e-6)
    wandered = (history[-1] - history[0]).norm()
    for width, bound in ((0.05, 1e-5), (0.1, 1e-5), (0.07, 2e-3), (0.15, 5e-3)):
        profile = power_profile(width, 40)
        expected = sum(weight * value for weight, value in zip(profile, history[1:], strict=True))
        chosen = choose_weights(last, f"sigma_rel={width:g}")
        assert (chosen.tensors[key].double() - expected).norm() < bound * wandered, width
        assert (chosen.rebuilt is None) == (width in (0.05, 0.1))


def power_profile(width, updates):
    """The share of each update in a power-function average, from the width of its continuous profile alone."""
    gammas = np.linspace(0.01, 60, 600_000)
    gamma = gammas[np.argmin(np.abs(np.sqrt(gammas + 1) / ((gammas + 2) * np.sqrt(gammas + 3)) - width))]
    edges = (np.arange(updates + 1) / updates) ** (gamma + 1)
    return np.diff(edges).tolist()


def test_unknown_names_of_weights_are_refused(store, tmp_path):
    train(config_for(store, steps=2, power_ema=()), store, tmp_path / "run")
    last = open_checkpoint(tmp_path / "run")
    with pytest.raises(JLTError, match="did you mean 0.9"):
        choose_weights(last, "0.99")
    with pytest.raises(JLTError, match="no power-function average"):
        choose_weights(last, "sigma_rel=0.07")
    with pytest.raises(JLTError, match="does not name a length"):
        choose_weights(last, "sigma_rel=0.9")


def test_fine_tuning_starts_from_the_weights_and_adapts_classes_and_grid(store, tmp_path):
    config = config_for(store, steps=3)
    train(config, store, tmp_path / "source")
    source = choose_weights(open_checkpoint(tmp_path / "source"), "0.5").tensors
    network = dataclasses.replace(config.network, num_classes=30, height=8, width=4)
    other = dataclasses.replace(config, network=network, init_from=str(tmp_path / "source"), init_ema="0.5", seed=5)
    weights = initial_state(other, "cpu").network.state_dict()
    fresh = initial_state(dataclasses.replace(other, init_from="", init_ema=""), "cpu").network.state_dict()
    classes = weights.pop("class_embedding.weight")
    assert classes[-1].equal(source["class_embedding.weight"][-1])
    assert classes[:-1].equal(fresh["class_embedding.weight"][:-1])
    assert all(value.equal(source[name]) for name, value in weights.items())


def test_a_fine_tuned_run_continues_without_what_it_started_from(store, tmp_path):
    train(config_for(store, steps=3), store, tmp_path / "source")
    config = config_for(store, steps=2, init_from=str(tmp_path / "source"), seed=3)
    train(config, store, tmp_path / "run")
    (tmp_path / "source").rename(tmp_path / "gone")
    train(dataclasses.replace(config, steps=4), store, tmp_path / "run")
    assert open_checkpoint(tmp_path / "run").step == 4
    with pytest.raises(JLTError, match="does not exist"):
        train(config, store, tmp_path / "new")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"prediction": "v"}, "predicts x"),
        ({"network": {"depth": 3}}, "and 12 more"),
        ({"network": {"patch_size": 2}}, "final.linear.bias is"),
    ],
)
def test_weights_that_do_not_fit_are_refused(store, tmp_path, change, named):
    config = config_for(store, steps=1)
    train(config, store, tmp_path / "source")
    if "network" in change:
        change = {"network": dataclasses.replace(config.network, **change["network"])}
    with pytest.raises(JLTError, match=named):
        train(dataclasses.replace(config, init_from=str(tmp_path / "source"), **change), store, tmp_path / "run")


def test_loss_by_time_is_the_loss_where_all_times_are_equal(store, tmp_path):
    """Times so narrow that all are in one bin: its mean is the mean of all."""
    times = TimestepConfig(P_mean=0.2, P_std=1e-4)
    train(config_for(store, steps=2, timesteps=times), store, tmp_path / "run")
    (event,) = events(tmp_path / "run", "step")
    assert [value is None for value in event["loss_by_time"]] == [place != 5 for place in range(10)]
    assert event["loss_by_time"][5] == pytest.approx(event["loss"], rel=1e-5)
    assert 0 <= event["waiting"] <= 1
    assert event["ema_distance"].keys() == {"0.9", "0.5", "sigma_rel=0.1"}


def test_a_checkpoint_of_a_bare_step_knows_its_updates(store, tmp_path):
    config = config_for(store)
    state = initial_state(config, "cpu")
    folder = save_checkpoint(tmp_path, config, store.identity(), state.tensors(), {"step": 0, **state.facts()})
    assert open_checkpoint(folder).updates == 0
