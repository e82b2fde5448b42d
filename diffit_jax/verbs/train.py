"""A training run from its config to its last checkpoint."""

import dataclasses
import logging
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from clu import metrics, parameter_overview
from etils import epath
from ml_collections import ConfigDict
from tensorboardX import SummaryWriter

from diffit_jax import models
from diffit_jax.data import pixels
from diffit_jax.data.pipeline import batches
from diffit_jax.data.sources import Source, open_dataset
from diffit_jax.errors import OutOfMemory, UserError
from diffit_jax.experiment import (
    CHECKPOINTS,
    CONFIG_FILE,
    SNAPSHOTS,
    Experiment,
    claimed_workdir,
    write_config,
)
from diffit_jax.runtime import backend, distributed, files, parallel
from diffit_jax.runtime.checkpoint import Checkpoints
from diffit_jax.runtime.console import Progress
from diffit_jax.sampling.sampler import Sampler, default_labels, sampler_without_autoguidance
from diffit_jax.training.state import Opened, TrainState, all_finite, create_state, open_experiment
from diffit_jax.training.step import Batch, gradient_is_finite, make_train_step, step_metrics
from diffit_jax.training.watch import Tracer, Watch, cache_report

log = logging.getLogger(__name__)


@backend.pinned()
@backend.memory_for(backend.TRAINING_MEMORY)
def train(
    config: ConfigDict,
    workdir: epath.PathLike,
    profile_steps: tuple[int, int] | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> TrainState:
    """Trains a config in a work directory, from its newest checkpoint if there is one, up to
    `training.total_steps`.

    The directory receives `config.json`, TensorBoard events in `events/`, sample grids in `grids/`
    and checkpoints in `checkpoints/`. A run that was killed and started again ends with the same
    parameters as one that never stopped.

    Args:
      config: of the experiment.
      workdir: local or `gs://`.
      profile_steps: (first, last) step of a profiler trace in `profile/`, for TensorBoard or
        Perfetto; None: no trace.
      devices: to train on; None: all of all processes. `parallel.fitting_devices` leaves out those
        that the batch does not divide over.

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
    opened = open_experiment(config, devices)
    grid_sampler = sampler_without_autoguidance(
        opened.experiment, opened.mesh, opened.experiment.training.grid_images
    )
    source = distributed.first_then_all(lambda: open_training_data(opened.experiment))
    distributed.check_agreement(
        {"config": config.to_json, "code version": distributed.code_version}
    )
    parallel.prove_rows(opened.mesh, opened.experiment.training.batch_size)
    with distributed.first_holds(lambda: claimed_workdir(workdir, config)):
        distributed.check_shared(workdir)
        return _train(opened, config, workdir, source, grid_sampler, profile_steps)


def _train(
    opened: Opened,
    config: ConfigDict,
    workdir: epath.Path,
    source: Source,
    grid_sampler: Sampler,
    profile_steps: tuple[int, int] | None,
) -> TrainState:
    """`train` in a directory that is this run's."""
    experiment, mesh, abstract = opened.experiment, opened.mesh, opened.state
    settings = experiment.training

    # --- State: fresh, or that of the newest usable checkpoint.
    checkpoints = Checkpoints(
        workdir / CHECKPOINTS, settings.keep_checkpoints, settings.keep_every_steps
    )
    snapshots = (
        Checkpoints(workdir / SNAPSHOTS, keep=10**6) if experiment.ema.power_lengths else None
    )
    state = restore_state(checkpoints, abstract)
    if state is None:
        state = create_state(experiment, mesh)
    else:
        checkpoints.set_aside_after(int(state.step))
    first_step = int(state.step)
    events: SummaryWriter | None = None
    log.info(
        "model %s: %s parameters",
        type(experiment.model).__name__,
        f"{parameter_overview.count_parameters(state.params):,}",
    )
    log.info(
        "attention: %s", models.attention_in_words(experiment.model, mesh.devices.flat[0].platform)
    )
    log.info("precision of float32 matrix products: %s", backend.matmul_precision())
    log.info(
        "%s step %d of %d in %s",
        "resuming at" if first_step else "starting at",
        first_step,
        settings.total_steps,
        workdir,
    )

    def leave_behind(step: int, state: TrainState, restored: bool = False) -> None:
        """What a step leaves behind beside checkpoints. A restored one may have ended before it
        did; what is there stays."""
        last = step == settings.total_steps
        if (
            snapshots
            and (step % experiment.ema.snapshot_steps == 0 or last)
            and step not in snapshots.steps()
        ):
            facts = {"step": step, "updates": step - int(state.skipped)}
            snapshots.save(step, {"power_emas": dict(_named(state.power_emas))}, facts)
        grid = workdir / "grids" / f"{step:08d}.png"
        if (step % settings.grid_steps == 0 or last) and not (
            restored and distributed.agreed(grid.exists())
        ):
            _write_grid(grid, grid_sampler, state, experiment)

    def keep_directory() -> None:
        nonlocal events
        if events and not (workdir / CONFIG_FILE).exists():
            log.warning(
                "%s was deleted while the run went on; its config and events are written anew",
                workdir,
            )
            write_config(files.make_directory(workdir, "workdir"), config)
            events = SummaryWriter(str(workdir / "events"))

    def save(state: TrainState) -> None:
        if snapshots:
            snapshots.wait()  # with a checkpoint, all snapshots before it are complete
        if events:  # and what was logged before it is in the files
            try:
                events.flush()
            except OSError as error:
                place = f"{workdir / 'events'} cannot be written ({error.strerror or error})"
                raise UserError(
                    f"{place}: {files.remedy_for_writing(error)}; complete checkpoints are kept"
                ) from error
        keep_directory()
        save_state(checkpoints, state, settings.batch_size)

    if first_step:
        leave_behind(first_step, state, restored=True)
    if first_step >= settings.total_steps:
        if snapshots:
            snapshots.wait()
        return state

    # --- The update, compiled before the clock starts.
    data = batches(
        source,
        settings.batch_size,
        experiment.seed,
        first_step,
        parallel.local_rows(mesh, settings.batch_size),
    )
    batch = parallel.put_batch(mesh, next(data), settings.batch_size)
    watch = Watch(experiment, mesh)
    with cache_report("training step"):
        train_step, collected, seconds = compile_train_step(experiment, mesh, state, batch)
    log.info(
        "compiled the training step in %.1f s for %d x %s",
        seconds,
        mesh.size,
        mesh.devices.flat[0].device_kind,
    )
    all_finite(state)  # compiled too: each checkpoint asks

    # --- The loop.
    first = distributed.is_first()
    # What was logged after the checkpoint is logged again: its first copy is not to be shown.
    events = SummaryWriter(str(workdir / "events"), purge_step=first_step + 1) if first else None
    watch.start(first_step)
    saved_at = time.monotonic()
    progress = Progress("train", settings.total_steps, done=first_step, shown=first)
    tracer = Tracer(workdir / "profile", profile_steps)
    with (
        progress,
        tracer,
        distributed.PreemptionNotice(ctrl_c=True) as notice,
        distributed.lost_processes(),
    ):
        for step in range(first_step + 1, settings.total_steps + 1):
            tracer.before(step)
            state, collected = train_step(state, collected, batch)
            last = step == settings.total_steps
            if not last:
                with watch.data_wait():
                    host_batch = next(data)
                # While the devices are at work.
                batch = parallel.put_batch(mesh, host_batch, settings.batch_size)
            progress.advance()
            due = step % settings.checkpoint_steps == 0 or last

            if step % settings.log_steps == 0 or last:
                # Waits for the devices.
                values = {name: float(value) for name, value in collected.compute().items()}
                values |= watch.report(step)
                if events:
                    for name, value in values.items():
                        events.add_scalar(name, value, step)
                progress.say(_line(values))
                collected = jax.device_put(type(collected).empty(), parallel.replicated(mesh))
                if values["skipped_in_row"] >= settings.max_bad_steps:
                    raise _diverged(experiment, state, checkpoints)
                if settings.checkpoint_minutes:
                    due = (
                        distributed.agreed(
                            time.monotonic() - saved_at > 60 * settings.checkpoint_minutes
                        )
                        or due
                    )
            preempted = notice.reached(step) and not last
            if due or preempted:
                save(state)
                saved_at = time.monotonic()
            if preempted:
                checkpoints.wait()
                raise notice.ending(
                    f"checkpoint {step} of {settings.total_steps} steps is saved in "
                    f"{checkpoints.directory}"
                )
            leave_behind(step, state)
            tracer.after(step)
            if step % settings.log_steps == 0:
                watch.begin_interval(step)  # grids and checkpoints do not count
        checkpoints.wait()
        if snapshots:
            snapshots.wait()
    if events:
        events.close()
    return state


def open_training_data(experiment: Experiment) -> Source:
    """The data set that an experiment trains on."""
    data, model = experiment.data, experiment.model
    return open_dataset(
        data.name,
        "train",
        data.data_dir,
        model.sample_shape,
        model.num_classes,
        latents=bool(data.autoencoder),
    )


def compile_train_step(
    experiment: Experiment, mesh: jax.sharding.Mesh, state: TrainState, batch: Batch
) -> tuple[jax.stages.Compiled, metrics.Collection, float]:
    """Compiles the update for a mesh: (step, empty metrics to start with, seconds it took).

    The step takes over the memory of its state and metrics ("donation"), except on CPUs, where
    memory is not scarce and XLA's in-place updates make a small network's step 1.3 times as long.
    """
    started = time.monotonic()
    lowered = lower_train_step(experiment, mesh, state, batch)
    distributed.check_agreement({"program": lowered.as_text})
    collected = jax.device_put(step_metrics(experiment.process).empty(), parallel.replicated(mesh))
    return lowered.compile(), collected, time.monotonic() - started


def lower_train_step(
    experiment: Experiment, mesh: jax.sharding.Mesh, state: TrainState, batch: Batch
) -> jax.stages.Lowered:
    """The update for a mesh, ready to be compiled; state and batch may be shapes with shardings."""
    collected = parallel.abstract(mesh, jax.eval_shape(step_metrics(experiment.process).empty))
    donated = () if mesh.devices.flat[0].platform == "cpu" else (0, 1)
    shardings = parallel.shardings(mesh, state), parallel.replicated(mesh)
    jitted = jax.jit(make_train_step(experiment), donate_argnums=donated, out_shardings=shardings)
    with parallel.activations(mesh):
        return jitted.lower(state, collected, batch)


def _diverged(experiment: Experiment, state: TrainState, checkpoints: Checkpoints) -> UserError:
    """The end of a run whose batches have no finite gradient any more: what is to blame, and which
    checkpoint is good."""
    checkpoints.wait()
    step, in_row, updates = (
        int(state.step),
        int(state.skipped_in_row),
        int(state.step) - int(state.skipped),
    )
    blame, followed = "the parameters have blown up: look at the rate", updates
    if gradient_is_finite(experiment, state):
        blame, followed = "the network is sound: look at the data", None
    good = checkpoints.good_steps(updates=followed)
    newer = [other for other in checkpoints.steps() if good and other > good[-1]]
    way = f" (first move {', '.join(map(str, newer))} away from there)" if newer else ""
    place = (
        (f"checkpoint {good[-1]} in {checkpoints.directory}, the last good one{way}")
        if good
        else "the start"
    )
    return UserError(
        f"the last {in_row} batches up to step {step} had no finite gradient; {blame}, "
        f"and go on from {place}"
    )


def save_state(checkpoints: Checkpoints, state: TrainState, batch_size: int) -> None:
    """Starts writing a checkpoint of the state; what samples are drawn with is in items of its own,
    for those who only sample."""
    step, updates = int(state.step), int(state.step) - int(state.skipped)
    soundness = {
        "updates": updates,
        "skipped_in_row": int(state.skipped_in_row),
        "finite": bool(all_finite(state)),
    }
    checkpoints.save(
        step, _items(state), {"step": step, "images_seen": step * batch_size} | soundness
    )


def restore_state(
    checkpoints: Checkpoints, abstract: TrainState, allow_nonfinite: bool = False
) -> TrainState | None:
    """The state of the newest usable checkpoint, laid out as `abstract` says; None if there is no
    checkpoint."""
    restored = checkpoints.restore(_items(abstract), allow_nonfinite=allow_nonfinite)
    if restored is None:
        return None
    _, items = restored
    power_emas = tuple(items["power_emas"][name] for name, _ in _named(abstract.power_emas))
    constants = items.get("constants", abstract.constants)
    return dataclasses.replace(
        items["state"], ema=items["ema"], power_emas=power_emas, constants=constants
    )


def _items(state: TrainState) -> dict[str, Any]:
    items = {
        "state": dataclasses.replace(state, ema=None, power_emas=(), constants=None),
        "ema": state.ema,
    }
    if state.constants:
        items["constants"] = state.constants
    if state.power_emas:
        items["power_emas"] = dict(_named(state.power_emas))
    return items


def _named(trees: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """("0", tree), ("1", tree) …: how several averages are named in a checkpoint."""
    return ((str(index), tree) for index, tree in enumerate(trees))


def _write_grid(
    path: epath.Path, sampler: Sampler, state: TrainState, experiment: Experiment
) -> None:
    """Samples with the seeds 0, 1, 2 …, the same each time, so that pictures of different steps can
    be compared.

    A run does not end because there is no picture of it: one that cannot be made is a warning.
    """
    seeds = np.arange(experiment.training.grid_images)
    try:
        with backend.memory_for("fewer training.grid_images take less"):
            samples = sampler.draw(
                state.ema_variables, seeds, default_labels(seeds, experiment.model.num_classes)
            )
    except OutOfMemory as error:
        log.warning("the grid %s could not be drawn: %s", path, error)
        return
    if not distributed.is_first():
        return
    bad = int((~np.isfinite(samples).reshape(len(samples), -1).all(axis=1)).sum())
    if bad:
        log.warning("%d of the %d samples in %s are not finite", bad, len(samples), path)
    is_latent = bool(experiment.data.autoencoder)
    pixels.write_preview(
        path, samples if is_latent else np.asarray(pixels.to_pixels(samples)), is_latent
    )


def _line(values: dict[str, float]) -> str:
    return (
        f"loss {values['loss']:.4f} | gradient {values['gradient_norm']:.3f} | rate "
        f"{values['learning_rate']:.2e} | "
        f"{values['steps_per_s']:.2f} steps/s | {values['images_per_s']:.0f} images/s"
        + f" | waiting {values['data_wait_share']:.1%}"
        + (f" | MFU {values['mfu']:.1%}" if "mfu" in values else "")
        + (f" | {values['skipped']:.0f} batches skipped" if values["skipped"] else "")
    )
