"""Tables of images: Parquet, Arrow, prepared tensorflow-datasets, and CIFAR-10's archives."""

import contextlib
import gzip
import io
import json
import pickle
import re
import tarfile
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from diffit_jax.errors import UserError, one_line
from diffit_jax.ingest import labelling, locations
from diffit_jax.ingest.decoding import DecodeError
from diffit_jax.ingest.labelling import Labels
from diffit_jax.ingest.locations import Index
from diffit_jax.runtime import files

# --- Parquet and Arrow


# What `datasets.Dataset.save_to_disk` writes, for one split and for several.
SAVED_STATE, SAVED_SPLITS = "state.json", "dataset_dict.json"
_ClassNames = tuple[str, ...]


def index_saved(folder: epath.Path, split: str, unlabelled: bool) -> Index:
    """Index a data set that `datasets.Dataset.save_to_disk` wrote, of one split or several."""
    if (folder / SAVED_SPLITS).exists():
        splits = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
        if split not in splits:
            raise UserError(
                f"{folder} has no split {split!r}: use --split {' or '.join(splits) or 'none'}"
            )
        folder /= split
    try:
        state = json.loads((folder / SAVED_STATE).read_text())
        names = [str(entry["filename"]) for entry in state["_data_files"]]
        features = json.loads((folder / "dataset_info.json").read_text()).get("features") or {}
        classes = _label_feature(features)[1]
    except FileNotFoundError as error:
        raise UserError(f"{folder} has no {epath.Path(error.filename).name}: fetch it") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{folder}/{SAVED_STATE} is not as datasets.save_to_disk writes it "
            f"({one_line(error, 80)}): save it again"
        ) from error
    missing = [name for name in names if not (folder / name).exists()]
    if missing or not names or state.get("_indices_data_files"):
        what = f"{missing[0]} is not there" if missing else "it is a selection of other files"
        raise UserError(f"{folder}: {what}: save it again by datasets.save_to_disk")
    return index_tables([folder / name for name in names], unlabelled, classes)


def index_tables(paths: Sequence[epath.Path], unlabelled: bool, classes: _ClassNames = ()) -> Index:
    """Index Hugging Face tables: a column of {bytes, path}, and a column of labels.

    The metadata have the names of classes; if not, `classes` are.
    """
    try:
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"{paths[0]} cannot be read without the library pyarrow: pip install pyarrow"
        ) from error
    rows: list[tuple[int, int, int]] = []
    values: list[Any] = []
    described: list[tuple[str | None, _ClassNames]] = []
    # Positions of all rows; of the columns only labels are read here.
    for number, path in enumerate(paths):
        try:
            with locations.opened_table(str(path)) as table:
                described.append(_described(table.schema, path))
                if described[-1] != described[0]:
                    raise _disagreement(paths[0], path, described[0], described[-1])
                for group, count in enumerate(table.counts):
                    rows += [(number, group, row) for row in range(count)]
                    if described[0][0] and not unlabelled:
                        values += table.read(group, described[0][0]).to_pylist()
                        if len(values) != len(rows):
                            raise ValueError(f"row group {group} has not {count} labels")
        except DecodeError as error:
            raise UserError(
                f"{path} is not a whole table of images ({error}): fetch it again"
            ) from error
    # Rows have no names: file, row group and row stand for one.
    names = [f"{paths[file].name}:{group}:{row}" for file, group, row in rows]
    if not rows:
        raise UserError(f"{paths[0]} has no rows: name another file")
    labels, column = Labels(), described[0][0]
    if column is None and not unlabelled:
        labels = Labels(messages=("no labels: its tables have no column of them",))
    elif not unlabelled:
        known = described[0][1] or classes
        labels = labelling.of_values(f"{paths[0]}, column {column}", values, names, known)
    stamps = locations.stamps_of([locations.stamp_of_table(path) for path in paths])
    places = np.array(rows, np.int64).reshape(-1, 3)
    return Index(
        "table", tuple(map(str, paths)), places, names, *labels, stamps=stamps[places[:, 0]]
    )


def _disagreement(
    first: epath.Path,
    path: epath.Path,
    theirs: tuple[str | None, _ClassNames],
    ours: tuple[str | None, _ClassNames],
) -> UserError:
    if theirs[0] != ours[0]:
        what = f"the column of labels is {ours[0] or 'not there'}, in {first.name} it is "
        what += theirs[0] or "not there"
    else:
        what = f"the names of its {len(ours[1])} classes are not those of {first.name}"
    return UserError(f"{path}: {what}: name files of one data set, or say --unlabelled")


def _described(schema: Any, path: epath.Path) -> tuple[str | None, _ClassNames]:
    """Return the column of labels, and names of classes, of a table; it must have images."""
    if locations.image_column(schema) is None:
        raise UserError(
            f"{path} has no column of images ({{bytes, path}}), only "
            f"{', '.join(schema.names)}: name another file"
        )
    return _label_column(schema)


def _label_column(schema: Any) -> tuple[str | None, _ClassNames]:
    """Name of the column of labels, and the classes' names as far as the metadata have them."""
    features: Mapping[str, Any] = {}
    with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    name, classes = _label_feature(features)
    if name in schema.names:
        return name, classes
    return next((name for name in ("label", "labels") if name in schema.names), None), ()


def _label_feature(features: Any) -> tuple[str | None, _ClassNames]:
    """Return the feature of labels among those of Hugging Face's metadata, and its names."""
    for name, feature in features.items() if isinstance(features, Mapping) else ():
        if isinstance(feature, Mapping) and feature.get("_type") == "ClassLabel":
            names = feature.get("names")
            return name, tuple(map(str, names)) if isinstance(names, list) else ()
    return None, ()


# --- tensorflow-datasets

# The remedy for data sets in another format.
AS_ARRAY_RECORD = (
    "prepare it again with tensorflow_datasets.load(…, "
    "builder_kwargs=dict(file_format='array_record')), or name the original images"
)


def index_tfds(folder: epath.Path, split: str, unlabelled: bool) -> Index:
    """Index a data set that tensorflow-datasets has prepared as ArrayRecord.

    Its feature `image`, and `label` where there is one.
    """
    builder = locations.tfds_builder(str(folder))
    if builder.info.file_format.value != "array_record":
        raise UserError(
            f"{folder} is prepared as {builder.info.file_format.value}, which cannot be read "
            f"without TensorFlow: {AS_ARRAY_RECORD}"
        )
    if split not in builder.info.splits:
        raise UserError(
            f"{folder} has no split {split!r}: use --split "
            f"{' or '.join(sorted(builder.info.splits))}"
        )
    features = builder.info.features
    if "image" not in features:
        raise UserError(f"{folder} has no feature image, only {', '.join(features)}")
    source = locations.tfds_source(f"{folder}::{split}")
    count = len(source)
    labels = Labels()
    names = [f"{split}:{index}" for index in range(count)]
    if "label" in features and not unlabelled:
        values = [int(source[index]["label"]) for index in range(count)]
        classes = getattr(features["label"], "names", None) or ()
        labels = labelling.of_values(str(folder), values, names, classes)
    rows = np.stack([np.zeros(count, np.int64), np.arange(count), np.zeros(count, np.int64)], 1)
    sizes = sorted((entry.name, files.size(entry)) for entry in folder.iterdir())
    stamps = np.repeat(locations.stamps_of([str(sizes)]), count)
    return Index("tfds", (f"{folder}::{split}",), rows, names, *labels, stamps=stamps)


# --- CIFAR-10

_SIDE, _ROW = 32, 1 + 3 * 32 * 32
_TRAIN, _TEST = [f"data_batch_{number}" for number in range(1, 6)], ["test_batch"]
_META = ("batches.meta.txt", "batches.meta")


def cifar_files(path: epath.Path) -> dict[str, bytes] | None:
    """Return the files of CIFAR-10, in a folder or `.tar.gz`, by name; None if there are none."""
    wanted = {f"{name}{end}" for name in [*_TRAIN, *_TEST] for end in ("", ".bin")} | set(_META)
    if path.is_dir():
        names = {entry.name for entry in path.iterdir()} & wanted
        return {name: (path / name).read_bytes() for name in names} or None
    found: dict[str, bytes] = {}
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:*") as archive:
            for entry in archive:
                name = entry.name.rpartition("/")[2]
                part = archive.extractfile(entry) if name in wanted else None
                if part is not None:
                    found[name] = part.read()
                elif entry.isfile() and not found and entry.size > 10**8:
                    break  # some other, large archive
    except (tarfile.TarError, EOFError, gzip.BadGzipFile, zlib.error, ValueError) as error:
        reason = one_line(error, 100)
        raise UserError(f"{path} is not a whole archive ({reason}): fetch it again") from error
    return found or None


def index_cifar(
    source: str, batches_of: Mapping[str, bytes], split: str, unlabelled: bool
) -> Index:
    """Index CIFAR-10's binary or Python archive: `train` has five batches, `test` one."""
    if split not in ("train", "test"):
        raise UserError(f"{source} has no split {split!r}: use --split train or test")
    binary = any(name.endswith(".bin") for name in batches_of)
    batches = [
        f"{name}.bin" if binary else name for name in (_TRAIN if split == "train" else _TEST)
    ]
    missing = [name for name in batches if name not in batches_of]
    if missing:
        raise UserError(f"{source} has no {', '.join(missing)}: fetch it again")
    read = _binary_batch if binary else _python_batch
    parts = [read(batches_of[name], f"{source}: {name}") for name in batches]
    pixels, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    if len(labels) == 0 or labels.max() > 9:
        raise UserError(f"{source} has labels beyond 9, which CIFAR-10 has not: fetch it again")
    rows = np.stack([np.zeros(len(labels)), np.arange(len(labels)), np.zeros(len(labels))], 1)
    return Index(
        "pixels",
        (),
        rows.astype(np.int64),
        [f"{split}:{index}" for index in range(len(labels))],
        None if unlabelled else labels.astype(np.int32),
        () if unlabelled else _cifar_classes(batches_of),
        pixels=np.ascontiguousarray(pixels.reshape(-1, 3, _SIDE, _SIDE).transpose(0, 2, 3, 1)),
    )


def _binary_batch(content: bytes, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Read (n, 3072) uint8 and labels (n,): rows of a label and three planes."""
    if not content or len(content) % _ROW:
        raise UserError(
            f"{name} has {len(content)} bytes, not a multiple of {_ROW}: fetch it again"
        )
    rows = np.frombuffer(content, np.uint8).reshape(-1, _ROW)
    return rows[:, 1:], rows[:, 0]


def _python_batch(content: bytes, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Read images and labels of a pickled dictionary."""
    batch = _unpickled(content, name)
    try:
        pixels, labels = np.asarray(batch[b"data"]), np.asarray(batch[b"labels"])
        if pixels.dtype != np.uint8 or pixels.shape != (len(labels), _ROW - 1):
            raise ValueError(f"data of {pixels.shape} {pixels.dtype} and {len(labels)} labels")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{name} is no batch of CIFAR-10 ({error}): fetch it again") from error
    return pixels, labels


def _cifar_classes(files: Mapping[str, bytes]) -> tuple[str, ...]:
    if "batches.meta.txt" in files:
        names = files["batches.meta.txt"].decode(errors="replace").split()
    elif "batches.meta" in files:
        meta = _unpickled(files["batches.meta"], "batches.meta")
        names = [name.decode(errors="replace") for name in meta.get(b"label_names", [])]
    else:
        names = []
    return tuple(names) if len(names) == 10 else tuple(str(number) for number in range(10))


def _unpickled(content: bytes, name: str) -> Any:
    """Unpickle arrays, text and numbers; nothing else is made, and nothing run."""
    try:
        return _Arrays(io.BytesIO(content), encoding="bytes").load()
    except UserError:
        raise
    except Exception as error:  # whatever pickle says of damaged bytes
        raise UserError(f"{name} is not a whole pickle ({error}): fetch it again") from error


class _Arrays(pickle.Unpickler):
    """Knows arrays of numbers, and no other class or function."""

    def find_class(self, module: str, name: str) -> Any:
        known = {
            "_reconstruct": lambda *_: _Array(),
            "ndarray": None,  # an argument of the first
            "dtype": lambda text, *_: _Dtype(text),
            "encode": lambda text, _: text.encode("latin1"),  # bytes, as Python 3 writes them
        }
        place = re.sub(r"^numpy(\._?core)?(\.multiarray)?$", "numpy", module)
        if place in ("numpy", "_codecs") and name in known:
            return known[name]
        raise UserError(
            f"a pickle names {module}.{name}, which is not loaded, only arrays and text are: fetch "
            "the archive from its own page"
        )


class _Dtype:
    """Stands in for `numpy.dtype`, whose state is the order of bytes."""

    def __init__(self, text: Any):
        self.dtype = np.dtype(text.decode() if isinstance(text, bytes) else text)
        if self.dtype.kind not in "iufb":
            raise UserError("a pickle holds an array of objects, which is not loaded")

    def __setstate__(self, state: Any) -> None:
        order = state[1].decode() if isinstance(state[1], bytes) else state[1]
        self.dtype = self.dtype.newbyteorder(order)


class _Array:
    """Stands in for an array, which its state fills."""

    def __init__(self):
        self._array = np.zeros(0, np.uint8)

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, content = state
        array = np.frombuffer(content, dtype.dtype)
        self._array = array.reshape(shape, order="F" if fortran else "C")

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return self._array if dtype is None else self._array.astype(dtype)
