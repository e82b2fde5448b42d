"""The paths between data and noise that flows follow: z = alpha(t) x + s(t) epsilon.

Time t goes from 0, data, to 1, noise. SiT and LightningDiT count u = 1 - t, SD3, REPA and MeanFlow
count t. With the velocity v = dz/dt = alpha' x + s' epsilon, and the turn s alpha' - s' alpha,

    x = (s v - s' z) / turn,    epsilon = (alpha' z - alpha v) / turn

All functions take numpy arrays, for tables in float64, or JAX's, and return such.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Place(NamedTuple):
    """A path at some times, four arrays shaped like these.

    Attributes:
      alpha, noise: factors of data and of noise, alpha and s.
      alpha_slope, noise_slope: their derivatives by t.
    """

    alpha: Any
    noise: Any
    alpha_slope: Any
    noise_slope: Any

    @property
    def turn(self) -> Any:
        """The turn s alpha' - s' alpha, < 0."""
        return self.noise * self.alpha_slope - self.noise_slope * self.alpha


class Interpolant:
    """A path, by its factors; noise relative to signal, s / alpha, is EDM's sigma for unit data.

    Attributes:
      starts_at: the earliest times of training and of sampling at which a velocity is finite.
    """

    starts_at: tuple[float, float] = (0.0, 0.0)

    def at(self, t: Any) -> Place:
        """Return the factors and their derivatives at times in [0, 1]."""
        raise NotImplementedError

    def by_sigma(self, sigma: Any) -> Place:
        """Return the same at noise levels, 0 and infinity included, exact near both."""
        raise NotImplementedError

    def time(self, noise: Any, alpha: Any) -> Any:
        """Return the time at which s / alpha = noise / alpha; either may be 0, or one infinity."""
        raise NotImplementedError

    def diffusion(self, t: Any) -> Any:
        """Return half of g², of the diffusion that has this path (infinite at some ends)."""
        raise NotImplementedError


class _Linear(Interpolant):
    """alpha = 1 - t, s = t: rectified flow."""

    def at(self, t: Any) -> Place:
        return self._place(1 - t, t)

    def by_sigma(self, sigma: Any) -> Place:
        return self._place(1 / (1 + sigma), self.time(sigma, _math(sigma).ones_like(sigma)))

    def _place(self, alpha: Any, noise: Any) -> Place:
        ones = _math(noise).ones_like(noise)
        return Place(alpha, noise, -ones, ones)

    def time(self, noise: Any, alpha: Any) -> Any:
        with np.errstate(divide="ignore"):
            return 1 / (1 + alpha / noise)

    def diffusion(self, t: Any) -> Any:
        return t / (1 - t)


class _Cosine(Interpolant):
    """alpha = cos(π t / 2), s = sin(π t / 2): SiT's GVP."""

    def at(self, t: Any) -> Place:
        xp = _math(t)
        return self._place(xp.sin(math.pi / 2 * (1 - t)), xp.sin(math.pi / 2 * t))

    def by_sigma(self, sigma: Any) -> Place:
        xp = _math(sigma)
        with np.errstate(divide="ignore"):
            return self._place(1 / xp.sqrt(1 + sigma**2), 1 / xp.sqrt(1 + sigma**-2.0))

    def _place(self, alpha: Any, noise: Any) -> Place:
        return Place(alpha, noise, -math.pi / 2 * noise, math.pi / 2 * alpha)

    def time(self, noise: Any, alpha: Any) -> Any:
        return 2 / math.pi * _math(noise).arctan2(noise, alpha)

    def diffusion(self, t: Any) -> Any:
        return math.pi / 2 * _math(t).tan(math.pi / 2 * t)


class _VP(Interpolant):
    """ln alpha = -(19.9 t² / 4 + 0.1 t / 2), s = √(1 - alpha²): SiT's VP, beta from 0.1 to 20."""

    starts_at = (1e-5, 1e-3)
    beta_d, beta_min = 19.9, 0.1

    def at(self, t: Any) -> Place:
        xp = _math(t)
        log = -(self.beta_d * t**2 / 4 + self.beta_min * t / 2)
        return self._place(xp.exp(log), xp.sqrt(-xp.expm1(2 * log)), t)

    def by_sigma(self, sigma: Any) -> Place:
        xp = _math(sigma)
        alpha = 1 / xp.sqrt(1 + sigma**2)
        return self._place(alpha, sigma * alpha, self.time(sigma, xp.ones_like(sigma)))

    def _place(self, alpha: Any, noise: Any, t: Any) -> Place:
        slope = -alpha * (self.beta_d * t + self.beta_min) / 2
        return Place(alpha, noise, slope, -alpha * slope / noise)

    def time(self, noise: Any, alpha: Any) -> Any:
        xp = _math(noise)
        log = xp.log1p((noise / alpha) ** 2)
        root = xp.sqrt(self.beta_min**2 + 2 * self.beta_d * log)
        return 2 * log / (root + self.beta_min)

    def diffusion(self, t: Any) -> Any:
        return (self.beta_min + self.beta_d * t) / 2


INTERPOLANTS: dict[str, Interpolant] = {"linear": _Linear(), "cosine": _Cosine(), "vp": _VP()}


def _math(values: Any) -> Any:
    """Return the module whose functions take these: `jax.numpy` for JAX's arrays, else numpy."""
    return jnp if isinstance(values, jax.Array) else np
