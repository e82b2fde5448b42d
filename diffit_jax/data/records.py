"""Prepared data sets: ArrayRecord shards of arrays with labels, and a manifest beside them.

    DATA_DIR/NAME/train.manifest.json
    DATA_DIR/NAME/train-00000-of-00157.array_record …

A record is a label, int32, and an array, both little-endian; its shape and dtype stand in the
manifest. Arrays are images (H, W, C) uint8, or moments of latents (orientations, h, w, 2c) float16
or float32: mean and log variance of an autoencoder's posterior, unscaled, of the picture and of its
mirror image.

Imported by the processes that decode beside the chips: no jax here.
"""

import concurrent.futures
import dataclasses
import functools
import json
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from array_record.python import array_record_module
from etils import epath

from diffit_jax.errors import UserError

IMAGES, MOMENTS = "images", "moments"
FORMAT = 1
WRITER_OPTIONS = "group_size:1,uncompressed"  # a record is read alone; pixels and floats stay big
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"  # the library's, for random access
_LABEL = np.dtype("<i4")
READS_AT_ONCE = 64  # of a batch: `gs://` answers after 60 ms, however many ask
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
class Manifest:
    """What a data set holds.

    Attributes:
      kind: `IMAGES` or `MOMENTS`.
      shape, dtype: of the arrays.
      classes: names of the labels; none for data without labels.
      count: of examples.
      class_counts: of each class.
      source: where they are from, a mapping of JSON values.
      crop: how pictures were brought to one size, likewise.
      skipped: pictures that could not be read: name and reason of each.
      remarks: how many pictures were unusual, by kind.
      shards: in their order.
      autoencoder: of moments: its hash, `latent_mean` and `latent_scale` …, likewise.
      statistics: of moments: mean and standard deviation of each channel of unscaled latents.
      format: of all this.
    """

    kind: str
    shape: tuple[int, ...]
    dtype: str
    classes: tuple[str, ...]
    count: int
    class_counts: tuple[int, ...]
    source: Mapping[str, Any]
    crop: Mapping[str, Any]
    skipped: Sequence[tuple[str, str]]
    remarks: Mapping[str, int]
    shards: tuple[Shard, ...]
    autoencoder: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    statistics: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    format: int = FORMAT

    @property
    def example_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of an image, or of a latent."""
        if self.kind == IMAGES:
            height, width, channels = self.shape
            return height, width, channels
        _, height, width, channels = self.shape
        return height, width, channels // 2

    def to_json(self) -> str:
        """The text of its file."""
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Manifest":
        """The inverse. Raises `ValueError`, `TypeError` or `KeyError` for anything else."""
        given = dict(json.loads(text))
        if given.get("format") != FORMAT:
            raise ValueError(f"its format is {given.get('format')!r}, known is {FORMAT}")
        shards = tuple(Shard(**shard) for shard in given.pop("shards"))
        for name in ("shape", "classes", "class_counts"):
            given[name] = tuple(given[name])
        given["skipped"] = tuple((name, reason) for name, reason in given["skipped"])
        manifest = cls(**given, shards=shards)
        sides = {IMAGES: 3, MOMENTS: 4}[manifest.kind]
        if len(manifest.shape) != sides or sum(shard.count for shard in shards) != manifest.count:
            raise ValueError("its shape or its counts do not fit together")
        return manifest


def manifest_name(split: str) -> str:
    """Of the file of a split."""
    return f"{split}.manifest.json"


def shard_name(split: str, number: int, total: int) -> str:
    """Of a shard's file."""
    return f"{split}-{number:05d}-of-{total:05d}.array_record"


def encode_record(label: int, array: np.ndarray) -> bytes:
    """A record's bytes."""
    return np.array(label, _LABEL).tobytes() + array.astype(array.dtype.newbyteorder("<")).tobytes()


def decode_record(record: bytes, shape: Sequence[int], dtype: np.dtype) -> tuple[int, np.ndarray]:
    """Label and array of a record. Raises `ValueError` if it has another size."""
    label = int(np.frombuffer(record, _LABEL, 1)[0])
    return label, np.frombuffer(record, dtype.newbyteorder("<"), -1, _LABEL.itemsize).reshape(shape)


def read_record(
    path: str, row: int, shape: Sequence[int], dtype: np.dtype
) -> tuple[int, np.ndarray]:
    """One record of a shard."""
    (record,) = _reader(path).read([row])
    return decode_record(record, shape, dtype)


def read_manifest(folder: epath.PathLike, split: str) -> Manifest:
    """The manifest of a split.

    Raises:
      UserError: there is none, or it is damaged.
    """
    folder = epath.Path(folder)
    path = folder / manifest_name(split)
    try:
        return Manifest.from_json(path.read_text())
    except FileNotFoundError as error:
        begun = folder / lines_name(split)
        others = sorted(other.name.partition(".")[0] for other in _manifests(folder))
        remedy = "prepare or encode it first (launch/prepare.py, launch/encode.py)"
        if begun.exists():
            remedy = "it is not complete yet: run the command that made it again"
        elif others:
            remedy = f"it has {', '.join(others)} only"
        raise UserError(f"there is no data set {path}: {remedy}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error})") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(
            f"{path} is damaged ({type(error).__name__}: {reason}): delete it, and run the command "
            "that made it again; finished shards are kept"
        ) from error


def lines_name(split: str) -> str:
    """Of the folder of what is known of finished shards, see `shards.Shards`."""
    return f"{split}.lines"


def _manifests(folder: epath.Path) -> list[epath.Path]:
    return list(folder.glob("*.manifest.json")) if folder.exists() else []


class RecordSource:
    """A prepared data set, a `sources.Source`. Records of a batch are read at once."""

    def __init__(self, folder: epath.Path, manifest: Manifest):
        self.folder, self.manifest = folder, manifest
        self._paths = [str(folder / shard.file) for shard in manifest.shards]
        counts = [shard.count for shard in manifest.shards]
        self._ends = np.cumsum(counts)
        self._dtype = np.dtype(manifest.dtype)
        self._threads: concurrent.futures.ThreadPoolExecutor | None = None
        self._lock = threading.Lock()
        self._record_s = float("inf")  # that a record took at least

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.manifest.example_shape

    @property
    def num_classes(self) -> int:
        return len(self.manifest.classes)

    def __len__(self) -> int:
        return self.manifest.count

    def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """(n,) ints in [0, len) → `label` (n,) int32, and `image` (n, H, W, C) uint8 or `moments`
        (n, orientations, h, w, 2c) of the manifest's dtype.

        Raises:
          UserError: a shard is damaged or cannot be read; it is named.
        """
        indices = np.asarray(indices, np.int64)
        files = np.searchsorted(self._ends, indices, side="right")
        rows = indices - np.concatenate([[0], self._ends])[files]
        size = int(np.prod(self.manifest.shape)) * self._dtype.itemsize
        records = np.empty((len(indices), _LABEL.itemsize + size), np.uint8)

        def fill(places: np.ndarray) -> None:
            for file in np.unique(files[places]).tolist():
                path, some = self._paths[file], places[files[places] == file].tolist()
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
        reads = _READS_NEAR if self._record_s < _NEAR_S else READS_AT_ONCE
        order = np.argsort(files, kind="stable")
        parts = np.array_split(order, max(1, min(len(order), reads)))
        self._record_s = min(self._pool().map(timed, parts))
        labels = records[:, : _LABEL.itemsize].copy().view(_LABEL)[:, 0].astype(np.int32)
        arrays = np.ascontiguousarray(records[:, _LABEL.itemsize :])
        arrays = arrays.view(self._dtype.newbyteorder("<")).reshape(-1, *self.manifest.shape)
        name = "image" if self.manifest.kind == IMAGES else "moments"
        return {name: arrays.astype(self._dtype, copy=False), "label": labels}

    def read_labels(self) -> np.ndarray:
        """(len,) int32: of all examples."""
        size = 4096
        starts = range(0, len(self), size)
        parts = [self.read(np.arange(a, min(a + size, len(self))))["label"] for a in starts]
        return np.concatenate(parts)

    def _fetch(self, path: str, rows: Sequence[int]) -> Sequence[bytes]:
        """Records of a shard: what is slow where it is far away."""
        try:
            return _reader(path).read(rows)
        except (RuntimeError, ValueError, IndexError, OSError) as error:
            raise _damaged(path, " ".join(str(error).split())[:120]) from error

    def _pool(self) -> concurrent.futures.ThreadPoolExecutor:
        with self._lock:
            if self._threads is None:
                self._threads = concurrent.futures.ThreadPoolExecutor(
                    READS_AT_ONCE, thread_name_prefix="records"
                )
            return self._threads


def _damaged(path: str, reason: str) -> UserError:
    return UserError(
        f"{path} is damaged or not there ({reason}): delete it, and run the command that made it "
        "again (launch/prepare.py, launch/encode.py), which makes what is missing"
    )


@functools.lru_cache(maxsize=4096)
def _reader(path: str) -> Any:
    reader = array_record_module.ArrayRecordReader(
        path, options=_READER_OPTIONS, file_reader_buffer_size=32768
    )
    if not reader.ok():
        raise OSError("it cannot be opened")
    return reader


def open_records(folder: epath.PathLike, split: str) -> RecordSource:
    """A split of a prepared data set.

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
