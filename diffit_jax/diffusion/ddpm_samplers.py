"""Samplers of discrete-time diffusion: ancestral sampling (DDPM) and DDIM, down the schedule.

Shape suffixes: B batch, H, W, C height, width and channels of a sample.
"""

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from diffit_jax import limits
from diffit_jax.diffusion.ddpm import DDPM, Prediction
from diffit_jax.diffusion.guidance import Guided
from diffit_jax.diffusion.samplers import Carry, Drawn, Steps, at_level, descend, tree_map, watched
from diffit_jax.diffusion.schedule import Schedule
from diffit_jax.diffusion.seams import Conditioning, Network, Noise, Process
from diffit_jax.errors import UserError
from diffit_jax.limits import at_least

# (prediction of step k, x_k, k, noise z) → x_{k-1}
Update = Callable[[Prediction, jax.Array, jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Ancestral:
    """Ancestral sampling of DDPM: x_{k-1} = mean + exp(½ ln variance) z from the last step to the
    first, whose z is 0. K evaluations.

    Attributes:
      num_steps: K, spread over the schedule.
      respacing: in place of `num_steps`: "250", "10,10,5" or "ddim50", see `respaced_timesteps`.
      clip_denoised: whether to clip the estimate of the clean sample to [-1, 1]: for images, not
        for latents, which have no such bounds.
    """

    name: ClassVar[str] = "ddpm"
    # Given on the command line, the one takes the place of the config's other.
    alternatives: ClassVar[tuple[str, str]] = ("num_steps", "respacing")

    num_steps: Steps
    respacing: str = ""
    clip_denoised: bool = False

    def __post_init__(self):
        limits.check(self, "sampling.sampler")

    def check(self, process: Process) -> None:
        if not isinstance(process, DDPM):
            raise UserError(
                f"config key sampling.sampler.name is {self.name}, which needs the process ddpm: "
                "use euler, heun or dpm_solver"
            )
        self.schedule(process)

    def schedule(self, process: DDPM) -> Schedule:
        """The K steps of the process that are taken."""
        return process.schedule_for(self.respacing or str(self.num_steps))

    def steps(self, process: DDPM) -> int:
        return len(self.schedule(process))

    def evaluated(self, process: Process, network: Network) -> Network:
        return network

    def draw(
        self,
        process: DDPM,
        guided: Guided,
        noise: Noise,
        conditioning: Conditioning,
        frames: int = 0,
    ) -> Drawn:
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

        sigma, seen = schedule.sqrt_recipm1_alphas_cumprod[::-1], watched(len(schedule), frames)
        carry, kept = descend(guided, body, (noise(0),), sigma, seen)
        return Drawn(carry[0], kept)

    def update(self, schedule: Schedule) -> Update:
        """The step from x_k to x_{k-1}."""

        def update(p: Prediction, x_BHWC: jax.Array, k: jax.Array, z_BHWC: jax.Array) -> jax.Array:
            return p.mean + jnp.where(k > 0, jnp.exp(0.5 * p.log_variance) * z_BHWC, 0.0)

        return update


@dataclasses.dataclass(frozen=True)
class DDIM(Ancestral):
    """DDIM (Song et al. 2021, Eq. 12), K evaluations:

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
