"""Every block of Python in the guide, and the lines in the README, run as they are written."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from noise_source import NoiseSource

import jlt
from jlt.autoencoders.load import load_autoencoder
from jlt.config import NetworkConfig
from jlt.experiments.recipes import resolve_recipe, vary
from jlt.latents.encode_config import EncodeConfig
from jlt.latents.encoding import encode_source
from jlt.latents.store import LatentStore
from jlt.sampling.labels import readable_names
from jlt.training.loop import train

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def run_blocks(document: str) -> dict:
    names: dict = {}
    blocks = BLOCK.findall((ROOT / document).read_text())
    assert blocks
    for number, block in enumerate(blocks, 1):
        exec(compile(block, f"{document}, block {number}", "exec"), names)
    return names


def short(config, **changes):
    return dataclasses.replace(config, steps=2, batch_size=16, checkpoint_every=2, power_ema=(), **changes)


@pytest.fixture
def quickstart(tmp_path, digit_latents, monkeypatch):
    """The folder of the quickstart, with a short training."""
    (tmp_path / "quickstart").mkdir()
    (tmp_path / "quickstart/latents").symlink_to(digit_latents)
    store = LatentStore.open(digit_latents)
    config = vary(resolve_recipe("digits", store.shape), "x", "v", patch_size=2, seed=0)
    train(short(config), store, tmp_path / "quickstart/runs/x-v-p2-s0")
    monkeypatch.chdir(tmp_path)


def test_the_guide_runs(quickstart, capsys):
    names = run_blocks("docs/python.md")
    printed = capsys.readouterr().out
    # What its comments and its text claim.
    assert names["images"].latents.shape == (20, 16, 4, 4)
    assert names["images"].latents.dtype == torch.float32
    assert names["squared_error"].shape == (3,)
    assert "There is no setting named 'cfg_scal': did you mean cfg_scale?" in printed
    assert names["distance"].count == 200
    assert {"grid.png", "three.png", "clean.png"} <= {path.name for path in Path.cwd().iterdir()}


class Photographs(NoiseSource):
    class_names = tuple(readable_names([], 1000))


def test_the_lines_in_the_readme_run(tmp_path, monkeypatch):
    settings = EncodeConfig("noise", "pixels", resolution=8, batch_size=16, shard_size=20, flips=False, workers=0)
    encode_source(Photographs(20), load_autoencoder("pixels"), settings, tmp_path / "latents")
    store = LatentStore.open(tmp_path / "latents")
    network = NetworkConfig(3, 8, 8, 1000, patch_size=4, hidden_size=16, depth=1, num_heads=2)
    train(short(resolve_recipe("digits"), network=network), store, tmp_path / "runs/jlt-b1")
    monkeypatch.chdir(tmp_path)
    names = run_blocks("README.md")
    assert names["images"].labels.tolist() == [0, 217]
    assert names["images"].trajectory[0.4].t == 0.4
    assert Path("tench.png").exists()
    # The example in the docstring of the package is the same.
    lines = [line.strip() for line in (jlt.__doc__ or "").splitlines() if line.startswith("    ")]
    readme = BLOCK.findall((ROOT / "README.md").read_text())[0].splitlines()
    assert lines == [line for line in readme if line][: len(lines)]
