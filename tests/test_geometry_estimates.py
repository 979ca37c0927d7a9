"""Every estimate of a covariance against one that holds all the data, and its stated errors against repetition."""

import itertools
import json

import numpy as np
import pytest
import torch
from data_helpers import generator
from test_geometry import assert_alike
from training_helpers import run_processes

from jlt.config import LatentShape
from jlt.errors import JLTError
from jlt.geometry.accumulate import Moments, Sample, sample_numbers
from jlt.geometry.covariance import (
    ClassMeans,
    LeadingSketch,
    StationaryCovariance,
    TokenCovariance,
    gram_eigenvalues,
    multiplicity,
)
from jlt.geometry.spectrum import eigenvalues_descending
from jlt.geometry.tokens import NEIGHBOURS, direction_moments, neighbourhood_covariance
from jlt.patches import patch_tokens


def latents(count=60, channels=3, height=4, width=6, seed=0, classes=4):
    """Latents with correlated channels and neighbours, a mean that differs by position, and one by class."""
    white = torch.randn(count, channels, height, width, generator=generator(seed), dtype=torch.float64)
    mixed = torch.einsum("dc,nchw->ndhw", torch.randn(channels, channels, generator=generator(1)).double(), white)
    mixed = mixed + 0.7 * mixed.roll(1, -1) + 0.4 * mixed.roll(1, -2)
    where = 20 * torch.randn(channels, height, width, generator=generator(2), dtype=torch.float64)
    which = 2 * torch.randn(classes, channels, height, width, generator=generator(3), dtype=torch.float64)
    labels = torch.arange(count) % classes
    return mixed + where + which[labels], labels


def averaged_over_shifts(rows, shape):
    """The covariance of flat latents, averaged over all moves of the torus: what stationarity leaves of it."""
    covariance = np.cov(rows.T).reshape(*shape, *shape)
    _, height, width = shape
    moves = itertools.product(range(height), range(width))
    moved = [np.roll(covariance, (dy, dx, dy, dx), axis=(1, 2, 4, 5)) for dy, dx in moves]
    return np.mean(moved, axis=0).reshape(rows.shape[1], rows.shape[1])


@pytest.mark.parametrize("shape", [(3, 4, 6), (2, 3, 5), (1, 2, 1)])
def test_frequencies_hold_the_spectrum_of_the_stationary_covariance(shape):
    data, _ = latents(80, *shape)
    found = StationaryCovariance(*shape)
    for part in data.split(17):
        found.update(part)
    whole = averaged_over_shifts(data.flatten(1).numpy(), shape)
    eigenvalues = found.eigenvalues()
    assert len(eigenvalues) == np.prod(shape)
    assert multiplicity(*shape[1:]).sum() == shape[1] * shape[2]
    np.testing.assert_allclose(eigenvalues, eigenvalues_descending(whole), rtol=1e-10, atol=1e-10)
    # No variance is lost.
    assert eigenvalues.sum() == pytest.approx(data.flatten(1).var(0).sum().item(), rel=1e-12)


def test_stationary_latents_lose_nothing():
    """White noise through a filter on the torus: the estimate is that of the full matrix, whose spectrum is known."""
    white = torch.randn(40_000, 1, 4, 4, generator=generator(), dtype=torch.float64)
    found = StationaryCovariance(1, 4, 4)
    found.update(white + 0.5 * white.roll(1, -1))
    transfer = 1 + 0.5 * np.exp(-2j * np.pi * np.arange(4) / 4)
    known = np.sort(np.repeat(abs(transfer) ** 2, 4))[::-1]
    np.testing.assert_allclose(found.eigenvalues(), known, rtol=0.04)


def residuals(data, labels):
    means = torch.stack([data[labels == label].mean(0) for label in labels.unique()])
    return data - means[labels]


def class_means(data, labels, classes=4):
    found = ClassMeans(classes, *data.shape[1:])
    for part, part_labels in zip(data.split(13), labels.split(13), strict=True):
        found.update(part, part_labels)
    return found


@pytest.mark.parametrize("patch_size", [1, 2])
def test_tokens_within_classes(patch_size):
    data, labels = latents()
    classes, tokens = class_means(data, labels), TokenCovariance(3, patch_size)
    tokens.update(data)
    within = tokens.scatter - classes.between_tokens(patch_size, tokens.mean)
    rest = patch_tokens(residuals(data, labels), patch_size)
    assert classes.freedom == 60 - 4
    torch.testing.assert_close(within, rest.T @ rest, rtol=1e-9, atol=1e-8)


def test_frequencies_within_classes():
    data, labels = latents()
    classes, found = class_means(data, labels), StationaryCovariance(3, 4, 6)
    found.update(data)
    within = found.scatter - classes.between_frequencies(found.mean)
    rest = residuals(data, labels).flatten(1).numpy()
    expected = averaged_over_shifts(rest, (3, 4, 6)) * (len(rest) - 1) / classes.freedom
    np.testing.assert_allclose(
        found.eigenvalues(within, classes.freedom), eigenvalues_descending(expected), rtol=1e-8, atol=1e-8
    )


def test_classes_without_latents_are_no_classes():
    data, labels = latents(20, classes=2)
    found = class_means(data, 3 * labels, classes=5)
    assert found.counts.tolist() == [10, 10]
    assert found.means.shape == (2, 3, 4, 6)
    assert found.freedom == 18


MERGED = {
    "tokens": lambda: TokenCovariance(3, 2),
    "stationary": lambda: StationaryCovariance(3, 4, 6),
    "classes": lambda: ClassMeans(4, 3, 4, 6),
    "sketch": lambda: LeadingSketch(72, 20),
}
READ = {
    "tokens": lambda found: found.covariance,
    "stationary": lambda found: torch.from_numpy(found.eigenvalues()),
    "classes": lambda found: found.means,
    "sketch": lambda found: torch.from_numpy(found.eigenvalues(6)),
}


@pytest.mark.parametrize("kind", MERGED)
@pytest.mark.parametrize("split", [0, 1, 30, 59, 60])
def test_any_merge_gives_one_estimate(kind, split):
    data, labels = latents()
    both = (data, labels) if kind == "classes" else (data,)
    whole, left, right = (MERGED[kind]() for _ in range(3))
    whole.update(*both)
    left.update(*(part[:split] for part in both))
    for start in range(split, 60, 7):
        right.update(*(part[start : min(start + 7, 60)] for part in both))
    left.merge(right)
    torch.testing.assert_close(READ[kind](left), READ[kind](whole), rtol=1e-9, atol=1e-9)


def test_latents_that_are_not_finite_are_named():
    data, _ = latents(9)
    data[5, 1, 2, 3] = float("nan")
    # In a process without the earlier latents.
    moments = Moments(9, LatentShape(3, 4, 6, 10), [1, 2])
    with pytest.raises(JLTError, match="Latent 5 of the store is not finite"):
        moments.update(4, data[4:], torch.zeros(5, dtype=torch.int64))


# ---- whole latents ----


def decaying(count, seed=0):
    """Latents of 400 dimensions whose variances fall as 1 / k^2, in directions that are no axes."""
    basis = torch.linalg.qr(torch.randn(400, 400, generator=generator(9), dtype=torch.float64)).Q
    white = torch.randn(count, 400, generator=generator(seed), dtype=torch.float64)
    return ((white / torch.arange(1, 401)) @ basis + 3).view(count, 4, 10, 10)


def test_the_gram_matrix_gives_the_leading_eigenvalues():
    data = decaying(50)
    exact = eigenvalues_descending(np.cov(data.flatten(1).numpy().T))
    np.testing.assert_allclose(gram_eigenvalues(data, 64), exact[:49], rtol=1e-9)
    np.testing.assert_allclose(gram_eigenvalues(data, 5), exact[:5], rtol=1e-9)


def test_a_sketch_is_close_in_the_leading_eigenvalues_and_never_too_large():
    data = decaying(3000)
    exact = eigenvalues_descending(np.cov(data.flatten(1).numpy().T))
    sketch = LeadingSketch(400, 80)
    for part in data.split(700):
        sketch.update(part)
    found = sketch.eigenvalues(20)
    np.testing.assert_allclose(found[:10], exact[:10], rtol=0.03)
    np.testing.assert_allclose(found, exact[:20], rtol=0.12)
    assert (found <= exact[:20] * (1 + 1e-9)).all()
    assert sketch.trace == pytest.approx(exact.sum(), rel=1e-10)


def test_a_sketch_of_few_latents_is_exact():
    data = decaying(30)
    sketch = LeadingSketch(400, 80)
    sketch.update(data)
    np.testing.assert_allclose(sketch.eigenvalues(29), gram_eigenvalues(data, 29), rtol=1e-6)


# ---- estimates from single latents ----


def test_the_sample_is_the_same_for_any_batches():
    data, _ = latents(50)
    numbers = np.array([0, 3, 17, 18, 49])
    for size in (1, 7, 50):
        left, right = (Sample(numbers, tuple(data.shape[1:])) for _ in range(2))
        for start in range(0, 50, size):
            (left if start < 20 else right).update(start, data[start : start + size])
        right.merge(left)
        assert torch.equal(right.latents, data[numbers].float())
    assert len(sample_numbers(10**6, 128 * 16 * 16)) == 2**28 // (4 * 2**15)
    assert sample_numbers(5, 10).tolist() == list(range(5))


def scaled(raw, grid=2):
    """Latents of two independent channels with variances 4 and 1/4."""
    return raw.view(-1, 2, grid, grid) * torch.tensor([2.0, 0.5], dtype=torch.float64)[:, None, None]


def test_the_error_of_an_eigenvalue_is_what_repetition_shows():
    """Of tokens that are independent, and of tokens of which those of one latent are all the same."""
    for same, expected in ((False, np.sqrt(2 / (100 * 4))), (True, np.sqrt(2 / 100))):
        found, stated = [], []
        for seed in range(60):
            raw = torch.randn(100, 2, 2, 2, generator=generator(seed), dtype=torch.float64)
            data = scaled(raw[:, :, :1, :1].expand(-1, -1, 2, 2).clone() if same else raw)
            tokens = TokenCovariance(2, 1)
            tokens.update(data)
            found.append(eigenvalues_descending(tokens.covariance.numpy()))
            moments = direction_moments(data.float(), 1, tokens.mean, torch.eye(2, dtype=torch.float64))
            stated.append(moments.relative_spread / np.sqrt(100))
        scatter = np.std(found, axis=0) / np.mean(found, axis=0)
        np.testing.assert_allclose(np.mean(stated, axis=0), scatter, rtol=0.3)
        np.testing.assert_allclose(np.mean(stated, axis=0), expected, rtol=0.1)


@pytest.mark.parametrize(("shape", "kurtosis"), [("normal", 0.0), ("uniform", -1.2), ("laplace", 3.0)])
def test_excess_kurtosis_of_known_distributions(shape, kurtosis):
    random = np.random.default_rng(0)
    raw = {
        "normal": random.standard_normal,
        "uniform": lambda size: random.uniform(-(3**0.5), 3**0.5, size),
        "laplace": lambda size: random.laplace(scale=0.5**0.5, size=size),
    }[shape]((8000, 2, 2, 2))
    found = direction_moments(scaled(torch.from_numpy(raw)).float(), 1, torch.zeros(2).double(), torch.eye(2).double())
    assert (found.excess_kurtosis_error > 0).all()
    assert (abs(found.excess_kurtosis - kurtosis) < 4 * found.excess_kurtosis_error).all()
    assert (found.excess_kurtosis_error < 0.3).all()


def test_a_direction_without_variance_has_no_shape():
    data = torch.randn(30, 2, 2, 2, generator=generator())
    data[:, 1] = 3
    found = direction_moments(data, 1, torch.tensor([0.0, 3.0]).double(), torch.eye(2).double())
    assert found.relative_spread[1] == found.excess_kurtosis[1] == found.excess_kurtosis_error[1] == 0
    assert found.relative_spread[0] > 0


def test_neighbourhoods_that_are_clusters_have_the_covariance_within_clusters():
    clusters, members = 40, NEIGHBOURS + 1
    centres = 100 * torch.randn(clusters, 1, 3, 4, 4, generator=generator(1))
    mix = torch.randn(3, 3, generator=generator(2))
    within = torch.einsum("dc,knchw->kndhw", mix, torch.randn(clusters, members, 3, 4, 4, generator=generator(3)))
    found = neighbourhood_covariance((centres + within).flatten(0, 1), 1)
    rest = (within - within.mean(1, keepdim=True)).flatten(0, 1).double() * (members / (members - 1)) ** 0.5
    expected = torch.cov(patch_tokens(rest, 1).T)
    # Clusters are not all met equally often.
    torch.testing.assert_close(found.covariance, expected, rtol=0.05, atol=0.05 * expected.trace().item())
    assert found.covariance.trace() < 1e-3 * centres.var()
    with pytest.raises(ValueError, match="17 latents"):
        neighbourhood_covariance(within[0, :16], 1)


@pytest.mark.slow
def test_any_number_of_processes_measures_the_same_geometry(digit_latents, tmp_path):
    found = []
    for count in (1, 3):
        out = tmp_path / f"by-{count}"
        run_processes(count, ["analyze", "--latents", str(digit_latents), "--out", str(out), "--width", "64"])
        found.append(json.loads((out / "geometry.json").read_text()))
    assert_alike(*found)
