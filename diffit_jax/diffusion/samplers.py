"""Samplers: from noise to a sample with a denoiser D(x; sigma), as loops that jit compiles once.

They serve every process; `Ancestral` and `DDIM` serve DDPM alone, and evaluate its network.

A sample is an array (B, H, W, C), or a pytree of arrays with the batch in front, of which networks
and denoisers then make pytrees of the same structure.

A sample's randomness is a function of its seed number alone: one key per sample (`sample_keys`),
from which its initial noise and the noise of each step are derived by number. It does not depend on
the batch, its order or the devices.

Shape suffixes: B batch, H, W, C height, width and channels.
"""

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from diffit_jax import limits
from diffit_jax.diffusion.ddpm import DDPM, Prediction
from diffit_jax.diffusion.flow import Flow
from diffit_jax.diffusion.guidance import Guided
from diffit_jax.diffusion.loop import (
    Carry,
    SamplerOutput,
    at_level,
    frame_indices,
    sampling_loop,
    tree_map,
)
from diffit_jax.diffusion.runge_kutta import follow_velocity
from diffit_jax.diffusion.schedule import Schedule
from diffit_jax.diffusion.types import Conditioning, Denoiser, Network, Noise, Process
from diffit_jax.errors import UserError
from diffit_jax.limits import at_least

Steps = Annotated[int, at_least(1, le=100_000)]
Rounding = Callable[[np.ndarray], np.ndarray]  # of noise levels, float64
StepsOfGrid = Annotated[int, at_least(2, le=100_000)]  # the grid has two ends


class SamplingMethod(Protocol):
    """A frozen dataclass: how samples are drawn.

    Attributes:
      name: in configs and on the command line.
      num_steps: steps N.
    """

    name: ClassVar[str]
    num_steps: int

    @property
    def note(self) -> str:
        """What to know of these settings, for the log; "": nothing."""
        ...

    def check(self, process: Process) -> None:
        """Raise `UserError` if samples of a process cannot be drawn like this."""

    def steps(self, process: Process) -> int:
        """Return how many steps the sampler takes with a process."""
        ...

    def follows_velocity(self, process: Process) -> bool:
        """Whether the sampler evaluates the velocity of a flow, which steps in time follow."""
        ...

    def model_fn(self, process: Process, network: Network) -> Network:
        """Return the function that the sampler evaluates, and that is guided.

        The network itself, the process's denoiser, or a flow's velocity.
        """
        ...

    def draw(
        self,
        process: Process,
        guided: Guided,
        noise: Noise,
        conditioning: Conditioning,
        frames: int = 0,
    ) -> SamplerOutput:
        """Draw samples.

        Args:
          process: around the network.
          guided: what `model_fn` gives, guided or not.
          noise: of the B samples; its shape is theirs.
          conditioning: of the B samples.
          frames: F, from the first step to the last at equal distances.
        """
        ...


def sample_keys(seed_B: jax.Array) -> jax.Array:
    """Derive a key from each seed number, (B,) uint32 → (B,) keys.

    Equal numbers give equal keys on any device.
    """
    root = jax.random.key(0, impl="threefry2x32")
    return jax.vmap(lambda seed: jax.random.fold_in(root, seed))(seed_B)


def step_noise(key_B: jax.Array, index: jax.Array | int, shape: tuple[int, ...]) -> jax.Array:
    """Draw standard normal noise number `index` of each sample: (B, *shape) float32."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, index), shape))(key_B)


def seeded_noise(seed_B: jax.Array, shapes: Any) -> Noise:
    """Return the noise of samples with these seed numbers, as a function of its number.

    Args:
      seed_B: (B,) uint32 seed numbers.
      shapes: of a sample, (H, W, C), or a pytree of such, each leaf of which has keys of its own: a
        function of the seed and the leaf's path.
    """
    key_B = sample_keys(seed_B)

    def of_leaf(path: tuple, shape: tuple[int, ...], index: jax.Array | int) -> jax.Array:
        number = zlib.crc32(jax.tree_util.keystr(path).encode())
        keys_B = jax.vmap(lambda key: jax.random.fold_in(key, number))(key_B) if path else key_B
        return step_noise(keys_B, index, shape)

    return lambda index: jax.tree_util.tree_map_with_path(
        lambda path, shape: of_leaf(path, shape, index), shapes, is_leaf=_is_shape
    )


def _is_shape(node: Any) -> bool:
    return isinstance(node, tuple) and all(isinstance(size, int) for size in node)


class DenoiserSampler(limits.Section, name="sampling.sampler"):
    """Base class of samplers that evaluate the process's denoiser, or velocity, in N steps."""

    note: ClassVar[str] = ""

    num_steps: int

    def steps(self, process: Process) -> int:
        """Return how many steps the sampler takes: `num_steps`, for every process."""
        return self.num_steps

    def follows_velocity(self, process: Process) -> bool:
        """Whether the sampler evaluates the velocity of a flow: not by itself."""
        return False

    def model_fn(self, process: Process, network: Network) -> Network:
        """Return the process's denoiser, or its velocity."""
        if isinstance(process, Flow) and self.follows_velocity(process):
            return functools.partial(process.velocity, network)
        return functools.partial(process.denoise, network)


class StochasticMixin:
    """Attributes and levels of samplers that add fresh noise on their way, as in `Heun`."""

    churn_amount: float
    churn_sigma_low: float
    churn_sigma_high: float

    def churned(self, sigmas: np.ndarray) -> np.ndarray:
        """Return the noise level t̂ = t (1 + gamma) that each level t is raised to before its step.

        Shaped like `sigmas`.
        """
        gamma = min(self.churn_amount / len(sigmas), math.sqrt(2) - 1)
        inside = (self.churn_sigma_low <= sigmas) & (sigmas <= self.churn_sigma_high)
        return np.where(inside, sigmas * (1 + gamma), sigmas)


class _GridSampler(DenoiserSampler):
    """Base class of samplers down the process's own grid, which define `solve`."""

    def check(self, process: Process) -> None:
        """Raise `UserError` if the process has no grid of so many steps."""
        process.sigmas(self.num_steps)

    def draw(
        self,
        process: Process,
        guided: Guided,
        noise: Noise,
        conditioning: Conditioning,
        frames: int = 0,
    ) -> SamplerOutput:
        sigmas = process.sigmas(self.num_steps)
        rounding = process.round_sigma
        return self.solve(guided, noise, conditioning, sigmas, frames=frames, round_sigma=rounding)

    def solve(
        self,
        denoise: Guided,
        noise: Noise,
        conditioning: Conditioning,
        sigmas: np.ndarray,
        *,
        frames: int = 0,
        round_sigma: Rounding = np.asarray,
    ) -> SamplerOutput:
        """Draw samples on any grid.

        Args:
          denoise: D(x, sigma, conditioning), guided or not.
          noise: of the B samples.
          conditioning: of the B samples.
          sigmas: (N + 1,) descending noise levels that end in 0.
          frames: as of `draw`.
          round_sigma: rounds levels off the grid (churned ones) to those that the network knows.

        Returns:
          x (B, H, W, C) float32 at sigma = 0, or a pytree like `noise(0)`, and the frames.
        """
        raise NotImplementedError


class _InTimeOfFlow(_GridSampler):
    """Base class of samplers that take steps in time, by velocities, where the process is a flow.

    Steps even in t are not even in sigma, which is infinite at t = 1: Heun's method down the noise
    levels would be far off there.
    """

    second: ClassVar[bool]  # whether steps have a second evaluation

    def check(self, process: Process) -> None:
        """Raise `UserError` if the process has no grid of so many steps; a flow has all."""
        if not isinstance(process, Flow):
            super().check(process)

    def follows_velocity(self, process: Process) -> bool:
        """Whether the process is a flow."""
        return isinstance(process, Flow)

    def draw(
        self,
        process: Process,
        guided: Guided,
        noise: Noise,
        conditioning: Conditioning,
        frames: int = 0,
    ) -> SamplerOutput:
        """Draw samples by `solve`, of a flow by steps in its time."""
        if not isinstance(process, Flow):
            return super().draw(process, guided, noise, conditioning, frames)
        given = process, guided, noise, conditioning, process.sampling_times(self.num_steps)
        return follow_velocity(*given, second=self.second, frames=frames)


@dataclasses.dataclass(frozen=True)
class Heun(StochasticMixin, _InTimeOfFlow):
    """EDM's sampler (Algorithm 2): Heun's method down the noise levels, then an Euler step to zero.

    2N - 1 evaluations. Its lines, for t_i = sigmas[i], eps of standard deviation S_noise:

         2  x_0 = t_0 z
         5  t̂ = t_i + gamma t_i                           `churned`
         6  x̂ = x_i + √(t̂² - t_i²) eps                    `added_noise`
         7  d = (x̂ - D(x̂; t̂)) / t̂
         8  x_{i+1} = x̂ + (t_{i+1} - t̂) d                 predicts
         9  unless t_{i+1} = 0:
        10  d' = (x_{i+1} - D(x_{i+1}; t_{i+1})) / t_{i+1}
        11  x_{i+1} = x̂ + (t_{i+1} - t̂) (d + d') / 2      corrects

    It is deterministic unless it churns: then fresh noise is added wherever
    churn_sigma_low <= sigma <= churn_sigma_high.

    Of a flow it follows the velocity instead, in steps even in its (shifted) time, without churn.

    Attributes:
      num_steps: N, the steps from noise to a sample.
      churn_amount: S_churn, spread over the steps; 0: none.
      churn_sigma_low: S_min, the lowest noise level with churn.
      churn_sigma_high: S_max, the highest noise level with churn.
      churn_noise: S_noise, standard deviation of the fresh noise relative to its nominal value.
    """

    name: ClassVar[str] = "heun"
    second: ClassVar[bool] = True

    num_steps: StepsOfGrid
    churn_amount: Annotated[float, at_least(0)] = 0.0
    churn_sigma_low: Annotated[float, at_least(0)] = 0.0
    churn_sigma_high: Annotated[float, at_least(0, infinite=True)] = math.inf
    churn_noise: Annotated[float, at_least(0)] = 1.0

    def check(self, process: Process) -> None:
        """Raise `UserError` if the process has no such grid, or is a flow that would churn."""
        super().check(process)
        if self.churn_amount and isinstance(process, Flow):
            raise UserError(
                "config key sampling.sampler.churn_amount is of steps in sigma, and heun steps in "
                "the time of a flow: use the sampler sde, or general"
            )

    def solve(
        self,
        denoise: Guided,
        noise: Noise,
        conditioning: Conditioning,
        sigmas: np.ndarray,
        *,
        frames: int = 0,
        round_sigma: Rounding = np.asarray,
    ) -> SamplerOutput:
        """Draw samples by the lines above, (B, H, W, C); arguments as of `_GridSampler.solve`."""
        sigma, next_sigma = sigmas[:-1], sigmas[1:]
        sigma_hat = round_sigma(self.churned(sigma))
        # Made in float64, rounded once: the noise that lifts the level t to t̂.
        added_noise = self.churn_noise * np.sqrt(np.maximum(sigma_hat**2 - sigma**2, 0.0))
        grid = jnp.asarray(np.stack([sigma_hat, next_sigma, added_noise], axis=1), jnp.float32)

        # A step has two evaluations, and both come through one call of the network, so that it is
        # compiled once and not three times (the last step has no second one):
        #   evaluation 2i     predicts: from x at t̂ along the slope there;
        #   evaluation 2i + 1 corrects: from the same start along the mean of the slopes at t̂ and
        #                     at the predicted x.
        def body(index: jax.Array, carry: Carry, network: Denoiser) -> tuple[Carry, Any]:
            x, start, first_slope = carry
            step, corrects = index // 2, index % 2 == 1
            level, target, fresh = grid[step]
            if self.churn_amount:
                x = tree_map(
                    lambda x, z: x + jnp.where(corrects, 0.0, fresh * z), x, noise(step + 1)
                )
            start = tree_map(lambda start, x: jnp.where(corrects, start, x), start, x)
            here = jnp.where(corrects, target, level)
            denoised = network(x, at_level(x, here), conditioning)
            slope = tree_map(lambda x, clean: (x - clean) / here, x, denoised)
            combined = tree_map(
                lambda first, slope: jnp.where(corrects, (first + slope) / 2, slope),
                first_slope,
                slope,
            )
            x = tree_map(lambda start, way: start + (target - level) * way, start, combined)
            return (x, start, slope), denoised

        # The grid of evaluations, two for a step but for the last; guidance follows the level of
        # each, and the level at which its step begins.
        x = tree_map(lambda z: jnp.float32(sigmas[0]) * z, noise(0))
        levels = np.stack([sigma_hat, next_sigma], axis=1).ravel()[:-1]
        carry = x, x, tree_map(jnp.zeros_like, x)
        seen = frame_indices(len(sigma), frames, evaluations=2)
        starts = np.repeat(sigma, 2)[:-1]
        carry, kept = sampling_loop(denoise, body, carry, levels, seen, step_sigma=starts)
        return SamplerOutput(carry[0], kept)


@dataclasses.dataclass(frozen=True)
class DPMSolver(_GridSampler):
    """DPM-Solver++(2M) of Lu et al. 2022, one evaluation per step.

    Of second order, by the last two estimates. With h = ln(sigma_i / sigma_{i+1})
    and r = h_{i-1} / h,

        x_{i+1} = e^-h x_i + (1 - e^-h) (D_i + (D_i - D_{i-1}) / (2 r))

    The first step has no D_{i-1}, and the last goes to sigma = 0, where x = D: both are of first
    order.

    Attributes:
      num_steps: N, the steps from noise to a sample.
    """

    name: ClassVar[str] = "dpm_solver"
    order: ClassVar[int] = 2

    num_steps: StepsOfGrid

    def solve(
        self,
        denoise: Guided,
        noise: Noise,
        conditioning: Conditioning,
        sigmas: np.ndarray,
        *,
        frames: int = 0,
        round_sigma: Rounding = np.asarray,
    ) -> SamplerOutput:
        """Draw samples by this class's update (Lu et al. 2022, Algorithm 2).

        In its notation alpha = 1 and sigma = e^-lambda.

        Arguments and value as of `_GridSampler.solve`.
        """
        # 1 / (2 r) of each step; 0, first order, at both ends.
        sigma, next_sigma = sigmas[:-1], sigmas[1:]
        ratio = next_sigma / sigma  # e^-h
        extrapolation = np.zeros(len(sigma))
        if self.order == 2:
            h = np.log(sigma[:-1] / next_sigma[:-1])
            extrapolation[1:-1] = h[1:] / (2 * h[:-1])
        table = np.stack([sigma, ratio, 1 - ratio, extrapolation], axis=1)
        grid = jnp.asarray(table, jnp.float32)

        def body(step: jax.Array, carry: Carry, network: Denoiser) -> tuple[Carry, Any]:
            x, previous = carry
            level, of_x, of_denoised, extrapolate = grid[step]
            denoised = network(x, at_level(x, level), conditioning)
            x = tree_map(
                lambda x, clean, before: (
                    of_x * x + of_denoised * (clean + extrapolate * (clean - before))
                ),
                x,
                denoised,
                previous,
            )
            return (x, denoised), denoised

        x = tree_map(lambda z: jnp.float32(sigmas[0]) * z, noise(0))
        carry = x, tree_map(jnp.zeros_like, x)
        carry, kept = sampling_loop(denoise, body, carry, sigma, frame_indices(len(sigma), frames))
        return SamplerOutput(carry[0], kept)


@dataclasses.dataclass(frozen=True)
class Euler(_InTimeOfFlow, DPMSolver):
    """Euler's method down the noise levels: DPM-Solver++ of first order, and DDIM.

    One evaluation per step. Of a flow it follows the velocity, in steps even in its (shifted) time:
    on the linear path that is the same on its noise levels.
    """

    name: ClassVar[str] = "euler"
    order: ClassVar[int] = 1
    second: ClassVar[bool] = False

    num_steps: Steps  # one is enough along a flow


# (prediction of step k, x_k, k, noise z) → x_{k-1}
Update = Callable[[Prediction, jax.Array, jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Ancestral(limits.Section, name="sampling.sampler"):
    """Ancestral sampling of DDPM: x_{k-1} = mean + exp(½ ln variance) z, K evaluations.

    From the last step to the first, whose z is 0.

    Attributes:
      num_steps: K, spread over the schedule.
      respacing: in place of `num_steps`: "250", "10,10,5" or "ddim50", see `respaced_timesteps`.
      clip_denoised: whether to clip the estimate of the clean sample to [-1, 1]: for images, not
        for latents, which have no such bounds.
    """

    name: ClassVar[str] = "ddpm"
    note: ClassVar[str] = ""
    # Given on the command line, one of the two replaces the other of the config.
    alternatives: ClassVar[tuple[str, str]] = ("num_steps", "respacing")

    num_steps: Steps
    respacing: str = ""
    clip_denoised: bool = False

    def check(self, process: Process) -> None:
        """Raise `UserError` unless the process has a discrete schedule with so many steps."""
        if not isinstance(process, DDPM):
            raise UserError(
                f"config key sampling.sampler.name is {self.name}, which needs the process ddpm: "
                "use euler, heun or dpm_solver"
            )
        self.schedule(process)

    def schedule(self, process: DDPM) -> Schedule:
        """Return the K steps of the process that are taken."""
        return process.schedule_for(self.respacing or str(self.num_steps))

    def steps(self, process: DDPM) -> int:
        """Return K."""
        return len(self.schedule(process))

    def follows_velocity(self, process: Process) -> bool:
        """Whether the sampler evaluates the velocity of a flow: never."""
        return False

    def model_fn(self, process: Process, network: Network) -> Network:
        """Return the network itself."""
        return network

    def draw(
        self,
        process: DDPM,
        guided: Guided,
        noise: Noise,
        conditioning: Conditioning,
        frames: int = 0,
    ) -> SamplerOutput:
        """Draw samples by Algorithm 2 of Ho et al. 2020; arguments as of `SamplingMethod.draw`.

        Its lines, for k = K - 1 … 0 (the schedule's own steps; `timesteps[k]` is what the network
        knows k by):

            1  x_K = z
            3  z standard normal, 0 in the last step
            4  x_{k-1} = mean(x_k, y) + exp(½ ln variance) z      `update`

        Returns:
          x_0 (B, H, W, C) float32, or a pytree like `noise(0)`, and the frames: estimates of x_0.
        """
        schedule = self.schedule(process)
        update = self.update(schedule)
        timesteps = jnp.asarray(schedule.timesteps, jnp.int32)

        def body(index: jax.Array, carry: Carry, network: Network) -> tuple[Carry, Any]:
            (x,), k = carry, len(schedule) - 1 - index
            y, k_B = network(x, at_level(x, timesteps[k]), conditioning), at_level(x, k)
            predictions = tree_map(
                lambda x, y: process.predict(y, x, k_B, schedule, self.clip_denoised), x, y
            )
            x = tree_map(lambda x, p, z: update(p, x, k, z), x, predictions, noise(index + 1))
            return (x,), tree_map(lambda x, p: p.x0, x, predictions)

        sigma, seen = (
            schedule.sqrt_recipm1_alphas_cumprod[::-1],
            frame_indices(len(schedule), frames),
        )
        carry, kept = sampling_loop(guided, body, (noise(0),), sigma, seen)
        return SamplerOutput(carry[0], kept)

    def update(self, schedule: Schedule) -> Update:
        """Return the update from x_k (B, H, W, C) to x_{k-1}."""

        def update(p: Prediction, x_BHWC: jax.Array, k: jax.Array, z_BHWC: jax.Array) -> jax.Array:
            return p.mean + jnp.where(k > 0, jnp.exp(0.5 * p.log_variance) * z_BHWC, 0.0)

        return update


@dataclasses.dataclass(frozen=True)
class DDIM(Ancestral):
    """DDIM (Song et al. 2021, Eq. 12), K evaluations.

        x_{k-1} = √alpha_bar' x_0 + √(1 - alpha_bar' - s²) epsilon + s z

    where alpha_bar' is that of k - 1 and
    s = eta √((1 - alpha_bar') / (1 - alpha_bar)) √(1 - alpha_bar / alpha_bar'), 0 at the first
    step. Where x_0 is clipped, epsilon is derived from it anew.

    Attributes:
      num_steps, respacing, clip_denoised: as in `Ancestral`.
      eta: 0 is deterministic, 1 about as random as DDPM.
    """

    name: ClassVar[str] = "ddim"

    eta: Annotated[float, at_least(0)] = 0.0

    def update(self, schedule: Schedule) -> Update:
        """Return the update of this class's docstring, from x_k (B, H, W, C) to x_{k-1}."""
        now, before = schedule.alphas_cumprod, schedule.alphas_cumprod_prev
        spread = self.eta * np.sqrt((1 - before) / (1 - now)) * np.sqrt(1 - now / before)
        direction = np.sqrt(np.maximum(1 - before - spread**2, 0))
        table = jnp.asarray(np.stack([np.sqrt(before), direction, spread], axis=1), jnp.float32)
        recip = jnp.asarray(schedule.sqrt_recip_alphas_cumprod, jnp.float32)
        recipm1 = jnp.asarray(schedule.sqrt_recipm1_alphas_cumprod, jnp.float32)

        def update(p: Prediction, x_BHWC: jax.Array, k: jax.Array, z_BHWC: jax.Array) -> jax.Array:
            of_x0, of_epsilon, of_z = table[k]
            epsilon = p.epsilon
            if self.clip_denoised:
                epsilon = (recip[k] * x_BHWC - p.x0) / recipm1[k]
            return of_x0 * p.x0 + of_epsilon * epsilon + (of_z * z_BHWC if self.eta else 0.0)

        return update
