"""Networks of flow maps: the second time, guidance that is told, and QK-norm."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.trees import random_like

from diffit_jax import models
from diffit_jax.diffusion.flow_map import FlowMap, Span
from diffit_jax.errors import UserError
from diffit_jax.models.diffit import attention_kernel
from diffit_jax.models.diffit.attention import TMSA, relative_position_index
from diffit_jax.models.diffit.blocks import DiffiTBlock
from diffit_jax.models.diffit.conditioning import TimeToken, position_embedding
from diffit_jax.models.diffit.image import ImageDiffiT
from diffit_jax.models.diffit.latent import LatentDiffiT
from diffit_jax.runtime.backend import enable_x64

LATENT = LatentDiffiT(
    input_size=8, hidden_size=16, depth=3, num_heads=2, num_classes=3, learn_sigma=False,
    dtype=jnp.float64,
)  # fmt: skip
IMAGE = ImageDiffiT(
    image_size=8, channels=(8, 16), num_blocks=(2, 1), head_width=8, time_width=16, num_classes=3,
    dtype=jnp.float64,
)  # fmt: skip
MAPS = {
    "latent, blocks": LATENT.clone(end_time_in="blocks", end_time_from=1),
    "latent, sum": LATENT.clone(end_time_in="sum", guidance_in="sum", qk_norm=True),
    "latent, tokens": LATENT.clone(end_time_in="tokens", guidance_in="tokens", inner_head=1),
    "image, blocks": IMAGE.clone(end_time_in="blocks", end_time_from=3, attention="auto"),
    "image, sum": IMAGE.clone(end_time_in="sum", qk_norm=True),
}
T, R = np.array([0.9, 0.4]), np.array([0.3, 0.0])
LABEL = {"label": jnp.array([0, 3])}


def made(model, seed=0):
    """Variables of the size of trained ones, and an input, float64."""
    variables = models.initial_shapes(model)
    params = random_like(variables["params"], seed)
    constants = {}
    if variables["constants"]:
        constants = {"pos_embed": jnp.asarray(position_embedding(model.grid, model.hidden_size))}
    x = random_like(jax.ShapeDtypeStruct((2, *model.sample_shape), jnp.float64), seed + 1)
    return {"params": params, "constants": constants}, x


@pytest.mark.parametrize("name", MAPS)
def test_without_a_second_time_it_is_the_first(name):
    """And without guidance there is none; another time makes another function."""
    model = MAPS[name]
    with enable_x64():
        variables, x = made(model)
        network = jax.jit(models.as_network(model, variables))
        plain = network(x, T, LABEL)
        always = jnp.tile(jnp.array([1.0, 0.0, 1.0]), (2, 1))
        same = network(x, T, {**LABEL, "end_time": T, "guidance": always})
        np.testing.assert_allclose(plain, same, rtol=0, atol=1e-12)
        assert np.abs(network(x, T, {**LABEL, "end_time": R}) - plain).max() > 1e-3
        if model.guidance_in != "none":
            told = always.at[:, 0].set(2.0)
            assert np.abs(network(x, T, {**LABEL, "guidance": told}) - plain).max() > 1e-3


def test_blocks_add_no_parameters_and_their_first_ones_do_not_see_the_second_time():
    """Against the blocks one by one, in float64; and of the U the way down is told t."""
    model = MAPS["latent, blocks"]
    assert jax.tree.structure(models.initial_shapes(model)) == jax.tree.structure(
        models.initial_shapes(LATENT)
    )
    with enable_x64():
        variables, x = made(model)
        params = variables["params"]
        told = {**LABEL, "end_time": R}
        ours, tokens = jax.jit(models.as_network(model, variables, capture=2))(x, T, told)
        embed = jax.jit(TimeToken(16, 3, dtype=jnp.float64).apply)
        of_t, of_r = (embed({"params": params["time"]}, level, LABEL["label"]) for level in (T, R))
        patches = x.reshape(2, 4, 2, 4, 2, 4).transpose(0, 1, 3, 2, 4, 5).reshape(2, 16, 16)
        hidden = patches @ params["patch_embed"]["kernel"] + params["patch_embed"]["bias"]
        hidden = (hidden + variables["constants"]["pos_embed"])[:, None]
        block = jax.jit(DiffiTBlock(2, 4, dtype=jnp.float64, affine_norm=False).apply)
        for number, token in enumerate((of_t, of_r, of_r)):
            layer = jax.tree.map(lambda leaf, n=number: leaf[n], params["blocks"])
            hidden = block({"params": layer}, hidden, token)
        np.testing.assert_allclose(tokens, hidden[:, 0], rtol=0, atol=1e-12)
        assert ours.shape == x.shape
        model = MAPS["image, blocks"]
        variables, x = made(model)
        same = [
            jax.jit(models.as_network(one, variables))(x, T, told)
            for one in (
                IMAGE.clone(end_time_in="blocks", end_time_from=4),
                IMAGE.clone(end_time_in="blocks"),
            )
        ]
        np.testing.assert_array_equal(*same)  # five sevenths of five blocks
        network = jax.jit(models.as_network(model, variables, capture=2))
        down = [network(x, T, {**LABEL, "end_time": end})[1] for end in (R, T)]
        np.testing.assert_array_equal(*down)


@pytest.mark.parametrize("name", MAPS)
def test_the_derivative_equals_central_differences(name):
    """By z and t, r held, in float64: within 1e-7 of the largest value (measured 2e-9)."""
    model, process = MAPS[name], FlowMap()
    with enable_x64():
        variables, z = made(model)
        way = random_like(jax.ShapeDtypeStruct(z.shape, z.dtype), 5)
        told = dict(LABEL)
        if model.guidance_in != "none":
            told["guidance"] = jnp.array([[3.0, 0.1, 0.8], [1.5, 0.2, 0.9]])
        forward = models.as_network(model, variables, forward_mode=True)
        slope = jax.jit(lambda z, way: process.derivative(forward, Span(z, way, T, R), way, told))
        network = models.as_network(model, variables)
        u = jax.jit(lambda step: process.between(network, z + step * way, T + step, R, told))
        difference = (u(1e-6) - u(-1e-6)) / 2e-6
        bound = 1e-7 * np.abs(difference).max()
        np.testing.assert_allclose(slope(z, way), difference, rtol=0, atol=bound)


@pytest.mark.parametrize("width", [8, 128])
def test_qk_norm_as_written(width):
    """Eq. 3-5 with the key's time part and every bias, normalised, against numpy in float64; by the
    kernel in both of its layouts."""
    window, heads = 16, 2
    attention = TMSA(heads, window, dtype=jnp.float64, qk_norm=True)
    x_shape, time_shape = (2, 1, window**2, heads * width), (2, 12)
    with enable_x64():
        x, time = (
            random_like(jax.ShapeDtypeStruct(shape, jnp.float64), n)
            for n, shape in enumerate((x_shape, time_shape))
        )
        shapes = jax.eval_shape(lambda: attention.init(jax.random.key(0), x, time))
        params = random_like(shapes, 3)["params"]
        ours = jax.jit(attention.apply)({"params": params}, x, time)
        p = {name: np.asarray(value) for name, value in params.items()}
        q, k, v = (
            np.einsum("bnlc,chd->bnhld", x, p["qkv_kernel"][:, n])
            + (np.einsum("bt,thd->bhd", time, p["time_qkv_kernel"][:, n]) + p["time_qkv_bias"][n]
               + p["qkv_bias"][n])[:, None, :, None]
            for n in range(3)
        )  # fmt: skip
        q, k = (
            one / np.sqrt((one**2).mean(-1, keepdims=True) + 1e-6) * p[f"{name}_scale"]
            for name, one in (("q", q), ("k", k))
        )
        bias = p["relative_position_bias"][relative_position_index(window)].transpose(2, 0, 1)
        logits = np.einsum("bnhqd,bnhkd->bnhqk", q, k) / np.sqrt(width) + bias
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        out = np.einsum("bnhqk,bnhkd->bnhqd", weights / weights.sum(-1, keepdims=True), v)
        expected = np.einsum("bnhld,hdc->bnlc", out, p["out_kernel"]) + p["out_bias"]
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-12 * np.abs(expected).max())
        # The key's part of time, which cancels without the norm.
        of_key = jax.jit(jax.grad(lambda p: attention.apply({"params": p}, x, time).sum()))(params)
        assert np.abs(of_key["time_qkv_kernel"][:, 1]).max() > 1e-3
    assert attention_kernel.channels_first(width) == (width == 8)
    single = jax.tree.map(np.float32, (params, x, time))
    kernel = TMSA(heads, window, qk_norm=True, backend="pallas")
    by_kernel = jax.jit(kernel.apply)({"params": single[0]}, *single[1:])
    np.testing.assert_allclose(by_kernel, expected, rtol=0, atol=5e-6 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (LATENT.clone(end_time_in="blocks", depth=1), "'blocks', but the network has one"),
        (LATENT.clone(end_time_in="sum", time_embedding="fourier"), "whose slope by the time"),
        (
            LATENT.clone(end_time_in="blocks", end_time_from=3),
            "end_time_from is 3, but the network has 3 blocks, of which at least the last one is "
            "told r: use 1 to 2",
        ),
        (IMAGE.clone(end_time_in="blocks", end_time_from=5), "has 5 blocks"),
        (LATENT.clone(end_time_in="sum", end_time_from=1), "end_time_in is 'sum': set it to 0"),
        (
            LATENT.clone(end_time_in="blocks", end_time_from=1, time_in="token"),
            "model.time_in 'token' has one token for all",
        ),
        (IMAGE.clone(end_time_in="tokens"), "a window of the whole grid, latent_diffit's"),
        (LATENT.clone(qk_norm=True, slim_tmsa=True), "model.slim_tmsa leaves out the key's share"),
        (
            LATENT.clone(end_time_in="tokens", attention="cudnn"),
            "model.attention is 'cudnn', but model.end_time_in is 'tokens'",
        ),
    ],
)
def test_networks_that_cannot_be(model, message):
    with pytest.raises(UserError) as caught:
        model.clone(dtype=jnp.float32).check()
    assert message in str(caught.value) and "\n" not in str(caught.value)
