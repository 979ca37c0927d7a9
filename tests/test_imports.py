"""What an import costs, and what the package must never import; each test runs a fresh interpreter."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

HEAVY = ("torch", "diffusers", "sklearn", "matplotlib", "torchvision")
LOADED = f"json.dumps([name for name in {HEAVY} if name in sys.modules])"

IMPORT_ALL = """
import importlib, json, pkgutil, sys
import jlt
names = [module.name for module in pkgutil.walk_packages(jlt.__path__, "jlt.")]
for name in names:
    importlib.import_module(name)
print(json.dumps({"names": names, "torchvision": sys.modules.get("torchvision") is not None}))
"""

BLOCKED = """
import sys
sys.modules["torchvision"] = None  # every import of it fails from here on
"""

USE_AUTOENCODER = """
import torch
from jlt.autoencoders.load import load_autoencoder
autoencoder = load_autoencoder("tiny")
with torch.no_grad():
    print(tuple(autoencoder.decode(autoencoder.encode(torch.zeros(1, 3, 32, 32))).shape))
"""


def python(*arguments: str, **environment: str) -> str:
    """Return what a fresh interpreter prints; a failure shows its stderr."""
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_loads_nothing_heavy():
    assert json.loads(python("-c", f"import json, sys, jlt; print({LOADED})")) == []


def test_importing_the_package_takes_no_time_and_its_names_are_found():
    timed = "import time; begun = time.perf_counter(); import jlt; print(time.perf_counter() - begun)"
    assert min(float(python("-c", timed)) for _ in range(3)) < 0.3
    # Completion looks at the names; only their use imports.
    listed = f"import json, sys, jlt; names = [dir(jlt), jlt.__all__]; print({LOADED}); print('load' in dir(jlt))"
    assert python("-c", listed).splitlines() == ["[]", "True"]
    assert python("-c", "import jlt; print(jlt.load.__name__); import jlt.path; print(jlt.path.interpolate)")
    assert python("-c", "from jlt import *; print(load, FrechetDistance, __version__)")


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["ablate", "--help"]])
def test_help_loads_nothing_heavy(arguments):
    script = (
        f"import json, sys; from jlt.cli.main import main; code = main({arguments}); print({LOADED}); sys.exit(code)"
    )
    printed = python("-c", script).splitlines()
    assert "usage: jlt" in printed[0]
    assert json.loads(printed[-1]) == []


def test_help_answers_in_under_a_second():
    def seconds() -> float:
        begun = time.perf_counter()
        python("-m", "jlt.cli.main", "--help")
        return time.perf_counter() - begun

    # The best of three, since the machine may be busy with something else.
    assert min(seconds() for _ in range(3)) < 1


def test_no_module_imports_torchvision_where_it_is_installed(tmp_path: Path):
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("")
    assert python("-c", "import torchvision; print(torchvision.__file__)", PYTHONPATH=str(tmp_path)).startswith(
        str(tmp_path)
    )
    found = json.loads(python("-c", IMPORT_ALL, PYTHONPATH=str(tmp_path)))
    assert {"jlt.cli.main", "jlt.training.loop", "jlt.autoencoders.pretrained", "jlt.report.page"} <= set(
        found["names"]
    )
    assert not found["torchvision"]


def test_everything_imports_and_the_autoencoder_works_where_torchvision_cannot_be_imported():
    printed = python("-c", BLOCKED + IMPORT_ALL + USE_AUTOENCODER).splitlines()
    assert json.loads(printed[0])["torchvision"] is False
    assert printed[1] == "(1, 3, 32, 32)"
