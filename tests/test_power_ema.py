"""Power-function averages: their lengths, their weights, and averages rebuilt from stored ones, against brute force.

Brute force is the sum over all updates with the exact weights (A4), computed here and in float64.
"""

import functools
import weakref

import numpy as np
import pytest
import torch

from jlt.errors import JLTError, UsageError
from jlt.training.power_ema import (
    WIDEST,
    Snapshot,
    coefficients,
    cosines,
    decay,
    format_sigma_rel,
    gamma_from_sigma_rel,
    parse_sigma_rel,
    reconstruct,
)

UPDATES = 1000
STORED = (0.05, 0.10)
NODES, NODE_WEIGHTS = np.polynomial.legendre.leggauss(100)


def integral(function, edges):
    """Integrate by Gauss-Legendre quadrature between every two neighbouring edges."""
    middle, half = (edges[1:] + edges[:-1]) / 2, (edges[1:] - edges[:-1]) / 2
    points = middle[:, None] + half[:, None] * NODES
    return float((function(points) * NODE_WEIGHTS * half[:, None]).sum())


def profile(snapshot):
    """Return p(tau) as a function, 0 beyond its last update (A1)."""
    t, gamma = snapshot.updates, gamma_from_sigma_rel(snapshot.sigma_rel)
    return lambda tau: np.where(tau <= t, (gamma + 1) / t * np.minimum(tau / t, 1) ** gamma, 0.0)


def exact_weights(snapshot, updates=UPDATES):
    """Return the weight of every update in an average (A4); updates after it get 0."""
    edges = np.minimum(np.arange(updates + 1) / snapshot.updates, 1.0)
    return np.diff(edges ** (gamma_from_sigma_rel(snapshot.sigma_rel) + 1))


def snapshots_every(spacing, updates=UPDATES, widths=STORED):
    return [Snapshot(t, width) for t in range(spacing, updates + 1, spacing) for width in widths]


@functools.cache
def random_walk(updates=UPDATES, parameters=2000, seed=0):
    """Return (updates, parameters): weights that start at N(0, 1) and wander as far as that in the whole run."""
    generator = np.random.default_rng(seed)
    steps = generator.standard_normal((updates, parameters)) / updates**0.5
    return generator.standard_normal(parameters) + np.cumsum(steps, axis=0)


def rebuilding_error(spacing, target, weights):
    """Return the RMS error of an average rebuilt from exact ones, and the residual."""
    snapshots = snapshots_every(spacing)
    found = coefficients(snapshots, *target)
    averages = np.stack([exact_weights(snapshot) for snapshot in snapshots]) @ weights
    error = found.coefficients @ averages - exact_weights(target) @ weights
    return float(np.sqrt((error**2).mean())), found.residual


@pytest.mark.parametrize(("sigma_rel", "gamma"), [(0.05, 16.97), (0.10, 6.94)])
def test_published_exponents(sigma_rel, gamma):
    assert gamma_from_sigma_rel(sigma_rel) == pytest.approx(gamma, abs=0.005)


@pytest.mark.parametrize("sigma_rel", [1e-9, 0.003, 0.01, 0.05, 0.1, 0.15, 0.2, 0.25, 0.28, 0.288675])
def test_sigma_rel_is_the_relative_deviation_of_the_profile(sigma_rel):
    gamma = gamma_from_sigma_rel(sigma_rel)
    assert ((gamma + 1) / (gamma + 3)) ** 0.5 / (gamma + 2) == pytest.approx(sigma_rel, rel=1e-12)
    if sigma_rel >= 0.003:  # a narrower profile is too steep for the quadrature
        p, edges = profile(Snapshot(7, sigma_rel)), np.linspace(0, 7, 20)
        mean = integral(lambda tau: tau * p(tau), edges)
        assert integral(p, edges) == pytest.approx(1, rel=1e-7)
        assert integral(lambda tau: (tau - mean) ** 2 * p(tau), edges) ** 0.5 / 7 == pytest.approx(sigma_rel, rel=1e-6)


def test_the_plain_mean_is_the_widest_average():
    assert gamma_from_sigma_rel(WIDEST * (1 - 1e-9)) == pytest.approx(0, abs=1e-7)
    # gamma = 0 averages evenly: beta_t = (t - 1) / t.
    assert [decay(t, 0) for t in (1, 2, 4)] == pytest.approx([0, 1 / 2, 3 / 4])


@pytest.mark.parametrize("sigma_rel", [0, -0.1, WIDEST, 0.5, float("nan"), float("inf")])
def test_a_length_out_of_range_is_refused(sigma_rel):
    with pytest.raises(JLTError, match="between 0 and 0.2887"):
        gamma_from_sigma_rel(sigma_rel)
    with pytest.raises(JLTError, match="between 0 and 0.2887"):
        coefficients([Snapshot(1, 0.1)], 1, sigma_rel)


def test_impossible_exponents_and_updates_are_refused():
    for wrong in (lambda: decay(0, 1.0), lambda: decay(1, -0.1)):
        with pytest.raises(ValueError, match="gamma"):
            wrong()
    with pytest.raises(ValueError, match="count from 1"):
        coefficients([Snapshot(0, 0.1)], 5, 0.1)


@pytest.mark.parametrize("sigma_rel", [0.02, 0.05, 0.10, 0.25])
def test_recurrence_is_the_sum_with_the_exact_weights(sigma_rel):
    weights = random_walk(400, 20)
    gamma = gamma_from_sigma_rel(sigma_rel)
    average = np.full(20, 1e6)  # the value before the first update has no influence
    for t in range(1, 401):
        average = decay(t, gamma) * average + (1 - decay(t, gamma)) * weights[t - 1]
        if t in (1, 2, 57, 400):
            expected = exact_weights(Snapshot(t, sigma_rel), 400) @ weights
            np.testing.assert_allclose(average, expected, rtol=0, atol=1e-12)
    assert decay(1, gamma) == 0


def test_exact_weights_are_the_profile_over_one_update_each():
    snapshot = Snapshot(12, 0.1)
    parts = [integral(profile(snapshot), np.array([k - 1.0, k])) for k in range(1, 13)]
    np.testing.assert_allclose(exact_weights(snapshot, 12), parts, rtol=1e-9, atol=1e-15)


def test_cosines_against_quadrature():
    snapshots = [Snapshot(t, width) for t in (3, 10, 11, 40) for width in (0.03, 0.1, 0.25)]
    edges = np.unique([0, 1, 2, 5, 20, *(snapshot.updates for snapshot in snapshots)]).astype(float)
    profiles = [profile(snapshot) for snapshot in snapshots]
    gram = np.array([[integral(lambda tau, a=a, b=b: a(tau) * b(tau), edges) for a in profiles] for b in profiles])
    norms = np.sqrt(np.diag(gram))
    np.testing.assert_allclose(cosines(snapshots, snapshots), gram / np.outer(norms, norms), rtol=1e-5, atol=1e-14)


# RMS error of the rebuilt weights, in units of the distance that a weight wanders in the whole run.
# Columns: 10, 25 and 50 snapshots of each of two widths, that is one in 100, 40 and 20 updates.
MEASURED = {
    0.03: (5.2e-3, 4.5e-4, 5.8e-5),
    0.04: (1.3e-3, 9.8e-5, 1.2e-5),
    0.07: (4.0e-4, 2.6e-5, 3.1e-6),
    0.12: (2.7e-4, 1.7e-5, 2.0e-6),
    0.15: (6.3e-4, 4.0e-5, 4.7e-6),
    0.20: (3.3e-3, 4.0e-4, 6.6e-5),
}


@pytest.mark.parametrize("sigma_rel", MEASURED)
def test_lengths_rebuilt_at_the_last_update(sigma_rel):
    weights = random_walk()
    errors = [rebuilding_error(spacing, Snapshot(UPDATES, sigma_rel), weights)[0] for spacing in (100, 40, 20)]
    assert errors == pytest.approx(MEASURED[sigma_rel], rel=0.1)


@pytest.mark.parametrize("sigma_rel", [0.04, 0.05, 0.07, 0.15])
def test_between_snapshots_the_residual_is_large_and_the_error_too(sigma_rel):
    weights = random_walk()
    at, between = (rebuilding_error(20, Snapshot(t, sigma_rel), weights) for t in (800, 810))
    assert at[0] < 3e-5
    assert at[1] < 2e-3
    assert 0.01 < between[0] < 0.2
    assert 0.2 < between[1] < 0.7


def test_the_residual_is_the_relative_error_for_independent_weights():
    weights = np.random.default_rng(1).standard_normal((UPDATES, 4000))
    targets = [(t, width) for t in (600, 610, 1000) for width in (0.03, 0.07, 0.15, 0.20, 0.28)]
    for target in targets:
        error, residual = rebuilding_error(40, Snapshot(*target), weights)
        size = np.sqrt(((exact_weights(Snapshot(*target)) @ weights) ** 2).mean())
        assert error / size == pytest.approx(residual, rel=0.05), target


def test_weights_that_wander_err_less_than_the_residual():
    weights = random_walk()
    for sigma_rel in MEASURED:
        for spacing in (100, 40, 20):
            error, residual = rebuilding_error(spacing, Snapshot(UPDATES, sigma_rel), weights)
            assert 0 < error < 0.1 * residual


def test_weights_that_stand_still_are_rebuilt_exactly():
    for target in ((1000, 0.02), (1000, 0.28), (990, 0.05), (110, 0.2)):
        found = coefficients(snapshots_every(100), *target)
        assert found.coefficients.sum() == pytest.approx(1, abs=1e-12)
        assert found.residual > 0.01


def test_later_snapshots_do_not_enter():
    snapshots = snapshots_every(100)
    found = coefficients(snapshots, 550, 0.07)
    past = [i for i, snapshot in enumerate(snapshots) if snapshot.updates <= 550]
    alone = coefficients([snapshots[i] for i in past], 550, 0.07)
    np.testing.assert_array_equal(found.coefficients[past], alone.coefficients)
    np.testing.assert_array_equal(np.delete(found.coefficients, past), 0.0)
    assert found.residual == alone.residual
    with pytest.raises(JLTError, match="up to update 99"):
        coefficients(snapshots, 99, 0.07)


@pytest.mark.parametrize("target", [(1000, 0.05), (500, 0.1)])
def test_a_snapshot_that_is_the_target_is_taken_alone(target):
    snapshots = snapshots_every(20)
    found = coefficients(snapshots, *target)
    assert found.residual == 0
    np.testing.assert_array_equal(found.coefficients, [float(snapshot == target) for snapshot in snapshots])
    # The solver alone finds it too: a target that is one but for rounding.
    near = coefficients(snapshots, target[0], target[1] * (1 + 1e-12))
    np.testing.assert_allclose(near.coefficients, found.coefficients, atol=1e-9)
    assert near.residual < 1e-7


def test_order_and_duplicates_do_not_matter():
    snapshots = snapshots_every(100)
    found = coefficients(snapshots, 1000, 0.07)
    shuffle = np.random.default_rng(2).permutation(len(snapshots))
    shuffled = coefficients([snapshots[i] for i in shuffle], 1000, 0.07)
    np.testing.assert_allclose(shuffled.coefficients, found.coefficients[shuffle], atol=1e-9)
    twice = coefficients([*snapshots, *snapshots], 1000, 0.07)
    np.testing.assert_allclose(twice.coefficients[: len(snapshots)], found.coefficients, atol=1e-9)
    np.testing.assert_array_equal(twice.coefficients[len(snapshots) :], 0.0)
    assert twice.residual == pytest.approx(found.residual, abs=1e-9)


def optimality(snapshots, target, found):
    """Return by quadrature the relative residual, and how far its inner products with p_i / ||p_r|| are from equal.

    At a minimum under sum_i x_i = 1 the residual has the same inner product with every p_i.
    """
    edges = np.unique([0, *(snapshot.updates for snapshot in snapshots)]).astype(float)
    middle, half = (edges[1:] + edges[:-1]) / 2, (edges[1:] - edges[:-1]) / 2
    points, measure = middle[:, None] + half[:, None] * NODES, half[:, None] * NODE_WEIGHTS
    profiles, wanted = [profile(snapshot)(points) for snapshot in snapshots], profile(target)(points)
    missed = sum(x * p for x, p in zip(found.coefficients, profiles, strict=True)) - wanted
    square = (wanted**2 * measure).sum()
    products = [(missed * p * measure).sum() / square for p in profiles]
    return np.sqrt((missed**2 * measure).sum() / square), np.ptp(products)


@pytest.mark.parametrize("sigma_rel", [0.03, 0.07, 0.15, 0.25])
@pytest.mark.parametrize(("number", "updates"), [(60, 250_000), (60, 10**9), (200, 10**7)])
def test_a_long_run_is_solved_to_the_optimum(number, updates, sigma_rel):
    snapshots = snapshots_every(updates // number, updates)
    target = Snapshot(snapshots[-1].updates, sigma_rel)
    found = coefficients(snapshots, *target)
    residual, unequal = optimality(snapshots, target, found)
    assert found.residual == pytest.approx(residual, abs=1e-7)
    assert unequal < 1e-9
    # Coefficients of moderate size: the float32 rounding of the stored weights is not blown up.
    assert np.abs(found.coefficients).sum() < 20


def residual_alone(snapshot, updates, sigma_rel):
    """Return the residual where one snapshot is all there is: its coefficient is 1."""
    found = coefficients([snapshot], updates, sigma_rel)
    assert found.coefficients == pytest.approx([1])
    return found.residual


@pytest.mark.parametrize(
    "snapshots",
    [
        [Snapshot(250_000 - i, width) for i in range(60) for width in STORED],
        snapshots_every(4000, 250_000, (0.05, 0.05 + 1e-10)),
        snapshots_every(4000, 250_000, (0.04, 0.05, 0.06, 0.07, 0.08, 0.10, 0.12)),
        [Snapshot(2**i, width) for i in range(40) for width in STORED],
    ],
    ids=["one after another", "almost the same width", "seven widths", "from 1 to 2**39"],
)
def test_badly_conditioned_snapshots_give_moderate_coefficients(snapshots):
    last = max(snapshots).updates
    for sigma_rel in (0.055, 0.09, 0.2):
        found = coefficients(snapshots, last, sigma_rel)
        assert found.coefficients.sum() == pytest.approx(1, abs=1e-8)
        assert np.abs(found.coefficients).sum() < 50
        assert found.residual <= min(residual_alone(snapshot, last, sigma_rel) for snapshot in snapshots) + 1e-7


def stored_averages(weights, spacing):
    """Return the averages of a run as float32 tensors, by the recurrence, as a training would store them."""
    gammas = {width: gamma_from_sigma_rel(width) for width in STORED}
    averages = {width: torch.zeros(weights.shape[1]) for width in STORED}
    stored = {}
    for t in range(1, len(weights) + 1):
        for width, average in averages.items():
            average.lerp_(torch.from_numpy(weights[t - 1]).float(), 1 - decay(t, gammas[width]))
            if t % spacing == 0:
                stored[Snapshot(t, width)] = {"weight": average.reshape(4, -1).clone(), "bias": average[:3].clone()}
    return stored


@pytest.mark.parametrize(("target", "bound"), [((1000, 0.07), 1e-5), ((1000, 0.15), 1e-5), ((800, 0.04), 3e-5)])
def test_a_training_s_averages_rebuilt(target, bound):
    weights = random_walk(parameters=400)
    stored = stored_averages(weights, 20)
    found = coefficients(list(stored), *target)
    rebuilt = reconstruct([(x, lambda v=v: v) for x, v in zip(found.coefficients, stored.values(), strict=True)])
    expected = exact_weights(Snapshot(*target)) @ weights
    assert rebuilt["weight"].dtype == torch.float32
    error = rebuilt["weight"].flatten().double().numpy() - expected
    assert np.sqrt((error**2).mean()) < bound
    torch.testing.assert_close(rebuilt["bias"], rebuilt["weight"].flatten()[:3], rtol=0, atol=0)


def test_reconstruct_holds_one_snapshot_at_a_time_and_skips_zeros():
    alive, read = weakref.WeakSet(), []

    def reader(number):
        def load():
            assert not alive
            tensor = torch.full((5,), float(number))
            alive.add(tensor)
            read.append(number)
            return {"a": tensor}

        return load

    rebuilt = reconstruct((x, reader(number)) for number, x in enumerate([2.0, 0.0, -1.5, 0.5], start=1))
    assert read == [1, 3, 4]
    assert rebuilt["a"].tolist() == [2.0 - 4.5 + 2.0] * 5


def test_reconstruct_adds_up_in_float64_and_returns_a_single_snapshot_bit_for_bit():
    values = {"a": torch.randn(1000, generator=torch.Generator().manual_seed(0))}
    assert torch.equal(reconstruct([(0.0, dict), (1.0, lambda: values)])["a"], values["a"])
    # 1e8 + 1 is not a float32: cancelling there would lose the answer.
    large = [(1e8, lambda: values), (1.0, lambda: values), (-1e8, lambda: values)]
    torch.testing.assert_close(reconstruct(large)["a"], values["a"], rtol=1e-7, atol=1e-7)


def test_reconstruct_refuses_what_does_not_fit():
    a = {"a": torch.ones(2)}
    for other in ({"b": torch.ones(2)}, {"a": torch.ones(1)}, {"a": torch.ones(2), "b": torch.ones(2)}):
        with pytest.raises(ValueError, match="differ in the names or shapes"):
            reconstruct([(0.5, lambda: a), (0.5, lambda other=other: other)])
    for nothing in ([], [(0.0, lambda: a)]):
        with pytest.raises(ValueError, match="no snapshot"):
            reconstruct(nothing)


@pytest.mark.parametrize("sigma_rel", [0.07, 0.1, 0.05, 1 / 7, 1e-5, 0.28])
def test_names_round_trip(sigma_rel):
    assert parse_sigma_rel(format_sigma_rel(sigma_rel)) == sigma_rel


def test_names_as_a_user_writes_them():
    assert format_sigma_rel(0.07) == "sigma_rel=0.07"
    assert parse_sigma_rel("sigma_rel=.10") == 0.1
    with pytest.raises(JLTError, match="between 0 and"):
        format_sigma_rel(0.3)


@pytest.mark.parametrize(
    "name",
    [
        *("", "none", "0.07", "0.9999", "sigma_rel", "sigma=0.07", "sigma_rel:0.07", " sigma_rel=0.07"),
        *("sigma_rel=", "sigma_rel=wide", "sigma_rel=0,07"),
        *("sigma_rel=0", "sigma_rel=-0.1", "sigma_rel=0.2887", "sigma_rel=nan"),
    ],
)
def test_other_names_are_refused_in_one_sentence(name):
    with pytest.raises(UsageError, match=r"does not name a length: write sigma_rel=0\.07") as caught:
        parse_sigma_rel(name)
    assert repr(name) in str(caught.value)
