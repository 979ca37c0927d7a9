"""SIGKILL at a system call that changes a file, of every command: the same command then ends with the same files.

`tests/kill.c` counts these calls and ends the process at one of them, chosen at random: one of each command that takes
less than a second, and one of another command. JLT_KILLS is the number of calls to be tried of every command, or `all`.
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
from every_command import COMMANDS, make_inputs

from jlt.results.run import read_log
from jlt.storage.folders import LOCK, PARTIAL

pytestmark = pytest.mark.skipif(not (forked.FORKS and shutil.which("cc")), reason="needs Linux and a C compiler")
KILLS = os.environ.get("JLT_KILLS", "")
SHORT = (
    "sample",
    "sample npz",
    "sample grid",
    "sample strip",
    "evaluate",
    "reference",
    "encode",
    "import",
    "export file",
)
LONGER = tuple(name for name in COMMANDS if name not in SHORT)
ARM = "import ctypes; ctypes.CDLL(None).jlt_arm({counter!r}.encode(), ctypes.c_long({at}), {below!r}.encode())"
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
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def start(folder: Path, arguments: list[str], killer: str = "", at: int = 0) -> Any:
    """Start a command in a folder; with a killer, its calls below the folder are counted in `counter` next to it."""
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    plant, counter = "", f"{folder}.counter"
    if killer:
        Path(counter).write_bytes(bytes(8))
        environment |= {"LD_PRELOAD": killer, "JLT_KILL": f"{counter}:{at}:{folder}"}
        plant = ARM.format(counter=counter, at=at, below=str(folder))
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


@pytest.mark.parametrize("name", COMMANDS if KILLS else [*SHORT, "any other"])
def test_a_killed_command_ends_with_the_same_files(name: str, killer: str, inputs: Path, tmp_path: Path) -> None:
    name = random.choice(LONGER) if name == "any other" else name
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
        points = random.sample(points, min(int(KILLS or 1), count))
    for at in points:
        prepare()
        assert run(at)[0] != 0, f"{name}: not killed at call {at} of {count}"
        code, output = run()
        assert code == 0, f"{name}, killed at call {at} of {count}: {output}"
        ended = files_of(folder)
        assert ended == whole, f"{name}, killed at call {at} of {count}: {differing(whole, ended)}"


def differing(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    return sorted(name for name in {*a, *b} if a.get(name) != b.get(name))
