"""Damage, misplaced files and hostile values in everything that jlt writes: seen, and named by file and field."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from data_helpers import make_store
from fake_results import read_content, write_ablation, write_log, write_run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from training_helpers import config_for, run_on_few_digits

from jlt.config import SampleConfig
from jlt.errors import JLTError
from jlt.evaluation.extractors import load_extractor
from jlt.evaluation.reference import Reference, read_reference_file
from jlt.experiments.analysis import AnalysisConfig, measure_geometry
from jlt.experiments.checkpoint_evaluation import evaluate_checkpoint, evaluate_files
from jlt.experiments.recipes import resolve_recipe
from jlt.experiments.verification import verify
from jlt.latents.manifest import read_manifest
from jlt.latents.store import LatentStore
from jlt.report.page import write_report
from jlt.report.study import read_study
from jlt.results.geometry import TrainingModel
from jlt.results.run import read_log
from jlt.sampling.sampler import open_sampler
from jlt.sampling.save import save_samples
from jlt.storage.files import sealed_text, without_seal
from jlt.training.checkpoint import open_checkpoint, step_folder
from jlt.training.loop import train

SAMPLE = SampleConfig(num=12, steps=1, batch_size=12)
TRIALS = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
HOSTILE = st.sampled_from(
    [10**18, 10**400, -1, 0, 0.5, 1e308, True, None, "", "x", "../../x", "a\0b", [], [1], {}, {"a": [None]}, ["a", "a"]]
)


@pytest.fixture(scope="module")
def ablation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of two systems with short logs; every test puts back what it changes."""
    folder = write_ablation(tmp_path_factory.mktemp("seals") / "ablation", ["x", "v"], [1])
    (folder / "geometry.json").unlink()
    for run in (folder / "runs").iterdir():
        steps = [{"event": "step", "step": step, "loss": 100 / step, "mfu": 0.2} for step in range(300, 1501, 300)]
        write_log(run, {"event": "start", "step": 0}, *steps, {"event": "end", "step": 1500, "seconds": 30.5})
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps with an evaluation, its latents and a reference; every test puts back what it changes."""
    folder = run_on_few_digits(tmp_path_factory.mktemp("trained"))
    checkpoint = open_checkpoint(folder / "run")
    evaluate_checkpoint(checkpoint, str(folder / "reference.npz"), load_extractor("digits"), SAMPLE, None)
    return folder


@pytest.fixture(scope="module")
def sampler(trained: Path) -> Any:
    return open_sampler(open_checkpoint(trained / "run"), SAMPLE)


def damaged(content: bytes, place: float, bit: int, cut: bool) -> bytes:
    """Return a file with one bit flipped, or cut off."""
    at = int(place * len(content))
    return content[:at] if cut else content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :]


DAMAGE = st.builds(
    lambda place, bit, cut: lambda content: damaged(content, place, bit, cut),
    st.floats(0, 1, exclude_max=True),
    st.integers(0, 7),
    st.booleans(),
)


def outcome(read: Callable[[], Any], named: str) -> Any:
    """Return what is read, or None after a JLTError that names a file; other exceptions fail the test."""
    try:
        return read()
    except JLTError as error:
        if named in str(error):
            return None
        raise AssertionError(f"{named} is not named: {error}") from error


@functools.cache
def whole(folder: Path, read: Callable[[Path], Any]) -> Any:
    """Return what a folder holds before its first damage."""
    return read(folder)


class Changed:
    """A file that is changed within a block."""

    def __init__(self, path: Path) -> None:
        self.path, self.before = path, path.read_bytes()

    def __enter__(self) -> bytes:
        return self.before

    def __exit__(self, *_: object) -> None:
        self.path.write_bytes(self.before)


# Damage


@TRIALS
@given(st.data(), DAMAGE)
def test_no_damage_changes_a_report_unseen(ablation: Path, data: st.DataObject, damage: Callable) -> None:
    files = sorted(path for path in ablation.rglob("*") if path.suffix in (".json", ".jsonl", ".png"))
    path, before = data.draw(st.sampled_from(files)), whole(ablation, read_study)
    with Changed(path) as content:
        path.write_bytes(damage(content))
        study = outcome(lambda: read_study(ablation), path.name)
        if study is None or path.suffix == ".png":
            # The pixels of a grid do not count among the values; the reader of its page refuses a broken picture.
            return
        assert study == before or any(path.name in note for note in study.notes)


@TRIALS
@given(st.data(), DAMAGE)
def test_no_damage_changes_what_a_checkpoint_a_store_or_a_reference_is(
    trained: Path, data: st.DataObject, damage: Callable
) -> None:
    def read() -> Any:
        checkpoint = open_checkpoint(step_folder(trained / "run", 4))
        state, weights = checkpoint.read_state(), checkpoint.read("ema_0.99.safetensors")
        reference, log = Reference.load(trained / "reference.npz").identity(), read_study(trained / "run").runs[0].log
        sums = {name: tensor.double().sum().item() for name, tensor in weights.items()}
        return checkpoint, state, sums, read_manifest(trained / "latents"), reference, log

    kinds = ("manifest.json", "state.json", "ema_0.99.safetensors", "log.jsonl", "reference.json", "reference.npz")
    files = [path for path in sorted(trained.rglob("*")) if path.name in kinds and "snapshots" not in path.parts]
    path, before = data.draw(st.sampled_from(files)), read()
    with Changed(path) as content:
        path.write_bytes(damage(content))
        after = outcome(read, path.stem if path.stem == "reference" else path.name)
        assert after is None or after == before or (path.name == "log.jsonl" and after[-1].notes)


@settings(TRIALS, max_examples=30)
@given(st.data(), DAMAGE)
def test_the_same_command_draws_damaged_samples_again(
    sampler: Any, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, damage: Callable
) -> None:
    form = data.draw(st.sampled_from(["png", "npz", "grid"]))
    out = tmp_path_factory.mktemp("samples") / "out"
    save_samples(sampler, out, form)
    path = data.draw(st.sampled_from(sorted(out.glob("[!.]*"))))
    with Changed(path) as content:
        path.write_bytes(damage(content))
        if outcome(lambda: save_samples(sampler, out, form), path.name):
            assert path.read_bytes() == content


def test_a_picture_that_is_half_zeros_is_not_evaluated_and_drawn_again(sampler: Any, tmp_path: Path, capsys) -> None:
    out = save_samples(sampler, tmp_path / "out", "png")
    path = out / "000003.png"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2))
    with pytest.raises(JLTError, match=r"000003.png is damaged .* run the same jlt sample again"):
        evaluate_files(out, "digits", load_extractor("digits"))
    save_samples(sampler, out, "png")
    assert "000003.png is damaged" in capsys.readouterr().err
    assert path.read_bytes() == whole
    assert evaluate_files(out, "digits", load_extractor("digits")).metrics.count == 12


def test_a_finished_store_that_is_damaged_is_named_by_the_same_command(tmp_path: Path) -> None:
    make_store(tmp_path / "store")
    flip(tmp_path / "store" / "shard-00002.safetensors")
    with pytest.raises(JLTError, match=r"shard-00002.safetensors is damaged.*--repair encodes"):
        make_store(tmp_path / "store")
    make_store(tmp_path / "store", repair=True)
    make_store(tmp_path / "store")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)


def test_training_and_analysis_of_a_damaged_store_end_with_its_name(tmp_path: Path, store: LatentStore) -> None:
    folder = Path(shutil.copytree(store.folder, tmp_path / "store"))
    flip(folder / "shard-00000.safetensors")
    with pytest.raises(JLTError, match=r"shard-00000.safetensors is damaged.*--repair"):
        train(config_for(store), LatentStore.open(folder), tmp_path / "run")
    assert not step_folder(tmp_path / "run", 12).exists()
    model = AnalysisConfig((1,), (16,), TrainingModel.of(config_for(store)))
    with pytest.raises(JLTError, match=r"shard-00000.safetensors is damaged"):
        measure_geometry(LatentStore.open(folder), tmp_path / "geometry", model)
    train(config_for(store), store, tmp_path / "run")


# Whole files in the wrong place


def swap(a: Path, b: Path) -> None:
    middle = a.with_name("middle")
    a.rename(middle)
    b.rename(a)
    middle.rename(b)


EVALUATION = "evaluations/step_0001500.json"


@pytest.mark.parametrize(
    ("moved", "there", "message"),
    [
        (f"x-v-p1-s0/{EVALUATION}", f"v-v-p1-s0/{EVALUATION}", "was copied or renamed"),
        (f"x-v-p1-s0/{EVALUATION}", f"x-v-p1-s1/{EVALUATION}", "was copied or renamed"),
        (f"x-v-p1-s0/{EVALUATION}", "x-v-p1-s0/evaluations/step_0001200.json", "was copied or renamed"),
        ("x-v-p1-s0/config.json", "v-v-p1-s0/config.json", "holds another run than ablation.json says"),
        ("x-v-p1-s0/log.jsonl", "x-v-p1-s1/log.jsonl", "line 1 was changed or is of another run"),
        ("x-v-p1-s0/samples/grid.png", "v-v-p1-s0/samples/grid.png", "grid.png is damaged, or was copied here"),
        ("x-v-p1-s0", "v-v-p1-s0", "holds another run than ablation.json says"),
        ("x-v-p1-s0", "x-v-p1-s1", "holds another run than ablation.json says"),
    ],
)
def test_files_of_another_run_are_refused(tmp_path: Path, moved: str, there: str, message: str) -> None:
    folder = write_ablation(tmp_path / "ablation", ["x", "v"], [1], (0, 1) if "-s1" in there else (0,))
    swap(folder / "runs" / moved, folder / "runs" / there)
    with pytest.raises(JLTError, match=message):
        read_study(folder)


def test_a_configuration_of_another_run_is_refused(tmp_path: Path) -> None:
    for prediction in ("x", "v"):
        write_run(tmp_path / prediction, prediction, 1, 0, 20.0)
    shutil.copy(tmp_path / "x" / "config.json", tmp_path / "v")
    with pytest.raises(JLTError, match=r"step_0000300.json was copied or renamed"):
        read_study(tmp_path / "v")


def test_steps_in_each_others_place_are_refused(tmp_path: Path, store: LatentStore) -> None:
    train(config_for(store), store, tmp_path / "run")
    four, eight = (step_folder(tmp_path / "run", step) for step in (4, 8))
    swap(four, eight)
    for path in (four, eight):
        with pytest.raises(JLTError, match=r"was copied or renamed"):
            open_checkpoint(path)
    assert len(verify(tmp_path / "run")) == 2
    swap(four, eight)
    assert verify(tmp_path / "run") == []
    train(config_for(store, seed=1), store, tmp_path / "other")
    shutil.rmtree(eight)
    shutil.copytree(step_folder(tmp_path / "other", 8), eight)
    with pytest.raises(JLTError, match=r"was copied or renamed"):
        open_checkpoint(eight)


def test_an_array_next_to_the_protocol_of_another_seed_is_refused(sampler: Any, trained: Path, tmp_path: Path) -> None:
    other = open_sampler(open_checkpoint(trained / "run"), dataclasses.replace(SAMPLE, seed=1))
    array = save_samples(sampler, tmp_path / "a", "npz")
    theirs = save_samples(other, tmp_path / "b", "npz")
    shutil.copy(theirs, array)
    with pytest.raises(JLTError, match=r"samples.npz is damaged or is no file of this sampling"):
        evaluate_files(array, "digits", load_extractor("digits"))
    before = theirs.read_bytes()
    assert save_samples(sampler, tmp_path / "a", "npz").read_bytes() != before


def test_a_reference_with_an_edited_count_is_refused(trained: Path) -> None:
    path = trained / "reference.json"
    with Changed(path) as content:
        path.write_bytes(content.replace(b'"count": 40,', b'"count": 50000,'))
        assert path.read_bytes() != content
        with pytest.raises(JLTError, match=r"reference.json was edited or damaged"):
            Reference.load(trained / "reference.npz")


# Files without a seal


def test_what_an_earlier_version_wrote_is_refused_until_it_is_accepted(trained: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(trained, tmp_path / "old"))
    run, study = folder / "run", read_study(trained / "run")
    reference = read_reference_file(folder / "reference.json")
    old = {"schema": 2, "sha256": reference.arrays, "count": reference.count, **reference.protocol}
    (folder / "reference.json").write_text(json.dumps(old))
    for path in (run / "config.json", *run.glob("evaluations/*.json")):
        path.write_text(json.dumps(read_content(path)))
    log = [line.partition(', "seal"')[0] + "}\n" for line in (run / "log.jsonl").read_text().splitlines()]
    (run / "log.jsonl").write_text("".join(log))
    for read in (lambda: read_study(run), lambda: Reference.load(folder / "reference.npz")):
        with pytest.raises(JLTError, match=r"carries no hash of itself.* `jlt verify .* --seal` accepts it"):
            read()
    assert verify(folder)
    assert verify(folder, seal=True) == []
    assert verify(folder) == []
    assert read_study(run).runs[0].log == study.runs[0].log
    assert read_study(run).runs[0].evaluations == study.runs[0].evaluations
    assert Reference.load(folder / "reference.npz").count == 40
    assert train(open_checkpoint(run).config, LatentStore.open(folder / "latents"), run) == step_folder(run, 4)


def test_damage_is_not_accepted(trained: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(trained / "run", tmp_path / "run"))
    (path,) = run.glob("evaluations/*.json")
    path.write_text(path.read_text().replace('"count": 12', '"count": 92'))
    assert all("edited or damaged" in problem for problem in verify(run, seal=True))
    content = {**without_seal(json.loads(path.read_text())), "step": -1}
    path.write_text(json.dumps(content))
    assert "step must be 0 or more" in verify(run, seal=True)[0]
    assert "carries no hash" in verify(run)[0]


def test_an_edited_copy_of_a_configuration_is_a_recipe_and_that_of_the_run_is_not_edited(
    trained: Path, tmp_path: Path
) -> None:
    path = trained / "run" / "config.json"
    edited = path.read_text().replace('"steps": 4', '"steps": 9', 1)
    (tmp_path / "mine.json").write_text(edited)
    assert resolve_recipe(str(tmp_path / "mine.json")).steps == 9
    with Changed(path):
        path.write_text(edited)
        with pytest.raises(JLTError, match=r"config.json was edited or damaged"):
            resolve_recipe(str(path))


# Logs


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"event": "step", "step": 20}, "line 2 .* loss is missing"),
        ({"event": "step", "loss": 1.0}, "line 2 .* step is missing"),
        ({"event": "step", "step": -1, "loss": 1.0}, "line 2 .* step must be 0 or more"),
        ({"event": "step", "step": True, "loss": 1.0}, "line 2 .* step must be int, not True"),
        ({"event": "step", "step": 20, "loss": True}, "line 2 .* loss must be float, not True"),
        ({"event": "step", "step": 20, "loss": -0.5}, "line 2 .* loss must be 0 or more"),
        ({"event": "step", "step": 10, "loss": 1.0}, "line 2 is of step 10, after step 10"),
        ({"event": "step", "step": 20, "loss": 1.0, "ema_distance": {"0.9": "far"}}, "line 2 .* ema_distance.0.9"),
        ({"event": "sampled", "step": 20, "file": 3}, "line 2 .* file must be str"),
        ({"event": ["step"], "step": 20}, "line 2 has no 'event'"),
    ],
)
def test_a_line_that_is_not_possible_is_named(tmp_path: Path, line: dict[str, Any], message: str) -> None:
    path = write_log(tmp_path, {"event": "step", "step": 10, "loss": 1.0}, line)
    with pytest.raises(JLTError, match=rf"log\.jsonl, {message}"):
        read_log(path)


@pytest.mark.parametrize(
    "text",
    [
        b'{"event": "step", "step": 20, "loss": NaN}',
        b'{"event": "step", "loss": 1e999}',
        b"\xff\xfe",
        b"[1]",
        b"[" * 9999,
    ],
)
def test_a_line_that_is_no_json_is_named(tmp_path: Path, text: bytes) -> None:
    path = write_log(tmp_path, {"event": "start", "step": 0})
    path.write_bytes(path.read_bytes() + text + b"\n")
    with pytest.raises(JLTError, match=r"log\.jsonl, line 2 (is not readable JSON|holds no JSON object)"):
        read_log(path)


def test_training_continues_after_a_torn_line_and_names_a_damaged_one(
    tmp_path: Path, store: LatentStore, capsys
) -> None:
    run = tmp_path / "run"
    train(config_for(store, steps=4), store, run)
    log = run / "log.jsonl"
    whole = log.read_bytes()
    log.write_bytes(whole[:-9])
    train(config_for(store, steps=6), store, run)
    assert "last line of" in capsys.readouterr().err
    assert read_log(log).reached == 6
    log.write_bytes(log.read_bytes().replace(b'"loss": ', b'"loss": 1', 1))
    with pytest.raises(JLTError, match=r"log.jsonl, line 2 was changed"):
        train(config_for(store, steps=8), store, run)


def test_a_log_whose_end_is_lost_is_noted(tmp_path: Path) -> None:
    write_run(tmp_path, "x", 1, 0, 20.0)
    log = tmp_path / "log.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    for kept, note in ((0, "ends before step 1,500"), (40, "ends before step 1,500"), (-1, "without the end")):
        log.write_bytes(b"".join(lines[:kept]))
        assert note in read_study(tmp_path).notes[0]
        assert note in write_report(tmp_path).read_text()


# Hostile values


def leaves(value: Any, where: tuple = ()) -> Iterator[tuple]:
    """Yield the places of all values in nested JSON."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in entries:
        yield (*where, key)
        yield from leaves(inner, (*where, key))


def replaced(value: Any, where: tuple, new: Any) -> Any:
    key, *rest = where
    copy = value.copy()
    copy[key] = replaced(value[key], tuple(rest), new) if rest else new
    return copy


@settings(TRIALS, max_examples=150)
@given(st.data(), HOSTILE)
def test_a_hostile_value_in_a_sealed_file_is_refused_by_name(trained: Path, data: st.DataObject, value: Any) -> None:
    """Or it does no harm: what is read is complete."""
    run = trained / "run"
    checkpoint = step_folder(run, 4)
    reads: dict[Path, Callable[[], Any]] = {
        checkpoint / "manifest.json": lambda: list(open_sampler(open_checkpoint(checkpoint), SAMPLE).batches([])),
        trained / "latents" / "manifest.json": lambda: LatentStore.open(trained / "latents"),
        trained / "reference.json": lambda: Reference.load(trained / "reference.npz"),
        run / "config.json": lambda: read_study(run),
        next(run.glob("evaluations/*.json")): lambda: read_study(run),
    }
    path = data.draw(st.sampled_from(sorted(reads)))
    content = read_content(path) | {
        key: json.loads(path.read_text())[key] for key in ("work",) if path.stem == "config"
    }
    where = data.draw(st.sampled_from(sorted(leaves(content), key=str)))
    with Changed(path):
        path.write_text(sealed_text(replaced(content, where, value)))
        with contextlib.suppress(JLTError):
            reads[path]()


def test_a_pipe_in_place_of_a_file_does_not_hang(tmp_path: Path) -> None:
    write_run(tmp_path, "x", 1, 0, 20.0)
    for name in ("evaluations/step_0000300.json", "config.json"):
        (tmp_path / name).unlink()
        os.mkfifo(tmp_path / name)
        with pytest.raises(JLTError, match=rf"{name} is not a file|neither an ablation"):
            read_study(tmp_path)
