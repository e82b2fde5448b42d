"""Stochastic samplers of flows, as in SiT (Ma et al. 2024, §2.2) and REPA.

With u = 1 - t, the stochastic differential equation

    dz = (dz/du + w score) du + √(2 w) dW

has the same marginals as the flow for every w(u) >= 0. SiT's code evaluates the network for the
drift and again for the score; the score follows from the velocity, so here once is enough.

Shape suffixes: B batch, H, W, C height, width and channels.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Annotated, ClassVar

import numpy as np

from diffit_jax.diffusion.flow import Flow
from diffit_jax.diffusion.guidance import Guided
from diffit_jax.diffusion.loop import SamplerOutput
from diffit_jax.diffusion.runge_kutta import Row, integrate, velocity_row
from diffit_jax.diffusion.samplers import DenoiserSampler, StepsOfGrid
from diffit_jax.diffusion.types import Conditioning, Noise, Process
from diffit_jax.errors import UserError
from diffit_jax.limits import above, at_least, one_of

# Half of what the paper writes: there the noise is √w dW.
DIFFUSIONS: dict[str, Callable[[Flow, float, float], float]] = {
    "sigma": lambda process, t, n: n * float(process.interpolant.at(np.array(t)).noise),
    "linear": lambda process, t, n: n * t,
    "decreasing": lambda process, t, n: (n * math.cos(math.pi * (1 - t)) + 1) ** 2 / 4,
    "increasing_decreasing": lambda process, t, n: n * math.sin(math.pi * t) ** 2,
    "sbdm": lambda process, t, n: n * float(process.interpolant.diffusion(np.array(t))),
}


@dataclasses.dataclass(frozen=True)
class SDE(DenoiserSampler):
    """SiT's stochastic samplers, for the process flow; REPA's is `diffusion` "linear".

    Steps are even in the (shifted) time from noise to `last_size`; then one more, without noise.
    SiT counts N points, which are the N steps here (without a last one, N - 1).

    Attributes:
      num_steps: N, the steps from noise to a sample, with the last one.
      solver: "euler" (Euler-Maruyama, N evaluations), or "heun", where noise is added before a Heun
        step of the drift (2N - 1; 2N where `last` is "none").
      diffusion: w: "sigma" (s), "linear" (t), "decreasing" (¼ (n cos πu + 1)²),
        "increasing_decreasing" (sin² πu) or "sbdm" (g² / 2, infinite at t = 1 but on the path vp).
      diffusion_norm: n, times which w is taken (within the square of "decreasing").
      last: the last step: "mean" (of the drift), "tweedie" (to the estimate of clean data), "euler"
        (of the velocity), or "none": all steps are stochastic.
      last_size: the time at which it starts.
      shift: in place of `process.sampling_shift`; 0: that.
    """

    name: ClassVar[str] = "sde"

    num_steps: StepsOfGrid
    solver: Annotated[str, one_of("euler", "heun")] = "euler"
    diffusion: Annotated[str, one_of(*DIFFUSIONS)] = "sigma"
    diffusion_norm: Annotated[float, above(0)] = 1.0
    last: Annotated[str, one_of("mean", "tweedie", "euler", "none")] = "mean"
    last_size: Annotated[float, above(0, below=1)] = 0.04
    shift: Annotated[float, at_least(0)] = 0.0

    def check(self, process: Process) -> None:
        """Raise `UserError` unless the process is a flow with such a diffusion."""
        if not isinstance(process, Flow):
            raise UserError(
                "config key sampling.sampler.name is sde, which needs the process flow: use euler, "
                "heun, dpm_solver or general"
            )
        low, high = process.interval()
        if self.last != "none" and not low < self.last_size < high:
            raise UserError(
                f"config key sampling.sampler.last_size is {self.last_size:g}, which lies outside "
                f"of the times t of the process, {low:g} to {high:g}: choose one between"
            )
        t = self.times(process)
        with np.errstate(divide="ignore"):
            first = self.weight(process, float(t[0]))
        if not first < 1e6:
            raise UserError(
                f"config key sampling.sampler.diffusion is {self.diffusion}, which is infinite at "
                f"the start of the path {process.path}: use sigma, linear or decreasing"
            )

    def follows_velocity(self, process: Process) -> bool:
        """Whether it evaluates the velocity: always."""
        return True

    def times(self, process: Flow) -> np.ndarray:
        """Return the times of the stochastic steps, (n + 1,) float64 descending."""
        if self.last == "none":
            return process.sampling_times(self.num_steps, self.shift)
        return process.sampling_times(self.num_steps - 1, self.shift, self.last_size)

    def weight(self, process: Flow, t: float) -> float:
        """Return w at a time."""
        return DIFFUSIONS[self.diffusion](process, t, self.diffusion_norm)

    def draw(
        self,
        process: Flow,
        guided: Guided,
        noise: Noise,
        conditioning: Conditioning,
        frames: int = 0,
    ) -> SamplerOutput:
        """Draw samples; arguments as of `SamplingMethod.draw`.

        A step from u to u + h, with f = dz/du + w score:

            euler   z + h f(z, u) + √(2 w(u) h) eps
            heun    x̂ = z + √(2 w(u) h) eps,  x̂ + h/2 (f(x̂, u) + f(x̂ + h f(x̂, u), u + h))

        Returns:
          x (B, H, W, C) after the last step, or a pytree like `noise(0)`, and the frames.
        """
        t, scale = self.times(process).tolist(), process.sigma_data
        rows: list[Row] = []
        for here, there in itertools.pairwise(t):
            h = here - there
            spread = scale * math.sqrt(2 * self.weight(process, here) * h)
            if self.solver == "euler":
                rows.append(self._drift_row(process, here, h, after=spread))
            else:
                rows.append(self._drift_row(process, here, h, fresh=spread))
                by = {"by_first": h / 2, "predicts": 0.0}
                rows.append(self._drift_row(process, there, h / 2, **by))
        starts = t[:-1]
        if self.last != "none":
            rows.append(self._last_row(process, t[-1]))
            starts = t
        return integrate(
            guided,
            rows,
            noise,
            conditioning,
            start=process.start_std,
            step_sigma=process.sigma_of(np.array(starts)),
            evaluations=2 if self.solver == "heun" else 1,
            frames=frames,
        )

    def _drift_row(self, process: Flow, t: float, by_slope: float, **further: float) -> Row:
        """Return the row of an evaluation at t, whose slope is the drift f."""
        place = process.interpolant.at(np.array(t))
        share = self.weight(process, t) / float(place.noise)
        # score = -epsilon / s, and epsilon = (alpha' z - alpha v) / turn with v = dz/dt.
        of_x = -share * place.alpha_slope / place.turn
        of_y = share * place.alpha / place.turn - 1
        row = velocity_row(process, t, by_slope, **further)
        return row._replace(of_x=float(of_x), of_y=float(of_y))

    def _last_row(self, process: Flow, t: float) -> Row:
        """Return the row of the last step, from t to clean data."""
        if self.last == "mean":
            return self._drift_row(process, t, t)
        row = velocity_row(process, t, -t)
        if self.last == "euler":
            return row
        return row._replace(of_x=row.shows_x - 1, of_y=row.shows_y, by_slope=1.0)  # x + (D - x)
