"""The state of a training run: one pytree."""

from collections.abc import Mapping
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

from diffit_jax import models, parallel


@flax.struct.dataclass
class TrainState:
    """Everything that an update changes. All float32 but the counter.

    Attributes:
      step: int32 scalar, updates made so far; the data position and all random numbers follow from it.
      params: parameters of the network.
      constants: fixed arrays of the network, which training does not change.
      opt_state: state of the optax optimizer.
      ema: moving average of `params`.
    """

    step: jax.Array
    params: Any
    constants: Any
    opt_state: Any
    ema: Any

    @property
    def ema_variables(self) -> dict[str, Any]:
        """The network's variables with the averaged parameters: what samples are drawn with."""
        return {"params": self.ema, "constants": self.constants}


def abstract_state(model: nn.Module, optimizer: optax.GradientTransformation, sharding: NamedSharding) -> TrainState:
    """Shapes, dtypes and shardings of the state, as `ShapeDtypeStruct`s; allocates nothing."""
    return parallel.abstract(jax.eval_shape(lambda: _init(model, optimizer, seed=0)), sharding)


def create_state(model: nn.Module, optimizer: optax.GradientTransformation, seed: int, sharding: NamedSharding) -> TrainState:
    """A fresh state, made by one jitted function straight into its sharding."""
    return jax.jit(lambda: _init(model, optimizer, seed), out_shardings=sharding)()


def fresh_state(variables: Mapping[str, Any], optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first update, from the variables of a network."""
    params, constants = variables["params"], variables["constants"]
    ema = jax.tree.map(jnp.copy, params)
    return TrainState(jnp.zeros((), jnp.int32), params, constants, optimizer.init(params), ema)


def _init(model: nn.Module, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    return fresh_state(models.init_variables(model, jax.random.key(seed, impl="threefry2x32")), optimizer)
