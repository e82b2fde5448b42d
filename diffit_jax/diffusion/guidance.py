"""Guidance: two evaluations made into one, over every sampler and both kinds of models.

What is guided is a network or a denoiser (guidance is linear in both, so it makes no difference
which). The plain evaluation is compared with another one, and the difference is magnified:

    y = y_other + s (y_plain - y_other)

In classifier-free guidance (Ho & Salimans 2022) the other one is the same network without the
label, in autoguidance (Karras et al. 2024) a weaker, guiding network with the label, in internal
guidance the network's own inner head, which costs no evaluation. How the scale s depends on the
noise level is a table over the sampler's static grid. Where it is 1, nothing is to be compared: the
sampler's loop is split there, and the other evaluation is not run.

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
from diffit_jax.limits import CountOrZero, above, at_least, fraction


@dataclasses.dataclass(frozen=True)
class Unguided:
    """No guidance."""

    kind: ClassVar[str] = "none"
    by_label: ClassVar[bool] = False
    active: ClassVar[bool] = False
    needs_labels: ClassVar[bool] = False
    needs_guide: ClassVar[bool] = False
    needs_inner: ClassVar[bool] = False
    of_flow: ClassVar[str] = ""
    by_time: ClassVar[bool] = False
    channels: ClassVar[int] = 0

    def scales(self, time: np.ndarray, step_sigma: np.ndarray) -> np.ndarray:
        """Return 1 for each evaluation, (E,); arguments as in `Constant.scales`."""
        return np.ones(len(time))


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
    by_step: ClassVar[bool] = False  # and that is the time at which the step starts
    # Whether the other evaluation is that of the network's inner head.
    needs_inner: ClassVar[bool] = False
    # What of a flow it needs: "" nothing, its "time", or its "velocity" in the sampler.
    of_flow: ClassVar[str] = ""

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
        return self.active and not self.by_label and not self.needs_inner

    def scales(self, time: np.ndarray, step_sigma: np.ndarray) -> np.ndarray:
        """Return the scale at each evaluation of a sampler; within `skip_tolerance` of 1 it is 1.

        Args:
          time: (E,) time t / T of the schedule in [0, 1): its timestep 0…999 over 1000.
          step_sigma: (E,) noise level at the start of the step to which the evaluation belongs (so
            that an interval treats both evaluations of a Heun step alike, as its authors do).

        Returns:
          (E,) float64; whether they are near 1 is decided in float32.
        """
        scales = np.asarray(self._scales(time, step_sigma), np.float64)
        near = np.abs(scales.astype(np.float32) - 1) <= self.skip_tolerance
        return np.where(near, 1.0, scales)

    def weights(self, time: np.ndarray, step_sigma: np.ndarray) -> np.ndarray:
        """Return how much of `scale` reaches each evaluation, (E,) float32 in [0, 1].

        The scales are 1 + (scale - 1) weights, of every kind of guidance. Arguments as in `scales`.
        """
        twice = dataclasses.replace(self, scale=2.0)
        return np.asarray(twice._scales(time, step_sigma) - 1).astype(np.float32)

    def _scales(self, time: np.ndarray, step_sigma: np.ndarray) -> np.ndarray:
        return np.full(len(time), self.scale)

    def label_scales(self, time: np.ndarray) -> np.ndarray:
        """Return the scale of a second guidance, by labels, at each evaluation, (E,).

        `time` as in `scales`.
        """
        return np.ones(len(time))

    def zeros(self, step_sigma: np.ndarray) -> np.ndarray:
        """Return which evaluations count as 0, and are not run, (E,) bool; as in `scales`."""
        return np.zeros(len(step_sigma), bool)

    def other(self, plain: jax.Array, other: jax.Array) -> jax.Array:
        """Return what the plain evaluation is compared with; all (B, H, W, C) of the C guided."""
        return other


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
class TimeInterval(Constant):
    """`scale` where t_low <= t <= t_high in the time of the process flow, none elsewhere.

    In steps that start there. t is 0 at data and 1 at noise: SiT's and LightningDiT's u > 0.125 is
    t_high = 0.875, REPA's interval is stated in t.

    Attributes:
      scale, channels, skip_tolerance: as in `Constant`.
      t_low, t_high: ends of the interval.
    """

    kind: ClassVar[str] = "time_interval"
    by_time: ClassVar[bool] = True
    by_step: ClassVar[bool] = True
    of_flow: ClassVar[str] = "time"

    t_low: Annotated[float, fraction()] = 0.0
    t_high: Annotated[float, fraction()] = 1.0

    def __post_init__(self):
        super().__post_init__()
        _check_ends("", self.t_low, self.t_high)

    def _scales(self, time: np.ndarray, step_sigma: np.ndarray) -> np.ndarray:
        return np.where(_within(time, self.t_low, self.t_high), self.scale, 1.0)


@dataclasses.dataclass(frozen=True)
class CFGZero(Constant):
    """CFG-Zero* (Fan et al. 2025) of velocities: y = a y_uncond + scale (y_plain - a y_uncond).

    a = <y_plain, y_uncond> / |y_uncond|² of each sample, over the guided channels; and the first
    steps stand still.

    Attributes:
      scale, channels, skip_tolerance: as in `Constant`.
      zero_share: share of the steps, rounded to whole ones, in which the velocity counts as 0 and
        the network is not evaluated.
    """

    kind: ClassVar[str] = "cfg_zero"
    of_flow: ClassVar[str] = "velocity"

    zero_share: Annotated[float, fraction(below_one=True)] = 0.04

    def zeros(self, step_sigma: np.ndarray) -> np.ndarray:
        """Return True for the evaluations of the first steps, (E,)."""
        starts = np.append(True, step_sigma[1:] != step_sigma[:-1])
        number = np.cumsum(starts) - 1
        return number < round(self.zero_share * (number[-1] + 1))

    def other(self, plain: jax.Array, other: jax.Array) -> jax.Array:
        """Return the projection of the plain evaluation on the other, (B, H, W, C) all."""
        axes = tuple(range(1, plain.ndim))
        product = jnp.sum(plain * other, axes, keepdims=True)
        square = jnp.sum(other**2, axes, keepdims=True)
        return other * jnp.where(square > 0, product / jnp.where(square > 0, square, 1.0), 1.0)


@dataclasses.dataclass(frozen=True)
class Internal(Constant):
    """Internal guidance (2512.24176): `scale` against the output of the network's inner head.

    Both come from one evaluation. Guidance by labels may come on top, of what is guided so with and
    without a label, which takes a second evaluation where `label_scale` acts.

    Attributes:
      scale, channels, skip_tolerance: as in `Constant`.
      label_scale: of the guidance by labels; 1 is none.
      label_t_low, label_t_high: where it acts, in the time t of the process flow (0 data, 1 noise)
        at which a step starts. Other processes have it everywhere.
    """

    kind: ClassVar[str] = "internal"
    by_label: ClassVar[bool] = False
    needs_inner: ClassVar[bool] = True
    by_time: ClassVar[bool] = True
    by_step: ClassVar[bool] = True

    label_scale: Annotated[float, at_least(0)] = 1.0
    label_t_low: Annotated[float, fraction()] = 0.0
    label_t_high: Annotated[float, fraction()] = 1.0

    def __post_init__(self):
        super().__post_init__()
        _check_ends("label_", self.label_t_low, self.label_t_high)

    @property
    def active(self) -> bool:
        """Whether anything is guided at any noise level."""
        return super().active or self.needs_labels

    @property
    def needs_labels(self) -> bool:
        """Whether a network without classes cannot be guided so."""
        return abs(self.label_scale - 1) > self.skip_tolerance

    def label_scales(self, time: np.ndarray) -> np.ndarray:
        """Return `label_scale` within its interval, (E,)."""
        if not self.needs_labels:
            return np.ones(len(time))
        return np.where(_within(time, self.label_t_low, self.label_t_high), self.label_scale, 1.0)


def _within(time: np.ndarray, low: float, high: float) -> np.ndarray:
    """Whether times lie between ends, which belong to it whatever a table rounds, (E,) bool."""
    return (low - 1e-9 <= time) & (time <= high + 1e-9)


def _check_ends(prefix: str, low: float, high: float) -> None:
    if not low <= high:
        raise UserError(
            f"config key sampling.guidance.{prefix}t_low {low} must lie between 0 and "
            f"sampling.guidance.{prefix}t_high {high}: change either"
        )


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
    "time_interval": TimeInterval,
    "cfg_zero": CFGZero,
    "internal": Internal,
    "autoguidance": Autoguidance,
}


@dataclasses.dataclass(frozen=True)
class Segment:
    """Evaluations start…stop-1 of a sampler, all guided alike, or none.

    Attributes:
      network: evaluation number → the function to evaluate there.
      calls: of networks, for each.
    """

    start: int
    stop: int
    network: Callable[[jax.Array], Network]
    calls: int = 1


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
      mixed_by_label: `(x, level, conditioning, scale, label_scale) -> y`, the same with guidance by
        labels on top, see `Internal`.
    """

    plain: Network
    mixed: Callable[[Any, jax.Array, Conditioning, jax.Array], Any]
    guidance: Guidance
    time_of: Callable[[np.ndarray], np.ndarray]
    scale: jax.Array | None = None
    mixed_by_label: Callable[..., Any] | None = None

    def scales(self, sigma: np.ndarray, step_sigma: np.ndarray | None = None) -> np.ndarray:
        """Return the settings' scale at each evaluation of a grid, (E,).

        Args:
          sigma: (E,) noise levels of the evaluations.
          step_sigma: (E,) of the starts of their steps; None: the same.
        """
        return self.guidance.scales(*self._places(sigma, step_sigma))

    def _places(
        self, sigma: np.ndarray, step_sigma: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return times of the schedule, if guidance follows them, and step-start noise levels."""
        starts = sigma if step_sigma is None else step_sigma
        if not self.guidance.by_time:
            return np.zeros_like(sigma), starts
        by_step = isinstance(self.guidance, Constant) and self.guidance.by_step
        return self.time_of(starts if by_step else sigma), starts

    def segments(
        self, sigma: np.ndarray, step_sigma: np.ndarray | None = None
    ) -> Iterator[Segment]:
        """Divide a sampler's (E,) evaluations where guidance begins or ends; see `scales`."""
        guidance, (time, starts) = self.guidance, self._places(sigma, step_sigma)
        scales = guidance.scales(time, starts)
        table, by_label = jnp.asarray(scales), np.ones(len(sigma))
        zero = np.zeros(len(sigma), bool)
        if isinstance(guidance, Constant):
            by_label, zero = guidance.label_scales(time), guidance.zeros(starts)
            if self.scale is not None:
                weights = guidance.weights(time, starts)
                table, scales = 1 + (self.scale - 1) * jnp.asarray(weights), 1 + weights
                near = jnp.abs(table - 1) <= guidance.skip_tolerance
                table = jnp.where(near, jnp.float32(1), table)
        label_table = jnp.asarray(by_label)

        def mixed_at(index: jax.Array) -> Network:
            return lambda x, level, conditioning: self.mixed(x, level, conditioning, table[index])

        def mixed_by_label_at(index: jax.Array) -> Network:
            assert self.mixed_by_label is not None
            mixed, scale = self.mixed_by_label, (table[index], label_table[index])
            return lambda x, level, conditioning: mixed(x, level, conditioning, *scale)

        networks: list[Callable[[jax.Array], Network]] = [
            lambda index: self.plain,
            mixed_at,
            mixed_by_label_at,
            lambda index: lambda x, level, conditioning: jax.tree.map(jnp.zeros_like, x),
        ]
        kinds = np.where(zero, 3, np.where(by_label != 1, 2, scales != 1))
        bounds = [0, *(np.flatnonzero(np.diff(kinds)) + 1).tolist(), len(kinds)]
        calls = 1, 1 if guidance.needs_inner else 2, 2, 0
        for start, stop in itertools.pairwise(bounds):
            yield Segment(start, stop, networks[kinds[start]], calls[kinds[start]])


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
    with_inner: Network | None = None,
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
      with_inner: the evaluation as a pair, its own and that of the inner head (internal guidance).
      scale: float32 scalar in place of the settings', see `Guided`.
      acts_on: of samples that are pytrees, the paths (`parallel.path_name`'s form: "a/b") of the
        leaves that are guided, and how many of their first channels, 0 for all; the other leaves
        are the plain evaluation's. None: every leaf, and the settings' channels of it.

    Raises:
      UserError: guidance by labels without labels, or autoguidance without a guiding network.
    """
    if not isinstance(guidance, Constant) or not guidance.active:
        return unguided(evaluate)
    both = _both_of(guidance, evaluate, null_label, guide, with_inner)

    # Extrapolate from the other evaluation through the plain one, on the guided channels only.
    def mixed(x: Any, level_B: jax.Array, conditioning: Conditioning, scale: jax.Array) -> Any:
        def of_leaf(path: tuple, x: jax.Array, plain: jax.Array, uncond: jax.Array) -> jax.Array:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            if acts_on is not None and name not in acts_on:
                return plain
            channels = guidance.channels if acts_on is None else acts_on[name]
            count = channels or x.shape[-1]
            other = guidance.other(plain[..., :count], uncond[..., :count])
            mixture = other + scale * (plain[..., :count] - other)
            return jnp.concatenate([mixture, plain[..., count:]], axis=-1)

        return jax.tree_util.tree_map_with_path(of_leaf, x, *both(x, level_B, conditioning))

    guided = Guided(evaluate, mixed, guidance, time_of, scale)
    if not (guidance.needs_inner and guidance.needs_labels):
        return guided
    assert null_label is not None
    null = null_label

    # The same guidance by labels of what is guided from within.
    def mixed_by_label(
        x: Any, level_B: jax.Array, conditioning: Conditioning, scale: jax.Array, by_label: Any
    ) -> Any:
        def within(x: Any, level_B: jax.Array, conditioning: Conditioning) -> Any:
            return mixed(x, level_B, conditioning, scale)

        labelled = Constant(2.0, guidance.channels)  # its scale is the argument
        outer = apply_guidance(labelled, within, time_of, null, acts_on=acts_on)
        return outer.mixed(x, level_B, conditioning, by_label)

    return dataclasses.replace(guided, mixed_by_label=mixed_by_label)


_Both = Callable[[Any, jax.Array, Conditioning], Any]  # a pair like x


def _both_of(
    guidance: Constant,
    evaluate: Network,
    null_label: int | None,
    guide: Network | None,
    with_inner: Network | None,
) -> _Both:
    """Return the function that makes both evaluations; arguments and errors of `apply_guidance`."""
    if guidance.needs_labels and null_label is None:
        raise UserError(
            f"guidance {guidance.kind} guides by labels, which the model does not have: set "
            "guidance to none"
        )
    if guidance.needs_inner:
        if with_inner is None:
            raise UserError(
                "guidance internal needs a network with an inner head: train with "
                "model.inner_head, or choose another guidance"
            )
        return with_inner
    if guidance.by_label:
        assert null_label is not None
        return _with_and_without_label(evaluate, null_label)
    if guide is None:
        raise UserError(
            "autoguidance needs a second, weaker network: name its run by --guidance.workdir, "
            "or choose another guidance"
        )
    return _by_two_networks(evaluate, guide)


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
