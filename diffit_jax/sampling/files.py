"""Files of samples: what they are called, how they come about part by part, and what is written
beside them.

A request for samples leaves three files of one name: the npz of ADM's evaluator (`arr_0` (N, H, W,
C) samples, `arr_1` (N,) int64 labels), a PNG of the first hundred, and a record, JSON, of what was
asked for. Nothing of another request is replaced unless that is asked for.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import logging
import math
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from diffit_jax.errors import UserError
from diffit_jax.runtime import files, lock, npz
from diffit_jax.runtime.ranges import in_short

log = logging.getLogger(__name__)

_REQUEST = "request.json"
_LONGEST_NAME = 160


@dataclasses.dataclass(frozen=True)
class Request:
    """A request for samples.

    Attributes:
      identity: JSON values by name of all that the samples depend on; equal requests give equal
        samples.
      source: the same of where the network was found, for people: two requests that differ in it
        alone are equal.
    """

    identity: Mapping[str, Any]
    source: Mapping[str, Any]

    def __post_init__(self):
        for name in ("identity", "source"):
            object.__setattr__(self, name, json.loads(json.dumps(_plain(getattr(self, name)))))

    def difference(self, other: Mapping[str, Any]) -> str:
        """How a recorded request (`as_json`) is another one, in words; "" if it is equal."""
        theirs = other.get("identity")
        if not isinstance(theirs, Mapping):
            return "another request, of an older version"
        for name in {**self.identity, **theirs}:
            if self.identity.get(name) != theirs.get(name):
                if name.endswith("network"):
                    return (
                        f"another {name} ({_short(other.get('source'))}, now {_short(self.source)})"
                    )
                return (
                    f"another {name} ({_short(theirs.get(name))}, now "
                    f"{_short(self.identity.get(name))})"
                )
        return ""

    def as_json(self) -> dict[str, Any]:
        return {"identity": self.identity, "source": self.source}


def default_name(kind: str, shape: Sequence[int], differences: Mapping[str, Any]) -> str:
    """ADM's name `<kind>_NxHxWxC.npz`, with what differs from the default request:
    `samples_4x8x8x1-seeds=4-7,sampler=ddim.npz`.

    Args:
      kind: "samples" or "latents".
      shape: (N, H, W, C).
      differences: values by name.
    """
    name = f"{kind}_{'x'.join(map(str, shape))}"
    words = ",".join(
        f"{key}={re.sub(r'[^A-Za-z0-9_.+@-]+', '_', str(value))}"
        for key, value in differences.items()
    )
    if len(name) + len(words) > _LONGEST_NAME:
        words = hashlib.sha256(words.encode()).hexdigest()[:16]
    return f"{name}{'-' if words else ''}{words}.npz"


class SampleFiles:
    """The three files of one request, and its parts: npy files in a directory `<output>.parts`,
    each there whole or not at all.

    Used as a context manager: one process at a time owns the directory of parts.
    """

    def __init__(self, output: epath.Path, request: Request, overwrite: bool = False):
        """Names the files of a request; `overwrite`: whether those of another one, or of unknown
        origin, may be replaced."""
        self.output, self.request, self._overwrite = output, request, overwrite
        self.picture, self.record = output.with_suffix(".png"), output.with_suffix(".json")
        self._parts = output.parent / f"{output.name}.parts"

    def finished(self) -> dict[str, Any] | None:
        """The record of this request's samples, if they are all there; None if they are to be
        drawn.

        Raises:
          UserError: files of another request, or of unknown origin, are in the way.
        """
        there = [path for path in (self.output, self.picture, self.record) if path.exists()]
        if not there:
            return None
        recorded = read_record(self.output)
        difference = (
            "files of unknown origin"
            if recorded is None
            else self.request.difference(recorded["request"])
        )
        begun = files.read_json(self._parts / _REQUEST)
        if begun is not None and not self.request.difference(begun):
            return None  # it was interrupted while these files were written
        if (
            not difference
            and self.output in there
            and files.size(self.output) == recorded.get("bytes")
        ):
            return recorded
        if not difference or self._overwrite:
            return None
        what = (
            "is of unknown origin (nothing beside it says of which request)"
            if recorded is None
            else f"holds samples of {difference}"
        )
        raise UserError(
            f"{there[0]} is there already and {what}: name another --output, or say --overwrite"
        )

    def __enter__(self) -> "SampleFiles":
        """Opens the directory of parts, which may hold some of an interrupted run.

        Raises:
          UserError: the parts there belong to another request, a living process draws them, or the
            place cannot be written.
        """
        files.make_directory(self._parts, "output directory")
        with contextlib.ExitStack() as stack:
            stack.enter_context(lock.owned(self._parts, "the sampling request in"))
            self._check_parts()
            self._release = stack.pop_all().close
        return self

    def __exit__(self, *_) -> None:
        self._release()

    def _check_parts(self) -> None:
        path = self._parts / _REQUEST
        begun = files.read_json(path)
        difference = self.request.difference(begun) if begun is not None else ""
        if (difference or begun is None) and self._overwrite:
            for entry in self._parts.iterdir():
                if entry.suffix in (".npy", ".json"):
                    entry.unlink()
        elif difference:
            checkpoint = (
                begun.get("source", {}).get("checkpoint")
                if isinstance(begun.get("source"), Mapping)
                else None
            )
            again = (
                f" (--checkpoint {checkpoint})"
                if checkpoint is not None and difference.startswith("another network")
                else ""
            )
            raise UserError(
                f"{self._parts} holds samples of an interrupted request with {difference}: repeat "
                f"that request{again}, delete the directory, or choose another --output"
            )
        elif begun is None and path.exists():
            raise UserError(f"{path} is damaged (it is not a request): delete {self._parts}")
        if begun is None or difference:
            files.write_bytes(path, json.dumps(self.request.as_json(), indent=2).encode())

    def done(self, count: int) -> np.ndarray:
        """(count,) bool: which samples are in parts. A part that cannot be read goes away, and is
        to be drawn anew."""
        there = np.zeros(count, bool)
        for start, stop, path in self._stretches():
            try:
                if len(self._read(path)) != stop - start or stop > count or there[start:stop].any():
                    raise ValueError("it has another number of samples")
            except (OSError, ValueError, EOFError) as error:
                log.warning("%s is damaged (%s): its samples are drawn anew", path, error)
                path.unlink()
                continue
            there[start:stop] = True
        return there

    def write(self, start: int, samples: np.ndarray, finite: np.ndarray) -> None:
        """Writes a part: samples (n, H, W, C) from number `start` on, and which of them are finite,
        (n,) bool."""
        name = f"{start:08d}-{start + len(samples):08d}"
        if not finite.all():  # first: a part that is there is complete
            files.write_bytes(
                self._parts / f"{name}.json", json.dumps(np.flatnonzero(~finite).tolist()).encode()
            )
        with files.writing(self._parts / f"{name}.npy") as file:
            np.save(file, samples, allow_pickle=False)

    def first(self, count: int) -> np.ndarray:
        """The first samples, at most `count`."""
        found, have = [], 0
        for _, _, path in self._stretches():
            if have < count:
                found.append(np.asarray(self._read(path)))
                have += len(found[-1])
        return np.concatenate(found)[:count]

    def finish(
        self, labels: np.ndarray, seeds: Sequence[int] | np.ndarray, more: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Puts the parts together in the npz, one at a time, writes the record beside it, and
        returns that; `leave` removes the parts.

        Args:
          labels: (N,) ints.
          seeds: N seed numbers.
          more: JSON values that the record has too.
        """
        stretches = self._stretches()
        first, digest = self._read(stretches[0][2]), hashlib.sha256()

        def parts() -> Iterator[bytes]:
            for _, _, path in stretches:
                content = np.ascontiguousarray(self._read(path)).tobytes()
                digest.update(content)
                yield content

        shape = (len(labels), *first.shape[1:])
        with (
            files.writing(self.output) as file,
            zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive,
        ):
            npz.write_rows(archive, "arr_0", first.dtype, shape, parts())
            npz.write(archive, "arr_1", np.asarray(labels, np.int64))
        bad = [
            start + row
            for start, stop, _ in stretches
            for row in files.read_json(self._parts / f"{start:08d}-{stop:08d}.json", list) or []
        ]
        record = {
            "samples": self.output.name,
            "bytes": files.size(self.output),
            "arr_0_sha256": digest.hexdigest(),
            "not_finite": {"count": len(bad), "seeds": [int(seeds[row]) for row in bad]},
            "request": self.request.as_json(),
            **more,
        }
        files.write_bytes(self.record, (json.dumps(_plain(record), indent=2) + "\n").encode())
        return record

    def leave(self) -> None:
        """Removes the parts of a finished request."""
        self._parts.rmtree()

    def _stretches(self) -> list[tuple[int, int, epath.Path]]:
        """(first sample, the one after the last, file) of each part, in order."""
        named = (
            (re.fullmatch(r"(\d+)-(\d+)\.npy", path.name), path)
            for path in self._parts.glob("*.npy")
        )
        return sorted((int(match[1]), int(match[2]), path) for match, path in named if match)

    @staticmethod
    def _read(path: epath.Path) -> np.ndarray:
        if files.is_local(path):
            return np.load(path, mmap_mode="r", allow_pickle=False)
        return np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)


def read_record(samples: epath.Path) -> dict[str, Any] | None:
    """What is recorded beside a file of samples; None if there is nothing, or something else."""
    record = files.read_json(samples.with_suffix(".json"))
    return record if record is not None and isinstance(record.get("request"), dict) else None


def stretches(rows: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Ascending rows in batches of consecutive ones, each at most `size` long."""
    for run in np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1):
        yield from (run[start : start + size] for start in range(0, len(run), size))


def named_seeds(seeds: Iterable[int]) -> str:
    """Seed numbers for a message: the first few."""
    seeds = list(seeds)
    return in_short(seeds[:20]) + (f" and {len(seeds) - 20} more" if len(seeds) > 20 else "")


def _plain(value: Any) -> Any:
    """The same with infinities, which JSON does not have, as text."""
    if isinstance(value, Mapping):
        return {name: _plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _short(value: Any) -> str:
    text = (
        ", ".join(f"{name} {entry}" for name, entry in value.items() if entry is not None)
        if isinstance(value, Mapping)
        else str(value)
    )
    return text if len(text) <= 100 else text[:99] + "…"
