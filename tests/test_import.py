"""Checkpoints of other programs: equal numbers through the imported run, and a sentence for every other file."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from foreign_networks import authors_content, golden, jit_forward, jit_weights, saved
from safetensors.torch import save_file

from jlt.cli.main import main
from jlt.config import LossConfig, TimestepConfig
from jlt.errors import JLTError, UsageError
from jlt.interop import importing, read_authors
from jlt.interop.import_config import ImportConfig
from jlt.interop.importing import write_run
from jlt.interop.read_authors import read_authors_file
from jlt.sampling.sampler import open_weights
from jlt.training.checkpoint import MANIFEST, open_checkpoint, verify_checkpoints

TOLERANCE = 1e-5


def read(path, options):
    return read_authors_file(Path(path), str(path), options)


def imported(tmp_path, content, **options):
    """Import a content by its file, and return the checkpoint."""
    path = saved(tmp_path / "checkpoint-last.pth", content)
    return write_run(read(str(path), ImportConfig(**options)), tmp_path / "run")


def refusal(tmp_path, content, kind=JLTError, **options):
    """Return the sentence that refuses a content, and check that no folder was made."""
    with pytest.raises(kind) as raised:
        imported(tmp_path, content, **options)
    assert sorted(path.name for path in tmp_path.iterdir() if "pth" not in path.name) == []
    return str(raised.value)


def output(checkpoint, ema, z, t, labels):
    with torch.no_grad():
        return open_weights(checkpoint, ema, "cpu").denoiser.network(z, t, labels)


def relative_error(found, wanted):
    return ((found - wanted).norm() / wanted.norm()).item()


# The authors' checkpoint


@pytest.mark.parametrize("name", ["patch1", "patch2"])
def test_the_imported_network_gives_the_authors_numbers(tmp_path, name):
    _, tensors = golden(name)
    checkpoint = imported(tmp_path, authors_content(name))
    inputs = (tensors["forward.z"], tensors["forward.t"], tensors["forward.y"])
    assert relative_error(output(checkpoint, "0.999", *inputs), tensors["forward.output"]) < TOLERANCE
    for other in ("0.99", "none"):
        assert relative_error(output(checkpoint, other, *inputs), tensors["forward.output"]) > 0.1


def test_the_settings_are_those_of_the_file(tmp_path):
    checkpoint = imported(tmp_path, authors_content(flow_matching=True))
    config = checkpoint.config
    assert config.prediction == "v"
    assert config.timesteps == TimestepConfig(P_mean=-0.7, P_std=0.9)
    assert config.loss == LossConfig(space="v", weighting="published", t_eps=0.04)
    assert (config.noise_scale, config.label_dropout, config.ema, config.power_ema) == (1.5, 0.2, (0.999, 0.99), ())
    assert (config.batch_size, config.optimizer.learning_rate) == (512, 1e-4)
    assert (config.network.height, config.network.num_classes, config.network.num_heads) == (4, 5, 4)
    assert (checkpoint.step, checkpoint.updates) == (1234, 1234)
    assert checkpoint.folder.name == "step_0001234"
    assert verify_checkpoints(checkpoint.run) == []
    origin = checkpoint.read_state().imported
    assert origin["patch_embedding"] == "x_embedder.proj"
    assert origin["epoch"] == 4
    assert origin["assumed"] == {}


def test_the_latents_are_identified_as_adopted_ones(tmp_path):
    latents = imported(tmp_path, authors_content()).latents
    identity = latents["autoencoder"]
    assert (identity["name"], identity["weights_sha256"], identity["downsampling"]) == ("flux2", None, 16)
    assert identity["normalisation"] == {"kind": "as adopted"}
    assert latents["class_names"] == list("01234")
    assert latents["resolution"] == 64


def test_a_thousand_classes_have_imagenets_names(tmp_path):
    content = authors_content(class_num=1000)
    for state in ("model", "model_ema1", "model_ema2"):
        content[state]["net.y_embedder.embedding_table.weight"] = torch.zeros(1001, 32)
    names = imported(tmp_path, content).latents["class_names"]
    assert (len(names), names[0], names[217]) == (1000, "tench", "English springer")


def test_class_names_of_a_file_must_be_as_many_as_the_classes(tmp_path):
    names = tmp_path / "names.pth.txt"
    names.write_text("a\nb\nc\nd\ne\n")
    assert imported(tmp_path, authors_content(), class_names=names).latents["class_names"] == list("abcde")
    names.write_text("a\nb\n")
    shutil.rmtree(tmp_path / "run")
    assert "names 2 classes, and the network has 5" in refusal(
        tmp_path, authors_content(), kind=UsageError, class_names=names
    )


def test_a_file_without_settings_gets_the_published_ones_and_says_so(tmp_path, capsys):
    content = authors_content()
    del content["args"], content["optimizer"]
    path = saved(tmp_path / "a.pth", content)
    assert main(["import", str(path), "--out", str(tmp_path / "run"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["assumed"] == {
        **{"prediction": "x", "img_size": 256, "ema_decay1": 0.9999, "ema_decay2": 0.9996, "batch_size": 1024},
        **{"t_eps": 0.05, "P_mean": -0.8, "P_std": 0.8, "noise_scale": 1.0, "label_drop_prob": 0.1},
    }
    # Epochs are counted from 0 in the file, and the one that it names is finished.
    assert (found["step"], found["step_counts"]) == (5, "epochs")
    assert open_checkpoint(tmp_path / "run").updates == 0


def test_only_what_a_file_does_not_state_can_be_chosen(tmp_path):
    absent = {"flow_matching": ..., "img_size": ...}
    checkpoint = imported(tmp_path, authors_content(**absent), prediction="v", resolution=64)
    assert (checkpoint.config.prediction, checkpoint.config.network.height) == ("v", 4)
    shutil.rmtree(tmp_path / "run")
    assert "predicts x: leave out --prediction v" in refusal(tmp_path, authors_content(), UsageError, prediction="v")
    assert "64 pixels: leave out --resolution 128" in refusal(tmp_path, authors_content(), UsageError, resolution=128)
    assert "leave out --context-start" in refusal(tmp_path, authors_content(), UsageError, context_start=1)


def test_another_autoencoder_can_be_named(tmp_path):
    checkpoint = imported(tmp_path, authors_content(), autoencoder="kl", autoencoder_path="some/place")
    assert checkpoint.latents["autoencoder"]["source"] == "some/place"
    assert checkpoint.config.network.height == 8
    shutil.rmtree(tmp_path / "run")
    assert "--autoencoder-path" in refusal(tmp_path, authors_content(), UsageError, autoencoder="kl")
    assert "did you mean flux2" in refusal(tmp_path, authors_content(), UsageError, autoencoder="flux")


def test_missing_averages_and_missing_raw_weights_are_stated(tmp_path):
    content = authors_content()
    del content["model_ema2"]
    checkpoint = imported(tmp_path, content)
    assert checkpoint.ema_names() == ["0.999"]
    shutil.rmtree(tmp_path / "run")
    del content["model"]
    checkpoint = imported(tmp_path, content)
    assert checkpoint.read_state().imported["network_from"] == "model_ema1"
    for name, tensor in checkpoint.read("network.safetensors").items():
        assert torch.equal(tensor, checkpoint.read("ema_0.999.safetensors")[name])


def test_numbers_of_other_precision_become_float32(tmp_path):
    content = authors_content()
    content["model"] = {name: value.bfloat16() for name, value in content["model"].items()}
    assert {tensor.dtype for tensor in imported(tmp_path, content).read("network.safetensors").values()} == {
        torch.float32
    }


def test_tensors_that_share_memory_are_written(tmp_path):
    """A network whose parameters are parts of one buffer, as some engines have it."""
    content = authors_content()
    flat = torch.cat([value.reshape(-1) for value in content["model_ema1"].values()])
    parts = flat.split([value.numel() for value in content["model_ema1"].values()])
    pairs = zip(content["model_ema1"].items(), parts, strict=True)
    content["model_ema1"] = {name: part.view(value.shape) for (name, value), part in pairs}
    _, tensors = golden("patch1")
    checkpoint = imported(tmp_path, content)
    found = output(checkpoint, "0.999", tensors["forward.z"], tensors["forward.t"], tensors["forward.y"])
    assert relative_error(found, tensors["forward.output"]) < TOLERANCE
    shutil.rmtree(tmp_path / "run")
    content["model"]["net.blocks.0.norm2.weight"] = content["model"]["net.blocks.0.norm1.weight"]
    weights = imported(tmp_path, content).read("network.safetensors")
    assert torch.equal(weights["blocks.0.mlp_norm.weight"], weights["blocks.0.attention_norm.weight"])


# What becomes of a run


def test_an_imported_run_is_sampled_and_fine_tuned(tmp_path, digit_latents, capsys, monkeypatch):
    """A network of the digits' latents in the authors' form, through the commands that use a run."""
    monkeypatch.setenv("JLT_CACHE", str(tmp_path / "cache"))
    content = tuned_to_digits(authors_content(img_size=32))
    path, run = saved(tmp_path / "a.pth", content), tmp_path / "run"
    options = ["--autoencoder", "tiny", "--class-names", str(digit_names(tmp_path))]
    assert main(["import", str(path), "--out", str(run), *options]) == 0
    checkpoint = ["--checkpoint", str(run)]
    assert main(["sample", *checkpoint, "--out", str(tmp_path / "s"), "--num", "2", "--steps", "2"]) == 0
    assert len(list((tmp_path / "s").glob("*.png"))) == 2
    store = ["--latents", str(digit_latents)]
    geometry = ["--patch-size", "1", "--num", "32", "--out", str(tmp_path / "g")]
    exported = tmp_path / "exported"
    assert main(["export", str(run), "--out", str(exported), "--samples", "0", "--with-vae"]) == 0
    assert main(["analyze", *store, *checkpoint, str(exported), *geometry]) == 0
    assert main(["report", str(run)]) == 0
    assert main(["verify", str(run)]) == 0
    train = ["train", str(run / "config.json"), *store, "--out", str(tmp_path / "tuned"), "--init-from", str(run)]
    # The digits have no mirror images.
    assert main([*train, "--steps", "2", "--batch-size", "8", "--precision", "float32", "--no-flips"]) == 0
    assert "Starting from the weights (0.999)" in capsys.readouterr().err


def tuned_to_digits(content):
    """Give golden weights the 16 channels and 10 classes of the digits' latents."""
    for state in ("model", "model_ema1", "model_ema2"):
        weights = content[state]
        weights["net.x_embedder.proj.weight"] = weights["net.x_embedder.proj.weight"].repeat(1, 2, 1, 1)
        for kind in ("weight", "bias"):
            name = f"net.final_layer.linear.{kind}"
            weights[name] = torch.cat(2 * [weights[name]])
        weights["net.y_embedder.embedding_table.weight"] = torch.zeros(11, 32)
    return content


def digit_names(tmp_path):
    path = tmp_path / "names.txt"
    path.write_text("".join(f"{digit}\n" for digit in range(10)))
    return path


def test_an_imported_run_without_a_count_of_images_is_no_recipe_by_itself(tmp_path, capsys):
    imported(tmp_path, authors_content())
    assert main(["plan", str(tmp_path / "run" / "config.json")]) == 1
    assert "--latents" in capsys.readouterr().err


# JiT


@pytest.mark.parametrize(("drift", "kind"), [(0.0, "fixed_positions"), (1e-3, "learned_positions")])
def test_the_imported_jit_network_gives_the_numbers_of_its_facts(tmp_path, drift, kind):
    states = {name: jit_weights(seed, drift=drift) for seed, name in enumerate(read_authors.STATES)}
    args = argparse.Namespace(img_size=16, ema_decay1=0.9999, ema_decay2=0.9996)
    content = {name: {f"net.{key}": value for key, value in weights.items()} for name, weights in states.items()}
    checkpoint = imported(tmp_path, {**content, "args": args, "epoch": 3})
    network = checkpoint.config.network
    assert (network.bottleneck_size, network.context_tokens, network.context_start) == (7, 3, 2)
    assert getattr(network, kind)
    assert checkpoint.latents["autoencoder"]["name"] == "pixels"
    assert checkpoint.config.prediction == "x"
    origin = checkpoint.read_state().imported
    assert origin["patch_embedding"] == "x_embedder.proj1 and x_embedder.proj2"
    assert origin["assumed"]["in_context_start"] == 2
    generator = torch.Generator().manual_seed(9)
    z, t = torch.randn(3, 3, 16, 16, generator=generator), torch.tensor([0.0, 0.4, 0.97])
    labels = torch.tensor([0, 3, 5])
    for name, ema in zip(read_authors.STATES, ("none", "0.9999", "0.9996"), strict=True):
        wanted = jit_forward(states[name], z, t, labels)
        assert relative_error(output(checkpoint, ema, z, t, labels), wanted) < TOLERANCE


def test_rotary_tables_in_a_file_must_be_those_of_the_network(tmp_path):
    weights = jit_weights()
    turns = 1 / 10_000 ** (torch.arange(0, 8, 2) / 8)
    rows, columns = (torch.arange(16) // 4)[:, None] * turns, (torch.arange(16) % 4)[:, None] * turns
    angles = torch.cat((rows, columns), 1).repeat_interleave(2, 1)
    padded = torch.cat((torch.zeros(3, 16), angles))
    weights |= {"feat_rope.freqs_cos": angles.cos(), "feat_rope.freqs_sin": angles.sin()}
    weights |= {"feat_rope_incontext.freqs_cos": padded.cos(), "feat_rope_incontext.freqs_sin": padded.sin()}
    imported(tmp_path, {"model_ema1": weights})
    shutil.rmtree(tmp_path / "run")
    weights["feat_rope_incontext.freqs_sin"] = padded.cos()
    assert "feat_rope_incontext.freqs_sin holds other rotary positions" in refusal(tmp_path, {"model_ema1": weights})
    weights["feat_rope_incontext.freqs_sin"] = angles.sin()
    assert "has the shape (16, 16) instead of (19, 16)" in refusal(tmp_path, {"model_ema1": weights})


def test_the_block_of_jits_class_tokens_can_be_chosen(tmp_path):
    weights = jit_weights()
    checkpoint = imported(tmp_path, {"model_ema1": weights}, context_start=4)
    z, t, labels = torch.randn(2, 3, 16, 16), torch.tensor([0.3, 0.8]), torch.tensor([1, 2])
    wanted = jit_forward(weights, z, t, labels, start=4)
    assert relative_error(output(checkpoint, "", z, t, labels), wanted) < TOLERANCE
    shutil.rmtree(tmp_path / "run")
    assert "context_start must be one of the 6 blocks" in refusal(tmp_path, {"model_ema1": weights}, context_start=6)


@pytest.mark.parametrize(("depth", "start"), [(12, 4), (24, 8), (32, 10)])
def test_class_tokens_enter_where_the_published_networks_have_them(tmp_path, depth, start):
    checkpoint = imported(tmp_path, {"model_ema1": jit_weights(depth=depth)})
    assert checkpoint.config.network.context_start == start


def test_a_jit_run_is_sampled(tmp_path):
    path = saved(tmp_path / "jit.pth", {"model_ema1": jit_weights()})
    run, out = str(tmp_path / "run"), str(tmp_path / "samples")
    assert main(["import", str(path), "--out", run]) == 0
    assert main(["sample", "--checkpoint", run, "--out", out, "--num", "2", "--steps", "2"]) == 0


def test_positions_that_contradict_the_size_of_the_images_are_refused(tmp_path):
    content = {"model_ema1": jit_weights(), "args": argparse.Namespace(img_size=32)}
    assert "pos_embed has 16 positions, and images of 32 pixels" in refusal(tmp_path, content)
    content = {"model_ema1": {**jit_weights(), "pos_embed": torch.zeros(1, 15, 32)}}
    assert "15 positions, which are not those of a square" in refusal(tmp_path, content)


# Other architectures


def changed(name, value):
    content = authors_content()
    content["model_ema1"][name] = value
    return content


def test_a_renamed_parameter_is_named(tmp_path):
    content = authors_content()
    weights = content["model_ema2"]
    weights["net.blocks.1.attn.projection.weight"] = weights.pop("net.blocks.1.attn.proj.weight")
    sentence = refusal(tmp_path, content)
    assert "in model_ema2, blocks.1.attn.proj.weight is missing" in sentence
    assert "'blocks.1.attn.projection.weight' in its place" in sentence


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_a_prefix_before_the_names_is_shown(tmp_path, prefix):
    content = authors_content()
    content["model"] = {f"{prefix}{name}": weight for name, weight in content["model"].items()}
    sentence = refusal(tmp_path, content)
    assert f"x_embedder.proj.weight is missing. The file has '{prefix}net.x_embedder.proj.weight' in its" in sentence


@pytest.mark.parametrize(
    ("name", "shape", "wanted"),
    [
        ("blocks.1.mlp.w12.weight", (170, 31), (170, 32)),
        ("blocks.0.attn.qkv.weight", (64, 32), (96, 32)),
        ("y_embedder.embedding_table.weight", (6, 33), (6, 32)),
        ("final_layer.linear.weight", (9, 32), (8, 32)),
        ("x_embedder.proj.bias", (31,), (32,)),
        ("t_embedder.mlp.0.weight", (32, 255), (32, 256)),
    ],
)
def test_a_parameter_of_another_shape_is_named_with_both_shapes(tmp_path, name, shape, wanted):
    sentence = refusal(tmp_path, changed(f"net.{name}", torch.zeros(shape)))
    assert f"in model_ema1, {name} has the shape {shape} instead of {wanted}" in sentence


def test_missing_and_unexpected_parameters_are_named(tmp_path):
    assert "'blocks.0.gate' is unexpected" in refusal(tmp_path, changed("net.blocks.0.gate", torch.zeros(2)))
    for name in ("x_embedder.proj.weight", "blocks.0.attn.q_norm.weight", "final_layer.norm_final.weight"):
        content = authors_content()
        del content["model"][f"net.{name}"]
        assert f"in model, {name} is missing" in refusal(tmp_path, content)
    assert "x_embedder.proj.weight has the shape (32, 8), and 4 axes are expected" in refusal(
        tmp_path, changed("net.x_embedder.proj.weight", torch.zeros(32, 8))
    )


def test_blocks_that_run_several_times_are_refused(tmp_path):
    assert "args.loop_count is above 1" in refusal(tmp_path, authors_content(loop_indices="0,1", loop_count=3))
    assert imported(tmp_path, authors_content(loop_indices="", loop_count=3)).step == 1234


# Hostile and damaged files


class Planted:
    """A value whose unpickling would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("place", ["args", "optimizer", "model", "epoch"])
def test_no_code_of_a_file_runs_and_its_class_is_named(tmp_path, place):
    mark, content = tmp_path / "ran", authors_content()
    evil = Planted(mark)
    content[place] = {
        "args": argparse.Namespace(model="JLT-B/1", lr=evil),
        "optimizer": {"state": {0: evil}},
        "model": {"net.a": evil},
        "epoch": evil,
    }[place]
    assert re.search(r"holds \w+\.system, which is neither", refusal(tmp_path, content))
    (tmp_path / "plain.pth").write_bytes(pickle.dumps({"model": evil}))
    with pytest.raises(JLTError, match="is a pickle"):
        read(str(tmp_path / "plain.pth"), ImportConfig())
    torch.save(content, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(JLTError, match="is a pickle"):
        read(str(tmp_path / "old.pth"), ImportConfig())
    assert not mark.exists()


def test_another_class_in_the_settings_is_named(tmp_path):
    assert "holds zipfile.ZipFile, which is neither" in refusal(tmp_path, authors_content(out=zipfile.ZipFile))


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_one_sentence(tmp_path, share):
    path = saved(tmp_path / "a.pth", authors_content())
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(JLTError, match="truncated or damaged|not a file of PyTorch's"):
        read(str(path), ImportConfig())


def test_files_of_other_kinds_are_one_sentence(tmp_path):
    (tmp_path / "text").write_text("These are no weights.\n")
    save_file({"a": torch.zeros(2)}, tmp_path / "a.safetensors")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("letter", "no weights")
    with zipfile.ZipFile(tmp_path / "packed.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", "0" * 1000)
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"state_dict": {}}, tmp_path / "dictionary.pth")
    for name, sentence in {
        "absent": "does not exist",
        "text": "is not a file of PyTorch's",
        "a.safetensors": "is a safetensors file",
        "other.zip": "is damaged, or no file of PyTorch's",
        "packed.zip": "is compressed",
        "list.pth": "holds no dictionary but list",
        "dictionary.pth": "holds none of model, model_ema1, model_ema2",
        ".": "is no folder of `jlt export`",
    }.items():
        with pytest.raises(JLTError, match=sentence):
            read(str(tmp_path / name), ImportConfig())


def test_a_shape_that_claims_more_than_its_file_is_refused(tmp_path):
    wide = torch.zeros(1).expand(10**9, 10**3)
    assert "as no plain tensor" in refusal(tmp_path, changed("net.blocks.0.norm1.weight", wide))
    one, content = torch.zeros(400_000), authors_content()
    content["model"] |= {f"net.blocks.{index}.norm1.weight": one for index in range(2, 400)}
    assert "the tensors in model claim" in refusal(tmp_path, content)


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("img_size", 10**9, "args.img_size is 1e\\+09, and a whole number from 0 to 4096"),
        ("img_size", 100, "100 pixels a side, which is no multiple of the 16"),
        ("P_mean", "low", "args.P_mean is 'low', and a number"),
        ("P_std", -1, "P_std must be above 0"),
        ("noise_scale", float("nan"), "args.noise_scale is nan"),
        ("lr", 10**400, "args.lr is a number of 1329 bits, and a number"),
        ("flow_matching", 1, "args.flow_matching is 1, and True or False"),
        ("P_mean", torch.zeros(3), "args.P_mean is Tensor, and a number"),
        ("flow_matching", "yes", "args.flow_matching is 'yes'"),
        ("ema_decay1", 0.99, "ema names an average twice"),
        ("ema_decay1", 2.0, "ema must be above 0 and below 1"),
        ("t_eps", [1], "args.t_eps is list"),
    ],
)
def test_settings_without_meaning_are_named(tmp_path, name, value, sentence):
    assert re.search(sentence, refusal(tmp_path, authors_content(**{name: value})))


def test_counts_without_meaning_count_nothing(tmp_path):
    content = {**authors_content(), "epoch": [1]}
    for step in ([1], float("nan"), torch.zeros(2), "many", 10**400, True):
        content["optimizer"] = {"state": {0: {"step": step}}}
        checkpoint = imported(tmp_path, content)
        assert (checkpoint.step, checkpoint.read_state().imported["step_counts"]) == (0, "nothing")
        shutil.rmtree(tmp_path / "run")


@pytest.mark.parametrize("value", [float("nan"), 1e300])
def test_weights_that_are_not_finite_are_refused(tmp_path, value):
    content = authors_content()
    weights = content["model_ema2"]["net.final_layer.linear.weight"].double()
    weights[1, 2] = value
    content["model_ema2"]["net.final_layer.linear.weight"] = weights
    assert "holds values that are not finite in final_layer.linear.weight of model_ema2" in refusal(tmp_path, content)


def test_pixels_are_recognised(tmp_path):
    checkpoint = imported(tmp_path, authors_content(vae_type="identity", img_size=4))
    assert (checkpoint.config.network.height, checkpoint.latents["autoencoder"]["name"]) == (4, "pixels")


def test_an_unknown_autoencoder_that_a_file_states_is_reported(tmp_path):
    checkpoint = imported(tmp_path, authors_content(vae_type="sdxl" + 100 * "l"))
    assert checkpoint.latents["autoencoder"]["name"] == "flux2"
    assumed = checkpoint.read_state().imported["assumed"]
    assert assumed == {"autoencoder": f"flux2 for args.vae_type {('sdxl' + 36 * 'l')!r}"}
    shutil.rmtree(tmp_path / "run")
    named = imported(tmp_path, authors_content(vae_type="sdxl"), autoencoder="flux2")
    assert named.read_state().imported["assumed"] == {}


def test_sizes_in_the_settings_allocate_nothing(tmp_path):
    checkpoint = imported(tmp_path, authors_content(hidden_size=10**9, depth=10**9, class_num=10**9, model="X" * 10**6))
    assert checkpoint.config.network.hidden_size == 32


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_settings_of_another_kind_are_refused(tmp_path):
    assert "last.pth cannot be imported: args is list" in refusal(tmp_path, {**authors_content(), "args": [1]})
    assert "holds int as 'net.a' in model" in refusal(tmp_path, {**authors_content(), "model": {"net.a": 1}})
    assert "no named tensors as model" in refusal(tmp_path, {**authors_content(), "model": [1]})
    whole = {"net.a": torch.zeros(2, dtype=torch.int8)}
    assert "as no plain tensor" in refusal(tmp_path, {**authors_content(), "model": whole})
    ragged = {"net.a": torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])}
    assert "as no plain tensor" in refusal(tmp_path, {**authors_content(), "model": ragged})


def test_flipped_bytes_never_raise_anything_but_a_sentence(tmp_path):
    path = saved(tmp_path / "a.pth", authors_content())
    whole = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        start = archive.getinfo("a/data.pkl").header_offset
        size = archive.getinfo("a/data.pkl").file_size
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        place = start + int(torch.randint(size, (), generator=generator))
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(torch.randint(8, (), generator=generator))
        path.write_bytes(damaged)
        with contextlib.suppress(JLTError):
            dict(read(str(path), ImportConfig()).weights)


# The folder


def test_the_same_import_again_is_recognised_and_others_are_refused(tmp_path):
    first = imported(tmp_path, authors_content())
    (first.run / "samples").mkdir()
    stamp = (first.folder / MANIFEST).stat().st_mtime_ns
    assert imported(tmp_path, authors_content()).sha256 == first.sha256
    assert (first.folder / MANIFEST).stat().st_mtime_ns == stamp
    with pytest.raises(JLTError, match="holds other work, which differs in: .*prediction: 'x' -> 'v'"):
        imported(tmp_path, authors_content(flow_matching=True))
    path = str(tmp_path / "checkpoint-last.pth")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "letter").write_text("mine")
    with pytest.raises(JLTError, match="holds other files, such as letter"):
        write_run(read(path, ImportConfig()), tmp_path / "taken")
    with pytest.raises(JLTError, match="is a file"):
        write_run(read(path, ImportConfig()), tmp_path / "taken" / "letter")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    assert write_run(read(path, ImportConfig()), tmp_path / "link").step == 1234


def test_an_interrupted_import_leaves_nothing_that_looks_like_a_run(tmp_path, monkeypatch):
    source = read(str(saved(tmp_path / "a.pth", authors_content())), ImportConfig())
    with monkeypatch.context() as patched:
        patched.setattr(importing, "save_checkpoint", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            write_run(source, tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]
    script = (
        "import os, sys; from jlt.cli.main import main; from jlt.interop import importing;"
        "importing.save_checkpoint = lambda *_: os.kill(os.getpid(), 9); main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", script, "import", str(tmp_path / "a.pth"), "--out", str(tmp_path / "run")]
    assert subprocess.run(command, capture_output=True, timeout=120, check=False).returncode == -9
    assert not (tmp_path / "run").exists()
    assert write_run(source, tmp_path / "run").step == 1234
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pth", "run"]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["checkpoints", "config.json"]


def test_a_file_of_the_hub_is_downloaded(tmp_path, monkeypatch):
    path, asked = saved(tmp_path / "a.pth", authors_content()), []

    def download(repository, name):
        asked.append((repository, name))
        return str(path)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert main(["import", "hub:user/name/weights/last.pth", "--out", str(tmp_path / "run")]) == 0
    assert asked == [("user/name", "weights/last.pth")]
    assert open_checkpoint(tmp_path / "run").read_state().imported["source"] == "hub:user/name/weights/last.pth"
