"""The verb `train`: a run from its config to its last checkpoint."""

import logging
import time
from collections.abc import Callable, Sequence

import jax
from clu import parameter_overview
from etils import epath
from ml_collections import ConfigDict

from diffit_jax import models
from diffit_jax import workdir as workdirs
from diffit_jax.data.pipeline import batches
from diffit_jax.data.sources import Source
from diffit_jax.errors import UserError
from diffit_jax.experiment import Experiment
from diffit_jax.runtime import backend, distributed, files, parallel, rows
from diffit_jax.runtime.checkpoint import Checkpoints
from diffit_jax.runtime.console import Progress
from diffit_jax.training.compiling import (
    Opened,
    compile_train_step,
    open_experiment,
    open_training_data,
)
from diffit_jax.training.objective import DENOISING, Objective
from diffit_jax.training.state import TrainState, all_finite, create_state
from diffit_jax.training.step import gradient_is_finite
from diffit_jax.training.watch import Tracer, Watch, cache_report
from diffit_jax.verbs.run_files import Looks, RunFiles

log = logging.getLogger(__name__)


@backend.pinned()
@backend.memory_for(backend.TRAINING_MEMORY)
def train(
    config: ConfigDict,
    workdir: epath.PathLike,
    profile_steps: tuple[int, int] | None = None,
    devices: Sequence[jax.Device] | None = None,
    *,
    objective: Objective = DENOISING,
) -> TrainState:
    """Trains a config in a work directory, from its newest checkpoint if there is one, up to
    `training.total_steps`.

    The directory receives `config.json`, TensorBoard events in `events/`, sample grids in `grids/`,
    figures in `evaluations/` and checkpoints in `checkpoints/`. A run that was killed and started
    again ends with the same parameters as one that never stopped.

    Args:
      config: of the experiment.
      workdir: local or `gs://`.
      profile_steps: (first, last) step of a profiler trace in `profile/`, for TensorBoard or
        Perfetto; None: no trace.
      devices: to train on; None: all of all processes. `rows.fitting_devices` leaves out those
        that the batch does not divide over.
      objective: what is minimised.

    Returns:
      The final state.

    Raises:
      UserError: a config that cannot be, a directory that holds another config's run, is in use or
        cannot be written, or a run that has diverged.
      interruption.Preempted: the machine is about to be taken away; a checkpoint is saved.
      interruption.Interrupted: the same after Ctrl-C.
    """
    # --- Check everything before the first thing is written.
    workdir = files.resolve(workdir, "workdir")
    opened = open_experiment(config, devices, objective=objective)
    looks = Looks.open(opened, config, workdir)
    source = distributed.first_then_all(lambda: open_training_data(opened.experiment))
    distributed.check_agreement(
        {"config": config.to_json, "code version": distributed.code_version}
    )
    rows.prove_rows(opened.mesh, opened.experiment.training.batch_size)
    with distributed.first_holds(lambda: workdirs.claimed(workdir, config)):
        distributed.check_shared(workdir)
        run = RunFiles(opened, config, workdir, looks)
        return _train(opened, source, run, profile_steps)


def _train(
    opened: Opened, source: Source, run: RunFiles, profile_steps: tuple[int, int] | None
) -> TrainState:
    """`train` in a directory that is this run's."""
    experiment, mesh = opened.experiment, opened.mesh
    training, frozen = experiment.training, opened.objective.frozen
    batch_size, total_steps = training.batch_size, training.total_steps
    kind = mesh.devices.flat[0].device_kind

    state = _first_state(opened, run)
    first_step = int(state.step)
    if first_step >= total_steps:
        run.wait()
        run.close()
        return state

    # --- The update, compiled before the clock starts.
    mine = rows.local_rows(mesh, batch_size)
    data = batches(source, batch_size, experiment.seed, first_step, mine)
    batch = rows.put_batch(mesh, next(data), batch_size)
    watch = Watch(experiment, mesh)
    with cache_report("training step"):
        train_step, collected, seconds = compile_train_step(opened, state, batch)
    log.info("compiled the training step in %.1f s for %d x %s", seconds, mesh.size, kind)
    all_finite(state)  # compiled too: each checkpoint asks

    # --- The loop.
    run.open_log()
    watch.start(first_step)
    saved_at = time.monotonic()
    progress = Progress("train", total_steps, done=first_step, shown=distributed.is_first())
    tracer = Tracer(run.workdir / workdirs.PROFILE, profile_steps)
    notice = distributed.PreemptionNotice(ctrl_c=True)
    with progress, tracer, notice, distributed.lost_processes():
        for step in range(first_step + 1, total_steps + 1):
            # The devices begin with this update, and meanwhile the next batch is read.
            tracer.before(step)
            state, collected = train_step(state, collected, batch, frozen)
            if step < total_steps:
                with watch.data_wait():
                    host_batch = next(data)
                batch = rows.put_batch(mesh, host_batch, batch_size)
            progress.advance()

            # A report waits for the devices, and so is where the clock is looked at.
            due = run.every(training.checkpoint_steps, step) or run.evaluates(step)
            if run.every(training.log_steps, step):
                values = {name: float(value) for name, value in collected.compute().items()}
                values |= watch.report(step)
                run.log(step, values)
                progress.say(_line(values))
                collected = jax.device_put(type(collected).empty(), parallel.replicated(mesh))
                if values["skipped_in_row"] >= training.max_bad_steps:
                    raise _diverged(experiment, state, run.checkpoints)
                if training.checkpoint_minutes:
                    minutes = (time.monotonic() - saved_at) / 60
                    due = distributed.agreed(minutes > training.checkpoint_minutes) or due

            if run.measures_loss(step):
                _beside(watch, run.measure_loss, step, state)

            # A checkpoint, on time or because the machine is about to go.
            preempted = notice.reached() and step < total_steps
            if due or preempted:
                run.save(state)
                saved_at = time.monotonic()
            if preempted:
                run.checkpoints.wait()
                place = run.checkpoints.directory
                raise notice.ending(f"checkpoint {step} of {total_steps} steps is saved in {place}")

            if run.leaves_something(step):
                _beside(watch, run.leave_behind, step, state)
            tracer.after(step)
            if step % training.log_steps == 0:
                watch.begin_interval(step)  # checkpoints do not count
        run.wait()
    run.close()
    return state


def _beside(
    watch: Watch, look: Callable[[int, TrainState], object], step: int, state: TrainState
) -> None:
    """Looks at a state; the time does not count as training."""
    with watch.paused(state):
        look(step, state)


def _first_state(opened: Opened, run: RunFiles) -> TrainState:
    """A fresh state, or that of the newest usable checkpoint; says what is trained."""
    experiment, mesh = opened.experiment, opened.mesh
    state = run.restore()
    if state is None:
        state = create_state(experiment, mesh, opened.objective)
    step, total = int(state.step), experiment.training.total_steps
    parameters = f"{parameter_overview.count_parameters(state.params):,}"
    platform = mesh.devices.flat[0].platform
    log.info("model %s: %s parameters", type(experiment.model).__name__, parameters)
    log.info("attention: %s", models.attention_in_words(experiment.model, platform))
    log.info("precision of float32 matrix products: %s", backend.matmul_precision())
    begins = "resuming at" if step else "starting at"
    log.info("%s step %d of %d in %s", begins, step, total, run.workdir)
    if step:
        run.leave_behind(step, state, restored=True)
    return state


def _diverged(experiment: Experiment, state: TrainState, checkpoints: Checkpoints) -> UserError:
    """The end of a run whose batches have no finite gradient any more: what is to blame, and which
    checkpoint is good."""
    checkpoints.wait()
    step, in_row, skipped = int(state.step), int(state.skipped_in_row), int(state.skipped)
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
    """A report on the width of a phone; everything else is in the log of figures."""
    speed = values["images_per_s"]
    return (
        f"loss {values['loss']:.4f} | {speed:,.{0 if speed >= 10 else 2}f} images/s"
        + (f" | MFU {values['mfu']:.1%}" if "mfu" in values else "")
        + (
            f" | waiting {values['data_wait_share']:.0%}"
            if values["data_wait_share"] > 0.01
            else ""
        )
        + (f" | not training {values['beside_share']:.0%}" if values["beside_share"] else "")
        + (f" | {values['skipped']:.0f} batches skipped" if values["skipped"] else "")
    )
