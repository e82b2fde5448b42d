"""The verb `prepare`: from images as people have them to a data set to train on."""

import collections
import contextlib
import dataclasses
import hashlib
import itertools
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath

from diffit_jax.data import pixels, records
from diffit_jax.data.labels import are_numbers
from diffit_jax.data.records import ArraySpec, Manifest
from diffit_jax.data.sources import folder_to_write
from diffit_jax.errors import UserError
from diffit_jax.ingest.decoding import Preprocessing
from diffit_jax.ingest.images import Loader, open_images
from diffit_jax.ingest.labelling import numbered_by
from diffit_jax.ingest.locations import Index
from diffit_jax.ingest.shards import Shards
from diffit_jax.runtime import distributed, hub
from diffit_jax.runtime.console import Progress, first_few
from diffit_jax.runtime.run_in_subprocess import count_cores

log = logging.getLogger(__name__)


def prepare(
    source: epath.PathLike,
    *,
    name: str,
    data_dir: epath.PathLike = "",
    split: str = "train",
    preprocessing: Preprocessing = Preprocessing(),
    unlabelled: bool = False,
    tar_classes: bool = False,
    workers: int | None = None,
    holdout: float = 0.0,
    preview: bool = False,
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
      tar_classes: whether each of several tars is a class, even if they look like parts of one set.
      workers: processes that decode; None: one for each core.
      holdout: share of the images that becomes the split "test" instead, see `is_held_out`.
      preview: whether to draw some images of each class in `SPLIT.preview.png`.

    Returns:
      The manifest.

    Raises:
      UserError: a source that cannot be read, images of several sizes without a crop, a directory
        that holds other data or cannot be written; a class of which `holdout` leaves no image in
        one of the splits: then nothing stays.
      interruption.Interrupted, interruption.Preempted: finished shards stay.
    """
    folder = folder_to_write(name, data_dir)
    if holdout and split != "train":
        raise UserError("--holdout makes the split test of what is left out: leave out --split")
    place = hub.local(source, "source")
    index = open_images(place, split, unlabelled, tar_classes=tar_classes)
    index = numbered_as_other_splits(index, folder, split)
    workers = count_cores() if workers is None else workers
    with Loader(index, preprocessing, workers) as loader:
        shape, crop = loader.first_shape(), dataclasses.asdict(preprocessing)
        identity = {"source": index.digest(), "crop": crop, "shape": list(shape)}
        arrays = records.layout(image=ArraySpec(shape, "uint8"))
        identity |= {"holdout": holdout} if holdout else {}
        how = {"arrays": arrays, "identity": identity, "contents": loader.contents}
        shards = shards_of(index, folder, split, **how)
        held = shards_of(index, folder, "test", **how) if holdout else None
        with shards.owned():
            if held is not None:
                held.begin()
            _write(shards, index, loader, shape, held=held, share=holdout)
            if held is not None:
                _check_classes(index, shards, held)
            described = {"crop": crop, "source": source_metadata(index, source, split)}
            if held is not None:
                of_held = {"crop": crop, "source": source_metadata(index, source, "test")}
                others = held.finish(index.classes, lambda sums: of_held)
            manifest = shards.finish(index.classes, lambda sums: described)
    report(manifest, folder, index)
    if held is not None:
        log.info("%d more, %.3g of all, are held out as split test", others.count, holdout)
    if preview:
        _draw(folder, split)
    return manifest


def shards_of(index: Index, folder: epath.Path, split: str, **how: Any) -> Shards:
    """Return the shards of an index's examples; `how`: see `Shards`."""
    return Shards(folder, split, count=len(index), evidence=index.evidence, **how)


def is_held_out(pixels: np.ndarray, share: float) -> bool:
    """Whether an image (H, W, C) uint8 belongs to the test split.

    A function of its pixels alone: equal images are on one side, and images that are added later
    move none.
    """
    digest = hashlib.blake2b(np.ascontiguousarray(pixels).tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def _check_classes(index: Index, train: Shards, test: Shards) -> None:
    """Raise `UserError`, and remove both splits, if a class has no image in one of them."""
    for shards, what, remedy in ((train, "training", "lower"), (test, "test", "raise")):
        counts = collections.Counter[str]()
        for stats in shards.stats():
            counts.update(stats.labels if stats else {})
        empty = [name for number, name in enumerate(index.classes) if not counts[str(number)]]
        if empty or not sum(stats.count for stats in shards.stats() if stats):
            train.remove()
            test.remove()
            of = f"of class {first_few(empty)} " if empty else ""
            raise UserError(
                f"--holdout leaves no {what} image {of}of {len(index)} images: {remedy} it, or "
                "prepare a test split of your own choice by --split test"
            )


_SHOWN_CLASSES, _SHOWN_IMAGES, _LOOKED_AT = 20, 10, 5_000


def _draw(folder: epath.Path, split: str) -> None:
    """Draw some images of the first classes, a row for each with its name."""
    source = records.open_records(folder, split)
    classes = source.manifest.classes
    looked = np.unique(np.linspace(0, len(source) - 1, _LOOKED_AT).astype(np.int64))
    if classes:
        parts = [looked[start : start + 256] for start in range(0, len(looked), 256)]
        labels = np.concatenate([source.read(part)["label"] for part in parts])
        rows = [looked[labels == label][:_SHOWN_IMAGES] for label in range(len(classes))]
        names = [name for name, row in zip(classes, rows, strict=True) if len(row)][:_SHOWN_CLASSES]
        rows = [row for row in rows if len(row)][:_SHOWN_CLASSES]
    else:
        rows, names = np.split(looked[:100], range(10, len(looked[:100]), 10)), []
    shown = pixels.padded_rows([source.read(row)["image"] for row in rows], _SHOWN_IMAGES)
    path = folder / f"{split}.preview.png"
    pixels.write_preview(path, shown, lambda images: images, _SHOWN_IMAGES, beside=names)
    log.info("wrote %s", path)


def _write(
    shards: Shards,
    index: Index,
    loader: Loader,
    shape: tuple[int, ...],
    *,
    held: Shards | None = None,
    share: float = 0.0,
) -> None:
    """Write the missing shards, and with them those of what is held out."""
    missing = shards.missing()
    if held is not None:
        missing = sorted({*missing, *held.missing()})
    stream = loader.load([number for shard in missing for number in shards.numbers(shard)])
    progress = progress_of(shards, missing, "prepare", "image")
    with progress, distributed.PreemptionNotice(ctrl_c=True) as notice:
        for shard in missing:
            with contextlib.ExitStack() as stack:
                writer = stack.enter_context(shards.writing(shard))
                other = stack.enter_context(held.writing(shard)) if held else writer
                for loaded in itertools.islice(stream, len(shards.numbers(shard))):
                    if notice.reached():
                        raise notice.ending(kept(shards))
                    image = loaded.pixels
                    for each in {writer, other}:
                        each.content.add(image, loaded.reason)
                    if image is None:
                        writer.stats.skipped.append((index.names[loaded.number], loaded.reason))
                    else:
                        check_shape(index.names[loaded.number], image.shape, shape)
                        out = other if held and is_held_out(image, share) else writer
                        out.add(label_of(index, loaded.number), image=image)
                        out.note(list(loaded.notes))
                    progress.advance()


def numbered_as_other_splits(index: Index, folder: epath.Path, split: str) -> Index:
    """Return an index whose classes are numbered as those of the data set's other splits.

    Raises:
      UserError: it has classes that they have not.
    """
    for other in records.splits(folder):
        theirs = records.read_manifest(folder, other).classes
        ours = index.classes
        if other == split or index.labels is None or not theirs or theirs == ours:
            continue
        if are_numbers(ours) and len(ours) <= len(theirs):
            message = f"classes are numbers, taken for places in those of split {other}"
            return dataclasses.replace(index, classes=theirs, messages=(*index.messages, message))
        if are_numbers(theirs) and len(ours) == len(theirs):
            continue
        labels = numbered_by(theirs, index.labels, ours, split, other)
        return dataclasses.replace(index, classes=theirs, labels=labels)
    return index


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
