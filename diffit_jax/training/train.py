"""The verb `train`: a run from its config to its last checkpoint."""

import functools
import itertools
import logging
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from clu import parameter_overview
from etils import epath
from ml_collections import ConfigDict

from diffit_jax import models, platforms
from diffit_jax.data import pixels
from diffit_jax.data.labels import name_of, synonyms_of
from diffit_jax.data.sources import DATASETS, ClassSampling, Source, class_sampling
from diffit_jax.diffusion.flow_map import MAP_TERMS
from diffit_jax.errors import OutOfMemory, UserError
from diffit_jax.evaluation.in_training import InTraining, kinds
from diffit_jax.experiment.config import Experiment
from diffit_jax.models.model import traced_multiply_adds
from diffit_jax.run import workdir as workdirs
from diffit_jax.run.objective import Objective, flops_per_image
from diffit_jax.run.representation import ENCODER
from diffit_jax.run.state import (
    Setup,
    TrainState,
    all_finite,
    create_state,
    named,
    open_training_data,
    restore_state,
    save_state,
    setup_experiment,
)
from diffit_jax.runtime import backend, checkpoint, distributed, files, interruption, parallel
from diffit_jax.runtime.checkpoint import Checkpoints
from diffit_jax.runtime.console import Progress, duration
from diffit_jax.runtime.run_in_subprocess import count_cores
from diffit_jax.sampling.image_files import grid_columns
from diffit_jax.sampling.sampler import Sampler, default_labels, sampler_without_autoguidance
from diffit_jax.training.held_out import HeldOutLoss, Nearness, open_held_out
from diffit_jax.training.loggers import Loggers, check_wandb
from diffit_jax.training.loop import Hooks, Tracer, Watch, batches_on, cache_report, run_loop
from diffit_jax.training.step import compile_train_step, gradient_is_finite

log = logging.getLogger(__name__)


class Monitors(NamedTuple):
    """What a run's weights are watched by while they are trained.

    Attributes:
      grid_sampler: draws the sample grids.
      evaluations: compare samples with a reference, and decode latents for grids; or None.
      held_out: the loss on examples that are not trained on, or None.
      nearness: of samples to training images, on process 0 where there are held-out images too, or
        None.
    """

    grid_sampler: Sampler
    evaluations: InTraining | None
    held_out: HeldOutLoss | None
    nearness: Nearness | None

    @classmethod
    def open(
        cls, setup: Setup, config: ConfigDict, workdir: epath.Path, training_data: Source
    ) -> "Monitors":
        """Open and check all; write nothing. Errors as of `InTraining` and `open_held_out`."""
        experiment, evaluations, held_out = setup.experiment, None, None
        nearness = None
        wandb = experiment.training.wandb if distributed.is_primary() else ""
        distributed.primary_first(lambda: check_wandb(wandb))
        count = experiment.training.grid_images
        at_once = platforms.of_mesh(setup.mesh).grid_per_device * setup.mesh.size
        count = min(count, at_once or count)
        grid_sampler = sampler_without_autoguidance(experiment, setup.mesh, count)
        if experiment.evaluation.measures or experiment.evaluation.vae:
            evaluations = InTraining(setup, config.to_dict(), workdir)
        if experiment.evaluation.loss_steps:
            source = distributed.primary_first(lambda: open_held_out(experiment))
            held_out = HeldOutLoss(setup, source)
            grids = experiment.training.grid_steps > 0 and distributed.is_primary()
            if grids and experiment.space.samples == "samples":
                nearness = Nearness(training_data, source)
        return cls(grid_sampler, evaluations, held_out, nearness)


class RunFiles:
    """What a run leaves in its work directory while it goes on."""

    def __init__(self, setup: Setup, config: ConfigDict, workdir: epath.Path, monitors: Monitors):
        self.workdir, self._setup, self._config = workdir, setup, config
        self._experiment, self._monitors = setup.experiment, monitors
        training = setup.experiment.training
        keep, keep_every = training.keep_checkpoints, training.keep_every_steps
        self.checkpoints = Checkpoints(workdir / workdirs.CHECKPOINTS, keep, keep_every)
        self._snapshots: Checkpoints | None = None
        if setup.experiment.ema.power_lengths:
            self._snapshots = Checkpoints(workdir / workdirs.SNAPSHOTS, keep=10**6)
        self._loggers = Loggers()
        self._first_step = 0
        self._classes: list[list[str]] = []

    def keep_classes(self, source: Source) -> None:
        """Write the names of the data's classes, for samples of this run, if they have some."""
        manifest = getattr(source, "manifest", None)
        if manifest is not None:
            self._classes = synonyms_of(manifest.classes)
            if distributed.is_primary():
                workdirs.write_classes(self.workdir, manifest.classes)

    def restore(self) -> TrainState | None:
        """Restore the newest usable checkpoint, if any; set unusable newer ones aside."""
        state = restore_state(self.checkpoints, self._setup.state)
        if state is not None:
            self._first_step = int(state.step)
            self.checkpoints.set_aside_after(self._first_step)
        return state

    def open_log(self) -> None:
        """Begin to log figures and images, on process 0."""
        if distributed.is_primary() and not self._loggers:
            self._loggers = Loggers.open(self.workdir, self._config, self._first_step)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log figures of a step."""
        self._loggers.figures(step, values)

    def save(self, state: TrainState) -> None:
        """Begin to write a checkpoint. When it is there, so is all that was left before it."""
        if self._snapshots:
            self._snapshots.wait()
        self._loggers.flush()
        self._put_back()
        save_state(self.checkpoints, state, self._experiment.training.batch_size)

    def _put_back(self) -> None:
        """Write config and events anew if somebody has deleted them."""
        if self._loggers and not (self.workdir / workdirs.CONFIG_FILE).exists():
            log.warning(
                "%s was deleted while the run went on; its config and events are written anew",
                self.workdir,
            )
            workdirs.write_config(files.make_directory(self.workdir, "workdir"), self._config)
            self._loggers.close()
            self._loggers = Loggers.open(self.workdir, self._config, self._first_step)

    def evaluates(self, step: int) -> bool:
        """Whether samples are compared with a reference after this step."""
        evaluations = self._monitors.evaluations
        return evaluations is not None and evaluations.due(step)

    def measures_loss(self, step: int) -> bool:
        """Whether the loss on held-out examples is measured after this step."""
        steps = self._experiment.evaluation.loss_steps
        return bool(steps) and self.every(steps, step)

    def has_work_after(self, step: int) -> bool:
        """Whether `after_step` has something to do."""
        return self._snapshot_due(step) or self._grid_due(step) or self.evaluates(step)

    def every(self, steps: int, step: int) -> bool:
        """Return whether a step is one of every so many, or the last one."""
        return step % steps == 0 or step == self._experiment.training.total_steps

    def _snapshot_due(self, step: int) -> bool:
        due = self.every(self._experiment.ema.snapshot_steps, step)
        return self._snapshots is not None and due

    def _grid_due(self, step: int) -> bool:
        steps = self._experiment.training.grid_steps
        return bool(steps) and self.every(steps, step)

    def after_step(self, step: int, state: TrainState, restored: bool = False) -> None:
        """Write a snapshot of averages, a grid of samples, an evaluation, if they are due.

        A restored step may have ended before they were written; those that exist stay.

        Raises:
          interruption.Preempted, interruption.Interrupted: in an evaluation. The checkpoint of
            `step` and the part that is measured are saved.
        """
        snapshots = self._snapshots
        if snapshots and self._snapshot_due(step) and step not in snapshots.steps():
            metadata = {"step": step, "updates": step - int(state.skipped)}
            # One after the other: Orbax's processes wait for each other under names made of steps.
            self.checkpoints.wait()
            snapshots.save(step, {"power_emas": dict(named(state.power_emas))}, metadata)
        if self._grid_due(step):
            grid = self.workdir / workdirs.GRIDS / f"{step:08d}.png"
            if not (restored and distributed.broadcast_flag(grid.exists())):
                self._write_grid(step, grid, state)
        if self.evaluates(step) and not (restored and self._monitors.evaluations.done(step)):
            self._evaluate(step, state)

    def _write_grid(self, step: int, path: epath.Path, state: TrainState) -> None:
        """Draw samples with the seeds 0, 1, 2 …, the same each time, to compare steps.

        A run does not end because of a grid: one that cannot be made is a warning.
        """
        sampler, evaluations = self._monitors.grid_sampler, self._monitors.evaluations
        space = evaluations.space if evaluations else self._experiment.space
        seeds = np.arange(self._experiment.training.grid_images)
        labels = default_labels(seeds, self._experiment.model.num_classes)
        log.info("step %d: drawing a grid of %d samples", step, len(seeds))
        try:
            with backend.explain_oom("fewer training.grid_images take less"):
                parts = []
                for part in sampler.batches(state.ema_variables, seeds, labels):
                    parts.append(part)
                    if distributed.is_to_end():  # the loop saves and ends
                        log.warning("step %d: the grid is left out, for the run is to end", step)
                        return
                samples = np.concatenate(parts)
                finite = np.isfinite(samples).reshape(len(samples), -1).all(axis=1)
                if evaluations and evaluations.decoder:
                    samples = space.from_model(samples)
        except OutOfMemory as error:
            log.warning("the grid %s could not be drawn: %s", path, error)
            return
        if not distributed.is_primary():
            return
        if not finite.all():
            bad = int((~finite).sum())
            log.warning("%d of the %d samples in %s are not finite", bad, len(samples), path)
        name = name_of(self._classes) if self._experiment.model.num_classes else None
        columns, above = grid_columns(labels, name)
        grid = pixels.write_preview(path, samples, space.preview, columns, above=above)
        if grid is not None:
            self._loggers.image(step, "grid", grid)
        nearness = self._monitors.nearness
        if nearness and finite.all():
            found, usual = nearness(space.from_model(samples)), nearness.held_out
            self.log(step, {"nearest_train_ratio": found / usual if usual else math.inf})
            log.info(
                "step %d: nearest training image at %.3g (median of the grid), of held-out images "
                "at %.3g",
                step,
                found,
                usual,
            )

    def measure_loss(self, step: int, state: TrainState) -> None:
        """Log the loss on held-out examples, of the parameters and every average."""
        assert self._monitors.held_out
        weights = kinds(self._experiment, state)
        if step <= self._experiment.evaluation.loss_steps:
            log.info("step %d: measuring the held-out loss, compiled first", step)
        found = self._monitors.held_out({one.name: one.variables for one in weights})
        self.log(step, {f"held_out_loss/{name}": loss for name, loss in found.items()})
        losses = ", ".join(f"{name} {loss:.4f}" for name, loss in found.items())
        log.info("step %d: held-out loss %s", step, losses)

    def _evaluate(self, step: int, state: TrainState) -> None:
        """Compare samples of the weights of a step with the reference."""
        try:
            found = self._monitors.evaluations.run(step, state)
        except (interruption.Preempted, interruption.Interrupted) as notice:
            self.wait()
            kept = f"checkpoint {step} is saved in {self.checkpoints.directory}, and {notice}"
            raise type(notice)(kept) from notice
        self.open_log()
        self.log(step, found.values)
        for name, images in found.images.items():
            grid = pixels.image_grid(images, columns=8)
            self._loggers.image(step, f"samples/{name}", grid)
        self._loggers.flush()
        self._monitors.evaluations.finish(found)  # last: what is there is not done again
        log.info("step %d: %s; it took %.3g s", step, found.describe(), found.seconds)

    def wait(self) -> None:
        """Wait until nothing is being written any more."""
        self.checkpoints.wait()
        if self._snapshots:
            self._snapshots.wait()

    def close(self) -> None:
        """End the log."""
        self._loggers.close()


@backend.reproducible_numerics()
@backend.explain_oom(backend.TRAINING_OOM_HINT)
def train(
    config: ConfigDict | Mapping[str, Any],
    *,
    workdir: epath.PathLike,
    profile_steps: tuple[int, int] | None = None,
    devices: Sequence[jax.Device] | None = None,
    objective: Objective | None = None,
) -> TrainState:
    """Train a config in a work directory, from its newest checkpoint if there is one.

    Up to `training.total_steps`. The directory receives `config.json`, TensorBoard events in
    `events/`, sample grids in `grids/`, figures in `evaluations/` and checkpoints in
    `checkpoints/`. A run that was killed and started again ends with the same parameters as one
    that never stopped.

    Args:
      config: of the experiment.
      workdir: local or `gs://`.
      profile_steps: (first, last) step of a profiler trace in `profile/`, for TensorBoard or
        Perfetto; None: no trace.
      devices: to train on; None: all of all processes. `parallel.fitting_devices` leaves out those
        that the batch does not divide over.
      objective: what is minimised; None: the loss of the process, see `objective_of`.

    Returns:
      The final state.

    Raises:
      UserError: an impossible config, a directory that holds another config's run, is in use or
        cannot be written, or a run that has diverged.
      interruption.Preempted: the machine is about to be taken away; a checkpoint is saved.
      interruption.Interrupted: the same after Ctrl-C.
    """
    # --- Check everything before the first thing is written.
    workdir = files.resolve(workdir, "workdir")
    config = config if isinstance(config, ConfigDict) else ConfigDict(dict(config))
    setup = setup_experiment(config, devices, objective=objective)
    source = distributed.primary_first(lambda: open_training_data(setup.experiment))
    frozen = setup.objective.load(setup.experiment, setup.mesh)
    monitors = Monitors.open(setup, config, workdir, source)
    labels = class_sampling(source, setup.experiment.data.class_sampling)
    distributed.check_agreement(
        {"config": config.to_json, "code version": distributed.code_version}
    )
    parallel.verify_batch_sharding(setup.mesh, setup.experiment.training.batch_size)
    with distributed.primary_context(lambda: workdirs.claimed(workdir, config)):
        distributed.check_shared(workdir)
        run = RunFiles(setup, config, workdir, monitors)
        run.keep_classes(source)
        if ENCODER in frozen:
            print_of = checkpoint.fingerprint(frozen[ENCODER])
            log.info("the encoder's weights are %s", print_of[:12])
            distributed.on_primary(lambda: workdirs.keep_encoder(workdir, print_of))
        return _train(setup, (source, labels), run, profile_steps, frozen)


def _train(
    setup: Setup,
    data: tuple[Source, ClassSampling | None],
    run: RunFiles,
    profile_steps: tuple[int, int] | None,
    frozen: Mapping[str, Any],
) -> TrainState:
    """Train in a directory that is this run's, see `train`; `frozen`: of the objective."""
    source, labels = data
    training, mesh = setup.experiment.training, setup.mesh
    state = _first_state(setup, run)
    first, total, size = int(state.step), training.total_steps, training.batch_size
    if first >= total:
        run.wait()
        run.close()
        return state

    # --- The update, compiled before the clock starts.
    watch = Watch(setup.experiment, mesh)
    seed = setup.experiment.seed
    stream = batches_on(
        mesh, source, size, seed, first=first, waiting=watch.data_wait, labels=labels
    )
    batch = next(stream)
    log.info("compiling the training step")
    with cache_report("training step"):
        compiled = compile_train_step(setup, setup.state, batch)
    kind = mesh.devices.flat[0].device_kind
    log.info("compiled the training step in %.1f s for %d x %s", compiled[2], mesh.size, kind)
    plan = compiled[0].memory_analysis()
    if plan is not None:
        used = plan.argument_size_in_bytes + plan.temp_size_in_bytes
        log.info("memory of a step: %.2f GB for each device, by the compiler", used / 1e9)
    all_finite(state)  # compiled too: each checkpoint asks

    run.open_log()
    watch.start(first)
    tracer = Tracer(run.workdir / workdirs.PROFILE, profile_steps)
    step = functools.partial(_with_frozen, compiled[0], frozen)
    hooks = _Training(setup, run, watch, tracer, step=(step, compiled[1]), state=state)
    stream = itertools.chain([batch], stream)
    del state, batch  # whose memory the updates take over
    with tracer:
        run_loop("train", hooks, stream, first, total)
    run.close()
    return hooks.state


def _with_frozen(step: Any, frozen: Any, state: Any, collected: Any, batch: Any) -> Any:
    """Make an update; `frozen` comes last in the program."""
    return step(state, collected, batch, frozen)


class _Training(Hooks):
    """A run that is being trained.

    Attributes:
      state: after the last update.
    """

    def __init__(
        self,
        setup: Setup,
        run: RunFiles,
        watch: Watch,
        tracer: Tracer,
        *,
        step: tuple[Any, Any],
        state: TrainState,
    ):
        """Take a compiled update with empty metrics, `step`, and a state."""
        self._setup, self._run, self._watch, self._tracer = setup, run, watch, tracer
        self._step, self._collected = step
        self.state, self.checkpoints = state, run.checkpoints
        self._saved_at = time.monotonic()
        self._first_steps: _FirstSteps | None = None

    def before(self, step: int) -> None:
        if self._first_steps is None:
            total = self._setup.experiment.training.total_steps
            self._first_steps = _FirstSteps(step - 1, total)
        self._tracer.before(step)

    def update(self, batch: Any) -> None:
        self.state, self._collected = self._step(self.state, self._collected, batch)

    def evaluate(self, step: int, progress: Progress) -> bool:
        run, training = self._run, self._setup.experiment.training
        due = run.every(training.checkpoint_steps, step) or run.evaluates(step)
        if run.every(training.log_steps, step):
            # A report waits for the devices, and so is where the clock is looked at.
            values = {name: float(value) for name, value in self._collected.compute().items()}
            values |= self._watch.report(step)
            run.log(step, values)
            progress.say(_line(values))
            empty = type(self._collected).empty()
            self._collected = jax.device_put(empty, parallel.replicated(self._setup.mesh))
            if values["skipped_in_row"] >= training.max_bad_steps:
                raise _diverged(self._setup.experiment, self.state, run.checkpoints)
            if training.checkpoint_minutes:
                minutes = (time.monotonic() - self._saved_at) / 60
                due = distributed.broadcast_flag(minutes > training.checkpoint_minutes) or due
        if run.measures_loss(step):
            with progress.beside(), self._watch.paused(self.state):
                run.measure_loss(step, self.state)
        return due

    def save(self, step: int) -> None:
        self._run.save(self.state)
        self._saved_at = time.monotonic()

    def after(self, step: int) -> None:
        if self._run.has_work_after(step):
            with self._watch.paused(self.state):
                self._run.after_step(step, self.state)
        self._tracer.after(step)
        if self._first_steps is not None and not self._first_steps.said:
            self._first_steps.after(step, self.state)
        if step % self._setup.experiment.training.log_steps == 0:
            self._watch.begin_interval(step)  # checkpoints do not count

    def wait(self) -> None:
        self._run.wait()


class _FirstSteps:
    """Says, after a few updates, how long one takes and what the run will take.

    Attributes:
      said: whether that is done.
    """

    def __init__(self, first: int, total: int):
        """Begin after update `first` of `total`."""
        self._first, self._total, self._began, self.said = first, total, 0.0, False

    def after(self, step: int, state: TrainState) -> None:
        """Wait for an update, of the first ten at most, and say how long they take."""
        jax.block_until_ready(state)
        made, now, total = step - self._first, time.monotonic(), self._total
        if made <= 1:  # the first waits for more than itself
            self._began, self.said = now, step == total
            return
        seconds = (now - self._began) / (made - 1)
        if made < 11 and now - self._began < 10 and step < total:
            return
        self.said = True
        left = seconds * (total - step)
        log.info("a step takes %.3g s: %d more take %s", seconds, total - step, duration(left))


_LONG_S = 6 * 3600  # that nobody waits for a CPU


def _say_what_a_cpu_takes(experiment: Experiment, left: int, core_flops: float) -> None:
    """Log, before anything is compiled, what so many updates should take on this machine's CPU."""
    seconds = flops_per_image(experiment) * experiment.training.batch_size
    seconds /= core_flops * count_cores()
    log.info(
        "on this CPU a step should take %.2g s, %d steps %s (estimated by multiply-adds)",
        seconds,
        left,
        duration(seconds * left),
    )
    if seconds * left > _LONG_S:
        log.info("%s", _smaller(experiment))


def _smaller(experiment: Experiment) -> str:
    """Say how a run becomes short enough for a CPU."""
    name = experiment.data.name
    if name in DATASETS:
        return "on a CPU that is long: set training.total_steps, or take a smaller network"
    return (
        f"on a CPU that is long: begin again with --config own_images:{name}:tiny, which is made "
        "for one, or set training.total_steps"
    )


def _first_state(setup: Setup, run: RunFiles) -> TrainState:
    """Create a state, or restore the newest usable checkpoint; log what is trained."""
    experiment, mesh = setup.experiment, setup.mesh
    state = run.restore()
    if state is None:
        state = create_state(experiment, mesh, setup.objective)
    step, total = int(state.step), experiment.training.total_steps
    parameters = f"{parameter_overview.count_parameters(state.params):,}"
    products = f"{traced_multiply_adds(experiment.model) / 1e9:.3g} G"
    platform = mesh.devices.flat[0].platform
    log.info(
        "model %s: %s parameters, %s multiply-adds an evaluation",
        type(experiment.model).__name__,
        parameters,
        products,
    )
    log.info("attention: %s", models.describe_attention(experiment.model, platform))
    if backend.matmul_precision() != "default":
        log.info("precision of float32 matrix products: %s", backend.matmul_precision())
    core_flops = platforms.of_mesh(mesh).core_flops
    if core_flops and step < total:
        _say_what_a_cpu_takes(experiment, total - step, core_flops)
    begins = "resuming at" if step else "starting at"
    log.info("%s step %d of %d in %s", begins, step, total, run.workdir)
    if step:
        run.after_step(step, state, restored=True)
    return state


def _diverged(experiment: Experiment, state: TrainState, checkpoints: Checkpoints) -> UserError:
    """Describe a run whose batches have no finite gradient any more.

    Whether data or network are to blame, and which checkpoint is good.
    """
    checkpoints.wait()
    step, in_row, skipped = int(state.step), int(state.consecutive_skipped), int(state.skipped)
    blame, followed = "the parameters have blown up: look at the rate", step - skipped
    if gradient_is_finite(experiment, state):
        blame, followed = "the network is sound: look at the data", None
    good = checkpoints.good_steps(updates=followed)
    newer = [other for other in checkpoints.steps() if good and other > good[-1]]
    way = f" (first move {', '.join(map(str, newer))} away from there)" if newer else ""
    place = "the start"
    if good:
        place = f"checkpoint {good[-1]} in {checkpoints.directory}, the last good one{way}"
    return UserError(
        f"the last {in_row} batches up to step {step} had no finite gradient; {blame}, "
        f"and go on from {place}"
    )


def _line(values: dict[str, float]) -> str:
    """Format a report for the width of a phone; everything else is in the log of figures."""
    speed = values["images_per_s"]
    return (
        f"loss {values['loss']:.4f}"
        + "".join(f" {name[:-6]} {values[name]:.4f}" for name in MAP_TERMS if name in values)
        + f" | {speed:,.{0 if speed >= 10 else 2}f} images/s"
        + (f" | MFU {values['mfu']:.1%}" if "mfu" in values else "")
        + (
            f" | waiting {values['data_wait_share']:.0%}"
            if values["data_wait_share"] > 0.01
            else ""
        )
        + (f" | not training {values['beside_share']:.0%}" if values["beside_share"] else "")
        + (f" | {values['skipped']:.0f} batches skipped" if values["skipped"] else "")
    )
