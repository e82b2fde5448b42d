"""The training objective, as one function.

The update and the check of gradients call it. The loss on held-out examples is `DENOISING`, the
process's own loss; of a flow map that is the flow's.

Shape suffixes: B batch.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from diffit_jax import models
from diffit_jax.diffusion import guidance
from diffit_jax.diffusion.flow_map import Evaluations, FlowMap
from diffit_jax.experiment.config import Experiment
from diffit_jax.models.model import training_flops
from diffit_jax.models.placement import divisible

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
        return (*self.process_terms(experiment.process), *inner)

    def process_terms(self, process: Any) -> tuple[str, ...]:
        """Return those of the terms that are the process's."""
        return process.loss_terms

    def passes(self, experiment: Experiment) -> float:
        """Return how many forward passes an example costs; the backward pass is two."""
        return 3

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
        model, process = experiment.model, experiment.process
        inputs = inputs_of(experiment, examples, key_B, frozen, training)
        with_inner = training and model.has_inner_head
        network = models.as_network(model, variables, inner=with_inner)
        # `Process.loss`, spelled out for those who write another one.
        noised = process.noise(inputs.x_BHWC, inputs.key_B)
        y_BHWC = network(noised.x_BHWC, noised.level_B, inputs.conditioning)
        if not with_inner:
            return process.loss_of(noised, y_BHWC)
        (loss_B, terms), (inner_B, _) = (process.loss_of(noised, each) for each in y_BHWC)
        return _with_inner(experiment, loss_B, terms, inner_B)


def _with_inner(
    experiment: Experiment, loss_B: jax.Array, terms: Mapping[str, Any], inner_B: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Add the loss of the inner head."""
    return loss_B + experiment.training.inner_weight * inner_B, {**terms, INNER: inner_B}


class MapObjective(Objective):
    """The loss of a flow map (`diffusion.flow_map`), of the process `flow_map`.

    Its derivative is taken of the first examples of a batch alone. They are the first ones of its
    parts too (`training.accumulation`), which take every n-th example.
    """

    def passes(self, experiment: Experiment) -> float:
        """Return 3, and those for guidance and for the derivative: two for each r < t."""
        process: Any = experiment.process
        return 3 + process.velocities + 2 * process.share

    def process_terms(self, process: Any) -> tuple[str, ...]:
        """Return the errors of flow and map."""
        return process.map_terms

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
        """Compute the loss of some examples; arguments as of `Objective`."""
        model, process = experiment.model, experiment.process
        assert isinstance(process, FlowMap)
        inputs = inputs_of(experiment, examples, key_B, frozen, training)
        fixed = jax.lax.stop_gradient(variables)
        networks = Evaluations(
            trained=models.as_network(model, variables, inner=True),
            steady=models.as_network(model, fixed, inner=True),
            forward=models.as_network(model, fixed, forward_mode=True),
        )
        count = len(key_B)
        mapped = round(process.share * count)
        loss_B, inner_B, terms = process.loss_between(
            networks,
            process.span(inputs.x_BHWC, inputs.key_B, mapped),
            {**inputs.conditioning, **inputs.labels},
            rows=min(divisible(mapped), count),  # those beyond have r = t, and no use for it
            update=update,
            null_label=model.num_classes or None,
            dropped_B=inputs.dropped_B,
        )
        if inner_B is None:
            return loss_B, terms
        return _with_inner(experiment, loss_B, terms, inner_B)


DENOISING = Objective()
_OF_MAPS = MapObjective()


def objective_of(experiment: Experiment) -> Objective:
    """Return what an experiment trains: the loss of its process, or of a flow map."""
    return _OF_MAPS if isinstance(experiment.process, FlowMap) else DENOISING


def flops_per_image(experiment: Experiment) -> float:
    """Return the FLOPs of matrix products for an image of an update, without recomputation."""
    return training_flops(experiment.model) / 3 * objective_of(experiment).passes(experiment)


class Inputs(NamedTuple):
    """What the loss of some examples is computed of.

    Attributes:
      x_BHWC: examples as the model sees them, float32.
      conditioning: of them, with labels that may be dropped.
      labels: `label`, as the data have it; {} without classes.
      dropped_B: which labels were dropped; None: none can be.
      key_B: (B,) keys for noise.
    """

    x_BHWC: jax.Array
    conditioning: Mapping[str, jax.Array]
    labels: Mapping[str, jax.Array]
    dropped_B: jax.Array | None
    key_B: jax.Array


def inputs_of(
    experiment: Experiment,
    examples: Mapping[str, jax.Array],
    key_B: jax.Array,
    frozen: Mapping[str, Any],
    training: bool,
) -> Inputs:
    """Prepare examples, (B, …) each, for the model; arguments as of `Objective`."""
    model = experiment.model
    space = experiment.space if training else experiment.space.without_augmentation()
    label_key_B, loss_key_B = jax.vmap(jax.random.split, out_axes=1)(key_B)
    # `split` gives what `fold_in` gives for 0 and 1: space and dropout have numbers of their own.
    space_key_B = _numbered(key_B, 2) if training else label_key_B
    x_BHWC, conditioning = space.to_model(examples, space_key_B, frozen)
    labels, dropped_B = {}, None
    if model.num_classes:
        labels = kept = {"label": examples["label"]}
        if training:
            rate = experiment.training.label_dropout
            kept = guidance.drop_labels(labels, label_key_B, rate, model.num_classes)
            dropped_B = kept["label"] != labels["label"]
        conditioning = {**conditioning, **kept}
    if model.dropout and training:
        conditioning = {**conditioning, "dropout_key": _numbered(key_B, 3)}
    return Inputs(x_BHWC, conditioning, labels, dropped_B, loss_key_B)


def _numbered(key_B: jax.Array, number: int) -> jax.Array:
    return jax.vmap(lambda key: jax.random.fold_in(key, number))(key_B)
