"""Images as people have them: an index of a source, and its images from worker processes.

`open_images` indexes a source, a `Loader` decodes and preprocesses its images in their order.
"""

import collections
import concurrent.futures
import dataclasses
import glob
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from diffit_jax.data import records
from diffit_jax.errors import UserError, one_line
from diffit_jax.ingest import containers, locations, tables
from diffit_jax.ingest.decoding import DecodeError, Preprocessing, decode, frame
from diffit_jax.ingest.locations import Index, Location
from diffit_jax.ingest.shards import Content
from diffit_jax.runtime import files, hub, interruption

FEWEST = 10  # images of a data set: with fewer a wrong folder was named
_CHUNK, _CHUNK_BYTES = 256, 2**21  # images that a process decodes at once, at most
_CHUNKS_AHEAD = 3  # of each process


def open_images(
    path: epath.PathLike,
    split: str = "train",
    unlabelled: bool = False,
    fewest: int = FEWEST,
    tar_classes: bool = False,
) -> Index:
    """Index the images of a source.

    Args:
      path: a folder (of class folders or flat, of tars, of Parquet files, of CIFAR-10's batches,
        that tensorflow-datasets or `prepare` wrote), a zip, a tar, a Parquet file, a CIFAR-10
        archive, or a pattern with `*` of several files; absolute, local or `gs://`.
      split: which one, where a source has several.
      unlabelled: whether to leave labels out.
      fewest: how many there must be.
      tar_classes: whether each of several tars is a class, even if they look like parts of one set.

    Raises:
      UserError: there is no such source, or it holds no images or fewer than `fewest`, or labels
        that cannot be determined.
    """
    index = _open(epath.Path(path), _Asked(split, unlabelled, tar_classes))
    if len(index) < fewest and index.kind != "record":  # a prepared split was counted before
        raise UserError(
            f"{path} has {len(index)} images, a data set needs {fewest} or more: name the folder "
            "or file that has them all"
        )
    return index


class _Asked(NamedTuple):
    """What was asked for, see `open_images`."""

    split: str
    unlabelled: bool
    tar_classes: bool


def _open(path: epath.Path, asked: _Asked) -> Index:
    try:
        exists = path.exists()
        if exists and path.is_dir():
            return _open_folder(path, asked)
        found = [path] if exists else _matching(path)
        if not found and glob.has_magic(path.name):
            raise UserError(f"there is no file {path}: correct the pattern")
        if not found:
            hint = hub.pattern_hint(path.parent)
            raise UserError(f"there is no {path}{hint}: name a folder, or an archive of images")
        if not exists and len(found) == 1:
            return _open(found[0], asked)
        if exists and path.name.endswith((".tar.gz", ".tgz")):
            cifar = tables.cifar_files(path)
            if cifar:
                return tables.index_cifar(str(path), cifar, asked.split, asked.unlabelled)
        return _open_files(found, asked)
    except PermissionError as error:
        raise UserError(
            f"{error.filename or path} may not be read (permission denied): ask its owner, or name "
            "another source"
        ) from error
    except OSError as error:
        raise UserError(
            f"{error.filename or path} cannot be read ({error.strerror or error}): look at the "
            "disk or network"
        ) from error


def _matching(path: epath.Path) -> list[epath.Path]:
    """Return the files whose name matches the last part of a path, which is not there itself."""
    if not glob.has_magic(path.name):
        return []
    if files.is_local(path):
        found = glob.glob(os.path.join(glob.escape(str(path.parent)), path.name))
    else:
        found = path.parent.glob(path.name)
    return sorted(map(epath.Path, found), key=str)


def _open_files(paths: Sequence[epath.Path], asked: _Asked) -> Index:
    for path in paths:
        if files.is_local(path) and not os.path.isfile(path):  # it would be waited for
            raise UserError(f"{path} is a pipe or device: name a folder, or an archive of images")
    kinds = {_kind(path) for path in paths}
    if len(kinds) > 1:
        raise UserError(f"{paths[0]} and others are files of different kinds: name one kind")
    (kind,) = kinds
    if kind in ("parquet", "arrow"):
        return tables.index_tables(paths, asked.unlabelled)
    if kind == "tar":
        return containers.index_tars(paths, asked.unlabelled, asked.tar_classes)
    if kind == "zip":
        if len(paths) > 1:
            raise UserError(f"{paths[0]} and others are several zip files: name one")
        return containers.index_zip(paths[0], asked.unlabelled)
    if "tfrecord" in paths[0].name:
        raise _tfrecords(paths[0])
    raise UserError(
        f"{paths[0]} is neither a folder nor a zip, tar or Parquet file: name one of these"
    )


def _kind(path: epath.Path) -> str:
    for kind in ("parquet", "arrow", "tar", "zip"):
        if path.name.endswith(f".{kind}"):
            return kind
    return "tar" if path.name.endswith((".tar.gz", ".tgz")) else "other"


def _open_folder(folder: epath.Path, asked: _Asked) -> Index:
    split, unlabelled = asked.split, asked.unlabelled
    if (folder / tables.SAVED_SPLITS).exists() or (folder / tables.SAVED_STATE).exists():
        return tables.index_saved(folder, split, unlabelled)
    if (folder / "dataset_info.json").exists():
        return tables.index_tfds(folder, split, unlabelled)
    if (folder / records.manifest_name(split)).exists():
        return _prepared(folder, split, unlabelled)
    entries = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    if any(entry.name.startswith(("data_batch_1", "test_batch")) for entry in entries):
        cifar = tables.cifar_files(folder)
        if cifar:
            return tables.index_cifar(str(folder), cifar, split, unlabelled)
    for end in (".parquet", ".arrow", ".tar"):
        found = sorted((entry for entry in entries if entry.name.endswith(end)), key=str)
        if found:
            return _open_files(_of_split(found, split), asked)
    if any("tfrecord" in entry.name for entry in entries):
        raise _tfrecords(folder)
    data = folder / "data"  # where the hub's data sets have their tables
    if data.is_dir() and any(entry.name.endswith(".parquet") for entry in data.iterdir()):
        return _open_folder(data, asked)
    return containers.index_folder(folder, unlabelled)


def _of_split(paths: Sequence[epath.Path], split: str) -> Sequence[epath.Path]:
    """Select the files of a split, where names begin with those of splits."""
    known = ("train", "test", "validation", "val", "dev")
    named = [path for path in paths if path.name.lower().startswith(known)]
    if not named:
        return paths
    wanted = [path for path in named if path.name.lower().startswith(split)]
    if not wanted:
        others = sorted({path.name.partition("-")[0] for path in named})
        raise UserError(
            f"{paths[0].parent} has no files of split {split!r}, only {', '.join(others)}: change "
            "--split"
        )
    return wanted


def _prepared(folder: epath.Path, split: str, unlabelled: bool) -> Index:
    """Index a data set that `prepare` wrote."""
    source = records.open_records(folder, split)
    if records.IMAGE not in source.manifest.arrays:
        raise UserError(f"{folder} holds latents, not images: name their source")
    counts = [shard.count for shard in source.manifest.shards]
    shards = tuple(str(folder / shard.file) for shard in source.manifest.shards)
    rows = [(file, row, 0) for file, count in enumerate(counts) for row in range(count)]
    classes = () if unlabelled else source.manifest.classes
    labels = records.read_labels(source) if classes else None
    names = [f"{split}:{number}" for number in range(len(rows))]
    shape = source.manifest.arrays[records.IMAGE].shape
    return Index(
        "record",
        shards,
        np.array(rows, np.int64),
        names,
        labels,
        classes,
        shape=shape,
        crop=source.manifest.crop,
        stamps=locations.stamps_of(
            [shard.sha256 for shard in source.manifest.shards for _ in range(shard.count)]
        ),
    )


def _tfrecords(path: epath.Path) -> UserError:
    return UserError(
        f"{path} holds TFRecords, which cannot be read without TensorFlow: {tables.AS_ARRAY_RECORD}"
    )


# --- Loading

# Number and name of an image, and its place or pixels.
_Task = tuple[int, str, Location | np.ndarray]


@dataclasses.dataclass(frozen=True)
class Loaded:
    """An image, or why there is none.

    Attributes:
      number: in its index.
      pixels: (H, W, C) uint8; None: it is broken.
      reason: why.
      notes: what was unusual, see `decode`.
    """

    number: int
    pixels: np.ndarray | None
    reason: str = ""
    notes: Sequence[str] = ()


class Loader:
    """Decodes images in processes of their own. Use it as a context manager."""

    def __init__(self, index: Index, preprocessing: Preprocessing, workers: int):
        """Start the processes.

        Args:
          index: of the source.
          preprocessing: of the images.
          workers: how many processes; 0: this one alone.
        """
        self._index, self._preprocessing, self._workers = index, preprocessing, workers
        self._bytes = 2**14  # of an image, until one was seen
        self._pool = None
        if workers:
            self._pool = concurrent.futures.ProcessPoolExecutor(
                workers,
                multiprocessing.get_context("spawn"),
                initializer=_begin,
                initargs=(os.getpid(),),
            )

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def first_shape(self) -> tuple[int, ...]:
        """Return the shape (H, W, C) of the first image that can be read.

        Raises:
          UserError: none of the first hundred can.
        """
        for number in range(min(100, len(self._index))):
            pixels = self._load_here(number).pixels
            if pixels is not None:
                self._bytes = pixels.nbytes
                return pixels.shape
        raise UserError(
            f"none of the first {min(100, len(self._index))} images can be read (the first: "
            f"{self._index.names[0]}: {self._load_here(0).reason}): look at the source"
        )

    def load(self, numbers: Sequence[int]) -> Iterator[Loaded]:
        """Yield images of the index in the order of `numbers`, read ahead within the memory.

        Raises:
          UserError: a process was ended from outside, or the files cannot be read.
        """
        if self._pool is None:
            yield from map(self._load_here, numbers)
            return
        size = max(1, min(_CHUNK, _CHUNK_BYTES // self._bytes))
        waiting: collections.deque[Any] = collections.deque()
        chunks = (numbers[start : start + size] for start in range(0, len(numbers), size))
        try:
            for chunk in chunks:
                waiting.append(self._submit(chunk))
                if len(waiting) > self._workers * _CHUNKS_AHEAD:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        except BrokenProcessPool as error:
            raise UserError(
                "a process that decodes images was ended (was memory short? or has the script "
                "that calls this no `if __name__ == '__main__'`?): use fewer --workers, or 0"
            ) from error
        finally:
            for future in waiting:
                future.cancel()

    def contents(self, numbers: Sequence[int]) -> str:
        """Decode images, and return a digest of what they are, see `shards.Content`."""
        content = Content()
        for loaded in self.load(numbers):
            content.add(loaded.pixels, loaded.reason)
        return content.hexdigest()

    def _submit(self, chunk: Sequence[int]) -> Any:
        assert self._pool is not None
        tasks = [self._task(number) for number in chunk]
        return self._pool.submit(_load_chunk, tasks, self._preprocessing)

    def _task(self, number: int) -> _Task:
        index = self._index
        location = index.location(number) if index.pixels is None else index.pixels[number]
        return number, index.names[number], location

    def _load_here(self, number: int) -> Loaded:
        return _load(self._task(number), self._preprocessing)


def _load_chunk(tasks: Sequence[_Task], preprocessing: Preprocessing) -> list[Loaded]:
    return [_load(task, preprocessing) for task in tasks]


def _load(task: _Task, preprocessing: Preprocessing) -> Loaded:
    number, name, location = task
    try:
        is_array = isinstance(location, np.ndarray)
        content = location if is_array else locations.read(location, name)
        if isinstance(content, np.ndarray):
            pixels, notes = frame(content, preprocessing)
        else:
            pixels, notes = decode(content, preprocessing, name)
    except DecodeError as error:
        return Loaded(number, None, str(error))
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        return Loaded(number, None, error.strerror or type(error).__name__)
    except OSError as error:  # a disk or network that fails would make every image a broken one
        raise UserError(
            f"{name} cannot be read ({error.strerror or one_line(error, 120)}): look at the disk "
            "or network, then run the same command again"
        ) from error
    return Loaded(number, pixels, notes=notes)


def _begin(parent: int) -> None:
    """Initialise a worker: it ignores Ctrl-C, and ends with its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in interruption.ENDING:
        signal.signal(number, signal.SIG_DFL)
    signal.set_wakeup_fd(-1)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
