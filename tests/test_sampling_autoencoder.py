"""The autoencoder that decodes samples: the one that made the latents, loaded again and compared with its identity."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from data_helpers import save_kl
from safetensors.torch import save_file

from jlt.autoencoders.coordinates import Coordinates
from jlt.autoencoders.load import load_autoencoder
from jlt.autoencoders.taef2 import TAEF2
from jlt.errors import JLTError
from jlt.sampling.sampler import matching_autoencoder
from jlt.storage.weights import ASSETS


@pytest.fixture
def kl_folder(tmp_path) -> Path:
    save_kl(tmp_path / "kl")
    return tmp_path / "kl"


def recorded(name, path=None, **changes):
    """The identity of an autoencoder as a checkpoint gives it back: through JSON."""
    return {**json.loads(json.dumps(load_autoencoder(name, path).identity())), **changes}


@pytest.mark.parametrize("name", ["tiny", "pixels"])
def test_bundled_autoencoders_are_found_by_name(name, capsys):
    found = matching_autoencoder(recorded(name), None, "cpu")
    assert found.identity() == recorded(name)
    assert capsys.readouterr().err == ""


def test_the_recorded_folder_is_used_again(kl_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    identity = recorded("kl", "kl")
    # Sampling starts in another folder.
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert matching_autoencoder(identity, None, "cpu").identity() == identity
    shutil.move(kl_folder, tmp_path / "moved")
    with pytest.raises(JLTError, match=r"kl has no config\.json.* --autoencoder-path"):
        matching_autoencoder(identity, None, "cpu")
    moved = matching_autoencoder(identity, str(tmp_path / "moved"), "cpu").identity()
    assert moved == {**identity, "source": str(tmp_path / "moved")}


def test_a_path_goes_before_the_recorded_folder(kl_folder, tmp_path):
    identity = recorded("kl", str(kl_folder))
    shutil.copytree(kl_folder, tmp_path / "copy")
    (kl_folder / "config.json").write_text("damaged")
    assert matching_autoencoder(identity, str(tmp_path / "copy"), "cpu").identity()["source"] == str(tmp_path / "copy")


def test_without_the_recorded_folder_the_usual_place_serves_if_its_weights_are_the_same(tmp_path):
    shutil.copytree(ASSETS / "tiny", tmp_path / "tiny")
    identity = recorded("tiny", str(tmp_path / "tiny"))
    assert matching_autoencoder(identity, None, "cpu").identity()["source"] == str(tmp_path / "tiny")
    shutil.rmtree(tmp_path / "tiny")
    assert matching_autoencoder(identity, None, "cpu").identity()["source"] == "bundled"
    with pytest.raises(JLTError, match="with weights_sha256 00, the one from bundled has .*--autoencoder-path"):
        matching_autoencoder({**identity, "weights_sha256": "00"}, None, "cpu")


def test_other_factors_with_the_same_weights_are_refused(kl_folder):
    """The factors are in config.json alone: the hash of the weights does not cover them."""
    identity = recorded("kl", str(kl_folder))
    config = json.loads((kl_folder / "config.json").read_text())
    (kl_folder / "config.json").write_text(json.dumps({**config, "scaling_factor": 0.13025}))
    assert recorded("kl", str(kl_folder))["weights_sha256"] == identity["weights_sha256"]
    with pytest.raises(JLTError, match="normalisation .*0.18215.* has .*0.13025"):
        matching_autoencoder(identity, None, "cpu")


def test_how_the_posterior_was_stored_does_not_matter(kl_folder):
    identity = recorded("kl", str(kl_folder), posterior="sample")
    assert matching_autoencoder(identity, None, "cpu").posterior == "mode"
    # Latents from before there was a choice do not record it.
    del identity["posterior"]
    matching_autoencoder(identity, None, "cpu")


def test_adopted_latents_are_decoded_unchecked_with_a_notice(kl_folder, capsys):
    adopted = recorded("kl", str(kl_folder), weights_sha256=None, normalisation={"kind": "as adopted"})
    assert matching_autoencoder(adopted, None, "cpu").channels == 4
    assert capsys.readouterr().err == (
        f"The latents record no weights of their autoencoder: those from {kl_folder} decode them unchecked.\n"
    )
    with pytest.raises(JLTError, match="with channels 16, .* has 4: name the right one"):
        matching_autoencoder({**adopted, "channels": 16}, None, "cpu")
    with pytest.raises(JLTError, match="with downsampling 8, .* has 4: name the right one"):
        matching_autoencoder({**adopted, "downsampling": 8}, None, "cpu")


@pytest.fixture
def taef2_folder(tmp_path) -> Path:
    torch.manual_seed(0)
    (tmp_path / "taef2").mkdir()
    save_file(TAEF2().state_dict(), tmp_path / "taef2" / "taef2.safetensors")
    return tmp_path / "taef2"


FLUX2 = {"name": "flux2", "source": "elsewhere", "weights_sha256": "00", "normalisation": {"kind": "batch_norm"}}


def test_latents_of_flux2_are_decoded_by_taef2(taef2_folder):
    identity = {**FLUX2, "channels": 128, "downsampling": 16}
    found = matching_autoencoder(identity, None, "cpu", f"taef2:{taef2_folder}")
    assert (found.name, found.channels) == ("taef2", 128)
    assert matching_autoencoder(identity, str(taef2_folder), "cpu", "taef2").identity() == found.identity()


def test_the_same_decoder_in_another_place_is_compared_with_the_latents(taef2_folder, tmp_path):
    identity = recorded("taef2", str(taef2_folder), source="elsewhere")
    assert matching_autoencoder(identity, None, "cpu", f"taef2:{taef2_folder}").source == str(taef2_folder)
    torch.manual_seed(1)
    save_file(TAEF2().state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(JLTError, match="with weights_sha256"):
        matching_autoencoder(identity, None, "cpu", f"taef2:{tmp_path / 'other.safetensors'}")


@pytest.mark.parametrize(
    ("decoder", "changes", "reason"),
    [
        ("taef2", {"name": "tiny", "channels": 16}, "taef2 cannot decode latents of tiny, which are of another"),
        ("kl", {}, "kl cannot decode latents of flux2"),
        ("pixels", {}, "pixels cannot decode latents of flux2"),
        ("taef2", {"channels": 64}, "taef2 has channels 128, the latents have 64"),
        ("taef3", {}, "taef3.*taef2"),
    ],
)
def test_a_decoder_of_another_latent_space_is_refused(taef2_folder, decoder, changes, reason):
    identity = {**FLUX2, "channels": 128, "downsampling": 16, **changes}
    place = str(taef2_folder) if decoder == "taef2" else None
    with pytest.raises(JLTError, match=reason):
        matching_autoencoder(identity, place, "cpu", decoder)


def test_a_place_that_is_named_twice_is_refused(taef2_folder):
    identity = {**FLUX2, "channels": 128, "downsampling": 16}
    with pytest.raises(JLTError, match="named twice"):
        matching_autoencoder(identity, "weights", "cpu", f"taef2:{taef2_folder}")


def test_a_decoder_decodes_latents_in_other_coordinates(taef2_folder, tmp_path):
    eye = torch.eye(128, dtype=torch.float64)
    Coordinates(1, 1.0, torch.zeros(128, dtype=torch.float64), 2 * eye).save(tmp_path / "coordinates.safetensors")
    normalisation = {"kind": "batch_norm", "coordinates": {"source": str(tmp_path / "coordinates.safetensors")}}
    identity = {**FLUX2, "channels": 128, "downsampling": 16, "normalisation": normalisation}
    found = matching_autoencoder(identity, None, "cpu", f"taef2:{taef2_folder}")
    latents = torch.randn(1, 128, 1, 1, generator=torch.Generator().manual_seed(0))
    expected = load_autoencoder("taef2", str(taef2_folder)).decode(latents)
    torch.testing.assert_close(found.decode(2 * latents), expected)
