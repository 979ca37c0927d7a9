"""Errors by direction and time: of networks whose errors are known in closed form, and through the command line."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from test_geometry import FakeStore, assert_alike
from torch import nn
from training_helpers import run_processes

from jlt.autoencoders.load import PixelAutoencoder
from jlt.cli.main import main
from jlt.config import LatentShape, SampleConfig
from jlt.errors import JLTError
from jlt.experiments import analysis
from jlt.experiments.error_by_direction import (
    BANDS,
    MEASURED_TIMES,
    Basis,
    VelocityErrors,
    measure_basis,
    network_error,
    require_comparable,
    stationary_optimum,
    velocity_errors,
    whole_optimum,
)
from jlt.experiments.recipes import resolve_recipe
from jlt.experiments.sample_spectrum import Directions, decoder_sensitivity, sampled_states
from jlt.geometry.accumulate import measure_moments
from jlt.latents.encode_config import EncodeConfig
from jlt.latents.encoding import encode
from jlt.latents.store import LatentStore
from jlt.runtime.processes import SingleProcess
from jlt.sampling.guidance import Denoiser
from jlt.sampling.sampler import LatentSampler
from jlt.training.checkpoint import open_checkpoint
from jlt.training.loop import train

SHAPE = (2, 4, 4)


def gaussian_latents(count=6000):
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(32, 32, generator=generator, dtype=torch.float64) / 4
    return (torch.randn(count, 32, generator=generator, dtype=torch.float64) @ mix).view(count, *SHAPE).float()


class Optimal(nn.Module):
    """The best linear predictor of a target, given the covariance of whole latents and a mean."""

    def __init__(self, prediction, covariance, mean, scale):
        super().__init__()
        self.prediction, self.mean, self.scale = prediction, mean, scale
        self.lam, self.basis = torch.linalg.eigh(covariance)

    def forward(self, z, t, labels):
        t = t[0].double()
        noise = self.scale**2
        variance = t**2 * self.lam + (1 - t) ** 2 * noise
        coefficient = {
            "x": t * self.lam / variance,
            "eps": (1 - t) * noise / variance,
            "v": (t * self.lam - (1 - t) * noise) / variance,
        }[self.prediction]
        rest = (z.double().flatten(1) - t * self.mean) @ self.basis
        offset = 0 if self.prediction == "eps" else self.mean
        return (offset + (rest * coefficient) @ self.basis.T).view_as(z).float()


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("patch_size", [1, 2])
@pytest.mark.parametrize("prediction", ["x", "eps", "v"])
def test_the_best_linear_network_has_the_error_of_eq_11(prediction, patch_size, scale):
    store = FakeStore(gaussian_latents())
    moments = measure_moments(store, [patch_size], "cpu", SingleProcess())
    basis = measure_basis(moments, patch_size, scale)
    network = Optimal(prediction, moments.whole.covariance, moments.whole.mean, scale)
    denoiser = Denoiser(network, prediction, null_label=1)
    errors = velocity_errors(denoiser, store, np.arange(len(store)), basis, 0, "cpu", SingleProcess())
    # The outputs of a conditional mean are neither too small nor too large.
    np.testing.assert_allclose(errors.calibration, 1, atol=0.1)
    squares = errors.squares
    error = squares.std(1) / len(store) ** 0.5
    assert squares.shape == (len(MEASURED_TIMES), len(store), 2 * patch_size**2)
    apart = (squares.mean(1) - torch.from_numpy(basis.whole_optimum)) / error
    # In units of standard errors, over all times and directions.
    assert apart.square().mean() < 2
    assert apart.abs().max() < 5
    # A token by itself leaves more unknown.
    assert (basis.whole_optimum < basis.optimum * (1 + 1e-9)).all()


def sampled(network, prediction, moments, scale=1.0, steps=25):
    """Return the spectrum of 2,000 samples of a network along the tokens' directions."""
    settings = SampleConfig(num=2000, steps=steps, batch_size=500)
    sampler = LatentSampler(Denoiser(network, prediction, 1), LatentShape(*SHAPE, 1), settings, "cpu", scale)
    states = sampled_states(sampler, measure_basis(moments, 1, scale), SingleProcess())
    assert states is not None
    return states.spectrum(moments.stationary, steps)


@pytest.mark.parametrize("prediction", ["x", "v"])
def test_samples_of_the_best_network_of_gaussian_data_vary_as_the_data(prediction):
    moments = measure_moments(FakeStore(gaussian_latents()), [1], "cpu", SingleProcess())
    network = Optimal(prediction, moments.whole.covariance, moments.whole.mean, 0.5)
    found = sampled(network, prediction, moments, 0.5, steps=100)
    assert (found.count, len(found.times), len(found.spread)) == (2000, 11, 11)
    # 2,000 samples of 16 dependent tokens: a few per cent; and the flow of 100 steps is not exact.
    np.testing.assert_allclose(found.spread, 1, atol=0.08)
    np.testing.assert_allclose(found.by_frequency, 1, atol=0.08)


class Shrunk(nn.Module):
    """A network whose outputs are too small by a factor."""

    def __init__(self, network, factor):
        super().__init__()
        self.network, self.factor = network, factor

    def forward(self, z, t, labels):
        return self.factor * self.network(z, t, labels)


def test_outputs_that_are_too_small_show_in_the_calibration_and_in_the_samples():
    store = FakeStore(gaussian_latents())
    moments = measure_moments(store, [1], "cpu", SingleProcess())
    network = Shrunk(Optimal("x", moments.whole.covariance, 0 * moments.whole.mean, 1.0), 0.8)
    basis, denoiser = measure_basis(moments, 1), Denoiser(network, "x", 1)
    errors = velocity_errors(denoiser, store, np.arange(2000), basis, 0, "cpu", SingleProcess())
    # Near the noise x^ is a small part of v; near the data v^ is all of it, and far too large.
    assert (errors.calibration[-1] < 0.5).all()
    spread = np.array(sampled(network, "x", moments).spread)
    assert (spread[-1] < 0.75).all()
    # Little is lost early on the way.
    assert (spread[1] > 0.95).all()


def test_a_decoder_shows_the_directions_that_images_depend_on():
    class First(PixelAutoencoder):
        """Shows the first channel twice as strongly as the second, and not the third."""

        def decode(self, latents):
            return super().decode(latents * torch.tensor([2.0, 1.0, 0.0]).view(3, 1, 1))

    directions = Directions(1, 1.0, np.array([3.0, 2.0, 1.0]), torch.eye(3, dtype=torch.float64))
    found = decoder_sensitivity(First(), torch.zeros(8, 3, 16, 16), directions)
    assert found.directions == (0, 1, 2)
    # A third of the values changes.
    np.testing.assert_allclose(found.change, [4 / 3, 1 / 3, 0], rtol=0.05)


def test_latents_of_one_token_have_one_optimum():
    moments = measure_moments(FakeStore(gaussian_latents(200)), [4], "cpu", SingleProcess())
    basis = measure_basis(moments, 4)
    np.testing.assert_allclose(basis.whole_optimum, basis.optimum, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_by_spatial_frequency_the_optimum_is_that_of_the_whole_covariance(patch_size):
    data = gaussian_latents(100)
    # All shifts of all latents: a covariance that depends on distances alone.
    data = torch.cat([data.roll((rows, columns), (2, 3)) for rows in range(4) for columns in range(4)])
    moments = measure_moments(FakeStore(data), [patch_size], "cpu", SingleProcess())
    vectors = measure_basis(moments, patch_size).vectors
    exact = whole_optimum(moments.whole.covariance, SHAPE, patch_size, vectors, 0.5)
    found = stationary_optimum(moments.stationary, patch_size, vectors, 0.5)
    np.testing.assert_allclose(found, exact, rtol=1e-6)


def test_large_latents_have_an_optimum_by_spatial_frequency():
    data = torch.randn(40, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    moments = measure_moments(FakeStore(data), [4], "cpu", SingleProcess())
    basis = measure_basis(moments, 4)
    assert basis.whole_estimate == "stationary"
    assert basis.whole_optimum.shape == (len(MEASURED_TIMES), 48)
    # White noise: the other tokens hold no information about a token.
    np.testing.assert_allclose(basis.whole_optimum[6], basis.optimum[6], rtol=0.2)


@pytest.fixture(scope="module")
def place(digit_latents, tmp_path_factory):
    """Two short runs, of x and of v, on the same digits."""
    folder = tmp_path_factory.mktemp("inside")
    shutil.copytree(digit_latents, folder / "latents")
    store = LatentStore.open(folder / "latents")
    base = dataclasses.replace(resolve_recipe("digits", store.shape), steps=20, batch_size=32, checkpoint_every=20)
    for name, changes in {"x": {}, "v": {"prediction": "v"}}.items():
        train(dataclasses.replace(base, **changes), store, folder / name)
    return folder


def test_one_command_measures_networks(place, tmp_path):
    command = [
        "analyze",
        "--latents",
        place / "latents",
        "--out",
        tmp_path / "out",
        "--patch-size",
        "1",
        "--width",
        "64",
    ]
    command += ["--checkpoint", place / "x", place / "v", "--num", "100", "--samples", "40", "--steps", "7"]
    assert main([*map(str, command)]) == 0
    found = json.loads((tmp_path / "out" / "inside.json").read_text())
    assert (found["count"], found["patch_size"]) == (100, 1)
    assert [(network["run"], network["prediction"]) for network in found["networks"]] == [("x", "x"), ("v", "v")]
    x, v = (np.array(network["error"]) for network in found["networks"])
    assert x.shape == v.shape == (len(MEASURED_TIMES), 16)
    (beyond,) = found["beyond_the_first"]
    np.testing.assert_allclose(beyond["difference"], v - x, rtol=1e-9, atol=1e-12)
    # From the same noise: the difference has a smaller error than two independent networks.
    apart = np.hypot(*(np.array(network["standard_error"]) for network in found["networks"]))
    assert np.median((np.array(beyond["error"]) / apart)[:, :4]) < 0.8
    for network in found["networks"]:
        total = sum(np.array(band["error"]) for band in network["bands"])
        np.testing.assert_allclose(total, np.array(network["error"]).sum(1), rtol=1e-9)
        assert sum(band["directions"] for band in network["bands"]) == 16
        samples = network["samples"]
        assert (samples["count"], samples["steps"], len(samples["times"])) == (40, 7, 8)
        assert np.array(network["calibration"]).shape == x.shape
    assert len(found["decoder"]["change"]) == 16
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Inside the networks" in page
    assert "Samples of x have" in page
    assert "--checkpoint x v" in page


def test_networks_of_other_latents_or_patches_are_refused(place, tmp_path):
    store, run = LatentStore.open(place / "latents"), open_checkpoint(place / "x")
    wider = dataclasses.replace(run, config=dataclasses.replace(
        run.config, network=dataclasses.replace(run.config.network, patch_size=2)
    ))  # fmt: skip
    with pytest.raises(JLTError, match="different patch sizes"):
        require_comparable([run, wider], store)
    encode(EncodeConfig(images="digits", autoencoder="pixels", resolution=32, flips=False), tmp_path / "pixels")
    with pytest.raises(JLTError, match="was not trained on these latents: autoencoder"):
        require_comparable([run], LatentStore.open(tmp_path / "pixels"))


@pytest.mark.slow
def test_processes_share_the_measurement_of_networks(place, tmp_path):
    command = ["analyze", "--latents", place / "latents", "--patch-size", "1", "--width", "64", "--num", "300"]
    command += ["--checkpoint", place / "x", place / "v", "--samples", "200", "--steps", "3"]
    found = []
    for count in (1, 2):
        out = tmp_path / f"by-{count}"
        run_processes(count, [*map(str, command), "--out", str(out)])
        found.append(json.loads((out / "inside.json").read_text()))
        # Sums over samples differ in the last digits, and so does the seal.
        del found[-1]["sha256"]
    assert_alike(*found)


def test_networks_that_cannot_be_compared_leave_nothing(place, tmp_path, capsys):
    encode(EncodeConfig(images="digits", autoencoder="pixels", resolution=32, flips=False), tmp_path / "pixels")
    command = ["analyze", "--latents", tmp_path / "pixels", "--out", tmp_path / "out", "--checkpoint", place / "x"]
    assert main([*map(str, command)]) == 1
    assert "was not trained on these latents" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["--num", "1"], "--num must be from 2 to 10,000,000"),
        (["--patch-size"], "need numbers of 1 or more"),
        (["--width", "0"], "--width must be from 1"),
        (["--noise-scale", "0"], "noise-scale must be above 0"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_read(place, tmp_path, capsys, command, message):
    start = ["analyze", "--latents", str(place / "latents"), "--out", str(tmp_path / "out")]
    assert main([*start, "--checkpoint", str(place / "x"), *command]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_damaged_geometry_is_named_and_measured_again(place, tmp_path, capsys):
    out = tmp_path / "out"
    command = [
        "analyze",
        "--latents",
        place / "latents",
        "--out",
        out,
        "--patch-size",
        "1",
        "--checkpoint",
        place / "x",
    ]
    command = [*map(str, command), "--num", "20"]
    assert main(command) == 0
    before = (out / "geometry.json").read_bytes()
    assert json.loads(before)["widths"] == [64]
    (out / "geometry.json").write_bytes(before.replace(b'"dimension": 16', b'"dimension": 15', 1))
    assert main(["report", str(out)]) == 1
    assert "geometry.json was edited or damaged" in capsys.readouterr().err
    assert main(command) == 0
    assert "The geometry is measured again" in capsys.readouterr().err
    assert (out / "geometry.json").read_bytes() == before
    (out / "inside.json").write_text("{}")
    assert main(["report", str(out)]) == 1
    assert "inside.json carries no hash of itself" in capsys.readouterr().err


def test_bands_are_in_units_of_the_noise(place):
    checkpoint = open_checkpoint(place / "x")
    lam = np.array([4.0, 0.03, 0.01])
    basis = Basis(1, 2.0, lam, torch.eye(3, dtype=torch.float64), np.ones((1, 3)), np.ones((1, 3)), "exact")
    identity = {"checkpoint": "", "ema": "0.99"}
    errors = VelocityErrors(torch.ones(1, 5, 3, dtype=torch.float64), np.ones((1, 3)))
    found = network_error(checkpoint, identity, errors, basis)
    assert [(band.low, band.high, band.directions) for band in found.bands] == [(*BANDS[0], 2), (*BANDS[3], 1)]


def test_a_geometry_that_is_there_is_kept(place, tmp_path, monkeypatch):
    command = [
        "analyze",
        "--latents",
        place / "latents",
        "--out",
        tmp_path / "out",
        "--patch-size",
        "2",
        "--width",
        "64",
    ]
    assert main([*map(str, command)]) == 0
    before = (tmp_path / "out" / "geometry.json").stat().st_mtime_ns
    measured = []
    measure = analysis.measure_moments
    monkeypatch.setattr(analysis, "measure_moments", lambda *given: measured.append(given[1]) or measure(*given))
    assert main([*map(str, command), "--checkpoint", str(place / "x"), "--num", "20"]) == 0
    assert (tmp_path / "out" / "geometry.json").stat().st_mtime_ns == before
    assert measured == [(1,)]
    assert json.loads((tmp_path / "out" / "inside.json").read_text())["patch_size"] == 1
