"""The verb `sample`: from a run or a file of released weights to files of samples."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from diffit_jax.data import pixels
from diffit_jax.errors import UserError
from diffit_jax.runtime import backend, distributed, files, interruption, npz
from diffit_jax.runtime.console import Progress
from diffit_jax.sampling.decoder import Decoding
from diffit_jax.sampling.files import Request, SampleFiles, named_seeds, stretches
from diffit_jax.sampling.networks import Run, Weights
from diffit_jax.sampling.request import Asked, Networks
from diffit_jax.spaces import Space

log = logging.getLogger(__name__)

PREVIEWED = 100  # samples in the picture
COLUMNS, CLASSES = 10, 20  # of the picture by class, at most
WATCHED = 8  # samples in the picture of trajectories, at most


@backend.pinned()
@backend.memory_for(backend.SAMPLING_MEMORY)
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
) -> epath.Path:
    """Draws samples and writes them as an npz file, a PNG grid and a record. Interrupted, the same
    call goes on where it was.

    A request is known by what makes samples: what the weights hold, seeds, labels, settings. If its
    samples are there already, nothing is drawn.

    Args:
      source: a work directory, or `Run` or `Weights`.
      seeds: one seed number per sample.
      labels: given out to the samples in turn, or text as in `parse_labels`; None:
        `default_labels`.
      output: path of the npz; None: `samples_NxHxWxC.npz` in the work directory or beside the
        weights (`latents_…` for latents), with what differs from the default request after it, see
        `default_name`. The grid of the first 100 has the same name with `.png`, the record (what
        was asked for, and which samples are not finite) with `.json`.
      overwrite: whether files of another request may be replaced.
      overrides: what replaces values of the config's section `sampling`, as in
        `Sampling.overridden`: `{"sampler.num_steps": 30, "guidance.scale": 2.0}`.
      decoding: makes images of latents, by an autoencoder.
      by_class: whether to draw `NAME.classes.png` too: a row of ten for each of the first twenty
        labels.
      frames: how many columns `NAME.trajectory.png` has, in which eight samples come about: the
        clean sample as it is estimated along the way; 0: it is not drawn.

    Returns:
      Path of the npz, laid out as ADM's evaluator reads it: `arr_0` (N, H, W, C) uint8 images (or
      float32 latents, scaled as the model takes them), `arr_1` (N,) int64 labels.

    Raises:
      UserError: no run or checkpoint there, weights that cannot be read or are not finite, a label
        or seed out of range, settings or an autoencoder that do not fit, an output that cannot be
        written or is of another request; or, when all is written, samples that are not finite.
      interruption.Preempted: the machine is about to be taken away; what is drawn is saved.
    """
    # --- Check everything before the first thing is written.
    source = source if isinstance(source, Run | Weights) else Run(source)
    asked = Asked.make(
        source, seeds=seeds, labels=labels, overrides=overrides or {}, decoding=decoding
    )
    _check_pictures(asked, by_class, frames)
    output = asked.output(output)
    distributed.on_primary(lambda: files.make_directory(output.parent, "output directory"))

    # --- The networks, and with them what the request is known by.
    networks = asked.load()
    request = Request(asked.identity(networks), networks.origin)
    distributed.check_agreement(
        {
            "request for samples": lambda: str(request.identity),
            "code version": distributed.code_version,
        }
    )
    log.info("precision of float32 matrix products: %s", backend.matmul_precision())

    # --- Draw them, unless that is done already.
    sample_files = SampleFiles(output, request, overwrite)
    record = distributed.on_primary(sample_files.finished)
    if distributed.agreed(record is not None):
        log.info("%s holds these samples already", output)
    else:
        record = _make(asked, sample_files, networks)

    # --- More pictures of them.
    space = asked.experiment.space
    if by_class:
        picture = output.with_suffix(".classes.png")
        distributed.on_primary(lambda: _draw_classes(picture, output, asked.labels, space))
    if frames:
        _draw_trajectory(output.with_suffix(".trajectory.png"), asked, networks, frames)
    return _conclude(output, record)


def _check_pictures(asked: Asked, by_class: bool, frames: int) -> None:
    experiment = asked.experiment
    if by_class and not experiment.model.num_classes:
        raise UserError(f"the model in {asked.source.name} is unconditional: leave out --grid")
    steps = experiment.sampling.sampler.steps(experiment.process)
    if frames > steps:
        raise UserError(f"--trajectory is {frames}: the sampler has {steps} steps")


def _make(asked: Asked, sample_files: SampleFiles, networks: Networks) -> dict[str, Any] | None:
    """Draws the parts that are not there, puts all together, gives the first process the record."""
    if asked.experiment.space.note:
        log.info("%s", asked.experiment.space.note)
    with distributed.first_holds(lambda: sample_files):
        _draw(asked, sample_files, networks)
        with interruption.held():  # what is complete need not be begun again
            return distributed.on_primary(lambda: _assemble(asked, sample_files))


def _draw(asked: Asked, sample_files: SampleFiles, networks: Networks) -> None:
    """Draws the samples that are in no part yet, part by part."""
    first, count = distributed.is_first(), len(asked.seeds)
    done_there = sample_files.done(count) if first else np.zeros(count, bool)
    there = np.array(distributed.from_first(done_there.tolist()))
    done = int(there.sum())

    def kept() -> str:
        return f"{done} of {count} samples are saved beside {sample_files.output}"

    progress = Progress("sample", count, done=done, unit="sample", shown=first)
    try:
        with progress, distributed.PreemptionNotice() as notice, distributed.lost_processes():
            missing = stretches(np.flatnonzero(~there), asked.sampler.batch_size)
            for batch in missing:
                samples, finite = asked.draw(networks, batch)
                if first:
                    if not finite.all():
                        bad = named_seeds(asked.seeds[batch][~finite].tolist())
                        log.warning("samples of seeds %s are not finite", bad)
                    sample_files.write(batch[0], samples, finite)
                progress.advance(len(samples))
                done += len(samples)
                if notice.reached() and done < count:
                    raise notice.ending(kept())
    except KeyboardInterrupt as error:
        raise interruption.Interrupted(kept()) from error


def _assemble(asked: Asked, sample_files: SampleFiles) -> dict[str, Any]:
    """The files of a request whose parts are all there; returns the record."""
    precision = {"matmul_precision": backend.matmul_precision()}
    record = sample_files.finish(asked.labels, asked.seeds, precision)
    preview = asked.experiment.space.preview
    pixels.write_preview(sample_files.picture, sample_files.first(PREVIEWED), preview)
    sample_files.leave()
    return record


def _draw_classes(
    picture: epath.Path, output: epath.Path, labels: np.ndarray, space: Space
) -> None:
    """A picture with a row for each label, from the npz."""
    rows = [np.flatnonzero(labels == label)[:COLUMNS] for label in np.unique(labels)[:CLASSES]]
    samples = npz.rows_of(output, "arr_0", np.concatenate(rows))
    cells = np.zeros((len(rows), COLUMNS, *samples.shape[1:]), samples.dtype)
    begin = 0
    for cell, row in zip(cells, rows, strict=True):
        cell[: len(row)] = samples[begin : begin + len(row)]
        begin += len(row)
    pixels.write_preview(picture, cells.reshape(-1, *samples.shape[1:]), space.preview, COLUMNS)
    log.info("wrote %s", picture)


def _draw_trajectory(picture: epath.Path, asked: Asked, networks: Networks, frames: int) -> None:
    """A picture of how the first samples come about, a row for each."""
    space, size = asked.experiment.space, asked.sampler.batch_size
    shown = np.arange(min(WATCHED, len(asked.seeds)))
    rows = []
    for start in range(0, len(shown), size):
        batch = shown[start : start + size]
        seeds, labels = asked.seeds[batch], asked.labels[batch]
        watched = asked.sampler.watch_batch(
            networks.variables, seeds, labels, frames, networks.weaker
        )
        rows.append(space.leave(watched.reshape(-1, *watched.shape[2:])))
    samples = np.concatenate(rows)

    def write() -> None:
        pixels.write_preview(picture, samples, space.preview, frames)
        log.info("wrote %s", picture)

    distributed.on_primary(write)


def _conclude(output: epath.Path, record: Mapping[str, Any] | None) -> epath.Path:
    """The end of a request on every process, given its record on the first one: good only if all
    samples are finite."""
    bad: Mapping[str, Any] = record["not_finite"] if record else {"count": 0}
    if distributed.agreed(bad["count"] > 0):
        seeds = f" ({bad['count']}, of seeds {named_seeds(bad['seeds'])})" if record else ""
        raise UserError(
            f"{output} is written, but some of its samples are not finite{seeds}: leave them out, "
            "or use other weights"
        )
    return output
