"""Dropout in the blocks: by each example's key, in training only."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.configs import small_config, small_latent_config

from diffit_jax import models
from diffit_jax.errors import UserError
from diffit_jax.experiment.config import build
from diffit_jax.models.diffit.blocks import dropped

KEYS = jax.random.split(jax.random.key(0), 8)


@pytest.mark.parametrize("rate", [0.05, 0.13, 0.9])
def test_a_share_is_dropped_and_the_mean_stays(rate):
    x = jnp.full((8, 50, 100), 3.0)
    y = np.asarray(dropped(x, KEYS, rate))
    # 4 standard errors of a share of 40,000 values.
    assert abs((y == 0).mean() - rate) < 4 * np.sqrt(rate * (1 - rate) / y.size)
    np.testing.assert_allclose(y[y != 0], 3 / (1 - rate), rtol=2e-4)  # rates are 65,536ths
    for axis in (1, 2):  # no rows or columns, and each example its own
        assert (y == 0).mean(axis=axis).min() > 0 or rate < 0.1
    assert (y[0] != y[1]).any()


def test_examples_do_not_depend_on_each_other_and_dtypes_stay():
    x = jnp.ones((8, 5, 4), jnp.bfloat16)
    whole = dropped(x, KEYS, 0.5)
    assert whole.dtype == jnp.bfloat16
    np.testing.assert_array_equal(dropped(x[3:4], KEYS[3:4], 0.5)[0], whole[3])
    np.testing.assert_array_equal(dropped(x, KEYS, 0.0), x)


CONFIGS = {"image": small_config(), "latent": small_latent_config()}


@pytest.mark.parametrize("name", CONFIGS)
def test_networks_drop_only_with_keys(name):
    plain = build(CONFIGS[name]).model
    model = plain.clone(dropout=0.5)
    variables = models.init_variables(model, jax.random.key(0))
    # Fresh last layers are zero.
    variables = jax.tree.map(
        lambda leaf: np.float32(leaf + 0.1 * np.cos(np.arange(leaf.size)).reshape(leaf.shape)),
        variables,
    )
    x = jax.random.normal(jax.random.key(1), (8, *model.sample_shape))
    level = jnp.linspace(-1, 1, 8)

    def call(model, conditioning, rows=slice(None)):
        network = jax.jit(lambda v, *inputs: models.as_network(model, v)(*inputs))
        return np.asarray(network(variables, x[rows], level[rows], conditioning))

    without = call(plain, {})
    np.testing.assert_array_equal(call(model, {}), without)
    np.testing.assert_array_equal(call(plain, {"dropout_key": KEYS}), without)
    with_keys = call(model, {"dropout_key": KEYS})
    assert np.abs(with_keys - without).max(axis=(1, 2, 3)).min() > 1e-3
    # An example's mask is its key's: 1e-5 for another order of sums in a batch of another size.
    one = call(model, {"dropout_key": KEYS[5:6]}, slice(5, 6))
    np.testing.assert_allclose(one[0], with_keys[5], rtol=0, atol=1e-4)
    other = call(model, {"dropout_key": KEYS[::-1]})
    assert np.abs(other - with_keys).max() > 1e-3


def test_every_block_has_its_own_mask(monkeypatch):
    """Blocks share parameters' names and code: what tells their keys apart is their number."""
    from diffit_jax.models.diffit import blocks

    seen = []
    original = blocks.dropped

    def note(data):
        seen.append(np.asarray(data).tobytes())
        return np.float32(0)

    def watched(x, key_B, rate):
        # Pure: Flax traces a scan's body once more, and wants no effect of it there.
        zero = jax.ShapeDtypeStruct((), np.float32)
        x = x + jax.pure_callback(note, zero, jax.random.key_data(key_B))
        return original(x, key_B, rate)

    monkeypatch.setattr(blocks, "dropped", watched)
    config = small_config(model__channels=(8, 16), model__num_blocks=(2, 1))
    model = build(config).model.clone(dropout=0.5)

    def run():
        variables = models.init_variables(model, jax.random.key(0))
        x = jnp.zeros((8, *model.sample_shape))
        return models.as_network(model, variables)(x, jnp.zeros(8), {"dropout_key": KEYS})

    jax.block_until_ready(jax.jit(run)())
    assert len(seen) == len(set(seen)) == 5  # encoder 2 + 1, decoder 2


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5, float("nan")])
def test_rates_outside_of_0_to_1(rate):
    for config in (small_config(), small_latent_config()):
        config.model.dropout = rate
        with pytest.raises(UserError, match=r"key model.dropout is .*: it must be .*between"):
            build(config)
