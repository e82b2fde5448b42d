"""Samples as people look at them: a file for each, and the columns of a grid."""

import logging
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from etils import epath

from diffit_jax.data import pixels
from diffit_jax.data.labels import period
from diffit_jax.errors import UserError
from diffit_jax.runtime import files, npz
from diffit_jax.runtime.console import Progress

log = logging.getLogger(__name__)

COLUMNS = 10  # of a grid, at most


def read_record(samples: epath.Path) -> dict[str, Any] | None:
    """Return the record of a file of samples; None if there is none."""
    record = files.read_json(samples.with_suffix(".json"))
    return record if record is not None and isinstance(record.get("request"), dict) else None


def grid_columns(
    labels: np.ndarray, class_name: Callable[[int], str] | None
) -> tuple[int, list[str]]:
    """Return the columns of an image of samples, and their names.

    A column for each class where (n,) labels repeat after ten or fewer samples.
    """
    repeat = period(labels)
    if class_name is None or repeat < 2:
        return COLUMNS, []
    return repeat, [class_name(label) for label in labels[:repeat].tolist()]


_IMAGES = {"png": {}, "jpeg": {"quality": 95, "subsampling": 0}, "webp": {"quality": 95}}


def write_images(
    samples: epath.Path,
    labels: np.ndarray | None,
    numbers: Sequence[int],
    class_name: Callable[[int], str],
    kind: str,
) -> epath.Path:
    """Write each image of an npz file as a file of its own, and return their folder.

    `samples_8x64x64x3.npz` gives `samples_8x64x64x3/CLASS/0000007.png`. What is in the folder of
    other samples is replaced; a folder that is not of samples is left alone.

    Args:
      samples: the npz file, whose `arr_0` is (N, H, W, C) uint8.
      labels: (N,) ints; None: there are no classes, and no folders of them.
      numbers: N numbers that the files are called by: the seeds.
      class_name: the name of a label.
      kind: "png", "jpeg" or "webp".

    Raises:
      UserError: the folder is there and not of samples, or cannot be written.
    """
    folder, mark = samples.with_suffix(""), samples.with_suffix("") / "samples.json"
    record = read_record(samples) or {}
    identity = {"arr_0_sha256": record.get("arr_0_sha256"), "kind": kind}
    if folder.exists():
        held = files.read_json(mark)
        if held is None and any(folder.iterdir()):
            raise UserError(f"{folder} is there and holds no samples: move it away")
        if held != identity:
            folder.rmtree()
    files.make_directory(folder, "folder of images")
    files.write_json(mark, identity)
    suffix = "jpg" if kind == "jpeg" else kind
    row = 0
    with (
        npz.reading(samples, "arr_0") as stream,
        Progress("write images", stream.shape[0], unit="image") as progress,
    ):
        for part in stream.parts(64):
            for image in part:
                where = folder
                if labels is not None:
                    where = folder / _as_file_name(class_name(int(labels[row])))
                path = where / f"{numbers[row]:07d}.{suffix}"
                if not path.exists():
                    where.mkdir(parents=True, exist_ok=True)
                    picture = pixels.as_picture(image)
                    pixels.write_picture(path, picture, kind, **_IMAGES[kind])
                row += 1
                progress.advance()
    log.info("wrote %d images to %s", row, folder)
    return folder


def _as_file_name(name: str) -> str:
    """Return a name without what a file's may not have."""
    return re.sub(r'[\\/:*?"<>|\x00-\x1f]+', "_", name).strip(" .") or "_"
