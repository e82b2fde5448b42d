"""Discrete-time diffusion as in ADM and DiT: training loss, prediction, denoiser.

A `network(x_BHWC, timestep_B, conditioning) -> y_BHWC'` estimates the noise epsilon in x_t =
√alpha_bar x_0 + √(1 - alpha_bar) epsilon. With learned-range variance it has twice the channels:
epsilon, then v. It gets the original schedule's timestep 0…T-1, respaced or not. The samplers of
its own are `Ancestral` and `DDIM`; as a denoiser it serves EDM's samplers too.

Shape suffixes: B batch, H, W, C height, width and channels of a sample.
"""

import dataclasses
import functools
import math
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffit_jax import limits
from diffit_jax.diffusion.edm import sampling_grid
from diffit_jax.diffusion.schedule import SCHEDULES, Schedule
from diffit_jax.diffusion.types import Conditioning, Network, Noised, Process
from diffit_jax.errors import UserError
from diffit_jax.limits import GridPower, at_least, one_of

VARIANCES = ("learned_range", "fixed_large", "fixed_small")
LOSSES = ("hybrid", "hybrid_rescaled", "mse", "kl")


class Prediction(NamedTuple):
    """A network's output read for a step k: p(x_{k-1} | x_k), and the parts of x_k.

    All (B, H, W, C) float32.
    """

    mean: jax.Array
    log_variance: jax.Array
    x0: jax.Array
    epsilon: jax.Array


@dataclasses.dataclass(frozen=True)
class DDPM(Process, limits.Section, name="process"):
    """Discrete-time diffusion of ADM and DiT.

    Attributes:
      num_timesteps: T of the original schedule.
      schedule: "linear" or "cosine".
      variance: "learned_range": ln variance = f ln beta + (1 - f) ln beta~ with f = (v + 1) / 2; or
        fixed at beta ("fixed_large"; at beta~ in the first step) or at the posterior's beta~
        ("fixed_small").
      loss_type: "mse" of epsilon; "hybrid": mse + vb, where the variational bound vb of a step
        trains the variance alone (ADM, DiT); "hybrid_rescaled": mse + K / 1000 vb with K steps
        (improved DDPM); "kl": K vb.
      respacing: train on these timesteps only, see `respaced_timesteps`; "" is all.
      rho: of the grid for EDM's samplers, see `sigmas`.
    """

    num_timesteps: Annotated[int, at_least(2, le=1_000_000)] = 1000
    schedule: Annotated[str, one_of(*SCHEDULES)] = "linear"
    variance: Annotated[str, one_of(*VARIANCES)] = "learned_range"
    loss_type: Annotated[str, one_of(*LOSSES)] = "hybrid"
    respacing: str = ""
    rho: GridPower = 7.0

    def __post_init__(self):
        super().__post_init__()
        learned = self.variance == "learned_range"
        if self.loss_type != "kl" and learned != self.loss_type.startswith("hybrid"):
            remedy = "hybrid trains a learned variance" if learned else "mse needs a fixed variance"
            raise UserError(
                f"loss_type {self.loss_type} does not fit variance {self.variance}: {remedy}; "
                "change either"
            )
        if self.schedule_for().betas.max() >= 1:
            raise UserError(
                f"config key process.num_timesteps is {self.num_timesteps}: too few for the "
                f"{self.schedule} schedule, which "
                "would drown the data in a single step; use at least 21"
            )
        self.schedule_for(self.respacing)

    @property
    def loss_terms(self) -> tuple[str, ...]:
        """Names of the terms that `loss` reports with the loss."""
        return ("mse",) if self.loss_type == "mse" else ("mse", "vb")

    @property
    def trains(self) -> bool:
        """Whether training uses this process: always."""
        return True

    def output_channels(self, channels: int) -> int:
        """Return how many channels a network must return for data with `channels`."""
        return 2 * channels if self.variance == "learned_range" else channels

    @functools.lru_cache(maxsize=16)  # noqa: B019 (processes are few and small)
    def schedule_for(self, respacing: str = "") -> Schedule:
        """Return the schedule with all tables, respaced from the original T timesteps.

        Raises:
          UserError: more steps than timesteps, or not a respacing.
        """
        return Schedule.make(self.schedule, self.num_timesteps).respaced(respacing)

    # --- One step

    def predict(
        self,
        y_BHWC: jax.Array,
        x_BHWC: jax.Array,
        k_B: jax.Array,
        schedule: Schedule,
        clip: bool = False,
    ) -> Prediction:
        """Read the network's output as a Gaussian of x_{k-1} and estimates of x_0 and epsilon.

        Args:
          y_BHWC: (B, H, W, C or 2C) output of the network.
          x_BHWC: (B, H, W, C) x_k.
          k_B: (B,) int, the step in [0, K).
          schedule: tables of the K steps.
          clip: clip the estimate of x_0 to [-1, 1]; not for latents, which have no such bounds.
        """
        channels = x_BHWC.shape[-1]
        row = functools.partial(_row, k_B=k_B)
        epsilon = y_BHWC[..., :channels].astype(jnp.float32)
        x0 = (
            row(schedule.sqrt_recip_alphas_cumprod) * x_BHWC
            - row(schedule.sqrt_recipm1_alphas_cumprod) * epsilon
        )
        if clip:
            x0 = jnp.clip(x0, -1, 1)
        mean = row(schedule.posterior_mean_coef1) * x0 + row(schedule.posterior_mean_coef2) * x_BHWC
        small = row(schedule.posterior_log_variance_clipped)
        if self.variance == "learned_range":
            fraction = (y_BHWC[..., channels:].astype(jnp.float32) + 1) / 2
            log_variance = fraction * row(np.log(schedule.betas)) + (1 - fraction) * small
        elif self.variance == "fixed_small":
            log_variance = jnp.broadcast_to(small, x_BHWC.shape)
        else:  # beta, but at the first step the posterior's, as in DDPM
            first = schedule.posterior_log_variance_clipped[:1]
            large = np.append(first, np.log(schedule.betas[1:]))
            log_variance = jnp.broadcast_to(row(large), x_BHWC.shape)
        return Prediction(mean, log_variance, x0, epsilon)

    def diffuse(
        self, x0_BHWC: jax.Array, k_B: jax.Array, noise_BHWC: jax.Array, schedule: Schedule
    ) -> jax.Array:
        """Compute x_k ~ q(x_k | x_0) from x_0 and standard normal noise, (B, H, W, C)."""
        return (
            _row(schedule.sqrt_alphas_cumprod, k_B) * x0_BHWC
            + _row(schedule.sqrt_one_minus_alphas_cumprod, k_B) * noise_BHWC
        )

    def posterior(
        self, x0_BHWC: jax.Array, x_BHWC: jax.Array, k_B: jax.Array, schedule: Schedule
    ) -> tuple[jax.Array, jax.Array]:
        """Return mean (B, H, W, C), clipped log variance (B, 1, 1, 1) of q(x_{k-1} | x_k, x_0)."""
        mean = (
            _row(schedule.posterior_mean_coef1, k_B) * x0_BHWC
            + _row(schedule.posterior_mean_coef2, k_B) * x_BHWC
        )
        return mean, _row(schedule.posterior_log_variance_clipped, k_B)

    # --- Training

    def noise(self, x_BHWC: jax.Array, key_B: jax.Array) -> Noised:
        """Draw x_k at random steps, uniform over the schedule's; see `Process.noise`."""
        step_key_B, noise_key_B = jax.vmap(jax.random.split, out_axes=1)(key_B)
        num_steps = len(self.schedule_for(self.respacing))
        k_B = jax.vmap(lambda key: jax.random.randint(key, (), 0, num_steps))(step_key_B)
        noise_BHWC = jax.vmap(lambda key: jax.random.normal(key, x_BHWC.shape[1:]))(noise_key_B)
        return self.noised_at(x_BHWC, k_B, noise_BHWC)

    def noised_at(self, x_BHWC: jax.Array, k_B: jax.Array, noise_BHWC: jax.Array) -> Noised:
        """Compute `noise` at given steps, with given noise.

        Args:
          x_BHWC: (B, H, W, C) clean data.
          k_B: (B,) int steps of the schedule (respaced by `respacing`).
          noise_BHWC: (B, H, W, C) standard normal noise.
        """
        schedule = self.schedule_for(self.respacing)
        timestep_B = jnp.asarray(schedule.timesteps, jnp.int32)[k_B]
        draws = {"step": k_B, "noise": noise_BHWC, "clean": x_BHWC}
        noisy = self.diffuse(x_BHWC, k_B, noise_BHWC, schedule)
        return Noised(noisy, timestep_B, noise_BHWC, jnp.ones(len(k_B)), draws)

    def loss_of(self, noised: Noised, y_BHWC: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Compute the loss by `loss_type`, means over H, W and C.

        Returns:
          (B,) float32 loss, and its terms by name: `mse` of epsilon, and `vb` in bits per dimension
          where the loss contains it.
        """
        schedule, k_B = self.schedule_for(self.respacing), noised.draws["step"]
        x_BHWC, noisy, noise_BHWC = noised.draws["clean"], noised.x_BHWC, noised.target_BHWC
        epsilon = y_BHWC[..., : x_BHWC.shape[-1]].astype(jnp.float32)
        terms = {"mse": _mean((noise_BHWC - epsilon) ** 2)}
        if self.loss_type == "mse":
            return terms["mse"], terms
        if self.loss_type != "kl":
            # The bound trains the variance only; the mean is left to the mse.
            y_BHWC = jnp.concatenate(
                [
                    jax.lax.stop_gradient(y_BHWC[..., : x_BHWC.shape[-1]]),
                    y_BHWC[..., x_BHWC.shape[-1] :],
                ],
                axis=-1,
            )
        terms["vb"] = self._bound(y_BHWC, x_BHWC, noisy, k_B, schedule)
        match self.loss_type:
            case "kl":
                return len(schedule) * terms["vb"], terms
            case "hybrid_rescaled":
                return terms["mse"] + len(schedule) / 1000 * terms["vb"], terms
        return terms["mse"] + terms["vb"], terms

    def _bound(
        self,
        y_BHWC: jax.Array,
        x0_BHWC: jax.Array,
        x_BHWC: jax.Array,
        k_B: jax.Array,
        schedule: Schedule,
    ) -> jax.Array:
        """Compute one term of the variational bound, (B,) in bits per dimension.

        It is KL(q ‖ p), at k = 0 the negative log-likelihood of 8-bit data in [-1, 1].
        """
        mean, log_variance = self.posterior(x0_BHWC, x_BHWC, k_B, schedule)
        model = self.predict(y_BHWC, x_BHWC, k_B, schedule)
        difference = log_variance - model.log_variance
        kl = 0.5 * (
            jnp.exp(difference)
            - difference
            - 1
            + (mean - model.mean) ** 2 * jnp.exp(-model.log_variance)
        )
        likelihood = _discretised_gaussian_nll(x0_BHWC, model.mean, model.log_variance / 2)
        return jnp.where(k_B == 0, _mean(likelihood), _mean(kl)) / math.log(2)

    # --- The bridge to EDM: x_t / √alpha_bar is clean data plus noise of standard deviation
    # sigma = √(1 / alpha_bar - 1).

    @property
    def sigma_range(self) -> tuple[float, float]:
        """The lowest and the highest noise level that the network knows."""
        levels = self.schedule_for().sqrt_recipm1_alphas_cumprod
        return float(levels[0]), float(levels[-1])

    def round_sigma(self, sigma: np.ndarray) -> np.ndarray:
        """Return sigma itself (n,): a fractional timestep stands for levels between."""
        return sigma

    def sigmas(self, num_steps: int) -> np.ndarray:
        """Return a grid for EDM's samplers, (N + 1,) float64.

        It goes from the schedule's last noise level to its first, then to 0, see `sampling_grid`.
        """
        if num_steps > self.num_timesteps:
            raise UserError(
                f"num_steps {num_steps} is more than the schedule's {self.num_timesteps}: use at "
                f"most {self.num_timesteps}"
            )
        levels = self.schedule_for().sqrt_recipm1_alphas_cumprod
        return sampling_grid(levels[0], levels[-1], self.rho, num_steps)

    def time_of(self, sigma: np.ndarray) -> np.ndarray:
        """Return the time t / T of the schedule with noise level sigma, (n,) float64."""
        return self.schedule_for().timestep_of(sigma) / self.num_timesteps

    def denoise(
        self, network: Network, x_BHWC: jax.Array, sigma_B: jax.Array, conditioning: Conditioning
    ) -> jax.Array:
        """Compute D(x; sigma) = x - sigma epsilon(x / √(1 + sigma²), t(sigma)).

        The timestep is fractional between the schedule's levels.

        Args:
          network: called once.
          x_BHWC: (B, H, W, C) float32 clean data plus noise of standard deviation sigma.
          sigma_B: (B,) float32 > 0.
          conditioning: passed on to the network.

        Returns:
          (B, H, W, C) float32 estimate of the clean data.
        """
        schedule = self.schedule_for()
        levels = jnp.asarray(np.log(schedule.sqrt_recipm1_alphas_cumprod), jnp.float32)
        timesteps = jnp.asarray(schedule.timesteps, jnp.float32)
        timestep_B = jnp.interp(jnp.log(sigma_B), levels, timesteps)
        sigma = sigma_B[:, None, None, None]
        found = network(x_BHWC / jnp.sqrt(1 + sigma**2), timestep_B, conditioning)
        channels = x_BHWC.shape[-1]
        return jax.tree.map(
            lambda y_BHWC: x_BHWC - sigma * y_BHWC[..., :channels].astype(jnp.float32), found
        )


def _row(table: np.ndarray, k_B: jax.Array) -> jax.Array:
    """Look up entries k_B of a float64 table, (B, 1, 1, 1) float32."""
    return jnp.asarray(table, jnp.float32)[k_B][:, None, None, None]


def _mean(x_BHWC: jax.Array) -> jax.Array:
    return jnp.mean(x_BHWC, axis=(1, 2, 3))


def _discretised_gaussian_nll(x: jax.Array, mean: jax.Array, log_scale: jax.Array) -> jax.Array:
    """Return -ln of the probability that a Gaussian gives to the bin [x - 1/255, x + 1/255].

    The bins beyond ±0.999 are open. In nats, elementwise. The cumulative distribution is
    approximated by ½ (1 + tanh(√(2/π) (u + 0.044715 u³))), as in DDPM's successors.
    """

    def cdf(u: jax.Array) -> jax.Array:
        return 0.5 * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))

    centred, inverse_scale = x - mean, jnp.exp(-log_scale)
    above, below = (
        cdf(inverse_scale * (centred + 1 / 255)),
        cdf(inverse_scale * (centred - 1 / 255)),
    )
    probability = jnp.where(x < -0.999, above, jnp.where(x > 0.999, 1 - below, above - below))
    return -jnp.log(jnp.maximum(probability, 1e-12))
