"""The index of a source: the locations of its images, and how one is read.

Imported by the worker processes that decode: no jax here.
"""

import collections
import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import os
import struct
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any, NamedTuple, Protocol

import numpy as np
from etils import epath

from diffit_jax.data import records
from diffit_jax.errors import UserError, one_line
from diffit_jax.ingest.decoding import DecodeError
from diffit_jax.runtime import files

_OPEN_FILES = 16  # of a process at once
_READ_AGAIN, _ROWS_READ_AGAIN = 64, 4  # images of an index whose bytes are evidence too
_OPTIONAL = ("labels", "pixels", "stamps")  # arrays of an index
_MOST_BYTES = 2**30  # of an unpacked image file
_ENDS = 2**16  # bytes at both ends of a table that stand for it
_DESCRIPTOR = 8  # bytes behind a zip's entry: a signature, which may be missing, and its checksum
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")  # of a zip's entry, APPNOTE.TXT 4.3.7


class Location(NamedTuple):
    """The location of one image.

    Attributes:
      kind: "file": all of a file; "range": a part of one (of a tar); "zip": an entry; "table": a
        row of a Parquet file; "tfds": an example
        of a data set of tensorflow-datasets; "record": an image of a prepared data set; "pixels":
        there is no file, see `Index.pixels`.
      path: of the file.
      first, second: offset and size of a range or of a zip's entry (its header's offset, and how
        many bytes it has packed); row group and row in it of a table; number of a record.
    """

    kind: str
    path: str
    first: int = 0
    second: int = 0


@dataclasses.dataclass(frozen=True)
class Index:
    """The images of a source in their order.

    Attributes:
      kind: of all places.
      files: that hold them.
      locations: (n, 3) int64: number of the file, and the two numbers of a `Location`.
      names: of images, for people; each once.
      labels: (n,) int32, None if there are none.
      classes: their names.
      messages: about the source, for the log.
      pixels: (n, H, W, C) uint8 of a source whose images are no files.
      shape: (H, W, C) of records.
      crop: how they were brought to it, JSON values by name.
      about: what it is an index of, for whoever keeps it.
      stamps: (n,) uint64, what is known of each image's content without reading it: of files on
        disks size, time and inode, of those in buckets what the bucket says, of archives' entries
        the archive's own sums. None where nothing is.
    """

    kind: str
    files: tuple[str, ...]
    locations: np.ndarray
    names: list[str]
    labels: np.ndarray | None
    classes: tuple[str, ...] = ()
    messages: tuple[str, ...] = ()
    pixels: np.ndarray | None = None
    shape: tuple[int, ...] = ()
    crop: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    about: str = ""
    stamps: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.locations)

    def location(self, index: int) -> Location:
        """Return the location of an image."""
        file, first, second = self.locations[index].tolist()
        return Location(self.kind, self.files[file] if self.files else "", first, second)

    def digest(self) -> str:
        """Digest names, labels, and sizes as far as they are known: equal for the same images."""
        digest = hashlib.sha256("\0".join(self.names).encode(errors="surrogateescape"))
        digest.update(b"" if self.labels is None else self.labels.astype("<i4").tobytes())
        digest.update(repr(self.classes).encode(errors="surrogateescape"))
        if self.kind in ("range", "zip"):
            digest.update(self.locations[:, 2].astype("<i8").tobytes())
        if self.pixels is not None:
            digest.update(np.ascontiguousarray(self.pixels).tobytes())
        return digest.hexdigest()[:32]

    def evidence(self, numbers: Sequence[int]) -> str:
        """Digest what is cheaply known of the content of some images.

        Their stamps, and the bytes of those among them that belong to a sample of the index.
        """
        digest = hashlib.sha256()
        if self.stamps is not None:
            digest.update(self.stamps[np.asarray(numbers)].astype("<u8").tobytes())
        for number in numbers:
            if number in self._sample:
                digest.update(self._content_of(number))
        return digest.hexdigest()[:32]

    @functools.cached_property
    def _sample(self) -> frozenset[int]:
        if not self.files and self.pixels is None:  # read by others
            return frozenset()
        # To read a row of a table is to read its group, of a thousand.
        size = min(_ROWS_READ_AGAIN if self.kind == "table" else _READ_AGAIN, len(self))
        chosen = np.random.default_rng(0).choice(len(self), size, replace=False)
        return frozenset(chosen.tolist())

    def _content_of(self, number: int) -> bytes:
        if self.pixels is not None:
            return hashlib.sha256(self.pixels[number].tobytes()).digest()
        try:
            content = read(self.location(number))
        except (OSError, DecodeError) as error:
            return type(error).__name__.encode()
        raw = content if isinstance(content, bytes) else content.tobytes()
        return hashlib.sha256(raw).digest()

    def to_bytes(self) -> bytes:
        """Return the index as the content of a file, for other processes."""
        content = io.BytesIO()
        metadata = {
            "kind": self.kind,
            "files": self.files,
            "classes": self.classes,
            "said": self.messages,
            "shape": self.shape,
            "crop": dict(self.crop),
            "about": self.about,
        }
        arrays: dict[str, Any] = {
            "facts": np.array(json.dumps(metadata)),
            "places": self.locations,
            "names": np.frombuffer("\0".join(self.names).encode(errors="surrogateescape"), "u1"),
        }
        for name in _OPTIONAL:
            if getattr(self, name) is not None:
                arrays[name] = getattr(self, name)
        np.savez(content, **arrays)
        return content.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes) -> "Index":
        """Invert `to_bytes`."""
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            metadata = json.loads(str(arrays["facts"]))
            names = arrays["names"].tobytes().decode(errors="surrogateescape").split("\0")
            labels, pixels, stamps = (
                arrays[name] if name in arrays.files else None for name in _OPTIONAL
            )
            files, classes, messages, shape = (
                tuple(metadata[name]) for name in ("files", "classes", "said", "shape")
            )
            locations, rest = arrays["places"], (metadata["crop"], metadata["about"])
        return cls(
            metadata["kind"],
            files,
            locations,
            names,
            labels,
            classes,
            messages,
            pixels,
            shape,
            *rest,
            stamps,
        )


def stamps_of(texts: Sequence[str]) -> np.ndarray:
    """Return (n,) uint64, a hash of each text."""
    digests = [hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts]
    return np.frombuffer(b"".join(digests), "<u8").astype(np.uint64)


def stamp_of_file(path: epath.PathLike) -> str:
    """Return what is known of a file's content without reading it; another one has another."""
    if files.is_local(path):  # a device has another number after a restart
        _, *facts = files.version(path)
        return " ".join(map(str, facts))
    import fsspec

    system, name = fsspec.core.url_to_fs(os.fspath(path))
    return _stamp_in_bucket(system.info(name))


class Listed(NamedTuple):
    """An entry of a folder.

    Attributes:
      name: without the folder.
      kind: "file", "folder", "lost link" or "other": a pipe or device.
      stamp: returns what `stamp_of_file` does.
    """

    name: str
    kind: str
    stamp: Callable[[], str]


def listed(folder: epath.Path) -> Iterator[Listed]:
    """Yield the entries of a folder; in a bucket with one question for all. Raises `OSError`."""
    if files.is_local(folder):
        for entry in os.scandir(folder):
            kind = "folder" if entry.is_dir() else "file" if entry.is_file() else "other"
            if kind == "other" and entry.is_symlink():
                kind = "lost link"
            yield Listed(entry.name, kind, functools.partial(stamp_of_file, folder / entry.name))
        return
    import fsspec

    system, path = fsspec.core.url_to_fs(os.fspath(folder))
    for known in system.ls(path, detail=True):
        name = known["name"].rstrip("/").rpartition("/")[2]
        kind = "folder" if known["type"] == "directory" else "file"
        if name and known["name"].strip("/") != path.strip("/"):  # some list the folder itself
            yield Listed(name, kind, functools.partial(_stamp_in_bucket, known))


def _stamp_in_bucket(known: Mapping[str, Any]) -> str:
    kinds = ("size", "generation", "md5Hash", "etag", "ETag", "mtime", "created")
    return " ".join(str(known.get(kind)) for kind in kinds)


def stamp_of_table(path: epath.Path) -> str:
    """Return size and a digest of both ends of a table: its metadata stand there."""
    size = files.size(path)
    ends = _range(str(path), 0, _ENDS) + _range(str(path), max(0, size - _ENDS), _ENDS)
    return f"{size} {hashlib.sha256(ends).hexdigest()}"


def read(location: Location, name: str = "") -> bytes | np.ndarray:
    """Read the bytes of an image file; of other kinds perhaps (H, W, C) uint8.

    `name`: its name in the index, to be compared with that in a zip's entry; "": it is not.

    Raises:
      OSError: the file cannot be read.
      DecodeError: its content cannot be unpacked.
      UserError: a zip whose directory has another name for its entry than the entry.
    """
    if location.kind == "file":
        return epath.Path(location.path).read_bytes()
    if location.kind == "table":
        return _row(location)
    if location.kind == "tfds":
        image = tfds_source(location.path)[location.first]["image"]
        return image if isinstance(image, bytes) else np.asarray(image)
    if location.kind == "record":
        return records.read_record(location.path, location.first)[records.IMAGE]
    if location.kind == "range":
        return _range(location.path, location.first, location.second)
    return _zip_entry(location, name)


def _zip_entry(location: Location, name: str) -> bytes:
    # The header is of unknown length: with a name and an extra field, which are short.
    around = _LOCAL_HEADER.size + 2**10 + _DESCRIPTOR
    content = _range(location.path, location.first, location.second + around)
    if len(content) < _LOCAL_HEADER.size or content[:4] != b"PK\3\4":
        raise UserError(
            f"{location.path} is not a whole zip file (there is no entry {name!r:.80} where its "
            "directory has it): fetch it again"
        )
    _, _, flags, method, _, _, crc, *_, length, extra = _LOCAL_HEADER.unpack(
        content[: _LOCAL_HEADER.size]
    )
    if flags & 1:
        raise DecodeError("it is encrypted")
    start = _LOCAL_HEADER.size + length + extra
    raw = content[_LOCAL_HEADER.size : _LOCAL_HEADER.size + length]
    theirs = raw.decode("utf-8" if flags & 0x800 else "cp437", errors="replace")
    if name and theirs.replace("\\", "/") != name:
        raise UserError(
            f"{location.path} is not a whole zip file (its directory has {name!r:.80} for "
            f"{theirs!r:.80}): fetch it again"
        )
    packed = content[start : start + location.second + _DESCRIPTOR]
    if len(packed) < location.second:
        packed = _range(location.path, location.first + start, location.second + _DESCRIPTOR)
    packed, behind = packed[: location.second], packed[location.second :]
    if flags & 8:  # written as a stream: the checksum follows
        crc = int.from_bytes(behind.removeprefix(b"PK\7\10")[:4], "little")
    content = _unpacked(packed, method)
    if zlib.crc32(content) != crc:
        raise DecodeError("its entry in the zip is damaged (another checksum)")
    return content


def _unpacked(packed: bytes, method: int) -> bytes:
    if method == 0:
        return packed
    if method != 8:
        raise DecodeError(f"it is packed by method {method} of zip, only 0 and 8 are known")
    try:
        unpacker = zlib.decompressobj(-15)
        content = unpacker.decompress(packed, _MOST_BYTES)
    except zlib.error as error:
        raise DecodeError(f"its entry in the zip is damaged ({error})") from error
    if not unpacker.eof:
        raise DecodeError("its entry in the zip is damaged (it does not end where it should)")
    return content


def _range(path: str, start: int, size: int) -> bytes:
    """Read a part of a file."""
    if "://" in path:  # a file object there would read megabytes ahead
        import fsspec

        system, name = fsspec.core.url_to_fs(path)
        return system.cat_file(name, start=start, end=start + size)
    with _open_file(path) as file:
        file.seek(start)
        return file.read(size)


def _row(location: Location) -> bytes:
    path = location.path
    cells = _row_group(path, location.first, files.version(path))
    if location.second >= len(cells):
        raise DecodeError("its row group is damaged (it has fewer rows than the file says)")
    content = cells[location.second]
    if not content:
        raise DecodeError("empty file")
    return content


@functools.lru_cache(maxsize=2)
def _row_group(path: str, group: int, version: tuple[int, ...]) -> Sequence[bytes | None]:
    """Read the images of a row group (of Arrow: of a batch): they are asked for in turn."""
    with opened_table(path) as table:
        cells = table.read(group, image_column(table.schema))
        return cells.field("bytes").to_pylist()


class Table(Protocol):
    """A Parquet or Arrow file.

    Attributes:
      schema: of pyarrow.
      counts: rows of each row group, or batch.
    """

    schema: Any
    counts: list[int]

    def read(self, group: int, column: str | None) -> Any:
        """Return the cells of a column in a row group, an array of pyarrow."""
        ...


class _Parquet:
    def __init__(self, file: IO[bytes]):
        import pyarrow.parquet

        # Checksums of pages are checked where the writer made some.
        self._file = pyarrow.parquet.ParquetFile(file, page_checksum_verification=True)
        self.schema, metadata = self._file.schema_arrow, self._file.metadata
        groups = range(self._file.num_row_groups)
        self.counts = [metadata.row_group(group).num_rows for group in groups]

    def read(self, group: int, column: str | None) -> Any:
        table = self._file.read_row_group(group, columns=[column])
        return table.column(0).combine_chunks()


class _Arrow:
    def __init__(self, file: IO[bytes], path: str):
        import pyarrow

        # Of a disk the batches are not copied to memory.
        source = pyarrow.memory_map(path) if files.is_local(path) else file
        if source.read(6) == b"ARROW1":
            batches = pyarrow.ipc.open_file(source)
            self._batches = [batches.get_batch(n) for n in range(batches.num_record_batches)]
        else:
            source.seek(0)
            batches = pyarrow.ipc.open_stream(source)
            self._batches = list(batches)
        for batch in self._batches:
            batch.validate(full=True)
        self.schema = batches.schema
        self.counts = [batch.num_rows for batch in self._batches]

    def read(self, group: int, column: str | None) -> Any:
        return self._batches[group].column(column)


@contextlib.contextmanager
def opened_table(path: str) -> Iterator[Table]:
    """Open a Parquet or (by its name) Arrow file for the length of the block.

    Raises:
      OSError: the file cannot be read.
      DecodeError: in the block too, what pyarrow says of a damaged one.
    """
    import pyarrow

    try:
        with epath.Path(path).open("rb") as file:
            yield _Arrow(file, path) if path.endswith(".arrow") else _Parquet(file)
    except UserError:
        raise
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the disk, not of the table
            raise
        raise DecodeError(f"its table is damaged ({one_line(error, 100)})") from error


@functools.lru_cache(maxsize=2)
def tfds_source(path: str) -> Any:
    """Open the examples of `FOLDER::SPLIT`, with images as they are in their files."""
    import tensorflow_datasets as tfds

    folder, _, split = path.rpartition("::")
    decoders: Any = {"image": tfds.decode.SkipDecoding()}
    return tfds_builder(folder).as_data_source(split, decoders=decoders)


def tfds_builder(folder: str) -> Any:
    """Open the builder of a folder with a `dataset_info.json`. Raises `UserError` if it cannot."""
    try:
        import tensorflow_datasets as tfds

        return tfds.builder_from_directory(folder)
    except Exception as error:  # its generated code and the installed protobuf, or damaged metadata
        reason = one_line(error, 120)
        raise UserError(
            f"{folder} cannot be opened by tensorflow-datasets ({reason}): prepare it again, or "
            "name the original images"
        ) from error


def image_column(schema: Any) -> str | None:
    """Return the column of a Hugging Face table whose cells are {bytes, path}."""
    import pyarrow

    for field in schema:
        if pyarrow.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0:
            return field.name
    return None


_files: collections.OrderedDict[tuple[str, tuple[int, ...]], IO[bytes]] = collections.OrderedDict()
_files_lock = threading.RLock()


@contextlib.contextmanager
def _open_file(path: str) -> Iterator[IO[bytes]]:
    """Open a file for the length of the block, and keep it open for the next one.

    The oldest is closed when there are too many.
    """
    with _files_lock:
        key = path, files.version(path)
        if key not in _files:
            _files[key] = epath.Path(path).open("rb")
        _files.move_to_end(key)
        if len(_files) > _OPEN_FILES:
            _files.popitem(last=False)[1].close()
        yield _files[key]
