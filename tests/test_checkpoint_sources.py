"""Exports through every door: the command, Python, and the Hub (a local fake of its download)."""

import json
import shutil

import numpy as np
import pytest
import torch
from export_helpers import write_run

import jlt
from jlt.cli.main import main
from jlt.errors import JLTError, UsageError
from jlt.interop.export import export_file, export_folder
from jlt.interop.pipeline_settings import ExportConfig
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
        assert (repository, allow_patterns) == ("user/name", ["*.json", "*.safetensors"])
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    return str(folder), str(file), "hub:user/name"


def test_python_opens_every_export_and_keeps_the_run_in_the_cache(checkpoint, exports, tmp_path):
    expected = jlt.load(checkpoint.folder).sample(**DRAWN)
    for source in exports:
        images = jlt.load(source).sample(**DRAWN)
        assert torch.equal(images.pixels, expected.pixels)
    runs = sorted((tmp_path / "cache" / "exports").iterdir())
    # The folder and its copy on the Hub are the same run.
    assert len(runs) == 2
    before = {path: path.stat().st_mtime_ns for path in runs}
    jlt.load(exports[0])
    assert {path: path.stat().st_mtime_ns for path in runs} == before


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
