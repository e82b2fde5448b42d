"""The training objective, as one function.

The update and the check of gradients call it. The loss on held-out examples is `DENOISING`, the
process's own loss; of a flow map that is the flow's.

Shape suffixes: B batch.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from diffit_jax import models
from diffit_jax.diffusion import guidance
from diffit_jax.diffusion.flow import Flow
from diffit_jax.diffusion.flow_map import Evaluations, FlowMap
from diffit_jax.diffusion.types import Noised
from diffit_jax.experiment.config import Experiment
from diffit_jax.experiment.representation import (
    REG,
    REPA,
    SRA,
    Dispersive,
    Plain,
    SelfAligned,
    SelfFlow,
)
from diffit_jax.models.model import CLASS, IMAGE, training_flops
from diffit_jax.models.placement import divisible
from diffit_jax.run import representation

INNER = "inner"  # name of the loss of a model's inner head
CLASS_LOSS = "class_token"  # name of the loss of a class token's velocity, in REG
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

    def passes(self, experiment: Experiment, update: int = 0) -> float:
        """Return how many forward passes an example costs; the backward pass is two."""
        return 3

    def further_flops(self, experiment: Experiment, update: int = 0) -> float:
        """Return the FLOPs of matrix products for an example beside those passes."""
        return 0.0

    def abstract(self, experiment: Experiment, mesh: Mesh) -> Mapping[str, Any]:
        """Return `frozen` as arrays, or shapes with shardings, to compile with; read nothing."""
        return self.frozen

    def load(self, experiment: Experiment, mesh: Mesh) -> Mapping[str, Any]:
        """Return `frozen` on the devices. Raises `UserError` for files that cannot be read."""
        return self.frozen

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
        inputs = inputs_of(experiment, examples, key_B, frozen, training=training)
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

    def passes(self, experiment: Experiment, update: int = 0) -> float:
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
        inputs = inputs_of(experiment, examples, key_B, frozen, training=training)
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


class RepresentationObjective(Objective):
    """The process's loss, and one on tokens of the network: section `representation`.

    Outside of training it is the process's loss alone.
    """

    uses = (AVERAGE,)  # a teacher that so takes no memory of its own

    def terms(self, experiment: Experiment) -> tuple[str, ...]:
        """Return the names of what it reports: also the loss on tokens, before its weight."""
        settings = experiment.representation
        own = ("alignment",) if isinstance(settings, REPA | SelfAligned) else ("dispersion",)
        of_class = (CLASS_LOSS,) if isinstance(settings, REG) else ()
        return (*super().terms(experiment), *own, *of_class)

    def passes(self, experiment: Experiment, update: int = 0) -> float:
        """Return 3, and the average's up to its block, until the loss on tokens ends."""
        targets = experiment.representation.needs_targets(update)
        return 3 + (representation.teacher_share(experiment) if targets else 0.0)

    def further_flops(self, experiment: Experiment, update: int = 0) -> float:
        """Return those of the projector, and of the encoder until the loss on tokens ends."""
        targets = experiment.representation.needs_targets(update)
        return representation.further_flops(experiment, targets)

    def abstract(self, experiment: Experiment, mesh: Mesh) -> Mapping[str, Any]:
        """Return the encoder's shapes, if its tokens are made in the step."""
        settings = experiment.representation
        if not (isinstance(settings, REPA) and settings.source == "image"):
            return {}
        return {representation.ENCODER: representation.abstract_encoder(settings, mesh)}

    def load(self, experiment: Experiment, mesh: Mesh) -> Mapping[str, Any]:
        """Read the encoder, if its tokens are made in the step."""
        settings = experiment.representation
        if not (isinstance(settings, REPA) and settings.source == "image"):
            return {}
        return {representation.ENCODER: representation.load_encoder(settings, mesh)}

    def init(self, experiment: Experiment, key: jax.Array) -> Any:
        """Initialise the projector."""
        return representation.init_projector(experiment, key)

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
        arguments: dict[str, Any] = dict(key_B=key_B, update=update, training=training)
        if not training:
            return super().__call__(experiment, variables, frozen, examples, **arguments)
        model, process, settings = experiment.model, experiment.process, experiment.representation
        assert not isinstance(settings, Plain)
        inputs = inputs_of(experiment, examples, key_B, frozen, training=training)
        noised = process.noise(inputs.x_BHWC, inputs.key_B)
        mixed = None
        if isinstance(settings, SelfFlow):
            keys = (_numbered(inputs.own_key_B, number) for number in (6, 7))
            mixed = representation.mixed(experiment, inputs.x_BHWC, noised, *keys)
        goes_on = jnp.bool_(True) if not settings.stop_step else update < settings.stop_step

        # --- What its tokens are compared with: zeros, not computed, when that has ended.
        target: Any = None
        of_class = None
        if isinstance(settings, SelfAligned):
            earlier_B = mixed.earlier_B if mixed else _a_little_earlier(experiment, inputs, noised)
            compute = self._teacher(experiment, frozen, inputs, noised, earlier_B)
            target = _unless_ended(goes_on, settings, compute)
        elif isinstance(settings, REG):  # whose class token goes on
            target = jax.lax.stop_gradient(self._encoder(experiment, frozen, examples, inputs)())
            of_class = _noisy_class(experiment, target[:, :1, None], inputs, noised)
            patches = representation.spatially_normalised(target[:, 1:], settings.spatial_norm)
            target = jnp.concatenate([target[:, :1], patches], axis=1)
        elif isinstance(settings, REPA):
            compute = self._encoder(experiment, frozen, examples, inputs)
            target = _unless_ended(goes_on, settings, compute)[:, 1:]
            target = representation.spatially_normalised(target, settings.spatial_norm)

        # --- The network once, with its tokens.
        with_inner = model.has_inner_head
        network = models.as_network(model, variables, capture=settings.depth - 1, inner=with_inner)
        seen: Any = noised.x_BHWC
        level_B, conditioning = noised.level_B, inputs.conditioning
        loss_of = functools.partial(process.loss_of, noised)
        if of_class is not None:
            seen = {IMAGE: noised.x_BHWC, CLASS: of_class.x_BHWC}
        elif mixed is not None:
            seen, level_B = mixed.x_BHWC, mixed.first.level_B
            conditioning = {**conditioning, **mixed.told}
            loss_of = functools.partial(mixed.loss_of, process)
        y, *inner, tokens = network(seen, level_B, conditioning)
        loss_B, terms = loss_of(y if of_class is None else y[IMAGE])
        if inner:
            loss_B, terms = _with_inner(experiment, loss_B, terms, loss_of(inner[0])[0])

        # --- The loss on them.
        tokens_BLC = representation.flat(tokens)
        if isinstance(settings, Dispersive):
            name, group = "dispersion", settings.group or len(tokens_BLC)
            own_B = representation.dispersive(tokens_BLC, settings.temperature, group)
        else:
            name = "alignment"
            projected = representation.project(variables["objective"], tokens_BLC)
            if isinstance(settings, SelfAligned):
                own_B = representation.DISTANCES[settings.distance](projected, target)
            else:
                own_B = representation.alignment(target, projected)
        loss_B = loss_B + jnp.where(goes_on, settings.weight, 0.0) * own_B
        terms = {**terms, name: own_B}
        if of_class is not None:
            assert isinstance(settings, REG)
            class_B = process.loss_of(of_class, y[CLASS])[0]
            loss_B, terms = loss_B + settings.class_weight * class_B, {**terms, CLASS_LOSS: class_B}
        return loss_B, terms

    def _encoder(
        self,
        experiment: Experiment,
        frozen: Mapping[str, Any],
        examples: Mapping[str, jax.Array],
        inputs: "Inputs",
    ) -> Callable[[], jax.Array]:
        """Return the function that makes the encoder's tokens, (B, 1 + L, D) float32."""
        settings = experiment.representation
        assert isinstance(settings, REPA)
        there = experiment.space.beside(examples, inputs.x_BHWC, inputs.space_key_B)
        grid = settings.grid(experiment.model)

        def compute() -> jax.Array:
            if settings.source == "features":
                return there["features"].astype(jnp.float32)
            module, encoder = representation.encoder_of(settings), frozen[representation.ENCODER]
            return representation.encoded(module, encoder, there["image"], grid)

        return compute

    def _teacher(
        self,
        experiment: Experiment,
        frozen: Mapping[str, Any],
        inputs: "Inputs",
        noised: Noised,
        earlier_B: jax.Array,
    ) -> Callable[[], jax.Array]:
        """Return the function that makes the average's tokens at earlier times, (B, L, C)."""
        settings, process = experiment.representation, experiment.process
        assert isinstance(settings, SelfAligned)
        assert isinstance(process, Flow)
        less = process.noised_at(inputs.x_BHWC, earlier_B, noised.draws["noise"])
        known = {k: v for k, v in inputs.conditioning.items() if k != "dropout_key"}
        capture = settings.teacher_depth - 1
        teacher = models.as_network(experiment.model, frozen[AVERAGE], capture=capture)

        def compute() -> jax.Array:
            _, tokens = teacher(less.x_BHWC, less.level_B, known)
            return representation.flat(tokens).astype(jnp.float32)

        return compute


def _a_little_earlier(experiment: Experiment, inputs: "Inputs", noised: Noised) -> jax.Array:
    """Return the times (B,) of SRA's teacher."""
    settings, process = experiment.representation, experiment.process
    assert isinstance(settings, SRA)
    assert isinstance(process, Flow)
    shift_B = jax.vmap(jax.random.uniform)(_numbered(inputs.own_key_B, 5))
    earlier_B = noised.draws["time"] - settings.max_shift * shift_B
    return jnp.maximum(earlier_B, process.interval(training=True)[0])


def _unless_ended(goes_on: jax.Array, settings: Any, compute: Callable[[], jax.Array]) -> jax.Array:
    """Compute what tokens are compared with, without a gradient; zeros where that has ended."""
    if not settings.stop_step:
        return jax.lax.stop_gradient(compute())
    shape = jax.eval_shape(compute)

    def nothing() -> jax.Array:
        return jnp.zeros(shape.shape, shape.dtype)

    return jax.lax.stop_gradient(jax.lax.cond(goes_on, compute, nothing))


def _noisy_class(
    experiment: Experiment, class_B11D: jax.Array, inputs: "Inputs", noised: Noised
) -> Noised:
    """Add noise of their own to class tokens, at the times of the latents."""
    process = experiment.process
    assert isinstance(process, Flow)
    key_B = _numbered(inputs.own_key_B, 4)
    noise = jax.vmap(lambda key: jax.random.normal(key, class_B11D.shape[1:]))(key_B)
    return process.noised_at(class_B11D, noised.draws["time"], noise)


DENOISING = Objective()
_OF_MAPS, _OF_TOKENS = MapObjective(), RepresentationObjective()


def objective_of(experiment: Experiment) -> Objective:
    """Return what an experiment trains: its process's loss, with one on tokens, or of a map."""
    if not isinstance(experiment.representation, Plain):
        return _OF_TOKENS
    return _OF_MAPS if isinstance(experiment.process, FlowMap) else DENOISING


def flops_per_image(experiment: Experiment, update: int = 0) -> float:
    """Return the FLOPs of matrix products for an image of an update, without recomputation."""
    objective = objective_of(experiment)
    passes = training_flops(experiment.model) / 3 * objective.passes(experiment, update)
    return passes + objective.further_flops(experiment, update)


class Inputs(NamedTuple):
    """What the loss of some examples is computed of.

    Attributes:
      x_BHWC: examples as the model sees them, float32.
      conditioning: of them, with labels that may be dropped.
      labels: `label`, as the data have it; {} without classes.
      dropped_B: which labels were dropped; None: none can be.
      key_B: (B,) keys for noise.
      own_key_B: (B,) keys that numbers from 4 on are folded into, for whatever else is drawn.
      space_key_B: (B,) keys that the space has drawn with.
    """

    x_BHWC: jax.Array
    conditioning: Mapping[str, jax.Array]
    labels: Mapping[str, jax.Array]
    dropped_B: jax.Array | None
    key_B: jax.Array
    own_key_B: jax.Array
    space_key_B: jax.Array


def inputs_of(
    experiment: Experiment,
    examples: Mapping[str, jax.Array],
    key_B: jax.Array,
    frozen: Mapping[str, Any],
    *,
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
    return Inputs(
        x_BHWC,
        conditioning,
        labels,
        dropped_B,
        loss_key_B,
        own_key_B=key_B,
        space_key_B=space_key_B,
    )


def _numbered(key_B: jax.Array, number: int) -> jax.Array:
    return jax.vmap(lambda key: jax.random.fold_in(key, number))(key_B)
