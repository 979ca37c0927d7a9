"""Solvers, guidance and numbered images, against the exact Gaussian flow."""

import dataclasses
import functools
import itertools
import math

import pytest
import torch

from jlt.cli.main import main
from jlt.config import PREDICTIONS, SAMPLERS, LatentShape, SampleConfig
from jlt.errors import JLTError
from jlt.path import expand_time
from jlt.sampling.guidance import Denoiser, guided, in_interval, rows_evaluated
from jlt.sampling.sampler import LatentSampler, labels_for
from jlt.sampling.solvers import network_evaluations, solve
from jlt.storage.codec import to_json
from jlt.timesteps import sampling_grid, uniform_grid

ORDERS = {"euler": 1, "heun": 2, "midpoint": 2, "dpmpp_2m": 2, "ancestral": 1}
SHAPE = LatentShape(2, 2, 2, num_classes=10)
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


def error(solver, steps, shift=1.0):
    noise = torch.randn(64, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = solve(solver, exact_velocity, noise, uniform_grid(steps, shift).tolist())
    return (found - exact_flow(noise)).abs().mean().item()


def orders(errors):
    return [math.log2(a / b) for a, b in itertools.pairwise(errors)]


@pytest.mark.parametrize("shift", [1.0, 2.0])
@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_order_of_convergence(solver, shift):
    # Eq. 8 ends Heun with one Euler step, whose local error is of second order, so the order stays 2.
    found = orders([error(solver, steps, shift) for steps in (160, 320, 640)])
    assert found == pytest.approx([ORDERS[solver]] * 2, abs=0.15)


def curved_velocity(z, t):
    """A velocity that is not linear in z, as the Gaussian's is: there, midpoint happens to be of third order."""
    return torch.sin(3 * z) + t * z


@functools.cache
def curved_flow():
    noise = torch.randn(64, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return noise, solve("midpoint", curved_velocity, noise, uniform_grid(10_000).tolist())


def curved_error(solver, steps):
    noise, exact = curved_flow()
    return (solve(solver, curved_velocity, noise, uniform_grid(steps).tolist()) - exact).abs().mean().item()


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2), ("midpoint", 2)])
def test_order_of_convergence_on_a_curved_flow(solver, order):
    assert orders([curved_error(solver, steps) for steps in (80, 160, 320)]) == pytest.approx([order] * 2, abs=0.15)


def test_the_multistep_solver_is_of_second_order_in_lambda():
    """Between times where lambda = log t/(1-t) is finite, on a grid that is uniform in it."""
    first, last = 0.02, 0.98
    spread = [(t**2 * VARIANCE + (1 - t) ** 2).sqrt() for t in (first, last)]
    noise = torch.randn(64, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    errors = []
    for steps in (80, 160, 320):
        grid = torch.linspace(
            *torch.logit(torch.tensor([first, last]).double()).tolist(), steps + 1, dtype=torch.float64
        )
        found = solve("dpmpp_2m", exact_velocity, first * MEAN + spread[0] * noise, grid.sigmoid().tolist())
        errors.append((found - last * MEAN - spread[1] * noise).abs().mean().item())
    assert orders(errors) == pytest.approx([ORDERS["dpmpp_2m"]] * 2, abs=0.15)


def test_the_multistep_solver_needs_fewer_evaluations_on_the_usual_grid():
    """From 0 to 1 lambda is infinite at the ends, and the error behaves as h^2 log(1/h)."""
    assert math.log2(error("dpmpp_2m", 100) / error("dpmpp_2m", 1600)) / 4 > 1.5
    for evaluations in (10, 20, 50):
        multistep, euler = error("dpmpp_2m", evaluations), error("euler", evaluations)
        assert multistep < 0.45 * euler
        # Heun has half as many steps for as many evaluations.
        assert multistep < error("heun", evaluations // 2)


def impulses(steps):
    """Return what one unit of the first noise, and of each step's fresh noise, adds to a centred sample."""
    variance = VARIANCE[0]

    def velocity(z, t):
        return (t * variance - (1 - t)) / (t**2 * variance + (1 - t) ** 2) * z

    unit = torch.eye(steps + 1, dtype=torch.float64)
    return solve("ancestral", velocity, unit[0], uniform_grid(steps).tolist(), fresh=lambda k: unit[k + 1])


def test_the_stochastic_solver_has_the_exact_variance_in_the_limit():
    errors = [abs(impulses(steps).square().sum() - VARIANCE[0]).item() for steps in (80, 160, 320)]
    assert orders(errors) == pytest.approx([ORDERS["ancestral"]] * 2, abs=0.15)
    # It forgets the noise that it began with, which a flow carries to the end.
    assert impulses(80)[0].abs() < 1e-9


def test_a_stochastic_solver_without_a_source_of_noise_is_an_error():
    with pytest.raises(ValueError, match="fresh noise"):
        solve("ancestral", exact_velocity, torch.zeros(1, 3, dtype=torch.float64), uniform_grid(3).tolist())


@pytest.mark.parametrize("solver", ["euler", "midpoint", "heun"])
@pytest.mark.parametrize("grid", [uniform_grid(7).tolist(), uniform_grid(7, 3.0).tolist(), [0, 0.1, 0.7, 1]])
def test_runge_kutta_steps_are_those_of_torchdiffeq(solver, grid):
    torchdiffeq = pytest.importorskip("torchdiffeq")
    noise = torch.randn(16, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    method = {"heun": "heun2"}.get(solver, solver)
    times = torch.tensor(grid, dtype=torch.float64)
    # Eq. 8 ends with Euler where another solver would evaluate the velocity at t = 1.
    split = len(grid) if solver != "heun" else len(grid) - 1
    theirs = torchdiffeq.odeint(lambda t, z: curved_velocity(z, t), noise, times[:split], method=method)[-1]
    if split < len(grid):
        theirs = torchdiffeq.odeint(lambda t, z: curved_velocity(z, t), theirs, times[-2:], method="euler")[-1]
    torch.testing.assert_close(solve(solver, curved_velocity, noise, grid), theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_the_multistep_solver_is_that_of_diffusers():
    """Its scheduler counts noise levels sigma = 1 - t down, and predicts the velocity towards the noise."""
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=2.0, final_sigmas_type="zero"
    )
    scheduler.set_timesteps(12)
    grid = [1 - sigma for sigma in scheduler.sigmas.double().tolist()]
    z = begun = torch.randn(16, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for timestep, t in zip(scheduler.timesteps, grid, strict=False):
        z = scheduler.step(-exact_velocity(z, t), timestep, z).prev_sample
    # Theirs starts close to t = 0; with no more than 14 steps it takes the last one at first order, as ours does.
    torch.testing.assert_close(solve("dpmpp_2m", exact_velocity, begun, grid), z, rtol=1e-4, atol=1e-4)


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
    for solver, steps, expected in [
        ("heun", 50, 99),
        ("euler", 50, 50),
        ("heun", 1, 1),
        ("midpoint", 25, 50),
        ("dpmpp_2m", 20, 20),
        ("ancestral", 20, 20),
    ]:
        times = []

        def velocity(z, t, times=times):
            times.append(t)
            return z

        solve(solver, velocity, torch.ones(1, 1), uniform_grid(steps).tolist(), fresh=lambda _: torch.ones(1, 1))
        assert len(times) == expected == network_evaluations(solver, steps)
        assert max(times) < 1


class LabelNetwork(torch.nn.Module):
    """A network whose velocity is its label, and which counts the rows that it evaluates."""

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


def test_scale_one_evaluates_no_null_branch():
    network = LabelNetwork()
    guided(Denoiser(network, "v", null_label=7), torch.tensor([1]), 1.0, (0.0, 1.0))(torch.zeros(1, 1), 0.5)
    assert network.rows == [1]


def test_scale_zero_evaluates_the_null_branch_alone():
    network = LabelNetwork()
    v = guided(Denoiser(network, "v", null_label=7), torch.tensor([1]), 0.0, (0.0, 1.0))(torch.zeros(1, 1), 0.5)
    assert (v.item(), network.rows) == (7, [1])


def test_a_guide_takes_the_place_of_the_null_class():
    network, weaker, labels = LabelNetwork(), LabelNetwork(), torch.tensor([2, 3])
    # The guide reads the same labels and, as an x-predictor evaluated at z = 0 and t = 1/2, doubles them.
    guide = Denoiser(weaker, "x", null_label=9)
    velocity = guided(Denoiser(network, "v", null_label=7), labels, 3.0, (0.1, 1.0), guide)
    v = velocity(torch.zeros(2, 1), 0.5)
    assert v.flatten().tolist() == (2 * labels + 3.0 * (labels - 2 * labels)).tolist()
    assert (network.rows, weaker.rows) == ([2], [2])
    assert velocity(torch.zeros(2, 1), 0.05).flatten().tolist() == labels.tolist()
    assert (network.rows, weaker.rows) == ([2, 2], [2])


@pytest.mark.parametrize(
    ("settings", "rows"),
    [
        # 99 evaluations; at t = 0, 0.02, ..., 0.1 the first of a step runs one branch, the second one up to 0.1 too.
        ({"cfg_scale": 2.9, "cfg_interval": (0.1, 1.0)}, 2 * 99 - 6 - 5),
        ({"cfg_scale": 2.9}, 2 * 99),
        ({"cfg_scale": 1.0}, 99),
        ({"cfg_scale": 0.0}, 99),
        ({"solver": "dpmpp_2m", "steps": 20, "cfg_scale": 2.0}, 40),
        ({"grid": (0, 0.3, 1), "cfg_scale": 2.0, "cfg_interval": (0.2, 1.0)}, 1 + 2 + 2),
    ],
)
def test_what_an_image_costs_is_known_before_it_is_drawn(settings, rows):
    config, network = SampleConfig(**settings), LabelNetwork()
    velocity = guided(Denoiser(network, "v", null_label=7), torch.tensor([1]), config.cfg_scale, config.cfg_interval)
    solve(config.solver, velocity, torch.zeros(1, 1), sampling_grid(config))
    assert sum(network.rows) == rows == rows_evaluated(config)


def test_grids():
    assert sampling_grid(SampleConfig(steps=4)) == [0, 0.25, 0.5, 0.75, 1]
    assert sampling_grid(SampleConfig(steps=4, shift=3.0)) == pytest.approx([0, 1 / 10, 1 / 4, 1 / 2, 1])
    explicit = SampleConfig(grid=(0, 0.5, 1))
    assert (sampling_grid(explicit), explicit.steps) == ([0, 0.5, 1], 2)
    for wrong in [(0, 1, 0.5), (0.1, 1), (0, 0.9), (0, 0.5, 0.5, 1), (0,)]:
        with pytest.raises(JLTError, match="grid must rise from 0 to 1"):
            SampleConfig(grid=wrong)
    with pytest.raises(JLTError, match="leave shift at 1"):
        SampleConfig(grid=(0, 1), shift=2.0)


def test_a_named_sampler_is_its_settings():
    fast = SampleConfig(sampler="fast")
    assert fast == SampleConfig(**SAMPLERS["fast"]) != SampleConfig()
    assert SampleConfig(sampler="published", steps=3) == SampleConfig(solver="heun", steps=50)
    assert set(to_json(fast)) == {field.name for field in dataclasses.fields(SampleConfig)}
    # Guided at all times, both branches counted.
    published, cheap = (rows_evaluated(SampleConfig(sampler=name, cfg_scale=2.0)) for name in ("published", "fast"))
    assert (published, cheap <= 40) == (198, True)
    assert dataclasses.replace(fast, num=3, steps=7).steps == 7


@pytest.mark.parametrize("prefix", ["--", "--sample.", "--evaluation.sample."])
def test_a_named_sampler_next_to_its_settings_is_refused(prefix, capsys):
    for option in (f"{prefix}steps=4", f"{prefix}solver=euler", f"{prefix}shift=2", f"{prefix}grid=0"):
        assert main(["sample", f"{prefix}sampler=fast", option]) == 2
        assert f"leave out {option.partition('=')[0]}, or {prefix}sampler" in capsys.readouterr().err


def test_fresh_noise_belongs_to_image_and_step():
    """A stochastic solver's image i is the same in any batch, and each step's noise is another."""
    config = SampleConfig(num=9, batch_size=9, steps=4, solver="ancestral")
    denoiser = Denoiser(LabelNetwork(), "x", null_label=10)
    (whole,) = LatentSampler(denoiser, SHAPE, config).batches()
    parts = LatentSampler(denoiser, SHAPE, dataclasses.replace(config, batch_size=2)).batches()
    assert torch.equal(torch.cat([part.latents for part in parts]), whole.latents)
    (few,) = LatentSampler(denoiser, SHAPE, config).batches([range(4, 6)])
    assert torch.equal(few.latents, whole.latents[4:6])
    fresh = LatentSampler(denoiser, SHAPE, config, noise_scale=2.0).start(range(3)).fresh
    draws = torch.stack([fresh(0), fresh(1), fresh(0)])
    assert torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], draws[1])


def images(num, batch_size, **settings):
    config = SampleConfig(num=num, batch_size=batch_size, steps=3, solver="euler", **settings)
    denoiser = Denoiser(LabelNetwork(), "v", null_label=10)
    batches = list(LatentSampler(denoiser, SHAPE, config).batches())
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
        next(LatentSampler(Denoiser(Diverged(), "v", null_label=1), LatentShape(1, 1, 1, 1), config).batches())
