"""One update of the parameters and their averages, and how it is compiled for a mesh."""

import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from clu import metrics
from jax.sharding import Mesh

from diffit_jax import platforms
from diffit_jax.experiment.config import Experiment
from diffit_jax.experiment.sections import EMA
from diffit_jax.run.objective import AVERAGE, Objective, objective_of
from diffit_jax.run.optimizer import learning_rate, make_optimizer
from diffit_jax.run.power_ema import gamma_of, power_rate
from diffit_jax.run.representation import arrays_beside
from diffit_jax.run.state import Setup, TrainState
from diffit_jax.runtime import distributed, parallel

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


def step_metrics(
    experiment: Experiment, objective: Objective | None = None
) -> type[metrics.Collection]:
    """Return the class of metrics of an experiment and objective (clu).

    Means over the updates since the last report (of learning rate and counts the last value), kept
    on the device until then.
    """
    return _metrics_of((objective or objective_of(experiment)).terms(experiment))


def example_keys(seed: int, step: jax.Array, batch_size: int) -> jax.Array:
    """Return one key per example of a global batch, (batch_size,).

    A function of (seed, step, position in the batch) alone.
    """
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
            objective_of(experiment)(
                experiment, variables, {}, examples, key_B=keys, update=state.step, training=False
            )[0]
        )

    return optax.tree.norm(jax.grad(loss)(state.params))


def gradient_is_finite(experiment: Experiment, state: TrainState) -> bool:
    """Return whether the loss has a finite gradient on synthetic examples.

    It distinguishes a network that diverged from bad data.
    """
    return bool(jnp.isfinite(_gradient_norm(experiment, state)))


def make_train_step(
    experiment: Experiment, objective: Objective | None = None, *, in_place: bool = False
) -> Callable[[TrainState, metrics.Collection, Batch, Any], tuple[TrainState, metrics.Collection]]:
    """Return the update as a pure function, ready for `jit` (donate the state and the metrics).

    Args:
      experiment: what to train.
      objective: the loss; None: see `objective_of`.
      in_place: whether an update without a finite gradient is left out by a branch, not by a
        choice between the old and the new number of everything.

    Returns:
      `step(state, metrics, batch, frozen) -> (state, metrics)`. The batch is that of a `Source`,
      the last argument the variables that training does not change, see `Objective`.
    """
    objective = objective_of(experiment) if objective is None else objective

    def train_step(
        state: TrainState, collected: metrics.Collection, batch: Batch, frozen: Mapping[str, Any]
    ) -> tuple[TrainState, metrics.Collection]:
        # --- The gradient.
        training, batch_size = experiment.training, len(batch["label"])
        num_updates = state.step - state.skipped
        examples = {**batch, "key": example_keys(experiment.seed, state.step, batch_size)}
        if AVERAGE in objective.uses:
            frozen = {**frozen, AVERAGE: state.ema_variables}
        trained = {"params": state.params}
        if state.objective:
            trained |= {"objective": state.objective["params"]}

        def loss_of(trained: Mapping[str, Any], part: dict[str, jax.Array]) -> Any:
            variables = {"constants": state.constants, **trained}
            return mean_loss(experiment, objective, variables, frozen, part, update=num_updates)

        gradient_of = functools.partial(jax.value_and_grad(loss_of, has_aux=True), trained)
        (loss, terms), gradient = accumulated(gradient_of, examples, training.accumulation)
        if experiment.optimizer.replace_nonfinite:
            to_number = functools.partial(jnp.nan_to_num, nan=0.0, posinf=1e5, neginf=-1e5)
            gradient = jax.tree.map(to_number, gradient)
        norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)

        # --- Without a finite gradient the data move on, and everything else stands still.
        def if_finite(new: Any, old: Any) -> Any:
            return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)

        def update(old: TrainState) -> TrainState:
            return updated(experiment, old, gradient, batch_size)

        if in_place:
            new = jax.lax.cond(finite, update, lambda old: old, state)
        else:
            new = if_finite(update(state), state)
        state = new.replace(
            step=state.step + 1,
            skipped=state.skipped + ~finite,
            consecutive_skipped=jnp.where(finite, 0, state.consecutive_skipped + 1),
            constants=state.constants,
        )

        # --- What the log shows: averages are over updates that were made; counts are of the last.
        counts = {"skipped": state.skipped, "skipped_in_row": state.consecutive_skipped}
        measured = step_metrics(experiment, objective).single_from_model_output(
            loss=loss,
            **terms,
            gradient_norm=norm,
            learning_rate=learning_rate(experiment.optimizer, num_updates),
            **{name: count.astype(jnp.float32) for name, count in counts.items()},
        )
        merged = collected.merge(measured)
        latest = {name: getattr(merged, name) for name in counts}
        return state, if_finite(merged, collected).replace(**latest)

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
    """Compute the mean loss of some examples and its terms, float32 scalars.

    Arguments as of `Objective`, the examples with `key` (n,), a key for each.
    """
    examples = dict(examples)
    key_B = examples.pop("key")
    loss_B, terms = objective(
        experiment, variables, frozen, examples, key_B=key_B, update=update, training=True
    )
    return jnp.mean(loss_B), jax.tree.map(jnp.mean, terms)


def updated(
    experiment: Experiment, state: TrainState, gradient: Mapping[str, Any], batch_size: int
) -> TrainState:
    """Return the state with its parameters changed by a gradient, and every average of them.

    The gradient has `params` and perhaps `objective`.
    """
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
    """Return `gradient_of(examples)` as the mean over `count` microbatches of (B, …) arrays.

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


def ema_rate(settings: EMA, update: jax.Array, batch_size: int) -> jax.Array:
    """Return 1 - beta of an update by its number (from 0), exactly 1 in the first update.

    A float32 scalar in (0, 1]. beta = 0.5^(1 / h) with the half-life in updates h =
    min(halflife_images / batch_size, update · rampup_ratio). Updates are counted, not images, which
    would leave the range of int32 and float32; `expm1` keeps 1 - beta exact where beta is nearly 1.
    """
    halflife = jnp.minimum(settings.halflife_images / batch_size, update * settings.rampup_ratio)
    return -jnp.expm1(-jnp.log(2.0) / jnp.maximum(halflife, 1e-8))


def ema_update(average: Any, params: Any, rate: jax.Array) -> Any:
    """Return average + rate (params - average), of float32 pytrees that are like each other."""
    return jax.tree.map(lambda mean, new: mean + rate * (new - mean), average, params)


def compile_train_step(
    setup: Setup, state: TrainState, batch: Batch
) -> tuple[jax.stages.Compiled, metrics.Collection, float]:
    """Compile the update for a mesh: (step, empty metrics to start with, seconds it took).

    The step takes over the memory of its state and metrics ("donation"), where the platform's entry
    says so.
    """
    started = time.monotonic()
    lowered = lower_train_step(setup, state, batch)
    distributed.check_agreement({"program": lowered.as_text})
    empty = step_metrics(setup.experiment, setup.objective).empty()
    collected = jax.device_put(empty, parallel.replicated(setup.mesh))
    step, seconds = lowered.compile(), time.monotonic() - started
    distributed.barrier()  # see `distributed.call_after_barrier`
    return step, collected, seconds


def lower_train_step(setup: Setup, state: TrainState, batch: Batch) -> jax.stages.Lowered:
    """Lower the update of `make_train_step` for a mesh.

    State and batch may be shapes with shardings.
    """
    experiment, mesh, objective = setup.experiment, setup.mesh, setup.objective
    empty = step_metrics(experiment, objective).empty
    collected = parallel.abstract(mesh, jax.eval_shape(empty))
    platform, parameters = platforms.of_mesh(mesh), jax.tree.leaves(setup.state.params)
    large = sum(leaf.size for leaf in parameters) >= platform.donates_from
    donated = (0, 1) if large else ()
    laid = jax.tree.map(lambda leaf: leaf.sharding, setup.state)
    shardings = laid, parallel.replicated(mesh)
    step = make_train_step(experiment, objective, in_place=large and platform.skips_by_branch)
    jitted = jax.jit(step, donate_argnums=donated, out_shardings=shardings)
    with parallel.placement(mesh):
        return jitted.lower(state, collected, batch, objective.abstract(experiment, mesh))


def batch_shapes(experiment: Experiment, mesh: Mesh) -> Batch:
    """Return the shapes of a batch, with their shardings, for any data set."""
    sharding, size = parallel.batch_sharding(mesh), experiment.training.batch_size
    shapes = experiment.space.batch(size, experiment.model.sample_shape)
    for name, spec in arrays_beside(experiment).items():
        shapes[name] = jax.ShapeDtypeStruct((size, *spec.shape), spec.dtype)
    return {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        for name, leaf in shapes.items()
    }
