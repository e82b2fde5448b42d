"""Pixels and latents, on their way in and out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffit_jax.data import augment, pixels
from diffit_jax.data.augment import Augmentation
from diffit_jax.data.sources import SyntheticSource
from diffit_jax.errors import UserError
from diffit_jax.experiment.sections import Data
from diffit_jax.experiment.spaces import LatentSpace, PixelSpace, make_space

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
    x_BHWC, conditioning = jax.jit(space.to_model)(batch, KEYS, {})
    assert x_BHWC.shape == (4, 8, 8, 4) and x_BHWC.dtype == jnp.float32 and conditioning == {}


def test_augmented_pixels_come_with_what_was_done_to_them():
    augmentation = Augmentation(probability=0.9)
    space = make_space(Data("digits"), "edm", augmentation)
    images = np.random.RandomState(0).randint(0, 256, (4, 8, 8, 3)).astype(np.uint8)
    x_BHWC, conditioning = jax.jit(space.to_model)({"image": images}, KEYS, {})
    expected = augment.augment(augmentation, pixels.to_model(images), KEYS)
    # Compiled with another neighbourhood: 1e-6 was measured.
    np.testing.assert_allclose(x_BHWC, expected[0], rtol=0, atol=5e-6)
    np.testing.assert_allclose(conditioning["augment"], expected[1], rtol=0, atol=1e-6)
    assert conditioning["augment"].shape == (4, 9)


def test_latents_are_not_augmented():
    with pytest.raises(UserError, match="latents of vae: only images are augmented; set it to 0"):
        make_space(Data("x", autoencoder="vae"), "edm", Augmentation(probability=0.1))


@pytest.mark.parametrize("rounding", ["edm", "adm"])
def test_pixels_come_back_as_they_went_in(rounding):
    """Of all 256 levels: exactly, by either rule."""
    space, levels = PixelSpace(rounding), np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    x_BHWC, _ = space.to_model({"image": levels}, KEYS[:1], {})
    # ADM's rule truncates: a level that float32 leaves a bit below itself falls to the next.
    back = space.from_model(x_BHWC + (1e-6 if rounding == "adm" else 0))
    np.testing.assert_array_equal(back, levels)


def test_latents_leave_as_they_are():
    latents = np.random.default_rng(0).normal(size=(2, 4, 4, 4)).astype(np.float32)
    space = LatentSpace("vae")
    np.testing.assert_array_equal(space.from_model(latents), latents)
    assert space.preview(latents).shape == (2, 4, 4, 3) and "vae" in space.note


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_previews_have_one_or_three_channels(channels):
    shown = 3 if channels >= 3 else 1
    x = np.zeros((2, 4, 4, channels), np.float32)
    for space in SPACES.values():
        image = space.preview(x)
        assert image.shape == (2, 4, 4, shown) and image.dtype == np.uint8
    whole = PixelSpace().from_model(x)
    np.testing.assert_array_equal(PixelSpace().preview(whole), PixelSpace().preview(x))


# --- Moments


def moments_of(count, orientations=2, seed=0):
    """(count, orientations, 4, 4, 6) float16: means that tell the orientations apart, and log
    variances."""
    rng = np.random.default_rng(seed)
    mean = rng.normal(size=(count, orientations, 4, 4, 3))
    mean += 10 * np.arange(orientations)[:, None, None, None]
    log_variance = rng.normal(size=mean.shape) - 2
    return np.concatenate([mean, log_variance], -1).astype(np.float16)


def keys(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


def test_latents_are_drawn_from_their_posteriors():
    """Of 20,000 draws of one latent: half of each orientation; mean and standard deviation within
    four standard errors, after shift and scale."""
    count = 20_000
    one = moments_of(1)
    space = LatentSpace("vae", (1.0, 2.0, 3.0), (0.5, 0.25, 2.0))
    examples = {"moments": np.repeat(one, count, axis=0)}
    x_BHWC, conditioning = jax.jit(space.to_model)(examples, keys(count), {})
    assert x_BHWC.dtype == jnp.float32 and conditioning == {}
    z_BHWC = np.asarray(x_BHWC, np.float64) / space.latent_scale + space.latent_mean
    second = z_BHWC.mean((1, 2, 3)) > 5
    assert abs(second.mean() - 0.5) < 4 * 0.5 / np.sqrt(count)
    mean, log_variance = np.split(one[0].astype(np.float64), 2, axis=-1)
    for orientation, chosen in enumerate((~second, second)):
        std = np.exp(log_variance[orientation] / 2)
        error = np.abs(z_BHWC[chosen].mean(0) - mean[orientation]) / std
        assert error.max() < 4.5 / np.sqrt(chosen.sum())  # the largest of 48
        spread = z_BHWC[chosen].std(0) / std
        assert np.abs(spread - 1).max() < 4.5 / np.sqrt(2 * chosen.sum())


def test_a_draw_is_a_function_of_the_examples_key():
    """In any order, and alone."""
    moments, space = moments_of(6), LatentSpace("vae")
    to_model = jax.jit(space.to_model)
    whole, _ = to_model({"moments": moments}, keys(6), {})
    order = np.array([4, 0, 5, 2, 1, 3])
    moved, _ = to_model({"moments": moments[order]}, keys(6)[order], {})
    np.testing.assert_array_equal(moved, whole[order])
    alone, _ = to_model({"moments": moments[3:4]}, keys(6)[3:4], {})
    np.testing.assert_allclose(alone[0], whole[3], rtol=1e-6)
    other, _ = to_model({"moments": moments}, keys(6, seed=1), {})
    assert (np.asarray(other) != np.asarray(whole)).all(axis=(1, 2, 3)).all()


def test_one_orientation_without_variance_is_its_mean():
    moments = moments_of(5, orientations=1)
    moments[..., 3:] = -30
    x_BHWC, _ = LatentSpace("vae").to_model({"moments": moments}, keys(5), {})
    expected = moments[:, 0, ..., :3].astype(np.float64) * 0.18215
    np.testing.assert_allclose(x_BHWC, expected, atol=1e-6)


def test_draws_are_the_same_on_every_mesh():
    """Divided over two devices, whichever comes first."""
    moments, space = moments_of(8), LatentSpace("vae")
    alone, _ = jax.jit(space.to_model)({"moments": moments}, keys(8), {})
    for devices in (jax.devices(), jax.devices()[::-1]):
        mesh = jax.sharding.Mesh(np.array(devices), "data")
        divided = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
        batch = {"moments": jax.device_put(moments, divided)}
        moved, _ = jax.jit(space.to_model)(batch, jax.device_put(keys(8), divided), {})
        np.testing.assert_allclose(moved, alone, rtol=1e-6, atol=1e-6)
