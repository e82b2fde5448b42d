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
import struct
import threading
import zlib
from collections.abc import Iterator, Mapping
from typing import IO, Any, NamedTuple

import numpy as np
from etils import epath

from diffit_jax.errors import UserError, one_line
from diffit_jax.ingest.decoding import DecodeError

_OPEN_FILES = 16  # of a process at once
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
        for name in ("labels", "pixels"):
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
            labels, pixels = (
                arrays[name] if name in arrays.files else None for name in ("labels", "pixels")
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
        )


def read(location: Location) -> bytes | np.ndarray:
    """Read the bytes of an image file; of tensorflow-datasets perhaps (H, W, C) uint8.

    Raises:
      OSError: the file cannot be read.
      DecodeError: its content cannot be unpacked.
    """
    if location.kind == "file":
        return epath.Path(location.path).read_bytes()
    if location.kind == "table":
        return _row(location)
    if location.kind == "tfds":
        image = tfds_source(location.path)[location.first]["image"]
        return image if isinstance(image, bytes) else np.asarray(image)
    if location.kind == "range":
        return _range(location.path, location.first, location.second)
    return _zip_entry(location)


def _zip_entry(location: Location) -> bytes:
    # The header is of unknown length: with a name and an extra field, which are short.
    content = _range(location.path, location.first, location.second + _LOCAL_HEADER.size + 2**10)
    if len(content) < _LOCAL_HEADER.size or content[:4] != b"PK\3\4":
        raise DecodeError("its entry in the zip is damaged")
    _, _, flags, method, *_, name, extra = _LOCAL_HEADER.unpack(content[: _LOCAL_HEADER.size])
    if flags & 1:
        raise DecodeError("it is encrypted")
    start = _LOCAL_HEADER.size + name + extra
    packed = content[start : start + location.second]
    if len(packed) < location.second:
        packed = _range(location.path, location.first + start, location.second)
    if method == 0:
        return packed
    if method != 8:
        raise DecodeError(f"it is packed by method {method} of zip, only 0 and 8 are known")
    try:
        return zlib.decompress(packed, -15)
    except zlib.error as error:
        raise DecodeError(f"its entry in the zip is damaged ({error})") from error


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
    content = _row_group(location.path, location.first)[location.second]
    if not content:
        raise DecodeError("empty file")
    return content


@functools.lru_cache(maxsize=2)
def _row_group(path: str, group: int) -> list[bytes | None]:
    """Read the images of a row group: they are asked for in turn."""
    import pyarrow.parquet

    with epath.Path(path).open("rb") as file:
        parquet = pyarrow.parquet.ParquetFile(file)
        column = image_column(parquet.schema_arrow)
        table = parquet.read_row_group(group, columns=[f"{column}.bytes"])
        return table.column(0).combine_chunks().field("bytes").to_pylist()


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


_files: collections.OrderedDict[str, IO[bytes]] = collections.OrderedDict()
_files_lock = threading.RLock()


@contextlib.contextmanager
def _open_file(path: str) -> Iterator[IO[bytes]]:
    """Open a file for the length of the block, and keep it open for the next one.

    The oldest is closed when there are too many.
    """
    with _files_lock:
        if path not in _files:
            _files[path] = epath.Path(path).open("rb")
        _files.move_to_end(path)
        if len(_files) > _OPEN_FILES:
            _files.popitem(last=False)[1].close()
        yield _files[path]
