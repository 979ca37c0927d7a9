"""Metrics against closed forms, scipy's matrix root and the formulas written out."""

import numpy as np
import pytest
import scipy.linalg
import torch

from jlt.errors import JLTError
from jlt.evaluation.metrics import frechet_distance, inception_score, label_agreement


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random_covariance(dimension, rank=None, seed=0):
    factor = torch.randn(dimension, rank or 2 * dimension, generator=generator(seed), dtype=torch.float64)
    return factor @ factor.T / factor.shape[1]


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


def test_inception_score_is_one_for_one_answer_and_the_class_count_for_sure_and_even_answers():
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
