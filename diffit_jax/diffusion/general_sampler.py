"""EDM's general sampler: any grid, schedule and scaling (Karras et al. 2022, Table 1).

The samplers of earlier work are cases of it: any grid of noise levels, schedule and scaling, first
or second order. The ordinary differential equation behind it, for x = s(t) (clean + sigma(t)
noise), is

    dx/dt = (σ̇/σ + ṡ/s) x - (σ̇ s/σ) D(x / s; σ)

Everything but x is known beforehand: it is made in float64 and becomes a table with a row for each
evaluation of the denoiser.

Shape suffixes: B batch, H, W, C height, width and channels; E evaluations.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffit_jax import limits
from diffit_jax.diffusion.edm import sampling_grid
from diffit_jax.diffusion.guidance import Guided
from diffit_jax.diffusion.preconditioning import EDM_RANGE, VP, cosine_levels, known_levels
from diffit_jax.diffusion.samplers import (
    Carry,
    DenoiserSampler,
    SamplerOutput,
    StepsOfGrid,
    StochasticMixin,
    at_level,
    frame_indices,
    sampling_loop,
    tree_map,
)
from diffit_jax.diffusion.types import Conditioning, Denoiser, Noise, Process
from diffit_jax.errors import UserError
from diffit_jax.limits import GridPower, above, at_least, one_of

# From and to which noise level a grid goes by itself; "vp": those of `VP` from `time_min` on.
RANGES = {"edm": EDM_RANGE, "vp": None, "ve": (0.02, 100.0), "iddpm": (0.002, 81.0)}
_IDDPM = (1000, 0.001, 0.008)  # M, C1 and C2 of the grid "iddpm"


_Function = Callable[[np.ndarray], np.ndarray]


class Path(NamedTuple):
    """Noise level and scaling as functions of time, (n,) float64 each; `time` inverts `sigma`.

    Attributes:
      sigma, sigma_slope: σ(t) and its derivative.
      time: the inverse of σ(t).
      scale, scale_slope: s(t) and its derivative.
    """

    sigma: _Function
    sigma_slope: _Function
    time: _Function
    scale: _Function
    scale_slope: _Function


@dataclasses.dataclass(frozen=True)
class General(StochasticMixin, DenoiserSampler):
    """EDM's general sampler; for EDM with its default levels it is `Heun`.

    Attributes:
      num_steps: N, the steps from noise to a sample.
      solver: "heun" (of second order, see `alpha`; 2N - 1 evaluations) or "euler" (N).
      alpha: where in a step the second slope is taken: 1 Heun, 1/2 midpoint, 2/3 Ralston.
      grid: of noise levels: "edm" (even in sigma^(1/rho)), "vp" (even in the time of VP), "ve"
        (even in ln sigma) or "iddpm" (levels of improved DDPM's cosine schedule).
      sigma_min: lowest noise level of the grid; 0: its own, within what the network knows.
      sigma_max: highest noise level of the grid; 0: likewise.
      rho: of the grid "edm".
      schedule: sigma(t): "linear" (t), "vp" (√(exp(½ beta_d t² + beta_min t) - 1), fitted to the
        ends of the grid) or "ve" (√t).
      scaling: s(t): "none" (1) or "vp" (1 / √(1 + sigma²)).
      time_min: ε_s, the earliest time of the grid and the schedule "vp".
      churn_amount: S_churn, spread over the steps; 0: none.
      churn_sigma_low: S_min, the lowest noise level with churn.
      churn_sigma_high: S_max, the highest noise level with churn.
      churn_noise: S_noise, standard deviation of the fresh noise relative to its nominal value.
    """

    name: ClassVar[str] = "general"

    num_steps: StepsOfGrid
    solver: Annotated[str, one_of("heun", "euler")] = "heun"
    alpha: Annotated[float, limits.Limits(gt=0, le=1)] = 1.0
    grid: Annotated[str, one_of(*RANGES)] = "edm"
    sigma_min: Annotated[float, at_least(0)] = 0.0
    sigma_max: Annotated[float, at_least(0)] = 0.0
    rho: GridPower = 7.0
    schedule: Annotated[str, one_of("linear", "vp", "ve")] = "linear"
    scaling: Annotated[str, one_of("none", "vp")] = "none"
    time_min: Annotated[float, above(0, below=1)] = 1e-3
    churn_amount: Annotated[float, at_least(0)] = 0.0
    churn_sigma_low: Annotated[float, at_least(0)] = 0.0
    churn_sigma_high: Annotated[float, at_least(0, infinite=True)] = math.inf
    churn_noise: Annotated[float, at_least(0)] = 1.0

    def check(self, process: Process) -> None:
        """Raise `UserError` if the process does not have the grid's noise levels."""
        self.levels(process)

    # --- The table

    def ends(self, process: Process) -> tuple[float, float]:
        """Return the lowest and highest noise level of the grid.

        Raises:
          UserError: the network does not know them, or nothing is left between them.
        """
        knows = process.sigma_range
        wanted = {"sigma_min": self.sigma_min, "sigma_max": self.sigma_max}
        for name, sigma in wanted.items():
            if sigma and not knows[0] <= sigma <= knows[1]:
                raise UserError(
                    f"config key sampling.sampler.{name} is {sigma:g}, outside of the noise levels "
                    f"that the network knows, {knows[0]:.4g} to {knows[1]:.4g}: choose one of these"
                )
        own = RANGES[self.grid] or VP(epsilon=self.time_min).sigma_range
        low = self.sigma_min or max(own[0], knows[0])
        high = self.sigma_max or min(own[1], knows[1])
        if not low < high:
            raise UserError(
                f"config key sampling.sampler.grid is {self.grid}: from {high:g} down to {low:g} "
                "there are no noise levels; change sigma_min or sigma_max"
            )
        return low, high

    def path(self, process: Process) -> Path:
        """Return schedule and scaling."""
        sigma, slope, time = _schedule(self.schedule, *self.ends(process), self.time_min)
        if self.scaling == "none":
            return Path(sigma, slope, time, np.ones_like, np.zeros_like)

        def scale(t: np.ndarray) -> np.ndarray:
            return 1 / np.sqrt(1 + sigma(t) ** 2)

        return Path(sigma, slope, time, scale, lambda t: -sigma(t) * slope(t) * scale(t) ** 3)

    def levels(self, process: Process) -> np.ndarray:
        """Return the grid's noise levels but the last 0, (N,) float64 descending, rounded.

        Raises:
          UserError: as `ends`, or there are fewer levels than steps.
        """
        low, high = self.ends(process)
        fraction = np.arange(self.num_steps) / (self.num_steps - 1)
        if self.grid == "edm":
            sigma = sampling_grid(low, high, self.rho, self.num_steps)[:-1]
        elif self.grid == "vp":
            sigma = _schedule("vp", low, high, self.time_min)[0](1 + fraction * (self.time_min - 1))
        elif self.grid == "ve":
            sigma = high * (low / high) ** fraction
        else:
            levels = cosine_levels(*_IDDPM)
            levels = levels[(levels >= low) & (levels <= high)]
            sigma = (
                levels[np.rint((len(levels) - 1) * fraction).astype(int)] if len(levels) else levels
            )
        return known_levels(process, sigma)

    def draw(
        self,
        process: Process,
        guided: Guided,
        noise: Noise,
        conditioning: Conditioning,
        frames: int = 0,
    ) -> SamplerOutput:
        """Draw samples by a Runge-Kutta method of second order (Algorithm 3), with EDM's churn.

        A step from t_i to t_{i+1}, with f(x, t) the right-hand side of this file's equation:

            t̂ where σ(t̂) = σ(t_i) + gamma σ(t_i)                       `churned`
            x̂ = s(t̂)/s(t_i) x + √(σ(t̂)² - σ(t_i)²) s(t̂) S_noise eps
            d = f(x̂, t̂),  x' = x̂ + alpha h d  where h = t_{i+1} - t̂
            d' = f(x', t̂ + alpha h)
            x = x̂ + h ((1 - 1/(2 alpha)) d + 1/(2 alpha) d')

        The last step, and each of "euler", is x̂ + h d. Arguments as of `SamplingMethod.draw`.

        Returns:
          x (B, H, W, C) at σ = 0, or a pytree like `noise(0)`, and the frames.
        """
        path = self.path(process)
        t = np.append(path.time(self.levels(process)), 0.0)
        sigma = path.sigma(t[:-1])
        lifted = process.round_sigma(self.churned(sigma))
        t_hat = np.where(lifted > sigma, path.time(lifted), t[:-1])
        h = t[1:] - t_hat
        of_second = 1 / (2 * self.alpha)

        # A row for each evaluation: its level, how x gets there, and the step after it.
        #   x_start = stretch x + fresh noise          (of a correction: that of its prediction)
        #   slope = of_x x - of_denoised D(shrink x; level)
        #   x = x_start + by_first first_slope + by_slope slope
        def row(at: float, predicts: bool, stretch: float, fresh: float, *by: float) -> list[float]:
            sigma, slope, _, scale, scale_slope = (f(np.array([at]))[0] for f in path)
            of_x, of_denoised = slope / sigma + scale_slope / scale, slope * scale / sigma
            return [predicts, stretch, fresh, 1 / scale, sigma, of_x, of_denoised, *by]

        rows: list[list[float]] = []
        for step in range(self.num_steps):
            here, hat = t[step : step + 1], t_hat[step : step + 1]
            stretch = (path.scale(hat) / path.scale(here))[0]
            added = np.maximum(path.sigma(hat) ** 2 - path.sigma(here) ** 2, 0.0)
            fresh = (np.sqrt(added) * path.scale(hat) * self.churn_noise)[0]
            second = self.solver == "heun" and step < self.num_steps - 1
            first = self.alpha * h[step] if second else h[step]
            rows.append(row(hat[0], True, stretch, fresh, 0.0, first))
            if second:
                at = hat[0] + self.alpha * h[step]
                rows.append(
                    row(at, False, 1.0, 0.0, h[step] * (1 - of_second), h[step] * of_second)
                )
        evaluations = 2 if self.solver == "heun" else 1

        x = noise(0)
        dtype = jax.tree.leaves(x)[0].dtype
        table = jnp.asarray(rows, dtype)

        def body(index: jax.Array, carry: Carry, network: Denoiser) -> tuple[Carry, Any]:
            x, start, first_slope = carry
            predicts, stretch, fresh, shrink, level, of_x, of_denoised, by_first, by_slope = table[
                index
            ]
            x = tree_map(lambda x: stretch * x, x)
            if self.churn_amount:
                x = tree_map(lambda x, z: x + fresh * z, x, noise(index // evaluations + 1))
            start = tree_map(lambda x, start: jnp.where(predicts == 1, x, start), x, start)
            shrunk = tree_map(lambda x: shrink * x, x)
            denoised = network(shrunk, at_level(x, level), conditioning)
            slope = tree_map(lambda x, clean: of_x * x - of_denoised * clean, x, denoised)
            x = tree_map(
                lambda start, one, two: start + by_first * one + by_slope * two,
                start,
                first_slope,
                slope,
            )
            return (x, start, slope), denoised

        first = t[:1]
        scale = jnp.asarray((path.sigma(first) * path.scale(first))[0], dtype)
        x = tree_map(lambda x: x * scale, x)
        carry = x, x, tree_map(jnp.zeros_like, x)
        step_sigma = np.repeat(sigma, evaluations)[: len(rows)]
        seen = frame_indices(self.num_steps, frames, evaluations)
        levels = np.array(rows)[:, 4]
        carry, kept = sampling_loop(guided, body, carry, levels, seen, step_sigma=step_sigma)
        return SamplerOutput(carry[0], kept)


def _schedule(
    name: str, low: float, high: float, time_min: float
) -> tuple[_Function, _Function, _Function]:
    """Return σ(t), its derivative and its inverse, each on (n,) float64.

    Args:
      name: "linear", "vp" or "ve".
      low: noise level that "vp" has at `time_min`.
      high: noise level that "vp" has at time 1.
      time_min: of "vp", its earliest time.
    """
    if name == "linear":
        return np.copy, np.ones_like, np.copy
    if name == "ve":
        return np.sqrt, lambda t: 0.5 / np.sqrt(t), np.square
    of_low, of_high = math.log1p(low**2), math.log1p(high**2)
    beta_d = 2 * (of_low / time_min - of_high) / (time_min - 1)
    beta_min = of_high - beta_d / 2

    def sigma(t: np.ndarray) -> np.ndarray:
        return np.sqrt(np.expm1(0.5 * beta_d * t**2 + beta_min * t))

    def slope(t: np.ndarray) -> np.ndarray:
        return 0.5 * (beta_min + beta_d * t) * (sigma(t) + 1 / sigma(t))

    def time(sigma: np.ndarray) -> np.ndarray:
        return (np.sqrt(beta_min**2 + 2 * beta_d * np.log1p(sigma**2)) - beta_min) / beta_d

    return sigma, slope, time
