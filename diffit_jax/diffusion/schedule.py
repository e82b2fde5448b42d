"""Noise schedules of discrete-time diffusion, and their respacing.

Ho et al. 2020 and Nichol & Dhariwal 2021. All tables are float64 numpy arrays over the steps
k = 0…K-1, made once when a program is built; loops read them as float32.
"""

import dataclasses
import functools
import math

import numpy as np

from diffit_jax.errors import UserError


def linear_betas(num_timesteps: int) -> np.ndarray:
    """Return betas from 1e-4 to 0.02 at T = 1000, (T,) float64.

    For other T they are scaled by 1000 / T, so that the total noise stays about the same.
    """
    scale = 1000 / num_timesteps
    return np.linspace(scale * 1e-4, scale * 0.02, num_timesteps)


def cosine_betas(num_timesteps: int) -> np.ndarray:
    """Return the betas of alpha_bar(t) = cos²(π/2 (t / T + 0.008) / 1.008), (T,) float64.

    Each is at most 0.999 (improved DDPM, Eq. 17).
    """
    alpha_bar = (
        np.cos((np.arange(num_timesteps + 1) / num_timesteps + 0.008) / 1.008 * math.pi / 2) ** 2
    )
    return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)


SCHEDULES = {"linear": linear_betas, "cosine": cosine_betas}


def respaced_timesteps(num_timesteps: int, respacing: str) -> np.ndarray:
    """Return the timesteps of a shorter schedule within a long one.

    Args:
      num_timesteps: T of the long schedule.
      respacing: "250" spreads 250 steps from first to last timestep; "10,10,5" divides the T
        timesteps into equal sections with so many steps each; "ddim50" takes a whole stride from 0
        on (and so leaves out the last timestep); "" keeps all.

    Returns:
      (K,) int64, ascending.

    Raises:
      UserError: more steps than timesteps, a stride that does not exist, or not a respacing.
    """
    if not respacing:
        return np.arange(num_timesteps)
    ddim = respacing.startswith("ddim")
    try:
        counts = [int(part) for part in respacing.removeprefix("ddim").split(",")]
    except ValueError:
        counts = [0]
    if min(counts) < 1 or (ddim and len(counts) > 1):
        raise UserError(f"respacing {respacing!r} is not a respacing: write 250, 10,10,5 or ddim50")
    if sum(counts) > num_timesteps:
        raise UserError(
            f"respacing {respacing!r} has more steps than the schedule's {num_timesteps}: use at "
            f"most {num_timesteps}"
        )
    if ddim:
        for stride in range(1, num_timesteps + 1):
            if len(range(0, num_timesteps, stride)) == counts[0]:
                return np.arange(0, num_timesteps, stride)
        raise UserError(
            f"respacing {respacing!r} is impossible: no whole stride gives {counts[0]} of "
            f"{num_timesteps} timesteps"
        )

    timesteps, start = [], 0
    for section, count in enumerate(counts):
        size = num_timesteps // len(counts) + (section < num_timesteps % len(counts))
        if count > size:
            raise UserError(
                f"respacing {respacing!r} wants {count} steps of a section of {size} timesteps: "
                f"use at most {size}"
            )
        stride = (size - 1) / (count - 1) if count > 1 else 1
        place = 0.0
        for _ in range(count):
            timesteps.append(start + round(place))
            # Summed up, not multiplied: where it ends in a half, ADM's rounding depends on it.
            place += stride
        start += size
    return np.array(timesteps)


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """The tables of a diffusion with K steps, (K,) float64 but for `timesteps`.

    A step k is one of the schedule's own; `timesteps[k]` is the number that the network gets.

    Attributes:
      betas: (K,) float64, variance of the noise that step k adds.
      timesteps: (K,) int64 in [0, T) of the original schedule, ascending.
    """

    betas: np.ndarray
    timesteps: np.ndarray

    @classmethod
    def make(cls, name: str, num_timesteps: int) -> "Schedule":
        """Make the schedule of that name in `SCHEDULES` with T steps."""
        return cls(SCHEDULES[name](num_timesteps), np.arange(num_timesteps))

    def respaced(self, respacing: str) -> "Schedule":
        """Make a shorter schedule that has the noise levels of this one at `respaced_timesteps`."""
        kept = respaced_timesteps(len(self), respacing)
        alphas_cumprod = self.alphas_cumprod[kept]
        betas = 1 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1])
        return Schedule(betas, self.timesteps[kept])

    def __len__(self) -> int:
        return len(self.betas)

    @functools.cached_property
    def alphas_cumprod(self) -> np.ndarray:
        """alpha_bar_k, (K,): the signal's variance that is left after step k."""
        return np.cumprod(1 - self.betas)

    @functools.cached_property
    def alphas_cumprod_prev(self) -> np.ndarray:
        """alpha_bar_{k-1}, (K,), 1 before the first step."""
        return np.append(1.0, self.alphas_cumprod[:-1])

    @property
    def sqrt_alphas_cumprod(self) -> np.ndarray:
        """√alpha_bar_k, (K,) float64."""
        return np.sqrt(self.alphas_cumprod)

    @property
    def sqrt_one_minus_alphas_cumprod(self) -> np.ndarray:
        """√(1 - alpha_bar_k), (K,) float64."""
        return np.sqrt(1 - self.alphas_cumprod)

    @property
    def sqrt_recip_alphas_cumprod(self) -> np.ndarray:
        """√(1 / alpha_bar_k), (K,) float64."""
        return np.sqrt(1 / self.alphas_cumprod)

    @property
    def sqrt_recipm1_alphas_cumprod(self) -> np.ndarray:
        """√(1 / alpha_bar_k - 1), (K,) float64: EDM's noise level sigma."""
        return np.sqrt(1 / self.alphas_cumprod - 1)

    @property
    def posterior_variance(self) -> np.ndarray:
        """beta~_k, variance of q(x_{k-1} | x_k, x_0); 0 at k = 0."""
        return self.betas * (1 - self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)

    @property
    def posterior_log_variance_clipped(self) -> np.ndarray:
        """Logarithm of beta~_k, (K,) float64; that of k = 1 replaces the infinite one of k = 0.

        With one step only, it is ln beta_0.
        """
        tail = self.posterior_variance[1:]
        return np.log(np.append(tail[:1] if len(tail) else self.betas[:1], tail))

    @property
    def posterior_mean_coef1(self) -> np.ndarray:
        """Factor of x_0 in the mean of q(x_{k-1} | x_k, x_0)."""
        return self.betas * np.sqrt(self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)

    @property
    def posterior_mean_coef2(self) -> np.ndarray:
        """Factor of x_k in the mean of q(x_{k-1} | x_k, x_0)."""
        return (1 - self.alphas_cumprod_prev) * np.sqrt(1 - self.betas) / (1 - self.alphas_cumprod)

    def timestep_of(self, sigma: np.ndarray) -> np.ndarray:
        """Return the timestep with a given noise level, float64 in [0, T - 1].

        Exact at the schedule's own levels, linear in ln sigma between.

        Args:
          sigma: (n,) noise levels > 0 as in EDM; beyond the schedule's ends they get its first or
            last timestep.
        """
        return np.interp(np.log(sigma), np.log(self.sqrt_recipm1_alphas_cumprod), self.timesteps)
