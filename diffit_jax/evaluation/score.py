"""The score of samples of a small labelled data set, without any pretrained network."""

import io
import json
import zipfile
from typing import Any

import numpy as np
from etils import epath

from diffit_jax import files
from diffit_jax.data.sources import Source, open_dataset
from diffit_jax.errors import UserError
from diffit_jax.evaluation.frechet import resampled_distance
from diffit_jax.evaluation.neighbours import nearest_distances

RESAMPLINGS = 20


def pixel_features(images: np.ndarray) -> np.ndarray:
    """The feature space of the small-data scores: the pixels themselves. (n, H, W, C) uint8 → (n, H·W·C) float64 in [-1, 1]."""
    return images.reshape(len(images), -1) / 127.5 - 1


def score_images(images: np.ndarray, labels: np.ndarray, train: Source, test: Source) -> dict[str, Any]:
    """Scores generated images against the train and test split of a small data set that fits in memory.

    Args:
      images: (n, H, W, C) uint8, n at least the number of test images.
      labels: (n,) int, the labels that the images were generated for.
      train, test: the real images.

    Returns:
      Plain numbers by name:
      * `classifier_accuracy`: share of the generated images that a support vector machine (RBF kernel on `pixel_features`, trained on the
        real train split) gives the label that they were made for; `classifier_accuracy_real`: the same of the real test split.
      * `frechet`: Fréchet distance in `pixel_features` between generated and real test images; `frechet_real`: between train and test
        images. Both are means over 20 subsets, with as many images on either side as the test split has. `frechet_ratio`: the first over
        the second.
      * `nearest_train_median`: median Euclidean distance in `pixel_features` to the nearest training image; `nearest_train_median_real`:
        that of the test images; `nearest_train_ratio`: the first over the second. Well below 1, the model has memorised.
      * `count`, `count_frechet`: number of images scored, and on each side of the Fréchet distances.

    Raises:
      UserError: too few images, or images of another shape.
    """
    from sklearn.svm import SVC

    train_images, train_labels, test_images, test_labels = (
        split.read(np.arange(len(split)))[name] for split in (train, test) for name in ("image", "label")
    )
    if images.shape[1:] != test_images.shape[1:]:
        raise UserError(f"the samples are {images.shape[1:]}, the data set has {test_images.shape[1:]}: name the data set they imitate")
    if len(images) < len(test_images):
        raise UserError(f"{len(images)} samples are too few: the Fréchet distance needs at least {len(test_images)}")
    generated, real_train, real_test = (pixel_features(array) for array in (images, train_images, test_images))
    classifier = SVC(C=10.0, gamma=1 / (train_images[0].size * real_train.var())).fit(real_train, train_labels)

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
    scores["frechet_ratio"] = scores["frechet"] / scores["frechet_real"]
    scores["nearest_train_ratio"] = scores["nearest_train_median"] / scores["nearest_train_median_real"]
    return scores


def evaluate(samples: epath.PathLike, dataset: str, data_dir: str = "", output: epath.PathLike | None = None) -> dict[str, Any]:
    """Scores an npz file of samples and writes the scores as JSON.

    Args:
      samples: file with `arr_0` (n, H, W, C) uint8 images and `arr_1` (n,) labels, as `sample` writes it.
      dataset: name of the data set that the samples imitate.
      data_dir: where prepared data sets live, see `open_dataset`.
      output: path of the JSON; None: `metrics.json` beside the samples.

    Returns:
      The scores, see `score_images`.

    Raises:
      UserError: a file that is no npz of samples, an unknown data set, an output that cannot be written.
    """
    samples = files.resolve(samples, "samples")
    try:
        with np.load(io.BytesIO(samples.read_bytes()), allow_pickle=False) as arrays:
            images, labels = arrays["arr_0"], arrays["arr_1"]
    except (OSError, ValueError, KeyError, AttributeError, zipfile.BadZipFile) as error:
        raise UserError(f"--samples {samples} is no npz file with arr_0 and arr_1 ({error}): name one that sample wrote") from error
    shape, num_classes = images.shape[1:], 0
    train, test = (open_dataset(dataset, split, data_dir, shape, num_classes) for split in ("train", "test"))
    scores = score_images(images, labels, train, test)
    output = samples.parent / "metrics.json" if output is None else files.resolve(output, "output")
    files.write_bytes(output, (json.dumps(scores, indent=2) + "\n").encode())
    return scores


def score_table(scores: dict[str, Any]) -> str:
    """The scores of `score_images` as text, generated beside real."""
    return "\n".join(
        [
            f"{'':44}{'generated':>10}{'real':>10}",
            f"{'classifier accuracy':44}{scores['classifier_accuracy']:10.3f}{scores['classifier_accuracy_real']:10.3f}",
            f"{'Fréchet distance to held-out images (pixels)':44}{scores['frechet']:10.3f}{scores['frechet_real']:10.3f}",
            f"{'median distance to nearest training image':44}{scores['nearest_train_median']:10.3f}"
            f"{scores['nearest_train_median_real']:10.3f}",
            f"({scores['count']} samples; Fréchet distances between {scores['count_frechet']} and {scores['count_frechet']} images, "
            f"mean of {RESAMPLINGS} resamplings)",
        ]
    )
