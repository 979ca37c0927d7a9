"""Eq. 13 against reduced-rank regressions and Monte Carlo, and the forecast and the advice from it."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from fake_results import geometry

from jlt.config import PREDICTIONS, TimestepConfig
from jlt.errors import UsageError
from jlt.geometry import gaussian
from jlt.geometry.forecast import (
    EVEN_MARGIN,
    MIN_CONFIDENCE,
    Estimate,
    TimeQuadrature,
    best_skip,
    capacity_curve,
    forecast,
    needed_ranks,
    required_rank,
    training_times,
    unavoidable_risk,
    width_floor,
)
from jlt.geometry.spectrum import shrunk
from jlt.prediction import mixture
from jlt.report.geometry_text import advice_sentences
from jlt.results.geometry import TrainingModel
from jlt.timesteps import times_from_uniform

MEMBERS = (*PREDICTIONS, "edm", "skip=0.3", "mix=0.3")
EIGENVALUES = np.array([6.0, 1.0, 0.3, 0.03, 0.0008])
PUBLISHED = TimestepConfig()
MODEL = TrainingModel(PUBLISHED, 0.05)
UNCLAMPED = TrainingModel(PUBLISHED, 0.0)


def at(t):
    return TimeQuadrature(np.array([t]), np.ones(1), training_times(UNCLAMPED).loss)


# Second derivations of eq. 3 and 5.


def velocity_gain(prediction, t):
    """The squared factor from an error of the output to one of the velocity."""
    return {"x": (1 - t) ** -2, "eps": t**-2.0, "v": np.ones_like(t)}[prediction]


def loss_weight(t, t_eps, space="v"):
    """The weight of a squared velocity error in the matched loss of a space."""
    clamped = ((1 - t) / np.maximum(1 - t, t_eps) * t / np.maximum(t, t_eps)) ** 2
    return clamped * {"x": (1 - t) ** 2, "eps": t**2, "v": np.ones_like(t)}[space]


def second_moments(prediction, lam, t):
    """Covariances of (target, z), (z, z) and (target, target) for a Gaussian, in axes that are no eigen-directions."""
    turn = np.linalg.qr(np.random.default_rng(3).standard_normal((len(lam), len(lam))))[0]
    sigma, identity = turn @ np.diag(lam) @ turn.T, np.eye(len(lam))
    with_z = {"x": t * sigma, "eps": (1 - t) * identity, "v": t * sigma - (1 - t) * identity}[prediction]
    own = {"x": sigma, "eps": identity, "v": sigma + identity}[prediction]
    return with_z, t**2 * sigma + (1 - t) ** 2 * identity, own


def fitted(prediction, lam, t, rank, rounds=4000):
    """Return the error of the best map U V of a rank, found by solving for U and V in turn."""
    with_z, z, own = second_moments(prediction, lam, t)
    right = np.random.default_rng(0).standard_normal((rank, len(lam)))
    for _ in range(rounds):
        left = with_z @ right.T @ np.linalg.inv(right @ z @ right.T)
        right = np.linalg.solve(left.T @ left, left.T @ with_z) @ np.linalg.inv(z)
    product = left @ right
    return np.trace(own - 2 * product @ with_z.T + product @ z @ product.T)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("t", [0.2, 0.5, 0.85])
def test_capacity_curves_are_reduced_rank_regressions(prediction, t):
    curve = capacity_curve(prediction, EIGENVALUES, at(t))
    gain = {"x": (1 - t) ** -2, "eps": t**-2, "v": 1.0}[prediction]
    best = gaussian.conditional_variance(prediction, EIGENVALUES, t).sum()
    assert curve[-1] == 0
    for rank in range(1, len(EIGENVALUES)):
        assert curve[rank] == pytest.approx(gain * (fitted(prediction, EIGENVALUES, t, rank) - best), rel=1e-6)
    _, _, own = second_moments(prediction, EIGENVALUES, t)
    assert curve[0] == pytest.approx(gain * (np.trace(own) - best), rel=1e-9)


@pytest.mark.parametrize("prediction", MEMBERS)
def test_a_sampled_velocity_error_is_the_curve(prediction):
    """Draw data, noise and times, predict with the best map of rank 2, read the velocity out, and average."""
    random, count, rank = np.random.default_rng(0), 400_000, 2
    u = torch.from_numpy(random.uniform(size=count))
    t = times_from_uniform(u, PUBLISHED).numpy()[:, None]
    x = random.standard_normal((count, 5)) * np.sqrt(EIGENVALUES)
    eps = random.standard_normal((count, 5))
    z, v = t * x + (1 - t) * eps, x - eps
    alpha, beta = mixture(prediction, t)
    power = gaussian.explained_power(prediction, EIGENVALUES, t)
    kept = np.argsort(np.argsort(-power, axis=1), axis=1) < rank
    output = kept * gaussian.best_coefficient(prediction, EIGENVALUES, t) * z
    read = (output - (alpha + beta) * z) / ((1 - t) * alpha - t * beta)
    errors = ((read - v) ** 2 * loss_weight(t, 0.05)).sum(1)
    times = training_times(MODEL)
    expected = unavoidable_risk(EIGENVALUES, times) + capacity_curve(prediction, EIGENVALUES, times)[rank]
    assert errors.mean() == pytest.approx(expected, abs=4 * errors.std() / math.sqrt(count))


def test_one_subspace_for_all_times_costs_velocity_alone():
    times = training_times(UNCLAMPED)
    for prediction in PREDICTIONS:
        own, shared = (capacity_curve(prediction, EIGENVALUES, times, shared=shared) for shared in (False, True))
        assert (shared >= own * (1 - 1e-12)).all()
        assert np.allclose(own, shared, rtol=1e-12) == (prediction != "v")
        assert (np.diff(own) <= 0).all()


@pytest.mark.parametrize(
    "config",
    [PUBLISHED, TimestepConfig(P_mean=0.0, P_std=1.0), TimestepConfig(shift=3.0), TimestepConfig("uniform", shift=0.5)],
    ids=["published", "authors' velocity", "shifted", "uniform"],
)
def test_the_quadrature_averages_over_training_times(config):
    times = training_times(TrainingModel(config, 0.05))
    u = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    draws = times_from_uniform(u, config).numpy()
    assert times.probability.sum() == pytest.approx(1, rel=1e-12)
    for function in (lambda t: t, np.square, lambda t: loss_weight(t, 0.05) / (1 - t) ** 2):
        assert times.average(function(times.t)) == pytest.approx(function(draws).mean(), rel=1e-4)


def test_the_quadrature_is_exact_where_the_answer_is_known():
    """E 1/(1-t)^2 = E (1 + e^n)^2 for n ~ N(m, s^2), without any clamp."""
    for m, s in ((-0.8, 0.8), (0.0, 1.0), (0.5, 1.5)):
        times = training_times(TrainingModel(TimestepConfig(P_mean=m, P_std=s), 0.0))
        known = 1 + 2 * math.exp(m + s**2 / 2) + math.exp(2 * m + 2 * s**2)
        assert times.average((1 - times.t) ** -2) == pytest.approx(known, rel=1e-10)
    with pytest.raises(UsageError, match="above 0 for times"):
        TrainingModel(TimestepConfig("uniform"), 0.0)


@pytest.mark.parametrize("space", PREDICTIONS)
@pytest.mark.parametrize("t_eps", [0.0, 0.05])
def test_errors_are_weighed_as_by_the_loss(space, t_eps):
    times = training_times(TrainingModel(PUBLISHED, t_eps, space))
    for prediction in PREDICTIONS:
        expected = velocity_gain(prediction, times.t) * loss_weight(times.t, t_eps, space)
        np.testing.assert_allclose(times.loss_weight(prediction)[:, 0], expected, rtol=1e-12)


@pytest.mark.parametrize("shift", [0.05, 20.0])
@pytest.mark.parametrize("config", [TimestepConfig("uniform"), TimestepConfig(P_std=5.0)], ids=["uniform", "wide"])
def test_no_shift_moves_a_time_to_the_end(config, shift):
    model = TrainingModel(dataclasses.replace(config, shift=shift), 0.05)
    times = training_times(model)
    assert times.t.min() > 0
    assert times.t.max() < 1
    assert math.isfinite(needed_ranks(np.array([1.0, 0.0]), model, 0.05)["x"])


@pytest.mark.parametrize("prediction", MEMBERS)
def test_a_narrow_network_leaves_the_smallest_directions_of_its_target(prediction):
    """Of sampled targets, weighed as the loss does, no subspace of a width keeps more than that of their PCA."""
    random, count = np.random.default_rng(0), 400_000
    t = times_from_uniform(torch.from_numpy(random.uniform(size=count)), PUBLISHED).numpy()[:, None]
    x, eps = random.standard_normal((count, 5)) * np.sqrt(EIGENVALUES), random.standard_normal((count, 5))
    alpha, beta = mixture(prediction, t)
    weight = loss_weight(t, 0.05) / ((1 - t) * alpha - t * beta) ** 2
    target = (alpha * x + beta * eps) * np.sqrt(weight)
    kept = np.linalg.eigvalsh(target.T @ target / count)
    times = training_times(MODEL)
    for width in range(5):
        floor = width_floor(prediction, EIGENVALUES, times, width)
        assert floor == pytest.approx(kept[: 5 - width].sum(), rel=0.02)
        # The best linear predictor of this rank is such a network.
        best = unavoidable_risk(EIGENVALUES, times) + capacity_curve(prediction, EIGENVALUES, times, shared=True)[width]
        assert floor <= best * (1 + 1e-12)
    assert width_floor(prediction, EIGENVALUES, times, 5) == width_floor(prediction, EIGENVALUES, times, 9) == 0


def test_the_unavoidable_risk_is_the_same_for_all_predictions():
    for t in (0.1, 0.6):
        for prediction in PREDICTIONS:
            left = gaussian.conditional_variance(prediction, EIGENVALUES, t) * velocity_gain(prediction, np.array(t))
            assert left.sum() == pytest.approx(unavoidable_risk(EIGENVALUES, at(t)), rel=1e-12)


def test_required_ranks_lie_between_whole_ones():
    curve = np.array([4.0, 2.0, 1.0, 0.0])
    assert [required_rank(curve, risk) for risk in (5.0, 4.0, 3.0, 1.0, 0.25, 0.0)] == [0, 0, 0.5, 2, 2.75, 3]


# ---- the forecast ----


def estimate(lam, error=0.01, name="tokens"):
    lam = np.asarray(lam, dtype=float)
    return Estimate(name, lam, np.full(len(lam), error), independent=2 / error**2)


def sentences(found):
    """The advice for tokens with this forecast."""
    entry = dataclasses.replace(geometry().tokens[1], dimension=64, forecast=found)
    return advice_sentences(dataclasses.replace(geometry(), tokens={1: entry}))


def test_a_steep_spectrum_favours_clean_prediction():
    steep = np.logspace(1, -4, 64)
    found = forecast([estimate(steep)], MODEL, [48, 4096])
    assert found.order == ("x", "v", "eps")
    assert found.confidence == 1
    assert found.clean_over_velocity == pytest.approx(found.margin)
    assert found.margin > 0.4
    assert found.call == "x"
    narrow, wide = found.advice
    assert narrow.loss_floor["x"] < 0.1 * narrow.loss_floor["v"]
    assert wide.loss_floor == {"x": 0, "eps": 0, "v": 0}
    assert narrow.width_share["x"] == pytest.approx(needed_ranks(steep, MODEL, 0.05)["x"] / 48)
    narrow_text, wide_text = sentences(found)
    assert narrow_text.startswith(
        "Patch 1, width 48: Predict x (the clean latent): it needs the fewest directions in 100%"
    )
    assert "of width 48 can output 64 directions: its loss stays above" in narrow_text
    assert "can output" not in wide_text
    assert "may be small" in wide_text
    assert "may be small" not in narrow_text


def test_further_predictions_have_forecasts_between_their_neighbours():
    steep = np.logspace(1, -4, 64)
    model = TrainingModel(PUBLISHED, 0.05, further=("mix=0.3", "skip=0.30", "edm", "v", "skip=0.3"))
    assert model.predictions == (*PREDICTIONS, "mix=0.3", "skip=0.3", "edm")
    found = forecast([estimate(steep)], model, [48])
    needed = found.needed_directions
    assert needed["x"] < needed["mix=0.3"] < needed["v"]
    assert needed["skip=0.3"] < needed["edm"] < needed["eps"]
    assert {name: needed[name] for name in PREDICTIONS} == needed_ranks(steep, MODEL, 0.05)
    assert set(found.order) == set(found.curves) == set(found.advice[0].loss_floor) == set(model.predictions)


def test_the_best_skip_is_near_the_spread_of_variances_that_are_alike():
    """For equal variances of 0.3 the skip of their standard deviation leaves the network nothing to add."""
    s, directions = best_skip(np.full(64, 0.3), MODEL)
    assert s == pytest.approx(0.3**0.5, abs=0.05)
    assert directions < 1
    # A steep spectrum is served by x, and a skip of the size of its largest variances by none.
    steep = np.logspace(1, -4, 64)
    found = forecast([estimate(steep)], MODEL, [48])
    assert found.skip < 0.5
    assert found.skip_directions <= needed_ranks(steep, MODEL, 0.05)["x"]
    assert "No target skip=S up to 1.5 needs clearly fewer" in sentences(found)[0]
    alike = np.r_[np.full(8, 8.0), np.full(56, 0.3)]
    found = forecast([estimate(alike)], MODEL, [48])
    assert f"{found.skip:g} needs the fewest: {found.skip_directions:.3g}" in sentences(found)[0]


def test_an_isotropic_space_hardly_cares():
    """By the model velocity needs a little less there; it is the floor that makes a difference, and there is none."""
    found = forecast([estimate(np.linspace(0.8, 1.2, 64))], MODEL, [768])
    assert -0.3 < found.clean_over_velocity < 0
    assert found.call == "even"
    assert "nearly isotropic" in sentences(found)[0]
    assert "should hardly matter" in sentences(found)[0]


@pytest.mark.parametrize(("variance", "first"), [(0.01, "x"), (2.0, "v")])
def test_an_isotropic_space_of_another_size_than_the_noise_does_care(variance, first):
    found = forecast([estimate(np.full(64, variance))], MODEL, [768])
    assert found.call == first
    assert f"Predict {first}" in sentences(found)[0]


def test_variations_that_disagree_leave_the_call_undecided():
    found = forecast([estimate(np.logspace(1, -4, 32)), estimate(np.full(32, 5.0), name="within")], MODEL, [64])
    assert found.confidence < MIN_CONFIDENCE
    assert found.call == "undecided"
    assert "does not decide" in sentences(found)[0]


def test_noise_of_another_scale_scales_the_loss_that_is_out_of_reach():
    wide = dataclasses.replace(MODEL, noise_scale=2.0)
    floors = [forecast([estimate(EIGENVALUES)], model, [2]).advice[0].loss_floor for model in (MODEL, wide)]
    assert floors[1] == pytest.approx({name: 4 * floor for name, floor in floors[0].items()})
    with pytest.raises(UsageError, match="noise_scale must be above 0"):
        dataclasses.replace(MODEL, noise_scale=0.0)


def test_a_wide_spread_of_times_has_a_quadrature():
    times = training_times(TrainingModel(TimestepConfig(P_std=4.0), 0.05))
    assert np.isfinite(times.average(times.loss_weight("x")))


def test_shrinkage_leaves_steep_spectra_and_flattens_few_samples_of_isotropic_ones():
    steep = np.logspace(1, -4, 32)
    np.testing.assert_allclose(shrunk(steep, 1e6), steep, rtol=0.05, atol=1e-5)
    data = np.random.default_rng(0).standard_normal((60, 32))
    sampled = np.sort(np.linalg.eigvalsh(np.cov(data.T)))[::-1]
    found = shrunk(sampled, 60)
    assert found.sum() == pytest.approx(sampled.sum())
    assert found.max() / found.min() < 1.3 < 5 < sampled.max() / sampled.min()


def test_close_needs_are_called_even():
    # Between a steep spectrum, which favours the clean latent, and a flat one.
    found = [forecast([estimate(np.logspace(0.3, low, 32))], MODEL, [64]) for low in np.linspace(-2, 0, 21)]
    near = min(found, key=lambda entry: abs(entry.clean_over_velocity))
    assert abs(near.clean_over_velocity) < EVEN_MARGIN
    assert near.call == "even"
    assert "need about as much" in sentences(near)[0]


def test_large_variances_in_all_directions_favour_velocity():
    """Where there is no direction with less variance than the noise, the floor costs nothing and 1/(1-t)^2 does."""
    found = forecast(
        [estimate(np.full(64, 50.0))], dataclasses.replace(MODEL, timesteps=TimestepConfig(P_mean=0.8)), [64]
    )
    assert found.needed["0.2"]["v"] < found.needed["0.2"]["x"]


def test_confidence_falls_where_estimates_disagree():
    steep, flat = estimate(np.logspace(1, -4, 32)), estimate(np.full(32, 3.0), name="within classes")
    assert forecast([flat], MODEL, [64]).order[0] != "x"
    both = forecast([steep, flat], MODEL, [64])
    assert 0.3 < both.confidence < 0.7
    assert list(both.needed_by_estimate) == ["tokens", "within classes"]


def test_needs_grow_as_the_stated_share_falls():
    shares = forecast([estimate(EIGENVALUES)], MODEL, [64]).needed
    for prediction in PREDICTIONS:
        needs = [shares[key][prediction] for key in ("0.2", "0.1", "0.05", "0.02", "0.01")]
        assert needs == sorted(needs)
        assert needs[0] >= 0
        assert needs[-1] <= len(EIGENVALUES)


def test_directions_without_variance_are_free_for_clean_prediction_alone():
    lam = np.array([2.0, 1.0, 0.0, 0.0, 0.0, 0.0])
    needs = needed_ranks(lam, MODEL, 0.01)
    assert needs["x"] <= 2
    assert needs["v"] > 5
    assert needs["eps"] > 5
