"""Labels as people write them: numbers, ranges, names of classes, or at random."""

import difflib
import functools
import re
import unicodedata
from collections.abc import Callable, Sequence, Set
from importlib import resources

import numpy as np

from diffit_jax.errors import UserError
from diffit_jax.runtime.console import parse_numbers

# How often a class comes in training, as a power of its number of examples.
CLASS_SAMPLING = {"natural": 1.0, "square_root": 0.5, "balanced": 0.0}

_NAMES_FILE = "imagenet_classes.txt"


@functools.cache
def _imagenet() -> dict[str, list[str]]:
    """Return the synonyms of ImageNet's 1,000 classes by WordNet id, in their order."""
    lines = (
        resources.files("diffit_jax.data")
        .joinpath(_NAMES_FILE)
        .read_text(encoding="utf-8")
        .splitlines()
    )
    pairs = (line.split("\t") for line in lines if not line.startswith("#"))
    return {wordnet: names.split(", ") for wordnet, names in pairs}


def imagenet_names() -> list[list[str]]:
    """Return the synonyms of each of ImageNet's 1,000 classes, by index."""
    return list(_imagenet().values())


def synonyms_of(classes: Sequence[str]) -> list[list[str]]:
    """Return the synonyms of a data set's classes: ImageNet's for WordNet ids, else the names."""
    known = _imagenet() if all(re.fullmatch(r"n\d{8}", name) for name in classes) else {}
    return [[*known.get(name, ()), name] for name in classes]


def are_numbers(classes: Sequence[str]) -> bool:
    """Whether names of classes are nothing but their numbers."""
    return all(name == str(number) for number, name in enumerate(classes))


def name_of(names: Sequence[Sequence[str]]) -> Callable[[int], str]:
    """Return the function from a label to the first of its class's `names`; to its number if none.

    (`names`: synonyms of each class, by index.)
    """
    return lambda label: names[label][0] if label < len(names) else str(label)


def class_named(name: str, names: Sequence[Sequence[str]]) -> int:
    """Return the index of the class with a synonym `name`, whatever its case.

    Args:
      name: as a person writes it.
      names: synonyms of each class, by index.

    Raises:
      UserError: there is none (similar names are given), or several (their indices are).
    """
    if not names:
        raise UserError(
            f"{name.strip()!r} is a name, and the classes of this model are known by number only"
        )
    by_name: dict[str, list[int]] = {}
    for index, synonyms in enumerate(names):
        for synonym in synonyms:
            by_name.setdefault(_plain(synonym), []).append(index)
    found = by_name.get(_plain(name), [])
    if len(found) > 1:
        raise UserError(
            f"{len(found)} classes are named {name.strip()!r}: use one of the indices "
            f"{', '.join(map(str, found))}"
        )
    if not found:
        close = difflib.get_close_matches(_plain(name), by_name, n=3)
        hint = f"did you mean {', '.join(close)}?" if close else "use its index"
        if not close and len(names) <= 12:
            hint = f"known are {', '.join(synonyms[0] for synonyms in names)}"
        raise UserError(f"no class is named {name.strip()!r}: {hint}")
    return found[0]


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", name.strip()).casefold()


def parse_labels(
    text: str, seeds: Sequence[int], num_classes: int, names: Sequence[Sequence[str]] = ()
) -> np.ndarray:
    """Parse a user's labels, and give one to each seed.

    Args:
      text: comma-separated numbers, ranges (`0-9`) and names of classes, given out to the seeds in
        turn; or `random`: uniform, each a function of its seed number alone.
      seeds: n seed numbers.
      num_classes: of the model, at least 1.
      names: synonyms of each class, if they are known.

    Returns:
      (n,) int64 in [0, num_classes).

    Raises:
      UserError: a number outside the classes, or an unknown name.
    """
    known = {_plain(synonym) for synonyms in names for synonym in synonyms}
    if text.strip() == "random" and "random" not in known:
        draws = [
            np.random.Philox(key=[int(seed), 1]).random_raw(1)[0] >> np.uint64(11) for seed in seeds
        ]
        return np.array([int(draw) * num_classes >> 53 for draw in draws], np.int64)
    labels: list[int] = []
    parts = text.split(",")
    while parts:
        # Names may have commas: the longest one counts.
        ends = range(len(parts), 0, -1)
        end = next((end for end in ends if _plain(",".join(parts[:end])) in known), 1)
        part, parts = ",".join(parts[:end]), parts[end:]
        if re.fullmatch(r"[\d\s-]*", part) and not _is_only_a_name(part, known, num_classes):
            labels += parse_numbers("--labels", part)
        else:
            labels.append(class_named(part, names))
    return give_out(labels, len(seeds), num_classes)


def _is_only_a_name(part: str, known: Set[str], num_classes: int) -> bool:
    """Whether text of digits names a class ("2019"), and is no label."""
    within = part.strip().isdigit() and int(part) < num_classes
    return _plain(part) in known and not within


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
                f"label {label} is outside the classes 0-{num_classes - 1} of the model: change it"
            )
    return np.resize(np.asarray(labels, np.int64), count)


def spread(labels: np.ndarray) -> str:
    """Describe how evenly (n,) labels are spread over the classes."""
    counts = np.unique(labels, return_counts=True)[1]
    if np.ptp(counts) <= 1:
        return f"balanced over {len(counts)} classes"
    return f"{counts.min()} to {counts.max()} of each of {len(counts)} classes"


def period(labels: np.ndarray, longest: int = 10) -> int:
    """Return after how many samples (n,) labels repeat, where that is at most `longest`; else 0."""
    for length in range(1, min(longest, len(labels)) + 1):
        if np.array_equal(labels, np.resize(labels[:length], len(labels))):
            return length
    return 0
