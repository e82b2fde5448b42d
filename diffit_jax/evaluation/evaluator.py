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
from diffit_jax.evaluation.features import BATCH_PER_DEVICE, Extractor, Networks
from diffit_jax.evaluation.images import Images, labels_of
from diffit_jax.evaluation.measuring import (
    MEASURES_SINCE,
    Measured,
    PartialResult,
    measure,
    protocol_of,
)
from diffit_jax.evaluation.reference import METRICS, Reference, space_of
from diffit_jax.evaluation.scores import (
    distance_at_infinity,
    frechet_distance,
    gaussian_distance,
    kernel_distance,
    sliced_distance,
)
from diffit_jax.runtime import distributed, hub

# Metrics that need the features of single samples; all but the last, of both sides.
_OF_IMAGES = frozenset(("precision", "recall", "kid"))
_MANIFOLDS = tuple(f"{name}_dinov2" for name in neighbours.Manifolds._fields)
_OF_DINOV2 = frozenset(
    name
    for name, metric in METRICS.items()
    if space_of(name) == "dinov2" and metric.needs == "arr_0"
)
_INFINITY = "fd_infinity_dinov2"
WITH_DEVIATION = ("kid", "kd_dinov2")  # whose standard deviation is told too, as NAME_std


@dataclasses.dataclass(frozen=True)
class Comparison:
    """With what samples are compared, and how.

    Attributes:
      reference: npz file of statistics, see `evaluation.reference`; `hf://` too.
      inception: weights of the FID network, see `interop.inception`; "": no metrics of it.
      metrics: names in `METRICS`; None: those that the reference has what it takes for, but
        those on demand.
      resize: how images come to 299 pixels, a name in `inception.RULES`: ADM's, or pytorch-fid's.
      dinov2: weights of DINOv2, see `interop.dinov2`; "": no metrics of it.
      dinov2_resize: how images come to it, a name in `resizing.DISTANCE_RULES`.
      batch_per_device: images of which a device extracts the features at once.
      by_class: whether samples are compared class by class too, see `classes.by_class`.
    """

    reference: epath.PathLike
    inception: epath.PathLike = ""
    metrics: Sequence[str] | None = None
    resize: str = "tf1"
    batch_per_device: int = BATCH_PER_DEVICE
    by_class: bool = False
    dinov2: epath.PathLike = ""
    dinov2_resize: str = "dgm_eval"

    @property
    def networks(self) -> Networks:
        """The networks that make features."""
        return Networks(self.inception, self.resize, self.dinov2, self.dinov2_resize)


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """A reference, the networks of features, and the metrics between samples and the reference.

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
        """Read a reference and the networks of features.

        Args:
          comparison: names them.
          shape: (H, W, C) of the images that are to be compared.
          mesh: devices to extract features on.

        Raises:
          UserError: a file that cannot be read, or a reference of another resolution or rule, or
            without the statistics, or labels, that a metric needs.
        """
        if comparison.by_class and not comparison.inception:
            raise UserError("by class, images are compared by Inception: name --inception")
        extractor = Extractor.load(comparison.networks, mesh, comparison.batch_per_device)
        reference = Reference.load(hub.local(comparison.reference, "reference"), extractor.sizes)
        reference.check(tuple(shape), extractor.metadata())
        if comparison.by_class:
            reference.labels()
        chosen = reference.chosen(comparison.metrics, extractor.spaces)
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
            reference = self._reference_features["inception"], self.reference.labels()
            ours = measured.features(), labels[: measured.count]
            found["by_class"] = by_class(*reference, *ours)
        return found

    @property
    def pooled(self) -> list[str]:
        """The networks whose features of single samples `measure` is to keep."""
        asked = set(self.metrics)
        needed = {
            "inception": self.by_class or bool(_OF_IMAGES & asked),
            "dinov2": bool((_OF_DINOV2 | {_INFINITY}) & asked),
        }
        return [name for name, kept in needed.items() if kept]

    def scores(self, samples: Measured) -> dict[str, float]:
        """Return the metrics by name, in the order of `metrics`, and `kid_std` behind `kid`."""
        scores: dict[str, float] = {}
        of_moments = {
            "fid": (samples.pool, "mu"),
            "sfid": (samples.spatial, "mu_s"),
            "fd_dinov2": (samples.dinov2, "mu_dinov2"),
        }
        for name, (ours, key) in of_moments.items():
            if name in self.metrics:
                theirs = self.reference.statistics[key]
                scores[name] = frechet_distance(ours.statistics(), theirs)
        if "inception_score" in self.metrics:
            scores["inception_score"] = samples.inception_score.score()
        if _OF_IMAGES & set(self.metrics):
            scores |= self._of_images(self._reference_features["inception"], samples.features())
        if _OF_DINOV2 & set(self.metrics):
            ours = samples.features("dinov2")
            scores |= self._of_dinov2(self._reference_features["dinov2"], ours)
        if _INFINITY in self.metrics:
            theirs = self.reference.statistics["mu_dinov2"]
            scores[_INFINITY] = distance_at_infinity(samples.features("dinov2"), theirs)
        names = [*self.metrics, *(f"{n}_std" for n in WITH_DEVIATION if n in self.metrics)]
        bad = [name for name in names if not math.isfinite(scores[name])]
        if bad:
            raise UserError(
                f"{', '.join(bad)} came out as {scores[bad[0]]}, which is no result: look at the "
                "samples, the reference and the networks' weights"
            )
        return {name: scores[name] for name in names}

    @functools.cached_property
    def _reference_features(self) -> dict[str, np.ndarray]:
        """(m, d) of the reference's images by network, measured once."""
        assert self.reference.images is not None
        names = [name for name in self.pooled if name != "dinov2" or _OF_DINOV2 & set(self.metrics)]
        found = measure(self.reference.images, self.extractor, "reference", pooled=names)
        return {name: found.features(name) for name in names}

    def _of_dinov2(self, reference: np.ndarray, samples: np.ndarray) -> dict[str, float]:
        """Return the metrics of DINOv2's features of single images, (m, d) and (n, d)."""
        scores: dict[str, float] = {}
        theirs, ours = (_some(each, neighbours.MOST_POINTS) for each in (reference, samples))
        if {*_MANIFOLDS, "f_score_dinov2"} & set(self.metrics):
            found = neighbours.manifolds(theirs, ours)
            scores |= dict(zip(_MANIFOLDS, found, strict=True))
            scores["f_score_dinov2"] = found.f_score
        if "realism_dinov2" in self.metrics:
            scores["realism_dinov2"] = float(np.median(neighbours.realism(theirs, ours)))
        if "kd_dinov2" in self.metrics:
            pair = kernel_distance(samples, reference)
            scores |= dict(zip(("kd_dinov2", "kd_dinov2_std"), pair, strict=True))
        if "mind_dinov2" in self.metrics:
            scores["mind_dinov2"] = sliced_distance(samples, reference)
        if "mmd_dinov2" in self.metrics:
            scores["mmd_dinov2"] = gaussian_distance(samples, reference)
        return scores

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


def _some(features: np.ndarray, most: int) -> np.ndarray:
    """Return at most so many of (n, d) features, drawn without replacement, always the same."""
    if len(features) <= most:
        return features
    chosen = np.random.default_rng(0).choice(len(features), most, replace=False)
    return features[np.sort(chosen)]


def check_count(count: int) -> None:
    """Raise `UserError` if so few images cannot be measured."""
    if count < 2:
        raise UserError("one sample has no covariance: measure at least two")
