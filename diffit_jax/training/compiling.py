"""How every verb opens an experiment, and how the update is compiled for a mesh."""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from clu import metrics
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from diffit_jax import models, platforms
from diffit_jax.data.sources import Source, Wanted, open_dataset
from diffit_jax.errors import UserError
from diffit_jax.experiment import Experiment, build, class_name
from diffit_jax.runtime import distributed, parallel, rows
from diffit_jax.training.objective import DENOISING, Objective
from diffit_jax.training.state import TrainState, abstract_state
from diffit_jax.training.step import Batch, make_train_step, step_metrics


@dataclasses.dataclass(frozen=True)
class Opened:
    """An experiment on a mesh, checked.

    Attributes:
      experiment: the config as typed values.
      mesh: the devices.
      state: shapes, dtypes and shardings of a run's state; its `ema_variables` are those that
        samples are drawn with.
      objective: what training minimises.
    """

    experiment: Experiment
    mesh: Mesh
    state: TrainState
    objective: Objective = DENOISING


def open_experiment(
    config: ConfigDict | Mapping[str, Any],
    devices: Sequence[Any] | None = None,
    to_train: bool = True,
    config_file: epath.PathLike | None = None,
    objective: Objective = DENOISING,
) -> Opened:
    """Checks everything about a config that can be checked before anything is allocated, compiled
    or written: what every verb begins with.

    Args:
      config: of the experiment.
      devices: to use; None: all of all processes. Descriptions of devices that are not there
        (`preflight`) will do.
      to_train: whether its training batch is needed, and so a mesh that divides it; otherwise a
        mesh that does not fit the devices gives way to one that does.
      config_file: of the work directory that the config was read from, see `experiment.build`.
      objective: what training minimises.

    Raises:
      UserError: a config, mesh or batch that cannot be.
    """
    experiment = build(config, config_file)
    training = experiment.training
    if to_train:
        if not experiment.process.trains:
            name = class_name("process", experiment.process)
            raise UserError(
                f"config key process.name is {name}: its networks are only sampled; train with "
                "ddpm, edm, vp or ve"
            )
        mesh = parallel.make_mesh(devices, experiment.mesh)
        rows.check_batch_size(
            mesh, training.batch_size, "training.batch_size", parts=training.accumulation
        )
    else:
        mesh = parallel.any_mesh(devices, experiment.mesh)
    if experiment.model.tries_kernel:
        parallel.try_kernel(mesh)
    state = abstract_state(experiment, mesh, objective)
    parallel.check_axes(mesh, state.params, models.parameter_facts(experiment.model))
    return Opened(experiment, mesh, state, objective)


def open_training_data(experiment: Experiment, split: str = "train") -> Source:
    """The data set that an experiment trains on; "test": the split that it does not see."""
    data, model = experiment.data, experiment.model
    scaling = {"latent_mean": data.latent_mean, "latent_scale": data.latent_scale}
    wanted = Wanted(model.sample_shape, model.num_classes, experiment.space.example, **scaling)
    return open_dataset(data.name, split, data.data_dir, wanted)


def compile_train_step(
    opened: Opened, state: TrainState, batch: Batch
) -> tuple[jax.stages.Compiled, metrics.Collection, float]:
    """Compiles the update for a mesh: (step, empty metrics to start with, seconds it took).

    The step takes over the memory of its state and metrics ("donation"), where the platform's entry
    says so.
    """
    started = time.monotonic()
    lowered = lower_train_step(opened, state, batch)
    distributed.check_agreement({"program": lowered.as_text})
    empty = step_metrics(opened.experiment.process, opened.objective).empty()
    collected = jax.device_put(empty, parallel.replicated(opened.mesh))
    step, seconds = lowered.compile(), time.monotonic() - started
    distributed.meet()  # see `distributed.call_together`
    return step, collected, seconds


def lower_train_step(opened: Opened, state: TrainState, batch: Batch) -> jax.stages.Lowered:
    """The update for a mesh, ready to be compiled: `make_train_step`'s. State and batch may be
    shapes with shardings."""
    experiment, mesh, objective = opened.experiment, opened.mesh, opened.objective
    empty = step_metrics(experiment.process, objective).empty
    collected = parallel.abstract(mesh, jax.eval_shape(empty))
    donated = (0, 1) if platforms.of_mesh(mesh).donates else ()
    laid = jax.tree.map(lambda leaf: leaf.sharding, opened.state)
    shardings = laid, parallel.replicated(mesh)
    step = make_train_step(experiment, objective)
    jitted = jax.jit(step, donate_argnums=donated, out_shardings=shardings)
    with parallel.placement(mesh):
        return jitted.lower(state, collected, batch, objective.frozen)


def batch_shapes(experiment: Experiment, mesh: Mesh) -> Batch:
    """The shapes of a batch, with their shardings, whatever the data set."""
    sharding = parallel.batch_sharding(mesh)
    shapes = experiment.space.batch(experiment.training.batch_size, experiment.model.sample_shape)
    return {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        for name, leaf in shapes.items()
    }
