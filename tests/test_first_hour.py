"""What a newcomer meets in the first hour: names in place of numbers, plain sentences, nothing silent."""

import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from fake_results import GaussianStore, analyze, geometry, write_ablation, write_run
from PIL import Image
from test_cli import done, jlt
from training_helpers import config_for
from worker_jobs import count_and_wait

from jlt.benchmarks.plan import Figure, Hardware, check_affordable, describe_latents, make_plan
from jlt.config import SampleConfig, TrainConfig
from jlt.errors import JLTError, UsageError
from jlt.evaluation.reference import features_for
from jlt.experiments.ablation_plan import AblationConfig
from jlt.experiments.recipes import resolve_recipe
from jlt.experiments.run_training import affordable_grids
from jlt.images.registry import open_source, reopen_source
from jlt.latents.manifest import read_manifest
from jlt.latents.store import LatentStore
from jlt.report import findings
from jlt.report.benchmark_table import benchmark_table, plan_table
from jlt.report.geometry_text import geometry_verdict
from jlt.report.page import command, write_report
from jlt.report.study import read_study
from jlt.report.sweep_page import bias_sentences
from jlt.results.evaluation import Evaluation, Metrics
from jlt.results.files import read_result, write_result
from jlt.results.sweep import SweepPoint
from jlt.runtime.environment import default_device, device_of_float64
from jlt.runtime.signals import STOPPING, Stopped, stop_on_signal, until_stopped
from jlt.runtime.workers import run_jobs, shared_steps
from jlt.storage.codec import to_json
from jlt.training.loop import train
from jlt.training.step import Stepper

SMALL = ["--steps", 4, "--batch-size", 8, "--log-every", 2, "--checkpoint-every", 2]


@pytest.fixture(scope="module")
def named(tmp_path_factory) -> Path:
    """A folder with images of two named classes, their latents and a run of a few steps; tests must not change it."""
    folder = tmp_path_factory.mktemp("named")
    source = open_source("digits")
    for index in range(40):
        image, label = source[index]
        path = folder / "images" / ("cat" if label < 5 else "dog") / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    encoding = ["--autoencoder", "tiny", "--resolution", 32, "--no-flips", "--dtype", "float32"]
    done("encode", "--images", folder / "images", *encoding, "--out", folder / "latents")
    done("train", "digits", "--latents", folder / "latents", "--out", folder / "run", *SMALL)
    return folder


# ---- sentences that name the cause and the next step ----


def test_a_folder_of_images_is_no_latent_store(named, tmp_path):
    images = named / "images"
    for arguments in (["train", "digits"], ["plan", "digits"], ["analyze"]):
        out = [] if arguments[0] == "plan" else ["--out", tmp_path / "out"]
        outcome = jlt(*arguments, "--latents", images, *out)
        assert (
            outcome.err == f"jlt: {images} is not a latent store: make a latent store of your images with jlt encode.\n"
        )


@pytest.mark.parametrize("option", ["--checkpoint", "--reference"])
def test_a_path_is_not_spell_checked_against_folders(named, tmp_path, monkeypatch, option):
    (tmp_path / "somewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    arguments = {"--checkpoint": named / "run", "--reference": "digits", option: "nowhere"}
    outcome = jlt("evaluate", *[part for pair in arguments.items() for part in pair], "--num", 20, "--steps", 1)
    assert "nowhere does not exist" in outcome.err
    assert "somewhere" not in outcome.err


# ---- names of classes ----


@pytest.mark.parametrize(
    "command",
    [
        ["sample", "--num", 4, "--steps", 1],
        ["sweep", "--num", 20, "--coarse-num", 20, "--steps", 1, "--cfg-scale", 1, "--refine", 0],
        ["price", "--num", 20, "--steps", 5, "--solver", "euler"],
    ],
    ids=lambda command: command[0],
)
def test_labels_are_named_wherever_numbers_are_accepted(named, tmp_path, monkeypatch, command):
    monkeypatch.setattr("jlt.experiments.price.PUBLISHED", ("heun", 2, 1.0))
    monkeypatch.setattr("jlt.evaluation.reference.shows_digits", lambda source: True)
    measured = [] if command[0] == "sample" else ["--reference", named / "images", "--features", "digits"]
    drawn = done(*command, *measured, "--checkpoint", named / "run", "--labels", "dog,cat", "--out", tmp_path / "names")
    if command[0] == "sample":
        assert drawn["protocol"]["labels"] == "1,0"
    else:
        # The settings of the measured points are numbers.
        assert "--labels 1,0" in drawn["reproduce"]
    outcome = jlt(*command, *measured, "--checkpoint", named / "run", "--labels", "cow", "--out", tmp_path / "other")
    assert outcome.code == 2
    assert "There is no class named 'cow'" in outcome.err


# ---- images ----


def picture(path: Path, side: int = 8) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((side, side, 3), np.uint8)).save(path)


def test_folders_that_look_like_splits_are_no_classes(tmp_path):
    for name in ("train/cat/0.png", "train/dog/0.png", "test/cat/0.png"):
        picture(tmp_path / name)
    with pytest.raises(UsageError, match=r"holds splits, not classes \(test, train\): choose one with --split"):
        open_source(str(tmp_path))
    source = open_source(str(tmp_path), "train")
    assert source.class_names == ("cat", "dog")
    assert reopen_source(source.identity()).identity() == source.identity()
    with pytest.raises(UsageError, match="did you mean train"):
        open_source(str(tmp_path), "trian")


def test_one_split_alone_is_no_class_and_a_class_may_be_called_test(tmp_path):
    picture(tmp_path / "imagenet" / "train" / "cat" / "0.png")
    with pytest.raises(UsageError, match="choose one with --split"):
        open_source(str(tmp_path / "imagenet"))
    picture(tmp_path / "cars" / "test" / "0.png")
    picture(tmp_path / "cars" / "race" / "0.png")
    assert open_source(str(tmp_path / "cars")).class_names == ("race", "test")


def test_a_flat_folder_holds_images_of_one_class(tmp_path):
    for index in range(3):
        picture(tmp_path / "faces" / f"{index}.png")
    source = open_source(str(tmp_path / "faces"))
    assert (source.class_names, len(source), source[2][1]) == (("faces",), 3, 0)
    assert source.describe(2).endswith("faces/2.png")
    assert reopen_source(source.identity()).identity() == source.identity()


def test_an_encoding_names_what_it_ignores_and_its_classes(tmp_path):
    for name in ("cat/0.png", "dog/0.png", "loose.png"):
        picture(tmp_path / "images" / name)
    (tmp_path / "images" / "empty").mkdir()
    arguments = ["--autoencoder", "pixels", "--resolution", 16, "--dtype", "float32", "--out", tmp_path / "latents"]
    outcome = jlt("encode", "--images", tmp_path / "images", *arguments)
    assert outcome.out.splitlines()[-1] == "3 classes: cat, dog, empty"
    assert "holds loose.png outside of its class folders: ignored." in outcome.err
    assert "Classes without images: empty." in outcome.err
    assert outcome.err.count("have a short side of 8 px and are enlarged to 16 px: --resolution 8") == 1
    # What is finished needs no notes.
    again = jlt("encode", "--images", tmp_path / "images", *arguments)
    assert "enlarged" not in again.err


# ---- distances ----


def test_the_default_reference_is_that_of_the_latents_and_needs_fitting_features(named, monkeypatch):
    arguments = ["evaluate", "--checkpoint", named / "run", "--num", 20, "--steps", 1]
    unnamed = jlt(*arguments)
    assert unnamed.code == 2
    assert "name some with --features, such as inception" in unnamed.err
    refused = jlt(*arguments, "--features", "digits")
    assert refused.code == 2
    assert "The features of digits say nothing about images" in refused.err
    monkeypatch.setattr("jlt.evaluation.reference.shows_digits", lambda source: True)
    outcome = jlt(*arguments)
    assert outcome.out.startswith("20 samples against 40 images of images, in the features of digits.\n")
    # The second time nothing is drawn.
    monkeypatch.setattr("jlt.experiments.checkpoint_evaluation.evaluate_sampler", pytest.fail)
    again = jlt(*arguments)
    assert (again.code, again.out) == (0, outcome.out)
    assert "holds this evaluation already" in again.err


def test_samples_on_disk_need_a_reference(tmp_path):
    outcome = jlt("evaluate", "--samples", tmp_path)
    assert outcome.code == 2
    assert "name real ones with --reference" in outcome.err


def test_features_follow_from_the_reference(tmp_path):
    assert features_for("squeezenet", pytest.fail) == "squeezenet"
    assert features_for("", lambda: "digits") == "digits"
    picture(tmp_path / "7" / "0.png")
    assert features_for("", lambda: str(tmp_path)) == "digits"
    Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).save(tmp_path / "7" / "0.png")
    with pytest.raises(UsageError, match="need features that fit them"):
        features_for("", lambda: str(tmp_path))


def with_metrics(folder: Path, **changes) -> Path:
    """Change what every evaluation of an ablation measured."""
    for path in folder.glob("runs/*/evaluations/*.json"):
        evaluation = read_result(Evaluation, path)
        write_result(path, dataclasses.replace(evaluation, metrics=dataclasses.replace(evaluation.metrics, **changes)))
    return folder


def test_noise_has_no_winner(tmp_path):
    write_ablation(tmp_path, ["x", "v"], [1])
    decided = read_study(tmp_path)
    assert findings.verdict(decided).startswith("Clean prediction (x) reaches the lowest")
    # Decoded noise has no recall, but precision.
    study = read_study(with_metrics(tmp_path, recall=0.0, precision=0.99))
    assert findings.verdict(study) == "Too early to tell: no system draws recognisable samples yet."
    texts = " ".join(findings.details(study))
    assert "near a sample of any system (recall)" in texts
    assert "The paper claims" not in texts
    assert "The paper claims" in " ".join(findings.details(decided))
    assert "Expected and measured" not in write_report(tmp_path).read_text(encoding="utf-8")


def test_a_difference_within_its_error_is_none(tmp_path):
    write_ablation(tmp_path, ["x", "v"], [1], final={("x", 1): 20.0, ("v", 1): 30.0})
    assert findings.verdict(read_study(with_metrics(tmp_path, frechet_distance_error=1.0))).startswith("Clean")
    study = read_study(with_metrics(tmp_path, frechet_distance_error=4.0))
    assert findings.verdict(study).startswith("No prediction stands out")
    assert "the difference is within its error" in " ".join(findings.details(study))
    assert "This measurement is undecided" in " ".join(findings.details(study))


def test_features_of_digits_give_no_verdict_on_photographs(tmp_path):
    write_ablation(tmp_path, ["x", "v"], [1])
    for path in tmp_path.glob("runs/*/evaluations/*.json"):
        evaluation = read_result(Evaluation, path)
        reference = {**evaluation.protocol["reference"], "images": {"kind": "folder", "path": "photos"}}
        write_result(path, dataclasses.replace(evaluation, protocol={**evaluation.protocol, "reference": reference}))
    study = read_study(tmp_path)
    assert findings.fitting_features(study)
    named = [dataclasses.replace(run, config={"latents": {"class_names": ["cat"]}}) for run in study.runs]
    systems = [dataclasses.replace(s, runs=(run,)) for s, run in zip(study.systems, named, strict=True)]
    photos = dataclasses.replace(study, systems=tuple(systems), ablation=None)
    assert findings.verdict(photos).startswith("No verdict: the features of digits say nothing")


def test_the_headline_of_an_analysis_follows_its_caveat():
    found = geometry()
    assert "is expected to win:" in geometry_verdict(found)
    wide = analyze(GaussianStore(), [1], [100_000])
    headline = geometry_verdict(wide)
    assert "expected to win" not in headline
    assert "a network of width 100000 is wide enough for either" in headline
    both = geometry_verdict(analyze(GaussianStore(), [1], [64, 100_000]))
    assert "is expected to win in networks of width 64:" in both


def test_the_page_of_a_sweep_states_the_bias_of_few_images():
    metrics = Metrics(frechet_distance=20.0, frechet_distance_bias=3.0, count=40)
    point = SweepPoint(1.0, (0.0, 1.0), "none", 40, 0, 20.0, None, None, metrics, {"extractor": {"dimension": 64}})
    (text,) = bias_sentences(point)
    assert "biased upwards by about 3 of 20: use 640 images or more." in text
    assert bias_sentences(dataclasses.replace(point, metrics=dataclasses.replace(metrics, count=640))) == []


# ---- what fits ----


def train_config(**changes) -> TrainConfig:
    return dataclasses.replace(resolve_recipe("digits"), **changes)


def manifest_of(named: Path):
    return read_manifest(named / "latents")


def test_a_training_that_cannot_fit_is_refused_with_one_that_does(named, tmp_path, monkeypatch):
    monkeypatch.setattr("jlt.benchmarks.plan.measured_rate", lambda *_: 1e11)
    monkeypatch.setattr("jlt.benchmarks.plan.peak_memory", lambda _: 0)
    monkeypatch.setattr("jlt.benchmarks.plan.machine_memory", lambda: 2**26)
    for name, *more in (["train"], ["ablate", "--features", "squeezenet", "--reference", named / "images"]):
        folders = ["--latents", named / "latents", "--out", tmp_path / "out"]
        outcome = jlt(name, "digits", *more, *folders, "--batch-size", 1024, "--steps", 10)
        assert outcome.code == 1
        found = re.search(r"needs .* MiB of memory, and there are .*It fits with --micro-batch-size (\d+)", outcome.err)
        assert found, outcome.err
        assert not (tmp_path / "out").exists()
    config = train_config(batch_size=1024, micro_batch_size=int(found[1]))
    check_affordable([config], manifest_of(named), "cpu", together=2)


def test_a_long_training_and_many_tokens_are_warned_of(named, monkeypatch, capsys):
    monkeypatch.setattr("jlt.benchmarks.plan.measured_rate", lambda *_: 1e11)
    check_affordable([train_config()], manifest_of(named), "cpu")
    assert capsys.readouterr().err == ""
    network = dataclasses.replace(train_config().network, height=32, width=32)
    check_affordable([train_config(steps=200_000, network=network)], manifest_of(named), "cpu")
    warned = capsys.readouterr().err
    assert re.search(r"about [\d.]+ days here", warned)
    assert "1,024 tokens per image are slow on a CPU" in warned


@pytest.mark.parametrize(("name", "gpu"), [("photos", "L4"), ("laptop", "cpu")])
def test_the_recipes_for_photographs_fit_their_machines(name, gpu, monkeypatch):
    monkeypatch.setattr("jlt.benchmarks.plan.measured_rate", lambda *_: 1e11)
    monkeypatch.setattr("jlt.benchmarks.plan.machine_memory", lambda: 8 * 2**30)
    plan = done("plan", name, "--gpu", gpu)
    assert plan["fits"]
    assert plan["time"]["hours"]["value"] < 12


def test_an_ablation_takes_the_patch_size_of_its_recipe():
    config = AblationConfig(
        train=resolve_recipe("laptop"), sample=SampleConfig(), evaluations=1, extractor="digits", title="", recipe=""
    )
    assert config.patch_size == (2,)


# ---- progress and stops ----


def test_a_signal_is_acknowledged_and_leaves_the_item_under_way(capfd):
    def items():
        yield 1
        signal.raise_signal(signal.SIGTERM)
        pytest.fail("the item went on")

    with pytest.raises(Stopped), stop_on_signal():
        list(until_stopped(items()))
    assert capfd.readouterr().err == f"{STOPPING}\n"


def test_a_signal_between_items_waits_until_the_last_one_is_used():
    seen = []

    def use():
        for item in until_stopped(range(3)):
            signal.raise_signal(signal.SIGTERM)
            seen.append(item)

    with pytest.raises(Stopped):
        use()
    assert seen == [0]


def test_a_step_of_a_training_is_the_last_one_after_a_signal(store, tmp_path, monkeypatch):
    """The request arrives while the gradient of step 3 is computed."""
    config = config_for(store, steps=20)
    accumulate, calls = Stepper._accumulate, []

    def interrupted(self, *arguments):
        calls.append(None)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGTERM)
        return accumulate(self, *arguments)

    monkeypatch.setattr(Stepper, "_accumulate", interrupted)
    with pytest.raises(Stopped, match="step 3 of 20"):
        train(config, store, tmp_path / "run")


def test_the_bar_of_a_training_moves_at_every_step(store, tmp_path, monkeypatch):
    monkeypatch.setattr("jlt.runtime.progress.PLAIN_INTERVAL_SECONDS", 0.0)
    shown = []
    monkeypatch.setattr("jlt.runtime.progress.inform", shown.append)
    train(config_for(store, steps=4, log_every=4), store, tmp_path / "run")
    assert [int(match[1]) for line in shown if (match := re.search(r"step (\d+) of 4", line))][:4] == [0, 1, 2, 3]


def test_workers_hand_on_their_steps_and_leave_an_item_when_their_parent_stops(tmp_path):
    steps, polls = shared_steps(2), []

    def poll():
        polls.append(list(steps))
        if min(steps) >= 3:
            os.kill(os.getpid(), signal.SIGTERM)

    begun = time.monotonic()
    with pytest.raises(Stopped):
        run_jobs(count_and_wait, [tmp_path / "a", tmp_path / "b"], 2, poll, steps)
    assert list(steps) == [3, 3]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    assert time.monotonic() - begun < 50


# ---- processes and devices ----


def test_several_processes_fail_with_one_sentence(tmp_path):
    arguments = ["--processes", "2", "analyze", "--latents", "nowhere", "--out", "out"]
    command = [sys.executable, "-P", "-m", "jlt", *arguments]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300)
    assert ended.returncode == 1
    assert ended.stdout == ""
    assert re.fullmatch(r"\[process \d\] jlt: nowhere does not exist: .*\n", ended.stderr)


def test_the_global_options_are_taken_anywhere(monkeypatch):
    monkeypatch.delenv("JLT_DEVICE", raising=False)
    launched = []
    monkeypatch.setattr("jlt.cli.main.launch", lambda *arguments: launched.append(arguments) or 0)
    assert jlt("verify", "--processes=3", "somewhere", "--device", "cpu").code == 0
    assert launched == [(3, ["verify", "somewhere"])]
    assert os.environ["JLT_DEVICE"] == "cpu"


def test_the_chosen_device_is_used_or_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for chosen, device in (("auto", "cpu"), ("cpu", "cpu")):
        monkeypatch.setenv("JLT_DEVICE", chosen)
        assert default_device() == device
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    monkeypatch.setenv("JLT_DEVICE", "auto")
    assert default_device() == "mps"
    assert device_of_float64("mps") == "cpu"
    monkeypatch.setenv("JLT_DEVICE", "cuda")
    with pytest.raises(JLTError, match="no device cuda"):
        default_device()


# ---- the report of a run ----


def test_a_run_has_a_grid_by_default_where_drawing_is_cheap(named, monkeypatch):
    store = LatentStore.open(named / "latents")
    config = dataclasses.replace(resolve_recipe("digits", store.shape), steps=4000, checkpoint_every=1000)
    assert affordable_grids(config, store, "cpu") == 1000
    assert affordable_grids(dataclasses.replace(config, checkpoint_every=10), store, "cpu") == 4000
    assert affordable_grids(dataclasses.replace(config, steps=10), store, "cpu") == 0
    slow = dataclasses.replace(store.manifest, autoencoder={**store.manifest.autoencoder, "name": "flux2"})
    monkeypatch.setattr(store, "manifest", slow)
    assert affordable_grids(config, store, "cpu") == 0


def test_the_report_of_a_run_tells_how_to_train_it_and_how_often_it_was_evaluated(tmp_path):
    write_run(tmp_path, "x", 1, 0, 20.0)
    for path in sorted((tmp_path / "evaluations").iterdir())[:-1]:
        path.unlink()
    study = read_study(tmp_path)
    assert command(study).startswith(f"jlt train {tmp_path}/config.json --latents LATENTS --out OUT\n")
    assert "It is the only evaluation so far." in findings.details(study)
    aside = dataclasses.replace(study, set_aside=((study.runs[0], study.runs[0].evaluations[0]),))
    assert "It is the only evaluation by this protocol." in findings.details(aside)


# ---- benchmarks ----


@pytest.mark.parametrize(("mfu", "verdict"), [(0.5, "50% of the speed"), (0.1, "less than jlt plan assumes")])
def test_a_benchmark_says_whether_its_figures_are_good(mfu, verdict):
    keys = ["img_per_second", "seconds_per_step", "gflops", "matmul_gflops", "peak_memory_gib", "warmup_seconds"]
    entry = {"preset": "JLT-B/1", "batch_size": 8, "precision": "float32", "compile": False, "out_of_memory": False}
    result = {"measured": [{**entry, **dict.fromkeys(keys, 1.0), "mfu": mfu}], "best": {"JLT-B/1": 8}}
    result |= {"loop": {"JLT-B/1": {"error": "no room"}}, "profile": {}, "compare": {}, "warning": ""}
    last = benchmark_table(result).splitlines()[-1]
    assert last.startswith("JLT-B/1: an update reaches")
    assert verdict in last


def test_a_plan_states_which_micro_batch_fits():
    config = train_config(batch_size=64)
    latents = describe_latents(config, 1797, None)
    roomy = Hardware("some", 1, Figure(1e12, "", "FLOP/s"), Figure(2**40, ""), Figure(0, ""), 0.0)
    text = plan_table(to_json(make_plan(config, latents, roomy, 0.4)))
    assert text.endswith("A process's whole share of a batch, 64 samples, fits at once.")
    half = make_plan(dataclasses.replace(config, micro_batch_size=32), latents, roomy, 0.4).memory["total"].value
    tight = dataclasses.replace(roomy, memory=Figure(half, ""))
    text = plan_table(to_json(make_plan(dataclasses.replace(config, micro_batch_size=32), latents, tight, 0.4)))
    assert text.endswith("The largest micro-batch that fits and divides a process's 64 samples is 32.")
