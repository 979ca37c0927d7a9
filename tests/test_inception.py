"""Inception as a feature extractor: random weights through real files, against torch-fidelity's network; fetching."""

import contextlib
import hashlib
import http.server
import importlib.util
import json
import os
import sys
import threading
import time
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import Trap, generator, random_images
from safetensors.torch import save_file

from jlt.cli.main import main
from jlt.errors import JLTError
from jlt.evaluation import fetch as fetching
from jlt.evaluation.extractors import load_extractor
from jlt.evaluation.fetch import INCEPTION, fetch
from jlt.evaluation.inception import InceptionNetwork, resize_like_tensorflow1

SIZES = [(32, 32), (64, 64), (256, 256), (299, 299), (333, 333), (70, 401)]
CONTENT = os.urandom(3_000_000)


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    """Weights under which activations keep their scale from layer to layer, as those of a trained network do."""
    random = generator()

    def drawn(name: str, shape: torch.Size) -> torch.Tensor:
        noise = torch.randn(shape, generator=random)
        if name.endswith("conv.weight"):
            return noise * (2 / shape[1:].numel()) ** 0.5
        if name.endswith("running_var"):
            return noise.mul(0.3).exp()
        return {"bn.weight": 1 + 0.1 * noise, "fc.weight": 0.03 * noise}.get(name[-9:], 0.1 * noise)

    with torch.device("meta"):
        expected = InceptionNetwork().state_dict()
    # The public file is older than PyTorch's counters of batches.
    return {name: drawn(name, tensor.shape) for name, tensor in expected.items() if "num_batches" not in name}


@pytest.fixture(scope="module")
def file(weights, tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "inception.pth"
    torch.save(weights, path)
    return path


@pytest.fixture(scope="module")
def extractor(file):
    return load_extractor("inception", path=file)


@pytest.fixture(scope="module")
def outsider(file):
    """torch-fidelity's network with the same weights; its package imports torchvision, the network does not."""
    if importlib.util.find_spec("torch_fidelity") is None:
        pytest.skip("torch-fidelity is not installed: make test installs it, without what it depends on")
    datasets = types.ModuleType("torchvision.datasets")
    datasets.CIFAR10 = datasets.STL10 = object
    stand_in = types.ModuleType("torchvision")
    stand_in.datasets = datasets
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torchvision", stand_in)
        patch.setitem(sys.modules, "torchvision.datasets", datasets)
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    return FeatureExtractorInceptionV3("reference", ["2048", "logits_unbiased"], str(file)).eval()


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_features_and_logits_are_torch_fidelitys(extractor, outsider, height, width):
    images = random_images(1, height, width)
    found = extractor(images)
    pooled, logits = outsider(images.permute(0, 3, 1, 2))
    torch.testing.assert_close(found.pooled, pooled, rtol=0, atol=1e-4)
    torch.testing.assert_close(found.logits, logits, rtol=0, atol=1e-4)
    # Features near zero would agree for any network.
    assert pooled.std() > 0.2
    assert logits.std() > 0.2


def test_spatial_features_are_those_of_the_first_branch_of_the_seventh_block(extractor, outsider):
    images, seen = random_images(1, 64, 64), []
    handle = outsider.Mixed_6d.branch1x1.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    outsider(images.permute(0, 3, 1, 2))
    handle.remove()
    spatial = extractor(images).spatial
    # TensorFlow's maps have their channels last, and so have the flattened ones.
    torch.testing.assert_close(spatial.view(1, 17, 17, 7), seen[0][:, :7].permute(0, 2, 3, 1), rtol=0, atol=1e-4)
    assert spatial.shape[1] == extractor.spatial_dimension == 2023
    assert spatial.std() > 0.2


def test_an_image_is_alone_in_its_batch_and_autocast_changes_nothing(extractor, monkeypatch):
    monkeypatch.setattr("jlt.evaluation.extractor.PIECE_ON_CPU", 2)
    images = random_images(3, 48, 48)
    together = extractor(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        alone = extractor(images[1:2])
    for name in ("pooled", "logits", "spatial"):
        torch.testing.assert_close(getattr(together, name)[1:2], getattr(alone, name), rtol=1e-5, atol=1e-5)
    assert (together.pooled[0] - together.pooled[1]).abs().max() > 0.1
    assert not together.pooled.requires_grad


@pytest.mark.parametrize(("shape", "size"), [((5, 7), 13), ((13, 13), 13), ((32, 20), 9), ((1, 3), 4)])
def test_resize_is_the_loop_over_pixels(shape, size):
    image = random_images(1, *shape)
    pixels = image[0].numpy().astype(np.float32)
    expected = np.zeros((size, size, 3), np.float32)
    for i in range(size):
        for j in range(size):
            y, x = (np.float32(k) * np.float32(length / size) for k, length in zip((i, j), shape, strict=True))
            top, left = int(y), int(x)
            bottom, right = min(top + 1, shape[0] - 1), min(left + 1, shape[1] - 1)
            upper = pixels[top, left] + (pixels[top, right] - pixels[top, left]) * (x - left)
            lower = pixels[bottom, left] + (pixels[bottom, right] - pixels[bottom, left]) * (x - left)
            expected[i, j] = upper + (lower - upper) * (y - top)
    np.testing.assert_allclose(resize_like_tensorflow1(image, size)[0].numpy(), expected, rtol=0, atol=1e-4)


def test_identity_is_of_the_weights_however_they_are_packed(weights, extractor, tmp_path, capsys):
    identity = extractor.identity()
    save_file(weights, tmp_path / "copy.safetensors")
    assert load_extractor("inception", path=str(tmp_path / "copy.safetensors")).identity() == identity
    assert "is not the published file" in capsys.readouterr().err
    assert (identity["name"], identity["input_size"], identity["dimension"]) == ("inception", 299, 2048)
    assert (extractor.dimension, extractor.num_classes, extractor.class_logits(None, [])) == (2048, 1008, None)
    json.dumps(identity)


def test_wrong_names_and_shapes_are_named(weights, tmp_path):
    faulty = {**weights, "stranger": torch.zeros(1), "fc.weight": torch.zeros(1000, 2048)}
    del faulty["Mixed_6c.branch_pool.bn.running_var"]
    save_file(faulty, tmp_path / "faulty.safetensors")
    with pytest.raises(JLTError) as caught:
        load_extractor("inception", path=tmp_path / "faulty.safetensors")
    for part in (
        "1 missing, such as Mixed_6c.branch_pool.bn.running_var",
        "1 unexpected, such as stranger",
        "1 misshapen, such as fc.weight of (1000, 2048) instead of (1008, 2048)",
    ):
        assert part in str(caught.value)


def test_code_in_a_file_is_not_run(tmp_path):
    torch.save({"fc.weight": Trap(tmp_path / "owned")}, tmp_path / "weights.pth")
    with pytest.raises(JLTError, match="its code was not run"):
        load_extractor("inception", path=tmp_path / "weights.pth")
    assert not (tmp_path / "owned").exists()


def test_a_file_that_is_no_weights_is_refused(tmp_path):
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(JLTError, match="holds no named tensors"):
        load_extractor("inception", path=tmp_path / "list.pth")
    for name in ("text.pth", "text.safetensors", "empty.pth"):
        (tmp_path / name).write_text("" if name == "empty.pth" else "no weights at all")
        with pytest.raises(JLTError, match=f"{name} (could not be read|is not a plain file)"):
            load_extractor("inception", path=tmp_path / name)


def test_a_file_must_have_the_hash_of_its_name(tmp_path):
    torch.save({"fc.weight": torch.zeros(1)}, tmp_path / "weights-0123abcd.pth")
    with pytest.raises(JLTError, match=r"begins with [0-9a-f]{8}, not with the 0123abcd of its name"):
        load_extractor("inception", path=tmp_path / "weights-0123abcd.pth")


@contextlib.contextmanager
def server(status: int = 200, content: bytes = CONTENT, length: int = len(CONTENT)):
    """Answer every request with this response on a port of this machine, and yield the address."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}/weights.pth"
        running.shutdown()
        thread.join()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JLT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    return tmp_path / "cache"


def publish(monkeypatch, url: str, sha256: str = hashlib.sha256(CONTENT).hexdigest()[:8]) -> None:
    monkeypatch.setitem(fetching.PUBLISHED, "inception", replace(INCEPTION, url=url, sha256=sha256))


def test_fetch_downloads_once(cache, monkeypatch, capsys):
    with server() as url:
        publish(monkeypatch, url)
        assert main(["fetch", "inception", "--json"]) == 0
    path = Path(json.loads(capsys.readouterr().out)["path"])
    assert path == cache / INCEPTION.file
    assert path.read_bytes() == CONTENT
    # The server is stopped: an intact file is not downloaded again, but a damaged one is.
    assert fetch("inception") == path
    path.write_bytes(CONTENT[:-1])
    with pytest.raises(JLTError, match="cannot be downloaded"):
        fetch("inception")


@pytest.mark.parametrize(
    ("answer", "sha256", "message"),
    [
        ({}, "00000000", "gave another file: its SHA-256 begins with"),
        ({"status": 404}, "00000000", "the server answers 404"),
        ({"content": CONTENT[:-9]}, "00000000", "stopped after 2999991 of 3000000 bytes"),
    ],
)
def test_a_file_that_is_not_the_published_one_is_deleted(cache, monkeypatch, capsys, answer, sha256, message):
    with server(**answer) as url:
        publish(monkeypatch, url, sha256)
        assert main(["fetch", "inception"]) == 1
    assert message in capsys.readouterr().err
    assert list(cache.iterdir()) == []


def test_fetch_knows_what_it_can_fetch(capsys):
    assert main(["fetch", "incepton"]) == 2
    assert "did you mean inception?" in capsys.readouterr().err


def test_missing_weights_are_reported_at_once(cache, capsys):
    begun = time.perf_counter()
    with pytest.raises(JLTError, match="jlt fetch inception"):
        load_extractor("inception")
    assert time.perf_counter() - begun < 1
    assert main(["evaluate", "--samples", "nowhere", "--reference", "digits", "--features", "inception"]) == 1
    printed = capsys.readouterr().err
    assert "`jlt fetch inception`" in printed
    assert "--features-path FILE" in printed
    assert main(["evaluate", "--samples", "nowhere", "--reference", "digits", "--features-path", "weights.pth"]) == 2
