"""Guidance: several evaluations of a denoiser made into one.

Classifier-free guidance needs a network that also works without a label. `drop_labels` makes such a network out of a class-conditional one
in training; `classifier_free` uses it in sampling.
"""

import jax
import jax.numpy as jnp

from diffit_jax.diffusion.edm import Conditioning, Denoiser
from diffit_jax.errors import UserError


def drop_labels(conditioning: Conditioning, key_B: jax.Array, rate: float, num_classes: int) -> Conditioning:
    """Replaces each label by "no label" (index `num_classes`) with probability `rate`, each decided by its own key of key_B (B,)."""
    if "label" not in conditioning or rate == 0:
        return conditioning
    drop_B = jax.vmap(lambda key: jax.random.bernoulli(key, rate))(key_B)
    return {**conditioning, "label": jnp.where(drop_B, num_classes, conditioning["label"])}


def classifier_free(denoise: Denoiser, scale: float, null_label: int) -> Denoiser:
    """Guided denoiser D_u + scale (D_c - D_u) of Ho & Salimans 2022; D_c sees the label, D_u does not.

    Args:
      denoise: D(x, sigma, conditioning).
      scale: 1 is the plain conditional denoiser (and costs no second evaluation), larger follows the label more closely. At least 0.
      null_label: the label that stands for "no label".

    Returns:
      A denoiser that, unless scale is 1, calls `denoise` once on a batch of twice the size. The two versions of an example lie next to
      each other, so that a batch that is split over devices need not be moved.
    """
    if scale < 0:
        raise UserError(f"guidance_scale {scale} is negative: use 1 for no guidance, more to follow the label more closely")
    if scale == 1:
        return denoise

    def guided(x_BHWC: jax.Array, sigma_B: jax.Array, conditioning: Conditioning) -> jax.Array:
        pairs = {name: jnp.repeat(value, 2, axis=0) for name, value in conditioning.items()}
        pairs["label"] = pairs["label"].at[1::2].set(null_label)
        both = denoise(jnp.repeat(x_BHWC, 2, axis=0), jnp.repeat(sigma_B, 2, axis=0), pairs)
        both = both.reshape(-1, 2, *x_BHWC.shape[1:])
        conditional, unconditional = both[:, 0], both[:, 1]
        return unconditional + scale * (conditional - unconditional)

    return guided
