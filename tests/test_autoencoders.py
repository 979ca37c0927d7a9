"""The codecs against diffusers' own model and explicit index arithmetic; the bundled one against what it states."""

import json
import pickle
import re
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from jlt.autoencoders.contract import Autoencoder, psnr
from jlt.autoencoders.load import load_autoencoder
from jlt.autoencoders.pretrained import WEIGHTS_FILE
from jlt.errors import JLTError
from jlt.evaluation.extractors import digit_split
from jlt.storage.weights import ASSETS, read_metadata, save_weights, weights_sha256

# Nothing in it is bundled: other depths, widths and statistics than `tiny`.
SMALL = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (8, 8),
    "layers_per_block": 1,
    "latent_channels": 2,
    "norm_num_groups": 4,
    "mid_block_add_attention": True,
    "batch_norm_eps": 0.5,
}


@pytest.fixture(scope="module")
def small_vae():
    from diffusers import AutoencoderKLFlux2

    torch.manual_seed(0)
    vae = AutoencoderKLFlux2(**SMALL).eval()
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 4)
    return vae


@pytest.fixture
def small_folder(small_vae, tmp_path) -> Path:
    small_vae.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def some_images(count=3, height=16, width=24):
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("subfolder", ["", "vae"])
def test_encoding_is_mode_then_pixels_to_channels_then_batch_norm(small_vae, tmp_path, subfolder):
    small_vae.save_pretrained(tmp_path / "model" / subfolder)
    autoencoder = load_autoencoder("flux2", str(tmp_path / "model"))
    images = some_images()
    with torch.no_grad():
        mode = small_vae.encode(images).latent_dist.mode()
    count, channels, height, width = mode.shape
    packed = mode.view(count, channels, height // 2, 2, width // 2, 2).permute(0, 1, 3, 5, 2, 4)
    packed = packed.reshape(count, 4 * channels, height // 2, width // 2)
    mean, variance = (x.view(1, -1, 1, 1) for x in (small_vae.bn.running_mean, small_vae.bn.running_var))
    torch.testing.assert_close(autoencoder.encode(images), (packed - mean) / (variance + 0.5).sqrt())
    assert (autoencoder.channels, autoencoder.downsampling) == (8, 4)


def test_decoding_is_the_exact_reverse(small_vae, small_folder):
    autoencoder = load_autoencoder("flux2", str(small_folder))
    latents = torch.randn(2, 8, 3, 5, generator=torch.Generator().manual_seed(2)) * 3
    mean, variance = (x.view(1, -1, 1, 1) for x in (small_vae.bn.running_mean, small_vae.bn.running_var))
    packed = latents * (variance + 0.5).sqrt() + mean
    mode = packed.view(2, 2, 2, 2, 3, 5).permute(0, 1, 4, 2, 5, 3).reshape(2, 2, 6, 10)
    with torch.no_grad():
        expected = small_vae.decode(mode).sample
    torch.testing.assert_close(autoencoder.decode(latents), expected.clamp(-1, 1))
    far = autoencoder.decode(latents * 100)
    assert far.abs().max() == 1, "images are clamped"


def test_images_and_latents_that_do_not_fit_are_refused(small_folder):
    autoencoder = load_autoencoder("flux2", str(small_folder))
    with pytest.raises(JLTError, match="16x26 pixels .* multiple of 4"):
        autoencoder.encode(some_images(width=26))
    with pytest.raises(JLTError, match="16 channels .* which has 8"):
        autoencoder.decode(torch.zeros(1, 16, 4, 4))


def test_identity_follows_the_weights_and_not_their_place(small_folder, tmp_path):
    identity = load_autoencoder("flux2", str(small_folder)).identity()
    assert json.loads(json.dumps(identity)) == identity
    assert identity["class"] == "AutoencoderKLFlux2"
    assert identity["source"] == str(small_folder)
    shutil.copytree(small_folder, tmp_path / "elsewhere" / "vae")
    moved = load_autoencoder("flux2", str(tmp_path / "elsewhere")).identity()
    assert moved["weights_sha256"] == identity["weights_sha256"]
    weights = load_file(small_folder / WEIGHTS_FILE)
    for name in ("bn.running_mean", "encoder.conv_in.weight"):
        changed = {**weights, name: weights[name].clone()}
        changed[name].view(-1)[0] += 1e-3
        save_file(changed, tmp_path / "elsewhere" / "vae" / WEIGHTS_FILE, {"format": "pt"})
        other = load_autoencoder("flux2", str(tmp_path / "elsewhere")).identity()
        assert other["weights_sha256"] != identity["weights_sha256"], name


def test_weight_hash_sees_names_shapes_types_and_bytes():
    weights = {"a": torch.arange(4.0), "b": torch.tensor(1)}
    variants = [
        weights,
        {"a": torch.arange(4.0), "c": torch.tensor(1)},
        {"a": torch.arange(4.0).view(2, 2), "b": torch.tensor(1)},
        {"a": torch.arange(4.0).view(torch.int32), "b": torch.tensor(1)},
        {"a": torch.arange(4.0) + 1e-6, "b": torch.tensor(1)},
    ]
    assert len({weights_sha256(variant) for variant in variants}) == len(variants)
    backwards = {"b": torch.tensor(1), "a": torch.arange(8.0)[::2] / 2}
    assert weights_sha256(backwards) == weights_sha256(weights), "order and memory layout do not matter"


@pytest.mark.parametrize("lost", ["bn.running_var", "decoder.conv_in.weight"])
def test_a_missing_weight_is_refused_and_not_filled_with_random_numbers(small_folder, lost):
    weights = load_file(small_folder / WEIGHTS_FILE)
    del weights[lost]
    save_file(weights, small_folder / WEIGHTS_FILE, {"format": "pt"})
    with pytest.raises(JLTError, match=re.escape(lost)):
        load_autoencoder("flux2", str(small_folder))


def test_another_class_of_autoencoder_is_refused(tmp_path):
    from diffusers import AutoencoderKL

    names = ("down_block_types", "up_block_types", "block_out_channels", "latent_channels", "norm_num_groups")
    AutoencoderKL(**{name: SMALL[name] for name in names}).save_pretrained(tmp_path)
    with pytest.raises(JLTError, match="class AutoencoderKL, not AutoencoderKLFlux2"):
        load_autoencoder("flux2", str(tmp_path))


def test_damaged_weights_and_pickles_are_refused(small_folder, tmp_path):
    weights = small_folder / WEIGHTS_FILE
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(JLTError, match="could not be loaded"):
        load_autoencoder("flux2", str(small_folder))
    weights.unlink()

    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "sprung",))

    (small_folder / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(JLTError, match="could not be loaded"):
        load_autoencoder("flux2", str(small_folder))
    assert not (tmp_path / "sprung").exists()


def test_paths_without_an_autoencoder(tmp_path):
    (tmp_path / "empty").mkdir()
    for path in (str(tmp_path / "empty"), str(tmp_path / "missing"), "missing"):
        with pytest.raises(JLTError, match=r"no config\.json"):
            load_autoencoder("flux2", path)
    # The test environment is offline: an id of the Hub fails with one sentence too.
    with pytest.raises(JLTError, match="organisation/name could not be loaded"):
        load_autoencoder("flux2", "organisation/name")


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(JLTError, match="did you mean flux2"):
        load_autoencoder("flux")
    with pytest.raises(JLTError, match="no weights"):
        load_autoencoder("pixels", "somewhere")


def test_pixels_are_their_own_latents():
    autoencoder = load_autoencoder("pixels")
    images = some_images(height=5, width=7)
    assert torch.equal(autoencoder.encode(images), images)
    assert torch.equal(autoencoder.decode(images * 2), (images * 2).clamp(-1, 1))
    assert autoencoder.identity()["normalisation"] == {"kind": "none"}
    assert (autoencoder.channels, autoencoder.downsampling) == (3, 1)
    with pytest.raises(JLTError, match="4 channels"):
        autoencoder.decode(torch.zeros(1, 4, 5, 7))


# ---- the bundled one ----


@pytest.fixture(scope="module")
def tiny() -> Autoencoder:
    return load_autoencoder("tiny")


@pytest.fixture(scope="module")
def digits():
    return tuple(to_float(part.images) for part in digit_split(32))


def to_float(images):
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def encode(autoencoder, images):
    return torch.cat([autoencoder.encode(batch) for batch in images.split(128)])


def decode(autoencoder, latents):
    return torch.cat([autoencoder.decode(batch) for batch in latents.split(128)])


def test_the_split_is_disjoint_complete_and_even():
    training, held_out = digit_split(8)
    assert len(training.labels) + len(held_out.labels) == 1797
    counts, held_counts = training.labels.bincount(), held_out.labels.bincount()
    assert torch.equal(held_counts, (counts + held_counts) // 6)


def test_tiny_is_small_and_stored_in_half_precision():
    path = ASSETS / "tiny" / WEIGHTS_FILE
    assert path.stat().st_size < 1_000_000
    kinds = {tensor.dtype for name, tensor in load_file(path).items() if not name.startswith("bn.")}
    assert kinds == {torch.float16}
    assert {"made_by", "seed", "held_out_psnr"} <= set(read_metadata(path))


def test_tiny_reconstructs_held_out_digits_as_well_as_it_states(tiny, digits):
    _, held_out = digits
    latents = encode(tiny, held_out)
    assert latents.shape[1:] == (16, 4, 4)
    measured = psnr(held_out, decode(tiny, latents))
    assert measured >= 40
    assert measured == pytest.approx(tiny.held_out_psnr, abs=0.1)
    # The output of a diffusion model is not exactly a latent.
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(3))
    assert psnr(held_out, decode(tiny, latents + 0.1 * noise)) >= 36


def test_tiny_latents_are_normalised_and_anisotropic(tiny, digits):
    latents = encode(tiny, digits[0]).double()
    variance, mean = torch.var_mean(latents, dim=(0, 2, 3), correction=0)
    assert mean.abs().max() < 1e-4
    assert (variance - 1).abs().max() < 1e-4
    eigenvalues = torch.linalg.eigvalsh(torch.cov(latents.permute(1, 0, 2, 3).flatten(1)))
    assert eigenvalues[-1] / eigenvalues[0] > 1000


def test_tiny_identity_does_not_depend_on_where_it_is_installed(tiny, tmp_path):
    identity = tiny.identity()
    assert (identity["name"], identity["source"], identity["class"]) == ("tiny", "bundled", "AutoencoderKLFlux2")
    assert str(ASSETS) not in json.dumps(identity)
    shutil.copytree(ASSETS / "tiny", tmp_path / "tiny")
    copied = load_autoencoder("tiny", str(tmp_path / "tiny"))
    assert copied.identity()["weights_sha256"] == identity["weights_sha256"]
    assert copied.held_out_psnr == tiny.held_out_psnr


def test_tiny_does_not_depend_on_the_batch(tiny, digits):
    images = digits[1][:20]
    torch.testing.assert_close(encode(tiny, images), torch.cat([tiny.encode(image[None]) for image in images]))


def test_psnr_of_known_errors():
    images = torch.zeros(2, 3, 4, 4)
    assert psnr(images, images) == float("inf")
    # A tenth of the range of 2 is a mean squared error of 0.01 of the squared peak: 20 dB.
    assert psnr(images, images + 0.2) == pytest.approx(20)
    # One perfect image of two halves the error: 3 dB and no more.
    images_and_one_off = torch.stack([images[0], images[1] + 0.2])
    assert psnr(images, images_and_one_off) == pytest.approx(23.01, abs=0.01)


def test_weights_are_rounded_but_statistics_are_not(tmp_path):
    weights = {"a.weight": torch.tensor([1.00001]), "bn.running_var": torch.tensor([1.00001]), "n": torch.tensor(70000)}
    save_weights(tmp_path / "w.safetensors", weights, {"made_by": "a test"})
    stored = load_file(tmp_path / "w.safetensors")
    assert stored["a.weight"].dtype == torch.float16
    assert torch.equal(stored["bn.running_var"], weights["bn.running_var"])
    assert stored["n"] == 70000
    assert read_metadata(tmp_path / "w.safetensors")["made_by"] == "a test"
    (tmp_path / "w.safetensors").write_bytes(b"not weights")
    with pytest.raises(JLTError, match="not a readable safetensors file"):
        read_metadata(tmp_path / "w.safetensors")


@pytest.fixture(scope="module")
def full_size():
    """FLUX.2's own configuration with random weights and statistics: the model, and the autoencoder from its file."""
    from diffusers import AutoencoderKLFlux2

    torch.manual_seed(0)
    vae = AutoencoderKLFlux2().eval()
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 4)
    # Not pytest's folder, which keeps the 336 MB of the last three runs.
    with tempfile.TemporaryDirectory() as folder:
        vae.save_pretrained(folder)
        yield vae, load_autoencoder("flux2", folder)


@pytest.mark.slow
def test_the_full_size_configuration_encodes_256_pixels_and_decodes_as_diffusers_does(full_size):
    vae, autoencoder = full_size
    assert sum(parameter.numel() for parameter in vae.parameters()) == pytest.approx(84e6, rel=0.01)
    images = some_images(1, 256, 256)
    latents = autoencoder.encode(images)
    assert latents.shape == (1, 128, 16, 16)
    with torch.no_grad():
        mode = vae.encode(images).latent_dist.mode()
        # A quarter of the image: decoding takes most of the time, and no layer has a fixed size.
        reconstructed = vae.decode(mode[..., :16, :16]).sample.clamp(-1, 1)
    assert mode.shape == (1, 32, 32, 32)
    packed = mode.view(1, 32, 16, 2, 16, 2).permute(0, 1, 3, 5, 2, 4).reshape(1, 128, 16, 16)
    mean, variance = (x.view(1, 128, 1, 1) for x in (vae.bn.running_mean, vae.bn.running_var))
    # Channels-last convolutions sum in another order, over some forty layers.
    torch.testing.assert_close(latents, (packed - mean) / (variance + 1e-4).sqrt(), rtol=1e-4, atol=1e-4)
    decoded = autoencoder.decode(latents[..., :8, :8])
    torch.testing.assert_close(decoded, reconstructed, rtol=1e-4, atol=3e-4)
    assert decoded.std() > 0.01, "an image without contrast would prove little"


def test_torchvision_is_not_imported(tiny):
    assert "torchvision" not in sys.modules
