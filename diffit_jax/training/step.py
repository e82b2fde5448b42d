"""One update of the parameters."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from clu import metrics

from diffit_jax import models
from diffit_jax.data import pixels
from diffit_jax.diffusion import guidance
from diffit_jax.experiment import Experiment, Process
from diffit_jax.training.ema import ema_rate, ema_update
from diffit_jax.training.optimizer import learning_rate, make_optimizer
from diffit_jax.training.power_ema import gamma_of, power_rate
from diffit_jax.training.state import TrainState

Batch = dict[str, jax.Array]


@functools.cache
def step_metrics(process: Process) -> type[metrics.Collection]:
    """What the log shows: means over the updates since the last report, kept on the device until
    then. One class for each process."""
    averages = {
        name: metrics.Average.from_output(name)
        for name in ("loss", *process.loss_parts, "gradient_norm")
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
) -> Callable[[TrainState, metrics.Collection, Batch], tuple[TrainState, metrics.Collection]]:
    """The update as a pure function, ready for `jit` (donate the state and the metrics).

    Returns:
      `step(state, metrics, batch) -> (state, metrics)`. The batch is that of a `Source`. A model
      with classes learns to work without a label too, see `guidance.drop_labels`.
    """
    model, process, settings = experiment.model, experiment.process, experiment.training
    optimizer = make_optimizer(experiment.optimizer, model.stacked)
    gammas = [gamma_of(length) for length in experiment.ema.power_lengths]

    def mean_loss(
        params: Any, constants: Any, examples: dict[str, jax.Array]
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        x_BHWC = examples["latent"] if "latent" in examples else pixels.to_model(examples["image"])
        label_key_B, loss_key_B = jax.vmap(jax.random.split, out_axes=1)(examples["key"])
        conditioning = {}
        if model.num_classes:
            conditioning = guidance.drop_labels(
                {"label": examples["label"]}, label_key_B, settings.label_dropout, model.num_classes
            )
        network = models.as_network(model, {"params": params, "constants": constants})
        loss_B, parts = process.loss(network, x_BHWC, conditioning, loss_key_B)
        return jnp.mean(loss_B), jax.tree.map(jnp.mean, parts)

    def gradient_of_batch(
        state: TrainState, examples: dict[str, jax.Array]
    ) -> tuple[tuple[jax.Array, dict[str, jax.Array]], Any]:
        gradient_of = jax.value_and_grad(mean_loss, has_aux=True)
        count = settings.accumulation
        if count == 1:
            return gradient_of(state.params, state.constants, examples)
        # Every part takes each count-th example, so that each device has its share of each part.
        parts = jax.tree.map(
            lambda x: jnp.moveaxis(x.reshape(len(x) // count, count, *x.shape[1:]), 1, 0), examples
        )

        def add(total: Any, part: dict[str, jax.Array]) -> tuple[Any, None]:
            return jax.tree.map(
                lambda sum_, new: sum_ + new / count,
                total,
                gradient_of(state.params, state.constants, part),
            ), None

        first = jax.tree.map(lambda x: x[0], parts)
        shapes = jax.eval_shape(gradient_of, state.params, state.constants, first)
        return jax.lax.scan(
            add, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes), parts
        )[0]

    def train_step(
        state: TrainState, collected: metrics.Collection, batch: Batch
    ) -> tuple[TrainState, metrics.Collection]:
        batch_size = len(batch["label"])
        examples = {**batch, "key": example_keys(experiment.seed, state.step, batch_size)}
        (loss, parts), gradient = gradient_of_batch(state, examples)
        norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)

        made = state.step - state.skipped  # updates
        update, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, update)
        ema = ema_update(state.ema, params, ema_rate(experiment.ema, made, batch_size))
        power_emas = tuple(
            ema_update(one, params, power_rate(gamma, made))
            for one, gamma in zip(state.power_emas, gammas, strict=True)
        )

        # Without a finite gradient the data move on, and everything else stands still.
        def keep(new: Any, old: Any) -> Any:
            return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)

        state = TrainState(
            step=state.step + 1,
            skipped=state.skipped + ~finite,
            skipped_in_row=jnp.where(finite, 0, state.skipped_in_row + 1),
            params=keep(params, state.params),
            constants=state.constants,
            opt_state=keep(opt_state, state.opt_state),
            ema=keep(ema, state.ema),
            power_emas=keep(power_emas, state.power_emas),
        )
        measured = step_metrics(process).single_from_model_output(
            loss=loss,
            **parts,
            gradient_norm=norm,
            learning_rate=learning_rate(experiment.optimizer, made),
            skipped=state.skipped.astype(jnp.float32),
            skipped_in_row=state.skipped_in_row.astype(jnp.float32),
        )
        merged = collected.merge(measured)
        # Averages are over updates that were made; the counts go on.
        return state, keep(merged, collected).replace(
            skipped=merged.skipped, skipped_in_row=merged.skipped_in_row
        )

    return train_step
