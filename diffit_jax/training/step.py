"""One update of the parameters."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from clu import metrics

from diffit_jax import models
from diffit_jax.diffusion import guidance
from diffit_jax.diffusion.seams import Process
from diffit_jax.experiment import Experiment
from diffit_jax.training.ema import ema_rate, ema_update
from diffit_jax.training.optimizer import learning_rate, make_optimizer
from diffit_jax.training.power_ema import gamma_of, power_rate
from diffit_jax.training.state import TrainState

Batch = dict[str, Any]  # of global arrays, or their shapes


@functools.cache
def step_metrics(process: Process) -> type[metrics.Collection]:
    """A class of metrics for each process, as clu has it: means over the updates since the last
    report, kept on the device until then."""
    averages = {
        name: metrics.Average.from_output(name)
        for name in ("loss", *process.loss_terms, "gradient_norm")
    }
    last = {
        name: metrics.LastValue.from_output(name)
        for name in ("learning_rate", "skipped", "skipped_in_row")
    }
    return metrics.Collection.create(**averages, **last)


def example_keys(seed: int, step: jax.Array, batch_size: int) -> jax.Array:
    """One key per example of a global batch, (batch_size,): a function of (seed, step, position in
    the batch) alone."""
    step_key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), step)
    return jax.vmap(lambda example: jax.random.fold_in(step_key, example))(jnp.arange(batch_size))


def gradient_is_finite(experiment: Experiment, state: TrainState) -> bool:
    """Whether the parameters give a finite gradient on examples without fault: what tells a network
    that blew up from bad data."""
    model, keys = experiment.model, example_keys(experiment.seed, state.step, 8)

    def norm(params: Any) -> jax.Array:
        def loss(params: Any) -> jax.Array:
            x_BHWC = jax.vmap(lambda key: jax.random.normal(key, model.sample_shape))(keys)
            network = models.as_network(model, {"params": params, "constants": state.constants})
            return jnp.mean(experiment.process.loss(network, x_BHWC, {}, keys)[0])

        return optax.tree.norm(jax.grad(loss)(params))

    return bool(jnp.isfinite(jax.jit(norm)(state.params)))


def make_train_step(
    experiment: Experiment,
) -> Callable[[TrainState, metrics.Collection, Batch, Any], tuple[TrainState, metrics.Collection]]:
    """The update as a pure function, ready for `jit` (donate the state and the metrics).

    Returns:
      `step(state, metrics, batch, space_variables) -> (state, metrics)`. The batch is that of a
      `Source`, the last argument `experiment.space.variables`.
    """
    gradient_of = jax.value_and_grad(functools.partial(mean_loss, experiment), has_aux=True)
    optimizer = make_optimizer(experiment.optimizer, experiment.model.stacked)
    gammas = [gamma_of(length) for length in experiment.ema.power_lengths]

    def train_step(
        state: TrainState, collected: metrics.Collection, batch: Batch, space_variables: Any
    ) -> tuple[TrainState, metrics.Collection]:
        # --- The gradient.
        batch_size = len(batch["label"])
        examples = {**batch, "key": example_keys(experiment.seed, state.step, batch_size)}
        (loss, terms), gradient = accumulated(
            lambda part: gradient_of(state.params, state.constants, part, space_variables),
            examples,
            experiment.training.accumulation,
        )
        if experiment.optimizer.replace_nonfinite:
            gradient = jax.tree.map(
                lambda g: jnp.nan_to_num(g, nan=0.0, posinf=1e5, neginf=-1e5), gradient
            )
        norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)

        # --- The update, and every average of the parameters.
        num_updates = state.step - state.skipped
        update, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, update)
        ema = ema_update(state.ema, params, ema_rate(experiment.ema, num_updates, batch_size))
        power_emas = tuple(
            ema_update(one, params, power_rate(gamma, num_updates))
            for one, gamma in zip(state.power_emas, gammas, strict=True)
        )

        # --- Without a finite gradient the data move on, and everything else stands still.
        def if_finite(new: Any, old: Any) -> Any:
            return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)

        state = TrainState(
            step=state.step + 1,
            skipped=state.skipped + ~finite,
            skipped_in_row=jnp.where(finite, 0, state.skipped_in_row + 1),
            params=if_finite(params, state.params),
            constants=state.constants,
            opt_state=if_finite(opt_state, state.opt_state),
            ema=if_finite(ema, state.ema),
            power_emas=if_finite(power_emas, state.power_emas),
        )

        # --- What the log shows: averages are over updates that were made; the counts go on.
        measured = step_metrics(experiment.process).single_from_model_output(
            loss=loss,
            **terms,
            gradient_norm=norm,
            learning_rate=learning_rate(experiment.optimizer, num_updates),
            skipped=state.skipped.astype(jnp.float32),
            skipped_in_row=state.skipped_in_row.astype(jnp.float32),
        )
        merged = collected.merge(measured)
        return state, if_finite(merged, collected).replace(
            skipped=merged.skipped, skipped_in_row=merged.skipped_in_row
        )

    return train_step


def mean_loss(
    experiment: Experiment,
    params: Any,
    constants: Any,
    examples: Mapping[str, jax.Array],
    space_variables: Any,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss of some examples and its terms, float32 scalars.

    Args:
      experiment: model, process, space and label dropout. A model with classes learns to work
        without a label too, see `guidance.drop_labels`.
      params, constants: of the network.
      examples: of a `Source`, with `key` (n,), a key for each.
      space_variables: `experiment.space.variables`.
    """
    model = experiment.model
    # `split` gives what `fold_in` gives for 0 and 1: space and dropout have numbers of their own.
    space_key_B = jax.vmap(lambda key: jax.random.fold_in(key, 2))(examples["key"])
    x_BHWC, conditioning = experiment.space.enter(examples, space_key_B, space_variables)
    label_key_B, loss_key_B = jax.vmap(jax.random.split, out_axes=1)(examples["key"])
    if model.num_classes:
        dropout = experiment.training.label_dropout
        labels = {"label": examples["label"]}
        labels = guidance.drop_labels(labels, label_key_B, dropout, model.num_classes)
        conditioning = {**conditioning, **labels}
    if model.dropout:
        dropout_key_B = jax.vmap(lambda key: jax.random.fold_in(key, 3))(examples["key"])
        conditioning = {**conditioning, "dropout_key": dropout_key_B}
    network = models.as_network(model, {"params": params, "constants": constants})
    loss_B, terms = experiment.process.loss(network, x_BHWC, conditioning, loss_key_B)
    return jnp.mean(loss_B), jax.tree.map(jnp.mean, terms)


def accumulated(
    gradient_of: Callable[[dict[str, jax.Array]], Any], examples: dict[str, jax.Array], count: int
) -> Any:
    """`gradient_of(examples)` as the mean over `count` microbatches, one after the other.

    Args:
      gradient_of: examples → pytree that is a mean over them.
      examples: arrays whose leading axis `count` divides.
      count: how many.
    """
    if count == 1:
        return gradient_of(examples)
    # Every microbatch takes each count-th example, so that each device has its share of each.
    microbatches = jax.tree.map(
        lambda x: jnp.moveaxis(x.reshape(len(x) // count, count, *x.shape[1:]), 1, 0), examples
    )

    def add(total: Any, microbatch: dict[str, jax.Array]) -> tuple[Any, None]:
        new = gradient_of(microbatch)
        return jax.tree.map(lambda sum_, one: sum_ + one / count, total, new), None

    gradient_of = jax.jit(gradient_of, inline=True)  # traced once, for the shapes and the loop
    first = jax.tree.map(lambda x: x[0], microbatches)
    shapes = jax.eval_shape(gradient_of, first)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return jax.lax.scan(add, zeros, microbatches)[0]
