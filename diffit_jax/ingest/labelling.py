"""Labels of images as sources give them: numbers, names, folders.

Checked by one set of rules.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from diffit_jax.errors import UserError, one_line
from diffit_jax.runtime.console import first_few

DATASET_JSON = "dataset.json"
_SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}


class Labels(NamedTuple):
    """Labels (n,) int32, or None; the names of their classes; and what there is to say of them."""

    labels: np.ndarray | None = None
    classes: tuple[str, ...] = ()
    messages: tuple[str, ...] = ()


def of_values(
    source: str, values: Sequence[Any], images: Sequence[str], classes: Sequence[str] = ()
) -> Labels:
    """Check the labels of images, and number their classes.

    Args:
      source: its name in errors.
      values: of each image: a number from 0 on, a text (classes are numbered by their sorted
        names), None or -1 for none.
      images: names of the images, for errors.
      classes: the names of numbers, as far as they are known.

    Raises:
      UserError: labels that are neither, labels of some images only, beyond the names, or so many
        that they cannot be classes.
    """
    values = [_plain(source, value, image) for value, image in zip(values, images, strict=True)]
    missing = [image for value, image in zip(values, images, strict=True) if value in (None, -1)]
    if len(missing) == len(values):
        why = "all are -1, as in test splits" if -1 in values else "all are missing"
        return Labels(messages=(f"no labels: {why}",))
    if missing:
        raise UserError(
            f"{source} has {len(missing)} images without a label (-1, or none) among others "
            f"({first_few(missing)}): complete them, or say --unlabelled"
        )
    if any(isinstance(value, str) for value in values):
        return _of_texts(source, values, images)
    for value, image in zip(values, images, strict=True):
        if value < 0 or (classes and value >= len(classes)):
            known = f"there are names of {len(classes)} classes" if classes else "count from 0"
            raise UserError(
                f"{source}: the label of {image} is {value}, and {known}: correct the labels, or "
                "say --unlabelled"
            )
    count = len(classes) or max(values) + 1
    if count > len(values):
        place = values.index(max(values))
        largest = f"the label of {images[place]} is {values[place]}"
        raise UserError(
            f"{source} would have {count} classes, more than its {len(values)} images "
            f"({largest}): number the classes from 0 on, or say --unlabelled"
        )
    names = tuple(classes) or tuple(map(str, range(count)))
    return Labels(np.array(values, np.int32), names)


def _plain(source: str, value: Any, image: str) -> Any:
    """Return a label as an int, a str, or None for none."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, int | float) and math.isnan(value):
        return None
    if isinstance(value, int | float) and math.isfinite(value) and value == int(value):
        return int(value)
    raise UserError(
        f"{source}: the label of {image} is {str(value)!r:.40}, neither a number nor a name: name "
        "a column of numbers, or say --unlabelled"
    )


def _of_texts(source: str, values: Sequence[Any], images: Sequence[str]) -> Labels:
    for value, image in zip(values, images, strict=True):
        if not isinstance(value, str):
            raise UserError(
                f"{source}: the label of {image} is {value}, others are texts: correct the labels, "
                "or say --unlabelled"
            )
    classes = tuple(sorted(set(values)))
    if len(classes) == len(values) > 1:
        raise UserError(
            f"{source}: each image has a label of its own ({first_few(classes)}): are they "
            "captions? Say --unlabelled"
        )
    numbers_of = {name: number for number, name in enumerate(classes)}
    return Labels(np.array([numbers_of[value] for value in values], np.int32), classes)


def of_dataset_json(source: str, names: Sequence[str], given: Mapping[str, int]) -> Labels:
    """Return the labels of a `dataset.json`, whose names are relative to it.

    Raises:
      UserError: it has not those of these images, or see `of_values`.
    """
    top = common_folder(names)
    if top and not any(name in given for name in names):
        given = {top + name: label for name, label in given.items()}
    missing = [name for name in names if name not in given]
    absent = sorted(set(given) - set(names))
    if missing:
        raise UserError(
            f"{source}: {DATASET_JSON} has no label of {len(missing)} images "
            f"({first_few(missing)}): complete it, or say --unlabelled"
        )
    if absent:
        raise UserError(
            f"{source}: {DATASET_JSON} names {len(absent)} images that are not there "
            f"({first_few(absent)}): fetch them, or take them out"
        )
    return of_values(f"{source}: {DATASET_JSON}", [given[name] for name in names], names)


def of_folders(source: str, names: Sequence[str], whole: bool) -> Labels:
    """Return labels by the folders at the top, below those that all images share.

    Args:
      source: its name in errors.
      names: of images, with `/`.
      whole: whether folders at the top are classes even where all images are in one.

    Raises:
      UserError: folders that are no classes.
    """
    shared = 0 if whole else len(common_folder(names))
    inside = [name[shared:] for name in names]
    loose = [name for name in inside if "/" not in name]
    if len(loose) == len(inside):
        return Labels(messages=("no labels: its images lie in one folder",))
    if loose:
        raise UserError(
            f"{source} has {len(loose)} images beside its folders ({first_few(loose)}), whose "
            "class is not known: move them into a folder, or say --unlabelled"
        )
    if all(_is_in_its_part(name) for name in inside):
        why = "its folders are numbered parts of one set, by the names of the images in them"
        return Labels(messages=(f"no labels: {why}",))
    folders = [name.partition("/")[0] for name in inside]
    classes = tuple(sorted(set(folders)))
    if set(classes) <= _SPLITS:
        raise UserError(
            f"{source} has folders of splits ({', '.join(classes)}), not of classes: name one of "
            "them"
        )
    if len(classes) == 1:
        raise UserError(
            f"{source} has one class only, {classes[0]!r}: name the folder above the classes, or "
            "say --unlabelled"
        )
    numbers_of = {name: number for number, name in enumerate(classes)}
    return Labels(np.array([numbers_of[name] for name in folders], np.int32), classes)


def _is_in_its_part(name: str) -> bool:
    """Whether an image lies in the part of a set that its number says.

    As EDM's tool (`00012/img00012345.png`) and img2dataset (`00012/000123456.jpg`) divide one.
    """
    folder, _, rest = name.partition("/")
    number = re.search(r"\d+", rest.rpartition("/")[2])
    within = number is not None and len(number[0]) > len(folder)
    return within and re.fullmatch(r"\d{4,}", folder) is not None and number[0].startswith(folder)


def common_folder(names: Sequence[str]) -> str:
    """Return `a/b/` if all names begin with it, and it is a folder."""
    first, last = min(names).split("/")[:-1], max(names).split("/")[:-1]
    shared = 0
    while shared < min(len(first), len(last)) and first[shared] == last[shared]:
        shared += 1
    return "".join(f"{part}/" for part in first[:shared])


def read_dataset_json(content: bytes, path: str) -> dict[str, int]:
    """Read labels by name; {} if the file says that there are none.

    Separators of Windows in names become `/`.
    """
    try:
        labels = json.loads(content)["labels"]
        if labels is None:
            return {}
        table: dict[str, int] = {}
        for name, label in labels:
            if isinstance(label, bool) or not isinstance(label, int):
                raise ValueError("labels must be whole numbers")
            plain = str(name).replace("\\", "/")
            if table.setdefault(plain, label) != label:
                raise ValueError(f"{plain} has the labels {table[plain]} and {label}")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f'{path} is not {{"labels": [[name, number], …]}} ({one_line(error, 120)}): correct it'
        ) from error
    return table


def are_shards(stems: Sequence[str]) -> bool:
    """Whether names of tars are numbers in a row, so that each is a part, not a class."""
    found = [re.fullmatch(r"(.*?)(\d+)(-of-\d+)?", stem) for stem in stems]
    if not all(found) or len(stems) < 2:
        return False
    prefixes = {match[1] for match in found if match}
    counted = [int(match[2]) for match in found if match]
    return len(prefixes) == 1 and max(counted) - min(counted) < 2 * len(counted)


def numbered_by(
    theirs: Sequence[str], labels: np.ndarray, classes: Sequence[str], split: str, other: str
) -> np.ndarray:
    """Return the labels of a split, (n,) int32, as another split's classes are numbered.

    Args:
      theirs: names of the other split's classes, in their order.
      labels: (n,) int32, indices into `classes`.
      classes: names of this split's classes.
      split: name of this split, for the error.
      other: name of the other one.

    Raises:
      UserError: a class that the other split has not.
    """
    place = {name: number for number, name in enumerate(theirs)}
    used = [classes[number] for number in np.unique(labels).tolist()]
    unknown = [str(name) for name in used if name not in place]
    if unknown:
        raise UserError(
            f"split {split} has classes that split {other} of this data set has not "
            f"({first_few(unknown)}): prepare first the split that has all, or choose another "
            "--name"
        )
    return np.array([place.get(name, 0) for name in classes], np.int32)[labels]
