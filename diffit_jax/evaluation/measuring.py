"""Streams images through the feature network and accumulates what the metrics need; resumable."""

import contextlib
import functools
import hashlib
import io
import json
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

import diffit_jax
from diffit_jax.evaluation.features import Extractor, Features
from diffit_jax.evaluation.images import Images
from diffit_jax.evaluation.scores import InceptionScore, Moments
from diffit_jax.runtime import distributed, files, npz
from diffit_jax.runtime.console import Progress

log = logging.getLogger(__name__)

SAVE_EVERY_S = 600
MEASURES_SINCE = "0.2.0"  # the first version whose measurements are those of this one
# What is kept of each network's features.
_KEPT = {"inception": ("pool", "spatial", "inception_score"), "dinov2": ("dinov2",)}


def protocol_of(images: Images, extractor: Extractor, count: int) -> dict[str, Any]:
    """Return all that the measurement of the first `count` images depends on, as JSON values."""
    return {
        **images.metadata,
        "count": count,
        "shape": list(images.shape),
        **extractor.metadata(),
        "versions": {"diffit_jax": diffit_jax.__version__, "jax": jax.__version__},
    }


class Measured:
    """What is kept of a set of images.

    Attributes:
      pool, spatial, dinov2: moments of the features.
      inception_score: of the images so far.
      digest: of the images so far: each one's bytes, hashed together with the digest before.
    """

    def __init__(self, pooled: bool | Sequence[str], spaces: Sequence[str] = ("inception",)):
        """Begin.

        Args:
          pooled: of which networks the features themselves are kept too (8 or 4 KB each): names,
            or True for Inception's.
          spaces: networks whose features come.
        """
        self.pool, self.spatial, self.dinov2 = Moments(), Moments(), Moments(exact=True)
        self.inception_score, self.digest = InceptionScore(), bytes(32)
        named = (("inception",) if pooled else ()) if isinstance(pooled, bool) else pooled
        self._single: dict[str, list[np.ndarray]] = {name: [] for name in named}
        self._kept = [name for space in spaces for name in _KEPT[space]]

    def add(self, images: np.ndarray, features: Features) -> None:
        """Add the next images (n, H, W, C) uint8 and their features."""
        self.digest = _chained(self.digest, images)
        if features.pool is not None:
            self.pool.add(features.pool)
            self.spatial.add(features.spatial)
            self.inception_score.add(features.logits)
        if features.dinov2 is not None:
            self.dinov2.add(features.dinov2)
        for space, of_images in self._single.items():
            found: Any = features.pool if space == "inception" else features.dinov2
            of_images.append(found)

    @property
    def count(self) -> int:
        """Of images so far."""
        return max(self.pool.count, self.dinov2.count)

    def features(self, space: str = "inception") -> np.ndarray:
        """Return single features of a network, (n, d) float32."""
        return np.concatenate(self._single[space])

    def state(self) -> dict[str, np.ndarray]:
        """Return arrays by name from which `restore` continues."""
        arrays = {
            f"{name}.{key}": value
            for name in self._kept
            for key, value in getattr(self, name).state().items()
        }
        arrays["digest"] = np.frombuffer(self.digest, np.uint8)
        return arrays | {_single_name(space): self.features(space) for space in self._single}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Continue from a `state`."""
        for name in self._kept:
            ours = {
                key.removeprefix(f"{name}."): value
                for key, value in state.items()
                if key.startswith(f"{name}.")
            }
            getattr(self, name).restore(ours)
        self.digest = state["digest"].tobytes()
        self._single = {space: [state[_single_name(space)]] for space in self._single}


def _single_name(space: str) -> str:
    """Return the name in a state of a network's single features; Inception's is older."""
    return "features" if space == "inception" else f"features.{space}"


def _chained(digest: bytes, images: np.ndarray) -> bytes:
    """Return the digest of images so far and the next ones, (n, H, W, C) uint8."""
    for image in images:
        digest = hashlib.sha256(digest + image.tobytes()).digest()
    return digest


class PartialResult:
    """The file that keeps what is measured so far, so that the same command goes on there.

    Attributes:
      path: of the file.
      identity: of what is measured and how, as text; that of another one is not taken.
      images: what is measured, or None.
    """

    def __init__(self, path: epath.Path, identity: str, images: Images | None = None):
        self.path, self.identity, self.images = path, identity, images

    @classmethod
    def of(
        cls,
        path: epath.Path,
        images: Images,
        protocol: Mapping[str, Any],
        pooled: bool | Sequence[str],
    ) -> "PartialResult":
        """Return the file of a measurement of these images, by a protocol, see `protocol_of`."""
        if not isinstance(pooled, bool) and set(pooled) <= {"inception"}:
            pooled = bool(pooled)  # as earlier versions have it
        identity = json.dumps([protocol, pooled, images.evidence], sort_keys=True)
        return cls(path, identity, images)

    def restore(self, measured: Measured) -> None:
        """Continue from the file, if every process sees it."""
        found = files.Artifact(
            self.path,
            {"identity": self.identity},
            of=lambda arrays: {"identity": str(arrays.get("identity"))},
            read=_arrays_in,
        ).inspect()
        state = {k: v for k, v in found.content.items() if k != "identity"}
        usable = found.state == "done" or self._are_the_same(found.content)
        if distributed.all_hosts(usable):
            measured.restore(state)

    def _are_the_same(self, content: Mapping[str, Any]) -> bool:
        """Whether other evidence, or none as of earlier versions, is of the same images after all.

        The images that were measured are read again, and their digest is compared.
        """
        with contextlib.suppress(ValueError, KeyError, TypeError):
            theirs, ours = json.loads(str(content["identity"])), json.loads(self.identity)
            if self.images is None or theirs[:2] != ours[:2]:
                return False
            if not ours[2]:  # the protocol says all
                return True
            spaces = [name for name in _KEPT if name in theirs[0]]
            kept, again = Measured(theirs[1], spaces), bytes(32)
            kept.restore({k: v for k, v in content.items() if k != "identity"})
            left = kept.count
            for batch in self.images.batches(64):
                again = _chained(again, batch[:left])
                left -= len(batch[:left])
                if not left:
                    return again == kept.digest
        return False

    def save(self, measured: Measured) -> None:
        """Write the file, on the first process."""
        content = io.BytesIO()
        arrays: dict[str, Any] = {"identity": np.array(self.identity), **measured.state()}
        np.savez(content, **arrays)
        files.write_bytes(self.path, content.getvalue())

    def done(self) -> None:
        """Remove the file."""
        self.path.unlink(missing_ok=True)


def _arrays_in(path: epath.Path) -> dict[str, np.ndarray] | None:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (OSError, *npz.DAMAGED):
        return None


def measure(
    images: Images,
    extractor: Extractor,
    what: str,
    *,
    pooled: bool | Sequence[str] = False,
    count: int | None = None,
    partial: PartialResult | None = None,
    max_seconds: float = 0.0,
) -> Measured:
    """Extract the features of images and accumulate what metrics need of them.

    Args:
      images: the same on every process.
      extractor: of features.
      what: the images, for progress.
      pooled: whether single features themselves are kept, see `Measured`.
      count: how many of the first images; None: all.
      partial: where to keep an interrupted measurement; None: it is lost.
      max_seconds: no more batches after so long; 0: never.

    Raises:
      interruption.Preempted, interruption.Interrupted: the measured part is kept.
    """
    measured, size = Measured(pooled, extractor.spaces), extractor.batch_size
    count, first = count or images.count, distributed.is_primary()
    if partial:
        partial.restore(measured)
    there, started, saved_at = measured.count, time.monotonic(), time.monotonic()
    progress = Progress(what, count, done=measured.count, unit="image", shown=first)
    notices = distributed.PreemptionNotice(ctrl_c=True)
    with progress, notices as notice, distributed.lost_processes():
        for batch in images.batches(size, measured.count):
            part = batch[: count - measured.count]
            measured.add(part, extractor(part))
            progress.advance(len(part))
            if measured.count == count:
                break
            if notice.reached():  # on all processes or none
                if partial:
                    distributed.on_primary(functools.partial(partial.save, measured))
                kept = f"{measured.count} of {count} images are measured and kept"
                raise notice.ending(kept if partial else "nothing is kept")
            # One image has no covariance, so that at least two are measured.
            late = time.monotonic() - started > max_seconds > 0
            if max_seconds and measured.count > 1 and distributed.broadcast_flag(late):
                log.warning(
                    "%s: %d of %d images were measured in the %.3g s that there are for it",
                    *(what, measured.count, count, max_seconds),
                )
                break
            if partial and first and time.monotonic() - saved_at > SAVE_EVERY_S:
                partial.save(measured)
                saved_at = time.monotonic()
    new, seconds = measured.count - there, max(time.monotonic() - started, 1e-9)
    log.info("%s: %d images measured, %.3g a second", what, new, new / seconds)
    return measured
