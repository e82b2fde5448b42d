"""Handwritten digits that scikit-learn ships: 1,797 scans of 8×8 pixels, ten classes, and their
division into a train and a test split.

UCI's optical recognition of handwritten digits, Alpaydin & Kaynak 1998. `digits_builder` prepares
them with tensorflow-datasets.
"""

import hashlib

import numpy as np

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
