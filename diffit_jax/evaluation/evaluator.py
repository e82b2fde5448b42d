"""The scores of ADM's suite."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from diffit_jax.evaluation import neighbours
from diffit_jax.evaluation.features import Extractor
from diffit_jax.evaluation.frechet import frechet_distance
from diffit_jax.evaluation.measuring import Measured, measure
from diffit_jax.evaluation.reference import Reference
from diffit_jax.evaluation.scores import kernel_distance

# Metrics that need the features of single pictures, of both sides.
_OF_PICTURES = frozenset(("precision", "recall", "kid"))


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """A reference and what is measured against it.

    Attributes:
      extractor: from pictures to features.
      reference: what samples are compared with.
      metrics: names in `reference.METRICS`, see `Reference.chosen`.
    """

    extractor: Extractor
    reference: Reference
    metrics: Sequence[str]

    @property
    def pooled(self) -> bool:
        """Whether `measure` is to keep the features of single samples."""
        return bool(_OF_PICTURES & set(self.metrics))

    def scores(self, samples: Measured) -> dict[str, float]:
        """The metrics by name, in the order of `metrics`, and `kid_std` behind `kid`."""
        scores: dict[str, float] = {}
        for name, ours, key in (("fid", samples.pool, "mu"), ("sfid", samples.spatial, "mu_s")):
            if name in self.metrics:
                theirs = self.reference.statistics[key]
                scores[name] = frechet_distance(ours.statistics(), theirs)
        if "inception_score" in self.metrics:
            scores["inception_score"] = samples.inception_score.score()
        if self.pooled and self.reference.pictures is not None:
            of_reference = measure(
                self.reference.pictures, self.extractor, "reference", pooled=True
            )
            scores |= self._of_pictures(of_reference.features, samples.features)
        names = [*self.metrics, *(["kid_std"] if "kid" in self.metrics else [])]
        return {name: scores[name] for name in names}

    def _of_pictures(self, reference: np.ndarray, samples: np.ndarray) -> dict[str, float]:
        """Metrics of the features of single pictures, (m, d) and (n, d)."""
        scores: dict[str, float] = {}
        if {"precision", "recall"} & set(self.metrics):
            shares = neighbours.precision_and_recall(reference, samples)
            scores |= dict(zip(("precision", "recall"), shares, strict=True))
        if "kid" in self.metrics:
            pair = kernel_distance(samples, reference)
            scores |= dict(zip(("kid", "kid_std"), pair, strict=True))
        return scores
