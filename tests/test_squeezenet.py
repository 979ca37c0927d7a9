"""SqueezeNet against a plain implementation, and on photographs of ImageNet's classes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from data_helpers import random_images
from real_inputs import REAL, needs_real, photographs
from safetensors.torch import load_file, save_file
from torch.nn import functional

from jlt.errors import JLTError, UsageError
from jlt.evaluation.extractors import load_extractor
from jlt.evaluation.metrics import label_agreement
from jlt.evaluation.squeezenet import SqueezeNet
from jlt.storage.weights import ASSETS

IMAGENETTE = [0, 217, 482, 491, 497, 566, 569, 571, 574, 701]
"""ImageNet's classes of the ten labels."""
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def plain(weights: dict[str, torch.Tensor], images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return features and logits of images of 224x224, in float64."""
    weights = {name: value.double() for name, value in weights.items()}
    x = (images.permute(0, 3, 1, 2).double() / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)

    def conv(x: torch.Tensor, name: str, stride: int = 1, padding: int = 0) -> torch.Tensor:
        return functional.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], stride, padding).relu()

    x = conv(x, "features.0", stride=2)
    for place in range(2, 13):
        if place in (2, 5, 8):
            x = functional.max_pool2d(x, 3, 2, ceil_mode=True)
        else:
            x = conv(x, f"features.{place}.squeeze")
            expanded = conv(x, f"features.{place}.expand1x1"), conv(x, f"features.{place}.expand3x3", padding=1)
            x = torch.cat(expanded, 1)
    return x.mean((2, 3)), conv(x, "classifier.1").mean((2, 3))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    path = tmp_path / "squeezenet1_1.safetensors"
    save_file({name: value.half() for name, value in SqueezeNet().state_dict().items()}, path)
    return path


def test_features_and_logits_agree_with_a_plain_implementation(file):
    images = random_images(3, 224, 224)
    found = load_extractor("squeezenet", path=file)(images)
    features, logits = plain(load_file(file), images)
    assert found.pooled.shape == (3, 512)
    assert found.logits is not None
    torch.testing.assert_close(found.pooled.double(), features, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.logits.double(), logits, rtol=1e-4, atol=1e-5)


def test_a_pth_of_torchvision_gives_the_same_features(file, tmp_path):
    torch.save({name: value.float() for name, value in load_file(file).items()}, tmp_path / "squeezenet1_1.pth")
    other = load_extractor("squeezenet", path=tmp_path / "squeezenet1_1.pth")
    assert other.identity() == load_extractor("squeezenet", path=file).identity()


def test_missing_and_other_weights_are_refused(file, tmp_path):
    with pytest.raises(UsageError, match="needs --features-path"):
        load_extractor("squeezenet")
    weights = load_file(file)
    del weights["classifier.1.bias"]
    save_file(weights, tmp_path / "other.safetensors")
    with pytest.raises(JLTError, match=r"1 missing, such as classifier\.1\.bias"):
        load_extractor("squeezenet", path=tmp_path / "other.safetensors")
    with pytest.raises(JLTError, match="could not be read"):
        load_extractor("squeezenet", path=tmp_path / "nothing.safetensors")


@needs_real
def test_photographs_of_ten_classes_are_recognised():
    images, labels = photographs("imagenette", "validation", 200)
    logits = load_extractor("squeezenet", path=REAL / "squeezenet")(images).logits
    assert logits is not None
    classes = torch.tensor(IMAGENETTE)
    among_all = (logits.argmax(1) == classes[labels]).float().mean()
    assert among_all > 0.5
    # As an evaluation measures it: among the classes of the store.
    assert label_agreement(logits[:, classes], labels) > 0.9


def test_classes_are_found_by_the_names_of_imagenet(file):
    extractor = load_extractor("squeezenet", path=file)
    names = ["tench", "English springer, English springer spaniel", "chain saw"]
    assert extractor.class_logits("parquet", names) == [0, 217, 491]
    assert extractor.class_logits("parquet", ["tench", "my cat"]) is None
    assert extractor.class_logits("parquet", ["crane"]) is None
    assert extractor.class_logits("parquet", ["crane (n03126707)"]) == [517]
    # Images without a protocol: labels are numbers of ImageNet's classes, unless another kind is recorded.
    assert extractor.class_logits(None, []) == list(range(1000))
    assert extractor.class_logits("digits", []) is None
    assert extractor.class_logits("digits", list("0123456789")) is None


def test_all_classes_are_known_in_their_order(file):
    names = (ASSETS / "imagenet_classes.txt").read_text().splitlines()
    unmarked = [name.partition(" (")[0] for name in names]
    assert len(set(names)) == 1000
    assert load_extractor("squeezenet", path=file).class_logits("tar", unmarked) == list(range(1000))
