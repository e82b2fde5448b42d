"""One update of the parameters."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from clu import metrics

from diffit_jax.diffusion.seams import Process
from diffit_jax.experiment import Experiment
from diffit_jax.training.ema import ema_rate, ema_update
from diffit_jax.training.objective import AVERAGE, DENOISING, Objective
from diffit_jax.training.optimizer import learning_rate, make_optimizer
from diffit_jax.training.power_ema import gamma_of, power_rate
from diffit_jax.training.state import TrainState

Batch = dict[str, Any]  # of global arrays, or their shapes


@functools.cache
def _metrics_of(terms: tuple[str, ...]) -> type[metrics.Collection]:
    averages = {
        name: metrics.Average.from_output(name) for name in ("loss", *terms, "gradient_norm")
    }
    last = {
        name: metrics.LastValue.from_output(name)
        for name in ("learning_rate", "skipped", "skipped_in_row")
    }
    return metrics.Collection.create(**averages, **last)


def step_metrics(process: Process, objective: Objective = DENOISING) -> type[metrics.Collection]:
    """A class of metrics for each process and objective, as clu has it: means over the updates
    since the last report, kept on the device until then."""
    return _metrics_of(objective.terms(process))


def example_keys(seed: int, step: jax.Array, batch_size: int) -> jax.Array:
    """One key per example of a global batch, (batch_size,): a function of (seed, step, position in
    the batch) alone."""
    step_key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), step)
    return jax.vmap(lambda example: jax.random.fold_in(step_key, example))(jnp.arange(batch_size))


@functools.partial(jax.jit, static_argnums=0)
def _gradient_norm(experiment: Experiment, state: TrainState) -> jax.Array:
    keys = example_keys(experiment.seed, state.step, 8)

    def random(shape: jax.ShapeDtypeStruct) -> jax.Array:
        if shape.dtype == jnp.uint8:
            return jax.random.bits(keys[0], shape.shape, jnp.uint8)
        if shape.dtype == jnp.int32:  # labels
            return jnp.zeros(shape.shape, jnp.int32)
        return jax.random.normal(keys[0], shape.shape, shape.dtype)

    examples = jax.tree.map(random, experiment.space.batch(8, experiment.model.sample_shape))

    def loss(params: Any) -> jax.Array:
        variables = {"params": params, "constants": state.constants}
        return jnp.mean(
            DENOISING(
                experiment, variables, {}, examples, key_B=keys, update=state.step, training=False
            )[0]
        )

    return optax.tree.norm(jax.grad(loss)(state.params))


def gradient_is_finite(experiment: Experiment, state: TrainState) -> bool:
    """Whether the parameters give a finite gradient of the process's loss on examples without
    fault: what tells a network that blew up from bad data."""
    return bool(jnp.isfinite(_gradient_norm(experiment, state)))


def make_train_step(
    experiment: Experiment, objective: Objective = DENOISING
) -> Callable[[TrainState, metrics.Collection, Batch, Any], tuple[TrainState, metrics.Collection]]:
    """The update as a pure function, ready for `jit` (donate the state and the metrics).

    Returns:
      `step(state, metrics, batch, frozen) -> (state, metrics)`. The batch is that of a `Source`,
      the last argument the variables that training does not change, see `Objective`.
    """

    def train_step(
        state: TrainState, collected: metrics.Collection, batch: Batch, frozen: Mapping[str, Any]
    ) -> tuple[TrainState, metrics.Collection]:
        # --- The gradient.
        batch_size, num_updates = len(batch["label"]), state.step - state.skipped
        examples = {**batch, "key": example_keys(experiment.seed, state.step, batch_size)}
        if AVERAGE in objective.uses:
            frozen = {**frozen, AVERAGE: state.ema_variables}
        trained = {"params": state.params}
        if state.objective:
            trained["objective"] = state.objective["params"]

        def loss_of(trained: Mapping[str, Any], part: dict[str, jax.Array]) -> Any:
            variables = {"constants": state.constants, **trained}
            return mean_loss(experiment, objective, variables, frozen, part, update=num_updates)

        gradient_of = jax.value_and_grad(loss_of, has_aux=True)
        (loss, terms), gradient = accumulated(
            lambda part: gradient_of(trained, part), examples, experiment.training.accumulation
        )
        if experiment.optimizer.replace_nonfinite:
            gradient = jax.tree.map(
                lambda g: jnp.nan_to_num(g, nan=0.0, posinf=1e5, neginf=-1e5), gradient
            )
        norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)

        # --- Without a finite gradient the data move on, and everything else stands still.
        def if_finite(new: Any, old: Any) -> Any:
            return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)

        state = if_finite(updated(experiment, state, gradient, batch_size), state).replace(
            step=state.step + 1,
            skipped=state.skipped + ~finite,
            skipped_in_row=jnp.where(finite, 0, state.skipped_in_row + 1),
            constants=state.constants,
        )

        # --- What the log shows: averages are over updates that were made; the counts go on.
        measured = step_metrics(experiment.process, objective).single_from_model_output(
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
    objective: Objective,
    variables: Mapping[str, Any],
    frozen: Mapping[str, Any],
    examples: Mapping[str, jax.Array],
    *,
    update: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss of some examples and its terms, float32 scalars; arguments as of `Objective`, the
    examples with `key` (n,), a key for each."""
    examples = dict(examples)
    key_B = examples.pop("key")
    loss_B, terms = objective(
        experiment, variables, frozen, examples, key_B=key_B, update=update, training=True
    )
    return jnp.mean(loss_B), jax.tree.map(jnp.mean, terms)


def updated(
    experiment: Experiment, state: TrainState, gradient: Mapping[str, Any], batch_size: int
) -> TrainState:
    """The state with its parameters changed by a gradient, `params` and perhaps `objective`, and
    with every average of them."""
    num_updates = state.step - state.skipped
    optimizer = make_optimizer(experiment.optimizer, experiment.model)
    change, opt_state = optimizer.update(gradient["params"], state.opt_state, state.params)
    params, ours = optax.apply_updates(state.params, change), state.objective
    if ours:
        change, moments = optimizer.update(gradient["objective"], ours["opt_state"], ours["params"])
        ours = {"params": optax.apply_updates(ours["params"], change), "opt_state": moments}
    gammas = [gamma_of(length) for length in experiment.ema.power_lengths]
    return state.replace(
        params=params,
        opt_state=opt_state,
        ema=ema_update(state.ema, params, ema_rate(experiment.ema, num_updates, batch_size)),
        power_emas=tuple(
            ema_update(one, params, power_rate(gamma, num_updates))
            for one, gamma in zip(state.power_emas, gammas, strict=True)
        ),
        objective=ours,
    )


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
