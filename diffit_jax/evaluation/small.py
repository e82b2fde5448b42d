"""The score of samples of a small labelled data set, without any pretrained network."""

from typing import Any

import numpy as np

from diffit_jax.data.sources import Source
from diffit_jax.errors import UserError
from diffit_jax.evaluation.neighbours import nearest_distances
from diffit_jax.evaluation.scores import resampled_distance

RESAMPLINGS = 20
_RATIOS = {"nearest_train_median": "nearest_train_ratio", "frechet": "frechet_ratio"}


def pixel_features(images: np.ndarray) -> np.ndarray:
    """Return the feature space of the small-data scores: the pixels themselves.

    (n, H, W, C) uint8 → (n, H·W·C) float64 in [-1, 1].
    """
    return images.reshape(len(images), -1) / 127.5 - 1


def score_images(
    images: np.ndarray, labels: np.ndarray, train: Source, test: Source
) -> dict[str, Any]:
    """Score generated images against the splits of a small data set that fits in memory.

    Args:
      images: (n, H, W, C) uint8, n at least the number of test images.
      labels: (n,) int, the labels that the images were generated for.
      train: the real images of the train split.
      test: the real images of the test split.

    Returns:
      Plain numbers by name:
      * `classifier_accuracy`: fraction of the generated images that a support vector machine (RBF
        kernel on `pixel_features`, trained on the real train split) gives the label that they were
        made for; `classifier_accuracy_real`: the same of the real test split.
      * `frechet`: Fréchet distance in `pixel_features` between generated and real test images;
        `frechet_real`: between train and test images. Both are means over 20 subsets, with as many
        images on either side as the test split has. `frechet_ratio`: the first over the second.
      * `nearest_train_median`: median Euclidean distance in `pixel_features` to the nearest
        training image; `nearest_train_median_real`: that of the test images; `nearest_train_ratio`:
        the first over the second. Well below 1, the model has memorised.
      * `count`, `count_frechet`: number of images scored, and on each side of the Fréchet
        distances.

    Raises:
      UserError: too few images, or images of another shape.
    """
    from sklearn.svm import SVC

    train_images, train_labels, test_images, test_labels = (
        split.read(np.arange(len(split)))[name]
        for split in (train, test)
        for name in ("image", "label")
    )
    _check(images, test_images)
    generated, real_train, real_test = (
        pixel_features(array) for array in (images, train_images, test_images)
    )
    # scikit-learn's default gamma, of the training images alone.
    gamma = 1 / (train_images[0].size * real_train.var())
    classifier = SVC(C=10.0, gamma=gamma).fit(real_train, train_labels)
    scores = {
        "count": len(images),
        "count_frechet": len(test_images),
        "classifier_accuracy": float(classifier.score(generated, labels)),
        "classifier_accuracy_real": float(classifier.score(real_test, test_labels)),
        "frechet": resampled_distance(generated, real_test, RESAMPLINGS, seed=0),
        "frechet_real": resampled_distance(real_train, real_test, RESAMPLINGS, seed=0),
        "nearest_train_median": float(np.median(nearest_distances(generated, real_train))),
        "nearest_train_median_real": float(np.median(nearest_distances(real_test, real_train))),
    }
    for of, ratio in _RATIOS.items():
        if not scores[f"{of}_real"]:
            raise UserError(
                "half of the data set's test images are among its training images: give it a test "
                "split of others"
            )
        scores[ratio] = scores[of] / scores[f"{of}_real"]
    return scores


def _check(images: np.ndarray, real: np.ndarray) -> None:
    if images.shape[1:] != real.shape[1:]:
        raise UserError(
            f"the samples are {images.shape[1:]}, the data set has {real.shape[1:]}: name the data "
            "set they imitate"
        )
    if len(images) < len(real):
        raise UserError(
            f"{len(images)} samples are too few: the Fréchet distance needs at least {len(real)}"
        )


def score_table(scores: dict[str, Any]) -> str:
    """Format the scores of `score_images` as text, generated next to real."""
    rows = {
        "classifier accuracy": "classifier_accuracy",
        "Fréchet distance to held-out images (pixels)": "frechet",
        "median distance to nearest training image": "nearest_train_median",
    }
    lines = [
        f"{title:44}{scores[name]:10.3f}{scores[f'{name}_real']:10.3f}"
        for title, name in rows.items()
    ]
    count = scores["count_frechet"]
    return "\n".join(
        [
            f"{'':44}{'generated':>10}{'real':>10}",
            *lines,
            f"({scores['count']} samples; Fréchet distances between {count} and {count} images, "
            f"mean of {RESAMPLINGS} resamplings)",
        ]
    )
