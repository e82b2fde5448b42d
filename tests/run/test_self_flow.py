"""Two times in one picture (Self-Flow): data, what the network is told, the loss of each pixel.

The teacher and the run as a whole are in test_representation.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.configs import small_config, small_token_config

from diffit_jax import models
from diffit_jax.errors import UserError
from diffit_jax.experiment.config import build
from diffit_jax.run import representation


def near(found, wanted, bound):
    np.testing.assert_allclose(found, wanted, rtol=0, atol=bound)


@pytest.mark.parametrize("second_is", ["drawn", "later"])
def test_tokens_of_one_picture_have_two_times(second_is):
    """Data, what the network is told and the loss of each pixel, from the formulas in float64."""
    config = small_token_config("self_flow", representation__second_is=second_is)
    config.process = {
        "name": "flow", "path": "cosine", "weighting": "cosmap", "direction_weight": 0.5,
        "clock": "u",
    }  # fmt: skip
    experiment = build(config)
    process, count = experiment.process, 64
    keys = jax.random.split(jax.random.key(0), (3, count))
    x = jax.random.normal(jax.random.key(1), (count, *experiment.model.sample_shape))
    y = jax.random.normal(jax.random.key(2), x.shape)

    @jax.jit
    def run():
        noised = process.noise(x, keys[0])
        mixed = representation.mixed(experiment, x, noised, keys[1], keys[2])
        return noised, mixed, mixed.x_BHWC, mixed.told, mixed.earlier_B, mixed.loss_of(process, y)

    noised, mixed, seen, told, earlier, (loss, terms) = run()
    first, second = (
        np.asarray(each.draws["time"], np.float64) for each in (mixed.first, mixed.second)
    )
    drawn = np.asarray(jax.vmap(process.draw_time)(keys[1]), np.float64)
    pair = np.stack([noised.draws["time"], drawn])
    if second_is == "later":
        pair = np.sort(pair, axis=0)
    np.testing.assert_allclose([first, second], pair, atol=1e-6)
    np.testing.assert_allclose(earlier, pair.min(0), atol=1e-6)
    assert (pair[0] > pair[1]).any() == (second_is == "drawn")
    np.testing.assert_allclose(told["second_level"], 1 - second, atol=1e-6)
    np.testing.assert_allclose(mixed.first.level_B, 1 - first, atol=1e-6)
    # A quarter of the tokens, others in each picture, of 2 x 2 pixels each.
    has_second = np.asarray(told["has_second"])
    grid = experiment.model.grid
    assert (has_second.sum(1) == grid * grid // 4).all() and len(np.unique(has_second, axis=0)) > 60
    pixels = np.kron(has_second.reshape(-1, grid, grid), np.ones((1, 2, 2), bool))[..., None]
    times = np.where(pixels, second[:, None, None, None], first[:, None, None, None])
    noise = np.asarray(noised.draws["noise"], np.float64)
    angle = np.pi / 2 * times
    near(seen, np.cos(angle) * x + np.sin(angle) * noise, 1e-5)
    target = np.pi / 2 * (np.sin(angle) * x - np.cos(angle) * noise)  # by u, not by t
    weight = 2 / (np.pi * (1 - 2 * times + 2 * times**2))
    cosine = (y * target).sum(-1) / np.linalg.norm(y, axis=-1) / np.linalg.norm(target, axis=-1)
    direction = (1 - cosine).mean((1, 2))
    near(terms["direction"], direction, 1e-5)
    near(loss, (weight * (y - target) ** 2).mean((1, 2, 3)) + 0.5 * direction, 2e-5)


@pytest.mark.parametrize("time_in", ["tmsa", "adaln", "mlp", "add"])
def test_a_network_is_told_two_times(time_in):
    """The same twice is once; all tokens of the second are tokens of that; else they matter."""
    model = build(small_token_config("self_flow", model__time_in=time_in)).model
    draw = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda leaf: jnp.asarray(0.3 * draw.standard_normal(leaf.shape), jnp.float32),
        models.initial_shapes(model),
    )
    x = jnp.asarray(draw.standard_normal((2, *model.sample_shape)), jnp.float32)
    network = jax.jit(models.as_network(model, variables))
    one, other = jnp.array([0.2, 0.7]), jnp.array([0.9, 0.4])
    some = jnp.asarray(draw.random((2, model.grid**2)) < 0.5)

    def told(first, second, which):
        return network(x, first, {"second_level": second, "has_second": which})

    of_one = network(x, one, {})
    bound = 1e-5 * np.abs(of_one).max()
    near(told(one, one, some), of_one, bound)
    near(told(other, one, jnp.ones_like(some)), of_one, bound)
    assert np.abs(told(one, other, some) - of_one).max() > 100 * bound


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"model__slim_tmsa": True}, "two times: latent_diffit takes them"),
        ({"model__time_in": "token"}, "two times: latent_diffit takes them"),
        ({"representation__second_share": 0.01}, "of 16 tokens leaves none"),
        ({"representation__second_share": 1.0}, "of 16 tokens leaves none"),
        ({"process__prediction": "noise"}, "set process.prediction to velocity"),
        ({"model__class_token": 64}, "trained by representation.kind reg"),
    ],
)
def test_what_cannot_be(changes, match):
    with pytest.raises(UserError, match=match):
        build(small_token_config("self_flow", **changes))


def test_a_network_of_one_time_is_refused():
    config = small_config()
    config.process = {"name": "flow"}
    config.representation = {"kind": "self_flow", "depth": 1, "teacher_depth": 1}
    with pytest.raises(UserError, match="two times: latent_diffit takes them"):
        build(config)
