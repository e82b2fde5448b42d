"""The verb `sample`: from a run or released weights to files of samples, drawn part by part.

A request for samples leaves three files of one name: the npz of ADM's evaluator (`arr_0` (N, H, W,
C) samples, `arr_1` (N,) int64 labels), a PNG of the first hundred, and a record, JSON, of the
request. Files of another request are replaced only with `overwrite`.
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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from diffit_jax.data import pixels
from diffit_jax.errors import UserError
from diffit_jax.runtime import backend, distributed, files, interruption, npz
from diffit_jax.runtime.console import Progress, in_short
from diffit_jax.sampling.decoder import Decoding
from diffit_jax.sampling.image_files import COLUMNS, grid_columns, write_images
from diffit_jax.sampling.request import Networks, Run, SampleRequest, SamplingOptions, Weights
from diffit_jax.sampling.sampler import evaluations

log = logging.getLogger(__name__)

_REQUEST = "request.json"
PREVIEWED = 100  # samples in the image
CLASSES = 20  # of the image by class, at most
TRAJECTORIES = 8  # samples in the image of trajectories, at most


@dataclasses.dataclass(frozen=True)
class RequestKey:
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
            object.__setattr__(self, name, files.plain(_plain(getattr(self, name))))

    def inspect(
        self, path: epath.Path, within: str = "", complete: Callable[[Any], bool] = lambda _: True
    ) -> files.Found:
        """Compare a file with this request, as `files.Artifact` does.

        `within` is the name by which the file holds the request (`as_json`).
        """

        def identity(content: Mapping[str, Any]) -> Mapping[str, Any] | None:
            request_key = content.get(within) if within else content
            found = request_key.get("identity") if isinstance(request_key, Mapping) else None
            return found if isinstance(found, Mapping) else None

        return files.Artifact(path, self.identity, identity, complete).inspect()

    def in_words(self, found: files.Found, source: Any) -> str:
        """Describe how another request differs from this one; `source`: of its network."""
        if not found.differences:
            return "another request, of an older version"
        name, (theirs, ours) = next(iter(found.differences.items()))
        if name.endswith("network"):
            theirs, ours = source, self.source
        return f"another {name} ({_short(theirs)}, now {_short(ours)})"

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {"identity": self.identity, "source": self.source}


class SampleFiles:
    """The three files of one request, and its parts: npy files in a directory `<output>.parts`.

    Each appears whole or not at all. Used as a context manager: one process at a time owns the
    directory of parts.
    """

    def __init__(self, output: epath.Path, request_key: RequestKey, overwrite: bool = False):
        """Name the files of a request.

        `overwrite`: whether those of another one, or of unknown origin, may be replaced.
        """
        self.output, self.request_key, self._overwrite = output, request_key, overwrite
        self.image, self.record = output.with_suffix(".png"), output.with_suffix(".json")
        self._parts = output.parent / f"{output.name}.parts"

    def finished(self) -> dict[str, Any] | None:
        """Return the record of this request's samples, if they are all there; None otherwise.

        Raises:
          UserError: files of another request, or of unknown origin, are in the way.
        """
        there = [path for path in (self.output, self.image, self.record) if path.exists()]
        if not there:
            return None
        found = self.request_key.inspect(
            self.record,
            "request",
            lambda record: self.output in there and files.size(self.output) == record.get("bytes"),
        )
        if self.request_key.inspect(self._parts / _REQUEST).state == "done":
            return None  # it was interrupted while these files were written
        if found.state == "done":
            return dict(found.content)
        if found.state == "partial" or self._overwrite:
            return None
        recorded, what = found.content.get("request"), "is of unknown origin (nothing beside it"
        if isinstance(recorded, dict):
            what = f"holds samples of {self.request_key.in_words(found, recorded.get('source'))}"
        else:
            what += " says of which request)"
        raise UserError(
            f"{there[0]} is there already and {what}: name another --output, or say --overwrite"
        )

    def __enter__(self) -> "SampleFiles":
        """Open the directory of parts, which may hold some of an interrupted run.

        Raises:
          UserError: the parts there belong to another request, a living process draws them, or the
            directory cannot be written.
        """
        files.make_directory(self._parts, "output directory")
        with contextlib.ExitStack() as stack:
            stack.enter_context(files.owned(self._parts, "the sampling request in"))
            self._check_parts()
            self._release = stack.pop_all().close
        return self

    def __exit__(self, *_) -> None:
        self._release()

    def _check_parts(self) -> None:
        path = self._parts / _REQUEST
        found = self.request_key.inspect(path)
        if found.state == "done":
            return
        if self._overwrite:
            for entry in self._parts.iterdir():
                if entry.suffix in (".npy", ".json"):
                    entry.unlink()
        elif found.content:
            source = found.content.get("source")
            difference = self.request_key.in_words(found, source)
            checkpoint = source.get("checkpoint") if isinstance(source, Mapping) else None
            named = checkpoint is not None and difference.startswith("another network")
            again = f" (--checkpoint {checkpoint})" if named else ""
            raise UserError(
                f"{self._parts} holds samples of an interrupted request with {difference}: repeat "
                f"that request{again}, delete the directory, or choose another --output"
            )
        elif found.state == "other":
            raise UserError(f"{path} is damaged (it is not a request): delete {self._parts}")
        files.write_json(path, self.request_key.as_json())

    def done(self, count: int) -> np.ndarray:
        """Return which samples are in parts, (count,) bool.

        A part that cannot be read is deleted, and drawn anew.
        """
        there = np.zeros(count, bool)
        for start, stop, path in self._segments():
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
        """Write a part.

        Args:
          start: number of its first sample.
          samples: (n, H, W, C).
          finite: (n,) bool, which of them are finite.
        """
        name = f"{start:08d}-{start + len(samples):08d}"
        if not finite.all():  # first: a part that is there is complete
            files.write_bytes(
                self._parts / f"{name}.json", json.dumps(np.flatnonzero(~finite).tolist()).encode()
            )
        with files.writing(self._parts / f"{name}.npy") as file:
            np.save(file, samples, allow_pickle=False)

    def first(self, count: int) -> np.ndarray:
        """Return the first samples, at most `count`."""
        found, have = [], 0
        for _, _, path in self._segments():
            if have < count:
                found.append(np.asarray(self._read(path)))
                have += len(found[-1])
        return np.concatenate(found)[:count]

    def finish(
        self, labels: np.ndarray, seeds: Sequence[int] | np.ndarray, more: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Join the parts in the npz, one at a time, write the record, and return it.

        `remove_parts` removes the parts.

        Args:
          labels: (N,) ints.
          seeds: N seed numbers.
          more: JSON values that the record has too.
        """
        # Hashed and written part by part: all samples may not fit in memory.
        segments = self._segments()
        first, digest = self._read(segments[0][2]), hashlib.sha256()

        def parts() -> Iterator[bytes]:
            for _, _, path in segments:
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
        # The record last: where it stands, the npz is whole.
        bad = [
            start + row
            for start, stop, _ in segments
            for row in files.read_json(self._parts / f"{start:08d}-{stop:08d}.json", list) or []
        ]
        record = {
            "samples": self.output.name,
            "bytes": files.size(self.output),
            "arr_0_sha256": digest.hexdigest(),
            "not_finite": {"count": len(bad), "seeds": [int(seeds[row]) for row in bad]},
            "request": self.request_key.as_json(),
            **more,
        }
        files.write_json(self.record, _plain(record))
        return record

    def remove_parts(self) -> None:
        """Remove the parts of a finished request."""
        self._parts.rmtree()

    def _segments(self) -> list[tuple[int, int, epath.Path]]:
        """Return (first sample, the one after the last, file) of each part, in order."""
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


def segments(rows: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Divide ascending rows (n,) into batches of consecutive ones, each at most `size` long."""
    for run in np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1):
        yield from (run[start : start + size] for start in range(0, len(run), size))


def named_seeds(seeds: Iterable[int]) -> str:
    """Format seed numbers for a message: the first few."""
    seeds = list(seeds)
    return in_short(seeds[:20]) + (f" and {len(seeds) - 20} more" if len(seeds) > 20 else "")


def _plain(value: Any) -> Any:
    """Return a value with infinities, which JSON does not have, as text."""
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


@backend.reproducible_numerics()
@backend.explain_oom(backend.SAMPLING_OOM_HINT)
def sample(
    source: epath.PathLike | Run | Weights,
    *,
    seeds: Sequence[int],
    labels: Sequence[int] | str | None = None,
    output: epath.PathLike | None = None,
    overwrite: bool = False,
    overrides: Mapping[str, Any] | None = None,
    decoding: Decoding | None = None,
    by_class: bool = False,
    frames: int = 0,
    images: str | None = None,
) -> epath.Path:
    """Draw samples and write them as an npz file, a PNG grid and a record.

    Interrupted, the same call resumes. A request is known by what its samples depend on: the values
    of the weights, seeds, labels, settings. If its samples are there already, nothing is drawn.

    Args:
      source: a work directory, or `Run` or `Weights`.
      seeds: one seed number per sample.
      labels: given out to the samples in turn, or text as in `parse_labels`; None:
        `default_labels`.
      output: path of the npz; None: `samples_NxHxWxC.npz` in the work directory or next to the
        weights (`latents_…` for latents), with the differences from the default request after it,
        see `default_name`. The grid of the first 100 has the same name with `.png`, the record with
        `.json`.
      overwrite: whether files of another request may be replaced.
      overrides: settings of sampling that differ from the config's section `sampling`, as in
        `Sampling.overridden`: `{"sampler.num_steps": 30, "guidance.scale": 2.0}`.
      decoding: an autoencoder that decodes latents to images.
      by_class: whether to draw `NAME.classes.png` too: a row of ten for each of the first twenty
        labels.
      frames: columns of `NAME.trajectory.png`, which shows for eight samples the estimates of the
        clean sample along the way; 0: it is not drawn.
      images: "png", "jpeg" or "webp": each sample is a file too, see `write_images`.

    Returns:
      Path of the npz, laid out as ADM's evaluator reads it: `arr_0` (N, H, W, C) uint8 images (or
      float32 latents, scaled as the model takes them), `arr_1` (N,) int64 labels.

    Raises:
      UserError: no run or checkpoint there, weights that cannot be read or are not finite, a label
        or seed out of range, settings or an autoencoder that do not fit, an output that cannot be
        written or is of another request; or, when all is written, samples that are not finite.
      interruption.Preempted: the machine is about to be taken away; finished parts are saved.
    """
    # --- Check everything before the first thing is written.
    source = source if isinstance(source, Run | Weights) else Run(source)
    request = SampleRequest.make(
        source, seeds=seeds, options=SamplingOptions(labels, overrides or {}, decoding)
    )
    _check_images(request, by_class, frames, images)
    output = request.output(output)
    distributed.on_primary(lambda: files.make_directory(output.parent, "output directory"))

    # --- The networks, and with them what the request is known by.
    networks = request.load()
    request_key = RequestKey(request.identity(networks), networks.origin)
    distributed.check_agreement(
        {
            "request for samples": lambda: str(request_key.identity),
            "code version": distributed.code_version,
        }
    )
    if backend.matmul_precision() != "default":
        log.info("precision of float32 matrix products: %s", backend.matmul_precision())

    # --- Draw them, unless that is done already.
    sample_files = SampleFiles(output, request_key, overwrite)
    record = distributed.on_primary(sample_files.finished)
    if distributed.broadcast_flag(record is not None):
        log.info("%s holds these samples already", output)
    else:
        record = _make(request, sample_files, networks)

    # --- More images of them.
    if by_class:
        image = output.with_suffix(".classes.png")
        distributed.on_primary(lambda: _draw_classes(image, output, request))
    if images:
        classes = request.labels if request.experiment.model.num_classes else None
        names, numbers = request.class_name, request.seeds.tolist()
        distributed.on_primary(lambda: write_images(output, classes, numbers, names, images))
    if frames:
        _draw_trajectory(output.with_suffix(".trajectory.png"), request, networks, frames)
    return conclude(output, record)


def _check_images(request: SampleRequest, by_class: bool, frames: int, images: str | None) -> None:
    experiment = request.experiment
    if images and experiment.space.samples != "samples":
        raise UserError("--images goes with --vae: samples of this model are latents")
    if by_class and not experiment.model.num_classes:
        raise UserError(f"the model in {request.source.name} is unconditional: leave out --grid")
    steps = experiment.sampling.sampler.steps(experiment.process)
    if frames > steps:
        raise UserError(f"--trajectory is {frames}: the sampler has {steps} steps")


def _make(
    request: SampleRequest, sample_files: SampleFiles, networks: Networks
) -> dict[str, Any] | None:
    """Draw missing parts and join all; return the record on the first process."""
    if request.experiment.space.note:
        log.info("%s", request.experiment.space.note)
    log.info("%d evaluations of the network for a sample", evaluations(request.experiment))
    with distributed.primary_context(lambda: sample_files):
        size = request.sampler.batch_size
        draw_parts(sample_files, request.seeds, size, lambda batch: request.draw(networks, batch))
        with interruption.held():  # a finished batch is written first
            return distributed.on_primary(lambda: _assemble(request, sample_files))


def draw_parts(
    sample_files: SampleFiles,
    seeds: np.ndarray,
    batch_size: int,
    draw: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
    what: str = "sample",
) -> None:
    """Make the samples that are in no part yet, part by part.

    Args:
      sample_files: that keep the parts.
      seeds: (N,) a number of each sample, for messages.
      batch_size: samples of a part, at most.
      draw: from (n,) indices into the seeds to n samples, and which of them are finite.
      what: is done, for the progress bar.

    Raises:
      interruption.Preempted, interruption.Interrupted: finished parts are saved.
    """
    first, count = distributed.is_primary(), len(seeds)
    done_there = sample_files.done(count) if first else np.zeros(count, bool)
    there = np.array(distributed.broadcast(done_there.tolist()))
    done = int(there.sum())

    def kept() -> str:
        return f"{done} of {count} samples are saved beside {sample_files.output}"

    progress = Progress(what, count, done=done, unit="sample", shown=first)
    try:
        with progress, distributed.PreemptionNotice() as notice, distributed.lost_processes():
            for batch in segments(np.flatnonzero(~there), batch_size):
                samples, finite = draw(batch)
                if first:
                    if not finite.all():
                        bad = named_seeds(seeds[batch][~finite].tolist())
                        log.warning("samples of seeds %s are not finite", bad)
                    sample_files.write(batch[0], samples, finite)
                progress.advance(len(samples))
                done += len(samples)
                if notice.reached() and done < count:
                    raise notice.ending(kept())
    except KeyboardInterrupt as error:
        raise interruption.Interrupted(kept()) from error


def _assemble(request: SampleRequest, sample_files: SampleFiles) -> dict[str, Any]:
    """Join the files of a request whose parts are all there; return the record."""
    labelled, preview = request.experiment.model.num_classes > 0, request.experiment.space.preview
    name = request.class_name if labelled else None
    more = {"evaluations": evaluations(request.experiment)}
    return finish_files(sample_files, request.labels, request.seeds, name, preview, more=more)


def finish_files(
    sample_files: SampleFiles,
    labels: np.ndarray,
    seeds: np.ndarray,
    class_name: Callable[[int], str] | None = None,
    preview: Callable[[np.ndarray], np.ndarray] = lambda images: images,
    *,
    more: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Join parts that are all there, draw the first samples, and return the record.

    Args:
      sample_files: that keep the parts.
      labels: (N,) ints.
      seeds: (N,) ints.
      class_name: the name of a label; None: there are no classes.
      preview: of a `Space`.
      more: JSON values that the record has too.
    """
    more = {"matmul_precision": backend.matmul_precision()} | dict(more or {})
    record = sample_files.finish(labels, seeds, more)
    samples = sample_files.first(PREVIEWED)
    columns, above = grid_columns(labels[: len(samples)], class_name)
    pixels.write_preview(sample_files.image, samples, preview, columns, above=above)
    sample_files.remove_parts()
    return record


def _draw_classes(image: epath.Path, output: epath.Path, request: SampleRequest) -> None:
    """Draw an image with a row for each label, from the npz."""
    labels, space = request.labels, request.experiment.space
    shown = np.unique(labels)[:CLASSES].tolist()
    rows = [np.flatnonzero(labels == label)[:COLUMNS] for label in shown]
    columns = max(map(len, rows))
    samples = npz.rows_of(output, "arr_0", np.concatenate(rows))
    ends = np.cumsum([len(row) for row in rows])[:-1]
    cells = pixels.padded_rows(np.split(samples, ends), columns)
    names = [*map(request.class_name, shown)]
    pixels.write_preview(image, cells, space.preview, columns, beside=names)
    log.info("wrote %s", image)


def _draw_trajectory(
    image: epath.Path, request: SampleRequest, networks: Networks, frames: int
) -> None:
    """Draw the trajectories of the first samples, a row for each."""
    shown = np.arange(min(TRAJECTORIES, len(request.seeds)))
    batches = segments(shown, request.sampler.batch_size)
    ways = np.concatenate([request.follow(networks, batch, frames) for batch in batches])
    samples, space = ways.reshape(-1, *ways.shape[2:]), request.experiment.space

    def write() -> None:
        pixels.write_preview(image, samples, space.preview, frames)
        log.info("wrote %s", image)

    distributed.on_primary(write)


def conclude(output: epath.Path, record: Mapping[str, Any] | None) -> epath.Path:
    """End a request on every process, given its record on the first one.

    Raises `UserError` unless all samples are finite.
    """
    bad: Mapping[str, Any] = record["not_finite"] if record else {"count": 0}
    if distributed.broadcast_flag(bad["count"] > 0):
        seeds = f" ({bad['count']}, of seeds {named_seeds(bad['seeds'])})" if record else ""
        raise UserError(
            f"{output} is written, but some of its samples are not finite{seeds}: leave them out, "
            "or use other weights"
        )
    return output
