"""The built wheel, installed somewhere else, holds all that the quickstart needs."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
FEW_IMAGES = """
import dataclasses, sys
from jlt.cli.main import main
from jlt.experiments import quickstart
quickstart.DIGITS_SAMPLING = dataclasses.replace(quickstart.DIGITS_SAMPLING, num=30, steps=2)
sys.exit(main())
"""
"""The command line, with a quickstart that evaluates 30 images of each system instead of 1000."""
SYSTEMS = {(prediction, patch_size) for prediction in ("x", "v", "eps") for patch_size in (1, 2)}


def run(*arguments, folder: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PIP_NO_INDEX": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from a copy so that nothing is left behind in the repository."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    leave = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("src", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=leave)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    arguments = [
        "wheel",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        folder,
        ".",
    ]
    run("-m", "pip", *arguments, folder=source)
    (built,) = folder.glob("jlt-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A folder that the wheel alone was installed into."""
    folder = tmp_path_factory.mktemp("installed")
    arguments = ["install", "--quiet", "--disable-pip-version-check", "--no-deps", "--target", folder, wheel]
    run("-m", "pip", *arguments, folder=folder)
    return folder


def test_the_wheel_holds_the_package_with_its_assets_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
    sources = ROOT / "src"
    present = {path.relative_to(sources).as_posix() for path in (sources / "jlt").rglob("*") if path.is_file()}
    expected = {name for name in present if "__pycache__" not in name}
    assert {name for name in names if name.startswith("jlt/")} == expected
    for suffix in (".safetensors", ".json", ".html", ".css"):
        assert any(name.endswith(suffix) for name in names)
    (metadata,) = {name.partition("/")[0] for name in names} - {"jlt"}
    assert re.fullmatch(r"jlt-.*\.dist-info", metadata)
    assert any(name.endswith("LICENSE") for name in names)
    assert wheel.stat().st_size < 2_000_000


def test_the_installed_wheel_runs_the_quickstart(installed, tmp_path):
    where = {"PYTHONPATH": str(installed), "HF_HUB_OFFLINE": "1"}
    located = Path(run("-c", "import jlt; print(jlt.__file__)", folder=tmp_path, **where).strip())
    assert located.is_relative_to(installed)
    # One worker: a second one would only import everything once more.
    options = ["--steps", 1, "--workers", 1, "--json"]
    summary = json.loads(run("-c", FEW_IMAGES, "quickstart", *options, folder=tmp_path, **where))
    out = tmp_path / "quickstart"
    assert {(system["prediction"], system["patch_size"]) for system in summary["systems"]} == SYSTEMS
    assert json.loads((out / "ablation.json").read_text())["systems"] == summary["systems"]
    for system in summary["systems"]:
        results = [json.loads(path.read_text()) for path in (out / system["run"] / "evaluations").iterdir()]
        assert sorted(result["step"] for result in results) == [1]
    page = tmp_path / summary["report"]
    assert page == out / "report.html"
    text = page.read_text(encoding="utf-8")
    assert all(name in text for name in ("JLT-XS/1", "JLT-XS/2", "DiT-XS/1", "DiT-XS/2"))
