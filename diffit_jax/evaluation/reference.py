"""What samples are compared with: npz files of statistics, ADM's, EDM's or our own.

ADM's hold `mu`, `sigma`, `mu_s` and `sigma_s` of a whole data set, and `arr_0`, 10,000 images of
it for precision and recall; EDM's hold `mu` and `sigma`; ours are like ADM's, with `protocol`, a
JSON text that says how they were made.
"""

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from diffit_jax.errors import UserError
from diffit_jax.evaluation.images import NpzImages
from diffit_jax.evaluation.scores import Statistics
from diffit_jax.interop import edm_pickle
from diffit_jax.runtime import files, npz

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Metric:
    """What a metric is called, and what it takes.

    Attributes:
      title: in tables.
      needs: the key of a reference; "": none.
      on_demand: whether it is computed only where it is asked for.
      more_is_better: whether the best of several samples has the highest value.
    """

    title: str
    needs: str
    on_demand: bool = False
    more_is_better: bool = False


METRICS: Mapping[str, Metric] = {
    "fid": Metric("FID", "mu"),
    "sfid": Metric("sFID", "mu_s"),
    "inception_score": Metric("Inception Score", "", more_is_better=True),
    "precision": Metric("precision", "arr_0", more_is_better=True),
    "recall": Metric("recall", "arr_0", more_is_better=True),
    "kid": Metric("KID", "arr_0", on_demand=True),
    "fd_dinov2": Metric("FD-DINOv2", "mu_dinov2"),
    "precision_dinov2": Metric("precision (DINOv2)", "arr_0", more_is_better=True),
    "recall_dinov2": Metric("recall (DINOv2)", "arr_0", more_is_better=True),
    "density_dinov2": Metric("density (DINOv2)", "arr_0", more_is_better=True),
    "coverage_dinov2": Metric("coverage (DINOv2)", "arr_0", more_is_better=True),
    "kd_dinov2": Metric("KD (DINOv2)", "arr_0", on_demand=True),
    "mind_dinov2": Metric("MIND (DINOv2)", "arr_0", on_demand=True),
    "mmd_dinov2": Metric("MMD (DINOv2)", "arr_0", on_demand=True),
    "f_score_dinov2": Metric("F-score (DINOv2)", "arr_0", on_demand=True, more_is_better=True),
    "realism_dinov2": Metric("realism (DINOv2)", "arr_0", on_demand=True, more_is_better=True),
    "fd_infinity_dinov2": Metric("FD∞ (DINOv2)", "mu_dinov2", on_demand=True),
}
SIZES: Mapping[str, int] = {"mu": 2048, "mu_s": 2023, "mu_dinov2": 1024}  # of features
COVARIANCES: Mapping[str, str] = {"mu": "sigma", "mu_s": "sigma_s", "mu_dinov2": "sigma_dinov2"}


def space_of(metric: str) -> str:
    """Return the network in whose features a metric is: "inception" or "dinov2"."""
    return "dinov2" if metric.endswith("_dinov2") else "inception"


@dataclasses.dataclass(frozen=True)
class Reference:
    """An opened reference.

    Attributes:
      path: of the file.
      sha256: of the file's content.
      statistics: of pooled features under "mu", of spatial ones under "mu_s", of DINOv2's class
        token under "mu_dinov2", those that it has.
      images: of the data set, or None.
      protocol: how it was made, JSON values by name; empty for those of others.
    """

    path: epath.Path
    sha256: str
    statistics: Mapping[str, Statistics]
    images: NpzImages | None
    protocol: Mapping[str, Any]

    @classmethod
    def load(cls, path: epath.Path, feature_sizes: Mapping[str, int] = SIZES) -> "Reference":
        """Read a file.

        Args:
          path: of the npz, or of a pickle of EDM2's, which is not run.
          feature_sizes: of the networks at hand, for `mu`, `mu_s` and `mu_dinov2`.

        Raises:
          UserError: it cannot be read, or is no reference for such features.
        """
        if path.suffix == ".pkl":
            return cls._of_edm2(path, feature_sizes)
        try:
            digest = files.sha256(path)
            wanted = (*COVARIANCES, *COVARIANCES.values(), "protocol")
            there = npz.names(path)
            held = {name: npz.read(path, name) for name in wanted if name in there}
            with_images = "arr_0" in there
        except OSError as error:
            raise UserError(
                f"--reference {path} cannot be read ({error.strerror or error}): name an npz file"
            ) from error
        except npz.DAMAGED as error:
            raise UserError(
                f"--reference {path} is not an npz file of statistics "
                f"({' '.join(str(error).split())[:100]}): fetch it again"
            ) from error
        if not with_images and not set(held) & set(COVARIANCES):
            raise UserError(
                f"--reference {path} has none of mu, mu_s and arr_0: name a file of statistics, or "
                "make one by diffit make_reference"
            )
        statistics = _all_statistics(path, held, feature_sizes)
        images = NpzImages(path, "reference") if with_images else None
        return cls(path, digest, statistics, images, _protocol(path, held))

    @classmethod
    def _of_edm2(cls, path: epath.Path, feature_sizes: Mapping[str, int]) -> "Reference":
        """Read a pickle of EDM2's; the rule is its default one."""
        try:
            digest, held = files.sha256(path), edm_pickle.read_statistics(path)
        except OSError as error:
            raise UserError(
                f"--reference {path} cannot be read ({error.strerror or error}): name a file"
            ) from error
        said = {"dinov2": {"resize": "edm2"}, "made_by": "EDM2's calculate_metrics"}
        return cls(path, digest, _all_statistics(path, held, feature_sizes), None, said)

    def chosen(
        self, asked: Sequence[str] | None, spaces: Sequence[str] = ("inception",)
    ) -> list[str]:
        """Return the metrics to compute: those asked for, or (None) those that it serves.

        The latter without those on demand.

        Args:
          asked: names in `METRICS`.
          spaces: networks that are there.

        Raises:
          UserError: one that is unknown, or needs statistics that it does not have, or another
            network.
        """
        for name in asked or ():
            if name not in METRICS:
                raise UserError(f"--metrics has {name!r}: use {', '.join(METRICS)}")
            if space_of(name) not in spaces:
                raise UserError(
                    f"--metrics has {name}, which is in the features of {space_of(name)}: name its "
                    f"weights by --{space_of(name)}, or leave {name} out"
                )
            if not self._serves(name):
                raise UserError(
                    f"--reference {self.path} has no {METRICS[name].needs}, which {name} needs"
                    f"{self._on_images(name)}: leave {name} out of --metrics, or use a reference "
                    "that has it"
                )
        if asked:
            return list(dict.fromkeys(asked))
        possible = [
            name
            for name, metric in METRICS.items()
            if space_of(name) in spaces and not metric.on_demand
        ]
        for name in possible:
            if not self._serves(name):
                needed = f"no {METRICS[name].needs}{self._on_images(name)}"
                log.info("without %s: %s has %s", name, self.path.name, needed)
        found = [name for name in possible if self._serves(name)]
        if not found:
            raise UserError(
                f"--reference {self.path} has nothing to compare in the features of "
                f"{' and '.join(spaces)}: name one that was made with them (diffit make_reference)"
            )
        return found

    def labels(self) -> np.ndarray:
        """Return the labels of its images, (m,) int64.

        Raises:
          UserError: it has no images, or none of their labels.
        """
        if self.images is None or not self.images.has("arr_1"):
            raise UserError(
                f"--reference {self.path} has no labels of its images (arr_1): by class, name one "
                "that diffit make_reference has made of a data set with labels"
            )
        return self.images.labels()

    def metadata(self) -> dict[str, Any]:
        """Return its entry in a protocol, JSON values by name."""
        return {
            "path": str(self.path),
            "sha256": self.sha256,
            "pictures": self.images.count if self.images else 0,
            "from": dict(self.protocol) or "not said in the file",
        }

    def _serves(self, metric: str) -> bool:
        key = METRICS[metric].needs
        return not key or key in self.statistics or (key == "arr_0" and self.images is not None)

    def _on_images(self, metric: str) -> str:
        """Hint for users who mistake the reference's images for the whole data set."""
        if self.images is None or METRICS[metric].needs == "arr_0":
            return ""
        return (
            f" (its {self.images.count} images are for precision and recall; statistics are of "
            "a whole data set, see diffit make_reference)"
        )

    def check(self, shape: tuple[int, ...], extracted: Mapping[str, Any]) -> None:
        """Raise `UserError` if it was made otherwise than the samples are measured.

        Args:
          shape: (H, W, C) of the samples.
          extracted: what their features depend on, see `Extractor.metadata`.
        """
        of = self.images.shape if self.images is not None else self.protocol.get("shape")
        if of is not None and tuple(of[:2]) != shape[:2]:
            raise UserError(
                f"--reference {self.path} is of {of[0]} × {of[1]} pixels, the samples have "
                f"{shape[0]} × {shape[1]}: name a reference of that resolution"
            )
        ours, theirs = (each.get("dinov2", {}) for each in (extracted, self.protocol))
        flags = {
            "resize": (self.protocol.get("resize"), extracted.get("resize")),
            "dinov2_resize": (theirs.get("resize"), ours.get("resize")),
        }
        for flag, (made, now) in flags.items():
            if None not in (made, now) and made != now:
                raise UserError(
                    f"--reference {self.path} was made with --{flag} {made}: use the same for the "
                    "samples"
                )
        made, now = theirs.get("weights"), ours.get("weights")
        if None not in (made, now) and made != now:
            raise UserError(
                f"--reference {self.path} was made with other weights of DINOv2 "
                f"({theirs.get('network')}): use the same for the samples"
            )


def _protocol(path: epath.Path, held: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return what a file says of how it was made; {} if nothing."""
    try:
        said = json.loads(str(held["protocol"])) if "protocol" in held else {}
    except ValueError:
        said = None
    if not isinstance(said, dict) or not isinstance(said.get("dinov2", {}), dict):
        raise UserError(f"--reference {path} has a protocol that is damaged: make it anew")
    return said


def _all_statistics(
    path: epath.Path, held: Mapping[str, np.ndarray], sizes: Mapping[str, int]
) -> dict[str, Statistics]:
    there = {name: size for name, size in sizes.items() if name in held}
    return {name: _statistics(path, held, name, size) for name, size in there.items()}


def _statistics(
    path: epath.Path, held: Mapping[str, np.ndarray], name: str, size: int
) -> Statistics:
    mean, covariance = held[name], held.get(COVARIANCES[name])
    if covariance is None or covariance.shape != (size, size) or mean.shape != (size,):
        shape = "none" if covariance is None else covariance.shape
        raise UserError(
            f"--reference {path} has {name} {mean.shape} and {COVARIANCES[name]} {shape}, not of "
            f"the {size} features of this network: name one for it"
        )
    for key, array in ((name, mean), (COVARIANCES[name], covariance)):
        bad = array.size - np.count_nonzero(np.isfinite(array))
        if bad:
            raise UserError(
                f"--reference {path} has {bad} numbers in {key} that are not finite: make it anew"
            )
    return mean.astype(np.float64), covariance.astype(np.float64)
