"""SIGKILL at a system call that changes a file, of every command: the same command then ends with the same files.

`tests/kill.c` counts these calls and ends the process at one of them. JLT_KILLS is the number of calls tried per
command, or `all`; the calls are chosen at random.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

import forked
import pytest
from PIL import Image
from training_helpers import TINY, run_on_few_digits

from jlt.results.run import read_log
from jlt.storage.folders import LOCK, PARTIAL

pytestmark = pytest.mark.skipif(not (forked.FORKS and shutil.which("cc")), reason="needs Linux and a C compiler")
KILLS = os.environ.get("JLT_KILLS", "1")
ARM = "import ctypes; ctypes.CDLL(None).jlt_arm({counter!r}.encode(), ctypes.c_long({at}), {below!r}.encode())"
FEW = ["--num", "10", "--batch-size", "5", "--steps", "1"]
SAMPLE = ["sample", "--checkpoint", "run", "--out", "out", *FEW]
MEASURED = ["--checkpoint", "run", "--reference", "reference.npz", "--num", "10", "--batch-size", "5"]
ONCE = ["--epochs", "0", "--batch-size", "8", *TINY]
WATCHED = ["--sample-every", "2", "--evaluate-every", "3", "--evaluation.sample.num", "10"]
WATCHED += ["--evaluation.sample.steps", "1", "--evaluation.reference", "reference.npz"]
SAVING = ["--checkpoint-every", "1", "--keep-last", "2", "--power-ema", "0.1", "--snapshot-every", "1"]
COMMANDS = {
    "train": ["train", "digits", "--latents", "latents", "--out", "out", "--steps", "3", *ONCE, *SAVING, *WATCHED],
    "sample": SAMPLE,
    "sample npz": [*SAMPLE, "--format", "npz"],
    "sample grid": [*SAMPLE, "--format", "grid"],
    "sample strip": [*SAMPLE, "--steps-strip"],
    "evaluate": ["evaluate", *MEASURED, "--steps", "1"],
    "analyze": ["analyze", "--latents", "latents", "--out", "out", "--checkpoint", "run", "--num", "8"],
    "sweep": ["sweep", *MEASURED, "--steps", "1", "--cfg-scale", "1", "2", "--coarse-num", "10", "--refine", "0"],
    "price": ["price", *MEASURED, "--solver", "euler", "--steps", "2"],
    "ablate": ["ablate", "digits", "--latents", "latents", "--out", "out", "--prediction", "x", "--workers", "1"]
    + [
        "--reference",
        "reference.npz",
        "--evaluations",
        "1",
        "--sample.num",
        "10",
        "--sample.steps",
        "1",
        "--anisotropy",
        "0",
        "--steps",
        "2",
        *ONCE,
    ],
    "reference": ["reference", "--images", "images", "--resolution", "8", "--out", "out.npz"],
    "encode": ["encode", "--images", "images", "--autoencoder", "pixels", "--resolution", "8", "--out", "out"]
    + ["--shard-size", "8", "--batch-size", "4", "--workers", "0", "--preview"],
    "import": ["import", "exported", "--out", "out"],
    "export": ["export", "run", "--out", "out"],
    "export file": ["export", "run", "--out", "out.safetensors", "--format", "safetensors"],
    "report": ["report", "run"],
    "plan": ["plan", "digits"],
}
VOLATILE = {"seconds", "created", "sha256", "state.json", "img_per_second", "manifest_sha256", "waiting"}
"""Keys of JSON files whose values depend on the time; hashes of what depends on it among them."""


@pytest.fixture(scope="module")
def killer(tmp_path_factory: pytest.TempPathFactory) -> str:
    library = tmp_path_factory.mktemp("killer") / "kill.so"
    source = Path(__file__).with_name("kill.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    return str(library)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = run_on_few_digits(tmp_path_factory.mktemp("inputs"))
    for number in range(16):
        place = folder / "images" / "ab"[number % 2] / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((8, 8), 10 * number).convert("RGB").save(place)
    assert start(folder, ["export", "run", "--out", "exported"]).wait() == 0
    return folder


def start(folder: Path, arguments: list[str], killer: str = "", at: int = 0) -> Any:
    """Start a command in a folder; with a killer, its calls below the folder are counted in `counter` next to it."""
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    plant, counter = "", f"{folder}.counter"
    if killer:
        Path(counter).write_bytes(bytes(8))
        environment |= {"LD_PRELOAD": killer, "JLT_KILL": f"{counter}:{at}:{folder}/"}
        plant = ARM.format(counter=counter, at=at, below=f"{folder}/")
    with contextlib.chdir(folder):
        return forked.start(arguments, environment, plant, preload=killer)


def files_of(folder: Path) -> dict[str, Any]:
    """Return all files of a folder by name: their bytes, without the times in them."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir() and not path.is_symlink():
            found[name] = "folder"
        elif path.name == "log.jsonl":
            found[name] = [(step.step, step.loss, step.grad_norm) for step in read_log(path).steps]
        elif path.suffix == ".json":
            found[name] = without_times(json.loads(path.read_text()))
        else:
            found[name] = path.suffix == ".html" or path.read_bytes()
    return found


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_times(entry) for key, entry in value.items() if key not in VOLATILE}
    return [without_times(entry) for entry in value] if isinstance(value, list) else value


@pytest.mark.parametrize("name", COMMANDS)
def test_a_killed_command_ends_with_the_same_files(name: str, killer: str, inputs: Path, tmp_path: Path) -> None:
    folder, arguments = tmp_path / "work", COMMANDS[name]

    def run(at: int = 0) -> tuple[int, str]:
        process = start(folder, arguments, killer, at)
        output = process.communicate(timeout=120)[1]
        return process.returncode, output

    def prepare() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(inputs, folder)

    prepare()
    code, output = run()
    assert code == 0, output
    count = int.from_bytes(Path(f"{folder}.counter").read_bytes(), "little")
    whole = files_of(folder)
    assert not [file for file in whole if PARTIAL.fullmatch(Path(file).name) or Path(file).name == LOCK]
    points = list(range(1, count + 1))
    if KILLS != "all":
        points = random.sample(points, min(int(KILLS), count))
    for at in points:
        prepare()
        assert run(at)[0] != 0, f"not killed at call {at} of {count}"
        code, output = run()
        assert code == 0, f"killed at call {at} of {count}: {output}"
        ended = files_of(folder)
        assert ended == whole, f"killed at call {at} of {count}: {differing(whole, ended)}"


def differing(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    return sorted(name for name in {*a, *b} if a.get(name) != b.get(name))
