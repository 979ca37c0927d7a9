"""Path, prediction, loss and times (eq. 1-6) against the definitions, in float64, from true samples."""

import itertools

import pytest
import scipy.integrate
import torch

from jlt.config import PREDICTIONS, LossConfig, TimestepConfig
from jlt.errors import JLTError
from jlt.loss import denoising_loss
from jlt.path import expand_time, interpolate
from jlt.prediction import clean_from_velocity, target, velocity_from_output
from jlt.timesteps import shift_time, time_density, times_from_uniform, uniform_grid

CELLS = list(itertools.product(PREDICTIONS, PREDICTIONS))
SHAPES = [(64,), (64, 3), (64, 2, 4, 4), (64, 2, 3, 4, 5)]


def draw(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, eps = torch.randn(2, *shape, dtype=torch.float64, generator=generator)
    return interpolate(2 * x + 1, eps, torch.rand(shape[0], dtype=torch.float64, generator=generator))


@pytest.mark.parametrize("shape", SHAPES)
def test_velocity_is_the_derivative_of_the_path(shape):
    sample, h = draw(shape), 1e-6
    t = sample.t.clamp(h, 1 - h)
    ahead, behind = (interpolate(sample.x, sample.eps, t + sign * h).z for sign in (1, -1))
    torch.testing.assert_close((ahead - behind) / (2 * h), sample.v, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_perfect_outputs_read_out_to_the_true_sample(shape, prediction):
    sample = draw(shape)
    v = velocity_from_output(prediction, target(prediction, sample), sample.z, sample.t)
    torch.testing.assert_close(v, sample.x - sample.eps, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(clean_from_velocity(v, sample.z, sample.t), sample.x)
    torch.testing.assert_close(in_space("eps", v, sample), sample.eps)


def test_clamped_readout_is_eq_3():
    z, o = torch.tensor([[2.0]]), torch.tensor([[5.0]])
    late, early = torch.tensor([0.99]), torch.tensor([0.01])
    assert velocity_from_output("x", o, z, late, t_eps=0.05).item() == pytest.approx(3 / 0.05)
    assert velocity_from_output("eps", o, z, early, t_eps=0.05).item() == pytest.approx(-3 / 0.05)
    assert velocity_from_output("v", o, z, late, t_eps=0.05).item() == 5


def in_space(space, v, sample):
    """Eq. 4."""
    t = expand_time(sample.t, v)
    return {"v": v, "x": sample.z + (1 - t) * v, "eps": sample.z - t * v}[space]


@pytest.mark.parametrize(("prediction", "space"), CELLS)
def test_published_loss_is_the_definition(prediction, space):
    """Output and target go through the same clamped readout into the space (eq. 3-5)."""
    sample, t_eps = draw((256, 2, 4, 4)), 0.05
    output = target(prediction, sample) + torch.randn_like(sample.x)
    if prediction == space:
        found, wanted = output, target(prediction, sample)
    else:
        found, wanted = (
            in_space(space, velocity_from_output(prediction, o, sample.z, sample.t, t_eps), sample)
            for o in (output, target(prediction, sample))
        )
    expected = (found - wanted).square().flatten(1).mean(1)
    loss = denoising_loss(prediction, output, sample, LossConfig(space, "published", t_eps))
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize(("prediction", "space"), CELLS)
def test_matched_loss_depends_on_the_velocity_error_alone(prediction, space):
    """For every prediction, the same velocity error costs w(t) times its square as seen in the space (eq. 5)."""
    sample, t_eps = draw((256, 2, 4, 4)), 0.05
    error = torch.randn_like(sample.x)
    t = expand_time(sample.t, sample.x)
    v = sample.v + error
    output = {"x": sample.z + (1 - t) * v, "eps": sample.z - t * v, "v": v}[prediction]
    w = ((1 - t) / (1 - t).clamp_min(t_eps)) ** 2 * (t / t.clamp_min(t_eps)) ** 2
    gain = {"x": 1 - t, "eps": t, "v": 1}[space]
    expected = (w * (gain * error) ** 2).flatten(1).mean(1)
    loss = denoising_loss(prediction, output, sample, LossConfig(space, "matched", t_eps))
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("weighting", ["published", "matched"])
@pytest.mark.parametrize(("prediction", "space"), CELLS)
def test_losses_are_finite_at_both_ends(prediction, space, weighting):
    x, eps = torch.randn(2, 2, 5, generator=torch.Generator().manual_seed(0))
    sample = interpolate(x, eps, torch.tensor([0.0, 1.0]))
    loss = denoising_loss(prediction, torch.zeros_like(x), sample, LossConfig(space, weighting, 0.05))
    assert loss.isfinite().all()
    assert loss.dtype == torch.float32


@pytest.mark.parametrize(
    "config",
    [
        TimestepConfig(),
        TimestepConfig(P_mean=0.0, P_std=1.0),
        TimestepConfig("uniform"),
        TimestepConfig(shift=3.0),
        TimestepConfig("uniform", shift=0.4),
    ],
)
def test_times_have_the_stated_density(config):
    u = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    t = times_from_uniform(u, config)
    assert ((t > 0) & (t < 1)).all()

    def density(value):
        return time_density(torch.tensor(value, dtype=torch.float64), config).item()

    for low, high in [(0.0, 0.2), (0.2, 0.5), (0.5, 0.95), (0.0, 1.0)]:
        share = ((t > low) & (t <= high)).double().mean().item()
        assert share == pytest.approx(scipy.integrate.quad(density, low + 1e-9, high - 1e-9)[0], abs=2e-4)


def test_logit_normal_moments():
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    logits = torch.logit(times_from_uniform(u, TimestepConfig(P_mean=-0.8, P_std=0.8)))
    assert logits.mean().item() == pytest.approx(-0.8, abs=1e-4)
    assert logits.std().item() == pytest.approx(0.8, abs=1e-3)


def test_shift_and_grid():
    t = torch.tensor([0.0, 0.5, 1.0])
    torch.testing.assert_close(shift_time(t, 3.0), torch.tensor([0.0, 0.25, 1.0]))
    grid = uniform_grid(50)
    assert len(grid) == 51
    assert grid.dtype == torch.float64
    # An interval that begins at 0.1 must exclude the grid's own 0.1.
    assert grid[5].item() == 0.1
    assert uniform_grid(4, shift=3.0).tolist() == pytest.approx([0, 1 / 10, 1 / 4, 1 / 2, 1])


@pytest.mark.parametrize("t_eps", [0.0, 1.0, -0.1])
def test_loss_without_clamp_is_refused(t_eps):
    with pytest.raises(JLTError, match="t_eps"):
        LossConfig(t_eps=t_eps)
