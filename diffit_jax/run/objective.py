"""The training objective, as one function.

The update calls it. The loss on held-out examples and the check of gradients use `DENOISING`, the
process's own loss.

Shape suffixes: B batch.
"""

from collections.abc import Mapping
from typing import Any

import jax

from diffit_jax import models
from diffit_jax.diffusion import guidance
from diffit_jax.experiment.config import Experiment

INNER = "inner"  # name of the loss of a model's inner head
AVERAGE = "average"  # name, in `uses`, of the network's variables with the averaged parameters


class Objective:
    """The process's own loss; others are made of it, or in its place.

    Attributes:
      uses: names of variables of the run that it is given as `frozen`: `AVERAGE`.
      frozen: further variables by name that training does not change, a teacher's or an
        autoencoder's.
    """

    uses: tuple[str, ...] = ()
    frozen: Mapping[str, Any] = {}

    def terms(self, experiment: Experiment) -> tuple[str, ...]:
        """Return the names of what it reports besides the loss, in training."""
        inner = (INNER,) if experiment.model.has_inner_head else ()
        return (*experiment.process.loss_terms, *inner)

    def init(self, experiment: Experiment, key: jax.Array) -> Any:
        """Initialise parameters of its own (a projection head); {} if it has none.

        Called inside jit. They are trained and saved with the network's but neither averaged nor
        exported.
        """
        return {}

    def __call__(
        self,
        experiment: Experiment,
        variables: Mapping[str, Any],
        frozen: Mapping[str, Any],
        examples: Mapping[str, jax.Array],
        *,
        key_B: jax.Array,
        update: jax.Array,
        training: bool,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Compute the loss of some examples.

        Args:
          experiment: model, process, space and label dropout. A model with classes learns to work
            without a label too, see `guidance.drop_labels`.
          variables: `params` and `constants` of the network, and in training `objective`: the
            result of `init`.
          frozen: variables by name, of which no gradient is taken.
          examples: of a `Source`.
          key_B: (B,) a key for each example.
          update: number of the update, from 0; an int32 scalar.
          training: whether to augment examples, drop labels, and apply dropout in the network.

        Returns:
          (B,) float32 loss, and its `terms`, (B,) each.
        """
        model = experiment.model
        space = experiment.space if training else experiment.space.without_augmentation()
        label_key_B, loss_key_B = jax.vmap(jax.random.split, out_axes=1)(key_B)
        # `split` gives what `fold_in` gives for 0 and 1: space and dropout have numbers of their
        # own.
        space_key_B = _numbered(key_B, 2) if training else label_key_B
        x_BHWC, conditioning = space.to_model(examples, space_key_B, frozen)
        if model.num_classes:
            labels = {"label": examples["label"]}
            if training:
                rate = experiment.training.label_dropout
                labels = guidance.drop_labels(labels, label_key_B, rate, model.num_classes)
            conditioning = {**conditioning, **labels}
        if model.dropout and training:
            conditioning = {**conditioning, "dropout_key": _numbered(key_B, 3)}
        process = experiment.process
        with_inner = training and model.has_inner_head
        network = models.as_network(model, variables, inner=with_inner)
        # `Process.loss`, spelled out for those who write another one.
        noised = process.noise(x_BHWC, loss_key_B)
        y_BHWC = network(noised.x_BHWC, noised.level_B, conditioning)
        if not with_inner:
            return process.loss_of(noised, y_BHWC)
        (loss_B, terms), (inner_B, _) = (process.loss_of(noised, each) for each in y_BHWC)
        return loss_B + experiment.training.inner_weight * inner_B, {**terms, INNER: inner_B}


DENOISING = Objective()


def _numbered(key_B: jax.Array, number: int) -> jax.Array:
    return jax.vmap(lambda key: jax.random.fold_in(key, number))(key_B)
