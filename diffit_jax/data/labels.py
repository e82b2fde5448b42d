"""Labels as people write them: numbers, ranges, names of ImageNet's classes, or at random."""

import difflib
import functools
from collections.abc import Sequence
from importlib import resources

import numpy as np

from diffit_jax.errors import UserError
from diffit_jax.runtime.console import parse_numbers

# How often a class comes in training, as a power of its number of examples.
CLASS_SAMPLING = {"natural": 1.0, "square_root": 0.5, "balanced": 0.0}

_NAMES_FILE = "imagenet_classes.txt"


@functools.cache
def imagenet_names() -> list[list[str]]:
    """Return the synonyms of each of ImageNet's 1,000 classes, by index."""
    lines = (
        resources.files("diffit_jax.data")
        .joinpath(_NAMES_FILE)
        .read_text(encoding="utf-8")
        .splitlines()
    )
    return [line.split("\t")[1].split(", ") for line in lines if not line.startswith("#")]


def imagenet_class(name: str) -> int:
    """Index of the ImageNet class with a synonym `name`, whatever its case.

    Raises:
      UserError: there is none (similar names are given), or several (their indices are).
    """
    by_name: dict[str, list[int]] = {}
    for index, synonyms in enumerate(imagenet_names()):
        for synonym in synonyms:
            by_name.setdefault(synonym.lower(), []).append(index)
    found = by_name.get(name.strip().lower(), [])
    if len(found) > 1:
        raise UserError(
            f"ImageNet has {len(found)} classes named {name.strip()!r}: use one of the indices "
            f"{', '.join(map(str, found))}"
        )
    if not found:
        close = difflib.get_close_matches(name.strip().lower(), by_name, n=3)
        hint = f"did you mean {', '.join(close)}?" if close else "use its index"
        raise UserError(f"ImageNet has no class named {name.strip()!r}: {hint}")
    return found[0]


def parse_labels(text: str, seeds: Sequence[int], num_classes: int) -> np.ndarray:
    """Parse a user's labels, and give one to each seed.

    Args:
      text: comma-separated numbers, ranges (`0-9`) and, for models of 1,000 classes, names of
        ImageNet classes, given out to the seeds in turn; or `random`: uniform, each a function of
        its seed number alone.
      seeds: n seed numbers.
      num_classes: of the model, at least 1.

    Returns:
      (n,) int64 in [0, num_classes).

    Raises:
      UserError: a number outside the classes, or an unknown name.
    """
    if text.strip() == "random":
        draws = [
            np.random.Philox(key=[int(seed), 1]).random_raw(1)[0] >> np.uint64(11) for seed in seeds
        ]
        return np.array([int(draw) * num_classes >> 53 for draw in draws], np.int64)
    labels: list[int] = []
    for part in text.split(","):
        named = num_classes == len(imagenet_names()) and any(
            character.isalpha() for character in part
        )
        labels += [imagenet_class(part)] if named else parse_numbers("--labels", part)
    return give_out(labels, len(seeds), num_classes)


def give_out(labels: Sequence[int], count: int, num_classes: int) -> np.ndarray:
    """Repeat (or cut) a list of labels to `count` ones, in turn, (count,) int64.

    Raises:
      UserError: there is none, or one is outside [0, num_classes).
    """
    if len(labels) == 0:
        raise UserError("--labels is empty: name at least one label, or leave it out")
    for label in labels:
        if not 0 <= label < num_classes:
            raise UserError(
                f"label {label} is outside the classes 0-{num_classes - 1} of the model: change "
                "--labels"
            )
    return np.resize(np.asarray(labels, np.int64), count)


def spread(labels: np.ndarray) -> str:
    """Describe how evenly (n,) labels are spread over the classes."""
    counts = np.unique(labels, return_counts=True)[1]
    if np.ptp(counts) <= 1:
        return f"balanced over {len(counts)} classes"
    return f"{counts.min()} to {counts.max()} of each of {len(counts)} classes"
