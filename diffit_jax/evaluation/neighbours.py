"""Nearest neighbours of features: precision and recall, and distances to training images.

Improved precision and recall (Kynkäänniemi et al. 2019), as ADM's suite measures them: a set's
manifold is the union of balls about its features, each of which reaches to the third nearest other
one. Precision is the fraction of the samples in the reference's manifold, recall that of the
reference in the samples'.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffit_jax.errors import UserError

NEIGHBOURS = 3
BLOCK = 5_000  # features on each side that are compared at once: 100 MB of distances

Part = tuple[Any, Any, Any]  # of points: features and both norms


@dataclasses.dataclass(frozen=True)
class _Points:
    """Features and the squares of their norms, as ADM's code has them in float16, and in full.

    Attributes:
      features: (n, d) float32.
      norms16, norms32: (n,) float32.
    """

    features: np.ndarray
    norms16: np.ndarray
    norms32: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray) -> "_Points":
        features = np.ascontiguousarray(features, np.float32)
        return cls(features, _norms16(features), np.square(features).sum(1))

    def __getitem__(self, rows: slice) -> Part:
        return self.features[rows], self.norms16[rows], self.norms32[rows]

    def blocks(self, size: int) -> Iterator[slice]:
        count = len(self.features)
        return (slice(start, min(start + size, count)) for start in range(0, count, size))


def _norms16(features: np.ndarray) -> np.ndarray:
    """Sum squares in float16, in the order in which TensorFlow adds them on a CPU.

    Four times eight lanes, which are added to each other at the end.
    """
    count, size = features.shape
    with np.errstate(over="ignore"):
        squares = np.zeros((count, -(-size // 32), 4, 8), np.float16)
        squares.reshape(count, -1)[:, :size] = np.square(features.astype(np.float16))
        lanes = squares[:, 0]
        for part in range(1, squares.shape[1]):
            lanes = lanes + squares[:, part]
        eight = lanes[:, 0] + lanes[:, 1] + lanes[:, 2] + lanes[:, 3]
        return eight.astype(np.float32).sum(1).astype(np.float16).astype(np.float32)


def radii(features: np.ndarray, neighbours: int = NEIGHBOURS, block: int = BLOCK) -> np.ndarray:
    """Return the squared distance of each feature to its k-th nearest other one, (n,) float32.

    Of (n, d) features, n > k. Of equal features each is the other's nearest, at distance 0, as in
    ADM's code.
    """
    return _radii(_Points.of(features), neighbours, block)


def _radii(points: _Points, neighbours: int, block: int) -> np.ndarray:
    nearest = np.full((len(points.features), neighbours + 1), np.inf, np.float32)
    parts = list(points.blocks(block))
    for number, rows in enumerate(parts):
        for columns in parts[number:]:  # a pair of blocks serves both
            of_rows, of_columns = _nearest(points[rows], points[columns], neighbours + 1)
            for side, found in ((rows, of_rows), (columns, of_columns))[: 1 + (rows != columns)]:
                both = np.concatenate([nearest[side], np.asarray(found)], 1)
                nearest[side] = np.partition(both, neighbours, axis=1)[:, : neighbours + 1]
    return nearest.max(1)


def precision_and_recall(
    reference: np.ndarray, samples: np.ndarray, neighbours: int = NEIGHBOURS, block: int = BLOCK
) -> tuple[float, float]:
    """Return precision and recall of samples (n, d) and reference (m, d).

    Raises:
      UserError: n or m is not above `neighbours`.
    """
    _check_counts(reference, samples, neighbours, "precision and recall")
    ours, theirs = _Points.of(samples), _Points.of(reference)
    of_reference, of_samples = (_radii(each, neighbours, block) for each in (theirs, ours))
    samples_in = np.zeros(len(samples), bool)
    reference_in = np.zeros(len(reference), bool)
    for rows in theirs.blocks(block):
        for columns in ours.blocks(block):
            inside = _inside(theirs[rows], ours[columns], of_reference[rows], of_samples[columns])
            samples_in[columns] |= np.asarray(inside[0])
            reference_in[rows] |= np.asarray(inside[1])
    return float(samples_in.mean()), float(reference_in.mean())


def _half(x: jax.Array) -> jax.Array:
    """Round to float16, which the compiler does not optimise away."""
    return jax.lax.reduce_precision(x, exponent_bits=5, mantissa_bits=10)


def _products(one: Part, other: Part, half: bool) -> jax.Array:
    a, b = (_half(one[0]), _half(other[0])) if half else (one[0], other[0])
    products = jnp.dot(a, b.T, precision=jax.lax.Precision.HIGHEST)
    return _half(products) if half else products


def _distances(one: Part, other: Part, both: bool = False) -> tuple[jax.Array, ...]:
    """Return squared distances (n, m) of two parts of points, float32 and at least 0.

    As ADM's code has them, rounded to float16 at every step, unless one is too large for that.
    `both`: also those from the other to the one, (m, n), which differ from them by rounding.
    """
    pairs = [(one, other, lambda products: products)]
    if both:
        pairs.append((other, one, lambda products: products.T))

    def of(half: bool) -> tuple[jax.Array, ...]:
        products, found = _products(one, other, half), []
        rounded = _half if half else lambda x: x
        norms = 1 if half else 2
        for rows, columns, turned in pairs:
            first = rounded(rows[norms][:, None] - 2 * turned(products))
            found.append(rounded(first + columns[norms]))
        return tuple(found)

    halves = of(half=True)
    fit = jnp.isfinite(halves[0]).all()
    return tuple(
        jnp.maximum(distances, 0)
        for distances in jax.lax.cond(fit, lambda: halves, lambda: of(half=False))
    )


@functools.partial(jax.jit, static_argnums=2)
def _nearest(one: Part, other: Part, count: int) -> tuple[jax.Array, jax.Array]:
    """Return the (at most) `count` smallest distances of each row to the others, and reverse."""
    there, back = _distances(one, other, both=True)
    return (
        -jax.lax.top_k(-there, min(count, there.shape[1]))[0],
        -jax.lax.top_k(-back, min(count, back.shape[1]))[0],
    )


@jax.jit
def _inside(
    reference: Part, samples: Part, of_reference: jax.Array, of_samples: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return which samples are in a ball of the reference, and the other way round."""
    (distances,) = _distances(reference, samples)
    return ((distances <= of_reference[:, None]).any(0), (distances <= of_samples[None]).any(1))


def _check_counts(reference: np.ndarray, samples: np.ndarray, neighbours: int, what: str) -> None:
    """Raise `UserError` unless both have more features than neighbours are counted."""
    if min(len(reference), len(samples)) <= neighbours:
        raise UserError(
            f"{what} need more than {neighbours} images on each side: measure more, or leave them "
            "out of --metrics"
        )


class Manifolds(NamedTuple):
    """How two sets lie in each other's balls (Kynkäänniemi et al. 2019, Naeem et al. 2020).

    A ball about a feature reaches to the k-th nearest other one of its set, exclusively.

    Attributes:
      precision: share of the samples that are in a ball of the reference.
      recall: share of the reference that is in a ball of the samples.
      density: mean number of the reference's balls that a sample is in, over k.
      coverage: share of the reference in whose own ball there is a sample.
    """

    precision: float
    recall: float
    density: float
    coverage: float

    @property
    def f_score(self) -> float:
        """The harmonic mean of precision and recall; 0 where both are."""
        both = self.precision + self.recall
        return 2 * self.precision * self.recall / both if both else 0.0


DINOV2_NEIGHBOURS, MOST_POINTS = 5, 10_000  # of dgm-eval


def manifolds(
    reference: np.ndarray, samples: np.ndarray, neighbours: int = DINOV2_NEIGHBOURS
) -> Manifolds:
    """Compare samples (n, d) with a reference (m, d), in float64, as dgm-eval does.

    Raises:
      UserError: n or m is not above `neighbours`.
    """
    _check_counts(reference, samples, neighbours, "precision, recall, density and coverage")
    of_reference, of_samples = (_squared_radii(each, neighbours) for each in (reference, samples))
    inside, within = np.zeros(len(samples), np.int64), np.zeros(len(reference), bool)
    covered, start = np.zeros(len(reference), bool), 0
    for part in squared_distances(reference, samples):
        rows = slice(start, start + len(part))
        balls = part < of_reference[rows, None]
        inside += balls.sum(axis=0)
        within[rows] = (part < of_samples).any(axis=1)
        covered[rows] = balls.any(axis=1)
        start += len(part)
    return Manifolds(
        precision=float((inside > 0).mean()),
        recall=float(within.mean()),
        density=float(inside.mean() / neighbours),
        coverage=float(covered.mean()),
    )


def realism(
    reference: np.ndarray, samples: np.ndarray, neighbours: int = DINOV2_NEIGHBOURS
) -> np.ndarray:
    """Return how real each sample looks (Kynkäänniemi et al. 2019, equation 3), (n,) float64.

    The largest ratio of a ball's radius to the sample's distance from its centre, over the half of
    the reference whose balls are small: above 1 inside one of them, very large at a centre.

    Args:
      reference: (m, d) features.
      samples: (n, d) features.
      neighbours: k, a ball about a feature reaches to its k-th nearest other one.

    Raises:
      UserError: m is not above `neighbours`.
    """
    _check_counts(reference, reference, neighbours, "realism scores")
    squared = np.clip(_squared_radii(reference, neighbours), 0, None)
    small = squared < np.median(squared)
    if not small.any():  # all alike
        small[:] = True
    # Distances below the rounding of their squares are that, so that nothing is divided by 0.
    least = max(1e-12 * float(np.square(reference, dtype=np.float64).sum(1).mean()), 1e-300)
    parts = squared_distances(samples, reference[small])
    ratios = [(squared[small] / np.maximum(part, least)).max(axis=1) for part in parts]
    return np.sqrt(np.concatenate(ratios))


def _squared_radii(features: np.ndarray, neighbours: int) -> np.ndarray:
    """Return the squared distance of each feature to its k-th nearest other one, (n,) float64."""
    parts = squared_distances(features, features)
    return np.concatenate([np.partition(part, neighbours, axis=1)[:, neighbours] for part in parts])


def nearest_distances(queries: np.ndarray, references: np.ndarray, block: int = 256) -> np.ndarray:
    """Return the Euclidean distance of each query to its nearest reference.

    Memorising shows as samples that are nearer to a training image than unseen real images are.

    Args:
      queries: (n, d) float.
      references: (m, d) float, m ≥ 1.
      block: queries compared at once; n × m distances are never held together.

    Returns:
      (n,) float64.
    """
    parts = squared_distances(queries, references, block)
    return np.concatenate([np.sqrt(np.clip(part.min(axis=1), 0, None)) for part in parts])


def nearest_of(queries: np.ndarray, references: np.ndarray, block: int = 256) -> np.ndarray:
    """Return the number of each query's nearest reference, (n,) int; arguments as above."""
    parts = squared_distances(queries, references, block)
    return np.concatenate([part.argmin(axis=1) for part in parts])


def squared_distances(
    queries: np.ndarray, references: np.ndarray, block: int = 256
) -> Iterator[np.ndarray]:
    """Yield squared distances of blocks of queries to all references, (block, m) float64.

    Rounding may leave them a little below 0; arguments as of `nearest_distances`.
    """
    queries, references = np.asarray(queries, np.float64), np.asarray(references, np.float64)
    squares = np.sum(references**2, axis=1)
    for start in range(0, len(queries), block):
        part = queries[start : start + block]
        yield np.sum(part**2, axis=1)[:, None] + squares - 2 * part @ references.T
