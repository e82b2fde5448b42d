"""EDM's preconditioning and training loss (Karras et al. 2022), and the base of such processes.

"Elucidating the design space of diffusion-based generative models" writes older processes in the
same form (`preconditioning` has them). A `network(x_BHWC, noise_level_B, conditioning) -> y_BHWC`
is turned into a denoiser D(x; sigma), which estimates the clean image in a noisy one with noise of
standard deviation sigma.

Shape suffixes: B batch, H, W, C height, width and channels.
"""

import dataclasses
import math
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from diffit_jax import limits
from diffit_jax.diffusion.schedule import Schedule
from diffit_jax.diffusion.types import Conditioning, Network, Noised, Process, of_outputs
from diffit_jax.errors import UserError
from diffit_jax.limits import GridPower, NoiseLevel, at_least


def sampling_grid(sigma_min: float, sigma_max: float, rho: float, num_steps: int) -> np.ndarray:
    """Return EDM's noise levels (Eq. 5), (N + 1,) float64, from sigma_max to sigma_min, then 0.

    t_i = (sigma_max^(1/rho) + i/(N-1) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho for i < N.

    Raises:
      UserError: `num_steps` N is below 2.
    """
    if num_steps < 2:
        raise UserError(
            f"num_steps {num_steps} is too small: the sampling grid needs at least 2 steps"
        )
    first, last = np.array([sigma_max, sigma_min]) ** (1 / rho)
    return np.append(np.linspace(first, last, num_steps) ** rho, 0.0)


class Preconditioned(Process):
    """A process in the form of EDM's Table 1: D(x; sigma) = c_skip x + c_out F(c_in x; c_noise).

    It is trained at noise levels drawn from a distribution, with a weight for each level.
    """

    def preconditioning(
        self, sigma: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Return (c_skip, c_out, c_in, c_noise) of EDM Table 1, each shaped like `sigma` (> 0)."""
        raise NotImplementedError

    def draw_sigma(self, key: jax.Array) -> jax.Array:
        """Draw a noise level to train at, a float32 scalar."""
        raise NotImplementedError

    def draw_level(self, key: jax.Array) -> jax.Array:
        """Draw what `noised_at` takes, a float32 scalar: sigma; of a flow, its time."""
        return self.draw_sigma(key)

    def loss_weight(self, sigma: jax.Array) -> jax.Array:
        """Return lambda(sigma) > 0, shaped like `sigma`."""
        raise NotImplementedError

    def denoise(
        self, network: Network, x_BHWC: jax.Array, sigma_B: jax.Array, conditioning: Conditioning
    ) -> jax.Array:
        """Compute D(x; sigma) = c_skip x + c_out F(c_in x; c_noise), EDM Eq. 7, in float32.

        Args:
          network: F, called once. Of its output the first C channels count.
          x_BHWC: (B, H, W, C) float32 noisy images, clean image plus noise of standard deviation
            sigma; or a dict of such.
          sigma_B: (B,) float32 > 0.
          conditioning: passed on to the network.

        Returns:
          (B, H, W, C) float32 estimate of the clean images, whatever the network computes in; of
          a network that returns a tuple of outputs, a tuple of such.
        """
        c_skip, c_out, c_in, c_noise = self.preconditioning(sigma_B)

        def combined(x_BHWC: jax.Array, f_BHWC: jax.Array) -> jax.Array:
            return _combined(c_skip, x_BHWC, c_out, f_BHWC)

        seen = jax.tree.map(lambda x_BHWC: per_image(c_in) * x_BHWC, x_BHWC)
        return of_outputs(combined, x_BHWC, network(seen, c_noise, conditioning))

    def noise(self, x_BHWC: jax.Array, key_B: jax.Array) -> Noised:
        """Draw sigma and noise n ~ N(0, sigma²), EDM Eq. 8; see `Process.noise`."""
        level_key_B, noise_key_B = jax.vmap(jax.random.split, out_axes=1)(key_B)
        level_B = jax.vmap(self.draw_level)(level_key_B)
        noise_BHWC = jax.vmap(lambda key: jax.random.normal(key, x_BHWC.shape[1:]))(noise_key_B)
        return self.noised_at(x_BHWC, level_B, noise_BHWC)

    def noised_at(self, x_BHWC: jax.Array, sigma_B: jax.Array, noise_BHWC: jax.Array) -> Noised:
        """Compute `noise` at given noise levels (B,), with given standard normal noise."""
        noisy = x_BHWC + per_image(sigma_B) * noise_BHWC
        _, _, c_in, c_noise = self.preconditioning(sigma_B)
        draws = {"sigma": sigma_B, "noise": noise_BHWC, "noisy": noisy}
        return Noised(per_image(c_in) * noisy, c_noise, x_BHWC, self.loss_weight(sigma_B), draws)

    def loss_of(self, noised: Noised, y_BHWC: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Compute lambda(sigma) ‖D(x + n; sigma) - x‖², EDM Eq. 8.

        Returns:
          (B,) float32 loss, the weighted squared error *averaged* over H, W and C. EDM's code sums
          over them and averages over the batch, which is H·W·C times as much: Adam does not see the
          constant, apart from its epsilon. And a dict of further (B,) values to report, empty here.
        """
        c_skip, c_out, _, _ = self.preconditioning(noised.draws["sigma"])
        denoised = _combined(c_skip, noised.draws["noisy"], c_out, y_BHWC)
        error_B = jnp.mean((denoised - noised.target_BHWC) ** 2, axis=(1, 2, 3))
        return noised.weight_B * error_B, {}

    @property
    def loss_terms(self) -> tuple[str, ...]:
        """Names of the terms that `loss` reports with the loss."""
        return ()

    @property
    def trains(self) -> bool:
        """Whether training uses this process: always."""
        return True

    def output_channels(self, channels: int) -> int:
        """Return how many channels a network must return for data with `channels`."""
        return channels

    @property
    def sigma_range(self) -> tuple[float, float]:
        """The lowest and the highest noise level that the network knows."""
        return 0.0, math.inf

    def round_sigma(self, sigma: np.ndarray) -> np.ndarray:
        """Return the nearest noise levels that the network knows, (n,) float64; here sigma."""
        return sigma

    def time_of(self, sigma: np.ndarray) -> np.ndarray:
        """Return the time t / T at which DDPM's linear schedule of T = 1000 has noise level sigma.

        For guidance that depends on it. In [0, 1), shaped like sigma.
        """
        return Schedule.make("linear", 1000).timestep_of(sigma) / 1000


def per_image(c_B: jax.Array) -> jax.Array:
    """Reshape (B,) numbers to multiply images, (B, 1, 1, 1)."""
    return c_B[:, None, None, None]


def _combined(
    c_skip: jax.Array, x_BHWC: jax.Array, c_out: jax.Array, f_BHWC: jax.Array
) -> jax.Array:
    """Return c_skip x + c_out F, in x's dtype (float32); of F's channels the first C count."""
    dtype = jnp.promote_types(jnp.float32, x_BHWC.dtype)
    f_BHWC = f_BHWC.astype(dtype)[..., : x_BHWC.shape[-1]]
    return per_image(c_skip) * x_BHWC + per_image(c_out) * f_BHWC


@dataclasses.dataclass(frozen=True)
class EDM(Preconditioned, limits.Section, name="process"):
    """EDM: preconditioning, loss and noise levels of Karras et al. 2022.

    Attributes:
      sigma_data: standard deviation of the data, in the units of the image (here [-1, 1]).
      log_sigma_mean, log_sigma_std: training noise levels, ln sigma ~ N(mean, std²) (EDM's P_mean
        and P_std).
      sigma_min, sigma_max, rho: the sampling grid, see `sigmas`.
    """

    sigma_data: NoiseLevel = 0.5
    log_sigma_mean: Annotated[float, at_least(-20, le=20)] = -1.2
    log_sigma_std: Annotated[float, at_least(0, le=20)] = 1.2
    sigma_min: NoiseLevel = 0.002
    sigma_max: NoiseLevel = 80.0
    rho: GridPower = 7.0

    def __post_init__(self):
        super().__post_init__()
        if not self.sigma_min < self.sigma_max:
            raise UserError(
                f"sigma_min {self.sigma_min} must lie between 0 and sigma_max {self.sigma_max}: "
                "change either"
            )

    def preconditioning(
        self, sigma: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Return (c_skip, c_out, c_in, c_noise) of EDM Table 1, each shaped like `sigma` (> 0)."""
        total = jnp.sqrt(sigma**2 + self.sigma_data**2)
        return (
            (self.sigma_data / total) ** 2,
            sigma * self.sigma_data / total,
            1 / total,
            jnp.log(sigma) / 4,
        )

    def loss_weight(self, sigma: jax.Array) -> jax.Array:
        """Return (sigma² + sigma_data²) / (sigma sigma_data)² = 1 / c_out², shaped like sigma."""
        return (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2

    def draw_sigma(self, key: jax.Array) -> jax.Array:
        """Draw sigma with ln sigma ~ N(log_sigma_mean, log_sigma_std²), a float32 scalar."""
        return jnp.exp(self.log_sigma_mean + self.log_sigma_std * jax.random.normal(key))

    def sigmas(self, num_steps: int) -> np.ndarray:
        """Return EDM's sampling grid (Eq. 5), (N + 1,) float64: sigma_max to sigma_min, then 0."""
        return sampling_grid(self.sigma_min, self.sigma_max, self.rho, num_steps)
