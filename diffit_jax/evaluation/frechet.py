"""Fréchet distance between two sets of feature vectors, each described by its mean and
covariance."""

import numpy as np


def statistics(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(n, d) features, n ≥ 2 → mean (d,) and unbiased covariance (d, d), float64."""
    features = np.asarray(features, np.float64)
    return features.mean(axis=0), np.atleast_2d(np.cov(features, rowvar=False))


def frechet_distance(
    one: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray]
) -> float:
    """Squared Fréchet distance of two Gaussians (Dowson & Landau 1982), as in FID (Heusel et al.
    2017).

    ‖mu_1 - mu_2‖² + tr(S_1 + S_2 - 2 (S_1 S_2)^½), at least 0. The trace of the root is the sum of
    the square roots of the eigenvalues of the symmetric S_1^½ S_2 S_1^½, which needs no general
    matrix square root.

    Args:
      one, other: (mean, covariance) from `statistics`.
    """
    (mean_1, cov_1), (mean_2, cov_2) = one, other
    values, vectors = np.linalg.eigh(cov_1)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    trace_root = np.sqrt(np.clip(np.linalg.eigvalsh(root @ cov_2 @ root), 0, None)).sum()
    distance = np.sum((mean_1 - mean_2) ** 2) + np.trace(cov_1) + np.trace(cov_2) - 2 * trace_root
    return float(max(distance, 0.0))


def resampled_distance(
    samples: np.ndarray, reference: np.ndarray, resamplings: int, seed: int
) -> float:
    """Mean Fréchet distance between `reference` and random subsets of `samples` of the same size.

    The distance is biased upwards by an amount that depends on the number of samples; only at equal
    counts can two be compared.

    Args:
      samples: (n, d) features, n at least that of the reference.
      reference: (m, d) features.
      resamplings: number of subsets, each drawn without replacement.
      seed: of the draws.
    """
    rng = np.random.default_rng(seed)
    of_reference = statistics(reference)
    subsets = (rng.choice(len(samples), len(reference), replace=False) for _ in range(resamplings))
    return float(
        np.mean([frechet_distance(statistics(samples[subset]), of_reference) for subset in subsets])
    )
