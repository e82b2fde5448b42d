"""Distance to the nearest training image: memorising shows as samples that are nearer to it than
unseen real images are."""

import numpy as np


def nearest_distances(queries: np.ndarray, references: np.ndarray, block: int = 256) -> np.ndarray:
    """Euclidean distance of each query to its nearest reference.

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
