"""The closed forms of eq. 9-12 against brute force, and the covariance estimate against one that holds all the data."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_results import LATENTS, GaussianStore, analyze
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from jlt.config import PREDICTIONS
from jlt.errors import JLTError
from jlt.experiments.analysis import AnalysisConfig, measure_geometry
from jlt.geometry import gaussian
from jlt.geometry.covariance import TokenCovariance
from jlt.geometry.spectrum import eigenvalues_descending, sampling_error, share_below, summarise
from jlt.report.geometry_text import advice_sentences, caution_sentences
from jlt.results.files import result_json

EIGENVALUES = np.array([6.0, 1.0, 0.03, 0.0008])
TIMES = [0.0, 0.1, 0.5, 0.9, 0.99]


@pytest.fixture(scope="module")
def draws() -> dict[str, np.ndarray]:
    """Draws of (x, eps) with a known covariance, shifted and mixed so that their sample moments equal it exactly."""
    generator = np.random.default_rng(0)
    raw = generator.standard_normal((200_000, 2 * len(EIGENVALUES)))
    raw -= raw.mean(0)
    white = raw @ np.linalg.inv(np.linalg.cholesky(raw.T @ raw / len(raw))).T
    x, eps = np.split(white, 2, axis=1)
    x = x * np.sqrt(EIGENVALUES)
    return {"x": x, "eps": eps, "v": x - eps}


@pytest.mark.parametrize("t", TIMES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_closed_forms_equal_a_sampled_regression(draws: dict[str, np.ndarray], prediction: str, t: float) -> None:
    z = t * draws["x"] + (1 - t) * draws["eps"]
    for direction, lam in enumerate(EIGENVALUES):
        target, noisy = draws[prediction][:, direction], z[:, direction]
        solution, residual, *_ = np.linalg.lstsq(noisy[:, None], target, rcond=None)
        measured = [target.var(), solution[0], residual[0] / len(noisy), (noisy * solution[0]).var()]
        closed = [
            gaussian.target_variance(prediction, lam),
            gaussian.best_coefficient(prediction, lam, t),
            gaussian.conditional_variance(prediction, lam, t),
            gaussian.explained_power(prediction, lam, t),
        ]
        np.testing.assert_allclose(np.array(closed, dtype=float), measured, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_conditional_variance_is_the_spread_among_like_noisy_values(prediction: str) -> None:
    generator = np.random.default_rng(1)
    lam, t = 0.3, 0.6
    x, eps = np.sqrt(lam) * generator.standard_normal(4_000_000), generator.standard_normal(4_000_000)
    target = {"x": x, "eps": eps, "v": x - eps}[prediction]
    alike = np.abs(t * x + (1 - t) * eps - 0.4) < 0.01
    assert target[alike].var() == pytest.approx(float(gaussian.conditional_variance(prediction, lam, t)), rel=0.03)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_eigenbasis_solves_the_full_regression(prediction: str) -> None:
    """Eq. 10 per direction, rotated back, is the matrix that a multivariate regression of the target on z gives."""
    generator = np.random.default_rng(2)
    factor, t = generator.standard_normal((5, 5)), 0.4
    sigma = factor @ factor.T
    lam, basis = np.linalg.eigh(sigma)
    identity = np.eye(5)
    covariance = {"x": t * sigma, "eps": (1 - t) * identity, "v": t * sigma - (1 - t) * identity}[prediction]
    full = covariance @ np.linalg.inv(t**2 * sigma + (1 - t) ** 2 * identity)
    np.testing.assert_allclose(basis * gaussian.best_coefficient(prediction, lam, t) @ basis.T, full, atol=1e-12)


@given(lam=st.floats(0, 1e3), t=st.floats(0.001, 0.999), z=st.floats(-10, 10))
def test_three_best_outputs_read_out_to_one_velocity(lam: float, t: float, z: float) -> None:
    outputs = {name: float(gaussian.best_coefficient(name, lam, t)) * z for name in PREDICTIONS}
    velocity = outputs["v"]
    tolerance = {"rel": 1e-9, "abs": 1e-9 * (1 + abs(z)) / (t * (1 - t))}
    assert (outputs["x"] - z) / (1 - t) == pytest.approx(velocity, **tolerance)  # eq. 3
    assert (z - outputs["eps"]) / t == pytest.approx(velocity, **tolerance)


@given(lam=st.floats(0, 1e3), t=st.floats(0, 0.999))
def test_variance_splits_into_explained_and_conditional(lam: float, t: float) -> None:
    for prediction in PREDICTIONS:
        parts = gaussian.explained_power(prediction, lam, t) + gaussian.conditional_variance(prediction, lam, t)
        assert float(parts) == pytest.approx(float(gaussian.target_variance(prediction, lam)), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("t", [0.0, 0.3, 0.9])
def test_limits_of_vanishing_variance(t: float) -> None:
    limits = {"x": 0.0, "eps": 1 / (1 - t), "v": -1 / (1 - t)}
    for prediction, limit in limits.items():
        assert float(gaussian.best_coefficient(prediction, 1e-12, t)) == pytest.approx(limit, abs=1e-9)
        assert float(gaussian.best_coefficient(prediction, 0.0, t)) == pytest.approx(limit, rel=1e-14)
        assert float(gaussian.conditional_variance(prediction, 0.0, t)) == 0.0
    assert [float(gaussian.target_variance(name, 0.0)) for name in PREDICTIONS] == [0.0, 1.0, 1.0]


def test_closed_forms_broadcast_directions_against_times() -> None:
    table = gaussian.best_coefficient("v", EIGENVALUES, np.array(TIMES)[:, None])
    assert table.shape == (len(TIMES), len(EIGENVALUES))
    assert table[2, 1] == gaussian.best_coefficient("v", 1.0, 0.5) == 0.0


@pytest.mark.parametrize(("lam", "t"), [(-0.1, 0.5), (1.0, 1.1), (1.0, -0.1), (0.0, 1.0), (float("nan"), 0.5)])
def test_values_outside_the_model_are_refused(lam: float, t: float) -> None:
    with pytest.raises(ValueError, match=r"eigenvalues|times|constant"):
        gaussian.best_coefficient("x", lam, t)


def latents(count: int, seed: int = 0, channels: int = 3, grid: int = 8) -> Tensor:
    """Correlated float16 latents with a mean far from zero, where a careless sum of squares loses digits."""
    generator = torch.Generator().manual_seed(seed)
    white = torch.randn(count, channels, grid, grid, generator=generator)
    mixed = torch.einsum("dc,nchw->ndhw", torch.randn(channels, channels, generator=generator), white)
    return (mixed + mixed.roll(1, -1) + 30.0 * torch.arange(channels)[:, None, None]).half()


def tokens_by_loops(data: Tensor, patch_size: int) -> np.ndarray:
    """Every patch written out by hand, as the slow and obvious reference."""
    array, rows = data.double().numpy(), []
    for image in array:
        for top in range(0, image.shape[1], patch_size):
            for left in range(0, image.shape[2], patch_size):
                rows.append(image[:, top : top + patch_size, left : left + patch_size].ravel())
    return np.array(rows)


@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_token_covariance_equals_that_of_the_data_matrix(patch_size: int) -> None:
    data = latents(40)
    tokens = TokenCovariance(3, patch_size)
    tokens.update(data)
    matrix = tokens_by_loops(data, patch_size)
    assert (tokens.images, tokens.count) == (40, len(matrix))
    np.testing.assert_allclose(tokens.mean.numpy(), matrix.mean(0), rtol=1e-13)
    np.testing.assert_allclose(tokens.covariance.numpy(), np.cov(matrix.T), rtol=1e-11, atol=1e-11)


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.integers(0, 9), min_size=1, max_size=8), split=st.integers(0, 8))
def test_any_batches_and_any_merge_give_one_covariance(sizes: list[int], split: int) -> None:
    data = latents(sum(sizes) + 2, seed=3)
    whole, left, right = (TokenCovariance(3, 2) for _ in range(3))
    whole.update(data)
    for index, batch in enumerate(data.split([*sizes, 2])):
        (left if index < split else right).update(batch)
    left.merge(right)
    assert (left.images, left.count) == (whole.images, whole.count)
    torch.testing.assert_close(left.covariance, whole.covariance, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(left.mean, whole.mean, rtol=1e-13, atol=1e-13)


def test_channel_variance_is_that_of_the_values_at_every_patch_size() -> None:
    data = latents(30)
    expected = data.double().transpose(0, 1).flatten(1).var(1, correction=0)
    for patch_size in (1, 2, 4):
        tokens = TokenCovariance(3, patch_size)
        tokens.update(data)
        torch.testing.assert_close(tokens.channel_variance, expected, rtol=1e-11, atol=0.0)


def test_equal_channel_variances_hide_the_anisotropy_that_eigenvalues_show() -> None:
    """Two channels of unit variance and correlation 0.99: isotropic channel by channel, 199 to 1 by direction."""
    generator = torch.Generator().manual_seed(0)
    shared, own = torch.randn(2, 4000, 2, 4, 4, generator=generator, dtype=torch.float64)
    tokens = TokenCovariance(2, 1)
    tokens.update(0.99**0.5 * shared[:, :1] + 0.01**0.5 * own)
    assert tokens.channel_variance.numpy() == pytest.approx([1.0, 1.0], rel=0.02)
    summary = summarise(eigenvalues_descending(tokens.covariance.numpy()))
    assert summary.anisotropy == pytest.approx(1.99 / 0.01, rel=0.03)


def test_latents_that_cannot_be_analysed_are_refused_by_name() -> None:
    data = latents(5)
    data[3, 1, 2, 2] = float("inf")
    with pytest.raises(JLTError, match="Latent 3 of the store is not finite"):
        TokenCovariance(3, 1).update(data)
    with pytest.raises(JLTError, match="8 x 8 positions cannot be cut into patches of 3 x 3"):
        TokenCovariance(3, 3).update(latents(2))
    with pytest.raises(ValueError, match="two tokens"):
        _ = TokenCovariance(3, 1).covariance


def test_summaries_of_known_spectra() -> None:
    flat = summarise(np.full(16, 0.5))
    assert (flat.effective_rank, flat.participation_ratio) == pytest.approx((16, 16))
    assert (flat.anisotropy, flat.sphericity) == pytest.approx((1, 1))
    # Half the variance in one direction, half spread over two: entropy log 2 + (log 2) / 2.
    uneven = summarise(np.array([2.0, 1.0, 1.0]))
    assert uneven.effective_rank == pytest.approx(2**1.5)
    assert uneven.participation_ratio == pytest.approx(16 / 6)
    assert uneven.anisotropy == pytest.approx(2)
    assert uneven.sphericity == pytest.approx(2 ** (1 / 3) / (4 / 3))
    degenerate = summarise(np.array([1.0, 1.0, 0.0]))
    assert degenerate.anisotropy is None
    assert degenerate.sphericity == 0
    assert degenerate.effective_rank == pytest.approx(2)


def test_share_below_counts_directions_and_their_variance() -> None:
    share = share_below(np.array([6.0, 1.0, 0.5, 0.02]), 1.0)
    assert (share.directions, share.variance_share) == (2, pytest.approx(0.52 / 7.52))


def test_sampling_error_is_that_of_many_estimates() -> None:
    generator = np.random.default_rng(0)
    estimates = [generator.standard_normal(200).var(ddof=1) for _ in range(4000)]
    assert sampling_error(200) == pytest.approx(np.std(estimates), rel=0.05)


FakeStore = functools.partial(GaussianStore, classes=1)


def test_analysis_is_json_and_its_tables_are_the_closed_forms() -> None:
    result = json.loads(json.dumps(result_json(analyze(FakeStore(latents(300)), [1, 2])), allow_nan=False))
    assert result["latents"] == LATENTS
    assert list(result["tokens"]) == ["1", "2"]
    entry = result["tokens"]["2"]
    lam = np.array(entry["eigenvalues"])
    assert entry["dimension"] == len(lam) == 12
    assert (np.diff(lam) <= 0).all()
    assert lam.sum() == pytest.approx(np.trace(np.cov(tokens_by_loops(latents(300), 2).T)))
    assert entry["target_variance"]["v"] == pytest.approx(lam + 1)
    time, direction = result["times"].index(0.5), 3
    tabulated = lam[entry["directions"][direction]]
    assert entry["coefficient"]["x"][time][direction] == pytest.approx(0.5 * tabulated / (0.25 * tabulated + 0.25))
    assert 0 < entry["relative_sampling_error"] < (2 / 300) ** 0.5


def assert_alike(one: Any, other: Any) -> None:
    """Compare nested results: numbers up to rounding, everything else exactly."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_alike(one[key], other[key])
    elif isinstance(one, list) and one and isinstance(one[0], float):
        np.testing.assert_allclose(one, other, rtol=1e-8, atol=1e-10)
    elif isinstance(one, list):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_alike(a, b)
    else:
        assert one == (pytest.approx(other, rel=1e-8, abs=1e-10) if isinstance(one, float) else other)


def test_analysis_does_not_depend_on_the_batch_size() -> None:
    one, other = (result_json(analyze(FakeStore(latents(50), classes=3), [2], batch_size=size)) for size in (7, 50))
    assert_alike(one, other)


def test_few_images_have_cautions_and_one_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = analyze(FakeStore(latents(8)), [1, 4])
    texts = caution_sentences(few)
    assert "Patch size 1, 8 latents: there are too few for a forecast. It needs 50, and a good one thousands." in texts
    assert "All latents are of one class, so the spectrum within classes is that of all." in texts
    assert few.tokens[4].forecast.call == "undecided"
    assert "too few latents" in advice_sentences(few)[1]
    config = AnalysisConfig((8,), (64,), few.training)
    measure_geometry(FakeStore(latents(52)), tmp_path, config)
    assert "Patch size 8, 52 latents: 52 tokens cannot span 192 directions" in capsys.readouterr().err
    assert analyze(FakeStore(latents(400), classes=2), [1]).cautions == ()
    with pytest.raises(JLTError, match="There are 1 latents"):
        analyze(FakeStore(latents(1)), [1])
    with pytest.raises(JLTError, match="All latents of the store are equal"):
        analyze(FakeStore(torch.ones(4, 3, 8, 8)), [1])
    with pytest.raises(JLTError, match="All latents of the store are equal"):
        analyze(FakeStore(latents(1).expand(5, -1, -1, -1) + 7), [1])


@pytest.mark.parametrize("count", [600, 6_000])
def test_the_stated_error_includes_the_bias_of_sorting(count: int) -> None:
    """Of 128 directions with known variances, the stated error is the real one, in the median and at the end."""
    known = np.logspace(1, -3, 128)
    white = torch.randn(count, 128, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    entry = analyze(FakeStore((white * torch.from_numpy(known).sqrt())[:, :, None, None]), [1]).tokens[1]
    off = np.abs(np.array(entry.eigenvalues) / known - 1)
    stated = np.array(entry.relative_sampling_errors)
    assert 0.4 < np.median(off) / np.median(stated) < 1.5
    assert 0.5 < off[-16:].mean() / stated[-16:].mean() < 2
