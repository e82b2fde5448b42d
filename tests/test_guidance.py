import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffit_jax.diffusion.guidance import classifier_free, drop_labels
from diffit_jax.errors import UserError

NULL = 10


def denoise(x, sigma, conditioning):
    """A denoiser in which every argument matters."""
    return jnp.sin(x) * sigma[:, None, None, None] + conditioning["label"][:, None, None, None] ** 2


@pytest.fixture
def arguments():
    x = jax.random.normal(jax.random.key(0), (4, 2, 2, 1))
    return x, jnp.array([0.1, 1.0, 2.0, 3.0]), {"label": jnp.array([1, 2, 3, 9])}


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.5, 4.0])
def test_classifier_free_is_the_formula(arguments, scale):
    x, sigma, conditioning = arguments
    conditional, unconditional = denoise(x, sigma, conditioning), denoise(x, sigma, {"label": jnp.full(4, NULL)})
    expected = unconditional + scale * (conditional - unconditional)
    np.testing.assert_allclose(classifier_free(denoise, scale, NULL)(x, sigma, conditioning), expected, rtol=1e-5, atol=1e-5)


def test_scale_one_is_the_conditional_denoiser_itself():
    assert classifier_free(denoise, 1.0, NULL) is denoise


def test_negative_scale():
    with pytest.raises(UserError, match="guidance_scale -1 is negative"):
        classifier_free(denoise, -1, NULL)


def test_drop_labels_rate_and_independence_of_the_batch():
    labels = jnp.arange(20_000) % 10
    keys = jax.random.split(jax.random.key(0), 20_000)
    dropped = drop_labels({"label": labels}, keys, 0.1, NULL)["label"]
    kept = dropped != NULL
    np.testing.assert_array_equal(dropped[kept], labels[kept])
    assert abs(1 - kept.mean() - 0.1) < 0.009  # four standard errors
    np.testing.assert_array_equal(drop_labels({"label": labels[5:9]}, keys[5:9], 0.1, NULL)["label"], dropped[5:9])


def test_drop_labels_leaves_the_rest_alone():
    conditioning = {"label": jnp.arange(3)}
    assert drop_labels(conditioning, jax.random.split(jax.random.key(0), 3), 0.0, NULL) is conditioning
    assert drop_labels({}, jax.random.split(jax.random.key(0), 3), 0.5, NULL) == {}
