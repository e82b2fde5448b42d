"""Handwritten digits that scikit-learn ships: 1,797 scans of 8×8 pixels, ten classes, two splits.

UCI's optical recognition of handwritten digits, Alpaydin & Kaynak 1998. `read` has them prepared by
tensorflow-datasets where that imports, and takes the array otherwise; both come in one order.

    python -m diffit_jax.data.digits FOLDER [COUNT]

writes them (of each split the first COUNT) as people have images: PNG files in a folder for each
class, FOLDER/train/7/0012.png.
"""

import functools
import hashlib
import logging
import sys
from typing import Any

import numpy as np
from absl import logging as absl_logging
from etils import epath
from PIL import Image

from diffit_jax.errors import UserError, one_line
from diffit_jax.runtime import files

log = logging.getLogger(__name__)

SHAPE = (8, 8, 1)
NUM_CLASSES = 10
COUNTS = {"train": 1437, "test": 360}


def split_indices(split: str) -> np.ndarray:
    """Return the indices of a split's scans, (n,) int.

    They come writer by writer; a fixed shuffle gives both splits the same writers.
    """
    order = np.random.RandomState(0).permutation(sum(COUNTS.values()))
    return order[COUNTS["test"] :] if split == "train" else order[: COUNTS["test"]]


def load() -> tuple[np.ndarray, np.ndarray]:
    """Return all images (1797, 8, 8, 1) uint8 in [0, 255] and labels (1797,) int32."""
    from sklearn.datasets import load_digits  # takes a second to import

    digits = load_digits()
    # Grey levels 0…16 in the source.
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    return images, digits.target.astype(np.int32)


def prepared(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Return images and labels of a split in the order of tensorflow-datasets' preparation.

    (n, 8, 8, 1) uint8 and (n,) int, sorted by the MD5 of split name and index.
    """
    images, labels = load()
    order = sorted(
        split_indices(split).tolist(),
        key=lambda index: hashlib.md5(f"{split}{index}".encode()).digest(),
    )
    return images[order], labels[order]


def read(split: str, data_dir: str = "") -> tuple[np.ndarray, np.ndarray]:
    """Return images (n, 8, 8, 1) uint8 and labels (n,) int32 of a split, as `prepared`.

    Args:
      split: "train" or "test".
      data_dir: where tensorflow-datasets prepares them on first use; "": its default.

    Raises:
      UserError: what is prepared there is damaged, or the place cannot be written.
    """
    loudness = absl_logging.get_verbosity()
    absl_logging.set_verbosity(absl_logging.FATAL)  # it prints a page before it fails
    try:
        import tensorflow_datasets as tfds  # takes a second to import

        tfds.disable_progress_bar()
    except Exception as error:  # its generated code does not fit the installed protobuf, say
        log.info(
            "data set digits is made in memory: tensorflow-datasets cannot be imported here (%s)",
            one_line(error, 120),
        )
        return prepared(split)
    finally:
        absl_logging.set_verbosity(loudness)
    place = epath.Path(data_dir or "~/tensorflow_datasets").expanduser() / "digits"
    try:
        builder = _prepared_builder(tfds, data_dir)
        place = builder.data_path
        # A decorator hides its arguments. Small enough to keep in memory: decoding each example
        # anew would take longer than a training step.
        examples = list(builder.as_data_source(split))  # pyright: ignore[reportCallIssue]
        images = np.stack([example["image"] for example in examples])
        labels = np.array([example["label"] for example in examples], np.int32)
        if images.shape != (COUNTS[split], *SHAPE) or images.dtype != np.uint8:
            raise ValueError(f"it holds {images.shape} of {images.dtype}")
    except UserError:
        raise
    except Exception as error:  # what the library says of damaged metadata: JSON, a missing field
        reason = f"{type(error).__name__}: {one_line(error)}"[:160]
        raise UserError(
            f"data set digits in {place} is damaged ({reason}): delete it to have it prepared anew"
        ) from error
    return images, labels


def _prepared_builder(tfds: Any, data_dir: str) -> Any:
    """Return the data set's builder, prepared unless it is there."""
    try:
        make = functools.partial(
            _builder(tfds), data_dir=data_dir or None, file_format="array_record"
        )
        builder = make()
        if not builder.data_path.exists():
            files.make_directory(builder.data_path.parents[1], "data_dir")
            folder = files.make_directory(builder.data_path.parent, "data_dir")
            with files.owned(folder, "the preparation of data set digits in", wait=True):
                builder = make()  # it reads what is there: another process may have prepared it
                builder.download_and_prepare()
        return builder
    except OSError as error:
        place = data_dir or "~/tensorflow_datasets"
        raise UserError(
            f"data_dir {place} cannot be written ({error}): set data.data_dir"
        ) from error


@functools.cache
def _builder(tfds: Any) -> Any:
    """Make the tensorflow-datasets builder class of this data set.

    It downloads nothing and does not import TensorFlow.
    """

    class Digits(tfds.core.GeneratorBasedBuilder):
        """Handwritten digits, 8×8×1 uint8 in [0, 255] with a label 0…9.

        1,437 in `train`, 360 in `test`.
        """

        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                # Tensor, not Image: Image needs TensorFlow to encode.
                "image": tfds.features.Tensor(shape=SHAPE, dtype=np.uint8),
                "label": tfds.features.ClassLabel(num_classes=NUM_CLASSES),
            }
            return self.dataset_info_from_configs(
                description=self.__doc__,
                features=tfds.features.FeaturesDict(features),
                homepage="https://archive.ics.uci.edu/dataset/80/optical+recognition+of+handwritten+digits",
            )

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(split) for split in COUNTS}

        def _generate_examples(self, split):
            images, labels = load()
            for index in split_indices(split):
                yield int(index), {"image": images[index], "label": int(labels[index])}

    return Digits


def write_images(folder: epath.PathLike, count: int | None = None) -> None:
    """Write the splits, or of each the first `count` images, as PNG files in class folders."""
    for split in COUNTS:
        images, labels = (array[:count] for array in prepared(split))
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            place = epath.Path(folder) / split / str(label) / f"{number:04d}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[..., 0]).save(str(place))


if __name__ == "__main__":
    if not 2 <= len(sys.argv) <= 3 or not all(count.isdigit() for count in sys.argv[2:]):
        sys.exit("error: name the folder: python -m diffit_jax.data.digits FOLDER [COUNT]")
    write_images(sys.argv[1], *map(int, sys.argv[2:]))
