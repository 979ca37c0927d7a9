"""AutoencoderKL against diffusers' own calls; what loading refuses, of both classes; samples; half precision."""

import json
import os
import pickle
import re
from pathlib import Path

import pytest
import torch
from data_helpers import SMALL_KL, Trap, save_kl, some_images
from safetensors.torch import load_file, save_file

from jlt.autoencoders.contract import Autoencoder
from jlt.autoencoders.load import load_autoencoder
from jlt.autoencoders.pretrained import WEIGHTS_FILE
from jlt.errors import JLTError, UsageError

# The configurations of Stable Diffusion 1, SDXL-like models with their own statistics, and FLUX.1.
STABLE_DIFFUSION = {"scaling_factor": 0.18215}
STATISTICS = {"scaling_factor": 0.5, "latents_mean": (-1.6, 1.1, -2.9, 0.3), "latents_std": (8.4, 5.9, 5.2, 3.7)}
FLUX1 = {"scaling_factor": 0.3611, "shift_factor": 0.1159, "use_quant_conv": False, "use_post_quant_conv": False}
# The shift is not used where there are statistics, as in diffusers' SDXL pipelines.
BOTH = {**STATISTICS, "shift_factor": 0.7}


@pytest.fixture
def folder(tmp_path) -> Path:
    save_kl(tmp_path / "model", **STABLE_DIFFUSION)
    return tmp_path / "model"


def explicit_latent(z, config):
    """The latent of z by the formulas in diffusers' pipelines of each model."""
    if config in (STATISTICS, BOTH):
        mean, std = (torch.tensor(config[name]).view(1, 4, 1, 1) for name in ("latents_mean", "latents_std"))
        return (z - mean) * config["scaling_factor"] / std
    return (z - config.get("shift_factor", 0)) * config["scaling_factor"]


@pytest.mark.parametrize("subfolder", ["", "vae"])
@pytest.mark.parametrize("config", [STABLE_DIFFUSION, STATISTICS, FLUX1, BOTH], ids=["sd", "stats", "flux1", "both"])
def test_encoding_is_the_mode_scaled_as_the_pipelines_of_diffusers_do(config, subfolder, tmp_path):
    vae = save_kl(tmp_path / subfolder, **config)
    autoencoder = load_autoencoder("kl", str(tmp_path))
    images = some_images()
    with torch.no_grad():
        mode = vae.encode(images).latent_dist.mode()
    latents = autoencoder.encode(images)
    torch.testing.assert_close(latents, explicit_latent(mode, config))
    assert (latents.shape, latents.dtype) == ((3, 4, 4, 6), torch.float32)
    assert (autoencoder.channels, autoencoder.downsampling) == (4, 4)


@pytest.mark.parametrize("config", [STABLE_DIFFUSION, STATISTICS, FLUX1, BOTH], ids=["sd", "stats", "flux1", "both"])
def test_decoding_inverts_the_scaling(config, tmp_path):
    vae = save_kl(tmp_path, **config)
    autoencoder = load_autoencoder("kl", str(tmp_path))
    z = torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(2)) * 3
    with torch.no_grad():
        expected = vae.decode(z).sample
    torch.testing.assert_close(autoencoder.decode(explicit_latent(z, config)), expected.clamp(-1, 1))
    vae.decoder.conv_out.bias.data += 5
    vae.save_pretrained(tmp_path)
    assert load_autoencoder("kl", str(tmp_path)).decode(z).eq(1).all(), "images are clamped"


def test_identity_contains_everything_that_decides_the_latents(tmp_path):
    def identity(posterior="mode", **config):
        save_kl(tmp_path / "model", **config)
        return load_autoencoder("kl", str(tmp_path / "model"), posterior=posterior).identity()

    plain = identity(**STABLE_DIFFUSION)
    assert json.loads(json.dumps(plain)) == plain
    assert (plain["class"], plain["channels"], plain["downsampling"]) == ("AutoencoderKL", 4, 4)
    assert plain["normalisation"] == {"kind": "scale", "scaling_factor": 0.18215, "shift_factor": None}
    assert identity("sample", **STABLE_DIFFUSION) == {**plain, "posterior": "sample"}
    other = identity(**STATISTICS)
    assert other["weights_sha256"] == plain["weights_sha256"], "the factors are no weights"
    assert other["normalisation"] == {
        "kind": "scale",
        "scaling_factor": 0.5,
        "shift_factor": None,
        "mean": [-1.6, 1.1, -2.9, 0.3],
        "std": [8.4, 5.9, 5.2, 3.7],
    }


def test_a_folder_has_one_source_however_it_is_written(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    sources = {load_autoencoder("kl", path).identity()["source"] for path in (str(folder), "model", "./model/../model")}
    assert sources == {str(folder)}


def test_weights_under_the_attention_names_of_older_files_are_read(tmp_path):
    """Stable Diffusion's first autoencoders, sd-vae-ft-mse among them, have these names."""
    vae = save_kl(tmp_path, **STABLE_DIFFUSION)
    before = load_autoencoder("kl", str(tmp_path)).identity()["weights_sha256"]
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    pattern = re.compile(r"\b(to_q|to_k|to_v|to_out\.0)\b")
    renamed = {pattern.sub(lambda name: older[name[0]], key): value for key, value in vae.state_dict().items()}
    assert "encoder.mid_block.attentions.0.proj_attn.weight" in renamed
    save_file(renamed, tmp_path / WEIGHTS_FILE, {"format": "pt"})
    assert load_autoencoder("kl", str(tmp_path)).identity()["weights_sha256"] == before


# ---- refusals ----


def test_arguments_that_do_not_fit_the_name(folder):
    with pytest.raises(UsageError, match="--autoencoder-path.*stabilityai/sd-vae-ft-mse"):
        load_autoencoder("kl")
    for name in ("flux2", "tiny", "pixels"):
        with pytest.raises(UsageError, match=f"{name}.* stores the mode"):
            load_autoencoder(name, posterior="sample")


def test_another_class_is_refused_in_both_directions(folder, tmp_path):
    from diffusers import AutoencoderKLFlux2

    AutoencoderKLFlux2(**SMALL_KL).save_pretrained(tmp_path / "flux2")
    with pytest.raises(JLTError, match="class AutoencoderKLFlux2, not AutoencoderKL:"):
        load_autoencoder("kl", str(tmp_path / "flux2"))
    with pytest.raises(JLTError, match="class AutoencoderKL, not AutoencoderKLFlux2:"):
        load_autoencoder("flux2", str(folder))
    # With a wrong class in its configuration, or none, the folder still has the other class's weights.
    edit_config(tmp_path / "flux2", _class_name="AutoencoderKL")
    with pytest.raises(JLTError, match="not an AutoencoderKL: 3 weights do not match, 'bn"):
        load_autoencoder("kl", str(tmp_path / "flux2"))


def edit_config(folder: Path, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture(params=["kl", "flux2"])
def either(request, folder, tmp_path) -> tuple[str, Path]:
    """The name and the folder of an autoencoder of each class."""
    if request.param == "flux2":
        from diffusers import AutoencoderKLFlux2

        folder = tmp_path / "flux2"
        AutoencoderKLFlux2(**SMALL_KL).save_pretrained(folder)
    return request.param, folder


@pytest.mark.parametrize(
    ("either", "lost"),
    [
        ("kl", "encoder.conv_in.weight"),
        ("kl", "decoder.mid_block.attentions.0.to_q.bias"),
        ("flux2", "decoder.conv_in.weight"),
        ("flux2", "bn.running_var"),
    ],
    indirect=["either"],
)
def test_a_missing_weight_is_refused_and_not_filled_with_random_numbers(either, lost):
    name, folder = either
    weights = load_file(folder / WEIGHTS_FILE)
    del weights[lost]
    save_file(weights, folder / WEIGHTS_FILE, {"format": "pt"})
    with pytest.raises(JLTError, match=re.escape(lost)):
        load_autoencoder(name, str(folder))


@pytest.mark.parametrize("kept", [-1000, 100, 0])
def test_truncated_weights_are_refused(either, kept):
    name, folder = either
    weights = folder / WEIGHTS_FILE
    weights.write_bytes(weights.read_bytes()[:kept])
    with pytest.raises(JLTError, match="could not be loaded"):
        load_autoencoder(name, str(folder))


def test_a_damaged_configuration_is_refused(folder):
    whole = (folder / "config.json").read_text()
    for text, reason in ((whole[:100], "JSON"), ("", "JSON"), ("[]", "no JSON object"), ("not json", "JSON")):
        (folder / "config.json").write_text(text)
        with pytest.raises(JLTError, match=f"could not be loaded .*{reason}"):
            load_autoencoder("kl", str(folder))
    for changes in (
        {"block_out_channels": [8, 8]},
        {"block_out_channels": "many"},
        {"block_out_channels": [16, 16, 16]},
        {"down_block_types": ["NoSuchBlock"] * 3},
        {"latent_channels": 8},
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
    ):
        (folder / "config.json").write_text(whole)
        edit_config(folder, **changes)
        with pytest.raises(JLTError, match="could not be loaded") as refusal:
            load_autoencoder("kl", str(folder))
        assert len(str(refusal.value)) < 800
        assert "\n" not in str(refusal.value), "one sentence"
    (folder / "config.json").write_text(whole)
    edit_config(folder, latents_mean=[0.0], latents_std=[1.0])
    with pytest.raises(JLTError, match="4 latent channels but 1 means and 1 deviations"):
        load_autoencoder("kl", str(folder))


def test_an_autoencoder_of_other_images_is_refused(tmp_path):
    save_kl(tmp_path, in_channels=4)
    with pytest.raises(JLTError, match="images of 4 channels"):
        load_autoencoder("kl", str(tmp_path))


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", WEIGHTS_FILE, "index"])
def test_a_pickle_is_refused_without_running_it(either, name):
    kind, folder = either
    sprung = folder / "sprung"
    (folder / WEIGHTS_FILE).unlink()
    if name == "index":
        # The list of a model's files can name any file.
        index = {"metadata": {"total_size": 1}, "weight_map": {"encoder.conv_in.weight": "weights.bin"}}
        (folder / f"{WEIGHTS_FILE}.index.json").write_text(json.dumps(index))
        name = "weights.bin"
    (folder / name).write_bytes(pickle.dumps(Trap(sprung)))
    with pytest.raises(JLTError, match="could not be loaded"):
        load_autoencoder(kind, str(folder))
    assert not sprung.exists()
    pickle.loads(pickle.dumps(Trap(sprung)))
    assert sprung.exists(), "the trap works"


def test_weights_in_a_pickle_are_not_read_even_if_they_are_right(folder):
    weights = load_file(folder / WEIGHTS_FILE)
    (folder / WEIGHTS_FILE).unlink()
    torch.save(weights, folder / "diffusion_pytorch_model.bin")
    with pytest.raises(JLTError, match="no file named diffusion_pytorch_model.safetensors"):
        load_autoencoder("kl", str(folder))


# ---- the Hub, from its cache: the tests are offline ----


@pytest.mark.parametrize("subfolder", ["", "vae"])
def test_a_hub_id_holds_the_model_in_itself_or_under_vae(subfolder, tmp_path, monkeypatch):
    repository = tmp_path / "models--someone--something"
    vae = save_kl(repository / "snapshots" / ("a" * 40) / subfolder, **STABLE_DIFFUSION)
    if subfolder:
        (repository / "snapshots" / ("a" * 40) / "model_index.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    autoencoder = load_autoencoder("kl", "someone/something")
    assert autoencoder.identity()["source"] == "someone/something"
    images = some_images()
    with torch.no_grad():
        mode = vae.encode(images).latent_dist.mode()
    torch.testing.assert_close(autoencoder.encode(images), mode * 0.18215)


# ---- samples of the posterior ----


@pytest.fixture
def sampling(tmp_path) -> Autoencoder:
    save_kl(tmp_path / "model", **FLUX1)
    return load_autoencoder("kl", str(tmp_path / "model"), posterior="sample")


def test_a_sample_belongs_to_the_image_and_not_to_the_batch(sampling):
    images, seeds = some_images(7), [5, 2**63 - 1, 0, 11, 3, 8, 4]
    whole = sampling.encode(images, seeds)
    for parts in ([1] * 7, [2, 5], [6, 1]):
        starts = [sum(parts[:i]) for i in range(len(parts))]
        split = [sampling.encode(images[a : a + n], seeds[a : a + n]) for a, n in zip(starts, parts, strict=True)]
        torch.testing.assert_close(torch.cat(split), whole)
    order = [3, 1, 6, 0, 5, 2, 4]
    torch.testing.assert_close(sampling.encode(images[order], [seeds[i] for i in order]), whole[order])
    assert torch.equal(sampling.encode(images, seeds), whole)
    other = sampling.encode(images, [seed ^ 1 for seed in seeds])
    assert (other != whole).flatten(1).any(1).all()
    # An image under two seeds, and two images under one, differ.
    twice = sampling.encode(images[[0, 0]], [1, 2])
    assert not torch.allclose(twice[0], twice[1])


def test_samples_have_the_mean_and_variance_of_the_posterior(sampling, tmp_path):
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(tmp_path / "model", low_cpu_mem_usage=False)
    image, count = some_images(1, 8, 8), 4000
    with torch.no_grad():
        posterior = vae.encode(image).latent_dist
    drawn = torch.cat([sampling.encode(image.expand(500, -1, -1, -1), range(i, i + 500)) for i in range(0, count, 500)])
    mean = (posterior.mean - 0.1159) * 0.3611
    std = posterior.std * 0.3611
    assert std.max() / std.min() > 1.5, "a test of one deviation everywhere would prove less"
    score = (drawn - mean) / std
    # 16 values, each the mean of 4000: five standard errors; those of a variance are sqrt(2 / count).
    assert score.mean(0).abs().max() < 5 / count**0.5
    assert (score.var(0) - 1).abs().max() < 5 * (2 / count) ** 0.5
    # Independent between the values of an image, which share a seed.
    correlation = torch.corrcoef(score.flatten(1).T) - torch.eye(16)
    assert correlation.abs().max() < 5 / count**0.5


def test_a_codec_that_samples_needs_one_seed_for_each_image(sampling, folder):
    images = some_images(3)
    for seeds in (None, [1], [1, 2, 3, 4]):
        with pytest.raises(ValueError, match="3 images need 3 noise seeds"):
            sampling.encode(images, seeds)
    mode = load_autoencoder("kl", str(folder))
    assert torch.equal(mode.encode(images, [1, 2, 3]), mode.encode(images)), "a mode needs none and ignores them"
    pixels = load_autoencoder("pixels")
    assert torch.equal(pixels.encode(images, [1, 2, 3]), images)


def test_every_identity_states_the_posterior(folder):
    for name, path in (("tiny", None), ("pixels", None), ("kl", str(folder))):
        autoencoder = load_autoencoder(name, path)
        assert autoencoder.posterior == autoencoder.identity()["posterior"] == "mode"


# ---- half precision ----


def under_autocast(function, *arguments):
    with torch.autocast("cpu", torch.bfloat16):
        return function(*arguments)


@pytest.mark.parametrize("name", ["tiny", "kl"])
def test_under_autocast_latents_stay_float32_and_close(name, folder):
    autoencoder = load_autoencoder(name, str(folder) if name == "kl" else None)
    images = some_images(4, 32, 32)
    exact, rounded = autoencoder.encode(images), under_autocast(autoencoder.encode, images)
    assert rounded.dtype == torch.float32
    # bfloat16 rounds by at most half its epsilon of 2**-7, in each of some twenty layers; errors add up as a walk.
    tolerance = 20**0.5 * torch.finfo(torch.bfloat16).eps
    assert 0 < (rounded - exact).square().mean().sqrt() < tolerance * exact.std()
    images, decoded = autoencoder.decode(exact), under_autocast(autoencoder.decode, exact)
    assert decoded.dtype == torch.float32
    assert 0 < (decoded - images).square().mean().sqrt() < tolerance * images.std()


def test_autocast_ends_before_the_normalisation(tmp_path):
    """Subtracting a mean of 1000 from values near it leaves nothing of them in bfloat16, whose steps are 4 there."""
    vae = save_kl(tmp_path, latents_mean=(1000.0,) * 4, latents_std=(0.25,) * 4, scaling_factor=1.0)
    autoencoder = load_autoencoder("kl", str(tmp_path), posterior="sample")
    images = some_images(2)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        distribution = vae.encode(images).latent_dist
    assert distribution.mean.dtype == torch.bfloat16
    noise = torch.stack([torch.randn(4, 4, 6, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)])
    z = distribution.mean.double() + (0.5 * distribution.logvar.double()).exp() * noise
    # Steps of float32 near 1000 are 6e-5; the deviation divides by a quarter.
    latents = under_autocast(autoencoder.encode, images, [1, 2])
    torch.testing.assert_close(latents.double(), (z - 1000) / 0.25, rtol=0, atol=1e-3)


def test_an_unreachable_hub_is_reported_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(address: tuple[str, int], timeout: float) -> None:
        raise OSError(f"no way to {address[0]}")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("jlt.storage.weights.getproxies", dict)
    monkeypatch.setattr("socket.create_connection", unreachable)
    with pytest.raises(JLTError, match=r"unknown/nothing is not a local folder, and the Hub at \S+ cannot be reached"):
        load_autoencoder("kl", "unknown/nothing")
