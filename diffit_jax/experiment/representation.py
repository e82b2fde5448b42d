"""Section `representation`: losses on tokens inside the network, beside the process's.

What they are computed of is in `run.representation`.
"""

import dataclasses
import functools
from typing import Annotated, Any, ClassVar

import jax

from diffit_jax import limits, models
from diffit_jax.diffusion.flow import Flow
from diffit_jax.diffusion.flow_map import FlowMap
from diffit_jax.errors import UserError
from diffit_jax.limits import RESUMABLE, Count, CountOrZero, Path, above, at_least, fraction, one_of
from diffit_jax.models import Model, placement
from diffit_jax.models.pretrained.dinov2 import ENCODERS, POSITIONS

DISTANCES = ("smooth_l1", "cosine", "cosine_over_tokens", "l1", "l2")


@dataclasses.dataclass(frozen=True)
class Plain:
    """No such loss."""

    kind: ClassVar[str] = "none"

    def needs_targets(self, update: int) -> bool:
        """Return whether an update computes what tokens are compared with: never."""
        return False

    def check(self, experiment: Any) -> None:
        """Nothing can be wrong with it, but a network that generates a class token needs REG."""
        if experiment.model.class_token:
            raise UserError(
                "config key model.class_token has a class token generated, which is trained by "
                "representation.kind reg: set it to reg, or class_token to 0"
            )


@dataclasses.dataclass(frozen=True)
class _OnTokens(limits.Section, name="representation"):
    """Base class of losses on the tokens behind a block.

    Attributes:
      depth: behind how many blocks (in the U: of the encoder) tokens are taken, from 1. REPA and
        SRA have 8 of 28, or 4 of 12 (B/2).
      weight: of this loss, beside the process's.
      stop_step: after how many updates this loss ends (HASTE, 2505.16792: 250,000 of SiT-XL/2,
        whose gain is lost late in training); 0: never.
    """

    depth: Count = 8
    weight: Annotated[float, at_least(0)] = 0.5
    stop_step: Annotated[CountOrZero, RESUMABLE] = 0

    def needs_targets(self, update: int) -> bool:
        """Return whether an update computes what tokens are compared with."""
        return not self.stop_step or update < self.stop_step

    def check(self, experiment: Any) -> None:
        """Raise `UserError` if it does not go with a network or process."""
        if isinstance(experiment.process, FlowMap):
            raise UserError(
                "config key representation.kind is about networks of one time, and process.name is "
                "flow_map: set it to none"
            )
        if experiment.model.class_token and not isinstance(self, REG):
            Plain().check(experiment)
        self.tokens(experiment.model, "depth")

    def grid(self, model: Model) -> tuple[int, int]:
        """Return rows and columns of the network's tokens."""
        shape = self.tokens(model, "depth")
        if len(shape) == 3:
            return shape[0], shape[1]
        side = round((shape[0] - bool(model.class_token)) ** 0.5)
        return side, side

    def tokens(self, model: Model, key: str) -> tuple[int, ...]:
        """Return the shape of an example's tokens behind a block: (L, C), or (H, W, C).

        Args:
          model: the network.
          key: that says behind how many blocks.

        Raises:
          UserError: it has fewer.
        """
        return captured_shape(model, getattr(self, key), f"representation.{key}")


@functools.lru_cache(maxsize=64)  # to be asked for whenever it is needed: it traces the network
def captured_shape(model: Model, depth: int, key: str) -> tuple[int, ...]:
    """Return the shape of an example's tokens behind so many blocks; errors as of `_OnTokens`."""

    def evaluate(variables: Any, x: jax.Array, level: jax.Array) -> Any:
        return models.as_network(model, variables, capture=depth - 1)(x, level, {})[1]

    x_BHWC = jax.ShapeDtypeStruct((1, *model.sample_shape), "float32")
    level_B = jax.ShapeDtypeStruct((1,), "float32")
    try:
        with placement.no_placement():
            found: Any = jax.eval_shape(evaluate, models.initial_shapes(model), x_BHWC, level_B)
    except UserError as error:
        raise UserError(
            f"config key {key} is {depth}, but {error}: use the number of one, counted from 1"
        ) from error
    return found.shape[1:]


@dataclasses.dataclass(frozen=True)
class Dispersive(_OnTokens):
    """Dispersive loss (2506.09027): tokens of different examples shall lie far from each other.

    log mean exp(-‖z_i - z_j‖² / (dim · temperature)) over all pairs of a group, i = j among them.

    Attributes:
      temperature: its scale; the paper's code in JAX has 0.5, that in PyTorch 1.
      group: examples that are compared with each other: positions of the batch that are equal
        modulo batch_size / group. As published 32, a device's; 0 is the whole batch, another loss.
    """

    kind: ClassVar[str] = "dispersive"

    temperature: Annotated[float, above(0)] = 0.5
    group: Annotated[int, at_least(2, also=(0,))] = 32

    def check(self, experiment: Any) -> None:
        """Raise `UserError` also if groups do not lie within the parts of a batch."""
        super().check(experiment)
        batch, parts = experiment.training.batch_size, experiment.training.accumulation
        group = self.group or batch
        if batch % group or (batch // group) % parts:
            raise UserError(
                f"config key representation.group is {self.group}, which does not divide the "
                f"{batch // parts} examples of a part of the batch (training.batch_size {batch}, "
                f"accumulation {parts}): choose it so, or accumulation 1"
            )


@dataclasses.dataclass(frozen=True)
class SelfAligned(_OnTokens):
    """Base class of losses whose teacher is the average of the network, at less noise.

    It sees the same noise and label.

    Attributes:
      teacher_depth: behind how many blocks its tokens are taken: 20 of 28, or 8 of 12 (B/2).
      distance: between projected tokens and the teacher's: "smooth_l1" (beta 0.05), "cosine" over
        channels, "cosine_over_tokens", "l1" or "l2".
    """

    kind: ClassVar[str]

    teacher_depth: Count = 20
    distance: Annotated[str, one_of(*DISTANCES)] = "cosine"

    def check(self, experiment: Any) -> None:
        """Raise `UserError` also without times, or if tokens of both blocks do not match."""
        super().check(experiment)
        if not isinstance(experiment.process, Flow):
            raise UserError(
                f"config key representation.kind is {self.kind}, whose teacher sees an earlier "
                "time: set process.name to flow"
            )
        if self.teacher_depth < self.depth:
            raise UserError(
                f"config key representation.teacher_depth is {self.teacher_depth}, before depth "
                f"{self.depth}: choose a later block"
            )
        ours = self.tokens(experiment.model, "depth")
        theirs = self.tokens(experiment.model, "teacher_depth")
        if ours != theirs:
            raise UserError(
                f"config key representation.teacher_depth is {self.teacher_depth}, where tokens "
                f"are {theirs}, behind depth {self.depth} {ours}: choose blocks of one stage"
            )


@dataclasses.dataclass(frozen=True)
class SRA(SelfAligned):
    """Self-representation alignment (2505.02831): the teacher's time is a little earlier.

    It is t' = max(t - U(0, max_shift), 0).

    Attributes:
      max_shift: how much less its time is, at most.
      distance: the paper has "smooth_l1" and weight 0.2; its released code "cosine_over_tokens" and
        0.5.
    """

    kind: ClassVar[str] = "sra"

    weight: Annotated[float, at_least(0)] = 0.2
    distance: Annotated[str, one_of(*DISTANCES)] = "smooth_l1"
    max_shift: Annotated[float, fraction()] = 0.2


@dataclasses.dataclass(frozen=True)
class SelfFlow(SelfAligned):
    """Self-Flow (2603.06507): tokens of one picture have two times, the teacher's all the earlier.

    The network is told each token's time, and its loss is of each token's velocity. Drawing, and
    the loss on held-out examples, have one time as ever. latent_diffit takes two.

    Attributes:
      second_share: of the tokens that have the second time, drawn anew for every example; the
        paper's ImageNet has a quarter.
      second_is: the second time is "drawn" as the first one is, so that a token's times are
        distributed as without this loss (the paper); or "later": of two that are drawn so, the one
        with more noise.
    """

    kind: ClassVar[str] = "self_flow"

    second_share: Annotated[float, fraction()] = 0.25
    second_is: Annotated[str, one_of("drawn", "later")] = "drawn"

    def check(self, experiment: Any) -> None:
        """Raise `UserError` also for networks without two times, or if no token would have one."""
        super().check(experiment)
        model, process = experiment.model, experiment.process
        if not model.takes_two_levels:
            raise UserError(
                "config key representation.kind is self_flow, which tells tokens of one picture "
                "two times: latent_diffit takes them, but with model.slim_tmsa or time_in 'token'"
            )
        if process.prediction != "velocity":
            raise UserError(
                "config key representation.kind is self_flow, whose loss is of velocities: set "
                "process.prediction to velocity"
            )
        rows, columns = self.grid(model)
        if not 0 < self.second_count(model) < rows * columns:
            raise UserError(
                f"config key representation.second_share is {self.second_share}, which of "
                f"{rows * columns} tokens leaves none to one of both times: choose a share between"
            )

    def second_count(self, model: Model) -> int:
        """Return how many tokens have the second time."""
        rows, columns = self.grid(model)
        return round(self.second_share * rows * columns)


@dataclasses.dataclass(frozen=True)
class REPA(_OnTokens):
    """Representation alignment (2410.06940) with a frozen encoder's patch tokens of the picture.

    Attributes:
      encoder: a name in `dinov2.ENCODERS`. "digits" is a small stand-in for digits.
      encoder_weights: its file or `hf://` folder, see `interop.dinov2`; the stand-in has its own.
      encoder_dtype: of its matrix products.
      positions: how its positions come to the tokens' grid, a name in `dinov2.POSITIONS`; REPA's
        code has timm's rule, "antialiased".
      source: where its tokens come from: "image", by the encoder in every step, of images in the
        records, or "features", which `diffit encode --keep features` has written there.
      projector: from the network's tokens to the encoder's: "mlp", or iREPA's 3×3 convolution
        "conv" (2512.10794).
      projector_width: of the MLP's two hidden layers.
      spatial_norm: iREPA's gamma, 0.6: z becomes (z - gamma · mean) / deviation, both over an
        image's patches; 0: z is left as it is.
    """

    kind: ClassVar[str] = "repa"

    encoder: Annotated[str, one_of(*ENCODERS)] = "dinov2_vitb14"
    encoder_weights: Annotated[Path, RESUMABLE] = ""
    encoder_dtype: Annotated[str, one_of("float32", "bfloat16")] = "bfloat16"
    positions: Annotated[str, one_of(*POSITIONS)] = "antialiased"
    source: Annotated[str, one_of("image", "features")] = "image"
    projector: Annotated[str, one_of("mlp", "conv")] = "mlp"
    projector_width: Count = 2048
    spatial_norm: Annotated[float, fraction()] = 0.0

    def check(self, experiment: Any) -> None:
        """Raise `UserError` also for tokens of the records beside an augmentation."""
        super().check(experiment)
        rows, columns = self.grid(experiment.model)
        if self.spatial_norm and rows * columns < 2:
            raise UserError(
                "config key representation.spatial_norm needs the deviation of several tokens, and "
                "the network has one: set it to 0"
            )
        channels = experiment.model.sample_shape[-1]
        if not experiment.data.autoencoder and channels not in (1, 3):
            raise UserError(
                f"config key representation.kind needs pictures of 1 or 3 channels, and the images "
                f"have {channels}: set it to none"
            )
        if self.source == "features" and experiment.augmentation.probability:
            raise UserError(
                "config key representation.source is features, of pictures as they are, and "
                "augmentation.probability changes them: set it to 0, or source to image"
            )

    @property
    def encoder_width(self) -> int:
        """Channels of the encoder's tokens."""
        return ENCODERS[self.encoder].width


@dataclasses.dataclass(frozen=True)
class REG(REPA):
    """REPA, and the encoder's class token is generated beside the latent (REG, 2507.01467).

    It has its own noise at the same time, and is aligned too. The network needs
    `model.class_token`, the encoder's width.

    Attributes:
      class_weight: of the loss of its velocity.
    """

    kind: ClassVar[str] = "reg"

    class_weight: Annotated[float, at_least(0)] = 0.03

    def needs_targets(self, update: int) -> bool:
        """Return whether an update computes them: always, the class token is data too."""
        return True

    def check(self, experiment: Any) -> None:
        """Raise `UserError` also if the network has no such class token, or no flow."""
        super().check(experiment)
        width = experiment.model.class_token
        if width != self.encoder_width:
            raise UserError(
                f"config key model.class_token is {width}, but representation.kind reg generates "
                f"the {self.encoder_width} channels of {self.encoder}'s class token: set it to "
                "that (latent_diffit)"
            )
        if not isinstance(experiment.process, Flow):
            raise UserError(
                "config key representation.kind is reg, whose class token follows a flow: set "
                "process.name to flow"
            )
        if self.projector == "conv":
            raise UserError(
                "config key representation.projector is conv, but reg's class token lies outside "
                "the grid: set it to mlp"
            )
        if experiment.evaluation.loss_steps:
            raise UserError(
                "config key evaluation.loss_steps measures the loss of latents alone, which reg "
                "sees with a class token: set it to 0"
            )


Representation = Plain | Dispersive | SRA | SelfFlow | REPA
REPRESENTATIONS = {
    "none": Plain,
    "repa": REPA,
    "reg": REG,
    "dispersive": Dispersive,
    "sra": SRA,
    "self_flow": SelfFlow,
}
