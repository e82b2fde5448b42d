"""Streams of images to be measured: from a file, a folder or archive, a data set, or a network.

An npz file is read as a stream.
"""

import contextlib
import json
import zipfile
from collections.abc import Iterator
from typing import Any, NoReturn, Protocol

import numpy as np
from etils import epath

from diffit_jax.data import records
from diffit_jax.data.labels import spread
from diffit_jax.data.sources import Source
from diffit_jax.errors import UserError, one_line
from diffit_jax.ingest.decoding import Preprocessing
from diffit_jax.ingest.images import Loader, open_images
from diffit_jax.runtime import npz
from diffit_jax.runtime.console import in_short
from diffit_jax.runtime.npz import NpzArray
from diffit_jax.sampling.image_files import read_record
from diffit_jax.sampling.request import Networks, SampleRequest
from diffit_jax.sampling.sample import RequestKey, named_seeds


class Images(Protocol):
    """A set of images.

    Attributes:
      count: how many.
      shape: (H, W, C) of each.
      metadata: JSON values by name: where they are from.
    """

    @property
    def count(self) -> int:
        """Number of images."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """(H, W, C) of an image."""
        ...

    @property
    def metadata(self) -> dict[str, Any]:
        """JSON values by name: where the images come from."""
        ...

    @property
    def evidence(self) -> str:
        """What is cheaply known of their content, so that others of their name are noticed."""
        ...

    def batches(self, size: int, start: int = 0) -> Iterator[np.ndarray]:
        """Yield batches (n, H, W, C) uint8 in order from image `start` on.

        n = `size` but for the last. Every process gets all.
        """
        ...


class NpzImages:
    """`arr_0` of an npz file, as ADM's evaluator reads it; never whole in memory."""

    def __init__(self, path: epath.Path, flag: str = "samples", labelled: bool = False):
        """Read the header.

        Args:
          path: of the file.
          flag: names it in errors.
          labelled: whether `arr_1` has to hold a label of each, see `labels`.

        Raises:
          UserError: no such file, or something else than uint8 images.
        """
        self._path, self._flag, self._labelled = path, flag, labelled
        self.metadata: dict[str, Any] = {"samples": str(path)}
        with self._reading("arr_0") as stream:
            shape, dtype = stream.shape, stream.dtype
            if dtype != np.uint8:
                self._refuse_numbers(stream)
        if len(shape) != 4 or 0 in shape:
            self._refuse(f"has arr_0 of shape {shape}, which is not (N, H, W, C)")
        if shape[-1] not in (1, 3):
            first = ", which has the channels first" if shape[1] in (1, 3) else ""
            self._refuse(f"has arr_0 of shape {shape}{first}")
        self.count, self.shape = shape[0], tuple(shape[1:])
        self.metadata |= {"labels": self._label_rule()} | self._request()

    def labels(self) -> np.ndarray:
        """Read the labels of the images, (N,) int64; raise `UserError` if one is negative.

        Raises:
          UserError: `arr_1` is something else.
        """
        with self._reading("arr_1") as stream:
            labels = stream.whole()
        if labels.dtype.kind not in "iu":
            self._refuse(f"has labels arr_1 of {labels.dtype}, not whole numbers")
        if labels.ndim == 2 and labels.shape[0] == self.count and labels.shape[1] > 1:
            shape = labels.shape
            self._refuse(f"has labels arr_1 of shape {shape}, one-hot perhaps, not numbers (N,)")
        if labels.shape != (self.count,):
            self._refuse(f"has {self.count} images, but labels arr_1 of shape {labels.shape}")
        if labels.min() < 0:
            self._refuse(f"has the label {labels.min()}, below 0")
        if labels.max() > np.iinfo(np.int64).max:
            self._refuse(f"has the label {labels.max()}")
        return labels.astype(np.int64)

    def batches(self, size: int, start: int = 0) -> Iterator[np.ndarray]:
        """Yield (n, H, W, C) uint8 from image `start` on."""
        with self._reading("arr_0") as stream:
            yield from stream.parts(size, start)

    @property
    def evidence(self) -> str:
        """The sums that the file itself has of its arrays."""
        return npz.evidence(self._path)

    def some(self, numbers: np.ndarray) -> Iterator[np.ndarray]:
        """Yield images of ascending `numbers`, (n,) int, in parts (m, H, W, C) uint8."""
        start = 0
        for part in self.batches(64):
            yield part[numbers[(numbers >= start) & (numbers < start + len(part))] - start]
            start += len(part)

    def has(self, name: str) -> bool:
        """Whether there is an array of a name."""
        return npz.has(self._path, name)

    @contextlib.contextmanager
    def _reading(self, name: str) -> Iterator[NpzArray]:
        """Open an array at its beginning; raise `UserError` for whatever is wrong with the file."""
        try:
            with npz.reading(self._path, name) as stream:
                yield stream
        except UserError:  # said by whoever reads
            raise
        except KeyError:
            self._refuse(self._without(name))
        except OSError as error:
            self._refuse(f"cannot be read ({error.strerror or error})")
        except npz.DAMAGED as error:
            self._refuse(self._damage(error))

    def _without(self, name: str) -> str:
        """Describe a file without an array of this name."""
        if not self._labelled:
            return f"has no {name}"
        with self._path.open("rb") as file, zipfile.ZipFile(file) as archive:
            names = ", ".join(each.removesuffix(".npy") for each in archive.namelist())
        return f"has the arrays {names or 'none'}, which are not arr_0 and arr_1"

    def _damage(self, error: BaseException) -> str:
        """Describe a file that is no whole npz file."""
        reason = one_line(error, 100)
        if not self._labelled:
            return f"is not a whole npz file ({reason})"
        if not isinstance(error, zipfile.BadZipFile):
            return f"has arrays that cannot be read ({reason})"
        with contextlib.suppress(*npz.DAMAGED), self._path.open("rb") as file:
            array = NpzArray(file)
            return f"is a single array {array.shape} of {array.dtype}, without labels"
        return f"is not an npz file ({reason})"

    def _label_rule(self) -> str:
        """Describe how the labels of the images are spread, as far as that can be seen."""
        try:
            labels = npz.read(self._path, "arr_1")
        except (KeyError, OSError, *npz.DAMAGED):
            return "not in the file"
        if labels.shape != (self.count,) or labels.dtype.kind not in "iu":
            return "not in the file"
        return spread(labels)

    def _request(self) -> dict[str, Any]:
        """Return the request that `sample` recorded with the file."""
        record = read_record(self._path)
        if record is None or record.get("samples") != self._path.name:
            return {}
        rounding = record["request"].get("identity", {}).get("sampling.pixel_rounding")
        return {
            "uint8_rule": rounding or "not recorded",
            "request": record["request"],
            "arr_0_sha256": record.get("arr_0_sha256"),
        }

    def _refuse_numbers(self, stream: NpzArray) -> NoReturn:
        """Raise `UserError` with what other numbers probably are.

        Broken samples, latents, or images in [-1, 1].
        """
        shape, bad, done = stream.shape, [], 0
        low, high = np.inf, -np.inf
        numbers = stream.dtype.kind in "fiub" and 0 not in shape and bool(shape)
        for part in stream.parts(64) if numbers else ():
            finite = np.isfinite(part).reshape(len(part), -1).all(1)
            bad += (done + np.flatnonzero(~finite)).tolist()
            done += len(part)
            if finite.any():
                low, high = min(low, part[finite].min()), max(high, part[finite].max())
        broken = f"; {len(bad)} of them are not finite ({in_short(bad[:20])})" if bad else ""
        latents = (
            " (latents of an autoencoder are to be decoded first: sample with --vae)"
            if numbers and len(shape) == 4 and shape[-1] == 4
            else ""
        )
        if low > high:  # none is finite
            low = high = np.nan
        span = f" from {low:.3g} to {high:.3g}" if numbers else ""
        self._refuse(
            f"has arr_0 of {stream.dtype}{span}, not of uint8 from 0 to 255{latents}{broken}"
        )

    def _refuse(self, found: str) -> NoReturn:
        wanted = (
            "as diffit sample writes it, arr_0 (N, H, W, C) uint8 images and arr_1 (N,) labels"
            if self._labelled
            else "with arr_0 (N, H, W, 3) uint8, as diffit sample writes it, or a folder of images"
        )
        raise UserError(f"--{self._flag} {self._path} {found}: wanted is an npz file {wanted}")


class FileImages:
    """The image files of a folder, zip or tar, as `prepare` reads them.

    In its order; colours as RGB; upright.
    """

    def __init__(self, path: epath.Path):
        """Index them and open the first one.

        Raises:
          UserError: there are none.
        """
        try:
            self._index = open_images(path, unlabelled=True, fewest=1)
        except UserError as error:
            raise UserError(f"--samples {error}") from error
        self._loader, self._path = (Loader(self._index, Preprocessing(), workers=0), path)
        self.count, self.shape = len(self._index), self._pixels(0).shape
        self.metadata: dict[str, Any] = {"samples": str(path), "labels": "not in the files"}

    def batches(self, size: int, start: int = 0) -> Iterator[np.ndarray]:
        """Yield (n, H, W, C) uint8 from image `start` on."""
        for begin in range(start, self.count, size):
            images = []
            for number in range(begin, min(begin + size, self.count)):
                images.append(self._pixels(number))
                if images[-1].shape != self.shape:
                    raise UserError(
                        f"--samples: {self._path / self._index.names[number]} is "
                        f"{images[-1].shape[:2]}, others are {self.shape[:2]}: all images must "
                        "have one size"
                    )
            yield np.stack(images)

    @property
    def evidence(self) -> str:
        """Of all files, see `Index.evidence`."""
        return self._index.evidence(range(self.count))

    def some(self, numbers: np.ndarray) -> Iterator[np.ndarray]:
        """Yield images of ascending `numbers`, one by one."""
        for number in numbers.tolist():
            yield self._pixels(number)[None]

    def _pixels(self, number: int) -> np.ndarray:
        (loaded,) = self._loader.load([number])
        if loaded.pixels is None:
            raise UserError(
                f"--samples: {self._path / self._index.names[number]} is not an image that can be "
                f"read ({loaded.reason}): mend it or move it away"
            )
        return loaded.pixels


class DatasetImages:
    """The images of a data set, in its order."""

    def __init__(self, source: Source, name: str):
        """Take a source; `name`: of the data set and its split, for people."""
        self._source = source
        self.count, self.shape = len(source), source.image_shape
        self.metadata: dict[str, Any] = {"samples": name, "labels": "of the data set"}

    @property
    def evidence(self) -> str:
        """The hashes of its shards; of a data set that is no files its name says all."""
        manifest = getattr(self._source, "manifest", None)
        return json.dumps([shard.sha256 for shard in manifest.shards]) if manifest else ""

    def some(self, numbers: np.ndarray) -> Iterator[np.ndarray]:
        """Yield images of ascending `numbers`, part by part."""
        for start in range(0, len(numbers), 64):
            yield self._source.read(numbers[start : start + 64])["image"]

    @property
    def labelled(self) -> bool:
        """Whether the images have labels."""
        return self._source.num_classes > 0

    def labels(self) -> np.ndarray:
        """Read the labels of the images, (N,) int64; raise `UserError` if there are none."""
        if not self.labelled:
            raise UserError(f"{self.metadata['samples']} has no labels: leave out --by_class")
        return records.read_labels(self._source).astype(np.int64)

    def batches(self, size: int, start: int = 0) -> Iterator[np.ndarray]:
        """Yield (n, H, W, C) uint8 from image `start` on."""
        for begin in range(start, self.count, size):
            stop = min(begin + size, self.count)
            yield self._source.read(np.arange(begin, stop))["image"]


# Images that lie somewhere, so that some of them can be read again.
StoredImages = NpzImages | FileImages | DatasetImages


def labels_of(images: Images) -> np.ndarray:
    """Return the labels of images, (N,) int64.

    Raises:
      UserError: they have none.
    """
    if not isinstance(images, NpzImages | DatasetImages | DrawnImages):
        raise UserError(
            f"{images.metadata['samples']} has no labels: by class, name an npz file of samples, "
            "or a network"
        )
    return images.labels()


def open_samples(path: epath.Path) -> NpzImages | FileImages:
    """Open the images at a path: an npz file, or whatever else `prepare` reads."""
    archive = path.name.endswith((".zip", ".tar", ".tar.gz", ".tgz", ".parquet"))
    return FileImages(path) if archive or path.is_dir() else NpzImages(path)


class DrawnImages:
    """The samples of a request, as `Images`."""

    def __init__(self, request: SampleRequest, networks: Networks):
        """Take a checked request and its networks.

        Raises:
          UserError: the samples are no images.
        """
        shape = request.shape
        if shape[-1] not in (1, 3) or request.experiment.space.samples != "samples":
            raise UserError(
                f"{request.source.name} makes latents, which have no FID: name the autoencoder "
                "that decodes them by --vae"
            )
        self._request, self._networks = request, networks
        self.count, self.shape = len(request.seeds), shape
        self.metadata: dict[str, Any] = {
            "samples": request.source.name,
            "labels": f"{request.words or 'seed modulo classes'}: {spread(request.labels)}",
            "uint8_rule": request.experiment.sampling.pixel_rounding,
            "seeds": in_short(request.seeds.tolist()),
            "request": RequestKey(request.identity(networks), networks.origin).as_json(),
        }

    @property
    def evidence(self) -> str:
        """Nothing more than the request, which names the network by its content."""
        return ""

    def labels(self) -> np.ndarray:
        """Return the labels of the samples, (N,) int64; raise `UserError` if there are none."""
        if not self._request.experiment.model.num_classes:
            raise UserError(f"{self.metadata['samples']} is unconditional: leave out --by_class")
        return self._request.labels

    def batches(self, size: int, start: int = 0) -> Iterator[np.ndarray]:
        """Yield (n, H, W, C) uint8; raise `UserError` with seeds of samples that are not finite."""
        waiting = np.zeros((0, *self.shape), np.uint8)
        per_call = self._request.sampler.batch_size
        for begin in range(start, self.count, per_call):
            batch = np.arange(begin, min(begin + per_call, self.count))
            drawn, finite = self._request.draw(self._networks, batch)
            if not finite.all():
                bad = self._request.seeds[batch[~finite]].tolist()
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
