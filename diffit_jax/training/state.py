"""The state of a training run: one pytree."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh

from diffit_jax import models
from diffit_jax.experiment import Experiment
from diffit_jax.runtime import backend, parallel
from diffit_jax.training.objective import DENOISING, Objective
from diffit_jax.training.optimizer import make_optimizer


@struct.dataclass
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
      objective: `params` and `opt_state` of the objective's own parameters; {} if it has none.
    """

    step: jax.Array
    skipped: jax.Array
    skipped_in_row: jax.Array
    params: Any
    constants: Any
    opt_state: Any
    ema: Any
    power_emas: tuple[Any, ...]
    objective: Any = struct.field(default_factory=dict)

    @property
    def ema_variables(self) -> dict[str, Any]:
        """The network's variables with the averaged parameters: what samples are drawn with."""
        return {"params": self.ema, "constants": self.constants}


@backend.pinned()
def abstract_state(
    experiment: Experiment, mesh: Mesh, objective: Objective = DENOISING
) -> TrainState:
    """Shapes, dtypes and shardings of the state, as `ShapeDtypeStruct`s; allocates nothing."""
    shapes = jax.eval_shape(lambda: _init(experiment, objective))
    facts = models.parameter_facts(experiment.model)
    ours = parallel.abstract(mesh, shapes.objective)  # a copy on each device
    return parallel.abstract(mesh, shapes.replace(objective={}), facts).replace(objective=ours)


@backend.pinned()
def create_state(
    experiment: Experiment, mesh: Mesh, objective: Objective = DENOISING
) -> TrainState:
    """A fresh state, made by one jitted function straight into its shardings."""
    abstract = abstract_state(experiment, mesh, objective)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return jax.jit(lambda: _init(experiment, objective), out_shardings=shardings)()


@jax.jit
def all_finite(state: TrainState) -> jax.Array:
    """Whether parameters and averages have no NaN or infinity, a bool scalar."""
    leaves = jax.tree.leaves((state.params, state.ema, state.power_emas, state.objective))
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in leaves]))


def fresh_state(variables: Mapping[str, Any], experiment: Experiment) -> TrainState:
    """The state before the first update, from the variables of the experiment's network."""
    params, constants = variables["params"], variables["constants"]
    optimizer = make_optimizer(experiment.optimizer, experiment.model)
    copies = [jax.tree.map(jnp.copy, params) for _ in range(1 + len(experiment.ema.power_lengths))]
    zero = jnp.zeros((), jnp.int32)
    return TrainState(
        step=zero,
        skipped=zero,
        skipped_in_row=zero,
        params=params,
        constants=constants,
        opt_state=optimizer.init(params),
        ema=copies[0],
        power_emas=tuple(copies[1:]),
    )


def _init(experiment: Experiment, objective: Objective) -> TrainState:
    key = jax.random.key(experiment.seed, impl="threefry2x32")
    state = fresh_state(models.init_variables(experiment.model, key), experiment)
    params = objective.init(experiment, jax.random.fold_in(key, 1))
    if not params:
        return state
    optimizer = make_optimizer(experiment.optimizer, experiment.model)
    return state.replace(objective={"params": params, "opt_state": optimizer.init(params)})
