"""Guidance: two evaluations made into one, over every sampler and both kinds of models.

What is guided is an *evaluation*, `evaluate(x_BHWC, level_B, conditioning) -> y_BHWC`: a network or
a denoiser (guidance is linear in both, so it makes no difference which). The main evaluation is
compared with a lesser one, and the difference is magnified:

    y = y_lesser + s (y_main - y_lesser)

In classifier-free guidance (Ho & Salimans 2022) the lesser one is the same network without the
label, in autoguidance (Karras et al. 2024) a weaker network with the label. How the scale s depends
on the noise level is a table over the sampler's static grid. Where it is 1, nothing is to be
compared: the sampler's loop is split there, and the lesser evaluation is not run.

`drop_labels` teaches a class-conditional network in training to work without a label.

Shape suffixes: B batch, H, W, C height, width and channels.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from diffit_jax import limits
from diffit_jax.errors import UserError
from diffit_jax.limits import CountOrZero, above, at_least, one_of

Conditioning = Mapping[str, jax.Array]
Evaluation = Callable[[jax.Array, jax.Array, Conditioning], jax.Array]

KINDS = ("none", "constant", "power_cosine", "interval", "autoguidance")


@dataclasses.dataclass(frozen=True)
class Guidance:
    """Which guidance, and how strong.

    Attributes:
      kind: "none"; "constant": `scale` at every noise level; "power_cosine": weak in high noise,
        see `scales`; "interval": `scale` where sigma_low < sigma <= sigma_high, none elsewhere
        (Kynkäänniemi et al. 2024); "autoguidance": `scale` at every noise level, against a weaker
        network instead of the unconditional one.
      scale: 1 is no guidance, larger follows the label more closely. At least 0.
      power: of "power_cosine"; large values leave more diversity, small ones favour quality.
      sigma_low, sigma_high: of "interval", in EDM's noise levels (noise relative to signal).
      channels: so many first channels are guided, the others are the main evaluation's; 0: all
        channels of the sample. Channels beyond those of the sample (a learned variance) are never
        guided. The released DiffiT guides 3 of its latents' 4.
      skip_tolerance: where the scale is within this of 1, it counts as 1 and the lesser evaluation
        is not run.
    """

    kind: Annotated[str, one_of(*KINDS)] = "none"
    scale: Annotated[float, at_least(0)] = 1.0
    power: Annotated[float, above(0)] = 4.0
    sigma_low: Annotated[float, at_least(0)] = 0.0
    sigma_high: Annotated[float, at_least(0, infinite=True)] = math.inf
    channels: CountOrZero = 0
    skip_tolerance: Annotated[float, at_least(0)] = 1e-3

    def __post_init__(self):
        limits.check(self)
        if not self.sigma_low <= self.sigma_high:
            raise UserError(
                f"guidance_sigma_low {self.sigma_low} must lie between 0 and guidance_sigma_high "
                f"{self.sigma_high}: change either"
            )

    @property
    def active(self) -> bool:
        """Whether anything is guided at any noise level."""
        return self.kind != "none" and abs(self.scale - 1) > self.skip_tolerance

    def scales(self, time: np.ndarray, step_sigma: np.ndarray) -> np.ndarray:
        """The scale at each evaluation of a sampler; within `skip_tolerance` of 1 it is 1.

        Args:
          time: (E,) share t / T of the schedule in [0, 1): its timestep 0…999 over 1000.
          step_sigma: (E,) noise level at the start of the step to which the evaluation belongs (so
            that an interval treats both evaluations of a Heun step alike, as its authors do).

        Returns:
          (E,) float32. "power_cosine": 1 + (scale - 1) (1 - cos(π (1 - t / T)^power)) / 2 (MDT, and
          the released DiffiT at 256 pixels).
        """
        match self.kind:
            case "none":
                scales = np.ones(len(time))
            case "power_cosine":
                scales = 1 + (self.scale - 1) * (1 - np.cos(np.pi * (1 - time) ** self.power)) / 2
            case "interval":
                scales = np.where(
                    (self.sigma_low < step_sigma) & (step_sigma <= self.sigma_high), self.scale, 1.0
                )
            case _:
                scales = np.full(len(time), self.scale)
        scales = scales.astype(np.float32)
        return np.where(np.abs(scales - 1) <= self.skip_tolerance, np.float32(1), scales)


@dataclasses.dataclass(frozen=True)
class Guided:
    """What a sampler evaluates: the main evaluation, and how to guide it. Made by `guide` or
    `unguided`.

    Attributes:
      main: the evaluation without guidance.
      mixed: `(x, level, conditioning, scale) -> y`, the guided evaluation.
      guidance: its settings.
      time_of: (n,) float64 noise levels sigma → share t / T of the schedule.
    """

    main: Evaluation
    mixed: Callable[[jax.Array, jax.Array, Conditioning, jax.Array], jax.Array]
    guidance: Guidance
    time_of: Callable[[np.ndarray], np.ndarray]

    def scales(self, sigma: np.ndarray, step_sigma: np.ndarray | None = None) -> np.ndarray:
        """`Guidance.scales` on a grid: (E,) noise levels of the evaluations, and of the starts of
        their steps (None: the same)."""
        return self.guidance.scales(
            self.time_of(sigma), sigma if step_sigma is None else step_sigma
        )

    def run(
        self,
        body: Callable[[jax.Array, Any, Evaluation], Any],
        carry: Any,
        sigma: np.ndarray,
        step_sigma: np.ndarray | None = None,
    ) -> Any:
        """A sampler's loop: `carry = body(e, carry, evaluate)` for each evaluation e, where
        `evaluate` is guided as e asks for.

        Args:
          body: calls `evaluate` once.
          carry: pytree that the loop starts from.
          sigma, step_sigma: (E,) static grid, see `scales`.

        Returns:
          The last carry. The program holds one loop for each stretch of evaluations with, or
          without, guidance.
        """
        scales = self.scales(sigma, step_sigma)
        table = jnp.asarray(scales)

        def guided_body(index: jax.Array, carry: Any) -> Any:
            return body(
                index,
                carry,
                lambda x, level, conditioning: self.mixed(x, level, conditioning, table[index]),
            )

        bounds = [0, *(np.flatnonzero(np.diff(scales != 1)) + 1).tolist(), len(scales)]
        for start, stop in itertools.pairwise(bounds):
            loop = (
                guided_body
                if scales[start] != 1
                else lambda index, carry: body(index, carry, self.main)
            )
            carry = jax.lax.fori_loop(start, stop, loop, carry)
        return carry


def unguided(evaluate: Evaluation) -> Guided:
    """An evaluation as it is."""
    return Guided(
        evaluate,
        lambda x, level, conditioning, _: evaluate(x, level, conditioning),
        Guidance(),
        np.zeros_like,
    )


def guide(
    guidance: Guidance,
    evaluate: Evaluation,
    time_of: Callable[[np.ndarray], np.ndarray],
    null_label: int | None = None,
    weaker: Evaluation | None = None,
) -> Guided:
    """Guides an evaluation.

    Args:
      guidance: settings.
      evaluate: the main evaluation. Without autoguidance it also evaluates the lesser one, in one
        call with twice the batch, in which the two versions of an example lie next to each other,
        so that a batch that is split over devices need not be moved.
      time_of: of the process, see `Guided`.
      null_label: the label that stands for "no label"; None if there are no labels.
      weaker: the lesser evaluation of autoguidance, with the same conditioning.

    Raises:
      UserError: guidance by labels without labels, or autoguidance without a weaker network.
    """
    if not guidance.active:
        return dataclasses.replace(unguided(evaluate), time_of=time_of)
    if guidance.kind == "autoguidance":
        if weaker is None:
            raise UserError(
                "autoguidance needs a second, weaker network: name its run by --guide_workdir, or "
                "choose another guidance"
            )

        def both(
            x_BHWC: jax.Array, level_B: jax.Array, conditioning: Conditioning
        ) -> tuple[jax.Array, jax.Array]:
            return evaluate(x_BHWC, level_B, conditioning), weaker(x_BHWC, level_B, conditioning)
    else:
        if null_label is None:
            raise UserError(
                f"guidance {guidance.kind} guides by labels, which the model does not have: set "
                "guidance to none"
            )

        def both(
            x_BHWC: jax.Array, level_B: jax.Array, conditioning: Conditioning
        ) -> tuple[jax.Array, jax.Array]:
            pairs = {name: jnp.repeat(value, 2, axis=0) for name, value in conditioning.items()}
            pairs["label"] = pairs["label"].at[1::2].set(null_label)
            y = evaluate(jnp.repeat(x_BHWC, 2, axis=0), jnp.repeat(level_B, 2, axis=0), pairs)
            y = y.reshape(-1, 2, *y.shape[1:])
            return y[:, 0], y[:, 1]

    def mixed(
        x_BHWC: jax.Array, level_B: jax.Array, conditioning: Conditioning, scale: jax.Array
    ) -> jax.Array:
        main, lesser = both(x_BHWC, level_B, conditioning)
        count = guidance.channels or x_BHWC.shape[-1]
        mixture = lesser[..., :count] + scale * (main[..., :count] - lesser[..., :count])
        return jnp.concatenate([mixture, main[..., count:]], axis=-1)

    return Guided(evaluate, mixed, guidance, time_of)


def drop_labels(
    conditioning: Conditioning, key_B: jax.Array, rate: float, num_classes: int
) -> Conditioning:
    """Replaces each label by "no label" (index `num_classes`) with probability `rate`, each decided
    by its own key of key_B (B,)."""
    if "label" not in conditioning or rate == 0:
        return conditioning
    drop_B = jax.vmap(lambda key: jax.random.bernoulli(key, rate))(key_B)
    return {**conditioning, "label": jnp.where(drop_B, num_classes, conditioning["label"])}
