"""Guidance: two evaluations made into one, over every sampler and both kinds of models.

What is guided is a network or a denoiser (guidance is linear in both, so it makes no difference
which). The plain evaluation is compared with another one, and the difference is magnified:

    y = y_other + s (y_plain - y_other)

In classifier-free guidance (Ho & Salimans 2022) the other one is the same network without the
label, in autoguidance (Karras et al. 2024) a weaker, guiding network with the label. How the
scale s depends on the noise level is a table over the sampler's static grid. Where it is 1, nothing
is to be compared: the sampler's loop is split there, and the other evaluation is not run.

`drop_labels` teaches a class-conditional network in training to work without a label.

Shape suffixes: B batch, H, W, C height, width and channels.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from diffit_jax import limits
from diffit_jax.diffusion.types import Conditioning, Network
from diffit_jax.errors import UserError
from diffit_jax.limits import CountOrZero, above, at_least


@dataclasses.dataclass(frozen=True)
class Unguided:
    """No guidance."""

    kind: ClassVar[str] = "none"
    by_label: ClassVar[bool] = False
    active: ClassVar[bool] = False
    needs_labels: ClassVar[bool] = False
    needs_guide: ClassVar[bool] = False
    by_time: ClassVar[bool] = False
    channels: ClassVar[int] = 0

    def scales(self, time: np.ndarray, step_sigma: np.ndarray) -> np.ndarray:
        """Return 1 for each evaluation, (E,) float32; arguments as in `Constant.scales`."""
        return np.ones(len(time), np.float32)


@dataclasses.dataclass(frozen=True)
class Constant(limits.Section, name="sampling.guidance"):
    """`scale` at every noise level.

    Attributes:
      scale: 1 is no guidance, larger extrapolates farther away from the prediction without a label
        (or the guiding network's). At least 0.
      channels: how many channels are guided, from the first on; the others are predicted with the
        label alone. 0: all
        channels of the sample. Channels beyond those of the sample (a learned variance) are never
        guided. The released DiffiT guides 3 of its latents' 4.
      skip_tolerance: where the scale is within this of 1, it counts as 1 and the second evaluation
        is not run.
    """

    kind: ClassVar[str] = "constant"
    # Whether the other evaluation is that without a label.
    by_label: ClassVar[bool] = True
    by_time: ClassVar[bool] = False  # whether scales follow the time of a schedule

    scale: Annotated[float, at_least(0)]
    channels: CountOrZero = 0
    skip_tolerance: Annotated[float, at_least(0)] = 1e-3

    @property
    def active(self) -> bool:
        """Whether anything is guided at any noise level."""
        return abs(self.scale - 1) > self.skip_tolerance

    @property
    def needs_labels(self) -> bool:
        """Whether a network without classes cannot be guided so."""
        return self.active and self.by_label

    @property
    def needs_guide(self) -> bool:
        """Whether a guiding network is evaluated."""
        return self.active and not self.by_label

    def scales(self, time: np.ndarray, step_sigma: np.ndarray) -> np.ndarray:
        """Return the scale at each evaluation of a sampler; within `skip_tolerance` of 1 it is 1.

        Args:
          time: (E,) time t / T of the schedule in [0, 1): its timestep 0…999 over 1000.
          step_sigma: (E,) noise level at the start of the step to which the evaluation belongs (so
            that an interval treats both evaluations of a Heun step alike, as its authors do).

        Returns:
          (E,) float32.
        """
        scales = np.asarray(self._scales(time, step_sigma)).astype(np.float32)
        return np.where(np.abs(scales - 1) <= self.skip_tolerance, np.float32(1), scales)

    def weights(self, time: np.ndarray, step_sigma: np.ndarray) -> np.ndarray:
        """Return how much of `scale` reaches each evaluation, (E,) float32 in [0, 1].

        The scales are 1 + (scale - 1) weights, of every kind of guidance. Arguments as in `scales`.
        """
        twice = dataclasses.replace(self, scale=2.0)
        return np.asarray(twice._scales(time, step_sigma) - 1).astype(np.float32)

    def _scales(self, time: np.ndarray, step_sigma: np.ndarray) -> np.ndarray:
        return np.full(len(time), self.scale)


@dataclasses.dataclass(frozen=True)
class PowerCosine(Constant):
    """Weak in high noise: 1 + (scale - 1) (1 - cos(π (1 - t / T)^power)) / 2.

    As in MDT and, at 256 pixels, in the released DiffiT.

    Attributes:
      scale, channels, skip_tolerance: as in `Constant`; `scale` is reached at the end.
      power: large values leave more diversity, small ones favour quality.
    """

    kind: ClassVar[str] = "power_cosine"
    by_time: ClassVar[bool] = True

    power: Annotated[float, above(0)] = 4.0

    def _scales(self, time: np.ndarray, step_sigma: np.ndarray) -> np.ndarray:
        return 1 + (self.scale - 1) * (1 - np.cos(np.pi * (1 - time) ** self.power)) / 2


@dataclasses.dataclass(frozen=True)
class Interval(Constant):
    """`scale` where sigma_low < sigma <= sigma_high, none elsewhere (Kynkäänniemi et al. 2024).

    Attributes:
      scale, channels, skip_tolerance: as in `Constant`.
      sigma_low: lower end of the interval, in EDM's noise levels (noise relative to signal).
      sigma_high: upper end of the interval.
    """

    kind: ClassVar[str] = "interval"

    sigma_low: Annotated[float, at_least(0)] = 0.0
    sigma_high: Annotated[float, at_least(0, infinite=True)] = math.inf

    def __post_init__(self):
        super().__post_init__()
        if not self.sigma_low <= self.sigma_high:
            raise UserError(
                f"config key sampling.guidance.sigma_low {self.sigma_low} must lie between 0 and "
                f"sampling.guidance.sigma_high {self.sigma_high}: change either"
            )

    def _scales(self, time: np.ndarray, step_sigma: np.ndarray) -> np.ndarray:
        inside = (self.sigma_low < step_sigma) & (step_sigma <= self.sigma_high)
        return np.where(inside, self.scale, 1.0)


@dataclasses.dataclass(frozen=True)
class Autoguidance(Constant):
    """`scale` at every noise level, against a weaker network (the guide) with the label.

    Attributes:
      scale, channels, skip_tolerance: as in `Constant`.
      workdir: work directory of the guiding network's run.
    """

    kind: ClassVar[str] = "autoguidance"
    by_label: ClassVar[bool] = False

    workdir: limits.Path = ""


Guidance = Unguided | Constant  # and its kinds
GUIDANCE = {
    "none": Unguided,
    "constant": Constant,
    "power_cosine": PowerCosine,
    "interval": Interval,
    "autoguidance": Autoguidance,
}


@dataclasses.dataclass(frozen=True)
class Segment:
    """Evaluations start…stop-1 of a sampler, all guided or none.

    Attributes:
      network: evaluation number → the function to evaluate there.
    """

    start: int
    stop: int
    network: Callable[[jax.Array], Network]


@dataclasses.dataclass(frozen=True)
class Guided:
    """What a sampler evaluates, and where along its grid it is guided.

    Made by `apply_guidance`, or by `unguided`.

    Attributes:
      plain: the evaluation without guidance.
      mixed: `(x, level, conditioning, scale) -> y`, the guided evaluation.
      guidance: its settings.
      time_of: (n,) float64 noise levels sigma → share t / T of the schedule.
      scale: float32 scalar in place of the guidance's, an argument of the compiled function: one
        program for all of them. It is guided wherever any scale would have an effect.
    """

    plain: Network
    mixed: Callable[[Any, jax.Array, Conditioning, jax.Array], Any]
    guidance: Guidance
    time_of: Callable[[np.ndarray], np.ndarray]
    scale: jax.Array | None = None

    def scales(self, sigma: np.ndarray, step_sigma: np.ndarray | None = None) -> np.ndarray:
        """Return the settings' scale at each evaluation of a grid, (E,) float32.

        Args:
          sigma: (E,) noise levels of the evaluations.
          step_sigma: (E,) of the starts of their steps; None: the same.
        """
        return self.guidance.scales(*self._places(sigma, step_sigma))

    def _places(
        self, sigma: np.ndarray, step_sigma: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return times of the schedule, if guidance follows them, and step-start noise levels."""
        time = self.time_of(sigma) if self.guidance.by_time else np.zeros_like(sigma)
        return time, sigma if step_sigma is None else step_sigma

    def segments(
        self, sigma: np.ndarray, step_sigma: np.ndarray | None = None
    ) -> Iterator[Segment]:
        """Divide a sampler's (E,) evaluations where guidance begins or ends; see `scales`."""
        scales = self.scales(sigma, step_sigma)
        table = jnp.asarray(scales)
        if self.scale is not None and isinstance(self.guidance, Constant):
            weights = self.guidance.weights(*self._places(sigma, step_sigma))
            table, scales = 1 + (self.scale - 1) * jnp.asarray(weights), 1 + weights
            tolerance = self.guidance.skip_tolerance
            table = jnp.where(jnp.abs(table - 1) <= tolerance, jnp.float32(1), table)

        def mixed_at(index: jax.Array) -> Network:
            return lambda x, level, conditioning: self.mixed(x, level, conditioning, table[index])

        bounds = [0, *(np.flatnonzero(np.diff(scales != 1)) + 1).tolist(), len(scales)]
        for start, stop in itertools.pairwise(bounds):
            guided = scales[start] != 1
            yield Segment(start, stop, mixed_at if guided else lambda index: self.plain)


def unguided(evaluate: Network) -> Guided:
    """Wrap an evaluation that is not guided."""
    return Guided(
        evaluate,
        lambda x, level, conditioning, _: evaluate(x, level, conditioning),
        Unguided(),
        np.zeros_like,
    )


def apply_guidance(
    guidance: Guidance,
    evaluate: Network,
    time_of: Callable[[np.ndarray], np.ndarray],
    null_label: int | None = None,
    guide: Network | None = None,
    *,
    scale: jax.Array | None = None,
    acts_on: Mapping[str, int] | None = None,
) -> Guided:
    """Combine an evaluation with an unconditional one, or with a guiding network's.

    Args:
      guidance: settings.
      evaluate: the plain evaluation. Guided by labels it also evaluates without them, in one call
        with twice the batch, in which the two versions of an example are neighbours, so that a
        batch that is split over devices need not be moved.
      time_of: of the process, see `Guided`.
      null_label: the label that stands for "no label"; None if there are no labels.
      guide: the guiding network's evaluation (autoguidance), with the same conditioning.
      scale: float32 scalar in place of the settings', see `Guided`.
      acts_on: of samples that are pytrees, the paths (`parallel.path_name`'s form: "a/b") of the
        leaves that are guided, and how many of their first channels, 0 for all; the other leaves
        are the plain evaluation's. None: every leaf, and the settings' channels of it.

    Raises:
      UserError: guidance by labels without labels, or autoguidance without a guiding network.
    """
    if not guidance.active:
        return unguided(evaluate)
    if guidance.by_label:
        if null_label is None:
            raise UserError(
                f"guidance {guidance.kind} guides by labels, which the model does not have: set "
                "guidance to none"
            )
        both = _with_and_without_label(evaluate, null_label)
    else:
        if guide is None:
            raise UserError(
                "autoguidance needs a second, weaker network: name its run by --guidance.workdir, "
                "or choose another guidance"
            )

        both = _by_two_networks(evaluate, guide)

    # Extrapolate from the other evaluation through the plain one, on the guided channels only.
    def mixed(x: Any, level_B: jax.Array, conditioning: Conditioning, scale: jax.Array) -> Any:
        def of_leaf(path: tuple, x: jax.Array, plain: jax.Array, uncond: jax.Array) -> jax.Array:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            if acts_on is not None and name not in acts_on:
                return plain
            channels = guidance.channels if acts_on is None else acts_on[name]
            count = channels or x.shape[-1]
            mixture = uncond[..., :count] + scale * (plain[..., :count] - uncond[..., :count])
            return jnp.concatenate([mixture, plain[..., count:]], axis=-1)

        return jax.tree_util.tree_map_with_path(of_leaf, x, *both(x, level_B, conditioning))

    return Guided(evaluate, mixed, guidance, time_of, scale)


_Both = Callable[[Any, jax.Array, Conditioning], tuple[Any, ...]]


def _by_two_networks(evaluate: Network, guide: Network) -> _Both:
    """Return both evaluations with the same conditioning."""

    def both(x: Any, level_B: jax.Array, conditioning: Conditioning) -> tuple[Any, ...]:
        return evaluate(x, level_B, conditioning), guide(x, level_B, conditioning)

    return both


def _with_and_without_label(evaluate: Network, null_label: int) -> _Both:
    """Return both evaluations by one call with twice the batch."""

    def both(x: Any, level_B: jax.Array, conditioning: Conditioning) -> tuple[Any, ...]:
        pairs = {name: jnp.repeat(value, 2, axis=0) for name, value in conditioning.items()}
        pairs["label"] = pairs["label"].at[1::2].set(null_label)
        twice = jax.tree.map(lambda leaf: jnp.repeat(leaf, 2, axis=0), x)
        y = evaluate(twice, jnp.repeat(level_B, 2, axis=0), pairs)
        y = jax.tree.map(lambda leaf: leaf.reshape(-1, 2, *leaf.shape[1:]), y)
        return tuple(jax.tree.map(lambda leaf, n=n: leaf[:, n], y) for n in (0, 1))

    return both


def drop_labels(
    conditioning: Conditioning, key_B: jax.Array, rate: float, num_classes: int
) -> Conditioning:
    """Replace each label by "no label" (index `num_classes`) with probability `rate`.

    Args:
      conditioning: has `label`, (B,) int.
      key_B: (B,) keys, each of which decides for its example.
      rate: in [0, 1].
      num_classes: number of labels.
    """
    if "label" not in conditioning or rate == 0:
        return conditioning
    drop_B = jax.vmap(lambda key: jax.random.bernoulli(key, rate))(key_B)
    return {**conditioning, "label": jnp.where(drop_B, num_classes, conditioning["label"])}
