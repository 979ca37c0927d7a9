"""Exports through every door: the command, Python, and the Hub (a local fake of its download)."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from export_helpers import write_run

import jlt
from jlt.cli.main import main
from jlt.errors import JLTError, UsageError
from jlt.interop import sources
from jlt.interop.export import export_file, export_folder
from jlt.interop.pipeline_settings import WEIGHTS, ExportConfig
from jlt.interop.sources import local_path

DRAWN = {"labels": [2, "goldfish"], "steps": 3, "cfg_scale": 2.0, "seed": 4}


@pytest.fixture
def checkpoint(tmp_path):
    return write_run(tmp_path / "run")


@pytest.fixture
def exports(checkpoint, tmp_path, monkeypatch):
    """The same network as a folder, as a file, and as a folder on the Hub."""
    monkeypatch.setenv("JLT_CACHE", str(tmp_path / "cache"))
    folder = export_folder(checkpoint, tmp_path / "export", ExportConfig(samples=0))
    file = export_file(checkpoint, tmp_path / "export.safetensors", ExportConfig())

    def download(repository, allow_patterns):
        assert repository == "user/name"
        kept = [path for pattern in allow_patterns for path in folder.rglob(pattern)]
        for path in kept:
            target = tmp_path / "hub" / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, target)
        return str(tmp_path / "hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    return str(folder), str(file), "hub:user/name"


def test_python_opens_every_export_and_keeps_the_run_in_the_cache(checkpoint, exports, tmp_path):
    expected = jlt.load(checkpoint.folder).sample(**DRAWN)
    for source in exports:
        images = jlt.load(source).sample(**DRAWN)
        assert torch.equal(images.pixels, expected.pixels)
    runs = sorted((tmp_path / "cache" / "exports").glob("*/"))
    # The folder and its copy on the Hub are the same run.
    assert len(runs) == 2
    assert not (tmp_path / "hub" / "pipeline.py").exists()


def test_an_unchanged_export_is_read_once(exports, monkeypatch):
    monkeypatch.setattr(sources, "COARSEST_TIMES", 0)
    read, original = [], sources.read_export
    monkeypatch.setattr(sources, "read_export", lambda *given: read.append(given) or original(*given))
    for source in exports[:2]:
        first, again = (jlt.load(source).checkpoint for _ in range(2))
        assert first.sha256 == again.sha256
    assert len(read) == 2
    # A copy of the times and the size does not hide another content.
    weights = Path(exports[0], "transformer", WEIGHTS)
    before, content = weights.stat(), bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(JLTError, match="was edited or damaged"):
        jlt.load(exports[0])
    # A run that is gone from the cache is made again.
    shutil.rmtree(jlt.load(exports[1]).checkpoint.run)
    assert jlt.load(exports[1]).checkpoint.step == 7


def test_an_export_that_has_just_changed_is_read_again(exports, tmp_path):
    jlt.load(exports[0])
    assert not list((tmp_path / "cache" / "exports").glob("*.json"))


def test_the_commands_open_every_export(checkpoint, exports, tmp_path, capsys):
    for number, source in enumerate((str(checkpoint.folder), *exports)):
        out = str(tmp_path / f"samples{number}")
        drawn = ["--num", "2", "--steps", "2", "--format", "npz", "--json"]
        assert main(["sample", "--checkpoint", source, "--out", out, *drawn]) == 0
    pixels = [np.load(tmp_path / f"samples{number}" / "samples.npz")["arr_0"] for number in range(4)]
    assert all(np.array_equal(pixels[0], others) for others in pixels[1:])
    capsys.readouterr()
    assert main(["export", exports[0], "--out", str(tmp_path / "again"), "--samples", "0"]) == 0
    guided = ["--num", "1", "--autoguide", exports[0], "--cfg-scale", "2"]
    assert main(["sample", "--checkpoint", exports[0], "--out", str(tmp_path / "g"), *guided]) == 1
    assert f"`jlt import {exports[0]} --out RUN` makes a run" in capsys.readouterr().err


def test_the_command_imports_every_export(checkpoint, exports, tmp_path, capsys):
    expected = jlt.load(checkpoint.folder).sample(**DRAWN)
    for number, source in enumerate(exports):
        out = tmp_path / f"back{number}"
        assert main(["import", source, "--out", str(out), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["run"] == str(out)
        assert np.array_equal(jlt.load(out).sample(**DRAWN).pixels, expected.pixels)
    assert main(["import", exports[0], "--out", str(tmp_path / "other"), "--prediction", "v"]) == 2
    assert "leave out all options but --out" in capsys.readouterr().err


def test_a_changed_export_is_another_run(exports, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(exports[0], copy)
    (copy / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b"damaged")
    with pytest.raises(JLTError, match="diffusion_pytorch_model"):
        jlt.load(copy)


@pytest.mark.parametrize("source", ["hub:", "hub:user", "hub:/name"])
def test_what_is_no_id_of_the_hub_is_refused(source):
    with pytest.raises(UsageError, match="hub:user/name or hub:user/name/file is expected"):
        local_path(source)


def test_another_folder_is_no_export(tmp_path, capsys):
    assert main(["import", str(tmp_path), "--out", str(tmp_path / "run")]) == 1
    assert "is no folder of `jlt export`" in capsys.readouterr().err
    with pytest.raises(JLTError, match="neither a checkpoint nor a run"):
        jlt.load(tmp_path)
