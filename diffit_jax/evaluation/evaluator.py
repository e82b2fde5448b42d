"""The scores of ADM's suite, of pictures that arrive one batch after the other."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from diffit_jax.evaluation import neighbours
from diffit_jax.evaluation.features import Extractor, Features
from diffit_jax.evaluation.frechet import Moments, Statistics, frechet_distance
from diffit_jax.evaluation.reference import Reference
from diffit_jax.evaluation.scores import InceptionScore, kernel_distance
from diffit_jax.runtime.console import Progress


class Collected:
    """What is kept of a set of pictures.

    Attributes:
      pool, spatial: moments of the features.
      inception_score: of the pictures so far.
      pooled: whether pooled features themselves are kept (8 KB each), for `features`.
    """

    def __init__(self, pooled: bool):
        self.pool, self.spatial = Moments(), Moments()
        self.inception_score, self.pooled = InceptionScore(), pooled
        self._pooled: list[np.ndarray] = []

    def add(self, features: Features) -> None:
        """Takes the next pictures' features in."""
        self.pool.add(features.pool)
        self.spatial.add(features.spatial)
        self.inception_score.add(features.logits)
        if self.pooled:
            self._pooled.append(features.pool)

    @property
    def count(self) -> int:
        """Of pictures so far."""
        return self.pool.count

    @property
    def features(self) -> np.ndarray:
        """(n, 2048) float32 pooled features."""
        return np.concatenate(self._pooled)


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """A reference and what is measured against it.

    Attributes:
      extractor: from pictures to features.
      reference: what samples are compared with.
      metrics: names in `reference.METRICS`, see `Reference.chosen`.
      shown: whether progress is shown.
    """

    extractor: Extractor
    reference: Reference
    metrics: Sequence[str]
    shown: bool = True

    @property
    def needs_pictures(self) -> bool:
        """Of the reference, and the samples' features themselves."""
        return bool({"precision", "recall", "kid"} & set(self.metrics))

    def collector(self) -> Collected:
        """An empty one, for samples."""
        return Collected(self.needs_pictures)

    def scores(self, samples: Collected) -> dict[str, Any]:
        """The metrics by name."""
        of_reference, scores = self._reference(), {}
        for name in self.metrics:
            if name in ("fid", "sfid"):
                ours = (samples.pool if name == "fid" else samples.spatial).statistics()
                scores[name] = frechet_distance(ours, self._statistics(name, of_reference))
            elif name == "inception_score":
                scores[name] = samples.inception_score.score()
            elif name == "kid":
                assert of_reference is not None
                mean, std = kernel_distance(samples.features, of_reference.features)
                scores |= {"kid": mean, "kid_std": std}
        if {"precision", "recall"} & set(self.metrics):
            assert of_reference is not None
            shares = neighbours.precision_and_recall(of_reference.features, samples.features)
            both = dict(zip(("precision", "recall"), shares, strict=True))
            scores |= {name: both[name] for name in self.metrics if name in both}
        return {name: scores[name] for name in (*self.metrics, "kid_std") if name in scores}

    def _reference(self) -> Collected | None:
        """What is known of the reference's pictures, if they are needed."""
        pictures = self.reference.pictures
        lacking = "fid" in self.metrics and "mu" not in self.reference.statistics
        if pictures is None or not (self.needs_pictures or lacking):
            return None
        collected, size = Collected(True), self.extractor.batch_size
        with Progress("reference", len(pictures), unit="image", shown=self.shown) as progress:
            for start in range(0, len(pictures), size):
                part = pictures[start : start + size]
                collected.add(self.extractor(part))
                progress.advance(len(part))
        return collected

    def _statistics(self, metric: str, of_reference: Collected | None) -> Statistics:
        key = "mu" if metric == "fid" else "mu_s"
        if key in self.reference.statistics:
            return self.reference.statistics[key]
        assert of_reference is not None
        return (of_reference.pool if metric == "fid" else of_reference.spatial).statistics()
