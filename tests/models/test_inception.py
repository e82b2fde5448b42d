"""The FID network against pytorch-fid's, and both resizes (golden data)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.fid import save_inception
from support.golden import GOLDEN, golden

from diffit_jax.interop import inception as interop
from diffit_jax.models.pretrained import inception


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """(module, variables) of the full size, from generated weights."""
    path = save_inception(tmp_path_factory.mktemp("inception") / "w.safetensors", width=1.0)
    module, variables = interop.load(path)
    return module, variables, jax.jit(module.apply)


@pytest.mark.parametrize(("rule", "prefix"), [("tf1", "tf1_"), ("pytorch_fid", "")])
def test_all_taps(network, rule, prefix):
    """Relative to each array's maximum: measured 3e-6."""
    data = golden("inception.npz")
    _, variables, apply = network
    images = np.moveaxis(data["images"], -1, -3)  # had their channels last already
    resized = inception.resized(images, rule)
    outputs = apply(variables, inception.normalised(resized, rule))
    wanted = (f"{prefix}pool3", f"{prefix}sfid_spatial7", f"{prefix}logits_nobias")
    for ours, name in zip(outputs, wanted, strict=True):
        assert ours.dtype == jnp.float32
        np.testing.assert_allclose(ours, data[name], rtol=0, atol=5e-5 * abs(data[name]).max())


def test_number_of_parameters(network):
    """With running statistics, as in pytorch-fid's file without its counters."""
    assert sum(leaf.size for leaf in jax.tree.leaves(network[1])) == 23_885_392


@pytest.mark.parametrize("side", [512, 256, 64, 32])
def test_resize_of_tensorflow_1(side):
    """Grey levels; measured 3e-5."""
    image, wanted = resized(side)
    ours = inception.resized(image[None], "tf1")[0, ::7, ::5]
    np.testing.assert_allclose(ours, wanted, rtol=0, atol=1e-3)


def test_an_antialiased_resize_is_seen():
    """At 512 pixels it is off by tens of grey levels."""
    image, wanted = resized(512)
    ours = jax.image.resize(image.astype(np.float32), (299, 299, 3), "linear", antialias=True)
    assert abs(ours[::7, ::5] - wanted).max() > 10


@pytest.mark.parametrize("rule", inception.RULES)
def test_images_that_are_no_squares(rule):
    """Against interpolation in float64, one image row and column at a time."""
    image = np.random.default_rng(0).integers(0, 256, (20, 31, 3)).astype(np.uint8)

    def places(size):
        j = np.arange(299)
        if rule == "tf1":
            return j * (size / 299)
        return np.clip((j + 0.5) * (size / 299) - 0.5, 0, None)

    wide = np.stack(
        [
            [np.interp(places(31), np.arange(31), row[:, c].astype(float)) for c in range(3)]
            for row in image
        ]
    )  # (20, 3, 299)
    tall = np.stack(
        [
            [np.interp(places(20), np.arange(20), wide[:, c, x]) for x in range(299)]
            for c in range(3)
        ]
    )  # (3, 299, 299): channel, column, row
    ours = inception.resized(image[None], rule)[0]
    np.testing.assert_allclose(ours, tall.transpose(2, 1, 0), atol=1e-3)


def resized(side):
    with np.load(GOLDEN / "tf1_resize.npz") as data:
        return data[f"image_{side}"], data[f"resized_{side}"]
