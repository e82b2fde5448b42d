"""One update of the parameters."""

from collections.abc import Callable

import flax
import jax
import jax.numpy as jnp
import optax
from clu import metrics

from diffit_jax import models
from diffit_jax.data import pixels
from diffit_jax.diffusion import guidance
from diffit_jax.experiment import Experiment
from diffit_jax.training.ema import ema_rate, ema_update
from diffit_jax.training.optimizer import learning_rate, make_optimizer
from diffit_jax.training.state import TrainState

Batch = dict[str, jax.Array]


@flax.struct.dataclass
class StepMetrics(metrics.Collection):
    """What the log shows: means over the updates since the last report. Kept on the device until then."""

    loss: metrics.Average.from_output("loss")
    gradient_norm: metrics.Average.from_output("gradient_norm")
    learning_rate: metrics.LastValue.from_output("learning_rate")


def example_keys(seed: int, step: jax.Array, batch_size: int) -> jax.Array:
    """One key per example of a global batch, (batch_size,): a function of (seed, step, position in the batch) alone."""
    step_key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), step)
    return jax.vmap(lambda example: jax.random.fold_in(step_key, example))(jnp.arange(batch_size))


def make_train_step(experiment: Experiment) -> Callable[[TrainState, StepMetrics, Batch], tuple[TrainState, StepMetrics]]:
    """The update as a pure function, ready for `jit` (donate the state and the metrics).

    Returns:
      `step(state, metrics, batch) -> (state, metrics)`. The batch holds `image` (B, H, W, C) uint8 and `label` (B,) int32. A model with
      classes learns to work without a label too, see `guidance.drop_labels`.
    """
    model, process = experiment.model, experiment.process
    optimizer = make_optimizer(experiment.optimizer)
    label_dropout = experiment.training.label_dropout

    def train_step(state: TrainState, collected: StepMetrics, batch: Batch) -> tuple[TrainState, StepMetrics]:
        x_BHWC = pixels.to_model(batch["image"])
        batch_size = len(x_BHWC)
        label_key_B, loss_key_B = jax.vmap(jax.random.split, out_axes=1)(example_keys(experiment.seed, state.step, batch_size))
        conditioning = {}
        if model.num_classes:
            conditioning = guidance.drop_labels({"label": batch["label"]}, label_key_B, label_dropout, model.num_classes)

        def mean_loss(params):
            loss_B, _ = process.loss(models.as_network(model, params), x_BHWC, conditioning, loss_key_B)
            return jnp.mean(loss_B)

        loss, gradient = jax.value_and_grad(mean_loss)(state.params)
        update, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, update)
        ema = ema_update(state.ema, params, ema_rate(experiment.ema, state.step, batch_size))
        measured = StepMetrics.single_from_model_output(
            loss=loss, gradient_norm=optax.tree.norm(gradient), learning_rate=learning_rate(experiment.optimizer, state.step)
        )
        return TrainState(state.step + 1, params, opt_state, ema), collected.merge(measured)

    return train_step
