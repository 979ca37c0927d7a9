"""Matched ablations: what makes them matched, what is kept and what is refused, and how their processes end."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import time
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
from data_helpers import file_bytes
from worker_jobs import begin_job, die_or_wait

from jlt.config import LossConfig, OptimizerConfig, SampleConfig
from jlt.errors import JLTError, UsageError
from jlt.experiments.ablation import (
    ablate,
    check_matched,
    forecasts,
    prove_matched,
    require_equal,
)
from jlt.experiments.ablation_plan import AblationConfig, systems_of
from jlt.experiments.quickstart import quickstart_ablation
from jlt.experiments.recipes import resolve_recipe, vary
from jlt.geometry.forecast import needed_ranks
from jlt.geometry.tokens import token_estimates
from jlt.images.registry import open_source
from jlt.latents.encode_config import EncodeConfig
from jlt.latents.encoding import encode
from jlt.latents.store import LatentStore
from jlt.networks.transformer import build_network
from jlt.report.page import write_report
from jlt.results.geometry import TrainingModel
from jlt.runtime.workers import run_jobs
from jlt.storage.codec import to_json
from jlt.storage.files import read_sealed_json, sealed_text, sha256_file, write_text
from jlt.training import loop, state
from jlt.training.checkpoint import list_checkpoints, load_tensors, open_checkpoint, verify_checkpoints

STEPS = 10


@pytest.fixture(scope="module")
def latents(tmp_path_factory) -> Path:
    """A store of some digits."""
    folder = tmp_path_factory.mktemp("digits")
    source = open_source("digits")
    for index in range(40):
        image, label = source[index]
        (folder / "images" / str(label)).mkdir(parents=True, exist_ok=True)
        image.save(folder / "images" / str(label) / f"{index:04d}.png")
    encoding = EncodeConfig(
        images=str(folder / "images"), autoencoder="tiny", resolution=32, flips=False, dtype="float32"
    )
    encode(encoding, folder / "latents")
    return folder / "latents"


def base_config(latents: Path):
    recipe = resolve_recipe("digits", LatentStore.open(latents).shape)
    return dataclasses.replace(recipe, steps=STEPS, batch_size=8, log_every=5)


def ablation_config(latents: Path, **changes) -> AblationConfig:
    settings = {
        "train": base_config(latents),
        "prediction": ("x", "v"),
        "loss_space": ("v",),
        "patch_size": (1, 2),
        "seed": (0,),
        "sample": SampleConfig(num=20, steps=2),
        "evaluations": 2,
        "extractor": "digits",
        "reference": "",
        "title": "test",
        "recipe": "digits",
        **changes,
    }
    return AblationConfig(**settings)


@pytest.fixture(scope="module")
def finished(latents, tmp_path_factory) -> Path:
    """A finished ablation of four systems; tests must not change it."""
    out = tmp_path_factory.mktemp("ablation") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jlt.experiments.ablation.run_jobs", one_after_another)
        ablate(ablation_config(latents), latents, out, workers=2, command="jlt ablate digits")
    return out


def one_after_another(job, systems, *_) -> None:
    """Stand for `run_jobs` where its processes are not the point: each would import everything again."""
    for system in systems:
        job(system)


@pytest.fixture
def in_this_process(monkeypatch) -> None:
    monkeypatch.setattr("jlt.experiments.ablation.run_jobs", one_after_another)


def modified(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def claims_to_be_matched(out: Path) -> bool:
    path = out / "ablation.json"
    return path.exists() and json.loads(path.read_text())["matched"] is not None


# ---- a whole ablation ----


def test_an_ablation_holds_every_system_measured_along_its_training(finished):
    summary = json.loads((finished / "ablation.json").read_text())
    axes = {(system["prediction"], system["patch_size"]) for system in summary["systems"]}
    assert axes == {("x", 1), ("x", 2), ("v", 1), ("v", 2)}
    assert summary["command"] == "jlt ablate digits"
    for system in summary["systems"]:
        run = finished / system["run"]
        assert [int(path.name[-7:]) for path in list_checkpoints(run)] == [5, 10]
        assert verify_checkpoints(run) == []
        results = [json.loads(path.read_text()) for path in (run / "evaluations").iterdir()]
        assert sorted(result["step"] for result in results) == [5, 10]
        assert all(result["metrics"]["count"] == 20 for result in results)
        assert all(np.isfinite(result["metrics"]["frechet_distance"]) for result in results)
        assert (run / "samples" / "grid.png").is_file()


def test_the_systems_of_an_ablation_are_matched(finished):
    matched = json.loads((finished / "ablation.json").read_text())["matched"]
    assert matched["differs"] == ["network.patch_size", "prediction"]
    draws, weights = matched["draws"], matched["initial_weights"]
    assert set(draws) == set(weights) == {"x-v-p1-s0", "x-v-p2-s0", "v-v-p1-s0", "v-v-p2-s0"}
    assert len(set(draws.values())) == 1
    for patch_size in (1, 2):
        assert weights[f"x-v-p{patch_size}-s0"] == weights[f"v-v-p{patch_size}-s0"]
    assert len(set(weights.values())) == 2
    # Not only the hashes: after training the networks differ, and all began from the same noise.
    networks = [
        load_tensors(list_checkpoints(finished / "runs" / f"{p}-v-p2-s0")[-1] / "network.safetensors") for p in "xv"
    ]
    assert any(not torch.equal(value, networks[1][name]) for name, value in networks[0].items())


def test_the_quickstart_measures_five_points_of_each_curve(latents, tmp_path):
    config = quickstart_ablation((0,), 30)
    systems = systems_of(config, latents, tmp_path)
    assert [system.evaluated_steps for system in systems] == [[6, 12, 18, 24, 30]] * 6


@pytest.mark.usefixtures("in_this_process")
def test_what_exists_is_kept(finished, latents, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    before = modified(out / "runs")
    begun = time.monotonic()
    ablate(ablation_config(latents), latents, out, workers=2, command="again")
    seconds = time.monotonic() - begun
    after = modified(out / "runs")
    # Only the grid may be written again.
    changed = {Path(path).name for path in after if before.get(path) != after[path]}
    assert set(after) == set(before)
    assert changed <= {"grid.png"}
    assert file_bytes(out / "runs") == file_bytes(finished / "runs")
    assert seconds < 60


def test_a_finished_ablation_answers_at_once(finished, latents, tmp_path, monkeypatch, capsys):
    for name in ("run_jobs", "forecasts", "check_sampling", "prove_matched"):
        monkeypatch.setattr(f"jlt.experiments.ablation.{name}", lambda *_: pytest.fail("work was done again"))
    found = ablate(ablation_config(latents), latents, finished, workers=2, command="again")
    assert found.command == "jlt ablate digits"
    assert "is already finished" in capsys.readouterr().err
    # One file less, and there is work.
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    next(out.glob("runs/*/evaluations/*.json")).unlink()
    with pytest.raises(pytest.fail.Exception, match="work was done again"):
        ablate(ablation_config(latents), latents, out, workers=2, command="again")


def test_other_settings_or_latents_are_refused_in_the_same_folder(finished, latents, tmp_path):
    before = file_bytes(finished)
    longer = dataclasses.replace(base_config(latents), steps=20)
    for change, named in [
        ({"train": longer}, "steps: 10 -> 20"),
        ({"sample": SampleConfig(num=20, steps=3)}, "steps: 2 -> 3"),
        ({"evaluations": 1}, "evaluations: 2 -> 1"),
    ]:
        with pytest.raises(JLTError, match=named):
            ablate(ablation_config(latents, **change), latents, finished, workers=2, command="")
    assert file_bytes(finished) == before


# ---- the proof that runs are matched ----


def test_matched_runs_differ_in_the_axes_alone(latents):
    base = base_config(latents)
    runs = [vary(base, prediction, space, 2, 1) for prediction in ("x", "v", "eps") for space in ("x", "v")]
    assert check_matched([to_json(run) for run in (base, *runs)], ablation_config(latents)) == [
        "loss.space",
        "network.patch_size",
        "prediction",
        "seed",
    ]
    assert check_matched([to_json(base)], ablation_config(latents)) == []


def test_a_width_is_an_axis_only_where_it_is_named(latents):
    base = base_config(latents)
    runs = [to_json(vary(base, "x", "v", 1, 0, {"width": width})) for width in (32, 64)]
    assert check_matched(runs, ablation_config(latents, width=(32, 64))) == [
        "network.hidden_size",
        "network.num_heads",
    ]
    with pytest.raises(JLTError, match="also differ in network.hidden_size, network.num_heads"):
        check_matched(runs, ablation_config(latents))
    with pytest.raises(JLTError, match="A width of 40 is no multiple of the 16 values of a head"):
        vary(base, "x", "v", 1, 0, {"width": 40})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"batch_size": 16}, "batch_size"),
        ({"steps": 11}, "steps"),
        ({"loss": LossConfig(weighting="published")}, "loss.weighting"),
        ({"optimizer": OptimizerConfig(learning_rate=3e-3, warmup_steps=50)}, "optimizer.learning_rate"),
        ({"ema": (0.9,)}, "ema"),
    ],
)
def test_a_run_with_another_setting_is_refused_by_name(latents, change, named):
    base = base_config(latents)
    odd = dataclasses.replace(vary(base, "v", "v", 1, 0), **change)
    with pytest.raises(JLTError, match=f"not matched: they also differ in {named}\\."):
        check_matched([to_json(run) for run in (base, vary(base, "eps", "v", 1, 0), odd)], ablation_config(latents))


def test_planted_unequal_hashes_are_refused_within_a_group(latents, tmp_path):
    systems = systems_of(ablation_config(latents, seed=(0, 1)), latents, tmp_path)
    hashes = {system.run.name: f"of seed {system.config.seed}" for system in systems}
    require_equal(systems, hashes, "random draws", lambda system: system.config.seed)
    with pytest.raises(JLTError, match="their random draws differ"):
        require_equal(systems, hashes, "random draws", lambda system: 0)
    odd = {**hashes, "v-v-p2-s1": "another"}
    with pytest.raises(JLTError, match=r"v-v-p2-s1.* are not matched|and v-v-p2-s1 are not matched"):
        require_equal(systems, odd, "random draws", lambda system: system.config.seed)


@pytest.mark.parametrize(
    ("planted", "message"),
    [
        ("another order", "their random draws differ"),
        ("other weights", "their initial weights differ"),
        ("another setting", "they also differ in optimizer.weight_decay"),
    ],
)
def test_runs_that_were_not_matched_are_detected(finished, latents, tmp_path, monkeypatch, planted, message):
    """One run is replaced by one that was trained with other settings."""
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    systems = systems_of(ablation_config(latents), latents, out)
    assert prove_matched(systems, ablation_config(latents))[1].differs == ("network.patch_size", "prediction")
    odd = next(system for system in systems if system.run.name == "v-v-p1-s0")
    config = odd.config
    if planted == "another order":
        config = dataclasses.replace(config, seed=1)
    elif planted == "another setting":
        config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, weight_decay=0.1))
    else:
        monkeypatch.setattr(state, "build_network", lambda network, seed: build_network(network, seed + 1))
    shutil.rmtree(odd.run)
    loop.train(config, LatentStore.open(latents), odd.run)
    with pytest.raises(JLTError, match=f"not matched: {message}"):
        prove_matched(systems, ablation_config(latents))


# ---- intervening in the geometry ----


@pytest.mark.usefixtures("in_this_process")
def test_the_geometry_is_changed_and_nothing_else(latents, tmp_path, monkeypatch):
    monkeypatch.setattr("jlt.experiments.checkpoint_evaluation.GRID_COLUMNS", 2)
    config = ablation_config(latents, patch_size=(1,), anisotropy=(0.0, 1.0), width=(32, 64), evaluations=1)
    ablation = ablate(config, latents, tmp_path / "out", workers=2, command="jlt ablate digits")
    assert len(ablation.systems) == 2 * 2 * 2
    assert {system.variant for system in ablation.systems} == {
        f"anisotropy {power}, width {width}" for power in (0, 1) for width in (32, 64)
    }
    differs = {name.rpartition(".")[2] for name in ablation.matched.differs}
    assert {"prediction", "hidden_size", "num_heads", "anisotropy", "manifest_sha256"} <= differs
    assert len(set(ablation.matched.draws.values())) == 1
    assert len(set(ablation.matched.initial_weights.values())) == 2
    for forecast in ablation.forecasts:
        store = LatentStore.open(tmp_path / "out" / "coordinates" / f"a{forecast.anisotropy:g}-p1")
        model = TrainingModel.of(config.train)
        assert forecast.needed["0.05"] == pytest.approx(
            needed_ranks(token_estimates(store, [1], "cpu")[1].eigenvalues, model, 0.05)
        )
    white, as_it_is = (next(found for found in ablation.forecasts if found.anisotropy == power) for power in (0.0, 1.0))
    assert white.sphericity > 0.99 > as_it_is.sphericity
    assert as_it_is.clean_over_velocity > 0.3 > white.clean_over_velocity
    page = write_report(tmp_path / "out").read_text(encoding="utf-8")
    assert "anisotropy 0, width 32" in page
    before = file_bytes(tmp_path / "out" / "runs")
    # A forecast made before the training is kept.
    monkeypatch.delattr("jlt.experiments.ablation.token_estimates")
    again = ablate(config, latents, tmp_path / "out", workers=2, command="again")
    assert again.forecasts == ablation.forecasts
    assert file_bytes(tmp_path / "out" / "runs") == before


@pytest.mark.usefixtures("in_this_process")
def test_members_of_the_lines_weightings_and_times_are_axes(latents, tmp_path, monkeypatch):
    monkeypatch.setattr("jlt.experiments.checkpoint_evaluation.GRID_COLUMNS", 2)
    config = ablation_config(
        latents,
        prediction=("x", "skip=0.30"),
        loss_space=("v", "edm"),
        patch_size=(1,),
        weighting=("min_snr", "uncertainty"),
        times=("half_cauchy",),
        evaluations=1,
    )
    ablation = ablate(config, latents, tmp_path / "out", workers=2, command="jlt ablate digits")
    assert {system.name.partition("-XS")[0] for system in ablation.systems} == {"JLT", "DiT-skip=0.3"}
    assert "skip=0.3-edm-p1-min_snr-half_cauchy-s0" in {Path(system.run).name for system in ablation.systems}
    assert {system.variant for system in ablation.systems} == {
        f"weighting {weighting}, times half_cauchy" for weighting in ("min_snr", "uncertainty")
    }
    assert set(ablation.matched.differs) == {"prediction", "loss.space", "loss.weighting"}
    page = write_report(tmp_path / "out").read_text(encoding="utf-8")
    assert "DiT-skip=0.3-XS/1" in page
    assert "weighting min_snr, times half_cauchy" in page


def test_every_loss_space_has_a_forecast(latents, tmp_path):
    config = ablation_config(latents, patch_size=(1,), loss_space=("x", "v"))
    found = forecasts(systems_of(config, latents, tmp_path))
    assert [forecast.loss_space for forecast in found] == ["x", "v"]
    spectrum = token_estimates(LatentStore.open(latents), [1], "cpu")[1].eigenvalues
    for forecast in found:
        model = TrainingModel(config.train.timesteps, config.train.loss.t_eps, forecast.loss_space)
        assert forecast.needed["0.05"] == pytest.approx(needed_ranks(spectrum, model, 0.05))
    assert found[0].needed["0.05"] != found[1].needed["0.05"]


@pytest.mark.parametrize("powers", [(-1.0,), (9.0,), (1.0, 1.0)])
def test_impossible_powers_are_usage_errors(latents, powers):
    with pytest.raises(UsageError, match=r"anisotropy"):
        ablation_config(latents, anisotropy=powers)


# ---- processes ----


def test_a_failing_job_fails_the_whole_and_the_rest_does_not_begin(tmp_path):
    jobs = [(tmp_path / f"job{index}", index == 0) for index in range(6)]
    with pytest.raises(JLTError, match="job0 failed"):
        run_jobs(begin_job, jobs, 1, lambda: None)
    # The worker may have taken the next one up before the failure was reported.
    assert {path.name for path in tmp_path.iterdir()} <= {"job0", "job1"}


def test_a_worker_that_is_killed_ends_the_others_soon(tmp_path):
    """As the kernel does where there is no memory left."""
    begun = time.monotonic()
    with pytest.raises(JLTError, match="worker"):
        run_jobs(die_or_wait, [(tmp_path / "dies", True), (tmp_path / "waits", False)], 2, lambda: None)
    assert time.monotonic() - begun < 20


def test_a_failing_system_fails_the_ablation_with_its_sentence(latents, tmp_path, monkeypatch):
    poisoned, out = tmp_path / "latents", tmp_path / "out"
    shutil.copytree(latents, poisoned)
    shard = poisoned / "shard-00000.safetensors"
    content = bytearray(shard.read_bytes())
    begin = 8 + int.from_bytes(content[:8], "little")
    first, last = json.loads(content[8:begin])["latents"]["data_offsets"]
    content[begin + first : begin + last] = np.full((last - first) // 4, np.nan, np.float32).tobytes()
    shard.write_bytes(content)
    # The store is whole, and what it holds is not finite.
    manifest = read_sealed_json(poisoned / "manifest.json")
    manifest["shards"][0]["sha256"] = sha256_file(shard)
    write_text(poisoned / "manifest.json", sealed_text(manifest))
    with pytest.raises(JLTError, match="Latent 0 of the store is not finite"):
        ablate(ablation_config(latents, patch_size=(2,)), poisoned, out, workers=2, command="")
    assert not (out / "runs").exists()
    # What is expected of the systems needs the latents too; without it they are met in the training alone.
    monkeypatch.setattr("jlt.experiments.ablation.forecasts", lambda *_: ())
    with pytest.raises(JLTError, match=r"Step 10: the loss is nan.* 10 in a row"):
        ablate(ablation_config(latents, patch_size=(2,)), poisoned, out, workers=1, command="")
    assert not claims_to_be_matched(out)
    saved = [open_checkpoint(folder) for folder in out.glob("runs/*/checkpoints/step_*")]
    assert {checkpoint.updates for checkpoint in saved} == {0}


PREDICTIONS = ["x", "v", "eps"]
LONG = {"--steps": 200, "--batch-size": 8, "--log-every": 4, "--evaluations": 2, "--patch-size": 2, "--workers": 2}


def long_arguments(latents: Path, out: Path) -> list[str]:
    arguments = ["ablate", "digits", "--latents", latents, "--out", out, "--prediction", *PREDICTIONS]
    arguments += [argument for pair in LONG.items() for argument in pair] + ["--sample.num", 20, "--sample.steps", 2]
    return list(map(str, arguments))


ATTENTIVE = """
from jlt.runtime import workers
workers.POLL_SECONDS = 0.05
"""
"""The parent polls for a signal often enough to pass it on before the workers have finished."""
ONE_AFTER_ANOTHER = """
from jlt.experiments import ablation
ablation.run_jobs = lambda job, systems, *_: list(map(job, systems))
"""
"""`one_after_another` for a separate process."""


@contextlib.contextmanager
def running_ablation(latents: Path, out: Path):
    """Yield an ablation whose two workers are in the middle of training; nothing of it outlives the block."""
    process = forked.start(long_arguments(latents, out), {**os.environ, "OMP_NUM_THREADS": "1"}, ATTENTIVE)
    try:
        deadline = time.monotonic() + 120
        while len([log for log in out.glob("runs/*/log.jsonl") if log.read_text().count("\n") > 2]) < 2:
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def alive_in_session(session: int) -> list[int]:
    """Return the processes of a session that have not ended."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == session and fields[0] != "Z":
                found.append(int(folder.name))
    return found


def seconds_until_gone(session: int, limit: float) -> float:
    begun = time.monotonic()
    while alive_in_session(session):
        assert time.monotonic() - begun < limit, f"still there: {alive_in_session(session)}"
        time.sleep(0.1)
    return time.monotonic() - begun


def final_tensors(out: Path) -> dict[str, dict]:
    tensors = {}
    for run in sorted((out / "runs").iterdir()):
        folder = list_checkpoints(run)[-1]
        assert folder.name == f"step_{LONG['--steps']:07d}"
        for path in folder.glob("*.safetensors"):
            tensors[f"{run.name}/{path.name}"] = load_tensors(path)
    return tensors


@pytest.mark.slow
def test_sigterm_ends_every_process_and_the_same_command_finishes_bit_for_bit(latents, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    with running_ablation(latents, parts) as process:
        begun = {run.name for run in (parts / "runs").iterdir()}
        assert len(begun) == 2
        assert len(alive_in_session(process.pid)) >= 3
        process.send_signal(signal.SIGTERM)
        seconds_until_gone(process.pid, 30)
        assert process.wait(timeout=5) == os.EX_TEMPFAIL
        message = process.stderr.read()
    assert "Run the same command again to resume." in message
    assert "Traceback" not in message
    # Both saved where they were, and the third did not begin.
    assert {run.name for run in (parts / "runs").iterdir()} == begun
    for name in begun:
        saved = list_checkpoints(parts / "runs" / name)
        assert saved
        assert int(saved[-1].name[-7:]) % (LONG["--steps"] // 2)
        assert verify_checkpoints(parts / "runs" / name) == []
    assert not claims_to_be_matched(parts)
    # Workers were the point above; the rest is trained in one process, which need not import everything again.
    for out in (whole, parts):
        process = forked.start(long_arguments(latents, out), {**os.environ, "OMP_NUM_THREADS": "1"}, ONE_AFTER_ANOTHER)
        _, message = process.communicate(timeout=200)
        assert process.returncode == 0, message
    ours, theirs = final_tensors(parts), final_tensors(whole)
    assert set(ours) == set(theirs)
    assert len(ours) == 15
    for name, tensors in ours.items():
        assert all(torch.equal(value, theirs[name][key]) for key, value in tensors.items()), name
    matched = [json.loads((out / "ablation.json").read_text())["matched"] for out in (whole, parts)]
    assert matched[0] == matched[1]


@pytest.mark.slow
def test_workers_do_not_outlive_a_killed_parent(latents, tmp_path):
    with running_ablation(latents, tmp_path / "out") as process:
        assert len(alive_in_session(process.pid)) >= 3
        process.kill()
        process.wait()
        seconds_until_gone(process.pid, 10)
