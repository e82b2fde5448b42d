"""Pixels and latents, on their way in and out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffit_jax.data.sources import SyntheticSource
from diffit_jax.sections import Data
from diffit_jax.spaces import LatentSpace, PixelSpace, make_space

KEYS = jax.random.split(jax.random.key(0), 4)
SPACES = {"pixels": PixelSpace(), "latents": LatentSpace("vae")}


def test_a_config_has_one_of_the_two():
    assert make_space(Data("digits"), "adm") == PixelSpace("adm")
    assert make_space(Data("x", autoencoder="vae"), "adm") == LatentSpace("vae")


@pytest.mark.parametrize("name", SPACES)
def test_examples_of_a_source_are_those_that_the_space_expects(name):
    space = SPACES[name]
    batch = SyntheticSource((8, 8, 4), 10, latents=space.example == "latent").read(np.arange(4))
    expected = space.batch(4, (8, 8, 4))
    assert {key: (value.shape, value.dtype) for key, value in batch.items()} == {
        key: (value.shape, value.dtype) for key, value in expected.items()
    }
    x_BHWC, conditioning = jax.jit(space.enter)(batch, KEYS, space.variables)
    assert x_BHWC.shape == (4, 8, 8, 4) and x_BHWC.dtype == jnp.float32 and conditioning == {}
    assert jax.tree.leaves(space.variables) == []


@pytest.mark.parametrize("rounding", ["edm", "adm"])
def test_pixels_come_back_as_they_went_in(rounding):
    """Of all 256 levels: exactly, by either rule."""
    space, levels = PixelSpace(rounding), np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    x_BHWC, _ = space.enter({"image": levels}, KEYS[:1], space.variables)
    # ADM's rule truncates: a level that float32 leaves a bit below itself falls to the next.
    back = space.leave(x_BHWC + (1e-6 if rounding == "adm" else 0), space.variables)
    np.testing.assert_array_equal(back, levels)


def test_latents_leave_as_they_are():
    latents = np.random.default_rng(0).normal(size=(2, 4, 4, 4)).astype(np.float32)
    space = LatentSpace("vae")
    np.testing.assert_array_equal(space.leave(latents, space.variables), latents)
    assert space.preview(latents).shape == (2, 4, 4, 3) and "vae" in space.note


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_previews_have_one_or_three_channels(channels):
    shown = 3 if channels >= 3 else 1
    x = np.zeros((2, 4, 4, channels), np.float32)
    for space in SPACES.values():
        picture = space.preview(x)
        assert picture.shape == (2, 4, 4, shown) and picture.dtype == np.uint8
    whole = PixelSpace().leave(x, {})
    np.testing.assert_array_equal(PixelSpace().preview(whole), PixelSpace().preview(x))
