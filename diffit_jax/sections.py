"""The sections of a config that are plain settings: frozen, typed, and checked when they are
made."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated

from diffit_jax import limits
from diffit_jax.data import pixels
from diffit_jax.diffusion.guidance import KINDS, Guidance
from diffit_jax.diffusion.samplers import Churn
from diffit_jax.errors import UserError
from diffit_jax.limits import Count, CountOrZero, above, at_least, one_of, share

# The first two belong to the process ddpm; the others serve both.
SAMPLERS = ("ddpm", "ddim", "euler", "heun", "dpm_solver")


@dataclasses.dataclass(frozen=True)
class Data:
    """Section `data`.

    Attributes:
      name: of the data set, see `data.open_dataset`.
      data_dir: where prepared data sets live, local or `gs://`; "" is tensorflow-datasets' default,
        `~/tensorflow_datasets`.
      autoencoder: "" if the examples are images; otherwise they are this autoencoder's latents, and
        so are samples.
    """

    name: str
    data_dir: str = ""
    autoencoder: str = ""

    def __post_init__(self):
        limits.check(self, "data")


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """Section `optimizer`.

    Attributes:
      learning_rate: after the ramp-up.
      warmup_steps: updates over which it rises from 0.
      name: "adam" (AdamW if there is weight decay) or "lamb", for very large batches.
      beta1, beta2, epsilon: Adam's.
      weight_decay: share of a weight taken off per update, times the learning rate. Only matrices
        and convolutions decay: not biases, norms, label tables or position biases.
      max_gradient_norm: longer gradients (over all parameters) are shortened to this; 0: never.
      schedule: "constant" after the ramp-up, or "cosine" down to 0.
      decay_steps: for "cosine", the update at which the rate is 0, the ramp-up included.
    """

    learning_rate: Annotated[float, above(0)]
    warmup_steps: CountOrZero
    name: Annotated[str, one_of("adam", "lamb")] = "adam"
    beta1: Annotated[float, share(below_one=True)] = 0.9
    beta2: Annotated[float, share(below_one=True)] = 0.999
    epsilon: Annotated[float, above(0)] = 1e-8
    weight_decay: Annotated[float, at_least(0)] = 0.0
    max_gradient_norm: Annotated[float, at_least(0)] = 0.0
    schedule: Annotated[str, one_of("constant", "cosine")] = "constant"
    decay_steps: CountOrZero = 0

    def __post_init__(self):
        limits.check(self, "optimizer")
        if self.schedule == "cosine" and self.decay_steps <= self.warmup_steps:
            raise UserError(
                f"config key optimizer.decay_steps is {self.decay_steps}: it must be above "
                f"{self.warmup_steps}, the warmup_steps"
            )


@dataclasses.dataclass(frozen=True)
class EMA:
    """Section `ema`: EDM's moving average of the parameters, stated in images so that the batch
    size does not change its length.

    Attributes:
      halflife_images: after so many images a parameter's weight in the average has halved.
      rampup_ratio: the half-life is at most this share of the images seen so far, so that the
        average forgets the start of training.
      power_lengths: lengths of further averages whose snapshots make one of any length after
        training, see `training.power_ema`; EDM2 has (0.05, 0.10). Each costs 4 bytes per parameter,
        and a snapshot as much on disk.
      snapshot_steps: updates between snapshots of these.
    """

    halflife_images: Annotated[float, above(0)]
    rampup_ratio: Annotated[float, above(0)] = 0.05
    power_lengths: Sequence[Annotated[float, above(0, below=12**-0.5)]] = ()
    snapshot_steps: Count = 10_000

    def __post_init__(self):
        limits.check(self, "ema")


@dataclasses.dataclass(frozen=True)
class Training:
    """Section `training`.

    Attributes:
      batch_size: images per update, over all devices.
      label_dropout: share of the labels replaced by "no label", which classifier-free guidance
        needs. In [0, 1].
      total_steps: updates of the whole run (batches, to be exact: one with a gradient that is not
        finite makes no update).
      accumulation: parts into which a batch is cut to save memory; their gradients are averaged
        into one update.
      max_bad_steps: so many batches in a row without a finite gradient end the run.
      log_steps, grid_steps, checkpoint_steps: updates between reports, sample grids and
        checkpoints.
      checkpoint_minutes: also a checkpoint when the last one is so old, looked at with each report;
        0: never.
      keep_checkpoints: how many of the newest checkpoints stay.
      keep_every_steps: checkpoints at multiples of this stay for good; 0: none.
      grid_images: images in a sample grid.
    """

    batch_size: Count
    label_dropout: Annotated[float, share()]
    total_steps: Count
    log_steps: Count = 100
    grid_steps: Count = 10_000
    checkpoint_steps: Count = 5_000
    keep_checkpoints: Count = 3
    grid_images: Count = 100
    accumulation: Count = 1
    max_bad_steps: Count = 20
    checkpoint_minutes: Annotated[float, at_least(0)] = 0.0
    keep_every_steps: CountOrZero = 0

    def __post_init__(self):
        limits.check(self, "training")


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Section `sampling`: how samples are drawn unless the command line says otherwise.

    Attributes:
      num_steps: steps N of the sampler. Evaluations of the network: 2N - 1 with heun, else N.
      guidance_scale: 1 is no guidance.
      batch_size: samples per call of the sampler: over all devices, or, if it is negative, so many
        on each. Rounded up to a number that the devices divide.
      sampler: "ddpm" (ancestral) or "ddim", of the process ddpm; "euler", "heun" or "dpm_solver"
        (2M), of any process.
      respacing: of ddpm and ddim, in place of `num_steps`: "250", "10,10,5" or "ddim50", see
        `respaced_timesteps`.
      eta: randomness of ddim, 0 none.
      clip_denoised: whether ddpm and ddim clip their estimate of the clean sample to [-1, 1]: for
        images, not for latents.
      guidance, guidance_power, guidance_sigma_low, guidance_sigma_high, guide_channels,
        skip_tolerance: see `guidance.Guidance`.
      guide_workdir: for autoguidance, the work directory of the weaker network.
      pixel_rounding: from [-1, 1] to uint8: "edm" or "adm", see `pixels.to_pixels`.
      churn_amount, churn_sigma_low, churn_sigma_high, churn_noise: of heun, see `samplers.Churn`.
    """

    num_steps: Annotated[int, at_least(1, most=100_000)]
    guidance_scale: Annotated[float, at_least(0)]
    batch_size: Annotated[int, at_least(-(2**31), most=2**31 - 1)]
    sampler: Annotated[str, one_of(*SAMPLERS)] = "heun"
    respacing: str = ""
    eta: Annotated[float, at_least(0)] = 0.0
    clip_denoised: bool = False
    guidance: Annotated[str, one_of(*KINDS)] = "constant"
    guidance_power: Annotated[float, above(0)] = 4.0
    guidance_sigma_low: Annotated[float, at_least(0)] = 0.0
    guidance_sigma_high: Annotated[float, at_least(0, infinite=True)] = float("inf")
    guide_channels: CountOrZero = 0
    skip_tolerance: Annotated[float, at_least(0)] = 1e-3
    guide_workdir: str = ""
    pixel_rounding: Annotated[str, one_of(*pixels.ROUNDINGS)] = "edm"
    churn_amount: Annotated[float, at_least(0)] = 0.0
    churn_sigma_low: Annotated[float, at_least(0)] = 0.0
    churn_sigma_high: Annotated[float, at_least(0, infinite=True)] = float("inf")
    churn_noise: Annotated[float, at_least(0)] = 1.0

    def __post_init__(self):
        limits.check(self, "sampling")
        if self.num_steps < 2 and not self.discrete:
            raise UserError(
                f"config key sampling.num_steps is {self.num_steps}: it must be at least 2 with "
                f"sampler {self.sampler}"
            )
        if not self.batch_size:
            raise UserError(
                "config key sampling.batch_size is 0: set it to a number of samples, or -16 for 16 "
                "on each device"
            )
        if self.respacing and not self.discrete:
            raise UserError(
                "config key sampling.respacing is for the samplers ddpm and ddim, not "
                f"{self.sampler}: set sampling.num_steps"
            )
        _ = self.guide, self.churn  # these check the rest

    @property
    def discrete(self) -> bool:
        """Whether the sampler walks down a discrete schedule."""
        return self.sampler in ("ddpm", "ddim")

    @property
    def guide(self) -> Guidance:
        return Guidance(
            self.guidance,
            self.guidance_scale,
            self.guidance_power,
            self.guidance_sigma_low,
            self.guidance_sigma_high,
            self.guide_channels,
            self.skip_tolerance,
        )

    @property
    def churn(self) -> Churn:
        return Churn(
            self.churn_amount, self.churn_sigma_low, self.churn_sigma_high, self.churn_noise
        )
