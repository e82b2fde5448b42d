"""The verb `score`: from a file of samples of a small data set to scores that need no network."""

import hashlib
import io
import logging
import zipfile
import zlib
from typing import Any

import numpy as np
from etils import epath

from diffit_jax.data.sources import open_dataset
from diffit_jax.errors import UserError, one_line
from diffit_jax.evaluation.small import score_images
from diffit_jax.runtime import files
from diffit_jax.sampling.sample import read_record

log = logging.getLogger(__name__)


def score(
    samples: epath.PathLike,
    dataset: str,
    data_dir: str = "",
    output: epath.PathLike | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Scores an npz file of samples and writes the scores as JSON.

    Args:
      samples: file with `arr_0` (n, H, W, C) uint8 images and `arr_1` (n,) labels, as `sample`
        writes it.
      dataset: name of the data set that the samples imitate.
      data_dir: where prepared data sets live, see `open_dataset`.
      output: path of the JSON; None: `<name of the samples>.metrics.json` beside them.
      overwrite: whether the scores of other samples may be replaced.

    Returns:
      The scores, see `score_images`, with `samples`: which file they are of, `samples_sha256`: of
      its images, and, if `sample` has left a record beside it, `request`: what was asked for, and
      `matmul_precision`: with which they were drawn.

    Raises:
      UserError: a file that is not an npz of samples, an unknown data set, an output that cannot be
        written or holds other scores.
    """
    samples = files.resolve(samples, "samples")
    output = (
        samples.with_name(f"{samples.stem}.metrics.json")
        if output is None
        else files.resolve(output, "output")
    )
    images, labels = read_samples(samples)
    digest = hashlib.sha256(np.ascontiguousarray(images).data).hexdigest()
    _refuse_other_scores(output, digest, overwrite)
    train, test = (open_dataset(dataset, split, data_dir) for split in ("train", "test"))
    if images.shape[1:] != train.image_shape:
        raise UserError(
            f"--samples {samples} has images of {images.shape[1:]}, data set {dataset} of "
            f"{train.image_shape}: name the data set that they imitate"
        )
    if labels.max() >= train.num_classes:
        raise UserError(
            f"--samples {samples} has the label {labels.max()}, but data set {dataset} has the "
            f"classes 0-{train.num_classes - 1}: name the data set that they imitate"
        )
    scores = score_images(images, labels, train, test) | {
        "samples": str(samples),
        "samples_sha256": digest,
        "dataset": dataset,
    }
    record = read_record(samples)
    if record is not None and record.get("arr_0_sha256") == digest:
        scores |= {name: record.get(name) for name in ("request", "matmul_precision")}
    files.write_json(output, scores)
    log.info("wrote %s", output)
    return scores


def read_samples(path: epath.Path) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, H, W, C) uint8 and labels (n,) int64 of a file as ADM's evaluator reads it.

    Raises:
      UserError: says what was found there and what is wanted.
    """
    try:
        images, labels = _arrays_in(path)
        _check_images(images)
        _check_labels(labels, len(images))
    except _Unusable as error:
        raise UserError(
            f"--samples {path} {error}: wanted is an npz file as launch/sample.py writes it, arr_0 "
            "(N, H, W, C) uint8 images and arr_1 (N,) labels"
        ) from error.__cause__
    return images, labels.astype(np.int64)


class _Unusable(Exception):
    """What was found in place of samples."""


def _arrays_in(path: epath.Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        content = path.read_bytes()
        loaded = np.load(io.BytesIO(content), allow_pickle=False)
    except OSError as error:
        raise _Unusable(f"cannot be read ({error.strerror or error})") from error
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise _Unusable(f"is not an npz file ({one_line(error, 100)})") from error
    if isinstance(loaded, np.ndarray):
        raise _Unusable(f"is a single array {loaded.shape} of {loaded.dtype}, without labels")
    with loaded:
        names = list(loaded)
        if not {"arr_0", "arr_1"} <= set(names):
            found = ", ".join(names) or "none"
            raise _Unusable(f"has the arrays {found}, which are not arr_0 and arr_1")
        try:
            return loaded["arr_0"], loaded["arr_1"]
        except (ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
            text = f"has arrays that cannot be read ({one_line(error, 100)})"
            raise _Unusable(text) from error


def _check_images(images: np.ndarray) -> None:
    if images.dtype != np.uint8:
        numbers = images.size and images.dtype.kind in "fiub"
        span = f" from {images.min():.3g} to {images.max():.3g}" if numbers else ""
        latents = images.ndim == 4 and images.shape[-1] == 4
        kind = " (latents of an autoencoder are to be decoded first)" if latents else ""
        raise _Unusable(f"has arr_0 of {images.dtype}{span}, not of uint8 from 0 to 255{kind}")
    if images.ndim != 4 or 0 in images.shape:
        raise _Unusable(f"has arr_0 of shape {images.shape}, which is not (N, H, W, C)")
    if images.shape[1] in (1, 3) and images.shape[3] not in (1, 3):
        raise _Unusable(f"has arr_0 of shape {images.shape}, which has the channels first")


def _check_labels(labels: np.ndarray, count: int) -> None:
    if labels.dtype.kind not in "iu":
        raise _Unusable(f"has labels arr_1 of {labels.dtype}, not whole numbers")
    if labels.ndim == 2 and labels.shape[0] == count and labels.shape[1] > 1:
        text = f"has labels arr_1 of shape {labels.shape}, one-hot perhaps, not numbers (N,)"
        raise _Unusable(text)
    if labels.shape != (count,):
        raise _Unusable(f"has {count} images, but labels arr_1 of shape {labels.shape}")
    if labels.min() < 0:
        raise _Unusable(f"has the label {labels.min()}, below 0")
    if labels.max() > np.iinfo(np.int64).max:
        raise _Unusable(f"has the label {labels.max()}")


def _refuse_other_scores(output: epath.Path, digest: str, overwrite: bool) -> None:
    found = files.Artifact(
        output, {"digest": digest}, of=lambda scores: {"digest": scores.get("samples_sha256")}
    ).look()
    if found.state == "other" and not overwrite:
        of = found.content.get("samples")
        what = f"holds the scores of {of}, which had other images" if of else "is of unknown origin"
        raise UserError(
            f"{output} is there already and {what}: name another --output, or say --overwrite"
        )
