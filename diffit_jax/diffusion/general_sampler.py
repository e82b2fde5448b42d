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
import functools
import math
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, NamedTuple

import numpy as np

from diffit_jax import limits
from diffit_jax.diffusion.edm import sampling_grid
from diffit_jax.diffusion.flow import HIGHEST_SIGMA, Flow
from diffit_jax.diffusion.guidance import Guided
from diffit_jax.diffusion.loop import SamplerOutput
from diffit_jax.diffusion.preconditioning import EDM_RANGE, VP, cosine_levels, known_levels
from diffit_jax.diffusion.runge_kutta import Row, follow_velocity, integrate, runge_kutta_steps
from diffit_jax.diffusion.samplers import DenoiserSampler, StepsOfGrid, StochasticMixin
from diffit_jax.diffusion.types import Conditioning, Noise, Process
from diffit_jax.errors import UserError
from diffit_jax.limits import LATER, GridPower, above, at_least, one_of

# From and to which noise level a grid goes by itself; "vp": those of `VP` from `time_min` on.
RANGES = {
    "edm": EDM_RANGE,
    "vp": None,
    "ve": (0.02, 100.0),
    "iddpm": (0.002, 81.0),
    "flow": (0.0, HIGHEST_SIGMA),
}
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
        (even in ln sigma), "iddpm" (levels of improved DDPM's cosine schedule) or "flow" (even in
        the time of the process flow, before it is shifted).
      sigma_min: lowest noise level of the grid; 0: its own, within what the network knows.
      sigma_max: highest noise level of the grid; 0: likewise.
      rho: of the grid "edm".
      schedule: sigma(t): "linear" (t), "vp" (√(exp(½ beta_d t² + beta_min t) - 1), fitted to the
        ends of the grid), "ve" (√t) or "flow" (that of the process flow, with its scaling alpha(t):
        steps follow its velocities, as those of the samplers "heun" and "euler" do).
      scaling: s(t): "none" (1) or "vp" (1 / √(1 + sigma²)).
      time_min: ε_s, the earliest time of the grid and the schedule "vp".
      churn_amount: S_churn, spread over the steps; 0: none.
      churn_sigma_low: S_min, the lowest noise level with churn.
      churn_sigma_high: S_max, the highest noise level with churn.
      churn_noise: S_noise, standard deviation of the fresh noise relative to its nominal value.
      shift: of the grid "flow", in place of `process.sampling_shift`; 0: that.
      correct_last: whether the last step has a second evaluation too (2N evaluations), as SiT's
        "heun2" and "midpoint" have; at the clean end with `alpha` 1, where velocities alone are
        known.
    """

    name: ClassVar[str] = "general"

    num_steps: StepsOfGrid
    solver: Annotated[str, one_of("heun", "euler")] = "heun"
    alpha: Annotated[float, limits.Limits(gt=0, le=1)] = 1.0
    grid: Annotated[str, one_of(*RANGES)] = "edm"
    sigma_min: Annotated[float, at_least(0)] = 0.0
    sigma_max: Annotated[float, at_least(0)] = 0.0
    rho: GridPower = 7.0
    schedule: Annotated[str, one_of("linear", "vp", "ve", "flow")] = "linear"
    scaling: Annotated[str, one_of("none", "vp")] = "none"
    time_min: Annotated[float, above(0, below=1)] = 1e-3
    churn_amount: Annotated[float, at_least(0)] = 0.0
    churn_sigma_low: Annotated[float, at_least(0)] = 0.0
    churn_sigma_high: Annotated[float, at_least(0, infinite=True)] = math.inf
    churn_noise: Annotated[float, at_least(0)] = 1.0
    shift: Annotated[float, at_least(0), LATER] = 0.0
    correct_last: Annotated[bool, LATER] = False

    def check(self, process: Process) -> None:
        """Raise `UserError` if the process does not have the grid's noise levels, or the path."""
        for key in ("grid", "schedule"):
            if getattr(self, key) == "flow" and not isinstance(process, Flow):
                raise UserError(
                    f"config key sampling.sampler.{key} is flow, which needs the process flow: use "
                    "another one"
                )
        along_flow = self.schedule == "flow"
        if along_flow and self.scaling != "none":
            raise UserError(
                f"config key sampling.sampler.scaling is {self.scaling}, but the schedule flow has "
                "its own: set it to none"
            )
        if self.shift and self.grid != "flow":
            raise UserError(
                f"config key sampling.sampler.shift is {self.shift:g}, which only the grid flow "
                "has: set it to 0"
            )
        by_velocity = along_flow and getattr(process, "prediction", "") == "velocity"
        at_end = self.solver == "heun" and self.alpha == 1
        if self.correct_last and at_end and not by_velocity:
            raise UserError(
                "config key sampling.sampler.correct_last evaluates at the clean end, where only "
                "velocities are known: set alpha below 1, or schedule to flow with such a network"
            )
        self.levels(process)

    def follows_velocity(self, process: Process) -> bool:
        """Whether it goes along a flow's path."""
        return self.schedule == "flow"

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
        if self.grid == "flow" and isinstance(process, Flow):
            return self._flow_levels(process, low, high)
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

    def _flow_levels(self, process: Flow, low: float, high: float) -> np.ndarray:
        """Return levels even in the (shifted) time of a flow, as `levels`."""
        if not (self.sigma_min or self.sigma_max):
            sigma = process.sigma_of(process.sampling_times(self.num_steps, self.shift)[:-1])
            return np.minimum(sigma, HIGHEST_SIGMA * process.sigma_data)
        shift = self.shift or process.sampling_shift
        first, last = process.shifted(process.time_of(np.array([high, low])), 1 / shift)
        count = self.num_steps - (1 if self.sigma_min else 0)  # from the lowest level to 0
        even = np.linspace(first, last, count + 1)[: self.num_steps]
        return process.sigma_of(process.shifted(even, shift))

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

        The last step (without `correct_last`), and each of "euler", is x̂ + h d. Along the path of
        a flow, f is its velocity. Arguments as of `SamplingMethod.draw`.

        Returns:
          x (B, H, W, C) at σ = 0, or a pytree like `noise(0)`, and the frames.
        """
        if self.schedule == "flow" and isinstance(process, Flow):
            return self._draw_flow(process, guided, noise, conditioning, frames)
        path = self.path(process)
        t = np.append(path.time(self.levels(process)), 0.0)
        sigma = path.sigma(t[:-1])
        lifted = process.round_sigma(self.churned(sigma))
        t_hat = np.where(lifted > sigma, path.time(lifted), t[:-1])
        added = np.maximum(path.sigma(t_hat) ** 2 - path.sigma(t[:-1]) ** 2, 0.0)
        fresh = np.sqrt(added) * path.scale(t_hat) * self.churn_noise
        stretch = path.scale(t_hat) / path.scale(t[:-1])
        rows = runge_kutta_steps(
            functools.partial(_denoiser_row, path),
            t,
            moved=list(zip(t_hat, stretch, fresh, strict=True)),
            **self._method(),
        )
        return integrate(
            guided,
            rows,
            noise,
            conditioning,
            start=(path.sigma(t[:1]) * path.scale(t[:1]))[0],
            step_sigma=sigma,
            evaluations=2 if self.solver == "heun" else 1,
            frames=frames,
        )

    def _draw_flow(
        self, process: Flow, guided: Guided, noise: Noise, conditioning: Conditioning, frames: int
    ) -> SamplerOutput:
        """Draw samples along a flow's own path, by its velocities."""
        if self.grid == "flow" and not (self.sigma_min or self.sigma_max):
            t = process.sampling_times(self.num_steps, self.shift)
        else:
            t = np.append(process.time_of(self.levels(process)), process.interval()[0])
        sigma = process.sigma_of(t[:-1])
        lifted = self.churned(sigma)
        moved = []
        for here, now, new in zip(t[:-1].tolist(), sigma.tolist(), lifted.tolist(), strict=True):
            if not new > now:
                moved.append((here, 1.0, 0.0))
                continue
            hat = process.time_of(np.array(new))
            of_hat, of_here = (process.interpolant.at(np.array(each)).alpha for each in (hat, here))
            added = math.sqrt(new**2 - now**2) * of_hat * self.churn_noise
            moved.append((float(hat), float(of_hat / of_here), float(added)))
        given = process, guided, noise, conditioning, t
        return follow_velocity(*given, frames=frames, moved=moved, **self._method())

    def _method(self) -> dict[str, Any]:
        """Return the settings of `runge_kutta_steps`."""
        second = self.solver == "heun"
        return {"second": second, "alpha": self.alpha, "correct_last": self.correct_last}


def _denoiser_row(path: Path, t: float, by_slope: float, **further: float) -> Row:
    """Return the row of an evaluation of the denoiser D(x / s; σ) at time t."""
    sigma, slope, _, scale, scale_slope = (function(np.array([t]))[0] for function in path)
    of_x, of_denoised = slope / sigma + scale_slope / scale, slope * scale / sigma
    return Row(sigma, sigma, of_x, -of_denoised, by_slope, shrink=1 / scale)._replace(**further)


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
