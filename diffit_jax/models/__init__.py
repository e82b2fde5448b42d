"""The networks, as pure Flax modules: shapes in, shapes out."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffit_jax.models.image import ImageDiffiT

MODELS = {"image_diffit": ImageDiffiT}


def init_params(model: nn.Module, key: jax.Array) -> Any:
    """Fresh float32 parameters of a network (use it under `jit` or `eval_shape`)."""
    x_BHWC = jnp.zeros((1, *model.image_shape), jnp.float32)
    return model.init(key, x_BHWC, jnp.zeros((1,), jnp.float32), {})["params"]


def as_network(model: nn.Module, params: Any) -> Callable[[jax.Array, jax.Array, Any], jax.Array]:
    """The network as the function `(x_BHWC, noise_level_B, conditioning) -> y_BHWC` that diffusion processes know.

    Call it inside jit with `params` an argument of the jitted function: captured from outside, they would become constants.
    """
    return lambda x_BHWC, noise_level_B, conditioning: model.apply({"params": params}, x_BHWC, noise_level_B, conditioning)
