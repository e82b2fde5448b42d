"""Pictures to be measured, one batch after the other: from an npz file, which is read as a stream,
or from a folder of picture files."""

import contextlib
import math
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any, NoReturn, Protocol

import numpy as np
from etils import epath
from PIL import Image, UnidentifiedImageError

from diffit_jax.errors import UserError
from diffit_jax.runtime.ranges import in_short

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class Pictures(Protocol):
    """A set of pictures.

    Attributes:
      count: how many.
      shape: (H, W, C) of each.
      facts: JSON values by name: where they are from.
    """

    @property
    def count(self) -> int: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def facts(self) -> dict[str, Any]: ...

    def batches(self, size: int) -> Iterator[np.ndarray]:
        """(n, H, W, C) uint8 in their order, n = `size` but for the last."""
        ...


class NpzPictures:
    """`arr_0` of an npz file, as ADM's evaluator reads it; never whole in memory."""

    def __init__(self, path: epath.Path):
        """Reads the header.

        Raises:
          UserError: no such file, or something else than uint8 pictures.
        """
        self._path, self.facts = path, {"samples": str(path)}
        with self._reading() as stream:
            shape, dtype = stream.shape, stream.dtype
            if dtype.kind == "f" and len(shape) == 4:
                self._refuse_floats(stream)
        if dtype != np.uint8:
            self._refuse(f"has arr_0 of {dtype}, not of uint8 from 0 to 255")
        if len(shape) != 4 or 0 in shape:
            self._refuse(f"has arr_0 of shape {shape}, which is not (N, H, W, C)")
        if shape[-1] not in (1, 3):
            first = ", which has the channels first" if shape[1] in (1, 3) else ""
            self._refuse(f"has arr_0 of shape {shape}{first}")
        self.count, self.shape = shape[0], tuple(shape[1:])

    def batches(self, size: int) -> Iterator[np.ndarray]:
        with self._reading() as stream:
            yield from stream.parts(size)

    @contextlib.contextmanager
    def _reading(self) -> Iterator["_Stream"]:
        """The array, at its beginning; whatever is wrong with the file is said."""
        try:
            with (
                self._path.open("rb") as file,
                zipfile.ZipFile(file) as archive,
                archive.open("arr_0.npy") as entry,
            ):
                yield _Stream(entry)
        except KeyError:
            self._refuse("has no arr_0")
        except OSError as error:
            self._refuse(f"cannot be read ({error.strerror or error})")
        except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            self._refuse(f"is not a whole npz file ({' '.join(str(error).split())[:100]})")

    def _refuse_floats(self, stream: "_Stream") -> NoReturn:
        """What float numbers are probably: broken samples, latents, or pictures in [-1, 1]."""
        bad: list[int] = []
        done, low, high = 0, np.inf, -np.inf
        for part in stream.parts(64):
            finite = np.isfinite(part).reshape(len(part), -1).all(1)
            bad += (done + np.flatnonzero(~finite)).tolist()
            done += len(part)
            if finite.any():
                low, high = min(low, part[finite].min()), max(high, part[finite].max())
        broken = f"; {len(bad)} of them are not finite ({in_short(bad[:20])})" if bad else ""
        latents = (
            " (latents of an autoencoder are to be decoded first: sample with --vae)"
            if stream.shape[-1] == 4
            else ""
        )
        self._refuse(
            f"has arr_0 of {stream.dtype} from {low:.3g} to {high:.3g}, not of uint8 from 0 to "
            f"255{latents}{broken}"
        )

    def _refuse(self, found: str) -> NoReturn:
        raise UserError(
            f"--samples {self._path} {found}: wanted is an npz file with arr_0 (N, H, W, 3) uint8, "
            "as launch/sample.py writes it, or a folder of pictures"
        )


class _Stream:
    """An npy file that is read from its beginning.

    Attributes:
      shape, dtype: of the array.
    """

    def __init__(self, file: Any):
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0
        if version != (1, 0):
            read = np.lib.format.read_array_header_2_0
        self.shape, fortran, self.dtype = read(file)
        if fortran or self.dtype.hasobject:
            raise ValueError("its array is in Fortran's order, or of objects")
        self._file = file

    def parts(self, size: int) -> Iterator[np.ndarray]:
        """Rows in their order, `size` at once."""
        row = math.prod(self.shape[1:])
        for start in range(0, self.shape[0], size):
            count = min(size, self.shape[0] - start)
            content = self._file.read(count * row * self.dtype.itemsize)
            yield np.frombuffer(content, self.dtype, count * row).reshape(count, *self.shape[1:])


class FolderPictures:
    """The picture files of a folder, sorted by name; colours as RGB."""

    def __init__(self, path: epath.Path):
        """Lists the folder and opens the first picture.

        Raises:
          UserError: there are none.
        """
        self._paths = sorted(
            (each for each in path.iterdir() if each.suffix.lower() in SUFFIXES),
            key=lambda each: each.name,
        )
        if not self._paths:
            raise UserError(
                f"--samples {path} has no pictures ({', '.join(SUFFIXES)}) in it: name a folder "
                "that has"
            )
        self.count, self.shape = len(self._paths), self._read(self._paths[0]).shape
        self.facts = {"samples": str(path)}

    def batches(self, size: int) -> Iterator[np.ndarray]:
        for start in range(0, self.count, size):
            pictures = []
            for path in self._paths[start : start + size]:
                pictures.append(self._read(path))
                if pictures[-1].shape != self.shape:
                    raise UserError(
                        f"--samples: {path} is {pictures[-1].shape[:2]}, others are "
                        f"{self.shape[:2]}: all pictures must have one size"
                    )
            yield np.stack(pictures)

    @staticmethod
    def _read(path: epath.Path) -> np.ndarray:
        try:
            with path.open("rb") as file, Image.open(file) as picture:
                return np.asarray(picture.convert("RGB"))
        except (OSError, UnidentifiedImageError, ValueError) as error:
            raise UserError(
                f"--samples: {path} is not a picture that can be read ({error}): mend it or move "
                "it away"
            ) from error


def open_pictures(path: epath.Path) -> Pictures:
    """The pictures at a path, of an npz file or a folder."""
    return FolderPictures(path) if path.is_dir() else NpzPictures(path)
