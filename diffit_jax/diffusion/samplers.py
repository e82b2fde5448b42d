"""Samplers: from noise to images with a denoiser, as one loop that jit compiles once.

A sample's randomness is a function of its seed number alone: one key per sample (`sample_keys`), from which its initial noise
and the noise of each step are derived by number. It does not depend on the batch, its order or the devices.

Shape suffixes: B batch, H, W, C height, width and channels.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from diffit_jax.diffusion.edm import Conditioning, Denoiser
from diffit_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Churn:
    """Stochasticity of EDM's sampler (Algorithm 2): fresh noise is added wherever sigma_low <= sigma <= sigma_high.

    Attributes:
      amount: S_churn, spread over the steps; 0 makes the sampler deterministic.
      sigma_low, sigma_high: S_min and S_max.
      noise: S_noise, standard deviation of the fresh noise relative to its nominal value.
    """

    amount: float = 0.0
    sigma_low: float = 0.0
    sigma_high: float = math.inf
    noise: float = 1.0

    def __post_init__(self):
        if self.amount < 0:
            raise UserError(f"churn amount {self.amount} is negative: use 0 for a deterministic sampler")

    def raised(self, sigmas: np.ndarray) -> np.ndarray:
        """The noise level t̂ = t (1 + gamma) that each level t of the grid is raised to before its step; shaped like `sigmas`."""
        gamma = min(self.amount / len(sigmas), math.sqrt(2) - 1)
        return np.where((self.sigma_low <= sigmas) & (sigmas <= self.sigma_high), sigmas * (1 + gamma), sigmas)


def sample_keys(seed_B: jax.Array) -> jax.Array:
    """One key per seed number, (B,) uint32 → (B,) keys; equal numbers give equal keys on any device."""
    root = jax.random.key(0, impl="threefry2x32")
    return jax.vmap(lambda seed: jax.random.fold_in(root, seed))(seed_B)


def step_noise(key_B: jax.Array, index: jax.Array | int, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal noise number `index` of each sample: (B, *shape) float32. Number 0 is the initial noise, i + 1 that of step i."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, index), shape))(key_B)


def heun(
    denoise: Denoiser,
    key_B: jax.Array,
    image_shape: tuple[int, int, int],
    conditioning: Conditioning,
    sigmas: np.ndarray,
    churn: Churn = Churn(),
) -> jax.Array:
    """EDM's sampler (Algorithm 2): Heun's method down the noise levels, an Euler step to zero at the end. 2N - 1 evaluations.

    Args:
      denoise: D(x, sigma, conditioning), guided or not.
      key_B: (B,) keys from `sample_keys`.
      image_shape: (H, W, C) of the images.
      conditioning: of the B samples.
      sigmas: (N + 1,) descending noise levels that end in 0, from `EDM.sigmas`.
      churn: stochasticity; none by default.

    Returns:
      (B, H, W, C) float32 samples, in the units of the training images and not clipped.
    """
    here, there = sigmas[:-1], sigmas[1:]
    raised = churn.raised(here)
    # Made in float64, rounded once. `added` is the noise that lifts the level t to t̂.
    added = churn.noise * np.sqrt(raised**2 - here**2)
    grid = jnp.asarray(np.stack([raised, there, added], axis=1), jnp.float32)

    def evaluate(index: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        # Both slopes of a step come through this one call of the network, so that it is compiled once, not three times.
        x_BHWC, start_BHWC, first_slope = carry
        step, is_second = index // 2, index % 2 == 1
        level, target, noise = grid[step]
        if churn.amount:
            fresh = noise * step_noise(key_B, step + 1, image_shape)
            x_BHWC = x_BHWC + jnp.where(is_second, 0.0, fresh)
        start_BHWC = jnp.where(is_second, start_BHWC, x_BHWC)
        at = jnp.where(is_second, target, level)
        slope = (x_BHWC - denoise(x_BHWC, jnp.full(key_B.shape, at), conditioning)) / at
        combined = jnp.where(is_second, (first_slope + slope) / 2, slope)
        return start_BHWC + (target - level) * combined, start_BHWC, slope

    x_BHWC = jnp.float32(sigmas[0]) * step_noise(key_B, 0, image_shape)
    return jax.lax.fori_loop(0, 2 * len(here) - 1, evaluate, (x_BHWC, x_BHWC, jnp.zeros_like(x_BHWC)))[0]
