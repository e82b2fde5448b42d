"""The autoencoder against diffusers' (golden data); bounds are those of the golden data's README:
a correct float32 port differs by 2e-6 to 8e-6."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.fid import VAE
from support.golden import golden

from diffit_jax.errors import UserError
from diffit_jax.interop import diffusers
from diffit_jax.models.pretrained.autoencoder import Autoencoder
from diffit_jax.runtime import parallel
from diffit_jax.sampling.decoder import LatentDecoder

BOUND = 5e-5


@pytest.fixture(scope="module")
def vae():
    return diffusers.load(VAE)


@pytest.fixture(scope="module")
def data():
    return golden("vae_small.npz")


@pytest.fixture(scope="module")
def encoded(vae, data):
    """(mean, log variance) of the golden images, and what is computed on the way."""
    module, variables = vae
    encode = jax.jit(
        lambda variables, image: module.apply(
            variables, image, method="encode", capture_intermediates=True
        )
    )
    return encode(variables, data["image"])


def test_moments(encoded, data):
    (mean, log_variance), _ = encoded
    np.testing.assert_allclose(mean, data["mean"], rtol=0, atol=BOUND)
    np.testing.assert_allclose(log_variance, data["logvar"], rtol=0, atol=BOUND)


def test_samples(encoded, data):
    (mean, log_variance), _ = encoded
    sample = mean + jnp.exp(log_variance / 2) * data["noise"]
    np.testing.assert_allclose(sample, data["sample"], rtol=0, atol=BOUND)


def test_activations(vae, encoded, data):
    """Relative to each array's maximum."""
    module, variables = vae
    _, decoding = jax.jit(
        lambda variables, z: module.apply(variables, z, method="decode", capture_intermediates=True)
    )(variables, data["z"][:1])
    places = {
        "act_enc_conv_in": ("encoder", "conv_in"),
        "act_enc_down0": ("encoder", "down_1"),
        "act_enc_down3": ("encoder", "stage_3_block_1"),
        "act_enc_mid_attn": ("encoder", "middle", "attention"),
        "act_enc_mid": ("encoder", "middle"),
        "act_dec_mid": ("decoder", "middle"),
        "act_dec_up0": ("decoder", "up_3"),
    }
    assert set(places) == {name for name in data if name.startswith("act_")}
    for name, path in places.items():
        node = (encoded[1] if "enc" in name else decoding)["intermediates"]
        for key in path:
            node = node[key]
        ours, theirs = np.moveaxis(node["__call__"][0], 2, 0)[:1], data[name]
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=BOUND * abs(theirs).max())


def test_decodings(vae, data):
    module, variables = vae
    decode = jax.jit(lambda variables, z: module.apply(variables, z, method="decode"))
    for given, wanted in (("z", "decoded"), ("mean", "decoded_of_mean")):
        ours = decode(variables, data[given])
        np.testing.assert_allclose(ours, data[wanted], rtol=0, atol=BOUND)


def test_bfloat16_comes_close(vae, data):
    """Relative to the largest value: measured 0.014."""
    module, variables = vae
    narrow = module.clone(dtype=jnp.bfloat16)
    ours = jax.jit(lambda v, z: narrow.apply(v, z, method="decode"))(variables, data["z"])
    assert ours.dtype == jnp.float32
    assert abs(ours - data["decoded"]).max() < 0.05 * abs(data["decoded"]).max()


@pytest.mark.parametrize("devices", [1, 2])
def test_the_size_of_slices_changes_no_image(vae, data, devices):
    """Four latents on one and two devices in slices of 1, 2 and 4."""
    module, variables = vae
    latents = np.concatenate([data["z"], data["mean"]]) * 0.18215
    wanted = np.clip(
        127.5 * (np.concatenate([data["decoded"], data["decoded_of_mean"]]) + 1), 0, 255
    )
    mesh = parallel.make_mesh(jax.devices()[:devices])
    on_mesh = jax.device_put(variables, parallel.replicated(mesh))
    images = [
        LatentDecoder(module, on_mesh, mesh, batch_per_device=4 // devices, chunk_size=size)(
            latents
        )
        for size in (1, 2, 4 // devices)
    ]
    assert images[0].dtype == np.uint8 and images[0].shape == (4, 64, 64, 3)
    # Truncated: where the golden value lies within 0.01 of a whole number either side will do.
    edge = abs(wanted - np.rint(wanted)) < 0.01
    assert (abs(images[0].astype(int) - np.floor(wanted)) <= edge).all()
    for others in images[1:]:
        np.testing.assert_array_equal(others, images[0])


def test_any_number_of_latents_is_decoded(vae, data):
    module, variables = vae
    mesh = parallel.make_mesh(jax.devices()[:1])
    decoder = LatentDecoder(
        module, jax.device_put(variables, parallel.replicated(mesh)), mesh, batch_per_device=2
    )
    three = np.concatenate([data["z"], data["mean"][:1]])
    np.testing.assert_array_equal(
        decoder(three), np.concatenate([decoder(three[:1]), decoder(three[1:])])
    )


def test_scaling_is_by_channel_and_undone():
    module = Autoencoder(latent_mean=(1.0, 2.0, 3.0, 4.0), latent_scale=(0.5, 1.0, 2.0, 4.0))
    z = np.arange(8, dtype=np.float32).reshape(1, 1, 2, 4)
    expected = (z - np.array([1, 2, 3, 4])) * np.array([0.5, 1, 2, 4])
    np.testing.assert_allclose(module.scaled(z), expected)
    np.testing.assert_allclose(module.unscaled(module.scaled(z)), z, atol=1e-6)


def test_size_of_the_published_autoencoder():
    """KL-f8 of Stable Diffusion: 83,653,863 parameters."""
    module = Autoencoder()
    shapes = jax.eval_shape(
        module.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    )
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 83_653_863


def test_channels_that_no_group_divides():
    with pytest.raises(UserError, match="channels 100 are not a multiple of its 32 groups"):
        Autoencoder(channels=(100, 128)).check()
