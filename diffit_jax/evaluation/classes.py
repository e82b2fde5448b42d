"""Scores of samples class by class, diversity within classes, and the balance of classes.

Few images of a class make a Fréchet distance large: compare classes, and networks at equal counts,
not these figures with those of whole sets.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from diffit_jax.errors import UserError
from diffit_jax.evaluation.neighbours import (
    NEIGHBOURS,
    nearest_distances,
    nearest_of,
    precision_and_recall,
    squared_distances,
)
from diffit_jax.evaluation.scores import distance_between

WORST = 10
COVERAGE_NEIGHBOURS = 5  # of Naeem et al. 2020


def by_class(
    reference: np.ndarray, of_reference: np.ndarray, samples: np.ndarray, of_samples: np.ndarray
) -> dict[str, Any]:
    """Compare samples with a reference class by class.

    Args:
      reference: (m, d) features.
      of_reference: (m,) labels.
      samples: (n, d) features.
      of_samples: (n,) labels that the samples were made for.

    Returns:
      `classes`: by label `count`, `count_reference`, `fid` (of as many images on both sides),
      `precision`, `recall`, `coverage` (share of the reference with a sample as near as its fifth
      neighbour), `diversity` and `diversity_reference` (mean distance between two images), `share`
      and `share_reference` (of all samples, by the class of the nearest reference image, and of the
      reference) and `accuracy` (share of the class's samples whose nearest reference image is of
      it). `worst`: labels of the ten largest `fid`. `mean`: of each over classes.

    Raises:
      UserError: a class that one side has too few images of.
    """
    labels = np.union1d(of_reference, of_samples)
    for label in labels.tolist():
        counts = [int((each == label).sum()) for each in (of_samples, of_reference)]
        if min(counts) <= COVERAGE_NEIGHBOURS:
            raise UserError(
                f"class {label} has {counts[0]} samples and {counts[1]} reference images: by class "
                f"each side needs more than {COVERAGE_NEIGHBOURS} of every class; draw more, or "
                "leave out --by_class"
            )
    nearest = of_reference[nearest_of(samples, reference)]
    classes: dict[str, dict[str, float]] = {}
    for label in labels.tolist():
        theirs, ours = reference[of_reference == label], samples[of_samples == label]
        few = min(len(theirs), len(ours))
        precision, recall = precision_and_recall(theirs, ours, NEIGHBOURS)
        classes[str(label)] = {
            "count": len(ours),
            "count_reference": len(theirs),
            "fid": distance_between(ours[:few], theirs[:few]),
            "precision": precision,
            "recall": recall,
            "coverage": coverage(theirs, ours),
            "diversity": diversity(ours),
            "diversity_reference": diversity(theirs),
            "share": float(np.mean(nearest == label)),
            "share_reference": len(theirs) / len(reference),
            "accuracy": float(np.mean(nearest[of_samples == label] == label)),
        }
    worst = sorted(classes, key=lambda label: -classes[label]["fid"])[:WORST]
    names = list(next(iter(classes.values())))
    mean = {name: float(np.mean([one[name] for one in classes.values()])) for name in names}
    return {"classes": classes, "worst": worst, "mean": mean}


def coverage(
    reference: np.ndarray, samples: np.ndarray, neighbours: int = COVERAGE_NEIGHBOURS
) -> float:
    """Return the share of the reference that has a sample near it (Naeem et al. 2020), a scalar.

    Near: no farther than the neighbour number `neighbours` among the reference itself.

    Args:
      reference: (m, d) features, m > `neighbours`.
      samples: (n, d) features.
      neighbours: k.
    """
    radii = [
        np.partition(_root(part), neighbours, axis=1)[:, neighbours]  # 0 is itself
        for part in squared_distances(reference, reference)
    ]
    return float(np.mean(nearest_distances(reference, samples) <= np.concatenate(radii)))


def diversity(features: np.ndarray) -> float:
    """Return the mean Euclidean distance between two of (n, d) features, n > 1, a scalar."""
    count = len(features)
    sums = (_root(part).sum() for part in squared_distances(features, features))
    return float(sum(sums) / (count * (count - 1)))


def _root(squares: np.ndarray) -> np.ndarray:
    return np.sqrt(np.maximum(squares, 0))


def table(found: Mapping[str, Any]) -> str:
    """Format the worst classes and the means as text."""
    columns = {
        "fid": "FID",
        "precision": "precision",
        "recall": "recall",
        "coverage": "coverage",
        "diversity": "diversity",
        "diversity_reference": "(data)",
        "share": "share",
        "share_reference": "(data)",
    }
    lines = ["class  " + "".join(f"{title:>11}" for title in columns.values())]
    rows = {**{label: found["classes"][label] for label in found["worst"]}, "mean": found["mean"]}
    for label, row in rows.items():
        lines.append(f"{label:7}" + "".join(f"{row[name]:11.4g}" for name in columns))
    return "\n".join(lines)
