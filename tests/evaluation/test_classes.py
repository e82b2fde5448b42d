"""Scores by class: closed forms, brute force, and what is refused."""

import numpy as np
import pytest

from diffit_jax.data.sources import ArraySource
from diffit_jax.errors import UserError
from diffit_jax.evaluation.classes import by_class, coverage, diversity, table
from diffit_jax.evaluation.images import DatasetImages, FileImages, NpzImages, labels_of


def test_diversity_is_the_mean_distance_of_pairs():
    assert diversity(np.array([[0.0], [3.0]])) == 3
    points = np.random.default_rng(0).normal(size=(40, 5))
    pairs = [np.linalg.norm(a - b) for i, a in enumerate(points) for b in points[:i]]
    np.testing.assert_allclose(diversity(points), np.mean(pairs), rtol=1e-7)
    assert diversity(np.ones((7, 3))) == 0


def test_coverage_by_brute_force():
    draws = np.random.default_rng(1)
    reference, samples = draws.normal(size=(30, 3)), draws.normal(size=(11, 3)) + 0.5
    covered = 0
    for one in reference:
        radius = sorted(np.linalg.norm(reference - one, axis=1))[5]
        covered += np.linalg.norm(samples - one, axis=1).min() <= radius
    np.testing.assert_allclose(coverage(reference, samples), covered / 30)
    assert 0 < covered < 30
    assert coverage(reference, reference) == 1 and coverage(reference, samples + 100) == 0


def test_a_class_that_collapses_and_one_that_is_left_out_show():
    """Class 0 is drawn as it is, class 1 as a single image, class 2 as class 0."""
    draws = np.random.default_rng(2)
    centres = np.array([[0.0, 0], [8, 0], [0, 8]])

    def cloud(label, count):
        return centres[label] + draws.normal(size=(count, 2))

    of_reference = np.repeat([0, 1, 2], [60, 30, 30])
    reference = np.concatenate([cloud(0, 60), cloud(1, 30), cloud(2, 30)])
    of_samples = np.repeat([0, 1, 2], 20)
    samples = np.concatenate([cloud(0, 20), np.tile(centres[1], (20, 1)), cloud(0, 20)])
    order = draws.permutation(60)  # nothing depends on the order
    found = by_class(reference, of_reference, samples[order], of_samples[order])
    as_it_is, collapsed, wrong = (found["classes"][label] for label in "012")
    assert found["worst"] == ["2", "1", "0"]
    assert wrong["fid"] > 50 and as_it_is["fid"] < 1
    # A single image has no variance: the distance is the data's, two dimensions of one each.
    assert 1 < collapsed["fid"] < 3.5
    assert collapsed["diversity"] == 0 and collapsed["diversity_reference"] > 1
    # Distances are rounded to float16, as in ADM's suite: some round to 0.
    assert collapsed["recall"] < 0.2 and wrong["recall"] == wrong["precision"] == 0
    assert as_it_is["coverage"] > 0.7 > 0.5 > collapsed["coverage"] and wrong["coverage"] == 0
    # By the nearest reference image two thirds are of class 0, and none of class 2.
    shares = [one["share"] for one in (as_it_is, collapsed, wrong)]
    np.testing.assert_allclose(shares, [2 / 3, 1 / 3, 0])
    np.testing.assert_allclose([one["accuracy"] for one in found["classes"].values()], [1, 1, 0])
    theirs = [one["share_reference"] for one in (as_it_is, collapsed, wrong)]
    np.testing.assert_allclose(theirs, [0.5, 0.25, 0.25])
    assert found["mean"]["count"] == 20
    text = table(found).splitlines()
    assert text[1].startswith("2 ") and text[-1].startswith("mean")


def test_ten_worst_of_many():
    draws = np.random.default_rng(3)
    labels = np.repeat(np.arange(14), 8)
    reference = draws.normal(size=(112, 2))
    samples = draws.normal(size=(112, 2)) + labels[:, None]  # ever farther off
    found = by_class(reference, labels, samples, labels)
    assert len(found["worst"]) == 10 and found["worst"][0] in ("13", "12")
    distances = [found["classes"][label]["fid"] for label in found["worst"]]
    assert distances == sorted(distances, reverse=True)
    assert min(distances) >= max(
        one["fid"] for label, one in found["classes"].items() if label not in found["worst"]
    )


def test_what_has_no_labels_or_too_few_of_a_class_is_refused(tmp_path):
    features, labels = np.zeros((20, 2)), np.repeat([0, 1], 10)
    with pytest.raises(UserError, match="class 1 has 0 samples and 10 reference images"):
        by_class(features, labels, features, np.zeros(20, int))
    with pytest.raises(UserError, match="class 2 has 10 samples and 0 reference images"):
        by_class(features[:10], labels[:10], features[:30], np.repeat([0, 2], [10, 20])[:20])
    pixels = np.zeros((3, 4, 4, 3), np.uint8)
    np.savez(tmp_path / "plain.npz", arr_0=pixels)
    with pytest.raises(UserError, match="arr_1"):
        labels_of(NpzImages(tmp_path / "plain.npz"))
    unlabelled = DatasetImages(ArraySource(pixels, np.zeros(3, np.int32), 0), "data set x")
    with pytest.raises(UserError, match="data set x has no labels"):
        labels_of(unlabelled)
    folder = FileImages.__new__(FileImages)
    folder.metadata = {"samples": "a folder"}
    with pytest.raises(UserError, match="a folder has no labels"):
        labels_of(folder)
