"""Samplers in EDM's noise levels: from noise to a sample with a denoiser D(x; sigma), as loops that
jit compiles once.

They serve every process that has `denoise` and `sigmas`; those that belong to discrete-time
diffusion are in `ddpm`.

A sample's randomness is a function of its seed number alone: one key per sample (`sample_keys`),
from which its initial noise and the noise of each step are derived by number. It does not depend on
the batch, its order or the devices.

Shape suffixes: B batch, H, W, C height, width and channels.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from diffit_jax import limits
from diffit_jax.diffusion.guidance import Conditioning, Evaluation, Guided
from diffit_jax.errors import UserError
from diffit_jax.limits import at_least

# (number) → (B, H, W, C) float32 standard normal noise. Number 0 is the initial noise, i + 1 that
# of step i.
Noise = Callable[[jax.Array | int], jax.Array]


@dataclasses.dataclass(frozen=True)
class Churn:
    """Stochasticity of EDM's sampler (Algorithm 2): fresh noise is added wherever sigma_low <=
    sigma <= sigma_high.

    Attributes:
      amount: S_churn, spread over the steps; 0 makes the sampler deterministic.
      sigma_low, sigma_high: S_min and S_max.
      noise: S_noise, standard deviation of the fresh noise relative to its nominal value.
    """

    amount: Annotated[float, at_least(0)] = 0.0
    sigma_low: Annotated[float, at_least(0)] = 0.0
    sigma_high: Annotated[float, at_least(0, infinite=True)] = math.inf
    noise: Annotated[float, at_least(0)] = 1.0

    def __post_init__(self):
        limits.check(self)

    def raised(self, sigmas: np.ndarray) -> np.ndarray:
        """The noise level t̂ = t (1 + gamma) that each level t of the grid is raised to before its
        step; shaped like `sigmas`."""
        gamma = min(self.amount / len(sigmas), math.sqrt(2) - 1)
        return np.where(
            (self.sigma_low <= sigmas) & (sigmas <= self.sigma_high), sigmas * (1 + gamma), sigmas
        )


def sample_keys(seed_B: jax.Array) -> jax.Array:
    """One key per seed number, (B,) uint32 → (B,) keys; equal numbers give equal keys on any
    device."""
    root = jax.random.key(0, impl="threefry2x32")
    return jax.vmap(lambda seed: jax.random.fold_in(root, seed))(seed_B)


def step_noise(key_B: jax.Array, index: jax.Array | int, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal noise number `index` of each sample: (B, *shape) float32."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, index), shape))(key_B)


def seeded_noise(seed_B: jax.Array, shape: tuple[int, ...]) -> Noise:
    """The noise of samples with seed numbers seed_B, (B,) uint32, and of a shape (H, W, C)."""
    key_B = sample_keys(seed_B)
    return lambda index: step_noise(key_B, index, shape)


def sampling_grid(sigma_min: float, sigma_max: float, rho: float, num_steps: int) -> np.ndarray:
    """EDM Eq. 5: (N + 1,) float64, t_i = (sigma_max^(1/rho) + i/(N-1) (sigma_min^(1/rho) -
    sigma_max^(1/rho)))^rho for i < N, then 0.

    Raises:
      UserError: `num_steps` N is below 2.
    """
    if num_steps < 2:
        raise UserError(
            f"num_steps {num_steps} is too small: the sampling grid needs at least 2 steps"
        )
    ends = np.array([sigma_max, sigma_min]) ** (1 / rho)
    return np.append(np.linspace(*ends, num_steps) ** rho, 0.0)


def heun(
    denoise: Guided,
    noise: Noise,
    conditioning: Conditioning,
    sigmas: np.ndarray,
    churn: Churn = Churn(),
) -> jax.Array:
    """EDM's sampler (Algorithm 2): Heun's method down the noise levels, an Euler step to zero at
    the end. 2N - 1 evaluations.

    Args:
      denoise: D(x, sigma, conditioning), guided or not.
      noise: of the B samples.
      conditioning: of the B samples.
      sigmas: (N + 1,) descending noise levels that end in 0.
      churn: stochasticity; none by default.

    Returns:
      (B, H, W, C) float32 samples, in the units of the training data and not clipped.
    """
    here, there = sigmas[:-1], sigmas[1:]
    raised = churn.raised(here)
    # Made in float64, rounded once. `added` is the noise that lifts the level t to t̂.
    added = churn.noise * np.sqrt(raised**2 - here**2)
    grid = jnp.asarray(np.stack([raised, there, added], axis=1), jnp.float32)

    def body(
        index: jax.Array, carry: tuple[jax.Array, ...], evaluate: Evaluation
    ) -> tuple[jax.Array, ...]:
        # Both slopes of a step come through this one call of the network, so that it is compiled
        # once, not three times.
        x_BHWC, start_BHWC, first_slope = carry
        step, is_second = index // 2, index % 2 == 1
        level, target, fresh = grid[step]
        if churn.amount:
            x_BHWC = x_BHWC + jnp.where(is_second, 0.0, fresh * noise(step + 1))
        start_BHWC = jnp.where(is_second, start_BHWC, x_BHWC)
        at = jnp.where(is_second, target, level)
        slope = (x_BHWC - evaluate(x_BHWC, jnp.full(len(x_BHWC), at), conditioning)) / at
        combined = jnp.where(is_second, (first_slope + slope) / 2, slope)
        return start_BHWC + (target - level) * combined, start_BHWC, slope

    x_BHWC = jnp.float32(sigmas[0]) * noise(0)
    levels = np.stack([raised, there], axis=1).ravel()[:-1]
    return denoise.run(
        body, (x_BHWC, x_BHWC, jnp.zeros_like(x_BHWC)), levels, np.repeat(here, 2)[:-1]
    )[0]


def dpm_solver(
    denoise: Guided, noise: Noise, conditioning: Conditioning, sigmas: np.ndarray, order: int = 2
) -> jax.Array:
    """DPM-Solver++(2M) of Lu et al. 2022, one evaluation per step: exact for a D that is linear in
    ln sigma between the levels.

    With h = ln(sigma_i / sigma_{i+1}) and r = h_{i-1} / h,

        x_{i+1} = e^-h x_i + (1 - e^-h) (D_i + (D_i - D_{i-1}) / (2 r))

    The first step has no D_{i-1}, and the last goes to sigma = 0, where x = D: both are of first
    order.

    Args:
      denoise, noise, conditioning, sigmas: as in `heun`.
      order: 2, or 1 without the term of D_{i-1}: that is Euler's method in sigma, and DDIM.

    Returns:
      As `heun`.
    """
    here, there = sigmas[:-1], sigmas[1:]
    shrink = there / here
    extrapolation = np.zeros(len(here))
    if order == 2:
        h = np.log(here[:-1] / there[:-1])
        extrapolation[1:-1] = h[1:] / (2 * h[:-1])
    grid = jnp.asarray(np.stack([here, shrink, 1 - shrink, extrapolation], axis=1), jnp.float32)

    def body(
        step: jax.Array, carry: tuple[jax.Array, jax.Array], evaluate: Evaluation
    ) -> tuple[jax.Array, jax.Array]:
        x_BHWC, previous = carry
        level, keep, gain, extrapolate = grid[step]
        denoised = evaluate(x_BHWC, jnp.full(len(x_BHWC), level), conditioning)
        return keep * x_BHWC + gain * (denoised + extrapolate * (denoised - previous)), denoised

    x_BHWC = jnp.float32(sigmas[0]) * noise(0)
    return denoise.run(body, (x_BHWC, jnp.zeros_like(x_BHWC)), here)[0]


def euler(
    denoise: Guided, noise: Noise, conditioning: Conditioning, sigmas: np.ndarray
) -> jax.Array:
    """Euler's method down the noise levels, one evaluation per step; arguments and result as in
    `heun`."""
    return dpm_solver(denoise, noise, conditioning, sigmas, order=1)
