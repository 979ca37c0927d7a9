"""Metrics against closed forms, scipy's matrix root, torch-fidelity and the formulas written out."""

import importlib.util
import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
import scipy.linalg
import torch
from data_helpers import generator

from jlt.errors import JLTError
from jlt.evaluation.metrics import Gaussian, inception_score, jackknife, kernel_distance, label_agreement, overlap
from jlt.evaluation.suite import group_of


def random_covariance(dimension, rank=None, seed=0):
    factor = torch.randn(dimension, rank or 2 * dimension, generator=generator(seed), dtype=torch.float64)
    return factor @ factor.T / factor.shape[1]


def frechet_distance(mean_a, covariance_a, mean_b, covariance_b):
    return Gaussian(mean_a, covariance_a).distance(Gaussian(mean_b, covariance_b))


def zeros(dimension):
    return torch.zeros(dimension, dtype=torch.float64)


# ---- Frechet distance ----


def test_frechet_distance_of_diagonal_covariances_is_that_of_their_roots():
    a, b = torch.rand(2, 50, generator=generator(), dtype=torch.float64) * 10
    means = torch.randn(2, 50, generator=generator(1), dtype=torch.float64)
    expected = (means[0] - means[1]).square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    found = frechet_distance(means[0], a.diag(), means[1], b.diag())
    assert found == pytest.approx(expected.item(), rel=1e-10)


def test_frechet_distance_of_commuting_covariances():
    basis = torch.linalg.qr(torch.randn(60, 60, generator=generator(), dtype=torch.float64)).Q
    a, b = torch.logspace(-6, 2, 60, dtype=torch.float64), torch.logspace(3, -4, 60, dtype=torch.float64)
    found = frechet_distance(zeros(60), basis * a @ basis.T, zeros(60), basis * b @ basis.T)
    assert found == pytest.approx((a.sqrt() - b.sqrt()).square().sum().item(), rel=1e-7)


def test_frechet_distance_of_rank_one_covariances():
    # For A = a a^T and B = b b^T the root has the trace |a . b|.
    a, b = torch.randn(2, 40, generator=generator(), dtype=torch.float64)
    expected = a.square().sum() + b.square().sum() - 2 * (a @ b).abs()
    found = frechet_distance(zeros(40), a.outer(a), zeros(40), b.outer(b))
    assert found == pytest.approx(expected.item(), rel=1e-6)


def test_frechet_distance_of_covariances_that_share_no_direction():
    a, b = torch.zeros(2, 30, dtype=torch.float64)
    a[:10], b[20:] = 2, 3
    basis = torch.linalg.qr(torch.randn(30, 30, generator=generator(), dtype=torch.float64)).Q
    found = frechet_distance(zeros(30), basis * a @ basis.T, zeros(30), basis * b @ basis.T)
    assert found == pytest.approx(50, rel=1e-5)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_frechet_distance_agrees_with_the_general_matrix_root(seed):
    a, b = random_covariance(48, seed=seed), random_covariance(48, seed=seed + 10)
    means = torch.randn(2, 48, generator=generator(seed), dtype=torch.float64)
    root = scipy.linalg.sqrtm(a.numpy() @ b.numpy()).real
    expected = (means[0] - means[1]).square().sum().item() + np.trace(a.numpy() + b.numpy() - 2 * root)
    assert frechet_distance(means[0], a, means[1], b) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(means[1], b, means[0], a) == pytest.approx(expected, rel=1e-8)


def test_frechet_distance_is_finite_for_fewer_images_than_dimensions():
    few, many = random_covariance(128, rank=20), random_covariance(128, seed=1)
    found = frechet_distance(zeros(128), few, zeros(128), many)
    assert 0 < found < few.trace() + many.trace()
    assert frechet_distance(zeros(128), many, zeros(128), few) == pytest.approx(found, rel=1e-6)
    assert frechet_distance(zeros(128), few, zeros(128), few) < 1e-5 * few.trace()
    assert frechet_distance(zeros(128), few * 0, zeros(128), many) == pytest.approx(many.trace().item())


# ---- inception score and label agreement ----


def direct_inception_score(probabilities):
    marginal = probabilities.mean(axis=0)
    total = 0.0
    for row in probabilities:
        total += sum(p * np.log(p / q) for p, q in zip(row, marginal, strict=True) if p > 0)
    return np.exp(total / len(probabilities))


def test_inception_score_agrees_with_the_direct_formula():
    probabilities = torch.randn(103, 7, generator=generator(), dtype=torch.float64).mul(2).softmax(dim=1)
    logits = probabilities.log().numpy()
    found, spread = inception_score(logits, splits=1)
    assert (found, spread) == (pytest.approx(direct_inception_score(probabilities.numpy()), rel=1e-12), 0)
    order = np.random.RandomState(2020).permutation(103)
    parts = [order[i * 103 // 10 : (i + 1) * 103 // 10] for i in range(10)]
    scores = [direct_inception_score(probabilities.numpy()[part]) for part in parts]
    assert inception_score(logits) == pytest.approx((np.mean(scores), np.std(scores)), rel=1e-12)


def test_inception_score_is_one_for_equal_outputs_and_the_class_count_for_certain_and_even_ones():
    assert inception_score(np.zeros((50, 10), np.float32)) == (pytest.approx(1), pytest.approx(0, abs=1e-6))
    with np.errstate(divide="ignore"):
        sure = np.log(np.eye(10))
    assert inception_score(np.tile(sure, (30, 1)), splits=1)[0] == pytest.approx(10)
    # Sorted by class, contiguous splits would be one class each and score 1.
    assert inception_score(sure.repeat(100, axis=0))[0] > 9


def test_inception_score_of_too_few_images():
    with pytest.raises(JLTError, match="at least 10 images, there are 9"):
        inception_score(np.zeros((9, 10)))


def test_label_agreement_counts():
    logits = torch.tensor([[0.0, 1, 2], [5, 1, 2], [-3, -1, -2], [0, 0.5, 0]])
    assert label_agreement(logits, torch.tensor([2, 0, 0, 2])) == 0.5


def test_frechet_distance_of_a_nearly_flat_covariance_keeps_its_digits():
    # Eigenvalues of the product reach 1e-20 of the largest: below float64's relative precision.
    basis = torch.linalg.qr(torch.randn(64, 64, generator=generator(), dtype=torch.float64)).Q
    a, b = torch.logspace(2, -8, 64, dtype=torch.float64), torch.logspace(1, -9, 64, dtype=torch.float64)
    found = frechet_distance(zeros(64), basis * a @ basis.T, zeros(64), basis * b @ basis.T)
    assert found == pytest.approx((a.sqrt() - b.sqrt()).square().sum().item(), rel=1e-8)


def test_the_rough_distance_is_the_distance():
    a, b = Gaussian(zeros(48), random_covariance(48)), Gaussian(zeros(48) + 1, random_covariance(48, rank=30, seed=1))
    assert a.rough_distance(b) == pytest.approx(a.distance(b), rel=1e-6)


# ---- the jackknife ----


def test_the_jackknife_of_a_mean_is_its_standard_error_and_it_has_no_bias():
    values = np.random.default_rng(0).standard_normal(120)
    parts = values.reshape(12, 10)
    without = [np.delete(parts, group, axis=0).mean() for group in range(12)]
    error, bias = jackknife(values.mean(), without, [10] * 12)
    assert error == pytest.approx(parts.mean(axis=1).std(ddof=1) / np.sqrt(12))
    assert bias == pytest.approx(0, abs=1e-12)
    # Groups of unequal sizes have no bias either.
    edges = [0, 5, 30, 70, 120]
    parts = [values[low:high] for low, high in itertools.pairwise(edges)]
    without = [np.concatenate(parts[:group] + parts[group + 1 :]).mean() for group in range(4)]
    error, bias = jackknife(values.mean(), without, [len(part) for part in parts])
    assert bias == pytest.approx(0, abs=1e-12)
    assert 0.3 < error * np.sqrt(120) < 2


def test_the_jackknife_finds_the_bias_of_a_variance_divided_by_n():
    values = np.random.default_rng(1).standard_normal(40)
    without = [np.delete(values, index).var() for index in range(40)]
    _, bias = jackknife(values.var(), without, [1] * 40)
    assert values.var() - bias == pytest.approx(values.var(ddof=1))


@pytest.mark.parametrize("count", [10, 23, 639, 640, 700, 1000, 50_000])
def test_groups_are_ten_and_each_has_its_share(count):
    sizes = np.bincount(group_of(count), minlength=10)
    assert (len(sizes), sizes.sum()) == (10, count)
    assert sizes.max() - sizes.min() <= (1 if count < 640 else 64)
    if count >= 1000:
        labels = np.arange(count) % 8
        for group in range(10):
            of_each = np.bincount(labels[group_of(count) == group])
            assert of_each.max() - of_each.min() <= 1


# ---- kernel distance ----


def direct_kernel_distance(x, y):
    n = len(x)
    within = sum(
        (float(a[i] @ a[j]) / x.shape[1] + 1) ** 3 for a in (x, y) for i in range(n) for j in range(n) if i != j
    )
    across = sum((float(p @ q) / x.shape[1] + 1) ** 3 for p in x for q in y)
    return within / (n * (n - 1)) - 2 * across / n**2


def test_kernel_distance_agrees_with_the_formula_written_out():
    x, y = torch.randn(2, 20, 6, generator=generator(), dtype=torch.float64)
    found, spread = kernel_distance(x, y + 0.5)
    # Subsets of all images are all the same one.
    assert found == pytest.approx(direct_kernel_distance(x.numpy(), y.numpy() + 0.5), rel=1e-12)
    assert spread == pytest.approx(0, abs=1e-12)
    found, spread = kernel_distance(x, y + 0.5, subsets=1, subset_size=7)
    random = np.random.RandomState(2020)
    chosen = [a.numpy()[random.choice(20, 7, replace=False)] for a in (x, y + 0.5)]
    assert (found, spread) == (pytest.approx(direct_kernel_distance(*chosen), rel=1e-12), 0)


def test_kernel_distance_is_unbiased():
    found = [kernel_distance(*torch.randn(2, 50, 4, generator=generator(seed)), subsets=1)[0] for seed in range(300)]
    assert abs(np.mean(found)) < 3 * np.std(found) / np.sqrt(300)
    far = [
        kernel_distance(torch.randn(50, 4, generator=generator(seed)) + 1, torch.randn(50, 4), 1)[0]
        for seed in range(3)
    ]
    assert min(far) > max(found)


FIDELITY = """
import json, sys, types
import numpy as np, torch
class Anything(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})
for name in ("torchvision", "torchvision.transforms", "torchvision.models", "torchvision.datasets"):
    sys.modules[name] = Anything(name)
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
with np.load(sys.argv[1]) as file:
    x, y, logits = (torch.from_numpy(file[name]) for name in ("x", "y", "logits"))
kid = kid_features_to_metric(x, y, verbose=False, kid_subset_size=100)
print(json.dumps({**kid, **isc_features_to_metric(logits)}))
"""


@pytest.mark.skipif(importlib.util.find_spec("torch_fidelity") is None, reason="torch-fidelity is not installed")
def test_kernel_distance_and_inception_score_are_those_of_torch_fidelity(tmp_path):
    random = np.random.default_rng(0)
    x, y = random.standard_normal((150, 16)), random.standard_normal((130, 16)) + 0.3
    logits = random.normal(size=(150, 9))
    np.savez(tmp_path / "features.npz", x=x, y=y, logits=logits)
    command = [sys.executable, "-W", "ignore", "-c", FIDELITY, str(tmp_path / "features.npz")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    theirs = json.loads(done.stdout.splitlines()[-1])
    mine = kernel_distance(torch.from_numpy(x), torch.from_numpy(y), subset_size=100)
    expected = theirs["kernel_inception_distance_mean"], theirs["kernel_inception_distance_std"]
    assert mine == pytest.approx(expected, rel=1e-9)
    assert inception_score(logits) == pytest.approx(
        (theirs["inception_score_mean"], theirs["inception_score_std"]), rel=1e-9
    )


# ---- precision, recall, density, coverage ----


def direct_overlap(samples, real):
    def distances(a, b):
        return np.sqrt(((a[:, None] - b[None]) ** 2).sum(axis=2))

    def radii(a, k):
        # The nearest is the point itself.
        return np.sort(distances(a, a), axis=1)[:, k]

    across = distances(real, samples)
    in_three, in_five = across <= radii(real, 3)[:, None], across <= radii(real, 5)[:, None]
    recall = (across <= radii(samples, 3)[None]).any(axis=1).mean()
    return in_three.any(axis=0).mean(), recall, in_five.sum() / (5 * len(samples)), in_five.any(axis=1).mean()


@pytest.mark.parametrize(("count", "shift"), [(90, 0.0), (700, 0.7), (1100, 1.5)])
def test_overlap_agrees_with_brute_force(count, shift):
    samples = torch.randn(count, 3, generator=generator()) + shift
    real = torch.randn(600, 3, generator=generator(1)) + 100
    found = overlap(samples + 100, real)
    expected = direct_overlap((samples + 100).double().numpy(), real.double().numpy())
    assert (found.precision, found.recall, found.density, found.coverage) == pytest.approx(expected, abs=1e-12)
    assert 0 < found.precision <= 1


def test_overlap_of_a_set_with_itself_with_a_part_and_with_nothing():
    real = torch.randn(200, 4, generator=generator())
    same = overlap(real, real)
    assert (same.precision, same.recall, same.coverage) == (1, 1, 1)
    # Each ball has the image itself and its five neighbours in it, the one on its edge too.
    assert same.density == pytest.approx(6 / 5)
    far = overlap(real + 100, real)
    assert (far.precision, far.recall, far.density, far.coverage) == (0, 0, 0, 0)
    # Samples of one of two clusters are as precise, and miss half.
    clusters = torch.cat([real, real + 1000])
    half = overlap(real, clusters)
    assert (half.precision, half.recall, half.coverage) == (1, 0.5, 0.5)
    # Twice the real images: all are recalled, and half of the samples are real.
    double = overlap(clusters, real)
    assert (double.precision, double.recall, double.coverage) == (0.5, 1, 1)
