"""What a network shows beside its output: the tokens after a block, and an inner head."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffit_jax import models
from diffit_jax.diffusion.edm import EDM
from diffit_jax.errors import UserError
from diffit_jax.models.diffit.blocks import DiffiTBlock, repeat_block
from diffit_jax.models.diffit.image import ImageDiffiT
from diffit_jax.models.diffit.latent import LatentDiffiT

IMAGE = ImageDiffiT(8, channels=(8, 16), num_blocks=(2, 1), head_width=8, time_width=16)
LATENT = LatentDiffiT(8, hidden_size=16, depth=3, num_heads=2, num_classes=0)


def random_variables(model):
    shapes = jax.eval_shape(lambda: models.init_variables(model, jax.random.key(0)))
    draws = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.float32(draws.normal(size=leaf.shape) * 0.3), shapes)


def inputs(model):
    x = jax.random.normal(jax.random.key(1), (2, *model.sample_shape))
    return x, jnp.array([0.3, -0.7]), {}


@pytest.mark.parametrize("unroll", [1, 3])
def test_captured_tokens_are_those_of_a_shallower_network(unroll):
    """A network of k + 1 blocks hands on what the deeper one captures after block k."""
    model = LATENT.clone(scan_unroll=unroll)
    variables, batch = random_variables(model), inputs(model)
    y = jax.jit(models.as_network(model, variables))(*batch)
    for k in range(model.depth):
        again, tokens = jax.jit(models.as_network(model, variables, capture=k))(*batch)
        np.testing.assert_allclose(again, y, rtol=1e-5, atol=1e-5)
        first = jax.tree.map(
            lambda leaf, k=k: np.asarray(leaf)[: k + 1], variables["params"]["blocks"]
        )
        cut = {**variables, "params": variables["params"] | {"blocks": first}}
        shallow = model.clone(depth=k + 1, scan_unroll=1)
        assert tokens.shape == (2, 16, 16)
        _, last = jax.jit(models.as_network(shallow, cut, capture=k))(*batch)
        np.testing.assert_allclose(tokens, last, rtol=1e-5, atol=1e-5)
        # And the head makes the shallow network's output of them.
        ours = nn.silu(nn.LayerNorm(1e-6, use_scale=False, use_bias=False).apply({}, tokens))
        final = variables["params"]["final"]
        ours = ours @ final["kernel"] + final["bias"]
        ours = ours.reshape(2, 4, 4, 2, 2, 8).transpose(0, 1, 3, 2, 4, 5).reshape(2, 8, 8, 8)
        theirs = jax.jit(models.as_network(shallow, cut))(*batch)
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_blocks_of_the_encoder_are_counted_in_order():
    variables, batch = random_variables(IMAGE), inputs(IMAGE)
    networks = [models.as_network(IMAGE, variables, capture=k) for k in range(3)]
    shapes = [jax.eval_shape(network, *batch)[1].shape for network in networks]
    assert shapes == [(2, 8, 8, 8), (2, 8, 8, 8), (2, 4, 4, 16)]
    for model, count in ((IMAGE, 3), (LATENT, 3)):
        for k in (-1, count):
            with pytest.raises(UserError, match=f"no block {k} to capture: the blocks are 0 to 2"):
                models.as_network(model, random_variables(model), capture=k)(*inputs(model))


def test_what_is_captured_is_differentiable():
    """A loss on the tokens of block 1 reaches its parameters and those before, and none after."""
    variables, batch = random_variables(LATENT), inputs(LATENT)

    def loss(params):
        network = models.as_network(LATENT, {**variables, "params": params}, capture=1)
        return jnp.sum(network(*batch)[1] ** 2)

    gradient = jax.jit(jax.grad(loss))(variables["params"])["blocks"]["mlp_in"]["kernel"]
    assert [bool(jnp.any(layer)) for layer in gradient] == [True, True, False]


def test_each_layer_may_have_a_time_token_of_its_own():
    """Equal ones are one for all; others are those that the copies would have had alone."""
    times = jax.random.normal(jax.random.key(2), (3, 2, 16))

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x, time):
            return repeat_block(DiffiTBlock(2, 4, name="blocks"), x, time, 3)[0]

    x = jax.random.normal(jax.random.key(3), (2, 1, 16, 16))
    variables = jax.jit(Stack().init)(jax.random.key(0), x, times)
    stack, block = jax.jit(Stack().apply), jax.jit(DiffiTBlock(2, 4).apply)
    alone = x
    for number in range(3):
        layer = jax.tree.map(
            lambda leaf, n=number: np.asarray(leaf)[n], variables["params"]["blocks"]
        )
        alone = block({"params": layer}, alone, times[number])
    np.testing.assert_allclose(stack(variables, x, times), alone, rtol=1e-5, atol=1e-5)
    one = stack(variables, x, times[0])
    same = stack(variables, x, jnp.stack([times[0]] * 3))
    np.testing.assert_allclose(one, same, rtol=1e-6, atol=1e-6)


SIZES = dict(hidden_size=16, depth=3, num_heads=2, num_classes=0, learn_sigma=False)


@pytest.mark.parametrize("capture", [None, 0, 1, 2])
def test_an_inner_head_is_a_last_layer_after_some_blocks(capture):
    """It is the output of the network with so many blocks and that last layer; with tokens of any
    block beside it. A process sees the outer output alone, as of the plain network."""
    plain, model = LatentDiffiT(8, **SIZES), LatentDiffiT(8, inner_head=2, **SIZES)
    variables, (x, level, _) = random_variables(model), inputs(model)

    def output(model, variables, **more):
        return jax.jit(models.as_network(model, variables, **more))(x, level, {})

    y, inner, *tokens = output(model, variables, inner=True, capture=capture)
    params = dict(variables["params"])
    head = params.pop("inner_final")
    first = jax.tree.map(lambda leaf: np.asarray(leaf)[:2], params["blocks"])
    shallow = {**variables, "params": params | {"blocks": first, "final": head}}
    cut = {**variables, "params": params}
    expected = output(plain.clone(depth=2), shallow)
    np.testing.assert_allclose(inner, expected, rtol=1e-4, atol=1e-4)
    outer = output(plain, cut, capture=capture)
    outer, theirs = (outer, []) if capture is None else (outer[0], [outer[1]])
    for ours, other in zip([y, *tokens], [outer, *theirs], strict=True):
        np.testing.assert_allclose(ours, other, rtol=1e-4, atol=1e-4)
    alone = output(model, variables, capture=capture)
    for ours, other in zip(jax.tree.leaves(alone), [y, *tokens], strict=True):
        np.testing.assert_allclose(ours, other, rtol=1e-6, atol=1e-6)
    sigma = jnp.array([0.5, 2.0])
    denoise = lambda network: jax.jit(lambda x: EDM().denoise(network, x, sigma, {}))(x)
    denoised, by_inner = denoise(models.as_network(model, variables, inner=True))
    for ours, network in (
        (denoised, models.as_network(plain, cut)),
        (by_inner, models.as_network(plain.clone(depth=2), shallow)),
    ):
        np.testing.assert_allclose(ours, denoise(network), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("place", [3, 28])
def test_there_is_no_inner_head_behind_the_last_block(place):
    with pytest.raises(
        UserError, match=f"model.inner_head is {place}, but the network has 3 blocks"
    ):
        LatentDiffiT(8, inner_head=place, **SIZES).check()
