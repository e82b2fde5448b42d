"""The state of a training run: one pytree; and how every verb opens an experiment."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import flax
import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from diffit_jax import models
from diffit_jax.experiment import Experiment, build
from diffit_jax.runtime import backend, parallel
from diffit_jax.training.optimizer import make_optimizer


@flax.struct.dataclass
class TrainState:
    """Everything that an update changes. All float32 but the counters.

    Attributes:
      step: int32 scalar, batches seen so far; the data position and all random numbers follow from
        it.
      skipped: int32 scalar, how many of them made no update because the gradient was not finite.
      skipped_in_row: int32 scalar, how many of the last ones.
      params: parameters of the network.
      constants: fixed arrays of the network, which training does not change.
      opt_state: state of the optax optimizer.
      ema: moving average of `params`.
      power_emas: one more average for each of `ema.power_lengths`.
    """

    step: jax.Array
    skipped: jax.Array
    skipped_in_row: jax.Array
    params: Any
    constants: Any
    opt_state: Any
    ema: Any
    power_emas: tuple[Any, ...]

    @property
    def ema_variables(self) -> dict[str, Any]:
        """The network's variables with the averaged parameters: what samples are drawn with."""
        return {"params": self.ema, "constants": self.constants}


@dataclasses.dataclass(frozen=True)
class Opened:
    """An experiment on a mesh, checked.

    Attributes:
      experiment: the config as typed values.
      mesh: the devices.
      state: shapes, dtypes and shardings of a run's state; its `ema_variables` are those that
        samples are drawn with.
    """

    experiment: Experiment
    mesh: Mesh
    state: TrainState


def open_experiment(
    config: ConfigDict | Mapping[str, Any],
    devices: Sequence[Any] | None = None,
    to_train: bool = True,
    config_file: epath.PathLike | None = None,
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

    Raises:
      UserError: a config, mesh or batch that cannot be.
    """
    experiment = build(config, config_file)
    settings = experiment.training
    if to_train:
        mesh = parallel.make_mesh(devices, experiment.mesh)
        parallel.check_batch_size(
            mesh, settings.batch_size, "training.batch_size", parts=settings.accumulation
        )
    else:
        mesh = parallel.any_mesh(devices, experiment.mesh)
    if getattr(experiment.model, "attention", "") == "auto":
        parallel.try_kernel(mesh)
    state = abstract_state(experiment, mesh)
    parallel.check_axes(mesh, state.params)
    return Opened(experiment, mesh, state)


@backend.pinned()
def abstract_state(experiment: Experiment, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state, as `ShapeDtypeStruct`s; allocates nothing."""
    return parallel.abstract(mesh, jax.eval_shape(lambda: _init(experiment)))


@backend.pinned()
def create_state(experiment: Experiment, mesh: Mesh) -> TrainState:
    """A fresh state, made by one jitted function straight into its shardings."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(experiment, mesh))
    return jax.jit(lambda: _init(experiment), out_shardings=shardings)()


@jax.jit
def all_finite(state: TrainState) -> jax.Array:
    """Whether parameters and averages have no NaN or infinity, a bool scalar."""
    leaves = jax.tree.leaves((state.params, state.ema, state.power_emas))
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in leaves]))


def fresh_state(variables: Mapping[str, Any], experiment: Experiment) -> TrainState:
    """The state before the first update, from the variables of the experiment's network."""
    params, constants = variables["params"], variables["constants"]
    optimizer = make_optimizer(experiment.optimizer, experiment.model.stacked)
    copies = [jax.tree.map(jnp.copy, params) for _ in range(1 + len(experiment.ema.power_lengths))]
    zero = jnp.zeros((), jnp.int32)
    return TrainState(
        zero, zero, zero, params, constants, optimizer.init(params), copies[0], tuple(copies[1:])
    )


def _init(experiment: Experiment) -> TrainState:
    key = jax.random.key(experiment.seed, impl="threefry2x32")
    return fresh_state(models.init_variables(experiment.model, key), experiment)
