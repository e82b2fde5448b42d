"""Flow matching: networks that predict the velocity between data and noise.

Lipman et al. 2023, Liu et al. 2023 ("rectified flow"), SiT (Ma et al. 2024). With
z = alpha(t) x / d + s(t) epsilon, d the standard deviation of the data (1 in the papers), a network
learns the mean of v = dz/dt. Samplers follow it in time; as a denoiser D(y; sigma) of y = d z /
alpha, with sigma = d s / alpha, it serves everything else (`Preconditioned`).

**Two clocks.** Here t is 0 at data and 1 at noise, as in SD3, REPA and MeanFlow, and v = epsilon -
x on the linear path. SiT and LightningDiT count u = 1 - t: their networks return x - epsilon.
`clock` says what a network is told, and with it the sign of its velocity. Times are told unscaled.

Shape suffixes: B batch, H, W, C height, width and channels.
"""

import dataclasses
import math
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from diffit_jax import limits
from diffit_jax.diffusion.ddpm import DDPM
from diffit_jax.diffusion.edm import Preconditioned, per_image
from diffit_jax.diffusion.interpolants import INTERPOLANTS, Interpolant, Place
from diffit_jax.diffusion.types import Conditioning, Network, Noised, of_outputs
from diffit_jax.errors import UserError
from diffit_jax.limits import NoiseLevel, above, at_least, one_of

CLOCKS = ("t", "u", "timesteps")
TIMES = ("uniform", "logit_normal", "log_normal", "mode", "cosmap")
WEIGHTINGS = {
    "velocity": ("none", "cosmap", "sigma_sqrt"),
    "noise": ("none", "velocity", "likelihood"),
    "score": ("none", "velocity", "likelihood"),
}
# In the place of the infinite noise level of t = 1, for samplers that need a finite one.
HIGHEST_SIGMA = 1e6
_MARGIN = 1e-3  # what SiT keeps away from both ends, of predictions that are infinite there
_TIMESTEPS = DDPM()  # of networks that are told timesteps


@dataclasses.dataclass(frozen=True)
class Flow(Preconditioned, limits.Section, name="process"):
    """Flow matching along a path, with velocity, noise or score prediction.

    Attributes:
      path: "linear" (rectified flow), "cosine" (SiT's GVP) or "vp", see `interpolants`.
      prediction: "velocity"; or "noise" or "score" of z, with SiT's losses.
      clock: what the network is told: "t" (0 data, 1 noise), with the velocity dz/dt; "u" = 1 - t
        (SiT, LightningDiT), with dz/du; "timesteps": DDPM's 0…999 of equal noise level, of a
        network that ADM's or DiT's recipe trained: it sees DDPM's x_t and predicts noise.
      times: how t is drawn in training: "uniform"; "logit_normal", t = sigmoid(n) with n ~
        N(time_mean, time_std²); "log_normal", ln sigma = n instead (on the linear path the same);
        "mode", SD3's with `mode_scale`; "cosmap", SD3's density 2 / (π (1 - 2 t + 2 t²)).
      time_mean, time_std: of logit_normal and log_normal.
      mode_scale: of "mode", in [-1, 1.75]; larger ones draw more times near 0 and 1.
      shift: shifts the times of training to more noise: sigma → shift sigma, on the linear path t →
        shift t / (1 + (shift - 1) t). SD3 has the root of the ratio of pixels.
      sampling_shift: the same for the times of sampling. LightningDiT's 0.3, of u, is 1 / 0.3 here.
      weighting: "none"; of velocities "cosmap" or "sigma_sqrt" (SD3's, of t); of noise and score
        "velocity" or "likelihood" (SiT's).
      direction_weight: of a further loss, 1 - cosine between predicted and true velocity over the
        channels, averaged over the image (LightningDiT has 1). With one channel it has no gradient.
      sigma_data: d; latents are scaled to about 1.
    """

    path: Annotated[str, one_of(*INTERPOLANTS)] = "linear"
    prediction: Annotated[str, one_of(*WEIGHTINGS)] = "velocity"
    clock: Annotated[str, one_of(*CLOCKS)] = "t"
    times: Annotated[str, one_of(*TIMES)] = "uniform"
    time_mean: Annotated[float, at_least(-20, le=20)] = 0.0
    time_std: Annotated[float, at_least(0, le=20)] = 1.0
    mode_scale: Annotated[float, at_least(-1, le=1.75)] = 1.29
    shift: Annotated[float, above(0)] = 1.0
    sampling_shift: Annotated[float, above(0)] = 1.0
    weighting: Annotated[str, one_of("none", "cosmap", "sigma_sqrt", "velocity", "likelihood")] = (
        "none"
    )
    direction_weight: Annotated[float, at_least(0)] = 0.0
    sigma_data: NoiseLevel = 1.0

    def __post_init__(self):
        super().__post_init__()
        if self.weighting not in WEIGHTINGS[self.prediction]:
            raise UserError(
                f"config key process.weighting is {self.weighting}, which does not go with "
                f"process.prediction {self.prediction}: use "
                f"{', '.join(WEIGHTINGS[self.prediction])}"
            )
        if self.clock == "timesteps" and self.prediction != "noise":
            raise UserError(
                "config key process.clock is timesteps: such networks predict noise; set "
                "process.prediction to noise, or process.clock to t or u"
            )
        if self.direction_weight and self.prediction != "velocity":
            raise UserError(
                "config key process.direction_weight compares velocities: set it to 0, or "
                "process.prediction to velocity"
            )

    # --- Times

    @property
    def clocks(self) -> str:
        """What a time is, and what the network is told, for people."""
        told = {
            "t": "t",
            "u": "u = 1 - t, 0 at noise and 1 at data",
            "timesteps": "DDPM's timesteps 0…999 of equal noise levels",
        }
        return f"t is 0 at data and 1 at noise; the network is told {told[self.clock]}"

    @property
    def interpolant(self) -> Interpolant:
        """The path."""
        return INTERPOLANTS[self.path]

    def interval(self, training: bool = False) -> tuple[float, float]:
        """Return the earliest and the latest time of training, or of sampling.

        As in SiT: a velocity is finite at both ends but for "vp"; noise and score of other paths
        keep 0.001 away from both. What is told timesteps has DDPM's range, and samples down to 0.
        """
        if self.clock == "timesteps":
            sigma = np.array(_TIMESTEPS.sigma_range)
            low, high = self.time_of(sigma).tolist()
            return (low if training else 0.0), high
        if self.path != "vp" and self.prediction != "velocity":
            return _MARGIN, 1 - _MARGIN
        return self.interpolant.starts_at[0 if training else 1], 1.0

    def shifted(self, t: Any, shift: float) -> Any:
        """Return times of the noise levels `shift` sigma, for those of sigma, shaped like t."""
        if shift == 1:
            return t
        place = self.interpolant.at(t)
        return self.interpolant.time(shift * place.noise, place.alpha)

    def sampling_times(
        self, num_steps: int, shift: float = 0.0, end: float | None = None
    ) -> np.ndarray:
        """Return the times of N steps, (N + 1,) float64 descending, even before they are shifted.

        Args:
          num_steps: N.
          shift: as `sampling_shift`; 0: that.
          end: the last time; None: the earliest of the interval.
        """
        low, high = self.interval()
        low, shift = low if end is None else end, shift or self.sampling_shift
        first, last = np.clip(self.shifted(np.array([high, low]), 1 / shift), 0, 1)
        times = np.clip(self.shifted(np.linspace(first, last, num_steps + 1), shift), low, high)
        times[0], times[-1] = high, low  # to the last bit
        return times

    def time_of(self, sigma: np.ndarray) -> np.ndarray:
        """Return the time t with noise level sigma (infinity: 1), shaped like it, float64."""
        sigma = np.asarray(sigma, np.float64) / self.sigma_data
        return np.minimum(self.interpolant.time(sigma, np.ones_like(sigma)), 1.0)

    def sigma_of(self, t: np.ndarray) -> np.ndarray:
        """Return the noise level at times in [0, 1] (perhaps infinity), shaped like t, float64."""
        place = self.interpolant.at(np.asarray(t, np.float64))
        with np.errstate(divide="ignore"):
            return self.sigma_data * place.noise / place.alpha

    def told(self, sigma: jax.Array) -> jax.Array:
        """Return what the network is told at noise levels (infinity: t = 1), shaped like them."""
        if self.clock == "timesteps":
            schedule = _TIMESTEPS.schedule_for()
            levels = jnp.asarray(np.log(schedule.sqrt_recipm1_alphas_cumprod), sigma.dtype)
            return jnp.interp(jnp.log(sigma), levels, jnp.asarray(schedule.timesteps, sigma.dtype))
        scaled, ones = sigma / self.sigma_data, jnp.ones_like(sigma)
        if self.clock == "u" and self.path != "vp":  # near the noise no difference of near numbers
            return self.interpolant.time(ones, scaled)
        t = self.interpolant.time(scaled, ones)
        return 1 - t if self.clock == "u" else t

    # --- Training

    def times_of(self, draws: Any, mean: float | None = None) -> Any:
        """Return times of training: of draws uniform in [0, 1), or normal for the two normal ones.

        Shaped like the draws. `mean` stands in place of `time_mean`.
        """
        low, high = self.interval(training=True)
        xp: Any = jnp if isinstance(draws, jax.Array) else np
        if self.times == "uniform":
            t = draws
        elif self.times == "mode":
            t = 1 - draws - self.mode_scale * (xp.cos(math.pi / 2 * draws) ** 2 - 1 + draws)
        elif self.times == "cosmap":
            t = INTERPOLANTS["linear"].time(
                xp.sin(math.pi / 2 * draws), xp.cos(math.pi / 2 * draws)
            )
        else:
            normal = (self.time_mean if mean is None else mean) + self.time_std * draws
            path = "linear" if self.times == "logit_normal" else self.path
            sigma = xp.exp(normal)
            t = INTERPOLANTS[path].time(sigma, xp.ones_like(sigma))
        if self.times == "uniform":  # which SiT draws from the interval
            return self.shifted(low + (high - low) * t, self.shift)
        return xp.clip(self.shifted(t, self.shift), low, high)

    def draw_time(self, key: jax.Array, mean: float | None = None) -> jax.Array:
        """Draw a time to train at, a float32 scalar; `mean` as in `times_of`."""
        normal = self.times in ("logit_normal", "log_normal")
        return self.times_of(jax.random.normal(key) if normal else jax.random.uniform(key), mean)

    def draw_sigma(self, key: jax.Array) -> jax.Array:
        """Draw a noise level to train at, a float32 scalar."""
        place = self.interpolant.at(self.draw_time(key))
        return self.sigma_data * place.noise / jnp.maximum(place.alpha, 1 / HIGHEST_SIGMA)

    def draw_level(self, key: jax.Array) -> jax.Array:
        """Draw a time to train at, which `noised_at` takes, a float32 scalar."""
        return self.draw_time(key)

    def noised_at(self, x_BHWC: jax.Array, t_B: jax.Array, noise_BHWC: jax.Array) -> Noised:
        """Compute `noise` at given times t (B,), with given standard normal noise.

        The target is what the network shall return (minus the noise, for a score).
        """
        clean_BHWC = x_BHWC / self.sigma_data
        place = Place(*(per_image(each) for each in self.interpolant.at(t_B)))
        z_BHWC = place.alpha * clean_BHWC + place.noise * noise_BHWC
        if self.prediction == "velocity":
            velocity = place.alpha_slope * clean_BHWC + place.noise_slope * noise_BHWC
            target = -velocity if self.clock == "u" else velocity
        else:
            target = -noise_BHWC if self.prediction == "score" else noise_BHWC
        sees, level_B = z_BHWC, t_B if self.clock == "t" else 1 - t_B
        if self.clock == "timesteps":
            sigma_B = self.sigma_data * (place.noise / place.alpha)[:, 0, 0, 0]
            sees = self._seen(z_BHWC * self.sigma_data, sigma_B)
            level_B = self.told(sigma_B)
        draws = {"time": t_B, "noise": noise_BHWC, "clean": x_BHWC}
        return Noised(sees, level_B, target, self.weight(t_B), draws)

    def weight(self, t_B: jax.Array) -> jax.Array:
        """Return the weight of `weighting` at times, shaped like them."""
        if self.weighting == "none":
            return jnp.ones_like(t_B)
        if self.weighting == "cosmap":
            return 2 / (math.pi * (1 - 2 * t_B + 2 * t_B**2))
        if self.weighting == "sigma_sqrt":
            return jnp.maximum(t_B, _MARGIN) ** -2.0
        half, noise = self.interpolant.diffusion(t_B), self.interpolant.at(t_B).noise
        return (half / noise) ** 2 if self.weighting == "velocity" else half / noise**2

    def loss_of(self, noised: Noised, y_BHWC: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Compute w mean (F - target)², of a score w mean (s F + epsilon)², and the direction loss.

        With velocities it is SiT's loss, and `loss_weight(sigma)` mean (D - x)².

        Returns:
          (B,) float32 loss, and `direction` (B,) where it is a part of it.
        """
        f_BHWC = y_BHWC.astype(noised.target_BHWC.dtype)[..., : noised.target_BHWC.shape[-1]]
        if self.prediction == "score":
            f_BHWC = f_BHWC * per_image(self.interpolant.at(noised.draws["time"]).noise)
        error_B = jnp.mean((f_BHWC - noised.target_BHWC) ** 2, axis=(1, 2, 3))
        loss_B = noised.weight_B * error_B
        if not self.direction_weight:
            return loss_B, {}
        direction_B = jnp.mean(1 - _cosine(f_BHWC, noised.target_BHWC), axis=(1, 2))
        return loss_B + self.direction_weight * direction_B, {"direction": direction_B}

    @property
    def loss_terms(self) -> tuple[str, ...]:
        """Names of the terms that `loss` reports with the loss."""
        return ("direction",) if self.direction_weight else ()

    # --- As a denoiser

    @property
    def sigma_range(self) -> tuple[float, float]:
        """The lowest and the highest noise level that the network knows."""
        if self.clock == "timesteps":
            return _TIMESTEPS.sigma_range
        low, high = self.sigma_of(np.array(self.interval(training=True))).tolist()
        return low, (math.inf if high > 1e12 else high)

    def sigmas(self, num_steps: int) -> np.ndarray:
        """Return the noise levels of `sampling_times`, (N + 1,) float64, the last one 0.

        The first is at most a million `sigma_data`, for the infinite one of t = 1.

        Raises:
          UserError: `num_steps` is below 2.
        """
        if num_steps < 2:
            raise UserError(
                f"num_steps {num_steps} is too small: the sampling grid needs at least 2 steps"
            )
        sigma = self.sigma_of(self.sampling_times(num_steps)[:-1])
        return np.append(np.minimum(sigma, HIGHEST_SIGMA * self.sigma_data), 0.0)

    def preconditioning(
        self, sigma: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Return (c_skip, c_out, c_in, c_noise) in the form of EDM Table 1, shaped like `sigma`."""
        scaled = sigma / self.sigma_data
        place = self.interpolant.by_sigma(scaled)
        told, c_in = self.told(sigma), place.alpha / self.sigma_data
        if self.clock == "timesteps":
            c_in = 1 / jnp.sqrt(1 + sigma**2)
        if self.prediction == "noise":
            return jnp.ones_like(sigma), -sigma, c_in, told
        if self.prediction == "score":
            return jnp.ones_like(sigma), sigma * place.noise, c_in, told
        c_out = (-1 if self.clock == "u" else 1) * self.sigma_data * place.noise / place.turn
        return -place.noise_slope * place.alpha / place.turn, c_out, c_in, told

    def loss_weight(self, sigma: jax.Array) -> jax.Array:
        """Return lambda(sigma), shaped like it: lambda mean (D - x)² is the loss but direction."""
        scaled = sigma / self.sigma_data
        place = self.interpolant.by_sigma(scaled)
        by_velocity = self.prediction == "velocity"
        out = self.sigma_data * place.noise / place.turn if by_velocity else sigma
        time = self.interpolant.time(scaled, jnp.ones_like(scaled))
        return self.weight(time) / out**2

    # --- In time

    @property
    def start_std(self) -> float:
        """Standard deviation of the noise that samplers start from.

        `sigma_data` (1, as in SiT) at whatever time; for timesteps that of data and noise there.
        """
        if self.clock != "timesteps":
            return self.sigma_data
        place = self.interpolant.at(np.array(self.interval()[1]))
        return self.sigma_data * float(np.hypot(place.alpha, place.noise))

    def velocity(
        self, network: Network, x_BHWC: jax.Array, sigma_B: jax.Array, conditioning: Conditioning
    ) -> Any:
        """Compute dx/dt of x = d z, the slope that samplers follow, float32.

        As `denoise` it is told the noise level: in float32 1 - t would be wrong near the noise.

        Args:
          network: called once.
          x_BHWC: (B, H, W, C) float32 d z, alpha times clean data plus d s times noise; or a pytree
            of such, of which the network makes another one.
          sigma_B: (B,) noise levels of times within the interval of sampling; infinity is t = 1.
          conditioning: passed on to the network.

        Returns:
          (B, H, W, C), or a tuple of such where the network returns a tuple of outputs.
        """
        sees, told_B = jax.tree.map(lambda x: self._seen(x, sigma_B), x_BHWC), self.told(sigma_B)
        place = self.interpolant.by_sigma(sigma_B / self.sigma_data)
        place = Place(*(per_image(each) for each in place))

        def of_output(x_BHWC: jax.Array, f_BHWC: jax.Array) -> jax.Array:
            f_BHWC = self.sigma_data * f_BHWC.astype(x_BHWC.dtype)[..., : x_BHWC.shape[-1]]
            return self.as_velocity(f_BHWC, x_BHWC, place)

        return of_outputs(of_output, x_BHWC, network(sees, told_B, conditioning))

    def as_velocity(self, f_BHWC: jax.Array, z_BHWC: jax.Array, place: Place) -> jax.Array:
        """Convert what the network returns for noisy data z to the velocity there, (B, H, W, C).

        The place has (B, 1, 1, 1) arrays. Both may be multiplied by a constant.
        """
        if self.prediction == "velocity":
            return -f_BHWC if self.clock == "u" else f_BHWC
        noise = -place.noise * f_BHWC if self.prediction == "score" else f_BHWC
        ratio = place.alpha_slope / place.alpha
        return ratio * z_BHWC + (place.noise_slope - place.noise * ratio) * noise

    def _seen(self, x_BHWC: jax.Array, sigma_B: jax.Array) -> jax.Array:
        """Return what the network sees of x = d z at noise levels."""
        if self.clock != "timesteps":
            return x_BHWC / self.sigma_data
        place = self.interpolant.by_sigma(sigma_B / self.sigma_data)
        size_B = jnp.hypot(place.alpha, self.sigma_data * place.noise)
        return x_BHWC / per_image(size_B)


def _cosine(one_BHWC: jax.Array, other_BHWC: jax.Array) -> jax.Array:
    """Return the cosine over the channels, (B, H, W); where either is 0, it is 0 without gradient.

    (A network whose last layer is zero returns 0: the cosine's slope there would be infinite.)
    """
    squares = jnp.sum(one_BHWC**2, -1) * jnp.sum(other_BHWC**2, -1)
    here = squares > 0
    length = jnp.sqrt(jnp.where(here, squares, 1.0))
    return jnp.where(here, jnp.sum(one_BHWC * other_BHWC, -1) / length, 0.0)
