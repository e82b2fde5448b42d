"""The network of the recorded flows: a formula whose mean sees the whole picture, so that mistakes
of broadcasting and of height, width and channels show."""

import jax.numpy as jnp
import numpy as np
from support.golden import GOLDEN


def parameters(recorded, dtype):
    """Its parameters M, N, w and E, of a file of golden data."""
    return {name: jnp.asarray(recorded[f"net.{name}"], dtype) for name in "MNwE"}


def network_of(parameters):
    """`network(x_BHWC, t_B, conditioning)`: tanh(x M + t w + E[label]) + cos(t) x / 2 + mean(x N)
    / 4."""

    def network(x_BHWC, t_B, conditioning):
        t = t_B[:, None, None, None]
        shift = (t_B[:, None] * parameters["w"] + parameters["E"][conditioning["label"]])[
            :, None, None
        ]
        mean = (x_BHWC @ parameters["N"]).mean(axis=(1, 2), keepdims=True)
        return jnp.tanh(x_BHWC @ parameters["M"] + shift) + jnp.cos(t) * x_BHWC / 2 + mean / 4

    return network


def assert_within(found, recorded, tolerance):
    """Within `tolerance` of the largest value, as the golden data state their bounds."""
    bound = tolerance * np.abs(recorded).max()
    np.testing.assert_allclose(np.asarray(found), recorded, rtol=0, atol=bound)


def recorded(name):
    """A file of `golden/flow`, whose images have their channels last already."""
    with np.load(GOLDEN / "flow" / f"{name}.npz") as arrays:
        return {key: arrays[key] for key in arrays.files}
