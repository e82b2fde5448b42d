"""The processes that EDM compares itself with (Karras et al. 2022, Table 1), in EDM's names.

VP and VE of Song et al. 2021, and the networks of improved DDPM. Their noise levels end: samplers
clamp and round their grids to what the network knows.

Shape suffixes: B batch.
"""

import dataclasses
import functools
import math
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from diffit_jax import limits
from diffit_jax.diffusion.edm import Preconditioned, sampling_grid
from diffit_jax.diffusion.types import Process
from diffit_jax.errors import UserError
from diffit_jax.limits import Count, GridPower, NoiseLevel, above, at_least

EDM_RANGE = 0.002, 80.0  # noise levels of EDM's own sampling grid


class _BoundedRange(Preconditioned, limits.Section, name="process"):
    """A process whose network knows a bounded range of noise levels.

    Its sampling grid is EDM's, from 80 to 0.002, clamped to that range.

    Attributes:
      rho: of the sampling grid.
    """

    rho: float

    def __post_init__(self):
        super().__post_init__()
        low, high = self.sigma_range
        if not low < high:
            raise UserError(
                f"process {type(self).__name__} knows noise levels from {low:.3g} to {high:.3g}: "
                "its keys leave nothing between"
            )

    def sigmas(self, num_steps: int) -> np.ndarray:
        """Return `sampling_grid` of EDM's range, (N + 1,) float64, ending with 0.

        Its ends are clamped to the network's range, its levels rounded to the network's.
        """
        low, high = self.sigma_range
        lowest, highest = max(EDM_RANGE[0], low), min(EDM_RANGE[1], high)
        if not lowest < highest:
            raise UserError(
                f"the network knows noise levels from {low:.3g} to {high:.3g}, none of EDM's from "
                '80 to 0.002: use the sampler "general" with sigma_min and sigma_max'
            )
        grid = sampling_grid(lowest, highest, self.rho, num_steps)
        return np.append(known_levels(self, grid[:-1]), 0.0)


class _UniformTime(_BoundedRange):
    """Base class of processes trained at a uniform fraction of their range, weight 1/sigma²."""

    def sigma_of_fraction(self, fraction: jax.Array) -> jax.Array:
        """Return the noise level at a fraction in [0, 1] of the range, a float32 scalar."""
        raise NotImplementedError

    def draw_sigma(self, key: jax.Array) -> jax.Array:
        return self.sigma_of_fraction(jax.random.uniform(key))

    def loss_weight(self, sigma: jax.Array) -> jax.Array:
        return 1 / sigma**2


@dataclasses.dataclass(frozen=True)
class VP(_UniformTime):
    """Variance preserving: sigma(t)² = exp(½ beta_d t² + beta_min t) - 1.

    t is uniform in [epsilon, 1] in training; the network's noise level is (M - 1) t.

    Attributes:
      beta_d, beta_min: of the schedule.
      num_timesteps: M, the timesteps that the network knows.
      epsilon: the earliest time.
      rho: of the sampling grid.
    """

    beta_d: Annotated[float, above(0)] = 19.9
    beta_min: Annotated[float, above(0)] = 0.1
    num_timesteps: Count = 1000
    epsilon: Annotated[float, above(0, below=1)] = 1e-5
    rho: GridPower = 7.0

    @property
    def sigma_range(self) -> tuple[float, float]:
        """Return the lowest and highest noise level."""
        low, high = np.sqrt(np.expm1(self._exponent(np.array([self.epsilon, 1.0]))))
        return float(low), float(high)

    def _exponent(self, t):
        return 0.5 * self.beta_d * t**2 + self.beta_min * t

    def preconditioning(
        self, sigma: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Return EDM Table 1, column VP, shaped like sigma; t inverts sigma(t)."""
        log = jnp.log1p(sigma**2)
        # (√(beta_min² + 2 beta_d log) - beta_min) / beta_d, without the difference of near numbers.
        root = jnp.sqrt(self.beta_min**2 + 2 * self.beta_d * log)
        t = 2 * log / (root + self.beta_min)
        c_in = 1 / jnp.sqrt(sigma**2 + 1)
        return jnp.ones_like(sigma), -sigma, c_in, (self.num_timesteps - 1) * t

    def sigma_of_fraction(self, fraction: jax.Array) -> jax.Array:
        """Return the noise level at a fraction from latest to earliest time, a scalar."""
        t = 1 + fraction * (self.epsilon - 1)
        return jnp.sqrt(jnp.expm1(self._exponent(t)))


@dataclasses.dataclass(frozen=True)
class VE(_UniformTime):
    """Variance exploding: ln sigma is uniform in training, the noise level ln(sigma / 2).

    Attributes:
      sigma_min, sigma_max: the noise levels that the network knows.
      rho: of the sampling grid.
    """

    sigma_min: NoiseLevel = 0.02
    sigma_max: NoiseLevel = 100.0
    rho: GridPower = 7.0

    @property
    def sigma_range(self) -> tuple[float, float]:
        """Return the lowest and highest noise level."""
        return self.sigma_min, self.sigma_max

    def preconditioning(
        self, sigma: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Return EDM Table 1, column VE, shaped like sigma."""
        ones = jnp.ones_like(sigma)
        return ones, sigma, ones, jnp.log(sigma / 2)

    def sigma_of_fraction(self, fraction: jax.Array) -> jax.Array:
        """Return the noise level at a fraction of ln sigma, from lowest to highest, a scalar."""
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** fraction


@dataclasses.dataclass(frozen=True)
class IDDPM(_BoundedRange):
    """Networks of improved DDPM (and ADM), which know M noise levels of a cosine schedule.

    Their noise level is M - 1 - j at level u_j. They have twice the channels; the second half, a
    variance, does not count. They are only sampled: the process "ddpm" trains such networks.

    Attributes:
      num_timesteps: M, the timesteps that the network knows.
      c1, c2: of the schedule, see `levels`.
      rho: of the sampling grid.
    """

    num_timesteps: Annotated[int, at_least(2, le=1_000_000)] = 1000
    c1: Annotated[float, above(0, below=1)] = 0.001
    c2: Annotated[float, at_least(0, le=1)] = 0.008
    rho: GridPower = 7.0

    @property
    def levels(self) -> np.ndarray:
        """(M,) float64, descending: u_0 … u_{M-1} of `cosine_levels`."""
        return cosine_levels(self.num_timesteps, self.c1, self.c2)

    @property
    def sigma_range(self) -> tuple[float, float]:
        """Return the lowest and highest noise level."""
        return float(self.levels[-1]), float(self.levels[0])

    def output_channels(self, channels: int) -> int:
        """Return the channels of the network's output: the noise, and a variance."""
        return 2 * channels

    def round_sigma(self, sigma: np.ndarray) -> np.ndarray:
        """Return the nearest of the M levels, float64, shaped like sigma."""
        nearest = np.abs(self.levels - np.asarray(sigma, np.float64)[..., None]).argmin(axis=-1)
        return self.levels[nearest]

    def preconditioning(
        self, sigma: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Return EDM Table 1, column iDDPM, for the nearest level, shaped like sigma."""
        index = jnp.abs(jnp.asarray(self.levels, sigma.dtype) - sigma[..., None]).argmin(axis=-1)
        c_noise = (self.num_timesteps - 1 - index).astype(sigma.dtype)
        return jnp.ones_like(sigma), -sigma, 1 / jnp.sqrt(sigma**2 + 1), c_noise

    @property
    def trains(self) -> bool:
        """Whether training uses this process: never."""
        return False


def known_levels(process: Process, sigma: np.ndarray) -> np.ndarray:
    """Return noise levels of a grid, (N,) float64, rounded to those that the network knows.

    Raises:
      UserError: two of them become one.
    """
    known = process.round_sigma(sigma)
    distinct = len(np.unique(known))
    if distinct < len(sigma):
        raise UserError(
            f"num_steps {len(sigma)} is too many: the network and the grid from {sigma[0]:.4g} to "
            f"{sigma[-1]:.4g} have only {distinct} noise levels for them; use fewer steps"
        )
    return known


@functools.lru_cache(maxsize=16)
def cosine_levels(num_timesteps: int, c1: float, c2: float) -> np.ndarray:
    """Return the noise levels of improved DDPM's cosine schedule, (M,) float64, descending.

    As EDM writes them (Table 1): u_M = 0, and u_{j-1} = √((u_j² + 1) / max(a(j-1) / a(j), c1) - 1)
    with a(j) = sin²(π/2 · j / (M (c2 + 1))).
    """
    angle = math.pi / 2 * np.arange(num_timesteps + 1) / (num_timesteps * (c2 + 1))
    alpha = np.sin(angle) ** 2
    levels = np.zeros(num_timesteps + 1)
    for j in range(num_timesteps, 0, -1):
        kept = max(alpha[j - 1] / alpha[j], c1)
        levels[j - 1] = math.sqrt((levels[j] ** 2 + 1) / kept - 1)
    levels.setflags(write=False)
    return levels[:-1]
