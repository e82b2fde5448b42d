"""The sampler of flow maps: one to four steps, each one evaluation.

Shape suffixes: B batch, H, W, C height, width and channels.
"""

import dataclasses
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from diffit_jax.diffusion.flow_map import FlowMap
from diffit_jax.diffusion.guidance import Guided
from diffit_jax.diffusion.loop import (
    Carry,
    SamplerOutput,
    at_level,
    frame_indices,
    sampling_loop,
    tree_map,
)
from diffit_jax.diffusion.samplers import DenoiserSampler, Steps
from diffit_jax.diffusion.types import TOLD_GUIDANCE, Conditioning, Network, Noise, Process
from diffit_jax.errors import UserError
from diffit_jax.limits import at_least, fraction

MOST_STEPS = 100  # a flow is followed as well with so many
_PUBLISHED = 4


@dataclasses.dataclass(frozen=True)
class MapSampler(DenoiserSampler, name="sampling.sampler"):
    """Steps of a flow map (process `flow_map`), N evaluations.

    With u = u(z, t, r), from t to the next time r:

        z ← z - (t - r) u(z, t, r)                                  MeanFlow, Euler's on the map
        x̂ = z - t u(z, t, 0),  z ← (1 - r) x̂ + r epsilon            `restart`, on the linear path

    Attributes:
      num_steps: N; maps are trained for 1 to 4.
      restart: whether every step goes to clean data, to which fresh noise is added.
      shift: in place of `process.sampling_shift`; 0: that.
      told_scale: that a map is told which was trained with `process.guidance_told`; 1: none.
      told_low, told_high: times between which it acts.
    """

    name: ClassVar[str] = "map"

    num_steps: Steps
    restart: bool = False
    shift: Annotated[float, at_least(0)] = 0.0
    told_scale: Annotated[float, at_least(1)] = 1.0
    told_low: Annotated[float, fraction()] = 0.0
    told_high: Annotated[float, fraction()] = 1.0

    def check(self, process: Process) -> None:
        """Raise `UserError` unless the process is a map that can be sampled so."""
        if not isinstance(process, FlowMap):
            raise UserError(
                "config key sampling.sampler.name is map, which needs the process flow_map, a "
                "network trained to jump: use euler, heun or dpm_solver, or make a map of the "
                "network (diffit convert --config imagenet256_map)"
            )
        if self.num_steps > MOST_STEPS:
            raise UserError(
                f"config key sampling.sampler.num_steps is {self.num_steps}: a map is made for 1 "
                f"to {_PUBLISHED} steps, and takes at most {MOST_STEPS}; with so many follow its "
                "flow by euler or heun"
            )
        told = self.told_scale, self.told_low, self.told_high
        if told != (1, 0, 1) and not process.guidance_told:
            raise UserError(
                "config keys sampling.sampler.told_scale, told_low and told_high are for maps that "
                "are told guidance (process.guidance_told); what this one has was fixed in "
                "training: set them to 1, 0 and 1"
            )
        if self.told_scale > process.guidance_max and process.guidance_told:
            raise UserError(
                f"config key sampling.sampler.told_scale is {self.told_scale:g}, but the map was "
                f"trained with scales up to {process.guidance_max:g} (process.guidance_max)"
            )
        if not self.told_low <= self.told_high:
            raise UserError(
                f"config key sampling.sampler.told_low {self.told_low} must lie between 0 "
                f"and sampling.sampler.told_high {self.told_high}: change either"
            )
        if self.restart and process.path != "linear":
            raise UserError(
                f"config key sampling.sampler.restart is of the path linear, and process.path is "
                f"{process.path}: set it to False"
            )

    @property
    def note(self) -> str:
        """What to know of so many steps, "" if nothing."""
        if self.num_steps <= _PUBLISHED:
            return ""
        return f"{self.num_steps} steps of a map, which is made for 1 to {_PUBLISHED}"

    def model_fn(self, process: FlowMap, network: Network) -> Network:
        """Return `(x, t, conditioning) -> ` dx/dt averaged between t and the next time."""

        def mean_velocity(x_BHWC: Any, t_B: jax.Array, conditioning: Conditioning) -> Any:
            told = dict(conditioning)
            r_B = told.pop(_NEXT_TIME)
            found = process.between(network, x_BHWC / process.sigma_data, t_B, r_B, told)
            return jax.tree.map(lambda u_BHWC: process.sigma_data * u_BHWC, found)

        return mean_velocity

    def times(self, process: FlowMap) -> np.ndarray:
        """Return the times of the steps, (N + 1,) float64 descending."""
        return process.sampling_times(self.num_steps, self.shift)

    def draw(
        self,
        process: FlowMap,
        guided: Guided,
        noise: Noise,
        conditioning: Conditioning,
        frames: int = 0,
    ) -> SamplerOutput:
        """Draw samples by the steps above; arguments as of `SamplingMethod.draw`.

        Returns:
          x (B, H, W, C) after the last step, and the frames: z - t u, the estimates of clean data
          of a step to the end, else where the step's direction leads.
        """
        t = self.times(process)
        return jump(process, guided, noise, conditioning, t, told=self._told(process),
                    restart=self.restart, frames=frames)  # fmt: skip

    def _told(self, process: FlowMap) -> tuple[float, float, float] | None:
        if not process.guidance_told:
            return None
        return self.told_scale, self.told_low, self.told_high


_NEXT_TIME = "next_time"  # of a step, for `MapSampler.model_fn`


def jump(
    process: FlowMap,
    guided: Guided,
    noise: Noise,
    conditioning: Conditioning,
    t: np.ndarray,
    *,
    told: tuple[float, float, float] | None = None,
    restart: bool = False,
    frames: int = 0,
) -> SamplerOutput:
    """Take steps of a map at given times, (N + 1,) descending.

    Args:
      process: the map's.
      guided: what `MapSampler.model_fn` gives.
      noise: of the B samples (B, H, W, C); number i + 1 is that of step i, for `restart`.
      conditioning: of the B samples.
      t: the times.
      told: guidance that the map is told: scale, and the times between which it acts.
      restart: see `MapSampler`.
      frames: as of `SamplingMethod.draw`.

    Returns:
      x (B, H, W, C) at the last time, and the frames.
    """
    if not (np.diff(t) < 0).all():
        raise UserError(f"a map goes from noise to data: times {t.tolist()} must descend")
    start = noise(0)
    ends = np.full(len(t) - 1, t[-1]) if restart else t[1:]
    dtype = jax.tree.leaves(start)[0].dtype
    table = jnp.asarray(np.stack([t[:-1], ends, t[1:]], axis=1), dtype)
    if told is not None:
        count = len(jax.tree.leaves(start)[0])
        conditioning = {
            **conditioning,
            TOLD_GUIDANCE: jnp.tile(jnp.asarray(told, dtype), (count, 1)),
        }

    def body(step: jax.Array, carry: Carry, network: Network) -> tuple[Carry, Any]:
        (x,), (here, end, there) = carry, table[step]
        told = {**conditioning, _NEXT_TIME: at_level(x, end)}
        slope = network(x, at_level(x, here), told)
        shown = tree_map(lambda x, slope: x - here * slope, x, slope)
        x = tree_map(lambda x, slope: x - (here - end) * slope, x, slope)
        if restart:
            fresh = tree_map(lambda z: jnp.asarray(process.sigma_data * z, dtype), noise(step + 1))
            x = tree_map(
                lambda x, z: jnp.where(there > end, (1 - there) * x + there * z, x), x, fresh
            )
        return (x,), shown

    sigma = process.sigma_of(t[:-1])
    carry = (tree_map(lambda z: jnp.asarray(process.start_std, dtype) * z, start),)
    seen = frame_indices(len(sigma), frames)
    carry, kept = sampling_loop(guided, body, carry, sigma, seen)
    return SamplerOutput(carry[0], kept)
