"""DINOv2 as a feature extractor: random weights through the real files, against transformers and Pillow themselves."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import generator, random_images
from PIL import Image

from jlt.errors import JLTError
from jlt.evaluation.dinov2 import INPUT_SIZE, MEAN, STD, position_embeddings_for, resize_like_pillow
from jlt.evaluation.extractors import load_extractor

SIDE = INPUT_SIZE // 14


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small DINOv2 with the geometry of the real one, saved as transformers saves it."""
    transformers = pytest.importorskip("transformers", reason="the extra jlt[dino] is not installed")
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=3, image_size=14 * 37, patch_size=14
    )
    model = transformers.Dinov2Model(config)
    for name, tensor in model.named_parameters():
        # The model's own initial values are so small that layers hardly matter.
        torch.nn.init.normal_(tensor, std=0.2 if tensor.dim() > 1 else 0.5) if "norm" not in name else None
    path = tmp_path_factory.mktemp("dinov2")
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def extractor(folder):
    return load_extractor("dinov2", path=folder)


def cubic(distance: float) -> float:
    """The bicubic kernel by its definition, with a = -0.75."""
    d, a = abs(distance), -0.75
    if d <= 1:
        return (a + 2) * d**3 - (a + 3) * d**2 + 1
    return a * (d**3 - 5 * d**2 + 8 * d - 4) if d < 2 else 0.0


def test_features_are_the_class_token_of_transformers_own_model(folder, extractor):
    from transformers import Dinov2Model

    images = random_images(3, INPUT_SIZE, INPUT_SIZE)
    model = Dinov2Model.from_pretrained(folder).eval()
    positions = position_embeddings_for(model.embeddings.position_embeddings.detach(), SIDE)
    model.embeddings.position_embeddings = torch.nn.Parameter(positions)
    pixels = (images.numpy() / 255 - np.array(MEAN)) / np.array(STD)
    with torch.no_grad():
        expected = model(torch.tensor(pixels, dtype=torch.float32).permute(0, 3, 1, 2)).pooler_output
    found = extractor(images)
    torch.testing.assert_close(found.pooled, expected, rtol=1e-4, atol=1e-4)
    assert (found.logits, found.spatial, extractor.dimension) == (None, None, 48)
    assert found.pooled.std(dim=0).mean() > 0.01


def test_position_embeddings_are_scaled_by_side_and_a_tenth():
    trained = 37
    embeddings = torch.randn(1, 1 + trained**2, 2, generator=generator())
    scale = (SIDE + 0.1) / trained

    def weights(i: int) -> list[tuple[int, float]]:
        place = (i + 0.5) / scale - 0.5
        near = math.floor(place)
        return [(min(max(near + k, 0), trained - 1), cubic(place - near - k)) for k in range(-1, 3)]

    grid = embeddings[0, 1:].view(trained, trained, 2)
    expected = [
        sum(wy * wx * grid[y, x] for y, wy in weights(i) for x, wx in weights(j))
        for i in range(SIDE)
        for j in range(SIDE)
    ]
    found = position_embeddings_for(embeddings, SIDE)
    torch.testing.assert_close(found[0, 1:], torch.stack(expected), rtol=1e-4, atol=1e-4)
    assert torch.equal(found[:, :1], embeddings[:, :1])
    assert torch.equal(position_embeddings_for(found, SIDE), found)


@pytest.mark.parametrize("shape", [(32, 32), (256, 256), (333, 500), (224, 100)])
def test_resize_is_pillows_but_for_single_levels(shape):
    image = random_images(1, *shape)
    pillow = Image.fromarray(image[0].numpy()).resize((INPUT_SIZE, INPUT_SIZE), Image.Resampling.BICUBIC)
    difference = (resize_like_pillow(image, INPUT_SIZE)[0].permute(1, 2, 0).numpy() - np.asarray(pillow)).astype(int)
    assert np.abs(difference).max() <= 1
    assert (difference != 0).mean() < 0.01


def test_an_image_is_alone_in_its_batch_and_autocast_changes_nothing(extractor):
    images = random_images(3, 64, 64)
    together = extractor(images).pooled
    with torch.autocast("cpu", dtype=torch.bfloat16):
        alone = torch.cat([extractor(image[None]).pooled for image in images])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_identity_follows_the_weights_and_not_their_place(folder, extractor, tmp_path):
    from transformers import Dinov2Model

    Dinov2Model.from_pretrained(folder).save_pretrained(tmp_path / "copy")
    identity = extractor.identity()
    assert load_extractor("dinov2", path=tmp_path / "copy").identity() == identity
    assert identity["name"] == "dinov2"
    assert identity["dimension"] == 48
    json.dumps(identity)


def test_weights_that_cannot_be_loaded_are_named(folder, tmp_path, monkeypatch):
    from safetensors.torch import load_file, save_file

    for path in (None, "unknown/nothing"):
        with pytest.raises(JLTError, match="could not be loaded as DINOv2.*--features-path"):
            load_extractor("dinov2", path=path)
    with pytest.raises(JLTError, match="is no folder of DINOv2"):
        load_extractor("dinov2", path=tmp_path / "absent")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("jlt.storage.weights.getproxies", dict)
    monkeypatch.setattr("jlt.storage.weights.socket.create_connection", unreachable)
    with pytest.raises(JLTError, match=r"the Hub at \S+ cannot be reached.*--features-path"):
        load_extractor("dinov2", path="unknown/nothing")
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(JLTError, match="holds vit, not dinov2"):
        load_extractor("dinov2", path=tmp_path)
    (tmp_path / "config.json").write_text((Path(folder) / "config.json").read_text())
    weights = load_file(Path(folder) / "model.safetensors")
    del weights["encoder.layer.1.mlp.fc1.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(JLTError, match=r"1 weights are missing, 'encoder.layer.1.mlp.fc1.weight' first"):
        load_extractor("dinov2", path=tmp_path)


def unreachable(*_args, **_options):
    raise OSError("Network is unreachable")


def test_without_transformers_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(JLTError, match=r"pip install -e '\.\[dino\]'"):
        load_extractor("dinov2")
