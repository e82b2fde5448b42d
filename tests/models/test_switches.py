"""The switches of the paper's ablations, against float64 numpy written from their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import numpy_network
from support.configs import small_config, small_latent_config

from diffit_jax import models
from diffit_jax.errors import UserError
from diffit_jax.experiment.config import build
from diffit_jax.models import ImageDiffiT, LatentDiffiT
from diffit_jax.models.diffit.attention import TMSA
from diffit_jax.models.diffit.blocks import DiffiTBlock
from diffit_jax.runtime.backend import enable_x64

IMAGE = ImageDiffiT(
    image_size=8,
    image_channels=2,
    channels=(8, 16),
    num_blocks=(1, 2),
    window=2,
    time_width=12,
    head_width=4,
    num_classes=3,
    mlp_ratio=2,
    mla_width=16,
    dtype=jnp.float64,
)
LATENT = LatentDiffiT(
    6, 2, hidden_size=8, depth=2, num_heads=2, mlp_ratio=2, num_classes=3, dtype=jnp.float64
)
CASES = {
    "image": IMAGE.clone(time_embedding="fourier", stage_windows=(4, 2), resblock_conv=False),
    "image bias": IMAGE.clone(time_in="bias", attention="auto"),
    "image token": IMAGE.clone(time_in="token", attention="auto"),
    "image encoder half": IMAGE.clone(tmsa_half="encoder"),
    "image decoder half": IMAGE.clone(tmsa_half="decoder"),
    "image single, mlp": IMAGE.clone(
        encoder="single", decoder="mla", channels=(8, 8), time_in="mlp"
    ),
    "image mla, adaln": IMAGE.clone(decoder="mla", time_in="adaln"),
    "latent": LATENT.clone(time_embedding="fourier"),
    **{f"latent {name}": LATENT.clone(time_in=name) for name in ("mlp", "token", "adaln", "add")},
}


def drawn(tree, seed):
    draws = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: draws.normal(size=leaf.shape) * 0.4, tree)


@pytest.mark.parametrize("name", CASES)
def test_a_switch_is_its_formula_and_every_parameter_has_a_gradient(name):
    model = CASES[name]
    model.check_sizes()
    shapes = jax.eval_shape(lambda: models.init_variables(model, jax.random.key(0)))
    variables, way = drawn(shapes, 0), drawn(shapes, 1)["params"]
    x = np.random.default_rng(2).normal(size=(2, *model.sample_shape))
    levels, labels = np.array([-0.7, 0.3]), np.array([1, 3])

    is_image = isinstance(model, ImageDiffiT)
    network_of = numpy_network.image_network if is_image else numpy_network.latent_network

    def reference(variables, example):
        return network_of(model, variables, x[example], levels[example], labels[example])

    with enable_x64(True):

        def loss(params):
            network = models.as_network(model, {**variables, "params": params})
            out = network(jnp.asarray(x), jnp.asarray(levels), {"label": jnp.asarray(labels)})
            return jnp.mean(out[1] ** 2), out

        quickly = {"xla_backend_optimization_level": 0}  # compiled, for it runs once
        both = jax.jit(jax.grad(loss, has_aux=True), compiler_options=quickly)
        gradient, out = both(variables["params"])
        gradient = jax.tree.map(np.asarray, gradient)
    expected = np.stack([reference(variables, example) for example in range(2)])
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-10 * np.abs(expected).max())
    for path, leaf in jax.tree_util.tree_flatten_with_path(gradient)[0]:
        assert leaf.any(), jax.tree_util.keystr(path)

    def along(step):
        moved = jax.tree.map(lambda at, by: at + step * by, variables["params"], way)
        return np.mean(reference({**variables, "params": moved}, 1) ** 2)

    # Central differences: measured 1e-8 to 4e-6; the steps are small for the kinks of "mla".
    slope = (along(1e-6) - along(-1e-6)) / 2e-6
    ours = sum(jax.tree.leaves(jax.tree.map(lambda g, by: np.sum(g * by), gradient, way)))
    np.testing.assert_allclose(ours, slope, rtol=1e-5)


def test_a_gate_and_a_bias_of_time_are_zero_at_first():
    x, time = jnp.ones((1, 1, 4, 8)), jnp.ones((1, 4))
    adaln = jax.jit(DiffiTBlock(2, 2, time_in="adaln").init)(jax.random.key(0), x, time)["params"]
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(adaln["time_modulation"]))
    bias = jax.jit(TMSA(2, 2, time_in="bias").init)(jax.random.key(0), x, time)["params"]
    assert not np.any(bias["time_bias_kernel"])


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (small_latent_config, dict(model__time_in="bias"), "would add"),
        (small_latent_config, dict(model__time_in="nowhere"), "model.time_in is 'nowhere': use tm"),
        (small_latent_config, dict(model__tmsa_half="encoder"), "model.tmsa_half is unknown"),
        (small_latent_config, dict(model__time_in="add", model__slim_tmsa=True), "slim_tmsa"),
        (
            small_latent_config,
            dict(model__time_in="token", model__attention="cudnn"),
            "tokens outside the grid",
        ),
        (
            small_config,
            dict(model__time_in="bias", model__attention="cudnn"),
            "a position bias for each example",
        ),
        (small_config, dict(model__encoder="single"), "set model.decoder to mla"),
        (small_config, dict(model__tmsa_half="encoder", model__time_in="add"), "tmsa_half"),
        (small_config, dict(model__stage_windows=(4, 4)), "stage_windows (4, 4) describe 2"),
        (small_config, dict(model__stage_windows=(3,)), "change stage_windows"),
    ],
)
def test_switches_that_cannot_be_are_refused_by_name(make, settings, message):
    with pytest.raises(UserError) as caught:
        build(make(**settings))
    assert message in str(caught.value) and "\n" not in str(caught.value)
