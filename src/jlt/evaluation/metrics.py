"""Numbers from statistics: pure functions in float64, tested against closed forms."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from jlt.errors import JLTError

SHUFFLE_SEED = 2020


def frechet_distance(
    mean_a: Float[Tensor, " d"], cov_a: Float[Tensor, "d d"], mean_b: Float[Tensor, " d"], cov_b: Float[Tensor, "d d"]
) -> float:
    """Return the squared 2-Wasserstein distance of two Gaussians (Dowson and Landau 1982; FID: Heusel et al. 2017).

    |mean_a - mean_b|^2 + tr(A) + tr(B) - 2 tr((A^1/2 B A^1/2)^1/2), whose last trace is the sum of the square roots of
    the eigenvalues of a symmetric matrix: real and finite for singular covariances too, where a general matrix root
    fails. Covariances are symmetric and positive semi-definite.
    """
    mean_a, cov_a, mean_b, cov_b = (tensor.double() for tensor in (mean_a, cov_a, mean_b, cov_b))
    eigenvalues, eigenvectors = torch.linalg.eigh(cov_a)
    # F F^T = A. Rounding leaves eigenvalues of a singular matrix a little below zero.
    factor = eigenvectors * eigenvalues.clamp_min(0).sqrt()
    cross = factor.T @ cov_b @ factor
    overlap = torch.linalg.eigvalsh((cross + cross.T) / 2).clamp_min(0).sqrt().sum()
    distance = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * overlap
    return max(0.0, distance.item())


def inception_score(probabilities: Float[Tensor, "n k"], splits: int = 10) -> tuple[float, float]:
    """Return mean and standard deviation over splits of exp(mean KL(p(y|x) || p(y))) (Salimans et al. 2016).

    The splits are equal parts of the images in a fixed random order (the one of torch-fidelity), since images that come
    sorted by class would make each split one class. JLTError for fewer images than splits.
    """
    count = len(probabilities)
    if count < splits:
        raise JLTError(f"An inception score over {splits} splits needs at least {splits} images, there are {count}.")
    order = torch.from_numpy(np.random.RandomState(SHUFFLE_SEED).permutation(count))
    scores = []
    for split in range(splits):
        conditional = probabilities[order[split * count // splits : (split + 1) * count // splits]].double()
        marginal = conditional.mean(dim=0)
        # xlogy gives 0 where a probability is 0, as the limit is.
        divergence = (torch.xlogy(conditional, conditional) - torch.xlogy(conditional, marginal)).sum(dim=1)
        scores.append(divergence.mean().exp().item())
    return float(np.mean(scores)), float(np.std(scores))


def label_agreement(logits: Float[Tensor, "n k"], labels: Int64[Tensor, " n"]) -> float:
    """Return the share of images, 0..1, whose highest logit is that of their label."""
    return (logits.argmax(dim=1) == labels.to(logits.device)).double().mean().item()
