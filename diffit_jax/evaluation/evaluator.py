"""The scores of ADM's suite."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from diffit_jax.errors import UserError
from diffit_jax.evaluation import neighbours
from diffit_jax.evaluation.classes import by_class
from diffit_jax.evaluation.features import BATCH_PER_DEVICE, Extractor
from diffit_jax.evaluation.images import Images, labels_of
from diffit_jax.evaluation.measuring import (
    MEASURES_SINCE,
    Measured,
    PartialResult,
    measure,
    protocol_of,
)
from diffit_jax.evaluation.reference import Reference
from diffit_jax.evaluation.scores import frechet_distance, kernel_distance
from diffit_jax.runtime import distributed, hub

# Metrics that need the features of single images, of both sides.
_OF_IMAGES = frozenset(("precision", "recall", "kid"))


@dataclasses.dataclass(frozen=True)
class Comparison:
    """With what samples are compared, and how.

    Attributes:
      reference: npz file of statistics, see `evaluation.reference`; `hf://` too.
      inception: weights of the FID network, see `interop.inception`.
      metrics: names in `METRICS`; None: all but KID that the reference has what it takes for.
      resize: how images come to 299 pixels, a name in `inception.RULES`: ADM's, or pytorch-fid's.
      batch_per_device: images of which a device extracts the features at once.
      by_class: whether samples are compared class by class too, see `classes.by_class`.
    """

    reference: epath.PathLike
    inception: epath.PathLike
    metrics: Sequence[str] | None = None
    resize: str = "tf1"
    batch_per_device: int = BATCH_PER_DEVICE
    by_class: bool = False


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """A reference, the FID network, and the metrics between samples and the reference.

    The verb `evaluate`, a sweep and a run that is being trained use the same one.

    Attributes:
      extractor: from images to features.
      reference: what samples are compared with.
      metrics: names in `reference.METRICS`, see `Reference.chosen`.
      by_class: whether samples are compared class by class too.
    """

    extractor: Extractor
    reference: Reference
    metrics: Sequence[str]
    by_class: bool = False

    @classmethod
    def open(
        cls, comparison: Comparison, shape: tuple[int, ...], mesh: jax.sharding.Mesh
    ) -> "Evaluator":
        """Read a reference and the FID network.

        Args:
          comparison: names them.
          shape: (H, W, C) of the images that are to be compared.
          mesh: devices to extract features on.

        Raises:
          UserError: a file that cannot be read, or a reference of another resolution or rule, or
            without the statistics, or labels, that a metric needs.
        """
        extractor = Extractor.load(
            comparison.inception, mesh, comparison.resize, comparison.batch_per_device
        )
        reference = Reference.load(hub.local(comparison.reference, "reference"), extractor.sizes)
        reference.check(tuple(shape), comparison.resize)
        if comparison.by_class:
            reference.labels()
        chosen = reference.chosen(comparison.metrics)
        return cls(extractor, reference, chosen, comparison.by_class)

    def run(
        self,
        images: Images,
        place: epath.Path,
        *,
        count: int | None = None,
        what: str = "evaluate",
        max_seconds: float = 0.0,
        keep: bool = False,
    ) -> dict[str, Any]:
        """Measure images and compare them with the reference; interrupted, the same call resumes.

        Args:
          images: what is measured.
          place: file that keeps what is measured if the call is interrupted; the caller removes it.
          count: how many of the first images; None: all.
          what: the images, for progress.
          max_seconds: measure no more after so long; 0: all of them.
          keep: whether what is measured is kept in any case.

        Returns:
          `metrics`: the scores by name; `count`: of images; `protocol`: what they depend on;
          `by_class`, if that is asked for.

        Raises:
          UserError: fewer than two images; by class, images without labels, or too few of a class.
          interruption.Preempted, interruption.Interrupted: what is measured is kept.
        """
        count = images.count if count is None else count
        check_count(count)
        labels = labels_of(images)[:count] if self.by_class else None
        protocol = protocol_of(images, self.extractor, count)
        # Of earlier versions that measured alike the measured part is taken.
        alike = protocol | {"versions": {**protocol["versions"], "diffit_jax": MEASURES_SINCE}}
        partial = PartialResult.of(place, images, alike, self.pooled)
        measured = measure(
            images,
            self.extractor,
            what,
            pooled=self.pooled,
            count=count,
            partial=partial,
            max_seconds=max_seconds,
        )
        if keep:
            distributed.on_primary(functools.partial(partial.save, measured))
        protocol |= {
            "reference": self.reference.metadata(),
            "samples_digest": measured.digest.hex(),
        }
        found = {"metrics": self.scores(measured), "count": measured.count, "protocol": protocol}
        if labels is not None:
            reference = self._reference_features, self.reference.labels()
            ours = measured.features, labels[: measured.count]
            found["by_class"] = by_class(*reference, *ours)
        return found

    @property
    def pooled(self) -> bool:
        """Whether `measure` is to keep the features of single samples."""
        return self.by_class or bool(_OF_IMAGES & set(self.metrics))

    def scores(self, samples: Measured) -> dict[str, float]:
        """Return the metrics by name, in the order of `metrics`, and `kid_std` behind `kid`."""
        scores: dict[str, float] = {}
        for name, ours, key in (("fid", samples.pool, "mu"), ("sfid", samples.spatial, "mu_s")):
            if name in self.metrics:
                theirs = self.reference.statistics[key]
                scores[name] = frechet_distance(ours.statistics(), theirs)
        if "inception_score" in self.metrics:
            scores["inception_score"] = samples.inception_score.score()
        if _OF_IMAGES & set(self.metrics):
            scores |= self._of_images(self._reference_features, samples.features)
        names = [*self.metrics, *(["kid_std"] if "kid" in self.metrics else [])]
        bad = [name for name in names if not math.isfinite(scores[name])]
        if bad:
            raise UserError(
                f"{', '.join(bad)} came out as {scores[bad[0]]}, which is no result: look at the "
                "samples, the reference and the weights of the FID network"
            )
        return {name: scores[name] for name in names}

    @functools.cached_property
    def _reference_features(self) -> np.ndarray:
        """(m, d) of the reference's images, measured once."""
        assert self.reference.images is not None
        return measure(self.reference.images, self.extractor, "reference", pooled=True).features

    def _of_images(self, reference: np.ndarray, samples: np.ndarray) -> dict[str, float]:
        """Return the metrics of features of single images, (m, d) and (n, d)."""
        scores: dict[str, float] = {}
        if {"precision", "recall"} & set(self.metrics):
            probabilities = neighbours.precision_and_recall(reference, samples)
            scores |= dict(zip(("precision", "recall"), probabilities, strict=True))
        if "kid" in self.metrics:
            pair = kernel_distance(samples, reference)
            scores |= dict(zip(("kid", "kid_std"), pair, strict=True))
        return scores


def check_count(count: int) -> None:
    """Raise `UserError` if so few images cannot be measured."""
    if count < 2:
        raise UserError("one sample has no covariance: measure at least two")
