"""Reading the golden data, in our layout."""

from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import load_file

from diffit_jax import models

GOLDEN = Path(__file__).parents[1] / "golden"
WEIGHTS = {"a": GOLDEN / "diffit_a.safetensors", "b": GOLDEN / "diffit_b_noindex.safetensors"}


def channels_last(array):
    """(…, C, H, W) → (…, H, W, C); other arrays as they are."""
    return np.moveaxis(array, -3, -1) if array.ndim >= 4 else array


def golden(name):
    """An npz file as a dict of arrays, images with channels last."""
    with np.load(GOLDEN / name) as arrays:
        return {key: channels_last(arrays[key]) for key in arrays.files}


def golden_tensors(name):
    return load_file(GOLDEN / name)


def loss_at(process, network, x, draw, noise, conditioning):
    """The loss at given noise levels (or steps), with given noise, and its terms."""
    noised = process.noised_at(x, draw, noise)
    return process.loss_of(noised, network(noised.x_BHWC, noised.level_B, conditioning))


def evaluate(module, variables, *inputs):
    """The network, compiled."""
    return jax.jit(lambda variables, *inputs: models.as_network(module, variables)(*inputs))(
        variables, *inputs
    )
