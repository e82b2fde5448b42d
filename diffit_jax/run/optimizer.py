"""The optimizer and its learning rate."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from diffit_jax import models
from diffit_jax.experiment.sections import Optimizer
from diffit_jax.models.placement import ParamMetadata
from diffit_jax.runtime import parallel


def learning_rate(settings: Optimizer, update: jax.Array | int) -> jax.Array:
    """Return the learning rate of an update, by its number from 0.

    learning_rate · min(update / warmup_steps, 1), so 0 in the first if there is a warm-up, as in
    EDM; with the schedule "cosine" times (1 + cos(π share)) / 2, where share is how much of the way
    from `warmup_steps` to `decay_steps` is done.
    """
    rate = settings.learning_rate * jnp.minimum(
        update / settings.warmup_steps if settings.warmup_steps else 1.0, 1.0
    )
    if settings.schedule == "cosine":
        fraction = (update - settings.warmup_steps) / (settings.decay_steps - settings.warmup_steps)
        rate = rate * (1 + jnp.cos(jnp.pi * jnp.clip(fraction, 0.0, 1.0))) / 2
    return rate


def make_optimizer(
    settings: Optimizer, model: models.Model | None = None
) -> optax.GradientTransformation:
    """Make Adam, AdamW or LAMB as an optax transformation.

    Its state is two arrays like each parameter and the number of updates.

    Args:
      settings: section `optimizer`.
      model: whose parameters they are: their metadata decide what decays, and of what LAMB measures
        each layer by itself.
    """
    chain = (
        [optax.clip_by_global_norm(settings.max_gradient_norm)]
        if settings.max_gradient_norm
        else []
    )
    chain.append(optax.scale_by_adam(settings.beta1, settings.beta2, settings.epsilon))
    if settings.weight_decay:
        mask = functools.partial(decays, metadata=models.parameter_metadata(model) if model else {})
        chain.append(optax.add_decayed_weights(settings.weight_decay, mask=mask))
    if settings.name == "lamb":
        chain.append(scale_by_layer_trust_ratio(model.stacked if model else ()))
    rate: Any = functools.partial(learning_rate, settings)
    chain.append(optax.scale_by_learning_rate(rate))
    return optax.chain(*chain)


def decays(params: Any, metadata: Mapping[str, ParamMetadata]) -> Any:
    """Return which parameters weight decay acts on, a tree of bools.

    As declared where they are made; of others (an objective's), those that are called kernels.
    """

    def decaying(path: tuple, _: Any) -> bool:
        name = parallel.path_name(path)
        return metadata[name].decays if name in metadata else name.endswith("kernel")

    return jax.tree_util.tree_map_with_path(decaying, params)


def scale_by_layer_trust_ratio(stacked: Sequence[str]) -> optax.GradientTransformation:
    """Scale updates by LAMB's trust ratio ‖parameter‖ / ‖update‖ (You et al. 2020), layer by layer.

    Every layer of a stack has a ratio of its own; `optax.scale_by_trust_ratio` would take one ratio
    for a whole stack. Where either norm is 0 the ratio is 1.
    """

    def ratio(update: jax.Array, param: jax.Array) -> jax.Array:
        norm, length = jnp.linalg.norm(param.ravel()), jnp.linalg.norm(update.ravel())
        return jnp.where((norm > 0) & (length > 0), norm / jnp.where(length > 0, length, 1.0), 1.0)

    def scale(path: tuple, update: jax.Array, param: jax.Array) -> jax.Array:
        if _names(path)[0] in stacked:
            return jax.vmap(lambda u, p: u * ratio(u, p))(update, param)
        return update * ratio(update, param)

    def update_fn(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return jax.tree_util.tree_map_with_path(scale, updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update_fn)


def _names(path: tuple) -> list[str]:
    return parallel.path_name(path).split("/")
