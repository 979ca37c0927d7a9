"""Five lines of Python: the images of the command line, and what is inside of them."""

import ast
import dataclasses
import inspect
import io
import itertools
import json
import os
import pickle
import typing
from pathlib import Path

import numpy as np
import pytest
import torch
from noise_source import NoiseSource
from PIL import Image
from torch.utils.data import DataLoader

import jlt
from jlt.api.model import SampleSettings
from jlt.autoencoders.load import load_autoencoder
from jlt.cli.main import main
from jlt.config import SAMPLERS, NetworkConfig, OptimizerConfig, SampleConfig, TrainConfig
from jlt.errors import JLTError, UsageError
from jlt.evaluation.extractors import load_extractor
from jlt.evaluation.metrics import FeatureStatistics
from jlt.evaluation.reference import Reference, open_reference
from jlt.evaluation.suite import evaluate_images
from jlt.experiments.analysis import AnalysisConfig, measure_geometry
from jlt.images.crop import centre_crop
from jlt.images.digits import Digits
from jlt.latents.encode_config import EncodeConfig
from jlt.latents.encoding import encode_source
from jlt.latents.loader import SampleOrder
from jlt.latents.store import LatentStore
from jlt.results.geometry import TrainingModel
from jlt.sampling import sampler as sampling
from jlt.sampling.labels import class_number, number_labels, readable_names
from jlt.sampling.sampler import open_sampler
from jlt.storage.files import sealed_text
from jlt.training.checkpoint import open_checkpoint, save_snapshot
from jlt.training.loop import train


class Photographs(NoiseSource):
    """Noise with the classes of ImageNet, named as the Hub's parquet files name them."""

    class_names = tuple(
        "tench, Tinca tinca" if number == 0 else name for number, name in enumerate(readable_names([], 1000))
    )

    def __getitem__(self, index):
        return super().__getitem__(index)[0], index * 217 % 1000


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("api")
    settings = EncodeConfig("noise", "pixels", resolution=8, batch_size=16, shard_size=20, flips=True, workers=0)
    settings = dataclasses.replace(settings, dtype="float32")
    encode_source(Photographs(50), load_autoencoder("pixels"), settings, folder / "latents")
    return folder


@pytest.fixture(scope="module")
def run_of(folder):
    """Runs of a few steps, so that an image depends on noise, time, label and average."""

    def run(prediction):
        path = folder / prediction
        if not path.exists():
            network = NetworkConfig(3, 8, 8, 1000, patch_size=4, hidden_size=16, depth=2, num_heads=2)
            optimizer = OptimizerConfig(learning_rate=1e-2)
            config = TrainConfig(
                "test", prediction, network, optimizer=optimizer, batch_size=16, steps=20, ema=(0.9, 0.5), power_ema=()
            )
            config = dataclasses.replace(config, precision="float32", checkpoint_every=20, flips=True)
            train(config, LatentStore.open(folder / "latents"), path)
        return path

    return run


@pytest.fixture(scope="module")
def model(run_of):
    return jlt.load(run_of("x"))


def pixels_of(images):
    return np.stack([np.asarray(image) for image in images])


# ---- images ----


@pytest.mark.parametrize("prediction", ["x", "eps", "v"])
def test_the_images_are_those_of_the_command_line(run_of, tmp_path, prediction):
    run = run_of(prediction)
    guided = ["--cfg-scale", "2.9", "--cfg-interval", "0.1", "1", "--seed", "3", "--steps", "6"]
    arguments = ["--num", "5", "--batch-size", "2", "--labels", "tench,217,goldfish", *guided, "--ema", "0.5"]
    assert main(["sample", "--checkpoint", str(run), "--out", str(tmp_path), *arguments]) == 0
    files = pixels_of(Image.open(tmp_path / f"{number:06d}.png") for number in range(5))

    settings = {"cfg_scale": 2.9, "cfg_interval": (0.1, 1.0), "seed": 3, "steps": 6, "ema": "0.5", "batch_size": 2}
    images = jlt.load(str(run)).sample(["Tench", 217, "goldfish"], num=5, **settings)
    assert np.array_equal(pixels_of(images), files)
    assert images.labels.tolist() == [0, 217, 1, 0, 217]
    # The protocols are the same too: they record numbers.
    recorded = json.loads((tmp_path / "protocol.json").read_text())
    assert recorded["labels"] == "0,217,1"
    assert {key: recorded[key] for key in images.protocol} == json.loads(json.dumps(images.protocol))
    # They differ by noise and label, so that the comparison means something.
    assert len({image.tobytes() for image in images}) == 5


def test_images_are_a_sequence_of_pictures_with_latents(model, tmp_path):
    images = model.sample(labels=["tench", 217], steps=2)
    assert len(images) == 2
    assert [image.size for image in images] == [(8, 8), (8, 8)]
    assert images[-1].tobytes() == images[1].tobytes() == images[1:][0].tobytes()
    with pytest.raises(IndexError):
        images[2]
    assert images.names == ["tench, Tinca tinca", readable_names([], 1000)[217]]
    assert images.latents.shape == (2, 3, 8, 8)
    assert images.latents.dtype == torch.float32
    assert np.array_equal(pixels_of(model.decode(images.latents)), pixels_of(images))
    # Latents may be used in a computation with gradients.
    (images.latents.requires_grad_() ** 2).sum().backward()
    images.grid().save(tmp_path / "grid.png")
    assert "2 images of 8x8" in repr(images)


def test_labels_are_numbers_names_or_a_rule(model):
    assert model.sample("tench", steps=1).labels.tolist() == [0]
    assert model.sample(217, num=2, steps=1).labels.tolist() == [217, 217]
    assert model.sample(num=3, steps=1).labels.tolist() == [0, 1, 2]
    assert len(model.sample(steps=1)) == SampleConfig().num
    assert len(set(model.sample("random", num=8, steps=1).labels.tolist())) > 4
    # A name with a comma, which the command line would take for two.
    assert model.sample(["tench, Tinca tinca"], steps=1).labels.tolist() == [0]
    for labels, message in (
        (["tenhc"], "no class named 'tenhc': did you mean tench"),
        ([1000], "no class 1000"),
        ([-1], "no class -1"),
        ([], "at least one class"),
        ("eqal", "did you mean equal"),
    ):
        with pytest.raises(JLTError, match=message):
            model.sample(labels)
    # Without the checks of types that tests have.
    for label in (7.5, 7.0, None, [1, 2]):
        with pytest.raises(UsageError, match="a whole number or a name, not"):
            inspect.unwrap(class_number)(label, [], 10)


def test_numbers_may_be_those_of_numpy_and_torch(model):
    expected = model.sample([0, 217], seed=3, steps=2).pixels
    for labels in (np.array([0, 217]), torch.tensor([0, 217]), range(0, 218, 217)):
        assert torch.equal(model.sample(labels, seed=np.int64(3), steps=np.int32(2)).pixels, expected)
    z = torch.randn(2, 3, 8, 8)
    assert torch.equal(model.denoise(z, 0.5, np.int64(5)), model.denoise(z, 0.5, [5, 5]))


def test_images_beyond_the_memory_are_refused_before_any_is_drawn(model, monkeypatch):
    monkeypatch.setattr("jlt.api.model.machine_memory", lambda: 10**6)
    with pytest.raises(JLTError, match=r"1,000,000 images do not fit the memory of this machine, 1,041 would"):
        model.sample(num=10**6)


def test_a_notebook_shows_the_grid(model):
    images = model.sample([0, 217], steps=1)
    assert Image.open(io.BytesIO(images._repr_png_())).tobytes() == images.grid().tobytes()


def test_classes_by_name():
    names = ["cat", "Dog", "7", "cat"]
    assert class_number("dog", names, 4) == 1
    assert class_number("2", names, 4) == class_number(2, names, 4) == 2
    with pytest.raises(UsageError, match="classes 0 and 3"):
        class_number("cat", names, 4)
    with pytest.raises(UsageError, match="no names, only numbers 0 to 3"):
        class_number("cat", [], 4)
    assert number_labels("dog, 3", names, 4) == "1,3"
    assert [number_labels(rule, names, 4) for rule in ("equal", "random", "3,0")] == ["equal", "random", "3,0"]
    # The folders of ImageNet are named by wnids; adopted latents have numbers, or no names.
    wnids = [f"n{number:08d}" for number in range(1000)]
    for known in (wnids, list(map(str, range(1000))), []):
        assert class_number("goldfish", known, 1000) == 1
    assert class_number("n00000005", wnids, 1000) == 5
    with pytest.raises(UsageError, match="name of the classes 134 and 517"):
        class_number("crane", wnids, 1000)


def test_an_unknown_class_on_the_command_line_is_wrong_usage(run_of, tmp_path, capsys):
    arguments = ["--out", str(tmp_path / "out"), "--labels", "tensh"]
    assert main(["sample", "--checkpoint", str(run_of("x")), *arguments]) == 2
    assert "did you mean tench" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_settings_are_those_of_the_command_line(model):
    known = {field.name for field in dataclasses.fields(SampleConfig)} - {"num", "labels"}
    hints = typing.get_type_hints(SampleConfig)
    named = {"sampler": hints["sampler"].type}
    assert typing.get_type_hints(SampleSettings) == {name: hints[name] for name in known} | named
    assert model.sample([0], sampler="fast").protocol == model.sample([0], **SAMPLERS["fast"]).protocol
    with pytest.raises(UsageError, match="did you mean fast"):
        model.sample([0], sampler="fats")
    with pytest.raises(UsageError, match="sets steps, too"):
        model.sample([0], sampler="fast", steps=3)
    with pytest.raises(UsageError, match="did you mean cfg_scale"):
        model.sample([0], cfg_scal=2)
    with pytest.raises(JLTError, match="solver must be one of euler, heun"):
        model.sample([0], solver="huen")
    with pytest.raises(JLTError, match="cfg_interval must satisfy"):
        model.sample([0], cfg_interval=(0.5, 0.1))


def test_what_is_open_is_used_again(run_of, monkeypatch):
    opened, open_weights = [], sampling.open_weights

    def recorded(checkpoint, ema, *given, **more):
        opened.append(ema)
        return open_weights(checkpoint, ema, *given, **more)

    monkeypatch.setattr(sampling, "open_weights", recorded)
    model = jlt.load(run_of("x"))
    drawn = [model.sample([0], seed=seed, t_eps=t_eps, steps=4)[0] for seed in (0, 1) for t_eps in (0, 0.5)]
    assert len({image.tobytes() for image in drawn}) == 4
    assert opened == []
    first, other = model.sample([0], steps=2), model.sample([0], ema="none", steps=2)
    again = model.sample([0], ema="none", seed=1, steps=2)
    assert opened == ["none"]
    assert torch.equal(model.sample([0], steps=2).latents, first.latents)
    assert not torch.equal(other.latents, first.latents)
    assert not torch.equal(again.latents, other.latents)
    assert opened == ["none"]
    # A clamp that is changed on open weights is that of weights that were opened with it.
    fresh = open_sampler(model.checkpoint, SampleConfig(num=1, t_eps=0.5, steps=4, labels="0"))
    assert torch.equal(next(fresh.latent_batches()).latents, model.sample([0], t_eps=0.5, steps=4).latents)


def test_weights_are_chosen_at_loading_or_at_sampling(run_of):
    chosen = jlt.load(run_of("x"), ema="none")
    at_sampling = jlt.load(run_of("x")).sample([5], ema="none", steps=2)
    assert torch.equal(chosen.sample([5], steps=2).latents, at_sampling.latents)
    assert "weights none" in repr(chosen)
    with pytest.raises(UsageError, match=r"did you mean 0\.9"):
        jlt.load(run_of("x"), ema="0.99")


def test_a_folder_without_a_checkpoint_is_an_error(tmp_path):
    for place, message in ((tmp_path / "absent", "does not exist"), (tmp_path, "neither a checkpoint nor a run")):
        with pytest.raises(JLTError, match=message):
            jlt.load(place)


def test_what_leads_to_a_checkpoint_is_named(tmp_path, run_of):
    runs = tmp_path / "ablation" / "runs"
    for name in ("b", "a"):
        (runs / name / "checkpoints").mkdir(parents=True)
    for place in (runs, runs.parent):
        with pytest.raises(JLTError, match=f"the folder of runs: name one of them, such as {runs / 'a'}"):
            jlt.load(place)
    (file := tmp_path / "checkpoint-last.pth").write_bytes(b"PK")
    with pytest.raises(JLTError, match=f"`jlt import {file} --out RUN` makes a run"):
        jlt.load(file)
    (tmp_path / "manifest.json").write_text(sealed_text({"schema": 0}))
    with pytest.raises(JLTError, match=r"is not a checkpoint's manifest of schema \d+: name a run"):
        jlt.load(tmp_path)


def test_a_snapshot_and_a_device_that_is_absent_are_named(run_of):
    run = run_of("x")
    snapshot = save_snapshot(run, {"power": {"weight": torch.zeros(1)}}, {"step": 1, "updates": 1})
    with pytest.raises(JLTError, match="is a snapshot of averages"):
        jlt.load(snapshot)
    with pytest.raises(UsageError, match="no device 'gpu' here"):
        jlt.load(run, device="gpu")


def test_the_facts_of_a_model(model, run_of):
    assert (model.prediction, model.resolution, model.config.steps, len(model.classes)) == ("x", 8, 20, 1000)
    assert model.classes[1] == "goldfish"
    assert (model.shape.channels, model.shape.height) == (3, 8)
    assert model.evaluations == []
    assert model.checkpoint.sha256 == open_checkpoint(run_of("x")).sha256
    assert "predicts x: step 20, weights 0.9, latents 3x8x8, 1000 classes" in repr(model)


# ---- the path ----


def test_the_trajectory_is_the_path_of_the_solver(model):
    images = model.sample([0, 217, 5], steps=4, batch_size=2, seed=1)
    path = images.trajectory
    assert path.times == (0.0, 0.25, 0.5, 0.75, 1.0)
    assert [state.t for state in path] == list(path.times)
    assert len(path) == 5
    assert path[0.4].t == 0.5
    assert torch.equal(path[1].z, images.latents)
    assert path[0].z.std() == pytest.approx(1, abs=0.1)
    # Eq. 8: Heun, and Euler in the last step.
    for now, then in itertools.pairwise(path):
        h, v = then.t - now.t, model.velocity(now.z, now.t, images.labels)
        if then.t < 1:
            v = (v + model.velocity(now.z + h * v, then.t, images.labels)) / 2
        torch.testing.assert_close(then.z, now.z + h * v, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(now.clean, model.denoise(now.z, now.t, images.labels), rtol=1e-4, atol=1e-5)
    with pytest.raises(UsageError, match="from time 0 to 1"):
        path[1.5]


@pytest.mark.parametrize("solver", ["midpoint", "dpmpp_2m", "ancestral"])
def test_the_trajectory_of_any_solver_begins_at_noise_and_ends_at_the_images(model, solver):
    images = model.sample([0], steps=3, solver=solver)
    states = list(images.trajectory)
    assert [state.t for state in states] == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert torch.equal(states[0].z, model.sample([0], steps=3).trajectory[0].z)
    torch.testing.assert_close(states[2].clean, model.denoise(states[2].z, states[2].t, 0))
    assert torch.equal(states[-1].clean, images.latents)


def test_a_trajectory_belongs_to_its_images(model):
    images = model.sample([0], steps=2, ema="none")
    model.sample([1], steps=3)
    # The last step, to t = 1, returns the clean prediction.
    torch.testing.assert_close(images.trajectory[0.5].clean, images.latents, rtol=1e-4, atol=1e-5)


# ---- denoising ----


@pytest.mark.parametrize("prediction", ["x", "eps", "v"])
def test_denoise_is_eq_4(run_of, prediction):
    model, labels = jlt.load(run_of(prediction)), [3, "tench", 217]
    z, t = torch.randn(3, 3, 8, 8), torch.tensor([0.1, 0.5, 0.9])
    output, expand = model.network(z, t, torch.tensor([3, 0, 217])), t[:, None, None, None]
    clean = {"x": output, "eps": (z - (1 - expand) * output) / expand, "v": z + (1 - expand) * output}[prediction]
    torch.testing.assert_close(model.denoise(z, t, labels), clean, rtol=1e-4, atol=1e-5)
    # Eq. 3, without the clamps, which are 0.
    velocity = {"x": (output - z) / (1 - expand), "eps": (z - output) / expand, "v": output}[prediction]
    torch.testing.assert_close(model.velocity(z, t, labels), velocity, rtol=1e-4, atol=1e-5)
    for number, (time, label) in enumerate(zip(t.tolist(), labels, strict=True)):
        alone = model.denoise(z[number : number + 1], time, label)
        torch.testing.assert_close(alone[0], clean[number], rtol=1e-4, atol=1e-5)
    # From t = 0, where a readout of eps is 0 / 0.
    assert model.denoise(z, 0, labels).isfinite().all()
    assert not torch.allclose(model.denoise(z, 0.5, None), model.denoise(z, 0.5, 3))


def test_denoise_has_gradients(model):
    z = torch.randn(2, 3, 8, 8, requires_grad=True)
    model.denoise(z, 0.5, 0).sum().backward()
    assert z.grad.abs().sum() > 0
    assert not model.denoise(z.detach(), 0.5, 0).requires_grad


def test_images_become_the_latents_of_the_training(model, latents):
    """Encoding gives what `jlt encode` stored, and decoding leads back."""
    photographs = [Photographs(50)[number][0] for number in (7, 8)]
    encoded = model.encode(photographs)
    torch.testing.assert_close(encoded.cpu(), torch.stack([latents[number][0] for number in (7, 8)]))
    assert torch.equal(model.encode(photographs[0]), encoded[:1])
    assert not encoded.is_inference()
    assert np.array_equal(pixels_of(model.decode(encoded)), np.stack([centre_crop(one, 8) for one in photographs]))
    with pytest.raises(UsageError, match="no images to encode"):
        model.encode([])
    for wrong in ("three.png", 5, [photographs[0], "three.png"]):
        with pytest.raises(UsageError, match="are of PIL"):
            inspect.unwrap(type(model).encode)(model, wrong)


def test_wrong_batches_are_refused(model):
    z = torch.randn(2, 3, 8, 8)
    with pytest.raises(UsageError, match=r"are \(n, 3, 8, 8\), n > 0, not \(2, 3, 4, 4\)"):
        model.decode(z[:, :, :4, :4])
    for given, message in (
        ((z[:, :2], 0.5, 0), r"are \(n, 3, 8, 8\), n > 0, not \(2, 2, 8, 8\)"),
        ((z[:0], 0.5, 0), "n > 0"),
        ((z, 0.5, "equal"), "no class named 'equal': (?!.*random)"),
        ((z, 1.0, 0), "at t = 1 z is the data"),
        ((z, torch.tensor([0.1, 0.2, 0.3]), 0), "one time, or one for each|Type-check error"),
        ((z, 0.5, [0, 1, 2]), "3 labels for 2 latents"),
        ((z, 0.5, "tesch"), "did you mean"),
    ):
        with pytest.raises((UsageError, TypeError), match=message):
            model.denoise(*given)


# ---- latents ----


@pytest.fixture(scope="module")
def latents(folder):
    return jlt.open_latents(folder / "latents")


def test_a_store_is_a_data_set(latents):
    assert len(latents) == 50
    latent, label = latents[7]
    assert latent.shape == (3, 8, 8)
    assert latent.dtype == torch.float32
    assert label == latents.labels[7] == 7 * 217 % 1000
    assert torch.equal(latents[-1][0], latents[49][0])
    with pytest.raises(IndexError):
        latents[50]
    assert (latents.autoencoder, latents.classes[1], latents.shape.num_classes) == ("pixels", "goldfish", 1000)
    assert "50 latents of 3x8x8 by pixels" in repr(latents)


@pytest.mark.filterwarnings("default::DeprecationWarning")
def test_workers_of_a_data_loader_read_the_same(latents):
    loader = DataLoader(latents, batch_size=16, num_workers=2, multiprocessing_context="fork")
    read, labels = (torch.cat(part) for part in zip(*loader, strict=True))
    assert torch.equal(read, torch.stack([latents[number][0] for number in range(50)]))
    assert torch.equal(labels, latents.labels)
    # No worker reads with the threads of its parent.
    own = DataLoader(latents, 16, num_workers=2, multiprocessing_context="fork", collate_fn=lambda _: latents._process)
    assert os.getpid() not in set(own)
    copy = pickle.loads(pickle.dumps(latents))
    assert torch.equal(copy[3][0], latents[3][0])


def test_batches_are_in_the_order_of_a_training(latents):
    order = SampleOrder(50, seed=4)
    batches = list(latents.batches(16, seed=4, epochs=2))
    assert [len(labels) for _, labels in batches] == [16] * 6 + [4]
    read = torch.cat([values for values, _ in batches])
    indices = order.indices(0, 100)
    assert torch.equal(read, torch.stack([latents[number][0] for number in indices.tolist()]))
    assert torch.equal(torch.cat([labels for _, labels in batches]), latents.labels[torch.from_numpy(indices)])
    # Without a seed in the order of the store, endlessly if requested.
    endless = itertools.islice(latents.batches(30, epochs=None), 3)
    assert torch.equal(torch.cat([labels for _, labels in endless]), latents.labels[torch.arange(90) % 50])


def test_mirrored_latents_are_chosen_by_the_seed(latents):
    (values, _), (plain, _) = next(latents.batches(50, seed=0, flips=True)), next(latents.batches(50, seed=0))
    flipped = torch.from_numpy(SampleOrder(50, 0).flips(0, 50))
    assert torch.equal(values[flipped], plain[flipped].flip(3))
    assert torch.equal(values[~flipped], plain[~flipped])
    for wrong in ({"batch_size": 0}, {"flips": True}, {"epochs": 0}, {"seed": -1}, {"seed": 2**70}):
        # At the call, not at the first batch.
        with pytest.raises(JLTError):
            latents.batches(**{"batch_size": 4, **wrong})


# ---- geometry ----


def test_the_geometry_is_that_of_the_command(latents, folder, model, tmp_path):
    config = AnalysisConfig((1, 2), (16,), TrainingModel.of(model.config))
    expected, _ = measure_geometry(latents.store, tmp_path, config)
    for source in (folder / "latents", str(folder / "latents"), latents, latents.store):
        assert jlt.analyze(source, patch_size=(1, 2), width=16, training=model.config) == expected
    values = torch.cat([part for part, _ in latents.batches(50)])
    for array in (values, values.numpy()):
        found = jlt.analyze(array, labels=latents.labels, patch_size=(1, 2), width=16, training=model.config)
        assert found.tokens == expected.tokens
        assert [caution.kind for caution in found.cautions] == [caution.kind for caution in expected.cautions]
        assert found.latents == {"source": {"kind": "array", "count": 50}, "count": 50}
    # Without labels all latents are of one class.
    assert "one_class" in {caution.kind for caution in jlt.analyze(values).cautions}


def test_what_cannot_be_analysed_is_refused(latents, tmp_path):
    values = torch.randn(20, 3, 8, 8)
    for given, more, message in (
        (values[0], {}, r"floats \(n, c, h, w\)"),
        (values, {"labels": torch.zeros(3, dtype=torch.int64)}, "20 class numbers"),
        (values, {"patch_size": 3}, "patch"),
        (values, {"patch_size": 0}, "1 or more"),
        (values[:1], {}, "at least 2"),
        (torch.full_like(values, torch.nan), {}, "finite"),
        (latents, {"labels": latents.labels}, "have labels"),
        (tmp_path, {}, "not a latent store"),
    ):
        with pytest.raises(JLTError, match=message):
            jlt.analyze(given, **more)


# ---- distances ----


def digit_images(start, count):
    images = [centre_crop(Digits()[number][0], 32) for number in range(start, start + count)]
    return np.stack(images)


def test_a_number_of_images_or_features_makes_a_distance():
    """The distance of the command, in batches, merged, and from features."""
    real, drawn = digit_images(0, 120), digit_images(900, 130)
    extractor = load_extractor("digits")
    reference = Reference(FeatureStatistics.over(extractor(torch.from_numpy(real)).pooled.numpy()))
    batches = [(torch.from_numpy(part), None) for part in np.array_split(drawn, 3)]
    expected = evaluate_images(batches, reference, extractor, 130).frechet_distance

    streamed, part, features, against = (jlt.FrechetDistance() for _ in range(4))
    streamed.update(drawn[:50])
    streamed.update(torch.from_numpy(drawn[50:90]))
    part.update([Image.fromarray(image) for image in drawn[90:-1]])
    part.update(Image.fromarray(drawn[-1]))
    streamed.merge(part)
    assert streamed.count == 130
    assert streamed.compute(reference) == pytest.approx(expected, rel=1e-6)
    features.update(extractor(torch.from_numpy(drawn)).pooled)
    assert features.compute(reference) == pytest.approx(expected, rel=1e-6)
    against.update(real)
    assert streamed.compute(against) == pytest.approx(expected, rel=1e-6)
    assert against.compute(against) == pytest.approx(0, abs=1e-6)


def test_a_reference_is_a_file_or_images(tmp_path):
    drawn, extractor = digit_images(900, 50), load_extractor("digits")
    distance = jlt.FrechetDistance(extractor)
    distance.update(drawn)
    measured = open_reference("digits", extractor, 32)
    measured.save(tmp_path / "digits.npz")
    expected = measured.gaussian.distance(
        FeatureStatistics.over(extractor(torch.from_numpy(drawn)).pooled.numpy()).gaussian
    )
    for reference in ("digits", tmp_path / "digits.npz", str(tmp_path / "digits.npz"), measured):
        assert distance.compute(reference) == pytest.approx(expected, rel=1e-6)


def test_images_of_a_model_are_measured(model):
    distance = jlt.FrechetDistance("digits")
    distance.update(model.sample(num=12, steps=1))
    assert distance.count == 12
    assert distance.compute(distance) == pytest.approx(0, abs=1e-6)


def test_distances_that_mean_nothing_are_refused():
    distance, features = jlt.FrechetDistance(), jlt.FrechetDistance()
    distance.update(digit_images(0, 9))
    with pytest.raises(JLTError, match="at least 10 images, there are 9"):
        distance.compute(distance)
    distance.update(digit_images(0, 9))
    features.update(torch.randn(20, 64))
    other = jlt.FrechetDistance()
    other.update(torch.randn(20, 32))
    small = jlt.FrechetDistance()
    small.update(digit_images(0, 20)[:, :16, :16])
    for call, message in (
        (lambda: distance.compute(jlt.FrechetDistance()), "there are 0"),
        (lambda: distance.compute(other), "dimension 32 do not fit those of dimension 64"),
        (lambda: distance.merge(other), "dimension 32"),
        (lambda: distance.merge(small), "16 pixels do not fit those of 32 pixels"),
        (lambda: distance.compute(small), "16 pixels do not fit those of 32 pixels"),
        (lambda: features.compute("digits"), "name a file of statistics"),
        (lambda: distance.update(torch.randn(4, 8, 8, 3)), "uint8|Type-check error"),
        (lambda: distance.update([Image.new("L", (32, 32)), Image.new("L", (16, 16))]), "differ in size"),
        (lambda: distance.update(torch.full((2, 64), torch.nan)), "not finite"),
        (lambda: distance.update("photos"), "PIL images|Type-check error"),
        (lambda: jlt.FrechetDistance("digit"), "did you mean digits"),
    ):
        with pytest.raises((JLTError, TypeError), match=message):
            call()
    assert distance.count == 18
    assert repr(distance) == "<18 images in the features of digits>"


# ---- the surface ----


def test_every_name_is_offered_once():
    tree = ast.parse(Path(jlt.__file__).read_text())
    (checked,) = [node for node in tree.body if isinstance(node, ast.If) and isinstance(node.test, ast.Name)]
    imported = {alias.name: node.module for node in checked.body for alias in node.names}
    assert imported == jlt._MODULES
    assert sorted({*imported, "__version__"}) == sorted(jlt.__all__)
    assert dir(jlt) == sorted(jlt.__all__)
    for name in jlt.__all__:
        assert getattr(jlt, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        getattr(jlt, "laod")  # noqa: B009
