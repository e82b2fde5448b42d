"""Flow maps: networks that jump along a flow from one time to another, for one to four steps.

With u(z, t, r) the mean of the velocity between r and t, z_r = z_t - (t - r) u(z_t, t, r) exactly.
MeanFlow (Geng et al. 2025, arXiv 2505.13447) learns it from

    u = v - (t - r) du/dt,    du/dt = v · ∂u/∂z + ∂u/∂t

whose derivative is one `jax.jvp` without gradient. Improved MeanFlow (iMF, 2512.02012) takes it
along the predicted velocity, and tells the network its guidance; decoupled MeanFlow (DMF,
2510.24474) makes a map of a trained flow; alpha-Flow (2510.20771) replaces the derivative by a
difference at first. Where r = t the map is the flow. Times are `flow`'s: 0 data, 1 noise.

The releases tie which examples lose their label to which have r = t, so that a map without a label
is never trained. Here labels are dropped by keys of their own.

Shape suffixes: B batch, H, W, C height, width and channels; R the first rows of a batch, for which
r < t.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp

from diffit_jax import limits
from diffit_jax.diffusion.edm import per_image
from diffit_jax.diffusion.flow import Flow
from diffit_jax.diffusion.interpolants import Place
from diffit_jax.diffusion.types import END_TIME, TOLD_GUIDANCE, Conditioning, Network
from diffit_jax.errors import UserError
from diffit_jax.limits import CountOrZero, above, at_least, fraction, one_of

MAP_TERMS = ("flow_error", "map_error")  # where r = t, and where r < t
_NEAR = 5e-3  # alpha so near to 0 or 1 is that
_STEEPNESS = 25.0
_LOG_FLOOR = 0.01  # of the mean error: DMF's


class Span(NamedTuple):
    """Noisy data, and the times that a map shall join.

    Attributes:
      z_BHWC: noisy data, divided by `sigma_data`.
      velocity_BHWC: dz/dt of their own path.
      t_B, r_B: (B,) r <= t.
      guidance_B3: (B, 3) scale, and the times from which and up to which it acts, that the network
        is told; None: nothing.
    """

    z_BHWC: jax.Array
    velocity_BHWC: jax.Array
    t_B: jax.Array
    r_B: jax.Array
    guidance_B3: jax.Array | None = None


class Evaluations(NamedTuple):
    """The same network three times.

    Attributes:
      trained: of which the gradient is taken; it may return (u, output of the inner head).
      steady: without gradient, like it.
      forward: without gradient, through which `jax.jvp` goes; u alone.
    """

    trained: Network
    steady: Network
    forward: Network


class Target(NamedTuple):
    """What u is compared with.

    Attributes:
      velocity_BHWC: the guided velocity v.
      tangent_BHWC: the velocity along which u is differentiated.
      u_BHWC: v - (t - r) du/dt, or alpha-Flow's.
      alpha: of alpha-Flow, where r < t; 1: none.
    """

    velocity_BHWC: jax.Array
    tangent_BHWC: jax.Array
    u_BHWC: jax.Array
    alpha: Any


@dataclasses.dataclass(frozen=True)
class FlowMap(Flow, limits.Section, name="process"):
    """A flow map: the process `flow` with a network that is told a second time.

    Its keys are those of `flow`, and:

    Attributes:
      share: of the examples of a batch that have r < t, its first ones; the others train the flow.
        MeanFlow has 0.25, iMF and DMF 0.5.
      pair_means: of the two draws of `times` whose larger one is t and whose smaller one is r, in
        the place of `time_mean`; (-0.4, -0.4) in MeanFlow and iMF, (0.4, -1.2) in DMF.
      flow_times: t of examples with r = t: "pair", the larger of two as well (MeanFlow, iMF), or
        "own", by `time_mean` (DMF).
      tangent: along which du/dt is taken: "target", the guided velocity of the example (MeanFlow,
        DMF), or "predicted" by the inner head, or by u(z, t, t) where there is none (iMF).
      map_loss: "adaptive", e / (e + adaptive_epsilon)^adaptive_power of the squared error summed
        over the example, the divisor without gradient (MeanFlow, iMF); or "log", ln(m + 0.01) of
        the mean squared error, DMF's without its learned floor.
      adaptive_power, adaptive_epsilon: p and c of "adaptive".
      guidance_omega, guidance_kappa: guidance inside the target, v ← ω v + (1 - ω - κ) u(z, t, t |
        no label) + κ u(z, t, t | label): MeanFlow's. DMF's scale w is ω = 1, κ = w. As a guidance
        scale of samplers it is ω / (1 - κ).
      guidance_low, guidance_high: times between which it acts.
      guidance_told: whether the scale is drawn for each example instead, as the interval, and told
        to the network (iMF): ω = 1 and κ = 1 - 1 / scale. Sampling then chooses them.
      guidance_max, guidance_beta: scales of these lie between 1 and `guidance_max`, with a density
        that falls like scale^-guidance_beta.
      alpha_start_steps, alpha_end_steps: updates between which alpha-Flow's alpha falls from 1 to
        0; both 0: it is 0, the derivative, from the first one on. Small alphas magnify rounding:
        train in float32.
    """

    share: Annotated[float, fraction()] = 0.25
    pair_means: Sequence[Annotated[float, at_least(-20, le=20)]] = (-0.4, -0.4)
    flow_times: Annotated[str, one_of("pair", "own")] = "pair"
    tangent: Annotated[str, one_of("target", "predicted")] = "target"
    map_loss: Annotated[str, one_of("adaptive", "log")] = "adaptive"
    adaptive_power: Annotated[float, at_least(0)] = 1.0
    adaptive_epsilon: Annotated[float, above(0)] = 0.01
    guidance_omega: Annotated[float, above(0)] = 1.0
    guidance_kappa: Annotated[float, fraction(below_one=True)] = 0.0
    guidance_low: Annotated[float, fraction()] = 0.0
    guidance_high: Annotated[float, fraction()] = 1.0
    guidance_told: bool = False
    guidance_max: Annotated[float, above(1)] = 8.0
    guidance_beta: Annotated[float, at_least(0)] = 1.0
    alpha_start_steps: CountOrZero = 0
    alpha_end_steps: CountOrZero = 0

    def __post_init__(self):
        super().__post_init__()
        if len(self.pair_means) != 2:
            raise UserError(
                f"config key process.pair_means has {len(self.pair_means)} numbers: give two"
            )
        if not self.guidance_low <= self.guidance_high:
            raise UserError(
                f"config key process.guidance_low {self.guidance_low} must lie between 0 and "
                f"process.guidance_high {self.guidance_high}: change either"
            )
        fixed = (self.guidance_omega, self.guidance_kappa, self.guidance_low, self.guidance_high)
        if self.guidance_told and fixed != (1, 0, 0, 1):
            raise UserError(
                "config key process.guidance_told draws scales and intervals, and guidance_omega, "
                "guidance_kappa, guidance_low and guidance_high fix one: set these to 1, 0, 0 and "
                "1, or guidance_told to False"
            )
        for name, usual in (("direction_weight", 0.0), ("weighting", "none")):
            if getattr(self, name) != usual:
                raise UserError(
                    f"config key process.{name} is {getattr(self, name)}, which is of the process "
                    f"flow: set it to {usual}"
                )
        if self.alpha_start_steps > self.alpha_end_steps:
            raise UserError(
                f"config key process.alpha_start_steps is {self.alpha_start_steps}: it must not be "
                f"above process.alpha_end_steps, {self.alpha_end_steps}"
            )

    # --- What the map is told

    @property
    def guides(self) -> bool:
        """Whether guidance is inside: samples are guided already."""
        return self.guidance_told or (self.guidance_omega, self.guidance_kappa) != (1.0, 0.0)

    @property
    def map_terms(self) -> tuple[str, ...]:
        """Names of the terms of `loss_between`: mean squared errors where r = t, and where r < t.

        (With "adaptive" the loss itself is nearly 1 whatever the errors are.)
        """
        here = self.share < 1, self.share > 0
        return tuple(name for name, has in zip(MAP_TERMS, here, strict=True) if has)

    @property
    def _asks_without_label(self) -> bool:
        omega, kappa = self.guidance_omega, self.guidance_kappa
        return bool(self.guides and (self.guidance_told or omega + kappa != 1))

    @property
    def _asks_with_label(self) -> bool:
        told = self.guidance_told or self.tangent == "predicted"
        return told or bool(self.guidance_kappa)

    @property
    def velocities(self) -> int:
        """How many velocities training evaluates the network for, without gradient."""
        return self._asks_without_label + self._asks_with_label

    def told_at(self, t: jax.Array) -> jax.Array:
        """Return what the network is told at times in [0, 1], shaped like them."""
        if self.clock != "timesteps":
            return 1 - t if self.clock == "u" else t
        place = self.interpolant.at(t)
        # Below the lowest timestep it is told that one; its logarithm shall be finite.
        noise = jnp.maximum(place.noise, 1e-6)
        return self.told(self.sigma_data * noise / jnp.maximum(place.alpha, 1e-6))

    def between(
        self,
        network: Network,
        z_BHWC: jax.Array,
        t_B: jax.Array,
        r_B: jax.Array,
        conditioning: Conditioning,
    ) -> Any:
        """Evaluate the map: u(z, t, r), differentiable by z and t up to both ends.

        Args:
          network: called once; `end_time` is what it is told of r.
          z_BHWC: (B, H, W, C) float32 noisy data over `sigma_data`.
          t_B: (B,) times of z.
          r_B: (B,) times to go to.
          conditioning: passed on to the network.

        Returns:
          (B, H, W, C), or a tuple of such where the network returns a tuple of outputs.
        """
        channels = z_BHWC.shape[-1]
        place = Place(*(per_image(each) for each in self.interpolant.at(t_B)))
        sees = z_BHWC
        if self.clock == "timesteps":
            size = jnp.hypot(place.alpha, self.sigma_data * place.noise)
            sees = self.sigma_data * z_BHWC / size
        told = {**conditioning, END_TIME: self.told_at(r_B)}

        def of_output(f_BHWC: jax.Array) -> jax.Array:
            return self.as_velocity(f_BHWC.astype(z_BHWC.dtype)[..., :channels], z_BHWC, place)

        return jax.tree.map(of_output, network(sees, self.told_at(t_B), told))

    # --- Training

    def span(self, x_BHWC: jax.Array, key_B: jax.Array, rows: int) -> Span:
        """Draw noise and times, of the first `rows` examples r < t; see `Process.noise`.

        The noise is that of `noise`, which draws for the flow alone.
        """
        level_key_B, noise_key_B = jax.vmap(jax.random.split, out_axes=1)(key_B)
        keys_B6 = jax.vmap(lambda key: jax.random.split(key, 6))(level_key_B)
        draw = jax.vmap(self.draw_time, in_axes=(0, None))
        one_B, other_B = (draw(keys_B6[:, n], float(self.pair_means[n])) for n in (0, 1))
        mapped_B = jnp.arange(len(x_BHWC)) < rows
        later_B = jnp.maximum(one_B, other_B)
        own_B = later_B if self.flow_times == "pair" else draw(keys_B6[:, 2], self.time_mean)
        t_B = jnp.where(mapped_B, later_B, own_B)
        r_B = jnp.where(mapped_B, jnp.minimum(one_B, other_B), t_B)
        noise_BHWC = jax.vmap(lambda key: jax.random.normal(key, x_BHWC.shape[1:]))(noise_key_B)
        told = None
        if self.guidance_told:
            scale_B, low_B, high_B = (
                jax.vmap(jax.random.uniform)(keys_B6[:, n]) for n in (3, 4, 5)
            )
            told = self.guidance_of(scale_B, low_B, high_B, mapped_B)
        return self.span_at(x_BHWC, noise_BHWC, t_B, r_B, told)

    def span_at(
        self,
        x_BHWC: jax.Array,
        noise_BHWC: jax.Array,
        t_B: jax.Array,
        r_B: jax.Array,
        guidance_B3: jax.Array | None = None,
    ) -> Span:
        """Compute `span` at given times (B,), with given standard normal noise (B, H, W, C)."""
        place = Place(*(per_image(each) for each in self.interpolant.at(t_B)))
        clean = x_BHWC / self.sigma_data
        return Span(
            place.alpha * clean + place.noise * noise_BHWC,
            place.alpha_slope * clean + place.noise_slope * noise_BHWC,
            t_B,
            r_B,
            guidance_B3,
        )

    def guidance_of(
        self, scale_B: jax.Array, low_B: jax.Array, high_B: jax.Array, mapped_B: jax.Array
    ) -> jax.Array:
        """Return scale and interval, (B, 3), of draws (B,) uniform in [0, 1): iMF's.

        The interval is all of [0, 1] where r = t.
        """
        power, most = 1 - self.guidance_beta, self.guidance_max
        if abs(power) < 1e-3:  # where the other form is a difference of near numbers
            scale_B = most**scale_B
        else:
            scale_B = (1 + scale_B * (most**power - 1)) ** (1 / power)
        low_B = jnp.where(mapped_B, low_B / 2, 0.0)
        high_B = jnp.where(mapped_B, (1 + high_B) / 2, 1.0)
        return jnp.stack([scale_B, low_B, high_B], axis=-1)

    def alpha_at(self, update: jax.Array) -> jax.Array:
        """Return alpha-Flow's alpha at an update, a float32 scalar: 1, then a sigmoid, then 0."""
        length = max(self.alpha_end_steps - self.alpha_start_steps, 1)
        middle = (self.alpha_start_steps + self.alpha_end_steps) / 2
        alpha = jax.nn.sigmoid(-_STEEPNESS * (update - middle) / length)
        alpha = jnp.where(alpha > 1 - _NEAR, 1.0, alpha)
        return jnp.where(alpha < _NEAR, 0.0, alpha)

    def guided(
        self,
        network: Network,
        span: Span,
        conditioning: Conditioning,
        *,
        null_label: int | None = None,
        dropped_B: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Return the guided velocity, and the tangent, (B, H, W, C) both.

        Args:
          network: called once, for all velocities that are needed.
          span: of the examples.
          conditioning: of them, with the labels that they have in the data.
          null_label: the label that stands for none.
          dropped_B: (B,) which examples lose their label, and are not guided; None: none. (Their
            predicted tangent is still that of their label, as in iMF's code: du/dt is linear in it,
            and its mean over the labels that a noisy example may have is the one without a label.)
        """
        omega, kappa = self.guidance_omega, self.guidance_kappa
        inside_B = (self.guidance_low <= span.t_B) & (span.t_B <= self.guidance_high)
        with_label = without_label = conditioning
        if span.guidance_B3 is not None:
            scale_B, low_B, high_B = span.guidance_B3.T
            inside_B = (low_B <= span.t_B) & (span.t_B <= high_B)
            scale_B, zero_B = jnp.where(inside_B, scale_B, 1.0), jnp.zeros_like(scale_B)
            kappa = per_image(1 - 1 / scale_B)
            always = jnp.stack([scale_B, zero_B, zero_B + 1], axis=-1)
            with_label = {**conditioning, TOLD_GUIDANCE: always}
            without_label = {**conditioning, TOLD_GUIDANCE: jnp.ones_like(always).at[:, 1].set(0.0)}
        if self.guides:
            assert null_label is not None
            null_B = jnp.full_like(conditioning["label"], null_label)
            without_label = {**without_label, "label": null_B}
        asked = [without_label] * self._asks_without_label + [with_label] * self._asks_with_label
        found = self._velocities(network, span, asked)
        velocity = span.velocity_BHWC
        if self.guides:
            plain = found[-1] if asked[-1] is with_label else 0.0
            other = found[0] if asked[0] is without_label else 0.0
            mixed = omega * velocity + (1 - omega - kappa) * other + kappa * plain
            keep_B = inside_B if dropped_B is None else inside_B & ~dropped_B
            velocity = jnp.where(per_image(keep_B), mixed, velocity)
        return velocity, found[-1] if self.tangent == "predicted" else velocity

    def _velocities(
        self, network: Network, span: Span, asked: Sequence[Conditioning]
    ) -> Sequence[jax.Array]:
        """Return u(z, t, t), or (iMF) the inner head's, for each conditioning, by one evaluation.

        Versions of an example are neighbours, so that a batch that is divided need not be moved.
        """
        if not asked:
            return ()
        count = len(asked)

        def joined(*versions: jax.Array) -> jax.Array:
            return jnp.stack(versions, axis=1).reshape(-1, *versions[0].shape[1:])

        z, t_B = (joined(*[each] * count) for each in (span.z_BHWC, span.t_B))
        both = jax.tree.map(joined, *asked) if count > 1 else asked[0]
        found = self.between(network, z, t_B, t_B, both)
        if isinstance(found, tuple):
            found = found[-1 if self.tangent == "predicted" else 0]
        found = found.reshape(-1, count, *found.shape[1:])
        return [found[:, number] for number in range(count)]

    def derivative(
        self, network: Network, span: Span, tangent_BHWC: jax.Array, conditioning: Conditioning
    ) -> jax.Array:
        """Return du/dt along a velocity, (B, H, W, C), r held fixed.

        `jax.jvp` has to go through the network.
        """

        def u(z_BHWC: jax.Array, t_B: jax.Array) -> jax.Array:
            return self.between(network, z_BHWC, t_B, span.r_B, conditioning)

        tangents = tangent_BHWC, jnp.ones_like(span.t_B)
        return jax.jvp(u, (span.z_BHWC, span.t_B), tangents)[1]

    def target(
        self,
        evaluations: Evaluations,
        span: Span,
        conditioning: Conditioning,
        *,
        rows: int,
        update: jax.Array | int = 0,
        null_label: int | None = None,
        dropped_B: jax.Array | None = None,
    ) -> Target:
        """Compute what u(z, t, r) shall be; without gradient.

        Arguments as of `loss_between`.
        """
        given = {"null_label": null_label, "dropped_B": dropped_B}
        velocity, tangent = self.guided(evaluations.steady, span, conditioning, **given)
        velocity, tangent = map(jax.lax.stop_gradient, (velocity, tangent))
        if not rows:
            return Target(velocity, tangent, velocity, 1.0)
        told = _told(span, conditioning, **given)
        first: Any = jax.tree.map(lambda leaf: leaf[:rows], (span, told, velocity, tangent))
        of_rows, told, v, way = first
        length = per_image(of_rows.t_B - of_rows.r_B)

        def exact() -> jax.Array:
            slope = self.derivative(evaluations.forward, of_rows, way, told)
            return v - jnp.clip(length, 0, 1) * slope

        if not self.alpha_end_steps:
            u_R, alpha = exact(), 1.0
        else:
            alpha = self.alpha_at(jnp.asarray(update, jnp.float32))

            def difference() -> jax.Array:
                step = alpha * length
                there = self.between(
                    evaluations.steady,
                    of_rows.z_BHWC - step * way,
                    of_rows.t_B - step[:, 0, 0, 0],
                    of_rows.r_B,
                    told,
                )
                there = there[0] if isinstance(there, tuple) else there
                return alpha * v + (1 - alpha) * there

            u_R = jax.lax.cond(alpha > 0, difference, exact)
            alpha = jnp.where(alpha > 0, alpha, 1.0)
        # Beyond the pairs there may be rows with r = t: whose flow it is, whatever alpha is.
        u_R = jax.lax.stop_gradient(jnp.where(length > 0, u_R, v))
        return Target(velocity, tangent, velocity.at[:rows].set(u_R), alpha)

    def weighed(self, square_B: jax.Array, size: int) -> jax.Array:
        """Return the loss of squared errors summed over `size` numbers each, (B,)."""
        if self.map_loss == "log":
            return jnp.log(square_B / size + _LOG_FLOOR)
        divisor = (square_B + self.adaptive_epsilon) ** self.adaptive_power
        return square_B / jax.lax.stop_gradient(divisor)

    def loss_between(
        self,
        evaluations: Evaluations,
        span: Span,
        conditioning: Conditioning,
        *,
        rows: int,
        update: jax.Array | int = 0,
        null_label: int | None = None,
        dropped_B: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array | None, dict[str, jax.Array]]:
        """Compute the loss of a map.

        Args:
          evaluations: the network.
          span: of the examples.
          conditioning: of them, with the labels that they have in the data.
          rows: R; all examples with r < t are among the first R.
          update: number of the update, for alpha-Flow.
          null_label: the label that stands for none.
          dropped_B: (B,) which examples lose their label; None: none.

        Returns:
          (B,) float32 loss, that of the inner head if the network returns one, and `map_terms`,
          (B,) each, which average to mean squared errors over their examples.
        """
        given = {"null_label": null_label, "dropped_B": dropped_B}
        found = self.target(evaluations, span, conditioning, rows=rows, update=update, **given)
        told = _told(span, conditioning, **given)
        u = self.between(evaluations.trained, span.z_BHWC, span.t_B, span.r_B, told)
        u_BHWC, inner_BHWC = u if isinstance(u, tuple) else (u, None)
        size = math.prod(u_BHWC.shape[1:])

        def squares(one: jax.Array, other: jax.Array) -> jax.Array:
            return jnp.sum((one - other) ** 2, axis=(1, 2, 3))

        mapped_B = span.r_B < span.t_B
        alpha_B = jnp.where(mapped_B, found.alpha, 1.0)
        error_B = squares(u_BHWC, found.u_BHWC)
        loss_B = alpha_B * self.weighed(error_B / alpha_B**2, size)
        inner_B = None
        if inner_BHWC is not None:
            inner_B = self.weighed(squares(inner_BHWC, found.velocity_BHWC), size)
        means = {"flow_error": ~mapped_B, "map_error": mapped_B}

        def term(here_B: jax.Array) -> jax.Array:
            share = jnp.maximum(jnp.mean(here_B.astype(jnp.float32)), 1e-6)
            return jnp.where(here_B, error_B / alpha_B**2 / size, 0.0) / share

        return loss_B, inner_B, {name: term(means[name]) for name in self.map_terms}


def _told(
    span: Span, conditioning: Conditioning, null_label: int | None, dropped_B: jax.Array | None
) -> Conditioning:
    """Return what the map is told beside its times: labels but those dropped, and guidance."""
    told = dict(conditioning)
    if dropped_B is not None and null_label is not None:
        told["label"] = jnp.where(dropped_B, null_label, told["label"])
    if span.guidance_B3 is not None:
        told[TOLD_GUIDANCE] = span.guidance_B3
    return told
