"""The verb `prepare --latents`: from latents that others made to a data set to train on."""

import functools
import io
import logging
import zipfile
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from etils import epath

from diffit_jax.data import records
from diffit_jax.data.records import ArraySpec, Manifest
from diffit_jax.data.sources import folder_to_write
from diffit_jax.errors import UserError, one_line
from diffit_jax.ingest import containers, labelling, latent_statistics
from diffit_jax.ingest.locations import listed
from diffit_jax.ingest.prepare import (
    kept,
    label_of,
    numbered_as_other_splits,
    progress_of,
    report,
    shards_of,
    source_metadata,
)
from diffit_jax.ingest.shards import Content, Shards
from diffit_jax.runtime import distributed, hub, npz
from diffit_jax.runtime.console import Progress

log = logging.getLogger(__name__)

PATTERN = "img-mean-std-"
# Means of the channels over many images, by what the autoencoder was fed with, and what is to be
# said of it. EDM2 fed sd-vae-ft-mse with x / 255, where it expects x / 127.5 - 1.
RANGES = {
    "[0, 1] (as EDM2)": (5.81, 3.25, 0.12, -2.15),
    "[-1, 1] (as REPA)": (0.86, -0.28, 0.22, 0.37),
}
PALE = ("[0, 1] (as EDM2)",)
_PALE = (
    "a network that is trained on these makes latents of pixels in [0, 1]: images that --vae "
    "decodes of them are too pale"
)
PROBED = 10_000  # latents whose means tell the ranges apart
_NEAR = 0.5  # of a mean; the two ranges are 5 apart in the first channel
_MOST_STD = 1e3  # a standard deviation beyond this is something else


def import_latents(
    source: epath.PathLike,
    *,
    name: str,
    data_dir: epath.PathLike = "",
    split: str = "train",
    unlabelled: bool = False,
) -> Manifest:
    """Write latents in the layout that EDM2 and REPA share as `DATA_DIR/NAME`, as `encode` would.

    The layout: `00000/img-mean-std-00000000.npy`, each (2c, h, w) mean and standard deviation,
    channels first, and `dataset.json` with the labels; in a folder or a zip. There is one
    orientation.

    Args:
      source: the folder or zip; `hf://` too.
      name: as of `prepare.prepare`, and so the others below.
      data_dir: where data sets are.
      split: that it becomes.
      unlabelled: whether to leave labels out.

    Raises:
      UserError: another layout, or latents of an unknown range of pixels.
    """
    folder = folder_to_write(name, data_dir)
    source_files = _LatentFiles(hub.local(source, "source"))
    with source_files as (names, read, labels_json):
        given = labelling.read_dataset_json(labels_json, str(source)) if labels_json else {}
        if not given and not unlabelled:
            raise UserError(
                f"--source {source} has no labels in dataset.json: fetch it, or say --unlabelled"
            )
        stamps = source_files.stamps
        members = [containers.Member(each, 0, 0, 0, stamps[each]()) for each in names]
        index = containers.index_members(
            str(source), "npy", files=(), members=members, given=given, unlabelled=unlabelled
        )
        index = numbered_as_other_splits(index, folder, split)
        # The files do not say in which range pixels were encoded; their statistics do.
        moments = _read_one(read, index.names[0])
        pixels, means = _range_of(index.names, read)
        log.info("channel means %s: pixels were in %s", _short(means), pixels)
        if pixels in PALE:
            log.warning("%s", _PALE)
        shape = (1, *moments.shape)
        digest = {"source": index.digest(), "means": means.tolist(), "shape": list(shape)}
        arrays = records.layout(moments=ArraySpec(shape, "float32"))

        def contents(numbers: Sequence[int]) -> str:
            content = Content()
            for number in numbers:
                content.add(_read_one(read, index.names[number]))
            return content.hexdigest()

        how = {"arrays": arrays, "identity": digest, "contents": contents}
        shards = shards_of(index, folder, split, **how)
        with shards.owned():
            _write(shards, index, read, shape)
            manifest = shards.finish(
                index.classes,
                lambda sums: {
                    "source": source_metadata(index, source, split) | {"kind": "imported"},
                    "crop": {"crop": "unknown", "size": shape[1] * 8},
                    "autoencoder": {"path": "unknown", "pixels": pixels, "orientations": 1},
                    "statistics": latent_statistics.of_sums(sums),
                },
            )
    report(manifest, folder, index)
    latent_statistics.say(manifest)
    return manifest


def _write(shards: Shards, index: Any, read: Callable[[str], bytes], shape: Any) -> None:
    missing = shards.missing()
    progress = progress_of(shards, missing, "import", "latent")
    with progress, distributed.PreemptionNotice(ctrl_c=True) as notice:
        for shard in missing:
            with shards.writing(shard) as writer:
                for number in shards.numbers(shard):
                    if notice.reached():
                        raise notice.ending(kept(shards))
                    moments = _read_one(read, index.names[number])
                    if moments.shape != shape[1:]:
                        raise UserError(
                            f"{index.names[number]} is {moments.shape}, the first latent is "
                            f"{shape[1:]}: all must have one size"
                        )
                    writer.content.add(moments)
                    writer.stats.add_sums(**latent_statistics.sums_of(moments[None, None]))
                    writer.add(label_of(index, number), moments=moments[None])
                    progress.advance()


class _LatentFiles:
    """The latents of a folder or zip, as (names, a function that reads one, dataset.json).

    Attributes:
      stamps: by name, returns what is known of a latent's content without reading it.
    """

    def __init__(self, path: epath.Path):
        self._path, self._archive = path, None
        self.stamps: dict[str, Callable[[], str]] = {}

    def __enter__(self) -> tuple[list[str], Callable[[str], bytes], bytes | None]:
        path, labels = self._path, labelling.DATASET_JSON
        if path.is_dir():
            for entry in listed(path):
                within = listed(path / entry.name) if entry.kind == "folder" else ()
                inner = {f"{entry.name}/{file.name}": file for file in within}
                for name, file in (inner or {entry.name: entry}).items():
                    if self._is_latent(file.name):
                        self.stamps[name] = file.stamp
            names = [*self.stamps]
            found = (path / labels).read_bytes() if (path / labels).exists() else None
            return self._checked(names), lambda name: (path / name).read_bytes(), found
        try:
            self._file = path.open("rb")
            self._archive = zipfile.ZipFile(self._file)
        except npz.DAMAGED as error:
            reason = one_line(error, 100)
            raise UserError(f"--source {path} is no folder and no whole zip ({reason})") from error
        except OSError as error:
            raise UserError(
                f"--source {path} cannot be read ({error.strerror or error}): name another"
            ) from error
        every = self._archive.namelist()
        names = [name for name in every if self._is_latent(name.rpartition("/")[2])]
        for name in names:
            self.stamps[name] = functools.partial("{:08x}".format, self._archive.getinfo(name).CRC)
        found = self._archive.read(labels) if labels in every else None
        return self._checked(names), self._archive.read, found

    def __exit__(self, *_: object) -> None:
        if self._archive is not None:
            self._archive.close()
            self._file.close()

    @staticmethod
    def _is_latent(name: str) -> bool:
        return name.startswith(PATTERN) and name.endswith(".npy")

    def _checked(self, names: list[str]) -> list[str]:
        if not names:
            raise UserError(
                f"--source {self._path} has no {PATTERN}*.npy: latents in EDM2's and REPA's layout "
                "can be imported; encode images by diffit encode"
            )
        return names


def _read_one(read: Callable[[str], bytes], name: str) -> np.ndarray:
    """Read mean and log variance, (h, w, 2c) float32."""
    try:
        array = np.load(io.BytesIO(read(name)), allow_pickle=False).astype(np.float32)
    except (OSError, TypeError, *npz.DAMAGED) as error:
        raise UserError(f"{name} is no whole npy file ({error}): fetch it again") from error
    if array.ndim != 3 or array.shape[0] % 2 or not np.isfinite(array).all():
        raise UserError(
            f"{name} is {array.shape}, not (2c, h, w) of finite numbers: fetch it again"
        )
    mean, std = np.split(array, 2)
    if std.min() < 0 or std.max() > _MOST_STD:
        raise UserError(
            f"{name} has standard deviations from {std.min():.3g} to {std.max():.3g}: are these "
            "log variances? only EDM2's and REPA's layout can be imported"
        )
    log_variance = np.clip(2 * np.log(np.maximum(std, 1e-30)), -30, 20)
    return np.concatenate([mean, log_variance]).transpose(1, 2, 0)


def _range_of(names: Any, read: Callable[[str], bytes]) -> tuple[str, np.ndarray]:
    """Infer the range of the pixels from the channels' means over some of the latents.

    Raises:
      UserError: neither of the known ones.
    """
    chosen = np.unique(np.linspace(0, len(names) - 1, PROBED).astype(int)).tolist()
    total: Any = 0.0
    with Progress("probe", len(chosen), unit="latent") as progress:
        for number in chosen:
            moments = _read_one(read, names[number])
            total = total + moments[..., : moments.shape[-1] // 2].astype(np.float64).mean((0, 1))
            progress.advance()
    means = total / len(chosen)
    for pixels, known in RANGES.items():
        if len(known) == len(means) and np.abs(means - known).max() < _NEAR:
            return pixels, means
    known_ones = "; ".join(f"{_short(known)} for {pixels}" for pixels, known in RANGES.items())
    raise UserError(
        f"the latents' channel means are {_short(means)}, which neither range of pixels gives "
        f"({known_ones}): encode the images by diffit encode"
    )


def _short(values: Any) -> str:
    return ", ".join(f"{value:.2f}" for value in values)
