"""The optimiser and its learning rate."""

import functools

import jax
import jax.numpy as jnp
import optax

from diffit_jax.experiment import Optimizer


def learning_rate(settings: Optimizer, step: jax.Array | int) -> jax.Array:
    """Learning rate of update number `step` (from 0): learning_rate · min(step / warmup_steps, 1), so 0 in the first, as in EDM."""
    return settings.learning_rate * jnp.minimum(step / settings.warmup_steps if settings.warmup_steps else 1.0, 1.0)


def make_optimizer(settings: Optimizer) -> optax.GradientTransformation:
    """Adam as an optax transformation; its state is two arrays like the parameters and the number of updates."""
    return optax.adam(functools.partial(learning_rate, settings), settings.beta1, settings.beta2, settings.epsilon)
