"""Inception Score and Kernel Inception Distance."""

from collections.abc import Mapping

import numpy as np

SPLIT = 5_000  # samples of a part, as in ADM's suite
SUBSETS, SUBSET_SIZE = 100, 1_000  # of KID, as in torch-fidelity


class InceptionScore:
    """exp of the mean divergence between each picture's class probabilities and those of its part
    (Salimans et al. 2016); mean over parts of consecutive samples, the last of which may be
    shorter, as in ADM's suite.

    Attributes:
      split: samples of a part.
    """

    def __init__(self, split: int = SPLIT):
        self.split = split
        self._waiting: list[np.ndarray] = []
        self._scores: list[float] = []

    def add(self, logits: np.ndarray) -> None:
        """Takes the next samples in, (n, classes) float32."""
        self._waiting.append(logits)
        if sum(map(len, self._waiting)) >= self.split:
            *whole, rest = _cut(np.concatenate(self._waiting), self.split)
            self._scores += map(_part_score, whole)
            self._waiting = [rest] if len(rest) else []

    def state(self) -> dict[str, np.ndarray]:
        """Arrays by name from which `restore` goes on."""
        waiting = np.concatenate(self._waiting) if self._waiting else np.zeros((0, 0), np.float32)
        return {"waiting": waiting, "scores": np.array(self._scores)}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Goes on where `state` was taken."""
        self._waiting = [state["waiting"]] if len(state["waiting"]) else []
        self._scores = state["scores"].tolist()

    def score(self) -> float:
        """Of what came so far."""
        last = [_part_score(np.concatenate(self._waiting))] if self._waiting else []
        return float(np.mean(self._scores + last))


def _cut(array: np.ndarray, size: int) -> list[np.ndarray]:
    """In parts of a size; the last one has what is left, perhaps nothing."""
    return np.split(array, range(size, len(array) + 1, size))


def _part_score(logits: np.ndarray) -> float:
    shifted = logits.astype(np.float64) - logits.max(1, keepdims=True)
    logs = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    shares = np.exp(logs)
    divergences = shares * (logs - np.log(shares.mean(0)))
    return float(np.exp(divergences.sum(1).mean()))


def kernel_distance(
    samples: np.ndarray,
    reference: np.ndarray,
    subsets: int = SUBSETS,
    size: int = SUBSET_SIZE,
    seed: int = 0,
) -> tuple[float, float]:
    """KID (Bińkowski et al. 2018): squared maximum mean discrepancy with the kernel (xᵀy / d + 1)³,
    unbiased.

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
