"""Exports on disk: autoencoders, the model card, other folders, interruptions, the upload, and the way back in."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from data_helpers import Trap, save_kl
from export_helpers import NAMES, write_run
from foreign_networks import authors_content, saved
from safetensors.torch import load_file, save_file
from test_export_pipeline import load  # noqa: F401

from jlt.autoencoders.load import load_autoencoder
from jlt.autoencoders.taef2 import TAEF2
from jlt.cli.main import main
from jlt.config import SampleConfig
from jlt.errors import JLTError, UsageError
from jlt.interop import export as export_module
from jlt.interop import importing
from jlt.interop.export import export_file, export_folder, push_folder
from jlt.interop.import_config import ImportConfig
from jlt.interop.importing import write_run as write_imported
from jlt.interop.pipeline_settings import INDEX, RECORD, WEIGHTS, ExportConfig
from jlt.interop.read_authors import read_authors_file
from jlt.interop.read_export import IDENTITY, read_export
from jlt.interop.sources import open_source
from jlt.results.evaluation import Evaluation, Metrics
from jlt.results.files import write_result
from jlt.sampling.sampler import open_sampler
from jlt.storage.files import read_json, sealed_text, sha256_file
from jlt.storage.folders import LOCK, lock_folder
from jlt.storage.weights import read_metadata

NO_CARD = ExportConfig(samples=0)


def back(source, out):
    """Import an export as a run, and open its checkpoint."""
    return write_imported(read_export(source, str(source)), out)


@pytest.fixture
def checkpoint(tmp_path):
    return write_run(tmp_path / "run")


@pytest.fixture
def folder(checkpoint, tmp_path):
    return export_folder(checkpoint, tmp_path / "export", NO_CARD)


def images_of(checkpoint, **changes):
    settings = {"num": 3, "steps": 3, "cfg_scale": 2.0, "seed": 4, "labels": "2,0,3", **changes}
    return next(open_sampler(checkpoint, SampleConfig(**settings)).batches()).images


def files_of(path: Path) -> set[str]:
    return {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}


def everything_written(folder: Path) -> str:
    return "\n".join(path.read_text() for path in folder.rglob("*") if path.suffix in (".json", ".md", ".py"))


# What is in a folder


def test_the_files_of_a_folder(folder, checkpoint, tmp_path):
    code = {"pipeline.py", "app.py", "transformer/transformer_jlt.py"}
    models = {f"{part}/{name}" for part in ("transformer", "vae") for name in ("config.json", WEIGHTS)}
    assert files_of(folder) == {INDEX, RECORD, "README.md", *code, *models}
    assert read_json(folder / RECORD)["files"].keys() == {INDEX, *code, *models}
    assert not list(tmp_path.glob(".*"))
    assert (folder / "vae" / WEIGHTS).stat().st_mode & 0o444 == 0o444
    stored = load_file(folder / "transformer" / WEIGHTS)
    average = checkpoint.read("ema_0.9.safetensors")
    assert {name.removeprefix("network.") for name in stored} == set(average)
    assert all(torch.equal(stored[f"network.{name}"], value) for name, value in average.items())


def test_no_path_of_this_machine_is_in_a_folder(tmp_path):
    save_kl(tmp_path / "secret" / "kl")
    identity = load_autoencoder("kl", str(tmp_path / "secret" / "kl")).identity()
    checkpoint = write_run(tmp_path / "run", identity=identity, init_from=str(tmp_path / "secret"))
    write_evaluation(checkpoint, reference={"images": {"kind": "folder", "path": str(tmp_path / "secret" / "photos")}})
    folder = export_folder(checkpoint, tmp_path / "export", dataclasses.replace(NO_CARD, with_vae=True))
    assert str(tmp_path) not in everything_written(folder)
    assert "secret" not in everything_written(folder)


@pytest.mark.parametrize("ema", ["none", "sigma_rel=0.1"])
def test_the_chosen_average_is_exported(checkpoint, tmp_path, ema):
    folder = export_folder(checkpoint, tmp_path / "export", dataclasses.replace(NO_CARD, ema=ema))
    file = "network.safetensors" if ema == "none" else f"ema_{ema}.safetensors"
    stored = load_file(folder / "transformer" / WEIGHTS)["network.final.linear.weight"]
    assert torch.equal(stored, checkpoint.read(file)["final.linear.weight"])
    assert read_json(folder / INDEX)["training"]["ema"] == ema


def test_an_unknown_average_is_refused(checkpoint, tmp_path):
    with pytest.raises(UsageError, match=r"no EMA in this checkpoint named '0\.8'"):
        export_folder(checkpoint, tmp_path / "export", dataclasses.replace(NO_CARD, ema="0.8"))
    assert not (tmp_path / "export").exists()


def test_a_single_file_holds_weights_and_settings(checkpoint, tmp_path):
    path = export_file(checkpoint, tmp_path / "model.safetensors", NO_CARD)
    average = checkpoint.read("ema_0.9.safetensors")
    assert all(torch.equal(value, average[name]) for name, value in load_file(path).items())
    settings = json.loads(read_metadata(path)["jlt"])
    assert settings["network"]["hidden_size"] == 16
    assert settings["settings"]["prediction"] == "x"
    assert export_file(checkpoint, path, NO_CARD) == path
    bytes_of_it = path.read_bytes()
    for _ in range(5):
        path.unlink()
        assert export_file(checkpoint, path, NO_CARD).read_bytes() == bytes_of_it
    with pytest.raises(JLTError, match="exists and is not this export"):
        export_file(checkpoint, path, dataclasses.replace(NO_CARD, ema="none"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(JLTError, match="exists and is not this export"):
        export_file(checkpoint, path, NO_CARD)
    with pytest.raises(UsageError, match=r"end with \.safetensors"):
        export_file(checkpoint, tmp_path / "model", NO_CARD)


# Autoencoders


@pytest.fixture
def flux2(tmp_path):
    """A small autoencoder of FLUX.2's class, in a folder as a pipeline on the Hub has it."""
    from diffusers import AutoencoderKLFlux2

    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    sizes = {"block_out_channels": (8, 8), "layers_per_block": 1, "latent_channels": 2, "norm_num_groups": 4}
    vae = AutoencoderKLFlux2(**blocks, **sizes, batch_norm_eps=0.5).eval()
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 4)
    vae.save_pretrained(tmp_path / "flux2" / "vae")
    return tmp_path / "flux2"


@pytest.fixture
def kl(tmp_path):
    save_kl(tmp_path / "kl", scaling_factor=0.3, shift_factor=0.2)
    return tmp_path / "kl"


@pytest.fixture
def taef2(tmp_path):
    torch.manual_seed(0)
    (tmp_path / "taef2").mkdir()
    save_file(
        {name: value.contiguous() for name, value in TAEF2().state_dict().items()}, tmp_path / "taef2/taef2.safetensors"
    )
    return tmp_path / "taef2"


@pytest.mark.parametrize("name", ["flux2", "kl", "taef2", "pixels"])
def test_each_autoencoder_decodes_in_the_pipeline_and_comes_back(name, request, tmp_path, load):  # noqa: F811
    place = str(request.getfixturevalue(name)) if name != "pixels" else None
    identity = load_autoencoder(name, place).identity()
    if name == "taef2":
        # As latents of the authors' shards have it, which state nothing of their normalisation.
        identity |= {"weights_sha256": None, "normalisation": {"kind": "as adopted"}}
    checkpoint = write_run(tmp_path / "run", "v", 2, identity)
    folder = export_folder(checkpoint, tmp_path / "export", dataclasses.replace(NO_CARD, with_vae=name != "pixels"))
    arguments = {"num_inference_steps": 3, "guidance_scale": 2.0, "seed": 4, "output_type": "pt"}
    images = load(folder)([2, 0, 3], **arguments).images
    levels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    expected = images_of(checkpoint)
    assert expected.float().std() > 1
    assert (levels.int() - expected.int()).abs().max() <= 1
    # The run that comes back has the autoencoder with it.
    shutil.rmtree(tmp_path / "run")
    if place:
        shutil.rmtree(place)
    again = back(folder, tmp_path / "back")
    assert torch.equal(images_of(again), expected)


@pytest.mark.filterwarnings("ignore:.*local_dir_use_symlinks")
def test_an_autoencoder_of_the_hub_is_named_and_checked(flux2, tmp_path, load, monkeypatch):  # noqa: F811
    identity = {**load_autoencoder("flux2", str(flux2)).identity(), "source": "user/flux2"}
    checkpoint = write_run(tmp_path / "run", identity=identity)
    folder = export_folder(checkpoint, tmp_path / "export", NO_CARD)
    assert not (folder / "vae").exists()
    assert read_json(folder / INDEX)["vae"] == [None, None]
    assert read_json(folder / INDEX)["autoencoder"]["source"] == "user/flux2"
    assert "`user/flux2` is loaded for the first image" in (folder / "README.md").read_text()

    pipe = load(folder)
    arguments = {"num_inference_steps": 3, "guidance_scale": 2.0, "seed": 4}
    latents = pipe([2, 0, 3], output_type="latent", **arguments).images
    with pytest.raises(OSError, match=r"user/flux2 could not be loaded: give one with from_pretrained\(\.\.\., vae="):
        pipe([2, 0, 3], **arguments)
    given = load_autoencoder("flux2", str(flux2))
    from diffusers import AutoencoderKLFlux2

    own = load(folder, vae=AutoencoderKLFlux2.from_pretrained(flux2 / "vae", low_cpu_mem_usage=False))
    drawn = own([2, 0, 3], output_type="pt", **arguments).images
    torch.testing.assert_close(drawn, given.decode(latents) / 2 + 0.5)

    # The Hub, as a folder.
    original = AutoencoderKLFlux2.from_pretrained.__func__
    places = {"user/flux2": str(flux2)}
    monkeypatch.setattr(
        AutoencoderKLFlux2,
        "from_pretrained",
        classmethod(lambda cls, place, **options: original(cls, places.get(place, place), **options)),
    )
    assert torch.equal(pipe([2, 0, 3], output_type="pt", **arguments).images, drawn)
    assert pipe.vae is not None
    weights = load_file(flux2 / "vae" / WEIGHTS)
    save_file({**weights, "bn.running_mean": weights["bn.running_mean"] + 1}, flux2 / "vae" / WEIGHTS, {"format": "pt"})
    with pytest.raises(ValueError, match="user/flux2 has other weights"):
        load(folder)([2], **arguments)


def test_an_autoencoder_of_this_machine_is_copied_or_given_an_id(kl, tmp_path):
    checkpoint = write_run(tmp_path / "run", identity=load_autoencoder("kl", str(kl)).identity())
    with pytest.raises(JLTError, match=r"from a folder of this machine: copy it with --with-vae, or name .* --vae"):
        export_folder(checkpoint, tmp_path / "export", NO_CARD)
    assert not list(tmp_path.glob("*export*"))
    named = export_folder(checkpoint, tmp_path / "named", dataclasses.replace(NO_CARD, vae="stabilityai/sd-vae"))
    assert read_json(named / INDEX)["autoencoder"]["source"] == "stabilityai/sd-vae"
    assert str(tmp_path) not in everything_written(named)
    for wrong in ("../kl", str(kl), "name", "a/b/c"):
        with pytest.raises(UsageError, match="--vae takes a Hub id"):
            export_folder(checkpoint, tmp_path / "export", dataclasses.replace(NO_CARD, vae=wrong))


def test_a_path_of_weights_that_are_not_copied_is_refused(tmp_path, kl):
    identity = {**load_autoencoder("kl", str(kl)).identity(), "source": "user/kl"}
    with pytest.raises(UsageError, match="--autoencoder-path names the weights to copy: add --with-vae"):
        export_folder(write_run(tmp_path / "run", identity=identity), tmp_path / "export", NO_CARD, "cpu", str(kl))


def test_a_network_in_other_coordinates_is_refused(tmp_path):
    identity = json.loads(json.dumps(load_autoencoder("tiny").identity()))
    identity["normalisation"]["coordinates"] = {"source": "map.safetensors"}
    with pytest.raises(JLTError, match="other coordinates"):
        export_folder(write_run(tmp_path / "run", identity=identity), tmp_path / "export", NO_CARD)


# The model card


def write_evaluation(opened, features="digits", ema="0.9", **protocol):
    drawn = {"solver": "heun", "steps": 50, "cfg_scale": 1.5, "cfg_interval": [0.1, 1.0], "seed": 0, "count": 1000}
    facts = {"checkpoint": opened.sha256, "ema": ema, **drawn, "extractor": {"name": features}, **protocol}
    result = Evaluation(7, Metrics(frechet_distance=2.5625, inception_score=220.5, count=1000), facts)
    write_result(opened.run / "evaluations" / f"step_0000007-{features}{ema}.json", result)


def test_the_model_card_in_the_form_of_the_hub(checkpoint, tmp_path, load):  # noqa: F811
    from huggingface_hub import ModelCard

    reference = {"images": {"kind": "parquet", "path": "/data/imagenet"}, "count": 50000}
    write_evaluation(checkpoint, "inception", reference=reference)
    write_evaluation(checkpoint, "digits", reference=reference)
    write_evaluation(checkpoint, "inception", ema="none")
    write_evaluation(checkpoint, "squeezenet", checkpoint="0" * 64)
    config = ExportConfig(samples=5, steps=2, cfg_scale=1.5, cfg_interval=(0.1, 1.0), license="cc-by-4.0")
    folder = export_folder(checkpoint, tmp_path / "export", config, place="user/name")
    card = ModelCard.load(folder / "README.md")
    assert (card.data.license, card.data.library_name, card.data.model_name) == ("cc-by-4.0", "diffusers", "test")
    results = {(result.metric_type, result.metric_args["features"]): result for result in card.data.eval_results}
    # FID is a name for Inception's features, and the other average and the other checkpoint are not these weights.
    assert results.keys() == {(kind, "inception") for kind in ("fid", "inception_score")} | {
        (kind, "digits") for kind in ("frechet_distance", "inception_score")
    }
    fid = results["fid", "inception"]
    assert (fid.metric_value, fid.dataset_type, fid.metric_args["cfg_scale"]) == (2.5625, "parquet", 1.5)
    assert fid.dataset_name == "imagenet (parquet)"
    assert fid.metric_name == "FID (1,000 images, inception features)"
    text = card.text
    assert text.count("<summary>Protocol") == 3
    assert '"path": "imagenet"' in text
    assert 'from_pretrained("user/name", trust_remote_code=True)' in text
    assert "guidance_scale=1.5, guidance_interval=(0.1, 1.0), seed=0" in text
    assert "`cc-by-4.0`" in text
    assert "2605.27102" in text
    from PIL import Image

    with Image.open(folder / "samples.png") as sheet:
        assert sheet.width > 4 * 96


def test_the_card_names_all_that_decides_the_images_of_an_evaluation(tmp_path):
    from huggingface_hub import ModelCard

    opened = write_run(tmp_path / "run")
    write_evaluation(opened, "a", grid=[0.0, 0.3, 1.0], steps=2, cfg_scale=1.0)
    write_evaluation(opened, "b", grid=[], shift=0.5, autoguide={"checkpoint": "1" * 64, "ema": "0.9"})
    card = ModelCard.load(export_folder(opened, tmp_path / "export", NO_CARD) / "README.md")
    assert "| heun, 2 steps at own times |" in card.text
    assert "| heun, 50 steps, shift 0.5, autoguidance 1.5 on [0.1, 1.0] |" in card.text
    arguments = {result.metric_args["features"]: result.metric_args for result in card.data.eval_results}
    assert arguments["a"]["grid"] == [0.0, 0.3, 1.0]
    assert arguments["b"]["autoguide"]["ema"] == "0.9"
    assert "grid" not in arguments["b"]


def test_the_card_of_an_imported_run_states_only_what_is_known(checkpoint, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("JLT_CACHE", str(tmp_path / "cache"))
    known = (folder / "README.md").read_text()
    assert "trained for 7 steps" in known
    assert "| training images | photographs (digits) |" in known
    assert "| batch size | 1,024 |" in known
    again = (export_folder(open_source(folder), tmp_path / "again", NO_CARD) / "README.md").read_text()
    assert "trained for 7 steps" in again
    assert "| training images | digits |" in again
    # The batch of the training is not in an export.
    assert "batch size" not in again
    assert "The weights: `apache-2.0`" in known
    assert "The weights: `unknown`" in again


def test_the_card_of_another_programs_checkpoint_counts_no_epochs_as_steps(tmp_path):
    content = authors_content()
    del content["optimizer"]
    path = saved(tmp_path / "checkpoint-last.pth", content)
    opened = write_imported(read_authors_file(path, "", ImportConfig()), tmp_path / "run")
    text = (export_folder(opened, tmp_path / "export", NO_CARD) / "README.md").read_text()
    assert "It was exported by jlt" in text
    assert "| training images | unknown: the checkpoint is another program's |" in text
    # Nothing says which weights of the autoencoder its latents are of.
    assert "not checked: their hash is unknown" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": -1}, "samples must be from 0 to"),
        ({"steps": 0}, "steps must be .*, not 0"),
        ({"cfg_scale": 2.0, "cfg_interval": (1.0, 0.2)}, "cfg_interval must"),
        ({"samples": 0, "cfg_scale": float("nan")}, "cfg_scale must be"),
    ],
)
def test_impossible_samples_of_the_card_are_refused_before_any_work(checkpoint, tmp_path, changes, message):
    with pytest.raises(JLTError, match=message):
        export_folder(checkpoint, tmp_path / "export", ExportConfig(**changes))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_the_samples_of_the_card_are_the_pipelines(checkpoint, tmp_path, load):  # noqa: F811
    import numpy as np
    from PIL import Image

    folder = export_folder(checkpoint, tmp_path / "export", ExportConfig(samples=1, steps=3))
    with Image.open(folder / "samples.png") as picture:
        sheet = np.asarray(picture.convert("RGB")).astype(int)
    expected = images_of(checkpoint, num=1, cfg_scale=1.0, labels="0", seed=0)[0].numpy().astype(int)
    found = sheet[12 : 12 + 96 : 3, 12 : 12 + 96 : 3]
    assert abs(found - expected).max() <= 1


# The same folder, other folders, interruptions


def test_the_same_command_leaves_a_complete_folder(checkpoint, folder, monkeypatch):
    (folder / "README.md").write_text("edited by its owner")
    before = {name: sha256_file(folder / name) for name in files_of(folder)}
    assert export_folder(checkpoint, folder, NO_CARD) == folder
    assert {name: sha256_file(folder / name) for name in files_of(folder)} == before


def test_another_export_and_another_folder_are_refused(checkpoint, folder, tmp_path):
    with pytest.raises(JLTError, match="holds another export, which differs in: ema: '0.9' -> 'none'"):
        export_folder(checkpoint, folder, dataclasses.replace(NO_CARD, ema="none"))
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    with pytest.raises(JLTError, match="exists and is no export"):
        export_folder(checkpoint, other, NO_CARD)
    with pytest.raises(JLTError, match="exists and is no export"):
        export_folder(checkpoint, other / "notes.txt", NO_CARD)
    assert files_of(other) == {"notes.txt"}


@pytest.mark.parametrize("name", ["pipeline.py", f"transformer/{WEIGHTS}", INDEX])
def test_a_damaged_export_is_named(checkpoint, folder, name):
    content = bytearray((folder / name).read_bytes())
    content[-3] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(JLTError, match=f"{re.escape(name)} was edited or damaged"):
        export_folder(checkpoint, folder, NO_CARD)
    (folder / name).unlink()
    with pytest.raises(JLTError, match=f"{re.escape(name)} is missing"):
        export_folder(checkpoint, folder, NO_CARD)


def test_an_interrupted_export_leaves_nothing_and_a_killed_one_is_replaced(checkpoint, tmp_path, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("jlt.interop.export.write_card", interrupt)
        with pytest.raises(KeyboardInterrupt):
            export_folder(checkpoint, tmp_path / "export", NO_CARD)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    left, written = (tmp_path / f".export.{process}.partial" for process in (2**31 - 1, 2**31 - 2))
    for partial in (left, written):
        partial.mkdir()
        (partial / LOCK).touch()
    (left / "left").write_text("by a killed process")
    with lock_folder(written):
        folder = export_folder(checkpoint, tmp_path / "export", NO_CARD)
    assert "left" not in files_of(folder)
    assert not left.exists()
    assert written.exists()


# The upload


class FakeHub:
    """What the upload uses of huggingface_hub's API; it keeps what it received."""

    received: list = []  # noqa: RUF012
    failure: Exception | None = None

    def create_repo(self, repo_id, *, repo_type=None, private=None, exist_ok=False):
        if self.failure:
            raise self.failure
        self.received.append(("create", repo_id, repo_type, private, exist_ok))
        return f"https://hub/{repo_id}"

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        self.received.append(("upload", repo_id, files_of(Path(folder_path))))


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi", FakeHub)
    monkeypatch.setattr(FakeHub, "received", [])
    return FakeHub


def test_a_folder_is_uploaded_whole(checkpoint, folder, hub, tmp_path, capsys):
    arguments = ["export", str(checkpoint.run), "--out", str(tmp_path / "pushed"), "--samples", "0"]
    assert main([*arguments, "--push", "user/name", "--private", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["address"] == "https://hub/user/name"
    assert hub.received == [
        ("create", "user/name", "model", True, True),
        ("upload", "user/name", files_of(tmp_path / "pushed")),
    ]
    # After a failure the same command only uploads.
    assert main([*arguments, "--push", "user/name"]) == 0
    assert hub.received[2] == ("create", "user/name", "model", None, True)


def test_a_failed_upload_shows_no_token(folder, hub, monkeypatch):
    monkeypatch.setattr(hub, "failure", RuntimeError("401 for token hf_AbCdEf0123"))
    with pytest.raises(
        JLTError, match=r"is complete, but could not be uploaded .*hf_\.\.\.\).*hf auth login"
    ) as raised:
        push_folder(folder, "user/name")
    assert "AbCdEf" not in str(raised.value)


def test_the_fake_hub_has_the_signatures_of_the_real_one():
    import inspect

    from huggingface_hub import HfApi

    for name in ("create_repo", "upload_folder"):
        fake, real = (inspect.signature(getattr(owner, name)).parameters for owner in (FakeHub, HfApi))
        assert set(fake) <= set(real)


@pytest.mark.parametrize("name", ["user", "user/name/more", "../name"])
def test_a_wrong_name_of_a_repository_is_refused_before_any_work(checkpoint, tmp_path, name, capsys):
    assert main(["export", str(checkpoint.run), "--out", str(tmp_path / "new"), "--push", name]) == 2
    assert "--push takes user/name" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_the_command_writes_one_file(checkpoint, tmp_path, capsys):
    out = tmp_path / "model.safetensors"
    arguments = ["export", str(checkpoint.run), "--out", str(out), "--format", "safetensors"]
    assert main(arguments) == 0
    assert out.is_file()
    assert main([*arguments, "--push", "user/name"]) == 2
    assert "leave out --format" in capsys.readouterr().err


# The way back in


@pytest.mark.parametrize(("ema", "stored"), [("", "0.9"), ("none", "none"), ("sigma_rel=0.1", "sigma_rel=0.1")])
@pytest.mark.parametrize("form", ["folder", "file"])
def test_what_was_exported_comes_back_as_a_run(checkpoint, tmp_path, ema, stored, form):
    config = dataclasses.replace(NO_CARD, ema=ema)
    if form == "folder":
        exported = export_folder(checkpoint, tmp_path / "export", config)
    else:
        exported = export_file(checkpoint, tmp_path / "export.safetensors", config)
    again = back(exported, tmp_path / "back")
    run = again.run
    assert (again.step, again.config.prediction, again.config.name) == (7, "x", "test")
    assert again.latents["class_names"] == NAMES
    assert (run / "config.json").is_file()
    assert torch.equal(images_of(again), images_of(checkpoint, ema=ema))
    assert open_sampler(again, SampleConfig()).protocol()["ema"] == stored
    assert not list(tmp_path.glob(".*"))


def test_the_same_import_again_is_recognised_and_others_are_refused(checkpoint, folder, tmp_path):
    first = back(folder, tmp_path / "back")
    stamp = (first.folder / "manifest.json").stat().st_mtime_ns
    shutil.move(folder, tmp_path / "elsewhere")
    assert back(tmp_path / "elsewhere", tmp_path / "back").sha256 == first.sha256
    assert (first.folder / "manifest.json").stat().st_mtime_ns == stamp
    other = write_run(tmp_path / "other", seed=1)
    # All settings are equal, and the weights differ.
    with pytest.raises(JLTError, match=r"holds other work, which differs in: latents\.source\.imported"):
        back(export_folder(other, tmp_path / "export", NO_CARD), tmp_path / "back")
    for number, taken in enumerate(("file", "folder/note")):
        (tmp_path / taken).parent.mkdir(exist_ok=True)
        (tmp_path / taken).write_text("mine")
        with pytest.raises(JLTError, match=("is a file", "holds other files, such as note")[number]):
            back(tmp_path / "elsewhere", tmp_path / taken.partition("/")[0])


def test_what_an_export_has_not_is_named(folder, tmp_path):
    again = back(folder, tmp_path / "back")
    with pytest.raises(JLTError, match=r"holds no network\.safetensors: an imported run has only the weights"):
        images_of(again, ema="none")


def test_of_two_imports_at_once_the_slower_one_uses_the_faster_ones(folder, tmp_path, monkeypatch):
    original, winner = importing.save_checkpoint, []

    def overtaken(*arguments):
        monkeypatch.setattr(importing, "save_checkpoint", original)
        winner.append(back(folder, tmp_path / "back"))
        return original(*arguments)

    monkeypatch.setattr(importing, "save_checkpoint", overtaken)
    loser = back(folder, tmp_path / "back")
    assert loser.sha256 == winner[0].sha256
    assert not list(tmp_path.glob(".*"))
    assert {path.name for path in loser.run.iterdir()} == {"checkpoints", "config.json"}


def test_of_two_exports_at_once_the_slower_one_uses_the_faster_ones(checkpoint, tmp_path, monkeypatch):
    original = export_module.write_card

    def overtaken(*arguments):
        monkeypatch.setattr(export_module, "write_card", original)
        export_folder(checkpoint, tmp_path / "export", faster)
        original(*arguments)

    for faster in (NO_CARD, dataclasses.replace(NO_CARD, ema="none")):
        monkeypatch.setattr(export_module, "write_card", overtaken)
        refused = pytest.raises(JLTError, match="holds another export") if faster.ema else contextlib.nullcontext()
        with refused:
            export_folder(checkpoint, tmp_path / "export", NO_CARD)
        assert read_json(tmp_path / "export" / RECORD)["export"]["ema"] == faster.ema or "0.9"
        assert not list(tmp_path.glob(".*"))
        shutil.rmtree(tmp_path / "export")


@pytest.mark.parametrize("form", ["folder", "file"])
def test_weights_that_are_not_finite_are_refused(folder, checkpoint, tmp_path, form):
    without_record(folder)
    source = folder if form == "folder" else export_file(checkpoint, tmp_path / "export.safetensors", NO_CARD)
    path = folder / "transformer" / WEIGHTS if form == "folder" else source
    weights, metadata = load_file(path), read_metadata(path)
    next(iter(weights.values())).view(-1)[1] = float("nan")
    save_file(weights, path, metadata)
    with pytest.raises(JLTError, match="holds values that are not finite in "):
        back(source, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_a_run_is_not_overwritten(folder, tmp_path):
    run = back(folder, tmp_path / "back").run
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert back(folder, tmp_path / "back").run == run
    without_record(folder)
    replace_weights(folder, lambda weights: {name: value + 1 for name, value in weights.items()})
    with pytest.raises(JLTError, match=r"holds other work, which differs in: latents\.source\.imported"):
        back(folder, tmp_path / "back")
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def without_record(folder: Path) -> None:
    """Leave the folder as diffusers saves one."""
    (folder / RECORD).unlink()


def test_a_folder_without_hashes_is_read_with_a_message(checkpoint, folder, tmp_path, capsys):
    without_record(folder)
    again = back(folder, tmp_path / "back")
    assert "not checked against their hashes" in capsys.readouterr().err
    assert torch.equal(images_of(again), images_of(checkpoint))


def test_no_code_of_a_folder_runs(folder, tmp_path):
    without_record(folder)
    for path in folder.rglob("*.py"):
        path.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    back(folder, tmp_path / "back")
    assert not (tmp_path / "ran").exists()
    assert not list((tmp_path / "back").rglob("*.py"))


def edit_json(path: Path, **changes) -> None:
    """Change values of a JSON file by dotted names."""
    content = json.loads(path.read_text())
    for name, value in changes.items():
        *outer, last = name.split("__")
        place = content
        for key in outer:
            place = place[key]
        place[last] = value
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": ["pipeline", "OtherPipeline"]}, "pipeline of the class"),
        ({"prediction": "score"}, "no prediction named 'score'"),
        ({"unheard": 1}, "no setting named 'unheard'"),
        ({"noise_scale": float("nan")}, "NaN is no number"),
        ({"autoencoder__held_out_psnr": float("inf")}, "Infinity is no number"),
        ({"autoencoder__class": 1}, r"autoencoder\.class and"),
        ({"id2label": {"0": "a", "7": "b"}}, "id2label must name each of the 4 classes"),
        ({"training__ema": "../../escape"}, "training.ema is no average"),
        ({"training__ema": "0.90"}, "training.ema is no average"),
        ({"training__step": -5}, "training.step must be 0 or more"),
        ({"training__step": 10**400}, "training.step is a whole number of more than 64 bits"),
        ({"noise_scale": 10**400}, "noise_scale is a whole number of more than 64 bits"),
        ({"prediction": "x" * 10**6}, "^There is no prediction named .x{80}….: choose from x, eps"),
        ({"training__label_dropout": 2.0}, "label_dropout must be"),
        ({"training": None}, "training must be TrainingFacts"),
        ({"autoencoder__source": "/etc"}, "autoencoder.source must be the Hub id"),
        ({"autoencoder__source": "../x"}, "autoencoder.source must be the Hub id"),
        ({"autoencoder__source": None}, "autoencoder.source must be the Hub id"),
        ({"autoencoder__name": "other"}, "not of a known autoencoder"),
        ({"autoencoder__channels": 3}, "not of a known autoencoder with 16 channels"),
        ({"autoencoder__downsampling": 10**9}, "downsampling must be from 1 to 256"),
        ({"autoencoder__normalisation": {"coordinates": {"source": "/etc/passwd"}}}, "names coordinates"),
        ({"autoencoder__weights_sha256": 5}, "weights_sha256 is no hash"),
    ],
)
def test_hostile_settings_are_refused(folder, tmp_path, changes, message):
    without_record(folder)
    if "autoencoder__source" in changes:
        edit_json(folder / INDEX, vae=[None, None])
    edit_json(folder / INDEX, **changes)
    with pytest.raises(JLTError, match=message):
        back(folder, tmp_path / "back")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("key", IDENTITY)
def test_an_autoencoder_without_a_part_of_its_identity_is_refused(folder, tmp_path, key):
    without_record(folder)
    described = read_json(folder / INDEX)["autoencoder"]
    edit_json(folder / INDEX, autoencoder={name: value for name, value in described.items() if name != key})
    with pytest.raises(JLTError, match=rf"autoencoder\.{key} is missing"):
        read_export(folder, str(folder))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 10**12}, "depth must be from 1 to 4,096"),
        ({"depth": 4000}, "holds 2 blocks, and its settings state a depth of 4000"),
        ({"height": 10**9, "width": 10**9}, "height must be from 1"),
        ({"height": 1000, "width": 1000}, "jlt reads no images of more than 4,096 pixels"),
        ({"hidden_size": 2**40}, "hidden_size must be from 1"),
        ({"hidden_size": 32}, r"network.* of \(.*16.* instead of \(.*32"),
        ({"num_heads": 0}, "num_heads must be from 1"),
        ({"mlp_ratio": 1e300}, "mlp_ratio must be above 0"),
        ({"context_tokens": 10**15}, "context_tokens must be from 0"),
        ({"context_tokens": 2**15}, "does not hold the weights|impossible network"),
        ({"patch_size": 2}, r"misshapen, such as network\.\S+ of"),
        ({"num_classes": 9}, "id2label must name each of the 9 classes"),
    ],
)
def test_impossible_networks_are_refused_before_memory_is_allocated(folder, tmp_path, changes, message):
    without_record(folder)
    edit_json(folder / "transformer" / "config.json", **changes)
    with pytest.raises(JLTError, match=message):
        back(folder, tmp_path / "back")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_out_channels": [10**9] * 3}, r"has the value 1000000000: no autoencoder"),
        ({"norm_num_groups": float("nan")}, "NaN is no number"),
        ({"down_block_types": ["DownEncoderBlock2D"] * 500}, "a list of 500 values"),
        ({"down_block_types": ["os.system"] * 3}, "has no settings of the autoencoder 'tiny'"),
        ({"latent_channels": 8}, r"does not hold the weights of the autoencoder 'tiny': .* instead of"),
    ],
)
def test_impossible_autoencoders_are_refused_before_memory_is_allocated(folder, tmp_path, changes, message):
    without_record(folder)
    edit_json(folder / "vae" / "config.json", **changes)
    with pytest.raises(JLTError, match=message):
        back(folder, tmp_path / "back")


def replace_weights(folder: Path, change) -> None:
    path = folder / "transformer" / WEIGHTS
    save_file(change(load_file(path)), path, {"format": "pt"})


def test_wrong_weights_are_named(folder, tmp_path):
    without_record(folder)
    good = load_file(folder / "transformer" / WEIGHTS)
    name = "network.final.linear.weight"
    cases = {
        rf"1 missing, such as {name}": {key: value for key, value in good.items() if key != name},
        r"1 unexpected, such as network\.extra": {**good, "network.extra": torch.zeros(1)},
        rf"1 misshapen, such as {name} of \(5, 5\)": {**good, name: torch.zeros(5, 5)},
        rf"holds {name} as I64": {**good, name: good[name].long()},
    }
    for message, weights in cases.items():
        replace_weights(folder, lambda _, weights=weights: weights)
        with pytest.raises(JLTError, match=message):
            back(folder, tmp_path / "back")


def test_damaged_and_hostile_files_are_refused(folder, tmp_path):
    path = folder / "transformer" / WEIGHTS
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[-1] ^= 1
    path.write_bytes(flipped)
    with pytest.raises(JLTError, match="was edited or damaged"):
        back(folder, tmp_path / "back")
    without_record(folder)
    path.write_bytes(content[:-10])
    with pytest.raises(JLTError, match="not a readable safetensors file"):
        back(folder, tmp_path / "back")
    torch.save({"weights": Trap(tmp_path / "sprung")}, path)
    with pytest.raises(JLTError, match="not a readable safetensors file"):
        back(folder, tmp_path / "back")
    assert not (tmp_path / "sprung").exists()
    path.write_bytes(content)
    for text in ("[" * 200_000, "[]", "{", " " * (2**24 + 1), '{"depth": 1' + 5_000 * "0" + "}"):
        (folder / "transformer" / "config.json").write_text(text)
        with pytest.raises(JLTError, match=r"transformer/config\.json"):
            back(folder, tmp_path / "back")


def test_paths_stay_in_the_folder(folder, tmp_path):
    secret = tmp_path / "secret.safetensors"
    shutil.copy(folder / "transformer" / WEIGHTS, secret)
    record = read_json(folder / RECORD)
    for name in ("../secret.safetensors", str(secret)):
        changed = {**record, "files": {**record["files"], name: sha256_file(secret)}}
        changed.pop("sha256")
        (folder / RECORD).write_text(sealed_text(changed))
        with pytest.raises(JLTError, match="may name only files in its own folder"):
            back(folder, tmp_path / "back")
    without_record(folder)
    (folder / "transformer" / WEIGHTS).unlink()
    (folder / "transformer" / WEIGHTS).symlink_to(secret)
    with pytest.raises(JLTError, match="leads out of"):
        back(folder, tmp_path / "back")


def test_links_with_known_hashes_are_followed_as_in_the_cache_of_the_hub(folder, tmp_path):
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for place, name in enumerate(sorted(files_of(folder))):
        (folder / name).rename(blobs / str(place))
        (folder / name).symlink_to(blobs / str(place))
    assert back(folder, tmp_path / "back").step == 7
    assert not any(path.is_symlink() for path in (tmp_path / "back").rglob("*"))


def test_files_that_the_record_does_not_list_are_refused(folder, tmp_path):
    record = read_json(folder / RECORD)
    record.pop("sha256")
    record["files"].pop(f"transformer/{WEIGHTS}")
    (folder / RECORD).write_text(sealed_text(record))
    with pytest.raises(JLTError, match="does not list transformer/"):
        back(folder, tmp_path / "back")
    record["files"][f"transformer/{WEIGHTS}"] = None
    (folder / RECORD).write_text(sealed_text(record))
    with pytest.raises(JLTError, match="has no hash of 'transformer/"):
        back(folder, tmp_path / "back")


@pytest.mark.parametrize("content", [None, {}, {"settings": 1}])
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "model.safetensors"
    metadata = None if content is None else {"jlt": json.dumps(content)}
    save_file({"weight": torch.zeros(2)}, path, metadata)
    with pytest.raises(JLTError, match="no settings in its metadata|is missing"):
        back(path, tmp_path / "back")
    with pytest.raises(JLTError, match=r"has no model_index\.json"):
        back(tmp_path, tmp_path / "back")
