import json

import numpy as np
import pytest
import scipy.linalg
from sklearn.neighbors import NearestNeighbors

from diffit_jax.data.sources import DataSpec, open_dataset
from diffit_jax.errors import UserError
from diffit_jax.evaluation.neighbours import nearest_distances
from diffit_jax.evaluation.score import score
from diffit_jax.evaluation.scores import (
    distance_between,
    frechet_distance,
    resampled_distance,
    statistics,
)
from diffit_jax.evaluation.small import score_images
from diffit_jax.sampling.sample import sample


def test_frechet_of_known_gaussians():
    """Diagonal covariances: the distance is ‖Δmean‖² + Σ (sqrt(a) - sqrt(b))²."""
    a, b = np.array([1.0, 4.0, 0.0]), np.array([9.0, 4.0, 1.0])
    one, other = (np.zeros(3), np.diag(a)), (np.array([1.0, 2.0, 0.0]), np.diag(b))
    assert frechet_distance(one, other) == pytest.approx(5 + np.sum((np.sqrt(a) - np.sqrt(b)) ** 2))
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-12)


def test_frechet_equals_scipys_matrix_root():
    rng = np.random.default_rng(0)
    one, other = (
        statistics(rng.normal(size=(50, 6)) @ rng.normal(size=(6, 6)) + rng.normal(size=6))
        for _ in range(2)
    )
    root = scipy.linalg.sqrtm(one[1] @ other[1]).real
    expected = np.sum((one[0] - other[0]) ** 2) + np.trace(one[1] + other[1] - 2 * root)
    assert frechet_distance(one, other) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(other, one) == pytest.approx(expected, rel=1e-9)


def test_frechet_of_fewer_samples_than_dimensions():
    """The same from covariances of rank 11 and 7 as from the features themselves, to 1e-11
    (measured: equal; roots of eigenvalues near 0 would keep half of the digits)."""
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=(12, 300)), rng.normal(size=(8, 300)) + 0.5
    expected = distance_between(one, other)
    for a, b in ((one, other), (other, one)):
        found = frechet_distance(statistics(a), statistics(b))
        assert found == pytest.approx(expected, rel=1e-11)


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
    expected = np.mean(
        [frechet_distance(statistics(subset), statistics(reference)) for subset in subsets]
    )
    assert resampled_distance(samples, reference, 4, seed=5) == pytest.approx(expected)


def test_nearest_distances():
    rng = np.random.default_rng(0)
    queries, references = rng.normal(size=(37, 5)), rng.normal(size=(61, 5))
    expected = NearestNeighbors(n_neighbors=1).fit(references).kneighbors(queries)[0][:, 0]
    np.testing.assert_allclose(
        nearest_distances(queries, references, block=10), expected, rtol=1e-9
    )
    np.testing.assert_allclose(nearest_distances(references, references), 0, atol=1e-6)


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    data_dir = str(tmp_path_factory.mktemp("tfds"))
    train, test = (
        open_dataset("digits", split, data_dir, DataSpec((8, 8, 1), 10))
        for split in ("train", "test")
    )
    return data_dir, train, test


def test_scores_tell_good_from_bad(splits):
    """Real digits score like real digits; wrong labels, copies of the training set and noise each
    show where they should."""
    _, train, test = splits
    real, copies = test.read(np.arange(360)), train.read(np.arange(360))
    good = score_images(real["image"], real["label"], train, test)
    assert good["classifier_accuracy"] == good["classifier_accuracy_real"] > 0.97
    assert good["nearest_train_ratio"] == 1 and good["frechet"] < 1e-6 < good["frechet_real"]
    assert (
        score_images(real["image"], (real["label"] + 1) % 10, train, test)["classifier_accuracy"]
        < 0.05
    )
    memorised = score_images(copies["image"], copies["label"], train, test)
    assert memorised["nearest_train_ratio"] < 1e-6 and 0.5 < memorised["frechet_ratio"] < 2
    noise = np.random.default_rng(0).integers(0, 256, (360, 8, 8, 1), dtype=np.uint8)
    bad = score_images(noise, real["label"], train, test)
    assert (
        bad["frechet_ratio"] > 10
        and bad["nearest_train_ratio"] > 1.5
        and bad["classifier_accuracy"] < 0.3
    )


def test_evaluate_writes_metrics(splits, tmp_path):
    data_dir, _, test = splits
    real = test.read(np.arange(360))
    np.savez(tmp_path / "s.npz", arr_0=real["image"], arr_1=real["label"])
    scores = score(tmp_path / "s.npz", dataset="digits", data_dir=data_dir)
    assert json.loads((tmp_path / "s.metrics.json").read_text()) == scores
    assert scores["count"] == scores["count_frechet"] == 360


def test_metrics_say_which_samples_they_are_of(splits, run, tmp_path):
    """Path, digest, request and precision; scores of other samples are not replaced unasked."""
    data_dir, _, test = splits
    path = sample(
        run[0], seeds=range(360), overrides={"sampler.num_steps": 2}, output=tmp_path / "s.npz"
    )
    scores = score(path, dataset="digits", data_dir=data_dir)
    assert (
        scores["samples"] == str(path)
        and scores["request"]["identity"]["sampling.sampler.num_steps"] == 2
    )
    assert (
        scores["matmul_precision"] == "default"
        and json.loads((tmp_path / "s.metrics.json").read_text()) == scores
    )
    score(path, dataset="digits", data_dir=data_dir)  # the same samples again
    real = test.read(np.arange(360))
    np.savez(tmp_path / "t.npz", arr_0=real["image"], arr_1=real["label"])
    with pytest.raises(
        UserError,
        match=r"s.metrics.json is there already and holds the scores of .*s.npz, which had other "
        r"images",
    ):
        score(
            tmp_path / "t.npz",
            dataset="digits",
            data_dir=data_dir,
            output=tmp_path / "s.metrics.json",
        )
    assert "request" not in score(
        tmp_path / "t.npz",
        dataset="digits",
        data_dir=data_dir,
        output=tmp_path / "s.metrics.json",
        overwrite=True,
    )
    (tmp_path / "t.metrics.json").write_text("a poem")
    with pytest.raises(
        UserError, match=r"t.metrics.json is there already and is of unknown origin"
    ):
        score(tmp_path / "t.npz", dataset="digits", data_dir=data_dir)


IMAGES, LABELS = np.zeros((360, 8, 8, 1), np.uint8), np.arange(360) % 10


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (
            (IMAGES + 0.5).astype(np.float32),
            LABELS,
            "has arr_0 of float32 from 0.5 to 0.5, not of uint8 from 0 to 255",
        ),
        (IMAGES.astype(np.float64), LABELS, "has arr_0 of float64"),
        (IMAGES.astype(np.float16), LABELS, "has arr_0 of float16"),
        (IMAGES.astype(bool), LABELS, "has arr_0 of bool"),
        (IMAGES.astype(np.int64) + 3, LABELS, "has arr_0 of int64 from 3 to 3"),
        (
            np.zeros((360, 8, 8, 4), np.float32),
            LABELS,
            "latents of an autoencoder are to be decoded first",
        ),
        (
            np.full((360, 8, 8, 1), np.nan, np.float32),
            LABELS,
            "has arr_0 of float32 from nan to nan",
        ),
        (
            IMAGES.transpose(0, 3, 1, 2),
            LABELS,
            r"has arr_0 of shape \(360, 1, 8, 8\), which has the channels first",
        ),
        (IMAGES[..., 0], LABELS, r"has arr_0 of shape \(360, 8, 8\), which is not \(N, H, W, C\)"),
        (IMAGES.reshape(360, -1), LABELS, r"has arr_0 of shape \(360, 64\)"),
        (IMAGES[:0], LABELS[:0], r"has arr_0 of shape \(0, 8, 8, 1\)"),
        (np.array(["a", "b"]), LABELS, "has arr_0 of <U1, not of uint8"),
        (
            IMAGES,
            np.eye(10, dtype=int)[LABELS],
            r"has labels arr_1 of shape \(360, 10\), one-hot perhaps",
        ),
        (IMAGES, LABELS.astype(float), "has labels arr_1 of float64, not whole numbers"),
        (IMAGES, LABELS.astype(str), "has labels arr_1 of <U21, not whole numbers"),
        (IMAGES, LABELS.astype(bool), "has labels arr_1 of bool"),
        (IMAGES, LABELS - 1, "has the label -1, below 0"),
        (IMAGES, LABELS + 1, "has the label 10, but data set digits has the classes 0-9"),
        (IMAGES, LABELS[:100], r"has 360 images, but labels arr_1 of shape \(100,\)"),
        (IMAGES, LABELS[:, None], r"has 360 images, but labels arr_1 of shape \(360, 1\)"),
        (IMAGES, np.array(3), r"has 360 images, but labels arr_1 of shape \(\)"),
        (
            np.zeros((360, 4, 4, 3), np.uint8),
            LABELS,
            r"has images of \(4, 4, 3\), data set digits of \(8, 8, 1\)",
        ),
    ],
)
def test_what_is_found_and_what_is_wanted(splits, tmp_path, images, labels, message):
    np.savez(tmp_path / "s.npz", arr_0=images, arr_1=labels)
    with pytest.raises(UserError, match=message) as error:
        score(tmp_path / "s.npz", dataset="digits", data_dir=splits[0])
    assert (
        "\n" not in str(error.value)
        and "s.npz" in str(error.value)
        and len(list(tmp_path.iterdir())) == 1
    )


def test_other_files_than_npz(tmp_path):
    np.save(tmp_path / "a.npy", IMAGES)
    np.savez(tmp_path / "b.npz", images=IMAGES, labels=LABELS)
    np.savez(tmp_path / "c.npz", arr_0=np.array([{}], object), arr_1=LABELS)
    np.savez(tmp_path / "d.npz", arr_0=IMAGES)
    whole = (tmp_path / "b.npz").read_bytes()
    (tmp_path / "e.npz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "f.npz").mkdir()
    (tmp_path / "g.npz").write_bytes(b"")
    for name, message in (
        ("a.npy", r"is a single array \(360, 8, 8, 1\) of uint8, without labels"),
        ("b.npz", "has the arrays images, labels, which are not arr_0 and arr_1"),
        ("c.npz", "has arrays that cannot be read"),
        ("d.npz", "has the arrays arr_0, which are not arr_0 and arr_1"),
        ("e.npz", "is not an npz file"),
        ("f.npz", "cannot be read"),
        ("g.npz", "is not an npz file"),
    ):
        with pytest.raises(UserError, match=message) as error:
            score(tmp_path / name, dataset="digits")
        assert "wanted is an npz file as diffit sample writes it" in str(
            error.value
        ) and "\n" not in str(error.value)


def test_evaluate_bad_input(splits, tmp_path):
    data_dir, _, test = splits
    with pytest.raises(
        UserError,
        match=r"none.npz cannot be read \(No such file or directory\): wanted is an npz file",
    ):
        score(tmp_path / "none.npz", dataset="digits", data_dir=data_dir)
    (tmp_path / "text.npz").write_text("no npz")
    with pytest.raises(UserError, match=r"text.npz is not an npz file"):
        score(tmp_path / "text.npz", dataset="digits", data_dir=data_dir)
    np.savez(tmp_path / "few.npz", arr_0=test.images[:10], arr_1=test.labels[:10])
    with pytest.raises(UserError, match="10 samples are too few"):
        score(tmp_path / "few.npz", dataset="digits", data_dir=data_dir)
    np.savez(
        tmp_path / "large.npz", arr_0=np.zeros((400, 16, 16, 1), np.uint8), arr_1=np.zeros(400, int)
    )
    with pytest.raises(
        UserError,
        match=r"has images of \(16, 16, 1\), data set digits of \(8, 8, 1\): name the data set "
        r"that they imitate",
    ):
        score(tmp_path / "large.npz", dataset="digits", data_dir=data_dir)
    assert not list(tmp_path.glob("*.json"))
