"""Other coordinates of a latent space: the spectrum, the inverse, and a store in them."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch

from jlt.autoencoders.coordinates import CoordinateAutoencoder, Coordinates
from jlt.autoencoders.load import load_autoencoder
from jlt.config import SampleConfig
from jlt.errors import JLTError
from jlt.experiments.coordinate_stores import NAME, measure_coordinates, store_in_coordinates
from jlt.experiments.recipes import resolve_recipe
from jlt.geometry.covariance import TokenCovariance
from jlt.geometry.tokens import token_estimates
from jlt.latents.store import LatentStore, verify_store
from jlt.patches import patch_tokens, unpatchify
from jlt.sampling.sampler import matching_autoencoder, open_sampler
from jlt.training.checkpoint import open_checkpoint
from jlt.training.loop import train


def latents(count=500):
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(4, 4, generator=generator) * torch.logspace(0.3, -1.5, 4)
    white = torch.randn(count, 4, 4, 4, generator=generator)
    return torch.einsum("dc,nchw->ndhw", mix, white) + torch.arange(4.0)[:, None, None]


def spectrum(data, patch_size):
    tokens = TokenCovariance(data.shape[1], patch_size)
    tokens.update(data)
    return torch.linalg.eigvalsh(tokens.covariance), tokens


@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_tokens_are_joined_again(patch_size):
    data = latents(3)
    assert torch.equal(unpatchify(patch_tokens(data, patch_size), patch_size, 4, 4), data)


@pytest.mark.parametrize("patch_size", [1, 2])
@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 1.5])
def test_eigenvalues_are_raised_to_a_power_and_keep_their_sum(patch_size, power):
    data = latents()
    lam, tokens = spectrum(data, patch_size)
    coordinates = Coordinates.raised(tokens.covariance, tokens.mean, patch_size, power)
    changed, again = spectrum(coordinates.apply(data), patch_size)
    expected = lam**power
    np.testing.assert_allclose(changed, expected * lam.sum() / expected.sum(), rtol=2e-4)
    torch.testing.assert_close(again.mean, tokens.mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(coordinates.undo(coordinates.apply(data)), data, rtol=1e-4, atol=1e-4)
    if power == 1:
        torch.testing.assert_close(coordinates.apply(data), data, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.5])
def test_directions_without_variance_stay_as_they_are(power):
    data = latents()
    data[:, 3] = 0
    before, tokens = spectrum(data, 1)
    coordinates = Coordinates.raised(tokens.covariance, tokens.mean, 1, power)
    changed = coordinates.apply(data)
    after, _ = spectrum(changed, 1)
    assert float(after.sum()) == pytest.approx(float(before.sum()), rel=1e-5)
    raised = before[1:] ** power
    torch.testing.assert_close(after[1:], raised * before.sum() / raised.sum(), rtol=1e-4, atol=0)
    assert changed[:, 3].abs().max() < 1e-5
    torch.testing.assert_close(coordinates.undo(changed), data, rtol=1e-4, atol=1e-3)


def test_coordinates_that_float32_cannot_invert_are_refused():
    covariance = torch.diag(torch.logspace(0, -7, 8, dtype=torch.float64))
    mean = torch.zeros(8, dtype=torch.float64)
    with pytest.raises(JLTError, match="which float32 cannot invert: choose a power nearer to 1"):
        Coordinates.raised(covariance, mean, 1, 3.0)
    Coordinates.raised(covariance, mean, 1, 2.0)


def test_a_map_is_read_back_and_others_are_refused(tmp_path):
    _, tokens = spectrum(latents(), 2)
    coordinates = Coordinates.raised(tokens.covariance, tokens.mean, 2, 0.5)
    coordinates.save(tmp_path / "map.safetensors")
    found = Coordinates.load(tmp_path / "map.safetensors")
    assert (found.patch_size, found.anisotropy) == (2, 0.5)
    assert torch.equal(found.matrix, coordinates.matrix)
    (tmp_path / "text.safetensors").write_text("text")
    for name in ("text.safetensors", "missing.safetensors"):
        with pytest.raises(JLTError, match="holds no coordinates"):
            Coordinates.load(tmp_path / name)


@pytest.fixture(scope="module")
def digits(digit_latents):
    return LatentStore.open(digit_latents)


def test_a_store_in_other_coordinates_decodes_to_the_same_images(digits, tmp_path):
    whitened = store_in_coordinates(digits, tmp_path / "whitened", 1, 0.0)
    assert verify_store(tmp_path / "whitened") == []
    assert (len(whitened), whitened.class_names) == (len(digits), digits.class_names)
    assert whitened.manifest.dtype == "float32"
    assert np.array_equal(whitened.labels, digits.labels)
    lam = token_estimates(whitened, [1], "cpu")[1].eigenvalues
    np.testing.assert_allclose(lam, lam.mean(), rtol=1e-3)
    assert lam.sum() == pytest.approx(token_estimates(digits, [1], "cpu")[1].eigenvalues.sum(), rel=1e-4)
    numbers = np.arange(0, 1797, 100)
    plain, changed = (store.gather(numbers)[0].float() for store in (digits, whitened))
    decoder = matching_autoencoder(whitened.manifest.autoencoder, None, "cpu", folder=whitened.folder)
    assert isinstance(decoder, CoordinateAutoencoder)
    with torch.inference_mode():
        images = load_autoencoder("tiny").decode(plain)
        assert (decoder.decode(changed) - images).abs().max() < 1e-3
        again = decoder.encode(images)
    # The codec is lossy; the coordinates are not.
    assert (decoder.coordinates.undo(again) - load_autoencoder("tiny").encode(images)).abs().max() < 1e-3
    assert not list(tmp_path.glob(".*"))


def test_a_finished_store_is_kept_and_a_partial_one_is_written_again(digits, tmp_path, monkeypatch):
    left = tmp_path / f".whitened.{2**31 - 1}.partial"
    left.mkdir()
    (left / "shard-00000.safetensors").write_bytes(b"half")
    first = store_in_coordinates(digits, tmp_path / "whitened", 1, 0.0).manifest.sha256()
    monkeypatch.setattr("jlt.experiments.coordinate_stores._write", lambda *arguments: pytest.fail("written again"))
    assert store_in_coordinates(digits, tmp_path / "whitened", 1, 0.0).manifest.sha256() == first
    assert not left.exists()


def test_a_run_in_other_coordinates_is_sampled_wherever_it_and_its_store_are(digits, tmp_path):
    store = store_in_coordinates(digits, tmp_path / "whitened", 1, 0.0)
    network = dataclasses.replace(resolve_recipe("digits").network, hidden_size=16, depth=1, num_heads=2)
    config = dataclasses.replace(resolve_recipe("digits"), network=network, steps=1, batch_size=8)
    train(config, store, tmp_path / "run")
    drawn = [batch.images for batch in open_sampler(open_checkpoint(tmp_path / "run"), SampleConfig(num=2)).batches()]
    (tmp_path / "elsewhere").mkdir()
    shutil.rmtree(tmp_path / "whitened")
    (tmp_path / "run").rename(tmp_path / "elsewhere" / "moved")
    moved = open_sampler(open_checkpoint(tmp_path / "elsewhere" / "moved"), SampleConfig(num=2))
    assert torch.equal(drawn[0], next(moved.batches()).images)
    assert str(tmp_path) not in json.dumps(moved.protocol())


def test_coordinates_that_lead_out_of_a_run_are_refused(digits, tmp_path):
    store = store_in_coordinates(digits, tmp_path / "whitened", 1, 0.0)
    identity = json.loads(json.dumps(store.manifest.autoencoder))
    identity["normalisation"]["coordinates"]["source"] = f"../whitened/{NAME}"
    with pytest.raises(JLTError, match="leads out of"):
        matching_autoencoder(identity, None, "cpu", folder=tmp_path / "run")


def test_other_coordinates_are_another_autoencoder(digits, tmp_path):
    whitened = store_in_coordinates(digits, tmp_path / "whitened", 1, 0.0)
    identity = whitened.manifest.autoencoder
    coordinates = identity["normalisation"]["coordinates"]
    assert (coordinates["anisotropy"], coordinates["patch_size"]) == (0.0, 1)
    assert coordinates["source"] == NAME
    measure_coordinates(digits, 1, 0.5).save(tmp_path / "whitened" / NAME)
    with pytest.raises(JLTError, match="normalisation"):
        matching_autoencoder(identity, None, "cpu", folder=whitened.folder)
