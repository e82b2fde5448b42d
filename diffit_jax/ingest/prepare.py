"""The verb `prepare`: from images as people have them to a data set to train on."""

import dataclasses
import itertools
import logging
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath

from diffit_jax.data import records
from diffit_jax.data.records import ArraySpec, Manifest
from diffit_jax.data.sources import folder_to_write
from diffit_jax.errors import UserError
from diffit_jax.ingest.decoding import Preprocessing
from diffit_jax.ingest.images import Loader, default_workers, open_images
from diffit_jax.ingest.locations import Index
from diffit_jax.ingest.shards import Shards
from diffit_jax.runtime import distributed, hub
from diffit_jax.runtime.console import Progress

log = logging.getLogger(__name__)


def prepare(
    source: epath.PathLike,
    *,
    name: str,
    data_dir: epath.PathLike = "",
    split: str = "train",
    preprocessing: Preprocessing = Preprocessing(),
    unlabelled: bool = False,
    workers: int | None = None,
) -> Manifest:
    """Write the images of a source as `DATA_DIR/NAME`: ArrayRecord shards and a manifest.

    Repeated, an interrupted command resumes, and makes again what was deleted. Files are the same,
    byte for byte, however often it was interrupted and however many processes there are.

    Args:
      source: see `images.open_images`; `hf://` too.
      name: of the data set, `data.name` of a config.
      data_dir: where data sets are, local or `gs://`; "" is `~/tensorflow_datasets`.
      split: that it becomes, "train" or "test" for training and its scores.
      preprocessing: size and channels of the images.
      unlabelled: whether to leave labels out.
      workers: processes that decode; None: one for each core.

    Returns:
      The manifest.

    Raises:
      UserError: a source that cannot be read, images of several sizes without a crop, a directory
        that holds other data or cannot be written.
      interruption.Interrupted, interruption.Preempted: finished shards stay.
    """
    folder = folder_to_write(name, data_dir)
    place = hub.local(source, "source")
    index = open_images(place, split, unlabelled)
    workers = default_workers() if workers is None else workers
    with Loader(index, preprocessing, workers) as loader:
        shape, crop = loader.first_shape(), dataclasses.asdict(preprocessing)
        identity = {"source": index.digest(), "crop": crop, "shape": list(shape)}
        arrays = records.layout(image=ArraySpec(shape, "uint8"))
        shards = Shards(folder, split, count=len(index), arrays=arrays, identity=identity)
        with shards.owned():
            _write(shards, index, loader, shape)
            metadata = {"source": source_metadata(index, source, split), "crop": crop}
            manifest = shards.finish(index.classes, lambda sums: metadata)
    report(manifest, folder, index)
    return manifest


def _write(shards: Shards, index: Index, loader: Loader, shape: tuple[int, ...]) -> None:
    """Write the missing shards."""
    missing = shards.missing()
    stream = loader.load([number for shard in missing for number in shards.numbers(shard)])
    progress = progress_of(shards, missing, "prepare", "image")
    with progress, distributed.PreemptionNotice(ctrl_c=True) as notice:
        for shard in missing:
            with shards.writing(shard) as writer:
                for loaded in itertools.islice(stream, len(shards.numbers(shard))):
                    if notice.reached():
                        raise notice.ending(kept(shards))
                    pixels = loaded.pixels
                    if pixels is None:
                        writer.stats.skipped.append((index.names[loaded.number], loaded.reason))
                    else:
                        check_shape(index.names[loaded.number], pixels.shape, shape)
                        writer.add(label_of(index, loaded.number), image=pixels)
                        writer.note(list(loaded.notes))
                    progress.advance()


def progress_of(shards: Shards, missing: Sequence[int], what: str, unit: str) -> Progress:
    """Return a progress bar that starts at the number of examples already written."""
    left = sum(len(shards.numbers(shard)) for shard in missing)
    first = distributed.is_primary()
    return Progress(what, shards.count, done=shards.count - left, unit=unit, shown=first)


def label_of(index: Index, number: int) -> int:
    """Return the label of an image; -1 is none."""
    return -1 if index.labels is None else int(index.labels[number])


def kept(shards: Shards) -> str:
    """Say how much an interrupted command leaves."""
    done = shards.total - len(shards.missing())
    return f"{done} of {shards.total} shards are finished and stay"


def check_shape(name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    """Raise `UserError` unless an image has the shape of the first one."""
    if found != wanted:
        raise UserError(
            f"{name} is {found[1]}×{found[0]}, the first image is {wanted[1]}×{wanted[0]}: say "
            "how all come to one size by --crop and --size"
        )


def source_metadata(index: Index, source: Any, split: str) -> dict[str, Any]:
    """Return a manifest's description of its source."""
    return {"path": str(source), "split": split, "kind": index.kind, "digest": index.digest()}


def report(manifest: Manifest, folder: epath.Path, index: Index) -> None:
    """Log how many images were written, skipped and unusual."""
    for line in summary(manifest, folder, index.messages):
        log.info("%s", line)
    for name, reason in manifest.skipped[:10]:
        log.warning("skipped %s: %s", name, reason)
    if len(manifest.skipped) > 10:
        log.warning("skipped %d more, see the manifest", len(manifest.skipped) - 10)


def summary(
    manifest: Manifest, folder: epath.Path, messages: tuple[str, ...] = ()
) -> Iterator[str]:
    """Yield a manifest's summary, line by line."""
    classes = f"{len(manifest.classes)} classes" if manifest.classes else "no labels"
    specs = [spec for name, spec in manifest.arrays.items() if name != records.LABEL]
    arrays = ", ".join(f"{spec.shape} {spec.dtype}" for spec in specs)
    what = f"{manifest.count} examples of {arrays}, {classes}"
    yield f"{folder}: {what}, in {len(manifest.shards)} shards"
    yield from messages
    empty = [n for n, c in zip(manifest.classes, manifest.class_counts, strict=True) if not c]
    if empty:
        yield f"{len(empty)} classes have no example: {', '.join(empty[:5])}"
    if manifest.notes:
        yield ", ".join(f"{count} {kind}" for kind, count in manifest.notes.items())
    if manifest.skipped:
        yield f"{len(manifest.skipped)} images could not be read and are left out"
