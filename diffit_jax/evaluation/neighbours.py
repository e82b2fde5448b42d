"""Which features lie near which: precision and recall, and the distance to the nearest training
image.

Improved precision and recall (Kynkäänniemi et al. 2019), as ADM's suite measures them: a set's
manifold is the union of balls about its features, each of which reaches to the third nearest other
one. Precision is the share of the samples in the reference's manifold, recall that of the reference
in the samples'.
"""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

NEIGHBOURS = 3
BLOCK = 5_000  # features on each side that are compared at once: 100 MB of distances


def radii(features: np.ndarray, neighbours: int = NEIGHBOURS, block: int = BLOCK) -> np.ndarray:
    """Squared distance of each of (n, d) features to its k-th nearest other one, (n,) float32.

    Of equal features each is the other's nearest, at distance 0, as in ADM's code.
    """
    nearest = np.full((len(features), neighbours + 1), np.inf, np.float32)
    parts = list(_blocks(len(features), block))
    for number, rows in enumerate(parts):
        for columns in parts[number:]:  # a pair of blocks serves both
            of_rows, of_columns = _nearest(features[rows], features[columns], neighbours + 1)
            for side, found in ((rows, of_rows), (columns, of_columns))[: 1 + (rows != columns)]:
                both = np.concatenate([nearest[side], np.asarray(found)], 1)
                nearest[side] = np.partition(both, neighbours, axis=1)[:, : neighbours + 1]
    return nearest.max(1)


def precision_and_recall(
    reference: np.ndarray, samples: np.ndarray, neighbours: int = NEIGHBOURS, block: int = BLOCK
) -> tuple[float, float]:
    """Shares of the samples (n, d) and of the reference (m, d), any of their numbers."""
    of_reference = radii(reference, neighbours, block)
    of_samples = radii(samples, neighbours, block)
    samples_in = np.zeros(len(samples), bool)
    reference_in = np.zeros(len(reference), bool)
    for rows in _blocks(len(reference), block):
        for columns in _blocks(len(samples), block):
            inside = _inside(
                reference[rows], samples[columns], of_reference[rows], of_samples[columns]
            )
            samples_in[columns] |= np.asarray(inside[0])
            reference_in[rows] |= np.asarray(inside[1])
    return float(samples_in.mean()), float(reference_in.mean())


def _blocks(count: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def _distances(one: jax.Array, other: jax.Array) -> jax.Array:
    """(n, d), (m, d) → (n, m) squared distances, float32 and at least 0: as ADM's code has them,
    rounded to float16 at every step, unless one is too large for that."""

    def of(dtype: jnp.dtype) -> jax.Array:
        a, b = one.astype(dtype), other.astype(dtype)
        wide_a, wide_b = a.astype(jnp.float32), b.astype(jnp.float32)
        squares_a, squares_b = (
            (x * x).astype(dtype).astype(jnp.float32).sum(1).astype(dtype) for x in (wide_a, wide_b)
        )
        products = jnp.dot(wide_a, wide_b.T, precision=jax.lax.Precision.HIGHEST).astype(dtype)
        distances = (squares_a[:, None] - 2 * products).astype(dtype) + squares_b
        return jnp.maximum(distances, 0).astype(jnp.float32)

    half = of(jnp.float16)
    return jax.lax.cond(jnp.isfinite(half).all(), lambda: half, lambda: of(jnp.float32))


@functools.partial(jax.jit, static_argnums=2)
def _nearest(one: jax.Array, other: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The smallest distances of each row to the other rows, and the other way round."""
    distances = _distances(one, other)
    return -jax.lax.top_k(-distances, count)[0], -jax.lax.top_k(-distances.T, count)[0]


@jax.jit
def _inside(
    reference: jax.Array, samples: jax.Array, of_reference: jax.Array, of_samples: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Which samples lie in a ball of the reference, and which of the reference in one of the
    samples."""
    distances = _distances(reference, samples)
    return (
        (distances <= of_reference[:, None]).any(0),
        (distances <= of_samples[None]).any(1),
    )


def nearest_distances(queries: np.ndarray, references: np.ndarray, block: int = 256) -> np.ndarray:
    """Euclidean distance of each query to its nearest reference: memorising shows as samples that
    are nearer to a training image than unseen real images are.

    Args:
      queries: (n, d) float.
      references: (m, d) float, m ≥ 1.
      block: queries compared at once; n × m distances are never held together.

    Returns:
      (n,) float64.
    """
    queries, references = np.asarray(queries, np.float64), np.asarray(references, np.float64)
    squares = np.sum(references**2, axis=1)
    nearest = []
    for start in range(0, len(queries), block):
        part = queries[start : start + block]
        distances = np.sum(part**2, axis=1)[:, None] + squares - 2 * part @ references.T
        nearest.append(np.sqrt(np.clip(distances.min(axis=1), 0, None)))
    return np.concatenate(nearest)
