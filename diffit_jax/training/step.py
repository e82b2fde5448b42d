"""One update of the parameters."""

import functools
from collections.abc import Callable

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
from diffit_jax.training.state import TrainState

Batch = dict[str, jax.Array]


@functools.cache
def step_metrics(process: Process) -> type[metrics.Collection]:
    """What the log shows: means over the updates since the last report, kept on the device until then. One class for each process."""
    averages = {name: metrics.Average.from_output(name) for name in ("loss", *process.loss_parts, "gradient_norm")}
    return metrics.Collection.create(**averages, learning_rate=metrics.LastValue.from_output("learning_rate"))


def example_keys(seed: int, step: jax.Array, batch_size: int) -> jax.Array:
    """One key per example of a global batch, (batch_size,): a function of (seed, step, position in the batch) alone."""
    step_key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), step)
    return jax.vmap(lambda example: jax.random.fold_in(step_key, example))(jnp.arange(batch_size))


def make_train_step(
    experiment: Experiment,
) -> Callable[[TrainState, metrics.Collection, Batch], tuple[TrainState, metrics.Collection]]:
    """The update as a pure function, ready for `jit` (donate the state and the metrics).

    Returns:
      `step(state, metrics, batch) -> (state, metrics)`. The batch is that of a `Source`. A model with classes learns to work without a
      label too, see `guidance.drop_labels`.
    """
    model, process = experiment.model, experiment.process
    optimizer = make_optimizer(experiment.optimizer)
    label_dropout = experiment.training.label_dropout

    def train_step(state: TrainState, collected: metrics.Collection, batch: Batch) -> tuple[TrainState, metrics.Collection]:
        x_BHWC = batch["latent"] if "latent" in batch else pixels.to_model(batch["image"])
        batch_size = len(x_BHWC)
        label_key_B, loss_key_B = jax.vmap(jax.random.split, out_axes=1)(example_keys(experiment.seed, state.step, batch_size))
        conditioning = {}
        if model.num_classes:
            conditioning = guidance.drop_labels({"label": batch["label"]}, label_key_B, label_dropout, model.num_classes)

        def mean_loss(params):
            network = models.as_network(model, {"params": params, "constants": state.constants})
            loss_B, parts = process.loss(network, x_BHWC, conditioning, loss_key_B)
            return jnp.mean(loss_B), jax.tree.map(jnp.mean, parts)

        (loss, parts), gradient = jax.value_and_grad(mean_loss, has_aux=True)(state.params)
        update, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, update)
        ema = ema_update(state.ema, params, ema_rate(experiment.ema, state.step, batch_size))
        measured = step_metrics(process).single_from_model_output(
            loss=loss, **parts, gradient_norm=optax.tree.norm(gradient), learning_rate=learning_rate(experiment.optimizer, state.step)
        )
        return TrainState(state.step + 1, params, state.constants, opt_state, ema), collected.merge(measured)

    return train_step
