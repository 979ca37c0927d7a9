"""Solvers, guidance and numbered images, against the exact Gaussian flow."""

import itertools
import math

import pytest
import torch

from jlt.config import PREDICTIONS, SampleConfig
from jlt.errors import JLTError
from jlt.path import expand_time
from jlt.sampling.generate import labels_for, sample_latents
from jlt.sampling.guidance import Denoiser, guided, in_interval
from jlt.sampling.solvers import network_evaluations, solve
from jlt.timesteps import uniform_grid

MEAN = torch.tensor([0.5, -1.0, 0.0], dtype=torch.float64)
VARIANCE = torch.tensor([4.0, 0.25, 0.01], dtype=torch.float64)


class ExactGaussian(torch.nn.Module):
    """The optimal network for x ~ N(mean, diag(variance)): the posterior mean of its target (eq. 10)."""

    def __init__(self, prediction):
        super().__init__()
        self.prediction = prediction

    def forward(self, z, t, labels):
        t = expand_time(t, z)
        spread = t**2 * VARIANCE + (1 - t) ** 2
        centred = z - t * MEAN
        x = MEAN + t * VARIANCE / spread * centred
        eps = (1 - t) / spread * centred
        return {"x": x, "eps": eps, "v": x - eps}[self.prediction]


def exact_velocity(z, t):
    return ExactGaussian("v")(z, torch.full((len(z),), t, dtype=z.dtype), None)


def exact_flow(noise):
    """The flow of a Gaussian maps each direction linearly: its standard deviation goes from 1 to sqrt(variance)."""
    return MEAN + VARIANCE.sqrt() * noise


def error(solver, steps):
    noise = torch.randn(64, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = solve(solver, exact_velocity, noise, uniform_grid(steps).tolist())
    return (found - exact_flow(noise)).abs().mean().item()


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_order_of_convergence(solver):
    # Eq. 8 ends Heun with one Euler step, whose local error is of second order, so the order stays 2.
    order = {"euler": 1, "heun": 2}[solver]
    errors = [error(solver, steps) for steps in (80, 160, 320)]
    orders = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert orders == pytest.approx([order] * 2, abs=0.15)


def test_samples_have_the_gaussians_moments():
    noise = torch.randn(100_000, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    samples = solve("heun", exact_velocity, noise, uniform_grid(50).tolist())
    covariance = torch.cov(samples.T)
    torch.testing.assert_close(samples.mean(0), MEAN, atol=0.02, rtol=0)
    torch.testing.assert_close(covariance.diag(), VARIANCE, rtol=0.03, atol=0)
    assert (covariance - covariance.diag().diag()).abs().max() < 0.02


def test_three_readouts_of_the_posterior_mean_are_one_velocity():
    z = torch.randn(32, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    labels = torch.zeros(32, dtype=torch.int64)
    for t in (0.03, 0.4, 0.97):
        for prediction in PREDICTIONS:
            denoiser = Denoiser(ExactGaussian(prediction), prediction, null_label=1)
            torch.testing.assert_close(denoiser.velocity(z, t, labels), exact_velocity(z, t), rtol=1e-9, atol=1e-9)


def test_number_of_evaluations():
    for solver, steps, expected in [("heun", 50, 99), ("euler", 50, 50), ("heun", 1, 1)]:
        asked = []

        def velocity(z, t, asked=asked):
            asked.append(t)
            return z

        solve(solver, velocity, torch.ones(1, 1), uniform_grid(steps).tolist())
        assert len(asked) == expected == network_evaluations(solver, steps)
        assert max(asked) < 1


class LabelNetwork(torch.nn.Module):
    """A network whose velocity is its label, and which counts the rows that it is asked for."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def forward(self, z, t, labels):
        self.rows.append(len(z))
        return labels.to(z.dtype).reshape(-1, *[1] * (z.ndim - 1)).expand_as(z)


@pytest.mark.parametrize(
    ("t", "interval", "inside"),
    [
        (0.0, (0.0, 1.0), True),
        (0.1, (0.1, 1.0), False),
        (0.12, (0.1, 1.0), True),
        (0.5, (0.1, 0.5), False),
        (0.0, (0.1, 1.0), False),
    ],
)
def test_guidance_is_eq_7_and_costs_nothing_without_effect(t, interval, inside):
    assert in_interval(t, *interval) is inside
    network, labels = LabelNetwork(), torch.tensor([2, 3])
    v = guided(Denoiser(network, "v", null_label=7), labels, 3.0, interval)(torch.zeros(2, 1), t)
    expected = 7 + 3.0 * (labels - 7) if inside else labels
    assert v.flatten().tolist() == expected.tolist()
    assert network.rows == [4 if inside else 2]


def test_scale_one_asks_no_null_branch():
    network = LabelNetwork()
    guided(Denoiser(network, "v", null_label=7), torch.tensor([1]), 1.0, (0.0, 1.0))(torch.zeros(1, 1), 0.5)
    assert network.rows == [1]


def images(num, batch_size, **settings):
    config = SampleConfig(num=num, batch_size=batch_size, steps=3, solver="euler", **settings)
    denoiser = Denoiser(LabelNetwork(), "v", null_label=10)
    batches = list(sample_latents(denoiser, (2, 2, 2), 10, config))
    return torch.cat([batch.latents for batch in batches]), torch.cat([batch.labels for batch in batches])


@pytest.mark.parametrize("labels", ["equal", "random", "3,7,7"])
def test_image_i_is_the_same_for_any_batch_size_and_count(labels):
    latents, drawn = images(23, 23, labels=labels)
    for num, batch_size in [(23, 1), (23, 5), (7, 4)]:
        again, labels_again = images(num, batch_size, labels=labels)
        assert len(again) == num
        assert torch.equal(again, latents[:num])
        assert torch.equal(labels_again, drawn[:num])
    assert not torch.equal(images(23, 23, labels=labels, seed=1)[0], latents)


def test_label_rules():
    counts = torch.bincount(labels_for("equal", range(23), 5, seed=0))
    assert counts.tolist() == [5, 5, 5, 4, 4]
    assert labels_for("3,7,7", range(5), 10, seed=0).tolist() == [3, 7, 7, 3, 7]
    assert len(set(labels_for("random", range(50), 10, seed=0).tolist())) > 5
    with pytest.raises(JLTError, match="no class 12"):
        labels_for("3,12", range(4), 10, seed=0)
    with pytest.raises(JLTError, match="equal, random or a list"):
        labels_for("eqal", range(4), 10, seed=0)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_prediction_samples_the_exact_gaussian(prediction):
    """From t = 0, where an eps-readout divides by zero, to t = 1, where an x-readout would."""
    noise = torch.randn(64, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    denoiser = Denoiser(ExactGaussian(prediction), prediction, null_label=1)
    velocity = guided(denoiser, torch.zeros(64, dtype=torch.int64), 1.0, (0.0, 1.0))
    found = solve("heun", velocity, noise, uniform_grid(50).tolist())
    assert (found - exact_flow(noise)).abs().mean() < 0.002


def test_images_that_are_not_finite_are_refused():
    class Diverged(torch.nn.Module):
        def forward(self, z, t, labels):
            return z / 0

    config = SampleConfig(num=4, batch_size=2, steps=3)
    with pytest.raises(JLTError, match="images 0 to 1 are not finite"):
        next(sample_latents(Denoiser(Diverged(), "v", null_label=1), (1, 1, 1), 1, config))
