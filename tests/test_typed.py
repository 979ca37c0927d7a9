"""The types of the package reach a user's program: right ones pass the type checker, wrong ones do not."""

import subprocess
import sys
from pathlib import Path

import pytest

# A second or two, and twenty if there is no cache yet.
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
PROGRAM = """\
import jlt
model = jlt.load("runs/jlt-b1")
images = model.sample(labels=["tench", 217], seed=0, cfg_scale=2.9, cfg_interval=(0.1, 1.0))
images[0].save("tench.png")
clean = model.denoise(images.trajectory[0.4].z, 0.4, images.labels)
reveal_type(images[0])
reveal_type(clean)
reveal_type(jlt.analyze("latents").tokens[1].forecast.call)
for latents, labels in jlt.open_latents("latents").batches(64, seed=0):
    reveal_type(latents)
distance = jlt.FrechetDistance("digits")
distance.update(images)
reveal_type(distance.compute("digits"))
"""
WRONG = {
    'jlt.laod("run")': 'Module has no attribute "laod"',
    "model.sample(cfg_scal=2.9)": 'Unexpected keyword argument "cfg_scal"',
    'model.sample(steps="50")': 'incompatible type "str"',
    'model.sample(solver="huen")': "incompatible type \"Literal['huen']\"",
}


def test_a_program_of_a_user_is_type_checked(tmp_path):
    assert (ROOT / "src/jlt/py.typed").exists()
    right = PROGRAM.splitlines()
    (tmp_path / "program.py").write_text("\n".join([*right, *WRONG, ""]))
    # A cache of its own, since other options invalidate that of `make lint`.
    arguments = [
        "--strict",
        "--no-error-summary",
        "--cache-dir",
        ROOT / ".mypy_cache" / "strict",
        tmp_path / "program.py",
    ]
    command = [sys.executable, "-m", "mypy", "--config-file", ROOT / "pyproject.toml", *arguments]
    found = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, check=False, timeout=280)
    messages = {}
    for line in found.stdout.splitlines():
        place, kind, message = line.split(": ", 2)
        assert Path(place.split(":")[0]).name == "program.py", line
        messages.setdefault(int(place.split(":")[1]), []).append((kind, message))
    revealed = [messages.pop(number)[0][1] for number in sorted(messages) if number <= len(right)]
    kinds = ["Image.Image", "torch._tensor.Tensor", "str", "torch._tensor.Tensor", "float"]
    assert len(revealed) == len(kinds), found.stdout
    for text, kind in zip(revealed, kinds, strict=True):
        assert "Revealed type is" in text
        assert kind in text
    for number, expected in enumerate(WRONG.values(), len(right) + 1):
        assert expected in messages.pop(number)[0][1]
    assert not messages
