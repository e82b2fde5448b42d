"""Training of an autoencoder between images and latents.

By mean absolute error and a weak Kullback-Leibler term. The published ones (Rombach et al. 2022)
have a perceptual loss and an adversary too, without which photographs stay soft; for digits it is
enough.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from diffit_jax import limits
from diffit_jax.data import pixels
from diffit_jax.limits import Count, Width, above, at_least
from diffit_jax.models.pretrained.autoencoder import Autoencoder
from diffit_jax.training.step import example_keys

GROUPS = 8  # of the normalisations; narrow stages have too few channels for the published 32


@dataclasses.dataclass(frozen=True)
class AutoencoderTraining(limits.Section):
    """An autoencoder and how it is trained.

    Attributes:
      channels: of each stage, multiples of 8; every stage after the first halves the side.
      num_blocks: residual blocks of a stage.
      latent_channels: of latents.
      steps: updates of the whole run.
      batch_size: images per update, over all devices.
      learning_rate: Adam's, after a ramp-up over a tenth of the steps; it falls to 0 as a cosine.
      kl_weight: of the Kullback-Leibler divergence per pixel value; Rombach et al. have 1e-6.
      seed: of parameters, data order and noise.
    """

    channels: Annotated[Sequence[Width], at_least(1)] = (32, 64, 64, 64)
    num_blocks: Count = 1
    latent_channels: Count = 4
    steps: Count = 220
    batch_size: Count = 16
    learning_rate: Annotated[float, above(0)] = 3e-3
    kl_weight: Annotated[float, at_least(0)] = 1e-6
    seed: Annotated[int, at_least(0, le=2**32 - 1)] = 0

    def module(self, image_channels: int) -> Autoencoder:
        """Return the autoencoder of such images, whose latents are not scaled yet.

        Raises:
          UserError: channels that do not divide into groups.
        """
        module = Autoencoder(
            channels=tuple(self.channels),
            num_blocks=self.num_blocks,
            latent_channels=self.latent_channels,
            image_channels=image_channels,
            num_groups=GROUPS,
            latent_scale=(1.0,),
        )
        module.check()
        return module

    def optimizer(self) -> optax.GradientTransformation:
        """Return Adam, of gradients clipped to length 1."""
        ramp = max(self.steps // 10, 1)
        rate = optax.warmup_cosine_decay_schedule(0.0, self.learning_rate, ramp, self.steps + 1)
        return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))


@struct.dataclass
class AutoencoderState:
    """Everything that an update changes.

    Attributes:
      step: int32 scalar, updates so far.
      variables: of the autoencoder, float32.
      opt_state: of the optimizer.
    """

    step: jax.Array
    variables: Any
    opt_state: Any


def initial_state(settings: AutoencoderTraining, module: Autoencoder) -> AutoencoderState:
    """Return the state before the first update."""
    side = module.factor
    key = jax.random.key(settings.seed, impl="threefry2x32")
    variables = module.init(key, jnp.zeros((1, side, side, module.image_channels)))
    optimizer = settings.optimizer()
    return AutoencoderState(jnp.zeros((), jnp.int32), variables, optimizer.init(variables))


def make_step(
    settings: AutoencoderTraining, module: Autoencoder
) -> Callable[[AutoencoderState, dict[str, jax.Array]], tuple[AutoencoderState, dict]]:
    """Return the update as a pure function.

    `step(state, batch of a Source) -> (state, terms)`, the terms as of `losses`.
    """
    optimizer = settings.optimizer()

    def step(state: AutoencoderState, batch: dict[str, jax.Array]) -> tuple[AutoencoderState, dict]:
        key_B = example_keys(settings.seed, state.step, len(batch["image"]))

        def loss(variables: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
            terms = losses(module, variables, pixels.to_model(batch["image"]), key_B)
            return terms["error"] + settings.kl_weight * terms["kl"], terms

        gradient, terms = jax.grad(loss, has_aux=True)(state.variables)
        update, opt_state = optimizer.update(gradient, state.opt_state, state.variables)
        variables = optax.apply_updates(state.variables, update)
        return AutoencoderState(state.step + 1, variables, opt_state), terms

    return step


def losses(
    module: Autoencoder, variables: Any, image_BHWC: jax.Array, key_B: jax.Array
) -> dict[str, jax.Array]:
    """Compute the terms of the loss, float32 scalars.

    Args:
      module: the autoencoder.
      variables: of the autoencoder.
      image_BHWC: (B, H, W, C) float32 in [-1, 1].
      key_B: (B,) keys, of the draws from posteriors.

    Returns:
      `error`: mean absolute difference between images and the reconstructions of latents drawn for
      them; `kl`: divergence of the posterior from a standard normal distribution, ½ Σ (μ² + σ² - 1
      - ln σ²), per pixel value.
    """
    mean_Bhwc, log_variance_Bhwc = _apply(module, variables, image_BHWC, "encode")
    noise_Bhwc = jax.vmap(lambda key: jax.random.normal(key, mean_Bhwc.shape[1:]))(key_B)
    z_Bhwc = mean_Bhwc + jnp.exp(log_variance_Bhwc / 2) * noise_Bhwc
    decoded_BHWC = _apply(module, variables, z_Bhwc, "decode")
    divergence = mean_Bhwc**2 + jnp.exp(log_variance_Bhwc) - 1 - log_variance_Bhwc
    return {
        "error": jnp.mean(jnp.abs(image_BHWC - decoded_BHWC)),
        "kl": 0.5 * jnp.sum(divergence) / image_BHWC.size,
    }


def _apply(module: Autoencoder, variables: Any, x: jax.Array, method: str) -> Any:
    return module.apply(variables, x, method=method)
