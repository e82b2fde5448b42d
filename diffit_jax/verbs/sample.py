"""The verb `sample`: from a run or a file of released weights to files of samples."""

import dataclasses
import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from diffit_jax import workdir as workdirs
from diffit_jax.data import pixels
from diffit_jax.data.labels import give_out, parse_labels
from diffit_jax.errors import UserError
from diffit_jax.experiment import Experiment
from diffit_jax.runtime import backend, contents, distributed, files, interruption, rows
from diffit_jax.runtime.console import Progress
from diffit_jax.runtime.ranges import in_short
from diffit_jax.sampling.files import Request, SampleFiles, default_name, named_seeds, stretches
from diffit_jax.sampling.networks import Run, Weights, open_weaker
from diffit_jax.sampling.sampler import Sampler, Variables, default_labels
from diffit_jax.sections import CHOICES, Sampling
from diffit_jax.training.compiling import Opened, open_experiment

log = logging.getLogger(__name__)

PREVIEWED = 100  # samples in the picture


@backend.pinned()
@backend.memory_for(backend.SAMPLING_MEMORY)
def sample(
    source: epath.PathLike | Run | Weights,
    seeds: Sequence[int],
    labels: Sequence[int] | str | None = None,
    output: epath.PathLike | None = None,
    overwrite: bool = False,
    overrides: Mapping[str, Any] | None = None,
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

    Returns:
      Path of the npz, laid out as ADM's evaluator reads it: `arr_0` (N, H, W, C) uint8 images (or
      float32 latents, scaled as the model takes them), `arr_1` (N,) int64 labels.

    Raises:
      UserError: no run or checkpoint there, weights that cannot be read or are not finite, a label
        or seed out of range, settings that do not fit, an output that cannot be written or is of
        another request; or, when all is written, samples that are not finite.
      interruption.Preempted: the machine is about to be taken away; what is drawn is saved.
    """
    # --- Check everything before the first thing is written.
    source = source if isinstance(source, Run | Weights) else Run(source)
    asked = _Asked.make(source, seeds, labels, output, overrides or {})
    distributed.first_then_all(
        lambda: files.make_directory(asked.output.parent, "output directory"), lambda: None
    )

    # --- The networks, and with them what the request is known by.
    variables, origin = source.load(asked.opened)
    weaker, weaker_origin = asked.weaker[0].load(asked.weaker[1]) if asked.weaker else (None, {})
    origin |= {f"weaker {name}": value for name, value in weaker_origin.items()}
    request = Request(asked.identity(variables, weaker), origin)
    distributed.check_agreement(
        {
            "request for samples": lambda: str(request.identity),
            "code version": distributed.code_version,
        }
    )
    log.info("precision of float32 matrix products: %s", backend.matmul_precision())

    # --- Is it done already?
    sample_files = SampleFiles(asked.output, request, overwrite)
    record = distributed.first_then_all(sample_files.finished, lambda: None)
    if distributed.agreed(record is not None):
        log.info("%s holds these samples already", asked.output)
        return _conclude(asked.output, record)
    if asked.experiment.space.note:
        log.info("%s", asked.experiment.space.note)

    # --- Draw the parts that are not there, and put them together.
    with distributed.first_holds(lambda: sample_files):
        _draw(asked, sample_files, variables, weaker)
        with interruption.held():  # what is complete need not be begun again
            record = distributed.first_then_all(
                lambda: _assemble(asked, sample_files), lambda: None
            )
    return _conclude(asked.output, record)


@dataclasses.dataclass(frozen=True)
class _Asked:
    """What is asked for, checked.

    Attributes:
      opened: the source's experiment on a mesh.
      experiment: the same, sampled as asked for.
      seeds, labels: (N,) int64.
      output: path of the npz.
      sampler: that draws.
      weaker: run of the second network of autoguidance, and its experiment.
    """

    opened: Opened
    experiment: Experiment
    seeds: np.ndarray
    labels: np.ndarray
    output: epath.Path
    sampler: Sampler
    weaker: tuple[Run, Opened] | None

    @classmethod
    def make(
        cls,
        source: Run | Weights,
        seeds: Sequence[int],
        labels: Sequence[int] | str | None,
        output: epath.PathLike | None,
        overrides: Mapping[str, Any],
    ) -> "_Asked":
        """Checks a request; arguments as of `sample`."""
        opened = open_experiment(source.config, to_train=False, config_file=source.config_file)
        usual, model = opened.experiment.sampling, opened.experiment.model

        # --- Seeds, labels, settings.
        if len(seeds) == 0 or min(seeds) < 0 or max(seeds) >= 2**32:
            raise UserError("seeds must be at least one whole number in [0, 2^32): change --seeds")
        label_of = _labels(labels, seeds, model.num_classes, source.name)
        sampling = usual.overridden(overrides)
        if sampling.guidance.needs_labels and not model.num_classes:
            raise UserError(
                f"the model in {source.name} is unconditional: leave out --guidance.scale"
            )
        experiment = opened.experiment.with_sampling(sampling)
        weaker = None
        if sampling.guidance.needs_weaker:
            weaker = open_weaker(experiment, getattr(sampling.guidance, "workdir", ""))

        # --- The sampler, on devices that hold the right rows.
        weaker_model = weaker[1].experiment.model if weaker else None
        sampler = Sampler(experiment, opened.mesh, len(seeds), weaker_model)
        rows.prove_rows(opened.mesh, sampler.batch_size)

        # --- Where to.
        words = None
        if not np.array_equal(label_of, default_labels(seeds, model.num_classes)):
            words = labels if isinstance(labels, str) else in_short(label_of.tolist())
        differences = dict(_differences(usual, sampling, seeds, words))
        if output is None:
            shape = (len(seeds), *model.sample_shape)
            differences |= source.differences
            name = default_name(experiment.space.samples, shape, differences)
            output = source.directory / name
        output = files.resolve(output, "output")
        if output.suffix != ".npz" or output.is_dir():
            raise UserError(f"--output {output} must be a file that ends in .npz: change it")
        numbers = np.asarray(seeds, np.int64)
        return cls(opened, experiment, numbers, label_of, output, sampler, weaker)

    def identity(self, variables: Variables, weaker: Variables | None) -> dict[str, Any]:
        """JSON values by name of all that the samples depend on: not how many are drawn at once,
        nor where the networks lie."""
        sampling = self.experiment.sampling
        settings = {f"sampling.{name}": value for name, value in _makes_samples(sampling).items()}
        weaker_network = None
        if self.weaker and weaker is not None:
            weaker_network = _network(self.weaker[1].experiment, weaker)
        return {
            "network": _network(self.experiment, variables),
            "weaker network": weaker_network,
            "seeds": _digest(self.seeds),
            "labels": _digest(self.labels),
            "matmul_precision": backend.matmul_precision(),
            **settings,
        }


def _draw(
    asked: _Asked, sample_files: SampleFiles, variables: Variables, weaker: Variables | None
) -> None:
    """Draws the samples that are in no part yet, part by part."""
    first, count, space = distributed.is_first(), len(asked.seeds), asked.experiment.space
    done_there = sample_files.done(count) if first else np.zeros(count, bool)
    there = np.array(distributed.from_first(done_there.tolist()))
    done = int(there.sum())

    def kept() -> str:
        return f"{done} of {count} samples are saved beside {asked.output}"

    progress = Progress("sample", count, done=done, unit="sample", shown=first)
    try:
        with progress, distributed.PreemptionNotice() as notice, distributed.lost_processes():
            missing = stretches(np.flatnonzero(~there), asked.sampler.batch_size)
            for index, batch in enumerate(missing):
                seeds, labels = asked.seeds[batch], asked.labels[batch]
                drawn = asked.sampler.draw_batch(variables, seeds, labels, weaker)
                if first:
                    finite = np.asarray(np.isfinite(drawn).reshape(len(drawn), -1).all(axis=1))
                    if not finite.all():
                        bad = named_seeds(seeds[~finite].tolist())
                        log.warning("samples of seeds %s are not finite", bad)
                    sample_files.write(batch[0], space.leave(drawn, space.variables), finite)
                progress.advance(len(drawn))
                done += len(drawn)
                if notice.reached(index) and done < count:
                    raise notice.ending(kept())
    except KeyboardInterrupt as error:
        raise interruption.Interrupted(kept()) from error


def _assemble(asked: _Asked, sample_files: SampleFiles) -> dict[str, Any]:
    """The files of a request whose parts are all there; returns the record."""
    precision = {"matmul_precision": backend.matmul_precision()}
    record = sample_files.finish(asked.labels, asked.seeds, precision)
    preview = asked.experiment.space.preview
    pixels.write_preview(sample_files.picture, sample_files.first(PREVIEWED), preview)
    sample_files.leave()
    return record


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


def _labels(
    asked: Sequence[int] | str | None, seeds: Sequence[int], num_classes: int, name: str
) -> np.ndarray:
    """The label of each seed, (N,) int64."""
    if asked is None:
        return default_labels(seeds, num_classes)
    if not num_classes:
        raise UserError(f"the model in {name} is unconditional: leave out --labels")
    if isinstance(asked, str):
        return parse_labels(asked, seeds, num_classes)
    return give_out(asked, len(seeds), num_classes)


def _network(experiment: Experiment, variables: Variables) -> dict[str, Any]:
    """What makes a network's samples beside the settings: what its arrays hold, and what is
    computed with them."""
    return {
        "contents": contents.fingerprint(variables),
        "model": workdirs.number_settings("model", experiment.model),
        "process": workdirs.number_settings("process", experiment.process),
    }


def _makes_samples(sampling: Sampling) -> dict[str, Any]:
    """Settings that samples depend on, by the names of their flags."""
    settings: dict[str, Any] = {"pixel_rounding": sampling.pixel_rounding}
    for section, classes in CHOICES.items():
        value = getattr(sampling, section)
        settings[section] = next(name for name, cls in classes.items() if cls is type(value))
        for name, setting in dataclasses.asdict(value).items():
            if name != "workdir":
                settings[f"{section}.{name}"] = setting
    return settings


def _differences(
    usual: Sampling, sampling: Sampling, seeds: Sequence[int], labels: str | None
) -> Iterator[tuple[str, Any]]:
    """What of a request differs from the default one, in words; `labels` None: they do not."""
    seeds = [int(seed) for seed in seeds]
    if seeds != list(range(len(seeds))):
        yield "seeds", _in_words(in_short(seeds))
    if labels is not None:
        yield "labels", _in_words(labels)
    ours, theirs = _makes_samples(sampling), _makes_samples(usual)
    for name, value in ours.items():
        if value != "" and value != theirs.get(name):
            yield name, value
    place = getattr(sampling.guidance, "workdir", "")
    if place != getattr(usual.guidance, "workdir", ""):
        yield "guidance.workdir", epath.Path(place).name
    if backend.matmul_precision() != "default":
        yield "matmul_precision", backend.matmul_precision()


def _in_words(text: str) -> str:
    return text if len(text) <= 40 else hashlib.sha256(text.encode()).hexdigest()[:12]


def _digest(numbers: np.ndarray) -> str:
    return f"{len(numbers)} numbers, {hashlib.sha256(numbers.tobytes()).hexdigest()[:16]}"
