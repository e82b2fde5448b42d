"""A training run from its config to its last checkpoint."""

import dataclasses
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from clu import metrics, parameter_overview
from etils import epath
from ml_collections import ConfigDict
from tensorboardX import SummaryWriter

from diffit_jax import distributed, models, parallel
from diffit_jax.checkpoint import Checkpoints
from diffit_jax.console import Progress
from diffit_jax.data import pixels
from diffit_jax.data.pipeline import batches
from diffit_jax.data.sources import Source, open_dataset
from diffit_jax.errors import UserError
from diffit_jax.experiment import CHECKPOINTS, SNAPSHOTS, Experiment, build, claim_workdir
from diffit_jax.sampling import Sampler, default_labels, sampler_without_autoguidance
from diffit_jax.training.state import TrainState, abstract_state, create_state
from diffit_jax.training.step import Batch, make_train_step, step_metrics
from diffit_jax.training.watch import Tracer, Watch, cache_report

log = logging.getLogger(__name__)


def train(config: ConfigDict, workdir: epath.PathLike, profile_steps: tuple[int, int] | None = None) -> TrainState:
    """Trains a config in a work directory, from its newest checkpoint if there is one, up to `training.total_steps`.

    The directory receives `config.json`, TensorBoard events in `events/`, sample grids in `grids/` and checkpoints in `checkpoints/`.
    A run that was killed and started again ends with the same parameters as one that never stopped.

    Args:
      config: of the experiment.
      workdir: local or `gs://`.
      profile_steps: (first, last) step of a profiler trace in `profile/`, for TensorBoard or Perfetto; None: no trace.

    Returns:
      The final state.

    Raises:
      UserError: a config that cannot be, a directory that holds another config's run or cannot be written, or a run that has diverged.
      distributed.Preempted: the machine is about to be taken away; a checkpoint is saved.
    """
    # --- Check everything before the first thing is written.
    experiment = build(config)
    settings, model = experiment.training, experiment.model
    mesh = parallel.make_mesh(shape=experiment.mesh)
    parallel.check_batch_size(mesh, settings.batch_size, "training.batch_size", parts=settings.accumulation)
    abstract = abstract_state(experiment, mesh)
    parallel.check_axes(mesh, abstract.params)
    grid_sampler = sampler_without_autoguidance(experiment, mesh, settings.grid_images)
    source = distributed.first_then_all(lambda: open_training_data(experiment))
    distributed.check_agreement({"config": config.to_json, "code version": distributed.code_version})
    workdir = distributed.first_then_all(lambda: claim_workdir(workdir, config), lambda: epath.Path(workdir))
    distributed.check_shared(workdir)

    # --- State: fresh, or that of the newest usable checkpoint.
    checkpoints = Checkpoints(workdir / CHECKPOINTS, settings.keep_checkpoints, settings.keep_every_steps)
    snapshots = Checkpoints(workdir / SNAPSHOTS, keep=10**6) if experiment.ema.power_lengths else None
    state = restore_state(checkpoints, abstract)
    if state is None:
        state = create_state(experiment, mesh)
    else:
        checkpoints.set_aside_after(int(state.step))
    first_step = int(state.step)
    log.info("model %s: %s parameters", type(model).__name__, f"{parameter_overview.count_parameters(state.params):,}")
    log.info("attention: %s", models.attention_in_words(model, mesh.devices.flat[0].platform))
    log.info("%s step %d of %d in %s", "resuming at" if first_step else "starting at", first_step, settings.total_steps, workdir)
    if first_step >= settings.total_steps:
        return state

    # --- The update, compiled before the clock starts.
    data = batches(source, settings.batch_size, experiment.seed, first_step, parallel.local_rows(mesh, settings.batch_size))
    batch = parallel.put_batch(mesh, next(data))
    watch, tracer = Watch(experiment, mesh), Tracer(workdir / "profile", profile_steps)
    with cache_report("training step"):
        train_step, collected, seconds = compile_train_step(experiment, mesh, state, batch)
    log.info("compiled the training step in %.1f s for %d x %s", seconds, mesh.size, mesh.devices.flat[0].device_kind)

    # --- The loop.
    first = distributed.is_first()
    events = SummaryWriter(str(workdir / "events"), purge_step=first_step) if first else None
    watch.start(first_step)
    saved_step, saved_at = first_step, time.monotonic()
    progress = Progress("train", settings.total_steps, done=first_step, shown=first)
    with progress, distributed.PreemptionNotice() as notice, distributed.lost_processes():
        for step in range(first_step + 1, settings.total_steps + 1):
            tracer.before(step)
            state, collected = train_step(state, collected, batch)
            last = step == settings.total_steps
            if not last:
                with watch.data_wait():
                    host_batch = next(data)
                batch = parallel.put_batch(mesh, host_batch)  # while the devices are at work
            progress.advance()
            due = step % settings.checkpoint_steps == 0 or last

            if step % settings.log_steps == 0 or last:
                values = {name: float(value) for name, value in collected.compute().items()}  # waits for the devices
                values |= watch.report(step)
                if events:
                    for name, value in values.items():
                        events.add_scalar(name, value, step)
                progress.say(_line(values))
                collected = jax.device_put(type(collected).empty(), parallel.replicated(mesh))
                if values["skipped_in_row"] >= settings.max_bad_steps:
                    raise _diverged(step, values, checkpoints)
                if settings.checkpoint_minutes:
                    due = distributed.agreed(time.monotonic() - saved_at > 60 * settings.checkpoint_minutes) or due
            preempted = notice.reached(step) and not last
            if due or preempted:
                save_state(checkpoints, state, settings.batch_size)
                saved_step, saved_at = step, time.monotonic()
            if preempted:
                checkpoints.wait()
                raise distributed.Preempted(f"checkpoint {saved_step} of {settings.total_steps} steps is saved in {checkpoints.directory}")
            if snapshots and (step % experiment.ema.snapshot_steps == 0 or last) and step not in snapshots.steps():
                facts = {"step": step, "updates": step - int(state.skipped)}
                snapshots.save(step, {"power_emas": dict(_named(state.power_emas))}, facts)
            if step % settings.grid_steps == 0 or last:
                _write_grid(workdir / "grids" / f"{step:08d}.png", grid_sampler, state, experiment)
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
    return open_dataset(data.name, "train", data.data_dir, model.sample_shape, model.num_classes, latents=bool(data.autoencoder))


def compile_train_step(
    experiment: Experiment, mesh: jax.sharding.Mesh, state: TrainState, batch: Batch
) -> tuple[jax.stages.Compiled, metrics.Collection, float]:
    """Compiles the update for a mesh: (step, empty metrics to start with, seconds it took).

    The step takes over the memory of its state and metrics ("donation"), except on CPUs, where memory is not scarce and XLA's in-place
    updates make a small network's step 1.3 times as long.
    """
    started = time.monotonic()
    lowered = lower_train_step(experiment, mesh, state, batch)
    distributed.check_agreement({"program": lowered.as_text})
    collected = jax.device_put(step_metrics(experiment.process).empty(), parallel.replicated(mesh))
    return lowered.compile(), collected, time.monotonic() - started


def lower_train_step(experiment: Experiment, mesh: jax.sharding.Mesh, state: TrainState, batch: Batch) -> jax.stages.Lowered:
    """The update for a mesh, ready to be compiled; state and batch may be shapes with shardings."""
    collected = parallel.abstract(mesh, jax.eval_shape(step_metrics(experiment.process).empty))
    donated = () if mesh.devices.flat[0].platform == "cpu" else (0, 1)
    shardings = parallel.shardings(mesh, state), parallel.replicated(mesh)
    jitted = jax.jit(make_train_step(experiment), donate_argnums=donated, out_shardings=shardings)
    with parallel.activations(mesh):
        return jitted.lower(state, collected, batch)


def _diverged(step: int, values: Mapping[str, float], checkpoints: Checkpoints) -> UserError:
    checkpoints.wait()
    good = checkpoints.steps()
    return UserError(
        f"the last {values['skipped_in_row']:.0f} batches up to step {step} had no finite gradient: look at the data and the rate, "
        f"and go on from {f'checkpoint {good[-1]} in {checkpoints.directory}, the last good one' if good else 'the start'}"
    )


def save_state(checkpoints: Checkpoints, state: TrainState, batch_size: int) -> None:
    """Starts writing a checkpoint of the state; what samples are drawn with is in items of its own, for those who only sample."""
    step = int(state.step)
    checkpoints.save(step, _items(state), {"step": step, "images_seen": step * batch_size})


def restore_state(checkpoints: Checkpoints, abstract: TrainState) -> TrainState | None:
    """The state of the newest usable checkpoint, laid out as `abstract` says; None if there is no checkpoint."""
    restored = checkpoints.restore(_items(abstract))
    if restored is None:
        return None
    _, items = restored
    power_emas = tuple(items["power_emas"][name] for name, _ in _named(abstract.power_emas))
    constants = items.get("constants", abstract.constants)
    return dataclasses.replace(items["state"], ema=items["ema"], power_emas=power_emas, constants=constants)


def _items(state: TrainState) -> dict[str, Any]:
    items = {"state": dataclasses.replace(state, ema=None, power_emas=(), constants=None), "ema": state.ema}
    if state.constants:
        items["constants"] = state.constants
    if state.power_emas:
        items["power_emas"] = dict(_named(state.power_emas))
    return items


def _named(trees: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """("0", tree), ("1", tree) …: how several averages are named in a checkpoint."""
    return ((str(index), tree) for index, tree in enumerate(trees))


def _write_grid(path: epath.Path, sampler: Sampler, state: TrainState, experiment: Experiment) -> None:
    """Samples with the seeds 0, 1, 2 …, the same each time, so that pictures of different steps can be compared."""
    seeds = np.arange(experiment.training.grid_images)
    samples = sampler.draw(state.ema_variables, seeds, default_labels(seeds, experiment.model.num_classes))
    if not distributed.is_first():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    show = pixels.latent_preview if experiment.data.autoencoder else pixels.to_pixels
    pixels.write_png(path, pixels.image_grid(np.asarray(show(samples)), columns=10))


def _line(values: dict[str, float]) -> str:
    return (
        f"loss {values['loss']:.4f} | gradient {values['gradient_norm']:.3f} | rate {values['learning_rate']:.2e} | "
        f"{values['steps_per_s']:.2f} steps/s | {values['images_per_s']:.0f} images/s"
        + f" | waiting {values['data_wait_share']:.1%}"
        + (f" | MFU {values['mfu']:.1%}" if "mfu" in values else "")
        + (f" | {values['skipped']:.0f} batches skipped" if values["skipped"] else "")
    )
