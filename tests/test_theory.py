"""Path, prediction, loss and times (eq. 1-6) against the definitions, in float64, from true samples."""

import itertools

import pytest
import scipy.integrate
import torch

from jlt.config import PREDICTIONS, LossConfig, TimestepConfig, canonical_prediction
from jlt.errors import JLTError, UsageError
from jlt.loss import denoising_loss
from jlt.path import expand_time, interpolate
from jlt.prediction import clean_from_velocity, mixture, readout_gain, slope, target, velocity_from_output
from jlt.timesteps import shift_time, time_density, times_from_uniform, uniform_grid

MEMBERS = (*PREDICTIONS, "edm", "skip=0.1", "skip=20", "mix=0.3", "mix=2")
CELLS = list(itertools.product(MEMBERS, (*PREDICTIONS, "edm", "mix=0.3")))
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
@pytest.mark.parametrize("prediction", MEMBERS)
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
    """Eq. 4, and eq. 2 for the others."""
    t = expand_time(sample.t, v)
    x, eps = sample.z + (1 - t) * v, sample.z - t * v
    if space in PREDICTIONS:
        return {"v": v, "x": x, "eps": eps}[space]
    alpha, beta = (expand_time(part, v) for part in mixture(space, sample.t))
    return alpha * x + beta * eps


@pytest.mark.parametrize("prediction", MEMBERS)
def test_the_slope_is_that_of_the_target_along_the_velocity(prediction):
    sample = draw((64, 3))
    target_at = [in_space(prediction, sample.v + shift, sample) for shift in (0, 1)]
    m = slope(prediction, sample.t)
    torch.testing.assert_close(target_at[1] - target_at[0], expand_time(m, sample.z).expand(64, 3))
    assert m.sign().unique().equal(readout_gain(prediction, sample.t, 0.3).sign().unique())
    assert len(m.sign().unique()) == 1


def test_a_skip_is_edm_and_both_lines_begin_at_x():
    """Karras et al. 2022, table 1, with sigma = (1-t)/t and z/t = x + sigma eps, for data of standard deviation 1."""
    sample = draw((64, 3))
    t = expand_time(sample.t, sample.x)
    sigma, noisy = (1 - t) / t, sample.z / t
    c_skip, c_out = 1 / (sigma**2 + 1), sigma / (sigma**2 + 1).sqrt()
    torch.testing.assert_close(target("edm", sample), (sample.x - c_skip * noisy) / c_out)
    for member in ("skip=1e-9", "mix=1e-9"):
        torch.testing.assert_close(target(member, sample), sample.x, atol=1e-7, rtol=1e-7)
    torch.testing.assert_close(target("mix=0.999999999", sample), sample.v, atol=1e-7, rtol=1e-7)
    torch.testing.assert_close(target("skip=1e9", sample) / -1e9, sample.eps, atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("skip=0", "x"), ("mix=0.0", "x"), ("mix=1", "v"), ("skip=1.0", "edm"), ("skip=0.10", "skip=0.1"), ("eps", "eps")],
)
def test_a_prediction_has_one_name(name, expected):
    assert canonical_prediction(name) == expected
    assert LossConfig(space=name).space == expected


@pytest.mark.parametrize(
    "name", ["w", "skip", "skip=", "skip=-1", "skip=nan", "mix=inf", "eps=1", "x=2", "skip=1=2", ""]
)
def test_other_names_are_refused(name):
    with pytest.raises(UsageError, match="no prediction named"):
        canonical_prediction(name)


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
    output = in_space(prediction, v, sample)
    w = ((1 - t) / (1 - t).clamp_min(t_eps)) ** 2 * (t / t.clamp_min(t_eps)) ** 2
    gain = {"x": 1 - t, "eps": t, "v": 1}[space] if space in PREDICTIONS else slope(space, t)
    expected = (w * (gain * error) ** 2).flatten(1).mean(1)
    loss = denoising_loss(prediction, output, sample, LossConfig(space, "matched", t_eps))
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("prediction", MEMBERS)
def test_min_snr_weighs_the_velocity_as_published(prediction):
    """Hang et al. 2023: the error of x times min(SNR, 5), with the ends of the path as in `matched`."""
    sample, t_eps = draw((256, 3)), 0.05
    error = torch.randn_like(sample.x)
    t = sample.t
    w = ((1 - t) / (1 - t).clamp_min(t_eps)) ** 2 * (t / t.clamp_min(t_eps)) ** 2
    clean_error = (1 - t)[:, None] * error
    expected = w * ((t / (1 - t)) ** 2).clamp_max(5) * clean_error.square().mean(1)
    output = in_space(prediction, sample.v + error, sample)
    loss = denoising_loss(prediction, output, sample, LossConfig("v", "min_snr", t_eps))
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("weighting", ["published", "matched", "min_snr", "uncertainty"])
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
        TimestepConfig("half_cauchy"),
        TimestepConfig("half_cauchy", shift=0.843),
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


@pytest.mark.parametrize("lam", [0.04, 1.0, 7.0])
def test_half_cauchy_times_count_an_error_as_sampling_does(lam):
    """Eq. 14 by brute force: a velocity error at a time, carried to the data by the exact flow of a Gaussian."""
    times = torch.linspace(0.05, 0.9, 18, dtype=torch.float64)
    counted = []
    for start in times.tolist():
        # dz/dt of eq. 10, from an error of one unit at `start`.
        def flow(t, z):
            variance = t**2 * lam + (1 - t) ** 2
            return (t * lam - (1 - t)) / variance * z

        end = scipy.integrate.solve_ivp(flow, (start, 1.0), [1.0], rtol=1e-9, atol=1e-12).y[0, -1]
        counted.append(end**2)
    density = time_density(times, TimestepConfig("half_cauchy", shift=lam**0.5))
    ratio = torch.tensor(counted, dtype=torch.float64) / density
    torch.testing.assert_close(ratio / ratio[0], torch.ones_like(ratio), rtol=1e-5, atol=1e-5)
