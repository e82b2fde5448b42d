"""A prepared data set that is being written, shard by shard.

A shard holds a fixed range of the source's examples. It is written under a temporary name, checked,
put in its place, and counts once its statistics are in `SPLIT.lines/`: an interrupted command
resumes with the shards that count, in any order and from any number of hosts. The manifest sums up
their statistics when all are there.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import secrets
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python import array_record_module
from etils import epath

from diffit_jax.data import records
from diffit_jax.data.records import ArraySpec, Manifest, Shard
from diffit_jax.errors import UserError
from diffit_jax.runtime import files

log = logging.getLogger(__name__)

MOST_BYTES = 2**28  # of a shard: so much is lost at most when a host goes away
_IDENTITY = "identity.json"


@dataclasses.dataclass
class ShardStats:
    """What is known of a finished shard.

    Attributes:
      file, count, sha256: see `records.Shard`.
      size: bytes of the file.
      labels: how many examples of each label, by its number.
      skipped: images that could not be read, with reasons.
      notes: how many were unusual, by kind; `remarks` in the JSON.
      sums: of numbers over examples, by name; lists, float64.
      evidence: what was cheaply known of its images, see `Index.evidence`; "" in older ones.
      content: digest of what its images were decoded to, see `Content`.
    """

    file: str = ""
    count: int = 0
    sha256: str = ""
    size: int = 0
    labels: dict[str, int] = dataclasses.field(default_factory=dict)
    skipped: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    notes: dict[str, int] = dataclasses.field(default_factory=dict)
    sums: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    evidence: str = ""
    content: str = ""

    def add_sums(self, **values: np.ndarray) -> None:
        """Add arrays to the sums of their names."""
        for name, value in values.items():
            before = np.array(self.sums.get(name, 0.0), np.float64)
            self.sums[name] = (before + value).tolist()


class Content:
    """A digest of images as they are decoded, or of why they are not, in their order."""

    def __init__(self):
        self._digest = hashlib.blake2b(digest_size=16)

    def add(self, array: np.ndarray | None, reason: str = "") -> None:
        """Add an image or latent of any shape; None: it is broken."""
        content = reason.encode() if array is None else np.ascontiguousarray(array).tobytes()
        self._digest.update(len(content).to_bytes(8, "big") + content)

    def hexdigest(self) -> str:
        """Return the digest of those added."""
        return self._digest.hexdigest()


class Shards:
    """The shards of a split that is being written.

    Attributes:
      folder: where they go.
      count: examples of the source.
      total: how many shards there are.
    """

    def __init__(
        self,
        folder: epath.Path,
        split: str,
        *,
        count: int,
        arrays: Mapping[str, ArraySpec],
        identity: Mapping[str, Any],
        per_shard: int = 0,
        evidence: Callable[[Sequence[int]], str] = lambda numbers: "",
        contents: Callable[[Sequence[int]], str] = lambda numbers: "",
    ):
        """Plan the shards.

        Args:
          folder: of the data set; it need not be there.
          split: of it.
          count: examples of the source.
          arrays: of a record, see `records.layout`.
          identity: JSON values by name of all that records depend on.
          per_shard: examples of a shard; 0: as many as `MOST_BYTES` hold.
          evidence: returns what is cheaply known of the content of examples, by their numbers.
          contents: decodes examples, by their numbers, and returns the digest of their `Content`.
        """
        self.folder, self.count, self._split, self._arrays = folder, count, split, arrays
        self._per_shard = per_shard or max(1, MOST_BYTES // records.record_size(arrays))
        self.total = -(-count // self._per_shard)
        self._identity = {**identity, "examples": count, "examples of a shard": self._per_shard}
        if len(arrays) > 2:  # of a label and one array, the identity says enough
            specs = {name: dataclasses.asdict(spec) for name, spec in arrays.items()}
            self._identity["arrays"] = specs
        self._stats_dir = folder / records.shard_stats_dir(split)
        self._evidence, self._contents = evidence, contents

    @contextlib.contextmanager
    def owned(self) -> Iterator[None]:
        """Make the folder, own it for the length of the block, and `begin`.

        Raises:
          UserError: as `begin`, or another living process owns it.
        """
        files.make_directory(self.folder, "data_dir")
        with files.owned(self.folder, "data set"):
            self.begin()
            yield

    def begin(self) -> None:
        """Make the folder, or check that it belongs to the same data.

        Half-written shards are removed, and those whose images have changed are forgotten.

        Raises:
          UserError: another data set is there, or the folder cannot be written.
        """
        wanted = files.plain(self._identity)
        artifact = files.Artifact(self._stats_dir / _IDENTITY, wanted)
        found = artifact.inspect()
        if not found.content and (self.folder / records.manifest_name(self._split)).exists():
            raise UserError(
                f"{self.folder} holds split {self._split} already, of an unknown source: choose "
                "another --name"
            )
        if found.differences:
            raise UserError(
                f"{self.folder} holds split {self._split} of other data "
                f"({_in_words(found.differences)}): choose another --name, or delete it to make it "
                "anew"
            )
        files.make_directory(self._stats_dir, "data_dir")
        files.write_json(artifact.path, wanted)
        if files.is_local(self.folder):
            for partial in Path(self.folder).glob(f".{self._split}-*.partial"):
                partial.unlink(missing_ok=True)
        self._forget_changed()

    def _forget_changed(self) -> None:
        """Forget finished shards whose images are others by now, so that they are made anew.

        By evidence; where that is another one, as after copying a folder, by the images themselves.
        """
        unknown = 0
        for shard, stats in enumerate(self.stats()):
            if stats is None or not stats.evidence:
                unknown += stats is not None
                continue
            evidence = self._evidence(self.numbers(shard))
            if stats.evidence == evidence:
                continue
            log.info(
                "the source of shard %d of %d was touched since: its images are looked at again",
                *(shard, self.total),
            )
            if self._contents(self.numbers(shard)) == stats.content:
                stats.evidence = evidence
                self._write_stats(shard, stats)
            else:
                log.warning("images of shard %d have changed since: it is made anew", shard)
                self._stats_path(shard).unlink(missing_ok=True)
        if unknown:
            log.info(
                "%d finished shards are of an earlier version: whether their images have changed "
                "since is not known (delete %s to make all anew)",
                *(unknown, self.folder),
            )

    def missing(self) -> list[int]:
        """Return the numbers of the shards that are not finished, ascending."""
        return [number for number, stats in enumerate(self.stats()) if stats is None]

    def stats(self) -> list[ShardStats | None]:
        """Return the statistics of each shard; None: unfinished, or its file has changed."""
        there = {entry.name for entry in self.folder.iterdir()}

        def stats_of(shard: int) -> ShardStats | None:
            name = self._name(shard)
            content = files.read_json(self._stats_path(shard)) if name in there else None
            if content is None or content.get("size") != files.size(self.folder / name):
                return None
            return ShardStats(**records.from_json_names(content))

        # `gs://` answers many questions at once as fast as one.
        with concurrent.futures.ThreadPoolExecutor(32) as threads:
            return list(threads.map(stats_of, range(self.total)))

    def numbers(self, shard: int) -> range:
        """Return the numbers of a shard's examples in the source."""
        start = shard * self._per_shard
        return range(start, min(start + self._per_shard, self.count))

    @contextlib.contextmanager
    def writing(self, shard: int) -> Iterator["ShardWriter"]:
        """Write a shard, which is finished when the block ends, and removed if the block fails.

        Raises:
          UserError: the disk is full, or fails; finished shards stay.
        """
        name = self._name(shard)
        local = files.is_local(self.folder)
        place = self.folder if local else epath.Path(tempfile.gettempdir())
        scratch = Path(place / f".{name}.{secrets.token_hex(4)}.partial")
        writer = None
        try:
            writer = ShardWriter(scratch, self._arrays)
            yield writer
            stats = writer.close()
            stats.file, stats.evidence = name, self._evidence(self.numbers(shard))
            if local:
                os.replace(scratch, self.folder / name)
            else:
                # There from the moment at which the last byte is.
                with scratch.open("rb") as source, (self.folder / name).open("wb") as target:
                    shutil.copyfileobj(source, target, 2**24)
            self._write_stats(shard, stats)
        except (OSError, RuntimeError) as error:
            remedy = files.remedy_for_writing(error)
            if remedy is None:
                raise
            raise UserError(
                f"shard {self.folder / name} cannot be written "
                f"({' '.join(str(error).split())[:120]}): {remedy}, and run the same command again;"
                f" {self.total - len(self.missing())} of {self.total} shards are finished and stay"
            ) from error
        finally:
            with contextlib.suppress(Exception):
                if writer is not None:
                    writer.abandon()
            with contextlib.suppress(Exception):  # on a full disk the one before may fail
                scratch.unlink(missing_ok=True)

    def finish(
        self,
        classes: tuple[str, ...],
        metadata: Callable[[dict[str, np.ndarray]], Mapping[str, Any]],
    ) -> Manifest:
        """Write the manifest, when all shards are finished.

        Args:
          classes: see `Manifest`.
          metadata: returns `source`, `crop` … of the manifest, all that is not summed over shards,
            from the sums of all shards, float64 by name.
        """
        finished = [stats for stats in self.stats() if stats is not None]
        assert len(finished) == self.total
        labels: Counter[str] = Counter()
        notes: Counter[str] = Counter()
        sums: dict[str, np.ndarray] = {}
        for stats in finished:
            labels.update(stats.labels)
            notes.update(stats.notes)
            for name, values in stats.sums.items():
                sums[name] = sums.get(name, 0) + np.array(values, np.float64)
        manifest = Manifest(
            arrays=self._arrays,
            classes=classes,
            count=sum(stats.count for stats in finished),
            class_counts=tuple(labels[str(number)] for number in range(len(classes))),
            skipped=tuple((name, why) for stats in finished for name, why in stats.skipped),
            notes=dict(sorted(notes.items())),
            shards=tuple(Shard(stats.file, stats.count, stats.sha256) for stats in finished),
            **metadata(sums),
        )
        path = self.folder / records.manifest_name(self._split)
        files.write_bytes(path, manifest.to_json().encode())
        return manifest

    def remove(self) -> None:
        """Remove all that was written."""
        names = [self._name(shard) for shard in range(self.total)]
        for name in (*names, records.manifest_name(self._split)):
            (self.folder / name).unlink(missing_ok=True)
        if self._stats_dir.exists():
            self._stats_dir.rmtree()

    def _name(self, shard: int) -> str:
        return records.shard_name(self._split, shard, self.total)

    def _stats_path(self, shard: int) -> epath.Path:
        return self._stats_dir / f"{shard:05d}.json"

    def _write_stats(self, shard: int, stats: ShardStats) -> None:
        content = json.dumps(records.to_json_names(dataclasses.asdict(stats))).encode()
        files.write_bytes(self._stats_path(shard), content)


class ShardWriter:
    """A shard on its way to the disk.

    Attributes:
      stats: of the examples so far.
    """

    def __init__(self, path: Path, arrays: Mapping[str, ArraySpec]):
        self._path, self.stats, self._arrays = path, ShardStats(), arrays
        self.content = Content()
        self._last = b""
        self._writer: Any = array_record_module.ArrayRecordWriter(str(path), records.WRITER_OPTIONS)

    def add(self, label: int, **values: np.ndarray) -> None:
        """Write an example; a label of -1 is none."""
        values[records.LABEL] = np.array(max(label, 0))
        self._last = records.encode_record(self._arrays, values)
        self._writer.write(self._last)
        self.stats.count += 1
        if label >= 0:
            self.stats.labels[str(label)] = self.stats.labels.get(str(label), 0) + 1

    def note(self, notes: list[str]) -> None:
        """Count what was unusual about an image."""
        for note in notes:
            self.stats.notes[note] = self.stats.notes.get(note, 0) + 1

    def close(self) -> ShardStats:
        """End the file, and verify that all records can be read back."""
        self._writer.close()
        self._writer = None
        reader = array_record_module.ArrayRecordReader(str(self._path), "")
        count = reader.num_records()
        last = reader.read([count - 1])[0] if count else b""
        reader.close()
        if count != self.stats.count or last != self._last:
            raise OSError(5, f"{count} of {self.stats.count} records can be read back")
        with self._path.open("rb") as file:
            self.stats.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
        self.stats.size = self._path.stat().st_size
        self.stats.content = self.content.hexdigest()
        return self.stats

    def abandon(self) -> None:
        """Close what is open after a failure."""
        if self._writer is not None:
            self._writer.close()


def _in_words(differences: Mapping[str, tuple[Any, Any]]) -> str:
    """Describe (theirs, ours) of each part of an identity that differs, by its name."""
    told = []
    for key, (theirs, ours) in differences.items():
        if isinstance(theirs, Mapping) and isinstance(ours, Mapping):
            for name in theirs.keys() | ours.keys():
                if theirs.get(name) != ours.get(name):
                    what = name if key == "crop" else f"{key} {name}"
                    told.append(f"{what} {theirs.get(name)}, now {ours.get(name)}")
        elif key == "source":
            told.append("other images by name, label or size")
        elif key != "examples of a shard":  # it follows from the shape
            told.append(f"{key} {_short(theirs)}, now {_short(ours)}")
    return "; ".join(sorted(told)[:3]) or "an older format"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}…"
