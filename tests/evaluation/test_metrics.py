"""ADM's metrics against ADM's own code (golden data), closed forms and brute force."""

import numpy as np
import pytest
from support.golden import GOLDEN

from diffit_jax.errors import UserError
from diffit_jax.evaluation import neighbours
from diffit_jax.evaluation.scores import (
    InceptionScore,
    Moments,
    frechet_distance,
    kernel_distance,
    statistics,
)

# (file, bound of fid and sfid: ADM regularises the root of singular matrices)
CASES = [("adm_metrics.npz", 1e-6), ("adm_metrics_singular.npz", 1e-4)]


def load(name):
    with np.load(GOLDEN / name) as arrays:
        return dict(arrays)


def moments(features, pieces=7):
    collected = Moments()
    for piece in np.array_split(features, pieces):
        collected.add(piece)
    return collected


@pytest.mark.parametrize(("name", "bound"), CASES)
def test_fid_and_sfid_are_adms(name, bound):
    data = load(name)
    for metric, end in (("fid", ""), ("sfid", "_spatial")):
        ours = frechet_distance(
            moments(data[f"sample{end}"]).statistics(), moments(data[f"ref{end}"]).statistics()
        )
        assert ours == pytest.approx(float(data[metric]), rel=bound)


@pytest.mark.parametrize("name", [name for name, _ in CASES])
def test_precision_and_recall_are_adms(name):
    """To the last example, since distances are rounded as there."""
    data = load(name)
    precision, recall = neighbours.precision_and_recall(data["ref"], data["sample"], block=256)
    assert (precision, recall) == (data["precision"], data["recall"])


@pytest.mark.parametrize("name", [name for name, _ in CASES])
@pytest.mark.parametrize("side", ["ref", "sample"])
def test_radii_are_adms(name, side):
    """To the last bit of float16."""
    data = load(name)
    ours = neighbours.radii(data[side], block=128)
    np.testing.assert_array_equal(ours, data[f"radii_{side}"][:, 0])


@pytest.mark.parametrize("name", [name for name, _ in CASES])
@pytest.mark.parametrize("piece", [1, 13, 1000])
def test_inception_score_is_adms(name, piece):
    """However its samples arrive; logits are logarithms of the probabilities and any constant."""
    data = load(name)
    logits = np.log(data["probabilities"]) + np.float32(3)
    score = InceptionScore(int(data["split"]))
    for start in range(0, len(logits), piece):
        score.add(logits[start : start + piece])
    assert score.score() == pytest.approx(float(data["inception_score"]), rel=1e-6)


def test_moments_do_not_depend_on_the_pieces():
    """And are those of float64, the mean to the rounding of a float32 sum."""
    features = np.random.default_rng(0).gamma(2, size=(1501, 9)).astype(np.float32)
    (mean, covariance), exact = moments(features, 1).statistics(), statistics(features)
    np.testing.assert_allclose(mean, exact[0], rtol=2e-5)
    np.testing.assert_allclose(covariance, exact[1], rtol=1e-12)
    for pieces in (2, 13, 1501):
        other = moments(features, pieces).statistics()
        np.testing.assert_array_equal(other[0], mean)
        np.testing.assert_array_equal(other[1], covariance)


def test_moments_and_scores_go_on_where_they_were_taken_down():
    rng = np.random.default_rng(0)
    features, logits = (
        rng.normal(size=(950, 4)).astype("f4"),
        rng.normal(size=(950, 6)).astype("f4"),
    )
    for make, values in ((Moments, features), (lambda: InceptionScore(20), logits)):
        whole, begun, gone_on = make(), make(), make()
        for piece in (values[:613], values[613:]):
            whole.add(piece)
        begun.add(values[:613])
        gone_on.restore(begun.state())
        gone_on.add(values[613:])
        if make is Moments:
            for one, other in zip(whole.statistics(), gone_on.statistics(), strict=True):
                np.testing.assert_array_equal(one, other)
        else:
            assert whole.score() == gone_on.score()


def test_identical_and_disjoint_sets():
    features = np.random.default_rng(0).normal(size=(60, 5)).astype(np.float32)
    same = moments(features).statistics()
    assert frechet_distance(same, same) == pytest.approx(0, abs=1e-9)
    assert neighbours.precision_and_recall(features, features) == (1, 1)
    assert neighbours.precision_and_recall(features, features + 100) == (0, 0)


def test_precision_and_recall_by_brute_force():
    """With numbers that float16 holds exactly."""
    rng = np.random.default_rng(1)
    reference = rng.integers(-8, 9, (83, 3)).astype(np.float32)
    samples = rng.integers(-5, 12, (71, 3)).astype(np.float32)

    def fraction(of, points):
        """Of the points that lie within a ball of a set."""
        within = np.sort(((of[:, None] - of[None]) ** 2).sum(-1), axis=1)[:, 3]
        return (((of[:, None] - points[None]) ** 2).sum(-1) <= within[:, None]).any(0).mean()

    ours = neighbours.precision_and_recall(reference, samples, block=20)
    assert ours == (fraction(reference, samples), fraction(samples, reference))


def test_too_few_images():
    few = np.zeros((3, 2), np.float32)
    with pytest.raises(UserError, match="more than 3 images on each side"):
        neighbours.precision_and_recall(np.zeros((9, 2), np.float32), few)


def test_features_beyond_float16():
    """Distances that it cannot hold are taken in float32."""
    rng = np.random.default_rng(2)
    small = rng.normal(size=(40, 4)).astype(np.float32)
    radii = neighbours.radii(np.float32(1000) * small)
    assert np.isfinite(radii).all()
    exact = np.sort(((small[:, None] - small[None]).astype("f8") ** 2).sum(-1), axis=1)[:, 3]
    np.testing.assert_allclose(radii, 1e6 * exact, rtol=1e-3)


def test_inception_score_of_known_distributions():
    """All alike: 1. Each sure of one of n classes, evenly: n."""
    alike, sure = InceptionScore(), InceptionScore()
    alike.add(np.tile(np.float32([1, 2, 3]), (30, 1)))
    sure.add(100 * np.eye(5, dtype=np.float32)[np.arange(50) % 5])
    assert alike.score() == pytest.approx(1) and sure.score() == pytest.approx(5)


def test_kernel_distance_by_brute_force():
    """One subset of everything: the unbiased estimate, pair by pair."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(9, 4)), rng.normal(size=(9, 4)) + 0.5
    kernel = lambda a, b: (a @ b / 4 + 1) ** 3
    pairs = [(i, j) for i in range(9) for j in range(9)]
    within = sum(kernel(z[i], z[j]) for z in (x, y) for i, j in pairs if i != j) / 72
    across = sum(kernel(x[i], y[j]) for i, j in pairs) / 81
    mean, std = kernel_distance(x, y, subsets=3)
    assert mean == pytest.approx(within - 2 * across, rel=1e-9) and std < 1e-12


def test_kernel_distance_of_one_distribution_is_about_zero():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(400, 8)), rng.normal(size=(400, 8))
    mean, std = kernel_distance(x, y, subsets=20, size=200)
    assert abs(mean) < 3 * std and kernel_distance(x, y + 1, 20, 200)[0] > 10 * std
