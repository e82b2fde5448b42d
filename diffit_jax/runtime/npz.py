"""Arrays of npz files as streams: they may be larger than memory."""

import contextlib
import math
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from typing import IO

import numpy as np
from etils import epath

# Exceptions of reading a damaged npz file, besides `OSError`.
DAMAGED = (
    ValueError,
    EOFError,
    zipfile.BadZipFile,
    zlib.error,
    AttributeError,
    IndexError,
    struct.error,
    RuntimeError,  # encrypted, or (NotImplementedError) packed in a way that is not known
)


class NpzArray:
    """An array of an npz file, read from its beginning.

    Attributes:
      shape, dtype: of the array.
    """

    def __init__(self, entry: IO[bytes]):
        """Read the header of an entry. Raises `ValueError` for one that cannot be a stream."""
        version = np.lib.format.read_magic(entry)
        read = np.lib.format.read_array_header_1_0
        if version != (1, 0):
            read = np.lib.format.read_array_header_2_0
        self.shape, fortran, self.dtype = read(entry)
        if fortran or self.dtype.hasobject:
            raise ValueError("its array is in Fortran's order, or of objects")
        self._entry, self._next = entry, 0

    def whole(self) -> np.ndarray:
        """Read all of it; errors as of `parts`."""
        content = self._entry.read(math.prod(self.shape) * self.dtype.itemsize)
        return np.frombuffer(content, self.dtype, math.prod(self.shape)).reshape(self.shape)

    def rows(self, start: int, count: int) -> np.ndarray:
        """Read rows from number `start` on, none of which was read or passed over before.

        (count, …). Raises one of `DAMAGED` if there are fewer than the header says.
        """
        row = math.prod(self.shape[1:])
        left = (start - self._next) * row * self.dtype.itemsize
        while left and (skipped := len(self._entry.read(min(left, 2**24)))):
            left -= skipped
        content = self._entry.read(count * row * self.dtype.itemsize)
        self._next = start + count
        return np.frombuffer(content, self.dtype, count * row).reshape(count, *self.shape[1:])

    def parts(self, size: int, start: int = 0) -> Iterator[np.ndarray]:
        """Yield rows in their order from row `start` on, `size` at a time; once.

        Each (size, …), the last one shorter. Errors as of `rows`.
        """
        for begin in range(start, self.shape[0], size):
            yield self.rows(begin, min(size, self.shape[0] - begin))


@contextlib.contextmanager
def reading(path: epath.Path, name: str) -> Iterator[NpzArray]:
    """Open an array of a file as a stream.

    Raises `OSError`, `KeyError` (there is no such array) or one of `DAMAGED`.
    """
    with (
        path.open("rb") as file,
        zipfile.ZipFile(file) as archive,
        archive.open(f"{name}.npy") as entry,
    ):
        yield NpzArray(entry)


def write_rows(
    archive: zipfile.ZipFile,
    name: str,
    dtype: np.dtype,
    shape: tuple[int, ...],
    parts: Iterable[bytes],
) -> None:
    """Add an array to an archive from the bytes of its rows, part by part."""
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
        np.lib.format.write_array_header_1_0(entry, header)
        for part in parts:
            entry.write(part)


def write(archive: zipfile.ZipFile, name: str, array: np.ndarray) -> None:
    """Add a whole array to an archive."""
    with archive.open(f"{name}.npy", "w") as entry:
        np.lib.format.write_array(entry, array, allow_pickle=False)


def evidence(path: epath.Path) -> str:
    """Return the checksums of a file's arrays, which the file itself has; errors as of `has`."""
    with path.open("rb") as file, zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        return " ".join(f"{each.filename} {each.file_size} {each.CRC:08x}" for each in entries)


def names(path: epath.Path) -> set[str]:
    """Return the names of a file's arrays; errors as of `reading`."""
    with path.open("rb") as file, zipfile.ZipFile(file) as archive:
        for entry in archive.infolist():
            archive.open(entry).close()  # its name there has to be that of the directory
        return {each.removesuffix(".npy") for each in archive.namelist()}


def has(path: epath.Path, name: str) -> bool:
    """Whether a file has an array; errors as of `reading`."""
    return name in names(path)


def read(path: epath.Path, name: str) -> np.ndarray:
    """Read a whole array; errors as of `reading`."""
    with reading(path, name) as stream:
        return stream.whole()


def rows_of(path: epath.Path, name: str, wanted: np.ndarray, chunk_size: int = 64) -> np.ndarray:
    """Read some rows of an array, in the order of `wanted`, (n,) int; errors as of `reading`."""
    places = {int(row): place for place, row in enumerate(wanted)}
    found, start = {}, 0
    with reading(path, name) as stream:
        for part in stream.parts(chunk_size):
            for row in range(start, start + len(part)):
                if row in places:
                    found[row] = part[row - start].copy()
            start += len(part)
            if len(found) == len(places):
                break
    return np.stack([found[int(row)] for row in wanted])
