"""Statistics against one pass over everything; the bundled classifier against its stated accuracy; the evaluation."""

import itertools
import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from data_helpers import generator
from hypothesis import given, settings
from hypothesis import strategies as st

from jlt.errors import JLTError
from jlt.evaluation.extractors import WEIGHTS_FILE, DigitClassifier, digit_split, load_extractor
from jlt.evaluation.metrics import FeatureStatistics, Gaussian, jackknife, label_agreement
from jlt.evaluation.reference import Reference, reference_statistics
from jlt.evaluation.suite import Columns, evaluate_images, frechet_without_groups, group_of, in_chunks, measure
from jlt.images.registry import open_source
from jlt.results.evaluation import Metrics
from jlt.storage.weights import read_metadata

# ---- statistics ----


def test_statistics_agree_with_numpy():
    features = torch.randn(200, 12, generator=generator()) * 3 + 1
    statistics = FeatureStatistics(12)
    for batch in features.split(17):
        statistics.update(batch)
    array = features.double().numpy()
    np.testing.assert_allclose(statistics.mean.numpy(), array.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(statistics.covariance.numpy(), np.cov(array.T), rtol=1e-11, atol=1e-13)
    assert statistics.count == 200


def test_a_large_mean_does_not_destroy_the_variance():
    features = torch.randn(5000, 3, generator=generator(), dtype=torch.float64)
    statistics = FeatureStatistics(3)
    for batch in (features + 1e7).split(100):
        statistics.update(batch)
    torch.testing.assert_close(statistics.covariance, torch.cov(features.T), rtol=1e-6, atol=1e-8)


@settings(max_examples=30, deadline=None)
@given(cuts=st.lists(st.integers(0, 40), max_size=6), workers=st.integers(1, 4))
def test_batches_and_workers_do_not_matter(cuts, workers):
    features = torch.randn(40, 5, generator=generator(), dtype=torch.float64)
    edges = sorted({0, 40, *cuts})
    parts = [FeatureStatistics(5) for _ in range(workers)]
    for index, (low, high) in enumerate(itertools.pairwise(edges)):
        parts[index % workers].update(features[low:high])
    merged = FeatureStatistics(5)
    for part in parts:
        merged.merge(part)
    assert merged.count == 40
    torch.testing.assert_close(merged.mean, features.mean(dim=0), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(merged.covariance, torch.cov(features.T), rtol=1e-11, atol=1e-13)


def test_features_that_are_not_finite_or_too_few_are_refused():
    statistics = FeatureStatistics(3)
    with pytest.raises(JLTError, match="1 images of 2 are not finite"):
        statistics.update(torch.tensor([[0.0, 1, 2], [0, float("nan"), 0]]))
    statistics.update(torch.zeros(0, 3))
    statistics.update(torch.ones(1, 3))
    with pytest.raises(JLTError, match="at least 2 images, there are 1"):
        _ = statistics.covariance


# ---- the bundled classifier ----


@pytest.fixture(scope="module")
def classifier() -> DigitClassifier:
    return load_extractor("digits")


@pytest.fixture(scope="module")
def held_out():
    return digit_split(32)[1]


def test_classifier_is_as_accurate_as_it_states(classifier, held_out):
    accuracy = label_agreement(classifier(held_out.images).logits, held_out.labels)
    assert accuracy >= 0.98
    assert accuracy == pytest.approx(classifier.held_out_accuracy, abs=0.004)
    assert WEIGHTS_FILE.stat().st_size < 500_000
    assert {"made_by", "seed", "held_out_accuracy"} <= set(read_metadata(WEIGHTS_FILE))


def test_classifier_features_depend_on_the_image_alone(classifier, held_out):
    images = held_out.images[:30]
    together = classifier(images)
    assert together.pooled.shape == (30, classifier.dimension)
    assert together.logits.shape == (30, classifier.num_classes)
    alone = torch.cat([classifier(image[None]).pooled for image in images])
    torch.testing.assert_close(alone, together.pooled)


def test_classifier_sees_grey_and_other_sizes(classifier, held_out):
    red_and_blue = held_out.images[:40].clone()
    spread = torch.minimum(red_and_blue[..., 0], 255 - red_and_blue[..., 0])
    red_and_blue[..., 0] += spread
    red_and_blue[..., 2] -= spread
    assert not torch.equal(red_and_blue, held_out.images[:40])
    torch.testing.assert_close(classifier(red_and_blue).pooled, classifier(held_out.images[:40]).pooled)
    doubled = held_out.images.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
    assert label_agreement(classifier(doubled).logits, held_out.labels) > 0.97


def test_an_unknown_extractor_gets_the_nearest():
    with pytest.raises(JLTError, match="did you mean digits"):
        load_extractor("digit")


# ---- the whole evaluation ----


@pytest.fixture(scope="module")
def reference(classifier) -> Reference:
    return reference_statistics(open_source("digits"), classifier, 32)


def all_digits():
    training, held_out = digit_split(32)
    return torch.cat([training.images, held_out.images]), torch.cat([training.labels, held_out.labels])


def batches(images, labels, size):
    if labels is None:
        return [(part, None) for part in images.split(size)]
    return list(zip(images.split(size), labels.split(size), strict=True))


def test_the_reference_against_itself(classifier, reference):
    images, labels = all_digits()
    assert reference.count == len(images) == 1797
    metrics = evaluate_images(batches(images, labels, 100), reference, classifier, len(images), range(10))
    # The same images in another order.
    assert metrics.frechet_distance < 1e-5 * reference.pooled.covariance.trace().item()
    assert metrics.label_agreement > 0.99
    assert 9 < metrics.inception_score <= 10
    assert metrics.count == 1797


def test_the_numbers_do_not_depend_on_the_batches(classifier, reference, held_out):
    metrics = [
        evaluate_images(batches(held_out.images, held_out.labels, size), reference, classifier, 296, range(10))
        for size in (7, 128, 296)
    ]
    # To the last digit.
    assert metrics[1] == metrics[0]
    assert metrics[2] == metrics[0]


def test_worse_images_get_worse_numbers(classifier, reference, held_out):
    def distance(images):
        return evaluate_images(batches(images, None, 100), reference, classifier, len(images))

    noise = torch.randn(held_out.images.shape, generator=generator())
    noisy = [(held_out.images + level * noise).clamp(0, 255).byte() for level in (0, 30, 90)]
    clean, worse, worst = map(distance, noisy)
    assert clean.frechet_distance < worse.frechet_distance < worst.frechet_distance
    assert clean.inception_score > worst.inception_score
    assert clean.label_agreement is None
    one_class = distance(held_out.images[held_out.labels == 3])
    assert one_class.inception_score < 2
    assert one_class.frechet_distance > clean.frechet_distance


def test_a_reference_of_another_extractor_is_refused_before_the_first_sample(classifier, reference):
    def never():
        raise AssertionError("a batch was drawn")
        yield

    with pytest.raises(JLTError, match="dimension 3, .* gives 64"):
        evaluate_images(never(), Reference(FeatureStatistics(3)), classifier, 10)
    unlike = {**classifier.identity(), "weights_sha256": "0" * 64}
    other = Reference(FeatureStatistics(64), protocol={"extractor": unlike})
    with pytest.raises(JLTError, match="another extractor .weights_sha256 '0000"):
        evaluate_images(never(), other, classifier, 10)


@pytest.mark.parametrize("count", [295, 297])
def test_another_number_of_images_is_refused(classifier, reference, held_out, count):
    with pytest.raises(ValueError, match=f"{count} images"):
        evaluate_images(batches(held_out.images, None, 100), reference, classifier, count)


def test_metrics_are_json(classifier, reference, tmp_path):
    metrics = Metrics(frechet_distance=1.0, count=10)
    assert json.loads(json.dumps(asdict(metrics)))["label_agreement"] is None
    reference.save(tmp_path / "reference.npz")
    content = json.loads((tmp_path / "reference.json").read_text())
    assert content["protocol"]["extractor"] == classifier.identity()
    assert (content["count"], content["protocol"]["resolution"]) == (1797, 32)


# ---- columns ----


def test_without_is_the_inverse_of_merging():
    features = torch.randn(60, 5, generator=generator(), dtype=torch.float64) + 100
    whole, part, rest = (FeatureStatistics(5) for _ in range(3))
    whole.update(features)
    part.update(features[:23])
    rest.update(features[23:])
    found = whole.without(part)
    assert found.count == 37
    torch.testing.assert_close(found.mean, rest.mean, rtol=1e-13, atol=0)
    torch.testing.assert_close(found.covariance, rest.covariance, rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match="nothing remains"):
        whole.without(whole)


@pytest.mark.parametrize("count", [192, 1000])
def test_error_and_bias_of_the_frechet_distance_are_what_repetition_shows(count):
    dimension, trials = 8, 200
    scale = np.linspace(0.5, 1.5, dimension)
    true = 0.3**2 * dimension + ((scale - 1) ** 2).sum()
    exact = Gaussian(torch.zeros(dimension, dtype=torch.float64), torch.eye(dimension, dtype=torch.float64))
    random = np.random.default_rng(0)
    found = []
    for _ in range(trials):
        images = (random.standard_normal((count, dimension)) * scale + 0.3).astype(np.float32)
        left_out = frechet_without_groups(images, exact)
        found.append((left_out.distance, *left_out.error_and_bias()))
    distances, errors, biases = np.array(found).T
    scatter, bias = distances.std(), distances.mean() - true
    assert 1 / 1.5 < errors.mean() / scatter < 1.5
    # The mean of the real bias is itself only known to scatter / sqrt(trials).
    assert abs(biases.mean() - bias) < 0.15 * bias + 3 * scatter / np.sqrt(trials)
    assert bias > 0


def test_the_jackknife_leaves_out_each_group():
    images = np.random.default_rng(0).standard_normal((1500, 6)).astype(np.float32)
    exact = Gaussian(torch.zeros(6, dtype=torch.float64), 2 * torch.eye(6, dtype=torch.float64))

    def distance(rows):
        rows = torch.from_numpy(rows).double()
        return exact.distance(Gaussian(rows.mean(dim=0), torch.cov(rows.T)))

    groups = group_of(1500)
    without = [distance(images[groups != group]) for group in range(10)]
    expected = jackknife(distance(images), without, np.bincount(groups).tolist())
    left_out = frechet_without_groups(images, exact)
    assert left_out.distance == pytest.approx(distance(images), rel=1e-7)
    assert left_out.error_and_bias() == pytest.approx(expected, rel=1e-7)


def test_columns_in_a_file_give_the_numbers_of_columns_in_memory(classifier, reference, held_out, tmp_path):
    found = classifier(held_out.images)
    arrays = {"pooled": found.pooled.numpy(), "logits": found.logits.numpy(), "labels": held_out.labels.numpy()}
    for name, array in arrays.items():
        np.save(tmp_path / f"{name}.npy", array)
    mapped = {name: np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in arrays}
    whole = measure(Columns(**arrays, class_logits=range(10)), reference, classifier)[0]
    assert measure(Columns(**mapped, class_logits=range(10)), reference, classifier)[0] == whole
    # 296 digits are too few to estimate the bias in 64 dimensions.
    missing = {name for name, value in asdict(whole).items() if value is None}
    assert missing == {"spatial_frechet_distance", "frechet_distance_bias"}
    np.testing.assert_array_equal(mapped["pooled"], arrays["pooled"])


def test_what_cannot_be_measured_is_none(classifier, reference, held_out):
    pooled = classifier(held_out.images).pooled.numpy()
    found = asdict(measure(Columns(pooled), Reference(reference.pooled, protocol=reference.protocol), classifier)[0])
    measured = {name for name, value in found.items() if value is not None}
    assert measured == {"frechet_distance", "frechet_distance_error", "count"}
    with pytest.raises(JLTError, match="at least 10 images, there are 9"):
        measure(Columns(pooled[:9]), reference, classifier)


def test_spatial_features_have_a_distance_of_their_own(classifier, reference, held_out):
    pooled = classifier(held_out.images).pooled.numpy()
    spatial = np.random.default_rng(0).standard_normal((len(pooled), 4)).astype(np.float32)
    real = FeatureStatistics(4)
    real.update(torch.from_numpy(spatial + 2))
    found = measure(Columns(pooled, spatial=spatial), Reference(reference.pooled, real), classifier)[0]
    # The same covariance, moved by two in each of four directions.
    assert found.spatial_frechet_distance == pytest.approx(16, rel=1e-5)


def test_samples_of_another_size_are_refused(classifier, reference, held_out):
    with pytest.raises(JLTError, match="32x32 pixels, the samples have 16x16"):
        evaluate_images([(held_out.images[:, ::2, ::2], None)], reference, classifier, 296)


@pytest.mark.parametrize("sizes", [(150,), (1,) * 150, (63, 1, 64, 22), (64, 64, 22), (130, 0, 20)])
def test_chunks_do_not_depend_on_the_batches(sizes):
    images = torch.arange(150, dtype=torch.uint8).reshape(150, 1, 1, 1).expand(150, 2, 2, 3)
    labels = torch.arange(150)
    found = list(in_chunks(zip(images.split(sizes), labels.split(sizes), strict=True), 64))
    assert [len(part) for part, _ in found] == [64, 64, 22]
    assert torch.equal(torch.cat([part for part, _ in found]), images)
    assert torch.equal(torch.cat([part for _, part in found]), labels)
    assert all(part is None for _, part in in_chunks([(images, None)], 64))
    with pytest.raises(ValueError, match="some have none"):
        list(in_chunks([(images, labels), (images, None)], 64))
