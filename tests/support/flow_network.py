"""The network of the recorded flows: a formula whose mean sees the whole picture, so that mistakes
of broadcasting and of height, width and channels show."""

import jax.numpy as jnp
import numpy as np
from support.golden import GOLDEN

from diffit_jax.diffusion.types import END_TIME, TOLD_GUIDANCE


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


def map_parameters(recorded, dtype):
    """Parameters of `map_network_of`: those of `network_of`, and s, the factor of t - r."""
    return parameters(recorded, dtype) | {"s": jnp.asarray(recorded["net.s"], dtype)}


def map_network_of(parameters):
    """The network of two times, u(z, t, h = t - r): tanh(z M + t w + h s + E[label]) + cos(t) z / 2
    + (1 + h) mean(z N) / 4. An absent second time is the first, as in our networks."""

    def network(z_BHWC, t_B, conditioning):
        h_B = t_B - conditioning.get(END_TIME, t_B)
        t, h = (each[:, None, None, None] for each in (t_B, h_B))
        shift = t_B[:, None] * parameters["w"] + h_B[:, None] * parameters["s"]
        shift = (shift + parameters["E"][conditioning["label"]])[:, None, None]
        mean = (z_BHWC @ parameters["N"]).mean(axis=(1, 2), keepdims=True)
        return (
            jnp.tanh(z_BHWC @ parameters["M"] + shift)
            + jnp.cos(t) * z_BHWC / 2
            + (1 + h) * mean / 4
        )

    return network


def told_network_of(parameters):
    """The recorded network of iMF, which is told its guidance: (u, output of the inner head)."""
    network = map_network_of(parameters)

    def told(z_BHWC, t_B, conditioning):
        scale, low, high = (each[:, None, None, None] for each in conditioning[TOLD_GUIDANCE].T)
        t = t_B[:, None, None, None]
        of_scale = 0.1 * (1 - 1 / scale) * z_BHWC
        outer = network(z_BHWC, t_B, conditioning) + of_scale + 0.05 * (high - low) * t
        inner = 0.9 * network(z_BHWC, t_B, {"label": conditioning["label"]}) + of_scale
        return outer, inner

    return told
