"""TAEF2 against its public weights' own arithmetic, written out plainly here."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from data_helpers import Trap
from real_inputs import REAL, needs_real, photographs
from safetensors.torch import load_file, save_file
from torch.nn import functional

from jlt.autoencoders.contract import psnr
from jlt.autoencoders.load import load_autoencoder
from jlt.autoencoders.taef2 import TAEF2, load_taef2
from jlt.errors import JLTError


def random_weights(seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {name: value.half().contiguous() for name, value in TAEF2().state_dict().items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file(random_weights(), tmp_path / "taef2.safetensors")
    return tmp_path


class Plain:
    """The two networks as a list of named operations, in float64."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        self.weights = {name: value.double() for name, value in weights.items()}

    def conv(self, x: torch.Tensor, name: str, stride: int = 1, padding: int = 1) -> torch.Tensor:
        weight, bias = self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias")
        return functional.conv2d(x, weight, bias, stride, padding=padding)

    def block(self, x: torch.Tensor, name: str) -> torch.Tensor:
        if f"{name}.pool.0.weight" in self.weights:
            wide = self.conv(x, f"{name}.pool.0", padding=0)
            groups = wide.reshape(len(wide), 4, -1)
            std = (groups.var(2, keepdim=True, unbiased=False) + 1e-5).sqrt()
            normed = (groups - groups.mean(2, keepdim=True)) / std
            scale, shift = self.weights[f"{name}.pool.1.weight"], self.weights[f"{name}.pool.1.bias"]
            normed = normed.reshape(wide.shape) * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)
            x = x + self.conv(normed.relu(), f"{name}.pool.3", padding=0)
        inner = x
        for place in (0, 2):
            inner = self.conv(inner, f"{name}.conv.{place}").relu()
        return (x + self.conv(inner, f"{name}.conv.4")).relu()

    def encode(self, rgb: torch.Tensor) -> torch.Tensor:
        x = self.block(self.conv(rgb, "encoder.layers.0"), "encoder.layers.1")
        for first in (2, 6, 10):
            x = self.conv(x, f"encoder.layers.{first}", stride=2)
            for place in range(first + 1, first + 4):
                x = self.block(x, f"encoder.layers.{place}")
        z = self.conv(x, "encoder.layers.14")
        n, c, h, w = z.shape
        return z.reshape(n, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(n, 4 * c, h // 2, w // 2)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        n, c, h, w = latents.shape
        z = latents.reshape(n, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3).reshape(n, c // 4, 2 * h, 2 * w)
        x = self.conv(3 * torch.tanh(z / 3), "decoder.layers.0").relu()
        for first in (2, 7, 12):
            for place in range(first, first + 3):
                x = self.block(x, f"decoder.layers.{place}")
            x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
            x = self.conv(x, f"decoder.layers.{first + 4}")
        return self.conv(self.block(x, "decoder.layers.17"), "decoder.layers.18")


def assert_agrees(weights: dict[str, torch.Tensor], folder: Path, pixels: torch.Tensor) -> None:
    codec, plain = load_taef2(str(folder)), Plain(weights)
    rgb = pixels.permute(0, 3, 1, 2).double() / 255
    latents, expected = codec.encode((2 * rgb - 1).float()), plain.encode(rgb)
    assert (latents - expected).abs().max() <= 1e-4 * expected.abs().max()
    images, decoded = codec.decode(latents), plain.decode(expected)
    assert (images - (2 * decoded - 1).clamp(-1, 1)).abs().max() <= 1e-4 * 2


def test_both_directions_agree_with_a_plain_implementation(folder):
    pixels = torch.randint(0, 256, (2, 32, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert_agrees(random_weights(), folder, pixels)


@needs_real
def test_photographs_through_the_public_weights():
    pixels, _ = photographs("imagenet-samples", "train", 6)
    assert_agrees(load_file(REAL / "taef2" / "taef2.safetensors"), REAL / "taef2", pixels[:2, :128, :128])
    codec = load_autoencoder("taef2", str(REAL / "taef2"))
    images = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
    latents = codec.encode(images)
    assert latents.shape == (6, 128, 16, 16)
    assert 0.7 < latents.std() < 1
    assert psnr(images, codec.decode(latents)) > 22


def test_the_identity_names_the_weights_and_no_normalisation(folder):
    identity = load_autoencoder("taef2", str(folder)).identity()
    assert (identity["name"], identity["class"]) == ("taef2", "TAEF2")
    assert (identity["channels"], identity["downsampling"]) == (128, 16)
    assert identity["normalisation"] == {"kind": "none"}
    save_file(random_weights(1), folder / "taef2.safetensors")
    assert load_taef2(str(folder)).identity()["weights_sha256"] != identity["weights_sha256"]


def test_small_images_and_other_latents_are_refused(folder):
    codec = load_taef2(str(folder))
    with pytest.raises(JLTError, match="multiple of 16"):
        codec.encode(torch.zeros(1, 3, 8, 8))
    with pytest.raises(JLTError, match="Latents with 16 channels"):
        codec.decode(torch.zeros(1, 16, 4, 4))


@pytest.mark.parametrize(("channels", "name"), [(4, "TAESD"), (16, "TAEF1")])
def test_weights_of_older_tiny_autoencoders_are_named(folder, channels, name):
    weights = random_weights()
    weights["encoder.layers.14.weight"] = weights["encoder.layers.14.weight"][:channels].contiguous()
    weights["encoder.layers.14.bias"] = weights["encoder.layers.14.bias"][:channels].contiguous()
    save_file(weights, folder / "taef2.safetensors")
    with pytest.raises(JLTError, match=f"{name}.* {channels} latent channels: TAEF2 has 32"):
        load_taef2(str(folder))


def test_damaged_foreign_and_missing_weights_are_refused(folder, tmp_path):
    file = folder / "taef2.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(JLTError, match="could not be read as a file of weights"):
        load_taef2(str(folder))
    renamed = random_weights()
    renamed["encoder.layers.99.bias"] = renamed.pop("encoder.layers.0.bias")
    save_file(renamed, file)
    with pytest.raises(JLTError, match=r"1 missing, such as encoder\.layers\.0\.bias; 1 unexpected"):
        load_taef2(str(folder))
    with pytest.raises(JLTError, match="no folder with taef2.safetensors"):
        load_taef2(str(tmp_path / "nowhere" / "at" / "all"))


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path):
    (tmp_path / "taef2.pth").write_bytes(pickle.dumps(Trap(tmp_path / "ran")))
    with pytest.raises(JLTError, match=r"taef2\.pth"):
        load_taef2(str(tmp_path / "taef2.pth"))
    assert not (tmp_path / "ran").exists()
