import json

import numpy as np
import pytest
import scipy.linalg
from sklearn.neighbors import NearestNeighbors

from diffit_jax.data.sources import open_dataset
from diffit_jax.errors import UserError
from diffit_jax.evaluation.frechet import frechet_distance, resampled_distance, statistics
from diffit_jax.evaluation.neighbours import nearest_distances
from diffit_jax.evaluation.score import evaluate, score_images


def test_frechet_of_known_gaussians():
    """Diagonal covariances: the distance is ‖Δmean‖² + Σ (sqrt(a) - sqrt(b))²."""
    a, b = np.array([1.0, 4.0, 0.0]), np.array([9.0, 4.0, 1.0])
    one, other = (np.zeros(3), np.diag(a)), (np.array([1.0, 2.0, 0.0]), np.diag(b))
    assert frechet_distance(one, other) == pytest.approx(5 + np.sum((np.sqrt(a) - np.sqrt(b)) ** 2))
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-12)


def test_frechet_equals_scipys_matrix_root():
    rng = np.random.default_rng(0)
    one, other = (statistics(rng.normal(size=(50, 6)) @ rng.normal(size=(6, 6)) + rng.normal(size=6)) for _ in range(2))
    root = scipy.linalg.sqrtm(one[1] @ other[1]).real
    expected = np.sum((one[0] - other[0]) ** 2) + np.trace(one[1] + other[1] - 2 * root)
    assert frechet_distance(one, other) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(other, one) == pytest.approx(expected, rel=1e-9)


def test_statistics_are_unbiased():
    features = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    mean, covariance = statistics(features)
    assert mean.dtype == covariance.dtype == np.float64
    centred = features.astype(np.float64) - features.astype(np.float64).mean(0)
    np.testing.assert_allclose(covariance, centred.T @ centred / 19)


def test_resampled_distance_is_a_mean_over_equal_counts():
    rng = np.random.default_rng(0)
    samples, reference = rng.normal(size=(300, 2)), rng.normal(size=(100, 2))
    draws = np.random.default_rng(5)
    subsets = [samples[draws.choice(300, 100, replace=False)] for _ in range(4)]
    expected = np.mean([frechet_distance(statistics(subset), statistics(reference)) for subset in subsets])
    assert resampled_distance(samples, reference, 4, seed=5) == pytest.approx(expected)


def test_nearest_distances():
    rng = np.random.default_rng(0)
    queries, references = rng.normal(size=(37, 5)), rng.normal(size=(61, 5))
    expected = NearestNeighbors(n_neighbors=1).fit(references).kneighbors(queries)[0][:, 0]
    np.testing.assert_allclose(nearest_distances(queries, references, block=10), expected, rtol=1e-9)
    np.testing.assert_allclose(nearest_distances(references, references), 0, atol=1e-6)


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    data_dir = str(tmp_path_factory.mktemp("tfds"))
    train, test = (open_dataset("digits", split, data_dir, (8, 8, 1), 10) for split in ("train", "test"))
    return data_dir, train, test


def test_scores_tell_good_from_bad(splits):
    """Real digits score like real digits; wrong labels, copies of the training set and noise each show where they should."""
    _, train, test = splits
    real, copies = test.read(np.arange(360)), train.read(np.arange(360))
    good = score_images(real["image"], real["label"], train, test)
    assert good["classifier_accuracy"] == good["classifier_accuracy_real"] > 0.97
    assert good["nearest_train_ratio"] == 1 and good["frechet"] < 1e-6 < good["frechet_real"]
    assert score_images(real["image"], (real["label"] + 1) % 10, train, test)["classifier_accuracy"] < 0.05
    memorised = score_images(copies["image"], copies["label"], train, test)
    assert memorised["nearest_train_ratio"] < 1e-6 and 0.5 < memorised["frechet_ratio"] < 2
    noise = np.random.default_rng(0).integers(0, 256, (360, 8, 8, 1), dtype=np.uint8)
    bad = score_images(noise, real["label"], train, test)
    assert bad["frechet_ratio"] > 10 and bad["nearest_train_ratio"] > 1.5 and bad["classifier_accuracy"] < 0.3


def test_evaluate_writes_metrics(splits, tmp_path):
    data_dir, _, test = splits
    real = test.read(np.arange(360))
    np.savez(tmp_path / "s.npz", arr_0=real["image"], arr_1=real["label"])
    scores = evaluate(tmp_path / "s.npz", "digits", data_dir)
    assert json.loads((tmp_path / "s.metrics.json").read_text()) == scores
    assert scores["count"] == scores["count_frechet"] == 360


def test_evaluate_bad_input(splits, tmp_path):
    data_dir, _, test = splits
    with pytest.raises(UserError, match=r"none.npz cannot be read \(No such file or directory\): wanted is an npz file"):
        evaluate(tmp_path / "none.npz", "digits", data_dir)
    (tmp_path / "text.npz").write_text("no npz")
    with pytest.raises(UserError, match=r"text.npz is no npz file"):
        evaluate(tmp_path / "text.npz", "digits", data_dir)
    np.savez(tmp_path / "few.npz", arr_0=test.images[:10], arr_1=test.labels[:10])
    with pytest.raises(UserError, match="10 samples are too few"):
        evaluate(tmp_path / "few.npz", "digits", data_dir)
    np.savez(tmp_path / "large.npz", arr_0=np.zeros((400, 16, 16, 1), np.uint8), arr_1=np.zeros(400, int))
    with pytest.raises(
        UserError, match=r"has images of \(16, 16, 1\), data set digits of \(8, 8, 1\): name the data set that they imitate"
    ):
        evaluate(tmp_path / "large.npz", "digits", data_dir)
    assert not list(tmp_path.glob("*.json"))
