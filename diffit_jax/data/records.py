"""Prepared data sets: ArrayRecord shards of named arrays, and a manifest next to them.

    DATA_DIR/NAME/train.manifest.json
    DATA_DIR/NAME/train-00000-of-00157.array_record …

A record is a mapping of arrays: their bytes, little-endian, one after the other; names, shapes and
dtypes stand in the manifest, in that order. The first one is `label`, int32. Beside it there is
`image` (H, W, C) uint8, or `moments` of latents (orientations, h, w, 2c) float16 or float32: mean
and log variance of an autoencoder's posterior, unscaled, of the image and of its mirror image; or
both. `features` (orientations, 1 + patches, channels) float16 are an encoder's class token and
patch tokens of the same two. Others (captions' tokens) come to the training step as they are.

Imported by the worker processes that decode: no jax here.
"""

import concurrent.futures
import dataclasses
import functools
import json
import math
import os
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from array_record.python import array_record_module
from etils import epath

from diffit_jax.errors import UserError, one_line
from diffit_jax.runtime import files

LABEL, IMAGE, MOMENTS, FEATURES = "label", "image", "moments", "features"
FORMAT = 2  # 1: a label and one array, whose `kind`, `shape` and `dtype` stood in the manifest
_JSON_NAMES = {"notes": "remarks"}  # of fields whose keys in files are older
WRITER_OPTIONS = "group_size:1,uncompressed"  # a record is read alone; pixels and floats stay big
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"  # the library's, for random access
CONCURRENT_READS = 64  # of a batch: `gs://` answers after 60 ms, however many ask
_NEAR_S = 1e-3  # a record that comes sooner is near: there, threads cost more than they save
_READS_NEAR = 2


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file of a data set.

    Attributes:
      file: its name.
      count: of records.
      sha256: of its bytes.
    """

    file: str
    count: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class ArraySpec:
    """Shape and dtype, by its name, of one of a record's arrays."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> int:
        """Bytes of it."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def decoded(self, data: np.ndarray) -> np.ndarray:
        """Decode (n, size) uint8 to (n, *shape) of its dtype, a copy."""
        dtype = np.dtype(self.dtype)
        rows = np.ascontiguousarray(data).view(dtype.newbyteorder("<"))
        return rows.reshape(-1, *self.shape).astype(dtype)


def layout(**arrays: ArraySpec) -> dict[str, ArraySpec]:
    """Return the layout of a record of a label and these arrays."""
    return {LABEL: ArraySpec((), "int32"), **arrays}


def record_size(arrays: Mapping[str, ArraySpec]) -> int:
    """Return the bytes of a record."""
    return sum(spec.size for spec in arrays.values())


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a data set holds.

    Attributes:
      arrays: of a record, by name, in its order.
      classes: names of the labels; none for data without labels.
      count: of examples.
      class_counts: of each class.
      source: where they are from, a mapping of JSON values.
      crop: how images were brought to one size, likewise.
      skipped: images that could not be read: name and reason of each.
      notes: how many images were unusual, by kind; `remarks` in the JSON.
      shards: in their order.
      autoencoder: of moments: its hash, `latent_mean` and `latent_scale` …, likewise.
      statistics: of moments: mean and standard deviation of each channel of unscaled latents.
      features: of features: the encoder's hash, positions, dtype and grid, likewise.
      format: of all this.
    """

    arrays: Mapping[str, ArraySpec]
    classes: tuple[str, ...]
    count: int
    class_counts: tuple[int, ...]
    source: Mapping[str, Any]
    crop: Mapping[str, Any]
    skipped: Sequence[tuple[str, str]]
    notes: Mapping[str, int]
    shards: tuple[Shard, ...]
    autoencoder: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    statistics: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    features: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    format: int = FORMAT

    @property
    def example_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of an image, or of a latent."""
        if MOMENTS not in self.arrays:
            height, width, channels = self.arrays[IMAGE].shape
            return height, width, channels
        _, height, width, channels = self.arrays[MOMENTS].shape
        return height, width, channels // 2

    def to_json(self) -> str:
        """Return the text of its file."""
        values = to_json_names(dataclasses.asdict(self))
        if not self.features:  # which came later
            del values["features"]
        return json.dumps(values, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Manifest":
        """Invert `to_json`. Raises `ValueError`, `TypeError` or `KeyError` for anything else."""
        given: dict[str, Any] = from_json_names(json.loads(text))
        if given["format"] == 1:
            name = {"images": IMAGE, "moments": MOMENTS}[given.pop("kind")]
            one = ArraySpec(tuple(given.pop("shape")), given.pop("dtype"))
            arrays = layout(**{name: one})
        elif given["format"] == FORMAT:
            arrays = {
                name: ArraySpec(tuple(spec["shape"]), np.dtype(spec["dtype"]).name)
                for name, spec in given.pop("arrays").items()
            }
        else:
            raise ValueError(f"its format is {given['format']!r}, known are 1 and {FORMAT}")
        shards = tuple(Shard(**shard) for shard in given.pop("shards"))
        for name in ("classes", "class_counts"):
            given[name] = tuple(given[name])
        given["skipped"] = tuple((name, reason) for name, reason in given["skipped"])
        manifest = cls(**{**given, "format": FORMAT}, arrays=arrays, shards=shards)
        sides = {name: len(spec.shape) for name, spec in arrays.items()}
        if (
            next(iter(arrays), "") != LABEL
            or not {IMAGE, MOMENTS} & arrays.keys()
            or sides.get(IMAGE, 3) != 3
            or sides.get(MOMENTS, 4) != 4
            or sum(shard.count for shard in shards) != manifest.count
        ):
            raise ValueError("its arrays or its counts do not fit together")
        return manifest


def to_json_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """Rename fields to their keys in files of prepared data, in their order."""
    return {_JSON_NAMES.get(name, name): value for name, value in values.items()}


def from_json_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """Invert `to_json_names`."""
    fields = {key: name for name, key in _JSON_NAMES.items()}
    return {fields.get(key, key): value for key, value in values.items()}


def manifest_name(split: str) -> str:
    """Return the name of a split's manifest."""
    return f"{split}.manifest.json"


def shard_name(split: str, number: int, total: int) -> str:
    """Return the name of a shard's file."""
    return f"{split}-{number:05d}-of-{total:05d}.array_record"


def encode_record(arrays: Mapping[str, ArraySpec], values: Mapping[str, np.ndarray]) -> bytes:
    """Encode a record. Raises `ValueError` for other arrays than its own."""
    parts = []
    if arrays.keys() != values.keys():
        raise ValueError(f"a record has {', '.join(arrays)}, not {', '.join(values)}")
    for name, spec in arrays.items():
        value = np.asarray(values[name], spec.dtype)
        if value.shape != spec.shape:
            raise ValueError(f"{name} is {value.shape}, not {spec.shape}")
        parts.append(value.astype(value.dtype.newbyteorder("<")).tobytes())
    return b"".join(parts)


def decode_records(
    arrays: Mapping[str, ArraySpec], records: np.ndarray, without: Collection[str] = ()
) -> dict[str, np.ndarray]:
    """Decode n records, (n, bytes) uint8, to arrays by name: (n, …) each, but those left out."""
    ends = np.cumsum([spec.size for spec in arrays.values()])
    return {
        name: spec.decoded(records[:, end - spec.size : end])
        for (name, spec), end in zip(arrays.items(), ends, strict=True)
        if name not in without
    }


def read_record(path: str, row: int) -> dict[str, np.ndarray]:
    """Read one record of a shard, by the manifest next to it."""
    arrays = _arrays_beside(path, files.version(path))
    (record,) = _reader(path, files.version(path)).read([row])
    values = decode_records(arrays, np.frombuffer(record, np.uint8)[None])
    return {name: value[0] for name, value in values.items()}


@functools.lru_cache(maxsize=16)
def _arrays_beside(path: str, version: tuple[int, ...]) -> Mapping[str, ArraySpec]:
    shard = epath.Path(path)
    return read_manifest(shard.parent, shard.name.rsplit("-", 3)[0]).arrays


def read_manifest(folder: epath.PathLike, split: str) -> Manifest:
    """Read the manifest of a split.

    Raises:
      UserError: there is none, or it is damaged.
    """
    folder = epath.Path(folder)
    path = folder / manifest_name(split)
    try:
        return Manifest.from_json(path.read_text())
    except FileNotFoundError as error:
        begun = folder / shard_stats_dir(split)
        others = sorted(other.name.partition(".")[0] for other in _manifests(folder))
        remedy = "prepare or encode it first (diffit prepare, diffit encode)"
        if begun.exists():
            remedy = "it is not complete yet: run the command that made it again"
        elif others:
            remedy = f"it has {', '.join(others)} only"
        raise UserError(f"there is no data set {path}: {remedy}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error})") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        reason = one_line(error, 120)
        raise UserError(
            f"{path} is damaged ({type(error).__name__}: {reason}): delete it, and run the command "
            "that made it again; finished shards are kept"
        ) from error


def has_split(folder: epath.PathLike, split: str) -> bool:
    """Whether a data set has a split that is complete."""
    return (epath.Path(folder) / manifest_name(split)).exists()


def splits(folder: epath.PathLike) -> list[str]:
    """Return the names of a data set's complete splits; `train`, whose classes count, first."""
    names = [path.name.removesuffix(".manifest.json") for path in _manifests(epath.Path(folder))]
    return sorted(names, key=lambda name: (name != "train", name))


def shard_stats_dir(split: str) -> str:
    """Return the name of the directory with per-shard statistics, see `shards.Shards`."""
    return f"{split}.lines"


def _manifests(folder: epath.Path) -> list[epath.Path]:
    return list(folder.glob("*.manifest.json")) if folder.exists() else []


class RecordSource:
    """A prepared data set, a `sources.Source`. Records of a batch are read at once.

    Attributes:
      passed_over: arrays of a record that `read` leaves out.
    """

    def __init__(self, folder: epath.Path, manifest: Manifest):
        self.folder, self.manifest = folder, manifest
        self.passed_over: frozenset[str] = frozenset()
        self._paths = [str(folder / shard.file) for shard in manifest.shards]
        counts = [shard.count for shard in manifest.shards]
        self._ends = np.cumsum(counts)
        self._threads: concurrent.futures.ThreadPoolExecutor | None = None
        self._lock = threading.Lock()
        self._record_s = float("inf")  # that a record took at least

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of an image, or of the latents that moments describe."""
        return self.manifest.example_shape

    @property
    def num_classes(self) -> int:
        """Number of labels; 0: none."""
        return len(self.manifest.classes)

    def __len__(self) -> int:
        return self.manifest.count

    def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Read examples by number: (n,) ints in [0, len) → arrays by name, (n, …) each.

        Raises:
          UserError: a shard is damaged or cannot be read; it is named.
        """
        indices = np.asarray(indices, np.int64)
        shards = np.searchsorted(self._ends, indices, side="right")
        rows = indices - np.concatenate([[0], self._ends])[shards]
        records = np.empty((len(indices), record_size(self.manifest.arrays)), np.uint8)

        def fill(places: np.ndarray) -> None:
            for shard in np.unique(shards[places]).tolist():
                path, some = self._paths[shard], places[shards[places] == shard].tolist()
                for place, record in zip(some, self._fetch(path, rows[some].tolist()), strict=True):
                    if len(record) != records.shape[1]:
                        raise _damaged(path, f"a record has {len(record)} bytes")
                    records[place] = np.frombuffer(record, np.uint8)

        def timed(places: np.ndarray) -> float:
            started = time.monotonic()
            fill(places)
            return (time.monotonic() - started) / max(len(places), 1)

        # Far away, behind `gs://` or a mount, all answers are waited for together; how far it is
        # the last batch has shown.
        reads = _READS_NEAR if self._record_s < _NEAR_S else CONCURRENT_READS
        order = np.argsort(shards, kind="stable")
        parts = np.array_split(order, max(1, min(len(order), reads)))
        self._record_s = min(self._pool().map(timed, parts))
        return decode_records(self.manifest.arrays, records, self.passed_over)

    def _fetch(self, path: str, rows: Sequence[int]) -> Sequence[bytes]:
        """Read records of a shard; slow on remote storage."""
        try:
            return _reader(path, files.version(path)).read(rows)
        except (RuntimeError, ValueError, IndexError, OSError) as error:
            raise _unreadable(path, one_line(error, 120)) from error

    def _pool(self) -> concurrent.futures.ThreadPoolExecutor:
        with self._lock:
            if self._threads is None:
                self._threads = concurrent.futures.ThreadPoolExecutor(
                    CONCURRENT_READS, thread_name_prefix="records"
                )
            return self._threads


def _unreadable(path: str, reason: str) -> UserError:
    """Return the error of a shard: one that may not be read is whole, and not to be deleted."""
    if "://" not in path and os.path.exists(path) and not os.access(path, os.R_OK):
        return UserError(f"{path} may not be read (permission denied): ask its owner")
    return _damaged(path, reason)


def _damaged(path: str, reason: str) -> UserError:
    return UserError(
        f"{path} is damaged or not there ({reason}): delete it, and run the command that made it "
        "again (diffit prepare, diffit encode), which makes what is missing"
    )


@functools.lru_cache(maxsize=4096)
def _reader(path: str, version: tuple[int, ...]) -> Any:
    reader = array_record_module.ArrayRecordReader(
        path, options=_READER_OPTIONS, file_reader_buffer_size=32768
    )
    if not reader.ok():
        raise OSError("it cannot be opened")
    return reader


def open_records(folder: epath.PathLike, split: str) -> RecordSource:
    """Open a split of a prepared data set.

    Args:
      folder: that holds it, local or `gs://`.
      split: of it.

    Raises:
      UserError: there is no such data set, or shards are missing.
    """
    folder = epath.Path(folder)
    manifest = read_manifest(folder, split)
    there = {entry.name for entry in folder.iterdir()}
    missing = [shard.file for shard in manifest.shards if shard.file not in there]
    if missing:
        raise _damaged(f"{folder}/{missing[0]}", f"{len(missing)} shards are missing")
    return RecordSource(folder, manifest)


def read_labels(source: Any) -> np.ndarray:
    """Read the labels of all examples of a `Source`, (len,) int32."""
    size = 4096
    starts = range(0, len(source), size)
    parts = [source.read(np.arange(a, min(a + size, len(source))))["label"] for a in starts]
    return np.concatenate(parts)
