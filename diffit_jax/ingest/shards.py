"""Writing a prepared data set, shard by shard.

A shard holds a fixed range of the source's examples. It is written beside or to scratch, checked,
put in its place, and counts once its line stands in `SPLIT.lines/`: shards are what an interrupted
command goes on with, in any order and from any number of hosts. The manifest sums up the lines when
all are there.
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
from collections.abc import Callable, Iterator, Mapping
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
class Line:
    """What is known of a finished shard.

    Attributes:
      file, count, sha256: see `records.Shard`.
      size: bytes of the file.
      labels: how many examples of each label, by its number.
      skipped: pictures that could not be read, with reasons.
      remarks: how many were unusual, by kind.
      sums: of numbers over examples, by name; lists, float64.
    """

    file: str = ""
    count: int = 0
    sha256: str = ""
    size: int = 0
    labels: dict[str, int] = dataclasses.field(default_factory=dict)
    skipped: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    remarks: dict[str, int] = dataclasses.field(default_factory=dict)
    sums: dict[str, list[float]] = dataclasses.field(default_factory=dict)

    def add_sums(self, **values: np.ndarray) -> None:
        """Adds arrays to the sums of their names."""
        for name, value in values.items():
            before = np.array(self.sums.get(name, 0.0), np.float64)
            self.sums[name] = (before + value).tolist()


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
    ):
        """Plans them.

        Args:
          folder: of the data set; it need not be there.
          split: of it.
          count: examples of the source.
          arrays: of a record, see `records.layout`.
          identity: JSON values by name of all that records depend on.
          per_shard: examples of a shard; 0: as many as `MOST_BYTES` hold.
        """
        self.folder, self.count, self._split, self._arrays = folder, count, split, arrays
        self._per_shard = per_shard or max(1, MOST_BYTES // records.record_size(arrays))
        self.total = -(-count // self._per_shard)
        self._identity = {**identity, "examples": count, "examples of a shard": self._per_shard}
        if len(arrays) > 2:  # of a label and one array, the identity says enough
            specs = {name: dataclasses.asdict(spec) for name, spec in arrays.items()}
            self._identity["arrays"] = specs
        self._lines = folder / records.lines_name(split)

    @contextlib.contextmanager
    def owned(self) -> Iterator[None]:
        """Makes the folder, which this process owns for the length of the block, and begins.

        Raises:
          UserError: as `begin`, or another living process owns it.
        """
        files.make_directory(self.folder, "data_dir")
        with files.owned(self.folder, "data set"):
            self.begin()
            yield

    def begin(self) -> None:
        """Makes the folder, or sees that what is there belongs to the same data; what a killed
        command left half done goes away.

        Raises:
          UserError: another data set is there, or the place cannot be written.
        """
        wanted = files.plain(self._identity)
        artifact = files.Artifact(self._lines / _IDENTITY, wanted)
        found = artifact.look()
        if not found.content and (self.folder / records.manifest_name(self._split)).exists():
            raise UserError(
                f"{self.folder} holds split {self._split} already, of an unknown source: choose "
                "another --name"
            )
        if found.differences:
            values = ", ".join(
                f"{key} {_short(theirs)} instead of {_short(ours)}"
                for key, (theirs, ours) in list(found.differences.items())[:3]
            )
            raise UserError(
                f"{self.folder} holds split {self._split} of other data ({values}): choose another "
                "--name, or delete it"
            )
        files.make_directory(self._lines, "data_dir")
        files.write_json(artifact.path, wanted)
        if files.is_local(self.folder):
            for partial in Path(self.folder).glob(f".{self._split}-*.partial"):
                partial.unlink(missing_ok=True)

    def missing(self) -> list[int]:
        """Numbers of the shards that are not finished, ascending."""
        return [number for number, line in enumerate(self.lines()) if line is None]

    def lines(self) -> list[Line | None]:
        """What is known of each shard; None: it is not finished, or its file is not what it was."""
        there = {entry.name for entry in self.folder.iterdir()}

        def line_of(shard: int) -> Line | None:
            name = self._name(shard)
            content = files.read_json(self._line_path(shard)) if name in there else None
            if content is None or content.get("size") != files.size(self.folder / name):
                return None
            return Line(**content)

        # `gs://` answers many questions at once as fast as one.
        with concurrent.futures.ThreadPoolExecutor(32) as threads:
            return list(threads.map(line_of, range(self.total)))

    def numbers(self, shard: int) -> range:
        """Of the examples of a shard in the source."""
        start = shard * self._per_shard
        return range(start, min(start + self._per_shard, self.count))

    @contextlib.contextmanager
    def writing(self, shard: int) -> Iterator["ShardWriter"]:
        """A shard, which is finished when the block ends, and not there if the block fails.

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
            line = writer.close()
            line.file = name
            if local:
                os.replace(scratch, self.folder / name)
            else:
                # There from the moment at which the last byte is.
                with scratch.open("rb") as source, (self.folder / name).open("wb") as target:
                    shutil.copyfileobj(source, target, 2**24)
            self._write_line(shard, line)
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
                scratch.unlink(missing_ok=True)

    def finish(
        self, classes: tuple[str, ...], facts: Callable[[dict[str, np.ndarray]], Mapping[str, Any]]
    ) -> Manifest:
        """Writes the manifest, when all shards are finished.

        Args:
          classes: see `Manifest`.
          facts: `source`, `crop` … of the manifest, without what the lines say; from the sums of
            all lines, float64 by name.
        """
        lines = [line for line in self.lines() if line is not None]
        assert len(lines) == self.total
        labels: Counter[str] = Counter()
        remarks: Counter[str] = Counter()
        sums: dict[str, np.ndarray] = {}
        for line in lines:
            labels.update(line.labels)
            remarks.update(line.remarks)
            for name, values in line.sums.items():
                sums[name] = sums.get(name, 0) + np.array(values, np.float64)
        manifest = Manifest(
            arrays=self._arrays,
            classes=classes,
            count=sum(line.count for line in lines),
            class_counts=tuple(labels[str(number)] for number in range(len(classes))),
            skipped=tuple((name, why) for line in lines for name, why in line.skipped),
            remarks=dict(sorted(remarks.items())),
            shards=tuple(Shard(line.file, line.count, line.sha256) for line in lines),
            **facts(sums),
        )
        path = self.folder / records.manifest_name(self._split)
        files.write_bytes(path, manifest.to_json().encode())
        return manifest

    def _name(self, shard: int) -> str:
        return records.shard_name(self._split, shard, self.total)

    def _line_path(self, shard: int) -> epath.Path:
        return self._lines / f"{shard:05d}.json"

    def _write_line(self, shard: int, line: Line) -> None:
        content = json.dumps(dataclasses.asdict(line)).encode()
        files.write_bytes(self._line_path(shard), content)


class ShardWriter:
    """A shard on its way to the disk.

    Attributes:
      line: what is to be known of it.
    """

    def __init__(self, path: Path, arrays: Mapping[str, ArraySpec]):
        self._path, self.line, self._arrays = path, Line(), arrays
        self._last = b""
        self._writer: Any = array_record_module.ArrayRecordWriter(str(path), records.WRITER_OPTIONS)

    def add(self, label: int, **values: np.ndarray) -> None:
        """Writes an example; a label of -1 is none."""
        values[records.LABEL] = np.array(max(label, 0))
        self._last = records.encode_record(self._arrays, values)
        self._writer.write(self._last)
        self.line.count += 1
        if label >= 0:
            self.line.labels[str(label)] = self.line.labels.get(str(label), 0) + 1

    def remark(self, remarks: list[str]) -> None:
        """Counts what was unusual about a picture."""
        for remark in remarks:
            self.line.remarks[remark] = self.line.remarks.get(remark, 0) + 1

    def close(self) -> Line:
        """Ends the file, and reads back that all is in it."""
        self._writer.close()
        self._writer = None
        reader = array_record_module.ArrayRecordReader(str(self._path), "")
        count = reader.num_records()
        last = reader.read([count - 1])[0] if count else b""
        reader.close()
        if count != self.line.count or last != self._last:
            raise OSError(5, f"{count} of {self.line.count} records can be read back")
        with self._path.open("rb") as file:
            self.line.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
        self.line.size = self._path.stat().st_size
        return self.line

    def abandon(self) -> None:
        """Closes what is open after a failure."""
        if self._writer is not None:
            self._writer.close()


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}…"
