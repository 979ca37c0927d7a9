"""Folders that other people made: none of their modules runs, and none of their paths and links leads out of them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_helpers import make_store
from every_command import COMMANDS, make_inputs
from fake_results import read_content, write_ablation, write_sealed, write_watched_run
from PIL import Image
from safetensors.torch import save_file
from training_helpers import config_for

from jlt.cli.main import main
from jlt.config import SampleConfig
from jlt.errors import JLTError
from jlt.evaluation.extractors import load_extractor
from jlt.evaluation.squeezenet import SqueezeNet
from jlt.experiments.checkpoint_evaluation import drawn_folder, evaluate_run
from jlt.images.parquet import Parquet
from jlt.report.page import write_report
from jlt.report.study import read_study
from jlt.results.run import log_line
from jlt.storage.files import atomic_path, sealed_text, work_of
from jlt.storage.folders import Claim, lock_folder, path_inside, remove_leftovers
from jlt.storage.rows import RowTable
from jlt.training.checkpoint import open_checkpoint, prune_checkpoints, require_own_folders
from jlt.training.journal import Journal
from jlt.training.loop import train

WORKERS = "jlt.cli.main jlt.images.decoding jlt.runtime.workers jlt.experiments.ablation jlt.images.parquet"
LIST_MODULES = f"""
import importlib, sys
for name in {WORKERS.split()}:
    importlib.import_module(name)
print(*sorted({{name.partition(".")[0] for name in sys.modules}} | sys.stdlib_module_names))
"""
LETTERS = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
RUN_A_JOB = """
from jlt.runtime.workers import run_jobs

if __name__ == "__main__":
    run_jobs(print, ["worked"], 1, lambda: None)
"""


@pytest.fixture(scope="session")
def imported_names(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The names of all modules of Python, and of all others that a program or a worker imports."""
    clean = tmp_path_factory.mktemp("clean")
    done = subprocess.run([sys.executable, "-P", "-c", LIST_MODULES], cwd=clean, capture_output=True, check=True)
    return done.stdout.decode().split()


@pytest.fixture
def planted(tmp_path: Path, imported_names: list[str]) -> Path:
    """Class folders, with modules next to them that leave a file behind wherever they are imported."""
    folder = tmp_path / "images"
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
        for number in range(10):
            Image.fromarray(LETTERS).save(folder / name / f"{number}.png")
    assert {"torch", "PIL", "selectors", "contextlib", "jlt", "concurrent"} <= set(imported_names)
    for name in imported_names:
        (folder / f"{name}.py").write_text(f"open({str(tmp_path / name)!r} + '.imported', 'w')\n")
    return folder


def require_none_imported(folder: Path, *arguments: str | Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    done = subprocess.run(arguments, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert not sorted(path.name for path in folder.parent.glob("*.imported"))
    assert done.returncode == 0, done.stderr


ENCODE = ["encode", "--images", ".", "--autoencoder", "pixels", "--resolution", "4", "--out", "../latents"]
ENCODE += ["--batch-size", "2", "--workers", "2"]
SMALL = ["--network.hidden-size", "8", "--network.num-heads", "1", "--network.depth", "1"]
SMALL += ["--steps", "2", "--batch-size", "4"]
FEW = ["--prediction", "x", "--evaluations", "1", "--sample.num", "20", "--sample.steps", "1", "--workers", "1"]


def test_no_command_and_no_worker_imports_a_module_of_the_current_folder(planted: Path) -> None:
    program = [sys.executable, Path(sys.executable).with_name("jlt")]
    require_none_imported(planted, *program, *ENCODE)
    require_none_imported(planted, *program, "train", "digits", "--latents", "../latents", "--out", "../run", *SMALL)
    weights = planted.parent / "weights.safetensors"
    save_file(SqueezeNet().state_dict(), weights)
    features = ["--features", "squeezenet", "--features-path", weights]
    options = ["digits", "--latents", "../latents", "--out", "../ablation", *SMALL, *FEW, *features]
    require_none_imported(planted, *program, "ablate", *options)
    assert (planted.parent / "ablation" / "ablation.json").exists()


def test_the_module_as_a_program_imports_only_what_python_imports_before_any(planted: Path) -> None:
    (planted.parent / "clean").mkdir()
    (planted.parent / "clean" / "probe.py").write_text("import sys; print(*sys.modules)")
    probe = [sys.executable, "-m", "probe"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    done = subprocess.run(
        probe, cwd=planted.parent / "clean", env=environment, capture_output=True, text=True, check=True
    )
    for name in {*done.stdout.split(), "jlt"}:
        (planted / f"{name}.py").unlink(missing_ok=True)
    require_none_imported(planted, sys.executable, "-m", "jlt", *ENCODE)
    assert (planted.parent / "latents" / "manifest.json").exists()


def test_the_module_as_a_program_imports_nothing_where_python_is_told(planted: Path) -> None:
    require_none_imported(planted, sys.executable, "-P", "-m", "jlt", "train", "digits", "--print-config")


def test_every_child_of_the_program_and_of_a_script_is_kept_from_the_current_folder(
    planted: Path, tmp_path: Path
) -> None:
    script = tmp_path / "script" / "job.py"
    script.parent.mkdir()
    script.write_text(RUN_A_JOB)
    require_none_imported(planted, sys.executable, script)
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import selectors, contextlib'], check=True)"
    begun = "from jlt.runtime.processes import prepare_process; prepare_process(); "
    require_none_imported(planted, sys.executable, "-P", "-c", begun + child)


# Paths that come out of files


def test_a_path_stays_in_its_folder(tmp_path: Path) -> None:
    folder, secret = tmp_path / "folder", tmp_path / "secret"
    (folder / "inner").mkdir(parents=True)
    secret.write_text("private")
    (folder / "link").symlink_to(secret)
    (folder / "circle").symlink_to("circle")
    (tmp_path / "named").symlink_to(folder)
    for name in (str(secret), "../secret", "inner/../../secret", "link", "a\0b"):
        with pytest.raises(JLTError, match="leads out of"):
            path_inside(folder, name)
    for name in ("inner", "inner/../absent", str(folder / "inner")):
        assert path_inside(folder, name) == folder / name
    assert path_inside(tmp_path / "named", "inner").is_dir()


@pytest.mark.parametrize("name", ["{}", "../secret.png"])
def test_a_log_that_names_a_file_elsewhere_gets_no_report(tmp_path: Path, name: str) -> None:
    Image.fromarray(LETTERS).save(tmp_path / "secret.png")
    write_watched_run(tmp_path / "run")
    with (tmp_path / "run" / "log.jsonl").open("a") as log:
        event = {"event": "sampled", "step": 1, "file": name.format(tmp_path / "secret.png")}
        log.write(log_line(event, work_of(tmp_path / "run")))
    with pytest.raises(JLTError, match=r"secret.png' leads out of"):
        write_report(tmp_path / "run")


def test_an_ablation_whose_grid_is_a_link_or_whose_run_is_elsewhere_gets_no_report(tmp_path: Path) -> None:
    Image.fromarray(LETTERS).save(tmp_path / "secret.png")
    folder = write_ablation(tmp_path / "ablation")
    run = read_study(folder).runs[0].folder
    (run / "samples" / "grid.png").unlink()
    (run / "samples" / "grid.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(JLTError, match=r"grid.png' leads out of"):
        read_study(folder)
    facts = read_content(folder / "ablation.json")
    facts["systems"][0]["run"] = "../elsewhere"
    write_sealed(folder / "ablation.json", facts)
    with pytest.raises(JLTError, match="elsewhere' leads out of"):
        read_study(folder)


@pytest.mark.parametrize("name", ["{}", "../secret.png", "link.png"])
def test_a_row_of_a_parquet_file_that_names_a_picture_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    folder, secret = tmp_path / "data", tmp_path / "secret.png"
    folder.mkdir()
    Image.fromarray(LETTERS).save(secret)
    (folder / "link.png").symlink_to(secret)
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = pa.array([{"bytes": None, "path": name.format(secret)}], kind)
    pq.write_table(pa.table({"image": images, "label": [0]}), folder / "a.parquet")
    with pytest.raises(JLTError, match="leads out of"):
        Parquet(folder, [folder / "a.parquet"])[0]


def test_a_checkpoint_that_names_a_file_elsewhere_is_refused(tmp_path: Path) -> None:
    manifest = {"schema": 2, "step": 1, "updates": 1, "files": {"../secret": "0" * 64}}
    (tmp_path / "manifest.json").write_text(sealed_text(manifest))
    with pytest.raises(JLTError, match="names '../secret'"):
        open_checkpoint(tmp_path)


# Links


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "secret"
    path.write_text("private")
    return path


def test_a_lock_that_is_a_link_truncates_nothing(tmp_path: Path, secret: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(secret)
    with pytest.raises(JLTError, match=r"\.lock is a link"), lock_folder(tmp_path / "run"):
        pass
    assert secret.read_text() == "private"


@pytest.mark.parametrize("name", [".images.rows", ".checks"])
def test_rows_that_are_a_link_change_nothing(tmp_path: Path, secret: Path, name: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(secret)
    with pytest.raises(JLTError, match="is a link"):
        RowTable(tmp_path / "run", {"images": (np.uint8, (4,))}, 10)
    assert secret.read_text() == "private"


def test_a_temporary_file_and_a_log_that_are_links_change_nothing(
    tmp_path: Path, secret: Path, store, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    monkeypatch.setattr("jlt.storage.files.secrets.token_hex", lambda _: "0a1b")
    (run / f".a.{os.getpid()}-0a1b.partial.json").symlink_to(secret)
    with atomic_path(run / "b.json") as temporary:
        temporary.write_text("{}")
    with pytest.raises(FileExistsError), atomic_path(run / "a.json"):
        pass
    (run / "log.jsonl").symlink_to(tmp_path / "log")
    (tmp_path / "log").write_text("")
    with Journal(run, config_for(store), 0, rank=0) as journal, pytest.raises(JLTError, match=r"log.jsonl is a link"):
        journal.write("start", step=0)
    assert (secret.read_text(), (tmp_path / "log").read_text()) == ("private", "")


@pytest.mark.parametrize("name", ["checkpoints", "snapshots", "samples", "evaluations", "checkpoints/step_0000002"])
def test_a_run_with_a_linked_folder_is_not_continued(tmp_path: Path, store, name: str) -> None:
    theirs, run = tmp_path / "theirs", tmp_path / "run"
    for step in (4, 8):
        (theirs / f"step_000000{step}").mkdir(parents=True)
    (run / name).parent.mkdir(parents=True, exist_ok=True)
    (run / name).symlink_to(theirs)
    with pytest.raises(JLTError, match=f"{name} is a link"):
        require_own_folders(run)
    if name == "checkpoints":
        with pytest.raises(JLTError, match="checkpoints is a link"):
            prune_checkpoints(run, 1, 0)
    assert len(list(theirs.iterdir())) == 2


def test_a_run_folder_that_is_itself_a_link_is_trained_in_and_continued(tmp_path: Path, store) -> None:
    (tmp_path / "bigdisk").mkdir()
    (tmp_path / "runs").symlink_to(tmp_path / "bigdisk")
    (tmp_path / "bigdisk" / "real").mkdir()
    (tmp_path / "bigdisk" / "run").symlink_to("real")
    for steps in (2, 4):
        train(config_for(store, steps=steps, checkpoint_every=1, keep_last=1), store, tmp_path / "runs" / "run")
    kept = [path.name for path in (tmp_path / "bigdisk" / "real" / "checkpoints").iterdir()]
    assert kept == ["step_0000004"]


def test_features_of_an_evaluation_are_not_removed_through_a_link(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    (theirs / "step_0000004-0123").mkdir(parents=True)
    (tmp_path / "run" / "evaluations").mkdir(parents=True)
    (tmp_path / "run" / "evaluations" / ".drawn").symlink_to(theirs)
    with pytest.raises(JLTError, match=r"\.drawn is a link"):
        drawn_folder(tmp_path / "run")
    with pytest.raises(JLTError, match=r"\.drawn is a link"):
        evaluate_run(tmp_path / "run", [4], "digits", load_extractor("digits"), SampleConfig(num=4), "cpu")
    assert [path.name for path in theirs.iterdir()] == ["step_0000004-0123"]


@pytest.mark.parametrize("name", ["coordinates", "runs", "runs/x-v-p1-a0-s0", "points", ".drawn"])
def test_an_experiment_with_a_linked_folder_is_refused(
    tmp_path: Path, inputs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "file").write_text("private")
    monkeypatch.chdir(inputs)
    out = tmp_path / "out"
    arguments = COMMANDS["sweep" if name in ("points", ".drawn") else "ablate"]
    if "--out" in arguments:
        arguments = arguments[: arguments.index("--out")] + arguments[arguments.index("--out") + 2 :]
    # A command that another process ended right after its claim.
    monkeypatch.setattr("jlt.experiments.ablation.forecasts", _ended)
    monkeypatch.setattr("jlt.experiments.sweep.search", _ended)
    monkeypatch.setattr("jlt.experiments.ablation.store_in_coordinates", lambda *_: None)
    assert main([*arguments, "--out", str(out)]) == 1
    (out / name).parent.mkdir(exist_ok=True)
    shutil.rmtree(out / name, ignore_errors=True)
    (out / name).symlink_to(tmp_path / "theirs")
    capsys.readouterr()
    assert main([*arguments, "--out", str(out)]) == 1
    assert f"{name} is a link" in capsys.readouterr().err
    assert (tmp_path / "theirs" / "file").read_text() == "private"


def _ended(*_: object) -> None:
    raise JLTError("ended")


# What killed processes leave


def test_what_killed_processes_left_is_removed_but_nothing_of_living_ones(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    living = subprocess.Popen(["sleep", "60"])
    dead = subprocess.Popen(["true"])
    dead.wait()
    (tmp_path / "kept").mkdir()
    for process in (living.pid, dead.pid):
        (folder / f".step_1.{process}.partial" / "deep").mkdir(parents=True)
        (folder / "evaluations").mkdir(exist_ok=True)
        (folder / "evaluations" / f".a.{process}.partial.json").write_text("{")
    (folder / f".link.{dead.pid}.partial").symlink_to(tmp_path / "kept")
    (folder / ".hidden.partial.json").write_text("of another program")
    remove_leftovers(folder, "a.json")
    assert (folder / f".step_1.{dead.pid}.partial").is_dir()
    remove_leftovers(folder)
    living.kill()
    living.wait()
    left = {path.name for path in folder.rglob("*")} - {"deep", "evaluations"}
    assert left == {f".step_1.{living.pid}.partial", f".a.{living.pid}.partial.json", ".hidden.partial.json"}
    assert (tmp_path / "kept").is_dir()


def test_partial_files_of_killed_processes_do_not_block_a_folder(tmp_path: Path) -> None:
    claim = Claim(tmp_path, "plan.json", {"seed": 1})
    (tmp_path / f".plan.{2**31 - 1}.partial.json").write_text("{")
    (tmp_path / ".lock").touch()
    with claim.hold():
        claim.begin()
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    (tmp_path / "other").touch()
    with pytest.raises(JLTError, match="holds other files, such as other"):
        Claim(tmp_path, "config.json", {}, allowed={"plan.json"}).is_begun()


def test_a_lock_file_of_the_user_is_kept_and_a_folder_made_for_a_lock_is_not(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / ".lock").write_text("of another program")
    with lock_folder(tmp_path / "theirs"), lock_folder(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b" / ".lock").exists()
    assert (tmp_path / "theirs" / ".lock").read_text() == "of another program"
    assert not (tmp_path / "a").exists()
    with pytest.raises(JLTError, match="No file can be made in /proc/self/task"), lock_folder(Path("/proc/self/task")):
        pass


def test_many_processes_that_lock_one_folder_are_never_in_it_at_once(tmp_path: Path) -> None:
    """Also while the lock's file and its folder come and go."""
    script = """
import sys
from pathlib import Path
from jlt.errors import JLTError
from jlt.storage.folders import lock_folder
folder, inside = Path(sys.argv[1]) / "folder", Path(sys.argv[1]) / "inside"
held = 0
while held < 200:
    try:
        with lock_folder(folder):
            inside.mkdir()
            inside.rmdir()
            held += 1
    except JLTError:
        pass
"""
    processes = [subprocess.Popen([sys.executable, "-c", script, tmp_path]) for _ in range(3)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0, 0]
    assert not list(tmp_path.glob("*/*"))


def test_an_encoding_whose_state_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / ".encoding").symlink_to(tmp_path / "theirs")
    with pytest.raises(JLTError, match=r"\.encoding is a link"):
        make_store(tmp_path / "store")
    assert not list((tmp_path / "theirs").iterdir())
