"""What samples are compared with: npz files of statistics, ADM's, EDM's or our own.

ADM's hold `mu`, `sigma`, `mu_s` and `sigma_s` of a whole data set, and `arr_0`, 10,000 pictures of
it for precision and recall; EDM's hold `mu` and `sigma`.
"""

import dataclasses
import hashlib
import logging
import zipfile
import zlib
from collections.abc import Mapping, Sequence

import numpy as np
from etils import epath

from diffit_jax.errors import UserError
from diffit_jax.evaluation.frechet import Statistics

log = logging.getLogger(__name__)

PICTURES = 10_000  # in a reference, for precision and recall
# Metric → the key of a reference that it needs; "" is none.
METRICS: Mapping[str, str] = {
    "fid": "mu",
    "sfid": "mu_s",
    "inception_score": "",
    "precision": "arr_0",
    "recall": "arr_0",
    "kid": "arr_0",
}
SIZES = {"mu": 2048, "mu_s": 2023}  # of features
_COVARIANCES = {"mu": "sigma", "mu_s": "sigma_s"}


@dataclasses.dataclass(frozen=True)
class Reference:
    """An opened reference.

    Attributes:
      path: of the file.
      sha256: of the file's content.
      statistics: of pooled features under "mu", of spatial ones under "mu_s", those that it has.
      pictures: (n, H, W, 3) uint8, or None.
    """

    path: epath.Path
    sha256: str
    statistics: Mapping[str, Statistics]
    pictures: np.ndarray | None

    @classmethod
    def load(cls, path: epath.Path, feature_sizes: Mapping[str, int] = SIZES) -> "Reference":
        """Reads a file.

        Args:
          path: of the npz.
          feature_sizes: that the network at hand gives.

        Raises:
          UserError: it cannot be read, or is no reference for such features.
        """
        try:
            digest = hashlib.sha256()
            with path.open("rb") as file:
                while part := file.read(2**22):
                    digest.update(part)
            with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                if not isinstance(arrays, np.lib.npyio.NpzFile):
                    raise ValueError("a single array")
                held = {name: arrays[name] for name in _known(arrays.files)}
        except OSError as error:
            raise UserError(
                f"--reference {path} cannot be read ({error.strerror or error}): name an npz file"
            ) from error
        except (ValueError, EOFError, zipfile.BadZipFile, zlib.error, AttributeError) as error:
            raise UserError(
                f"--reference {path} is not an npz file of statistics "
                f"({' '.join(str(error).split())[:100]}): fetch it again"
            ) from error
        statistics = {}
        for name, size in feature_sizes.items():
            if name not in held:
                continue
            mean, covariance = held[name], held.get(_COVARIANCES[name])
            if covariance is None or covariance.shape != (size, size) or mean.shape != (size,):
                shape = None if covariance is None else covariance.shape
                raise UserError(
                    f"--reference {path} has {name} {mean.shape} and {_COVARIANCES[name]} {shape}, "
                    f"not of the {size} features of this network: name one for it"
                )
            statistics[name] = mean.astype(np.float64), covariance.astype(np.float64)
        pictures = held.get("arr_0")
        if pictures is not None and (pictures.dtype != np.uint8 or pictures.ndim != 4):
            raise UserError(
                f"--reference {path} has arr_0 {pictures.shape} of {pictures.dtype}, which are no "
                "uint8 pictures (N, H, W, C): name another"
            )
        if not statistics and pictures is None:
            raise UserError(
                f"--reference {path} has none of mu, mu_s and arr_0: name a file of statistics, or "
                "make one by --make_reference"
            )
        return cls(path, digest.hexdigest(), statistics, pictures)

    def chosen(self, asked: Sequence[str] | None) -> list[str]:
        """The metrics to compute: those asked for, or (None) all for which it has what they need.

        Raises:
          UserError: one that is unknown, or needs what is not there.
        """
        for name in asked or ():
            if name not in METRICS:
                raise UserError(f"--metrics has {name!r}: use {', '.join(METRICS)}")
            if not self._serves(name):
                raise UserError(
                    f"--reference {self.path} has no {METRICS[name]}, which {name} needs: leave "
                    f"{name} out of --metrics, or use a reference that has it"
                )
        if asked:
            return list(dict.fromkeys(asked))
        usual = [name for name in METRICS if name != "kid" and self._serves(name)]
        lacking = [name for name in METRICS if not self._serves(name)]
        if lacking:
            log.info("without %s, for which %s has nothing", ", ".join(lacking), self.path.name)
        return usual

    def _serves(self, metric: str) -> bool:
        key = METRICS[metric]
        # Where there are only pictures, their statistics are taken, as ADM's code does.
        return (
            not key
            or key in self.statistics
            or (self.pictures is not None and (key == "arr_0" or not self.statistics))
        )

    def check_pictures(self, shape: tuple[int, ...]) -> None:
        """Raises `UserError` if its pictures have another size than the samples, (H, W, C)."""
        if self.pictures is not None and self.pictures.shape[1:3] != shape[:2]:
            height, width = self.pictures.shape[1:3]
            raise UserError(
                f"--reference {self.path} is of {height} × {width} pixels, the samples have "
                f"{shape[0]} × {shape[1]}: name a reference of that resolution"
            )


def _known(names: Sequence[str]) -> list[str]:
    wanted = {*_COVARIANCES, *_COVARIANCES.values(), "arr_0"}
    return [name for name in names if name in wanted]
