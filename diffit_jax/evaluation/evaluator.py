"""The scores of ADM's suite."""

import dataclasses
import functools
import json
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from diffit_jax.errors import UserError
from diffit_jax.evaluation import neighbours
from diffit_jax.evaluation.features import BATCH_PER_DEVICE, Extractor
from diffit_jax.evaluation.measuring import Begun, Measured, measure, protocol_of
from diffit_jax.evaluation.pictures import Pictures
from diffit_jax.evaluation.reference import Reference
from diffit_jax.evaluation.scores import frechet_distance, kernel_distance
from diffit_jax.runtime import distributed, hub

# Metrics that need the features of single pictures, of both sides.
_OF_PICTURES = frozenset(("precision", "recall", "kid"))


@dataclasses.dataclass(frozen=True)
class Comparison:
    """With what samples are compared, and how.

    Attributes:
      reference: npz file of statistics, see `evaluation.reference`; `hf://` too.
      inception: weights of the FID network, see `interop.inception`.
      metrics: names in `METRICS`; None: all but KID that the reference has what it takes for.
      resize: how pictures come to 299 pixels, a name in `inception.RULES`: ADM's, or pytorch-fid's.
      batch_per_device: pictures of which a device extracts the features at once.
    """

    reference: epath.PathLike
    inception: epath.PathLike
    metrics: Sequence[str] | None = None
    resize: str = "tf1"
    batch_per_device: int = BATCH_PER_DEVICE


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """A reference and what is measured against it: the verb `evaluate`, a sweep and a run that is
    being trained have the same one.

    Attributes:
      extractor: from pictures to features.
      reference: what samples are compared with.
      metrics: names in `reference.METRICS`, see `Reference.chosen`.
    """

    extractor: Extractor
    reference: Reference
    metrics: Sequence[str]

    @classmethod
    def open(
        cls, comparison: Comparison, shape: tuple[int, ...], mesh: jax.sharding.Mesh
    ) -> "Evaluator":
        """Reads a reference and the FID network.

        Args:
          comparison: names them.
          shape: (H, W, C) of the pictures that are to be compared.
          mesh: devices to extract features on.

        Raises:
          UserError: a file that cannot be read, or a reference of another resolution or rule, or
            without what a metric needs.
        """
        extractor = Extractor.load(
            comparison.inception, mesh, comparison.resize, comparison.batch_per_device
        )
        reference = Reference.load(hub.local(comparison.reference, "reference"), extractor.sizes)
        reference.check(tuple(shape), comparison.resize)
        return cls(extractor, reference, reference.chosen(comparison.metrics))

    def run(
        self,
        pictures: Pictures,
        place: epath.Path,
        *,
        count: int | None = None,
        what: str = "evaluate",
        max_seconds: float = 0.0,
        keep: bool = False,
    ) -> dict[str, Any]:
        """Measures pictures and compares them. Interrupted, the same call goes on where it was.

        Args:
          pictures: what is measured.
          place: file that keeps what is measured if the call is interrupted; the caller removes it.
          count: how many of the first pictures; None: all.
          what: the pictures, for progress.
          max_seconds: measure no more after so long; 0: all of them.
          keep: whether what is measured is kept in any case.

        Returns:
          `metrics`: the scores by name; `count`: of pictures; `protocol`: what they depend on.

        Raises:
          UserError: fewer than two pictures.
          interruption.Preempted, interruption.Interrupted: what is measured is kept.
        """
        count = pictures.count if count is None else count
        check_count(count)
        protocol = protocol_of(pictures, self.extractor, count)
        begun = Begun(place, json.dumps([protocol, self.pooled], sort_keys=True))
        measured = measure(
            pictures,
            self.extractor,
            what,
            pooled=self.pooled,
            count=count,
            begun=begun,
            max_seconds=max_seconds,
        )
        if keep:
            distributed.on_primary(functools.partial(begun.save, measured))
        protocol |= {"reference": self.reference.facts(), "samples_digest": measured.digest.hex()}
        return {"metrics": self.scores(measured), "count": measured.count, "protocol": protocol}

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
        if self.pooled:
            scores |= self._of_pictures(self._reference_features, samples.features)
        names = [*self.metrics, *(["kid_std"] if "kid" in self.metrics else [])]
        return {name: scores[name] for name in names}

    @functools.cached_property
    def _reference_features(self) -> np.ndarray:
        """(m, d) of the reference's pictures, measured once."""
        assert self.reference.pictures is not None
        return measure(self.reference.pictures, self.extractor, "reference", pooled=True).features

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


def check_count(count: int) -> None:
    """Raises `UserError` if so few pictures cannot be measured."""
    if count < 2:
        raise UserError("one sample has no covariance: measure at least two")
