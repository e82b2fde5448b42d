"""Handwritten digits that scikit-learn ships: 1,797 scans of 8×8 pixels, ten classes, and their
division into a train and a test split.

UCI's optical recognition of handwritten digits, Alpaydin & Kaynak 1998. `digits_builder` prepares
them with tensorflow-datasets.

    python -m diffit_jax.data.digits FOLDER [COUNT]

writes them (of each split the first COUNT) as people have pictures: PNG files in a folder for each
class, FOLDER/train/7/0012.png.
"""

import hashlib
import sys

import numpy as np
from etils import epath
from PIL import Image

SHAPE = (8, 8, 1)
NUM_CLASSES = 10
COUNTS = {"train": 1437, "test": 360}


def split_indices(split: str) -> np.ndarray:
    """Which scans a split has. They come writer by writer; a fixed shuffle gives both splits the
    same writers."""
    order = np.random.RandomState(0).permutation(sum(COUNTS.values()))
    return order[COUNTS["test"] :] if split == "train" else order[: COUNTS["test"]]


def load() -> tuple[np.ndarray, np.ndarray]:
    """All images (1797, 8, 8, 1) uint8 in [0, 255] and labels (1797,) int32."""
    from sklearn.datasets import load_digits  # takes a second to import

    digits = load_digits()
    # Grey levels 0…16 in the source.
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    return images, digits.target.astype(np.int32)


def prepared(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of a split in the order in which tensorflow-datasets prepares them: by the
    MD5 of split name and index."""
    images, labels = load()
    order = sorted(
        split_indices(split).tolist(),
        key=lambda index: hashlib.md5(f"{split}{index}".encode()).digest(),
    )
    return images[order], labels[order]


def write_pictures(folder: epath.PathLike, count: int | None = None) -> None:
    """Writes the splits, or of each the first `count` pictures, as PNG files in class folders."""
    for split in COUNTS:
        images, labels = (array[:count] for array in prepared(split))
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            place = epath.Path(folder) / split / str(label) / f"{number:04d}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[..., 0]).save(str(place))


if __name__ == "__main__":
    if not 2 <= len(sys.argv) <= 3 or not all(count.isdigit() for count in sys.argv[2:]):
        sys.exit("error: name the folder: python -m diffit_jax.data.digits FOLDER [COUNT]")
    write_pictures(sys.argv[1], *map(int, sys.argv[2:]))
