"""The exponential moving average of the parameters, from which samples are drawn."""

from typing import Any

import jax
import jax.numpy as jnp

from diffit_jax.sections import EMA


def ema_rate(settings: EMA, update: jax.Array, batch_size: int) -> jax.Array:
    """1 - beta of an update by its number (from 0): float32 scalar in (0, 1], exactly 1 in the
    first update.

    beta = 0.5^(1 / h) with the half-life in updates h = min(halflife_images / batch_size, update ·
    rampup_ratio). Updates are counted, not images, which would leave the range of int32 and
    float32; `expm1` keeps 1 - beta exact where beta is nearly 1.
    """
    halflife = jnp.minimum(settings.halflife_images / batch_size, update * settings.rampup_ratio)
    return -jnp.expm1(-jnp.log(2.0) / jnp.maximum(halflife, 1e-8))


def ema_update(average: Any, params: Any, rate: jax.Array) -> Any:
    """average + rate (params - average), leaf by leaf; float32 pytrees of one structure."""
    return jax.tree.map(lambda mean, new: mean + rate * (new - mean), average, params)
