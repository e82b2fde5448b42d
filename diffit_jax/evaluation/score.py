"""The verb `score`: from a file of samples of a small data set to scores that need no network."""

import hashlib
import logging
from typing import Any

import numpy as np
from etils import epath

from diffit_jax.data.sources import open_dataset
from diffit_jax.errors import UserError
from diffit_jax.evaluation.images import NpzImages
from diffit_jax.evaluation.small import score_images
from diffit_jax.runtime import files
from diffit_jax.sampling.image_files import read_record

log = logging.getLogger(__name__)


def score(
    samples: epath.PathLike,
    *,
    dataset: str,
    data_dir: str = "",
    output: epath.PathLike | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Score an npz file of samples and write the scores as JSON.

    Args:
      samples: file with `arr_0` (n, H, W, C) uint8 images and `arr_1` (n,) labels, as `sample`
        writes it.
      dataset: name of the data set that the samples imitate.
      data_dir: where prepared data sets live, see `open_dataset`.
      output: path of the JSON; None: `<name of the samples>.metrics.json` next to them.
      overwrite: whether the scores of other samples may be replaced.

    Returns:
      The scores, see `score_images`, with `samples`: which file they are of, `samples_sha256`: of
      its images, and, if `sample` has left a record next to it, `request`: what was asked for, and
      `matmul_precision`: with which they were drawn; `evaluations` of networks for a sample.

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
    samples_file = NpzImages(samples, labelled=True)
    images, labels = np.concatenate(list(samples_file.batches(1_000))), samples_file.labels()
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
    # The record is of these samples only if their bytes are the same.
    record = read_record(samples)
    if record is not None and record.get("arr_0_sha256") == digest:
        names = "request", "matmul_precision", "evaluations"
        scores |= {name: record.get(name) for name in names}
    files.write_json(output, scores)
    log.info("wrote %s", output)
    return scores


def _refuse_other_scores(output: epath.Path, digest: str, overwrite: bool) -> None:
    found = files.Artifact(
        output, {"digest": digest}, of=lambda scores: {"digest": scores.get("samples_sha256")}
    ).inspect()
    if found.state == "other" and not overwrite:
        of = found.content.get("samples")
        what = f"holds the scores of {of}, which had other images" if of else "is of unknown origin"
        raise UserError(
            f"{output} is there already and {what}: name another --output, or say --overwrite"
        )
