"""Scores of features: Fréchet distance, Inception Score, and distances by kernels and ranks."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.linalg import lapack

from diffit_jax.errors import UserError
from diffit_jax.evaluation import neighbours

Statistics = tuple[np.ndarray, np.ndarray]  # mean (d,) and covariance (d, d), float64
BLOCK = 512  # features whose products are taken at once


class Moments:
    """Mean and covariance of features that arrive in pieces, in the memory of one d × d matrix.

    The same bits however they are cut. The covariance is that of `statistics` to 1e-12: products
    are taken about the mean of the first block, so that nothing cancels. The mean is ADM's: a
    float32 sum in the order of the features, which is off by some 1e-6 of it, as the means in
    published references are.

    Attributes:
      count: features so far.
      exact: whether the mean is that of float64 instead, as of everything but ADM's features.
    """

    def __init__(self, exact: bool = False) -> None:
        self.exact = exact
        self.count, self._waiting = 0, np.zeros((0, 0), np.float32)
        self._about = self._sum = self._products = np.zeros(0)
        self._sum32 = np.zeros(0, np.float32)

    def add(self, features: np.ndarray) -> None:
        """Add a piece (n, d) float32."""
        features = np.asarray(features, np.float32)
        waiting = np.concatenate([self._waiting, features]) if len(self._waiting) else features
        whole = len(waiting) // BLOCK * BLOCK
        for start in range(0, whole, BLOCK):
            self._take(waiting[start : start + BLOCK])
        self.count, self._waiting = self.count + len(features), waiting[whole:].copy()

    def _take(self, block: np.ndarray) -> None:
        wide = block.astype(np.float64)
        if not len(self._about):
            size = block.shape[1]
            self._about = wide.mean(0)
            self._sum, self._products = np.zeros(size), np.zeros((size, size))
            self._sum32 = np.zeros(size, np.float32)
        wide -= self._about
        self._sum = self._sum + wide.sum(0)
        self._products = self._products + wide.T @ wide
        for row in block:  # one after the other, in float32
            self._sum32 = self._sum32 + row

    def state(self) -> dict[str, np.ndarray]:
        """Return arrays by name from which `restore` continues."""
        return {name.strip("_"): np.asarray(value) for name, value in self._state().items()}

    def _state(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "exact"}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Continue from a `state`."""
        for name in self._state():
            setattr(self, name, state[name.strip("_")])
        self.count = int(self.count)

    def statistics(self) -> Statistics:
        """Return mean and unbiased covariance of the features so far, at least two."""
        all_of_it = copy.copy(self)  # arrays are replaced, not changed
        if len(self._waiting):
            all_of_it._take(self._waiting)
        return all_of_it._statistics()

    def _statistics(self) -> Statistics:
        mean = self._sum / self.count
        covariance = (self._products - self.count * np.outer(mean, mean)) / (self.count - 1)
        if self.exact:
            return self._about + mean, covariance
        return (self._sum32 / np.float32(self.count)).astype(np.float64), covariance


def statistics(features: np.ndarray) -> Statistics:
    """Return mean (d,) and unbiased covariance (d, d), float64, of (n, d) features, n ≥ 2."""
    features = np.asarray(features, np.float64)
    return features.mean(axis=0), np.atleast_2d(np.cov(features, rowvar=False))


def frechet_distance(one: Statistics, other: Statistics) -> float:
    """Return the squared Fréchet distance of two Gaussians (Dowson & Landau 1982), as in FID.

    ‖mu_1 - mu_2‖² + tr(S_1 + S_2 - 2 (S_1 S_2)^½), at least 0 (Heusel et al. 2017).

    Args:
      one: (mean, covariance) from `statistics`.
      other: the same.
    """
    (mean_1, cov_1), (mean_2, cov_2) = one, other
    root = _trace_of_root(_factor(cov_1).T, _factor(cov_2).T)
    distance = np.sum((mean_1 - mean_2) ** 2) + np.trace(cov_1) + np.trace(cov_2) - 2 * root
    return float(max(distance, 0.0))


def _factor(covariance: np.ndarray) -> np.ndarray:
    """Return A (d, rank) of a covariance A Aᵀ (d, d), by pivoted Cholesky (LAPACK's `pstrf`).

    The rank counts pivots above rounding.
    """
    lower, order, rank, _ = lapack.dpstrf(covariance, lower=1)
    factor = np.zeros((len(covariance), rank))
    factor[order - 1] = np.tril(lower)[:, :rank]
    return factor


INFINITY_COUNTS, INFINITY_LEAST = 15, 5_000  # of dgm-eval


def infinity_counts(count: int) -> np.ndarray:
    """Return how many of `count` samples each distance of `distance_at_infinity` takes, (15,)."""
    least = min(INFINITY_LEAST, max(count // 10, 2))
    return np.linspace(least, count, INFINITY_COUNTS).astype(np.int32)


def distance_at_infinity(
    samples: np.ndarray,
    reference: Statistics,
    counts: Sequence[int] | np.ndarray | None = None,
    seed: int | None = 0,
) -> float:
    """Return the Fréchet distance of infinitely many samples (Chong & Forsyth 2020, FD∞).

    Distances of several counts lie about on a line over 1 / count; this is its value at 0.

    Args:
      samples: (n, d) features.
      reference: mean and covariance.
      counts: of samples; None: `infinity_counts` of n.
      seed: of the draws without replacement; None: the first ones.

    Raises:
      UserError: too few samples for a line.
    """
    if counts is None and len(samples) < 10 * INFINITY_COUNTS:
        raise UserError(
            f"FD at infinity needs distances of {INFINITY_COUNTS} counts, and there are "
            f"{len(samples)} samples: measure at least {10 * INFINITY_COUNTS}, or leave it out"
        )
    counts = infinity_counts(len(samples)) if counts is None else np.asarray(counts)
    rng, found = np.random.default_rng(seed), []
    for count in counts.tolist():
        some = slice(count) if seed is None else rng.choice(len(samples), count, replace=False)
        found.append(frechet_distance(statistics(samples[some]), reference))
    slope_and_end = np.polyfit(1 / np.asarray(counts, np.float64), found, 1)
    return float(slope_and_end[1])


DIRECTIONS = 1_000  # of MIND


def sliced_distance(
    samples: np.ndarray, reference: np.ndarray, directions: np.ndarray | None = None, seed: int = 0
) -> float:
    """Return MIND (2605.06797): 3 d times the mean squared difference of sorted projections.

    Over directions of length 1 and ranks; of both sets as many features as the smaller one has.

    Args:
      samples: (n, d) features.
      reference: (m, d) features.
      directions: (k, d); None: 1,000 of seed.
      seed: of the directions, and of the choice among the larger set.
    """
    rng, size = np.random.default_rng(seed), min(len(samples), len(reference))
    dimensions = samples.shape[1]
    drawn = rng.normal(size=(DIRECTIONS, dimensions)) if directions is None else directions
    units = np.asarray(drawn, np.float64)
    units = units / np.linalg.norm(units, axis=1, keepdims=True)
    both = []
    for each in (samples, reference):
        chosen = each if len(each) == size else each[rng.choice(len(each), size, replace=False)]
        both.append(chosen.astype(np.float64))
    total = 0.0
    for unit in units:
        one, other = (np.sort(each @ unit) for each in both)
        total += np.mean((one - other) ** 2)
    return float(3 * dimensions * total / len(units))


BANDWIDTH, MMD_SCALE = 10.0, 1_000  # of CMMD


def gaussian_distance(samples: np.ndarray, reference: np.ndarray, unit: bool = True) -> float:
    """Return CMMD's distance (2401.09603): 1,000 times a squared MMD with a Gaussian kernel.

    exp(-‖x - y‖² / 200) over all pairs, those of a feature with itself too.

    Args:
      samples: (n, d) features.
      reference: (m, d) features.
      unit: whether features are divided by their length first, as CMMD's are.
    """
    x, y = (np.asarray(each, np.float64) for each in (samples, reference))
    if unit:
        x, y = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (x, y))

    def mean_kernel(a: np.ndarray, b: np.ndarray) -> float:
        parts = neighbours.squared_distances(a, b)
        total = sum(float(np.exp(part / (-2 * BANDWIDTH**2)).sum()) for part in parts)
        return total / (len(a) * len(b))

    return MMD_SCALE * (mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y))


def resampled_distance(
    samples: np.ndarray, reference: np.ndarray, resamplings: int, seed: int
) -> float:
    """Return the mean Fréchet distance between `reference` and random subsets of `samples`.

    The subsets are of its size.

    The distance is biased upwards by an amount that depends on the number of samples; only at equal
    counts can two be compared.

    Args:
      samples: (n, d) features, n at least that of the reference.
      reference: (m, d) features.
      resamplings: number of subsets, each drawn without replacement.
      seed: of the draws.
    """
    rng = np.random.default_rng(seed)
    subsets = (rng.choice(len(samples), len(reference), replace=False) for _ in range(resamplings))
    return float(np.mean([distance_between(samples[subset], reference) for subset in subsets]))


def distance_between(one: np.ndarray, other: np.ndarray) -> float:
    """Return the Fréchet distance between (n, d) and (m, d) features, without their covariances.

    Those are AᵀA and BᵀB of the centred rows over √(n - 1).
    """
    means = [features.mean(axis=0, dtype=np.float64) for features in (one, other)]
    a, b = (
        (features - mean) / np.sqrt(len(features) - 1)
        for features, mean in zip((one, other), means, strict=True)
    )
    root = _trace_of_root(a, b)
    return float(((means[0] - means[1]) ** 2).sum() + (a * a).sum() + (b * b).sum() - 2 * root)


def _trace_of_root(a: np.ndarray, b: np.ndarray) -> float:
    """Return tr (AᵀA BᵀB)^½ of (n, d) and (m, d).

    It is the sum of the singular values of A Bᵀ, whose squares are the eigenvalues of A BᵀB Aᵀ, and
    so those of AᵀA BᵀB. No matrix square root, and a small matrix where there are fewer rows than
    dimensions; where there are more, R of A = QR, of d rows, has the same AᵀA.
    """
    few = [np.linalg.qr(rows, mode="r") if len(rows) > rows.shape[1] else rows for rows in (a, b)]
    return float(np.linalg.svd(np.dot(few[0], np.transpose(few[1])), compute_uv=False).sum())


SPLIT = 5_000  # samples of a part, as in ADM's suite
SUBSETS, SUBSET_SIZE = 100, 1_000  # of KID, as in torch-fidelity


class InceptionScore:
    """exp of the mean divergence between class probabilities of images and of their part.

    Salimans et al. 2016; mean over parts of consecutive samples, the last of which may be shorter,
    as in ADM's suite.

    Attributes:
      split: samples of a part.
    """

    def __init__(self, split: int = SPLIT):
        self.split = split
        self._waiting: list[np.ndarray] = []
        self._scores: list[float] = []

    def add(self, logits: np.ndarray) -> None:
        """Add the logits of the next samples, (n, classes) float32."""
        self._waiting.append(logits)
        if sum(map(len, self._waiting)) >= self.split:
            *whole, rest = _cut(np.concatenate(self._waiting), self.split)
            self._scores += map(_part_score, whole)
            self._waiting = [rest] if len(rest) else []

    def state(self) -> dict[str, np.ndarray]:
        """Return arrays by name from which `restore` continues."""
        waiting = np.concatenate(self._waiting) if self._waiting else np.zeros((0, 0), np.float32)
        return {"waiting": waiting, "scores": np.array(self._scores)}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Continue from a `state`."""
        self._waiting = [state["waiting"]] if len(state["waiting"]) else []
        self._scores = state["scores"].tolist()

    def score(self) -> float:
        """Return the score of the samples so far."""
        last = [_part_score(np.concatenate(self._waiting))] if self._waiting else []
        return float(np.mean(self._scores + last))


def _cut(array: np.ndarray, size: int) -> list[np.ndarray]:
    """Divide rows into parts of a size; the last one has the rest, perhaps nothing."""
    return np.split(array, range(size, len(array) + 1, size))


def _part_score(logits: np.ndarray) -> float:
    shifted = logits.astype(np.float64) - logits.max(1, keepdims=True)
    logs = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    probabilities = np.exp(logs)
    divergences = probabilities * (logs - np.log(probabilities.mean(0)))
    return float(np.exp(divergences.sum(1).mean()))


def kernel_distance(
    samples: np.ndarray,
    reference: np.ndarray,
    subsets: int = SUBSETS,
    size: int = SUBSET_SIZE,
    seed: int = 0,
) -> tuple[float, float]:
    """Return KID (Bińkowski et al. 2018): squared MMD with the kernel (xᵀy / d + 1)³, unbiased.

    Args:
      samples: (n, d) features.
      reference: (m, d) features.
      subsets: of each of the two, drawn without replacement; the result is their mean.
      size: of a subset, at most n and m.
      seed: of the draws.

    Returns:
      Mean over the subsets, and their standard deviation.
    """
    rng = np.random.default_rng(seed)
    size = min(size, len(samples), len(reference))

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a @ b.T / a.shape[1] + 1) ** 3

    found = []
    for _ in range(subsets):
        x, y = (
            each[rng.choice(len(each), size, replace=False)].astype(np.float64)
            for each in (samples, reference)
        )
        of_x, of_y, across = kernel(x, x), kernel(y, y), kernel(x, y)
        within = (of_x.sum() - np.trace(of_x) + of_y.sum() - np.trace(of_y)) / size / (size - 1)
        found.append(within - 2 * across.mean())
    return float(np.mean(found)), float(np.std(found))
