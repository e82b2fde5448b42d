"""The verb `sample`: from a run or a file of released weights to files of samples."""

import dataclasses
import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from diffit_jax import experiment
from diffit_jax.data import pixels
from diffit_jax.data.labels import give_out, parse_labels
from diffit_jax.errors import UserError
from diffit_jax.experiment import CHECKPOINTS, SNAPSHOTS, Experiment, Sampling
from diffit_jax.interop import official
from diffit_jax.runtime import (
    backend,
    checkpoint,
    contents,
    distributed,
    files,
    interruption,
    parallel,
)
from diffit_jax.runtime.console import Progress
from diffit_jax.runtime.ranges import in_short
from diffit_jax.sampling.files import Request, SampleFiles, default_name, named_seeds, stretches
from diffit_jax.sampling.sampler import Sampler, Variables, batch_settings, default_labels
from diffit_jax.training import power_ema
from diffit_jax.training.state import Opened, TrainState, open_experiment

log = logging.getLogger(__name__)

PREVIEWED = 100  # samples in the picture


class Run:
    """A network in a work directory: the averaged parameters of its newest usable checkpoint, or an
    average of another length."""

    def __init__(
        self,
        workdir: epath.PathLike,
        ema_length: float | None = None,
        checkpoint: int | None = None,
        allow_nonfinite: bool = False,
    ):
        """Reads the run's config.

        Args:
          workdir: of the run.
          ema_length: asks for an average made of its snapshots, see `training.power_ema`.
          checkpoint: step of a checkpoint (with `ema_length`: of a snapshot) instead of the newest.
          allow_nonfinite: whether parameters may have NaNs or infinities.
        """
        self.directory = files.resolve(workdir, "workdir")
        self.name = f"workdir {self.directory}"
        self.config = experiment.read_config(self.directory)
        self.config_file = self.directory / experiment.CONFIG_FILE
        self._ema_length, self._checkpoint, self._allow_nonfinite = (
            ema_length,
            checkpoint,
            allow_nonfinite,
        )
        self.differences = {
            name: value
            for name, value in (("ema_length", ema_length), ("checkpoint", checkpoint))
            if value is not None
        }

    def load(self, opened: Opened) -> tuple[Variables, dict[str, Any]]:
        """(variables, where they are from). Raises `UserError` if there is no usable checkpoint."""
        if self._ema_length is None:
            step, variables = restore_variables(
                self.directory, opened.state, self._checkpoint, self._allow_nonfinite
            )
        else:
            lengths = opened.experiment.ema.power_lengths
            step, variables = reconstruct_variables(
                self.directory, opened.state, lengths, self._ema_length, self._checkpoint
            )
        bad = [] if self._allow_nonfinite else contents.not_finite(variables)
        if bad:
            raise UserError(
                f"the averages of {self.name} at step {step} are not finite "
                f"({contents.first_few(bad)}): sample an older one by "
                "--checkpoint, or say --allow_nonfinite"
            )
        return variables, {
            "workdir": str(self.directory),
            "checkpoint": step,
            "ema_length": self._ema_length,
        }


class Weights:
    """A network in a file of released weights, sampled as a config says whose `model` takes the
    file's sizes."""

    config_file = None
    differences: Mapping[str, Any] = {}

    def __init__(
        self, path: epath.PathLike, config: Mapping[str, Any], allow_nonfinite: bool = False
    ):
        """Reads the names and shapes of the tensors; `allow_nonfinite`: whether they may have NaNs
        or infinities."""
        self._path, self._allow_nonfinite = files.resolve(path, "weights"), allow_nonfinite
        self.name = f"weights {self._path}"
        self.directory = self._path.parent
        self.config = official.fit_config(config, self._path)

    def load(self, opened: Opened) -> tuple[Variables, dict[str, Any]]:
        """(variables, where they are from)."""
        shardings = parallel.shardings(opened.mesh, opened.state.ema_variables)
        _, variables = official.load(
            self._path, sharding=shardings, allow_nonfinite=self._allow_nonfinite
        )
        return variables, {"weights": str(self._path)}


@backend.pinned()
@backend.memory_for(backend.SAMPLING_MEMORY)
def sample(
    source: epath.PathLike | Run | Weights,
    seeds: Sequence[int],
    labels: Sequence[int] | str | None = None,
    output: epath.PathLike | None = None,
    overwrite: bool = False,
    **overrides: Any,
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
        `sample_files.default_name`. The grid of the first 100 has the same name with `.png`, the
        record (what was asked for, and which samples are not finite) with `.json`.
      overwrite: whether files of another request may be replaced.
      **overrides: values that replace those of the config's section `sampling`.

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
    opened = open_experiment(source.config, to_train=False, config_file=source.config_file)
    loaded, mesh = opened.experiment, opened.mesh
    num_classes, is_latent = loaded.model.num_classes, bool(loaded.data.autoencoder)
    if len(seeds) == 0 or min(seeds) < 0 or max(seeds) >= 2**32:
        raise UserError("seeds must be at least one whole number in [0, 2^32): change --seeds")
    asked, labels = labels, _labels(labels, seeds, num_classes, source.name)
    settings = _override(loaded.sampling, overrides)
    if settings.guide.active and settings.guidance != "autoguidance" and not num_classes:
        raise UserError(f"the model in {source.name} is unconditional: leave out --guidance_scale")
    in_words = asked if isinstance(asked, str) else in_short(labels.tolist())
    labels_differ = not np.array_equal(labels, default_labels(seeds, num_classes))
    differences = dict(
        _differences(loaded.sampling, settings, seeds, in_words if labels_differ else None)
    ) | dict(source.differences)
    settings = batch_settings(settings, mesh, len(seeds))
    parallel.prove_rows(mesh, settings.batch_size)
    weaker_run = weaker_opened = None
    if settings.guide.active and settings.guidance == "autoguidance":
        weaker_run, weaker_opened = _open_weaker(loaded, settings.guide_workdir)
    sampler = Sampler(loaded, mesh, settings, weaker_opened and weaker_opened.experiment.model)
    kind, shape = "latents" if is_latent else "samples", (len(seeds), *loaded.model.sample_shape)
    output = (
        source.directory / default_name(kind, shape, differences)
        if output is None
        else files.resolve(output, "output")
    )
    if output.suffix != ".npz" or output.is_dir():
        raise UserError(f"--output {output} must be a file that ends in .npz: change it")
    distributed.first_then_all(
        lambda: files.make_directory(output.parent, "output directory"), lambda: None
    )

    # --- Networks, and with them the whole request.
    variables, origin = source.load(opened)
    weaker, weaker_origin = weaker_run.load(weaker_opened) if weaker_run else (None, None)
    identity = {
        "network": _network(loaded, variables),
        "weaker network": weaker_run and _network(weaker_opened.experiment, weaker),
        "seeds": _digest(seeds),
        "labels": _digest(labels),
        "matmul_precision": backend.matmul_precision(),
        **{f"sampling.{name}": value for name, value in _makes_samples(settings).items()},
    }
    request = Request(
        identity,
        {**origin, **{f"weaker {name}": value for name, value in (weaker_origin or {}).items()}},
    )
    distributed.check_agreement(
        {
            "request for samples": lambda: str(request.identity),
            "code version": distributed.code_version,
        }
    )
    log.info("precision of float32 matrix products: %s", backend.matmul_precision())
    files_there = SampleFiles(output, request, overwrite)
    record = distributed.first_then_all(files_there.finished, lambda: None)
    if distributed.agreed(record is not None):
        log.info("%s holds these samples already", output)
        return _conclude(output, record)
    if is_latent:
        log.info(
            "writing latents of %s: decoding them to images needs the autoencoder, which is not "
            "there yet",
            loaded.data.autoencoder,
        )

    # --- Draw, part by part.
    first = distributed.is_first()
    with distributed.first_holds(lambda: files_there):
        there = np.array(
            distributed.from_first(
                files_there.done(len(seeds)) if first else np.zeros(len(seeds), bool)
            )
        )
        done = int(there.sum())
        progress = Progress("sample", len(seeds), done=done, unit="sample", shown=first)
        kept = f"{done} of {len(seeds)} samples are saved beside {output}"
        try:
            with progress, distributed.PreemptionNotice() as notice, distributed.lost_processes():
                for index, batch in enumerate(
                    stretches(np.flatnonzero(~there), settings.batch_size)
                ):
                    drawn = sampler.draw_batch(
                        variables, np.asarray(seeds)[batch], labels[batch], weaker
                    )
                    if first:
                        finite = np.isfinite(drawn).reshape(len(drawn), -1).all(axis=1)
                        if not finite.all():
                            log.warning(
                                "samples of seeds %s are not finite",
                                named_seeds(np.asarray(seeds)[batch][~finite].tolist()),
                            )
                        files_there.write(
                            batch[0], drawn if is_latent else _to_pixels(drawn, settings), finite
                        )
                    progress.advance(len(drawn))
                    done += len(drawn)
                    kept = f"{done} of {len(seeds)} samples are saved beside {output}"
                    if notice.reached(index) and done < len(seeds):
                        raise notice.ending(kept)
        except KeyboardInterrupt as error:
            raise interruption.Interrupted(kept) from error

        def finish() -> dict[str, Any]:
            record = files_there.finish(
                labels, seeds, {"matmul_precision": backend.matmul_precision()}
            )
            pixels.write_preview(files_there.picture, files_there.first(PREVIEWED), is_latent)
            files_there.leave()
            return record

        with interruption.held():  # what is complete need not be begun again
            record = distributed.first_then_all(finish, lambda: None)
    return _conclude(output, record)


def _labels(
    asked: Sequence[int] | str | None, seeds: Sequence[int], num_classes: int, name: str
) -> np.ndarray:
    """The label of each seed, (N,) int64."""
    if asked is None:
        return default_labels(seeds, num_classes)
    if not num_classes:
        raise UserError(f"the model in {name} is unconditional: leave out --labels")
    return (
        parse_labels(asked, seeds, num_classes)
        if isinstance(asked, str)
        else give_out(asked, len(seeds), num_classes)
    )


def _conclude(output: epath.Path, record: Mapping[str, Any] | None) -> epath.Path:
    """The end of a request on every process, given its record on the first one: good only if all
    samples are finite."""
    bad = record["not_finite"] if record else {"count": 0}
    if distributed.agreed(bad["count"] > 0):
        seeds = f" ({bad['count']}, of seeds {named_seeds(bad['seeds'])})" if record else ""
        raise UserError(
            f"{output} is written, but some of its samples are not finite{seeds}: leave them out, "
            "or use other weights"
        )
    return output


def _to_pixels(drawn: np.ndarray, settings: Sampling) -> np.ndarray:
    return np.asarray(pixels.to_pixels(drawn, settings.pixel_rounding))


def _network(loaded: Experiment, variables: Variables) -> dict[str, Any]:
    """What makes a network's samples beside the settings: what its arrays hold, and what is
    computed with them."""
    return {
        "contents": contents.fingerprint(variables),
        "model": experiment.number_settings("model", loaded.model),
        "process": experiment.number_settings("process", loaded.process),
    }


def _makes_samples(settings: Sampling) -> dict[str, Any]:
    """Settings that samples depend on: not how many are drawn at once, nor where the weaker network
    lies."""
    return {
        name: value
        for name, value in dataclasses.asdict(settings).items()
        if name not in ("batch_size", "guide_workdir")
    }


def _differences(
    usual: Sampling, settings: Sampling, seeds: Sequence[int], labels: str | None
) -> Iterator[tuple[str, Any]]:
    """What of a request differs from the default one, in words; `labels` None: they do not."""
    seeds = [int(seed) for seed in seeds]
    if seeds != list(range(len(seeds))):
        yield "seeds", _in_words(in_short(seeds))
    if labels is not None:
        yield "labels", _in_words(labels)
    ours, theirs = _makes_samples(settings), _makes_samples(usual)
    yield from (
        (name, value) for name, value in ours.items() if value != theirs[name] and value != ""
    )
    if settings.guidance == "autoguidance" and settings.guide_workdir != usual.guide_workdir:
        yield "guide_workdir", epath.Path(settings.guide_workdir).name
    if backend.matmul_precision() != "default":
        yield "matmul_precision", backend.matmul_precision()


def _in_words(text: str) -> str:
    return text if len(text) <= 40 else hashlib.sha256(text.encode()).hexdigest()[:12]


def restore_variables(
    workdir: epath.PathLike,
    state: TrainState,
    step: int | None = None,
    allow_nonfinite: bool = False,
) -> tuple[int, Variables]:
    """Step and variables (averaged parameters, constants) of the newest usable checkpoint in a work
    directory.

    Args:
      workdir: of the run.
      state: shapes and shardings of its state.
      step: of a checkpoint that is wanted instead.
      allow_nonfinite: whether one with NaNs or infinities is usable.

    Raises:
      UserError: there is none.
    """
    shapes = state.ema_variables
    wanted = {"ema": shapes["params"], "constants": shapes["constants"]}
    step, items = _restore_items(workdir, wanted, step, allow_nonfinite)
    return step, {"params": items["ema"], "constants": items["constants"]}


def _restore_items(
    workdir: epath.PathLike,
    shapes: dict[str, Any],
    step: int | None = None,
    allow_nonfinite: bool = False,
) -> tuple[int, dict[str, Any]]:
    """Items of the newest usable checkpoint by name; one without arrays is not in a checkpoint, and
    comes back as it is."""
    checkpoints = checkpoint.Checkpoints(epath.Path(workdir) / CHECKPOINTS)
    restored = checkpoints.restore(
        {name: tree for name, tree in shapes.items() if tree}, step, allow_nonfinite
    )
    if restored is None:
        raise UserError(f"workdir {workdir} holds no checkpoint: train first")
    step, items = restored
    return step, shapes | items


def reconstruct_variables(
    workdir: epath.PathLike,
    state: TrainState,
    lengths: Sequence[float],
    length: float,
    until: int | None = None,
) -> tuple[int, Variables]:
    """Step of the newest snapshot of a run, and its network's variables with averages of a length
    of choice.

    Args:
      workdir: of the run.
      state: shapes and shardings of its state.
      lengths: of the averages that it keeps snapshots of (`ema.power_lengths`).
      length: that is wanted.
      until: step of the snapshot at which the average shall end instead.

    Raises:
      UserError: the run keeps no snapshots, one cannot be read, or an impossible length.
    """
    snapshots = checkpoint.Checkpoints(epath.Path(workdir) / SNAPSHOTS)
    steps = snapshots.steps()
    if not steps:
        raise UserError(
            f"workdir {workdir} has no snapshots of averages: train with ema.power_lengths, or "
            "leave out --ema_length"
        )
    if until is not None:
        if until not in steps:
            raise UserError(
                f"there is no snapshot {until} in {snapshots.directory}: use "
                f"{', '.join(map(str, steps))}"
            )
        steps = [step for step in steps if step <= until]
    for step in steps:
        if "updates" not in snapshots.facts(step):
            raise UserError(
                f"snapshot {step} in {snapshots.directory} is damaged: move it away, or leave out "
                "--ema_length"
            )
    times = [snapshots.facts(step)["updates"] for step in steps for _ in lengths]
    factors = power_ema.reconstruction(
        times, list(lengths) * len(steps), times[-1], length
    ).reshape(len(steps), len(lengths))
    items = {"power_emas": {str(index): shapes for index, shapes in enumerate(state.power_emas)}}
    params = None
    with Progress(
        "reconstruct", len(steps), unit="snapshot", shown=distributed.is_first()
    ) as progress:
        for step, row in zip(steps, factors, strict=True):
            averages = snapshots.restore_step(step, items)["power_emas"]
            for index, factor in enumerate(row):
                params = power_ema.add_scaled(params, averages[str(index)], factor)
            progress.advance()
    _, items = _restore_items(workdir, {"constants": state.constants}, allow_nonfinite=True)
    return steps[-1], {"params": params, "constants": items["constants"]}


def _override(sampling: Sampling, overrides: Mapping[str, Any]) -> Sampling:
    """The section `sampling` with values from the command line, each of which must have an
    effect."""
    if "num_steps" in overrides and "respacing" in overrides:
        raise UserError(
            "--num_steps and --respacing both say how many steps there are: leave out either"
        )
    changed = dict(overrides)
    if "num_steps" in overrides or overrides.get("sampler") in ("euler", "heun", "dpm_solver"):
        changed.setdefault("respacing", "")  # the config's would win
    settings = dataclasses.replace(sampling, **changed)
    used = {
        "eta": settings.sampler == "ddim",
        "clip_denoised": settings.discrete,
        "guidance_scale": settings.guidance != "none",
        "guidance_power": settings.guidance == "power_cosine",
        "guidance_sigma_low": settings.guidance == "interval",
        "guidance_sigma_high": settings.guidance == "interval",
        "guide_workdir": settings.guidance == "autoguidance",
        **dict.fromkeys(
            ("churn_amount", "churn_sigma_low", "churn_sigma_high", "churn_noise"),
            settings.sampler == "heun",
        ),
    }
    for name in overrides:
        if not used.get(name, True):
            raise UserError(
                f"--{name} has no effect with sampler {settings.sampler} and guidance "
                f"{settings.guidance}: leave it out"
            )
    return settings


def _open_weaker(loaded: Experiment, workdir: str) -> tuple[Run, Opened]:
    """The run of the weaker network of autoguidance, which must take and give what the main one
    does."""
    if not workdir:
        raise UserError(
            "autoguidance needs a second, weaker network: name its run by --guide_workdir, or "
            "choose another guidance"
        )
    run = Run(workdir)
    weaker = open_experiment(run.config, to_train=False, config_file=run.config_file)
    ours, theirs = (
        (e.process, e.model.sample_shape, e.model.num_classes) for e in (loaded, weaker.experiment)
    )
    if ours != theirs:
        raise UserError(
            f"guide_workdir {workdir} differs in process, shape or number of classes: name a run "
            "like the main one"
        )
    return run, weaker


def _digest(numbers: Sequence[int]) -> str:
    return (
        f"{len(numbers)} numbers, "
        f"{hashlib.sha256(np.asarray(numbers, np.int64).tobytes()).hexdigest()[:16]}"
    )
