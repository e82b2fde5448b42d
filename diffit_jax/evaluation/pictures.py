"""Pictures to be measured, one batch after the other: from an npz file, which is read as a stream,
from a folder of picture files, or from a data set."""

import contextlib
from collections.abc import Iterator
from typing import Any, NoReturn, Protocol

import numpy as np
from etils import epath
from PIL import Image, UnidentifiedImageError

from diffit_jax.data.decoding import SUFFIXES
from diffit_jax.data.labels import spread
from diffit_jax.data.sources import Source
from diffit_jax.errors import UserError
from diffit_jax.runtime import npz
from diffit_jax.runtime.npz import NpzArray
from diffit_jax.runtime.ranges import in_short
from diffit_jax.sampling.request import Asked, Networks
from diffit_jax.sampling.sample import Request, named_seeds, read_record


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

    def batches(self, size: int, start: int = 0) -> Iterator[np.ndarray]:
        """(n, H, W, C) uint8 in their order from picture `start` on, n = `size` but for the last.
        Every process gets all."""
        ...


class NpzPictures:
    """`arr_0` of an npz file, as ADM's evaluator reads it; never whole in memory."""

    def __init__(self, path: epath.Path, flag: str = "samples"):
        """Reads the header; `flag` names the path in errors.

        Raises:
          UserError: no such file, or something else than uint8 pictures.
        """
        self._path, self._flag = path, flag
        self.facts: dict[str, Any] = {"samples": str(path)}
        with self._reading() as stream:
            shape, dtype = stream.shape, stream.dtype
            if dtype.kind == "f" and len(shape) == 4 and 0 not in shape:
                self._refuse_floats(stream)
        if dtype != np.uint8:
            self._refuse(f"has arr_0 of {dtype}, not of uint8 from 0 to 255")
        if len(shape) != 4 or 0 in shape:
            self._refuse(f"has arr_0 of shape {shape}, which is not (N, H, W, C)")
        if shape[-1] not in (1, 3):
            first = ", which has the channels first" if shape[1] in (1, 3) else ""
            self._refuse(f"has arr_0 of shape {shape}{first}")
        self.count, self.shape = shape[0], tuple(shape[1:])
        self.facts |= {"labels": self._label_rule()} | self._request()

    def batches(self, size: int, start: int = 0) -> Iterator[np.ndarray]:
        with self._reading() as stream:
            yield from stream.parts(size, start)

    def has(self, name: str) -> bool:
        """Whether there is an array of a name."""
        return npz.has(self._path, name)

    @contextlib.contextmanager
    def _reading(self) -> Iterator[NpzArray]:
        """The array, at its beginning; whatever is wrong with the file is said."""
        try:
            with npz.reading(self._path, "arr_0") as stream:
                yield stream
        except UserError:  # said by whoever reads
            raise
        except KeyError:
            self._refuse("has no arr_0")
        except OSError as error:
            self._refuse(f"cannot be read ({error.strerror or error})")
        except npz.DAMAGED as error:
            self._refuse(f"is not a whole npz file ({' '.join(str(error).split())[:100]})")

    def _label_rule(self) -> str:
        """How the labels beside the pictures are spread, as far as that can be seen."""
        try:
            labels = npz.read(self._path, "arr_1")
        except (KeyError, OSError, *npz.DAMAGED):
            return "not in the file"
        if labels.shape != (self.count,) or labels.dtype.kind not in "iu":
            return "not in the file"
        return spread(labels)

    def _request(self) -> dict[str, Any]:
        """What `sample` recorded beside the file of what was asked for."""
        record = read_record(self._path)
        if record is None or record.get("samples") != self._path.name:
            return {}
        rounding = record["request"].get("identity", {}).get("sampling.pixel_rounding")
        return {
            "uint8_rule": rounding or "not recorded",
            "request": record["request"],
            "arr_0_sha256": record.get("arr_0_sha256"),
        }

    def _refuse_floats(self, stream: NpzArray) -> NoReturn:
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
        span = f" from {low:.3g} to {high:.3g}" if low <= high else ""
        self._refuse(
            f"has arr_0 of {stream.dtype}{span}, not of uint8 from 0 to 255{latents}{broken}"
        )

    def _refuse(self, found: str) -> NoReturn:
        raise UserError(
            f"--{self._flag} {self._path} {found}: wanted is an npz file with arr_0 (N, H, W, 3) "
            "uint8, as launch/sample.py writes it, or a folder of pictures"
        )


class FolderPictures:
    """The picture files of a folder and of its folders, sorted by path; colours as RGB."""

    def __init__(self, path: epath.Path):
        """Lists the folder and opens the first picture.

        Raises:
          UserError: there are none.
        """
        self._paths = sorted(_files(path), key=lambda each: each.parts)
        if not self._paths:
            raise UserError(
                f"--samples {path} has no pictures ({', '.join(SUFFIXES)}) in it: name a folder "
                "that has"
            )
        self.count, self.shape = len(self._paths), self._read(self._paths[0]).shape
        self.facts: dict[str, Any] = {"samples": str(path), "labels": "not in the files"}

    def batches(self, size: int, start: int = 0) -> Iterator[np.ndarray]:
        for begin in range(start, self.count, size):
            pictures = []
            for path in self._paths[begin : begin + size]:
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


def _files(folder: epath.Path) -> Iterator[epath.Path]:
    """The picture files in a folder and in its folders."""
    for path in folder.iterdir():
        if path.suffix.lower() in SUFFIXES:
            yield path
        elif path.is_dir():
            yield from _files(path)


class DatasetPictures:
    """The images of a data set, in its order."""

    def __init__(self, source: Source, name: str):
        """`name`: of the data set and its split, for people."""
        self._source = source
        self.count, self.shape = len(source), source.image_shape
        self.facts: dict[str, Any] = {"samples": name, "labels": "of the data set"}

    def batches(self, size: int, start: int = 0) -> Iterator[np.ndarray]:
        for begin in range(start, self.count, size):
            stop = min(begin + size, self.count)
            yield self._source.read(np.arange(begin, stop))["image"]


def open_pictures(path: epath.Path) -> NpzPictures | FolderPictures:
    """The pictures at a path, of an npz file or a folder."""
    return FolderPictures(path) if path.is_dir() else NpzPictures(path)


class DrawnPictures:
    """The samples of a request, as `Pictures`."""

    def __init__(self, asked: Asked, networks: Networks):
        """Takes a checked request and its networks.

        Raises:
          UserError: the samples are no pictures.
        """
        shape = asked.experiment.space.shape(asked.experiment.model.sample_shape)
        if shape[-1] not in (1, 3) or asked.experiment.space.samples != "samples":
            raise UserError(
                f"{asked.source.name} makes latents, which have no FID: name the autoencoder that "
                "decodes them by --vae"
            )
        self._asked, self._networks = asked, networks
        self.count, self.shape = len(asked.seeds), shape
        self.facts: dict[str, Any] = {
            "samples": asked.source.name,
            "labels": f"{asked.words or 'seed modulo classes'}: {spread(asked.labels)}",
            "uint8_rule": asked.experiment.sampling.pixel_rounding,
            "seeds": in_short(asked.seeds.tolist()),
            "request": Request(asked.identity(networks), networks.origin).as_json(),
        }

    def batches(self, size: int, start: int = 0) -> Iterator[np.ndarray]:
        """See `Pictures`. Raises `UserError` at a sample that is not finite: seeds are named."""
        waiting = np.zeros((0, *self.shape), np.uint8)
        per_call = self._asked.sampler.batch_size
        for begin in range(start, self.count, per_call):
            batch = np.arange(begin, min(begin + per_call, self.count))
            drawn, finite = self._asked.draw(self._networks, batch)
            if not finite.all():
                bad = self._asked.seeds[batch[~finite]].tolist()
                raise UserError(
                    f"{len(bad)} of the first {batch[-1] + 1} samples are not finite (seeds "
                    f"{named_seeds(bad)}): use other weights"
                )
            waiting = np.concatenate([waiting, drawn])
            while len(waiting) >= size:
                yield waiting[:size]
                waiting = waiting[size:]
        if len(waiting):
            yield waiting
