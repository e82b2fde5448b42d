"""The blocks against their equations, and the U-shaped network's shapes, dtypes, invariances and
errors."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffit_jax import models
from diffit_jax.errors import UserError
from diffit_jax.models.diffit.attention import TMSA
from diffit_jax.models.diffit.blocks import DiffiTBlock, DiffiTResBlock, Upsample, gelu
from diffit_jax.models.diffit.conditioning import TimeToken, sinusoidal_embedding
from diffit_jax.models.diffit.image import ImageDiffiT

SMALL = dict(
    image_size=8,
    image_channels=3,
    channels=(8, 16),
    num_blocks=(1, 2),
    window=4,
    time_width=16,
    head_width=8,
)


def randomise(params, seed=0, scale=0.3):
    """Random values everywhere: fresh biases and the head are zero and would hide mistakes."""
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(
        tree, [jnp.asarray(rng.normal(size=leaf.shape) * scale, jnp.float32) for leaf in leaves]
    )


def init(model, seed=0):
    return models.init_variables(model, jax.random.key(seed))["params"]


def jitted(model, params):
    """The network, compiled: op by op it would compile a hundred small programs."""
    call = jax.jit(lambda params, *inputs: models.as_network(model, {"params": params})(*inputs))
    return lambda *inputs: call(params, *inputs)


def layer_norm(x, p):
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + 1e-6) * np.asarray(p["scale"]) + np.asarray(p["bias"])


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def test_sinusoidal_embedding():
    embedding = sinusoidal_embedding(jnp.array([0.0, 1.5, 999.0]), 6)
    frequencies = 10_000.0 ** (-np.arange(3) / 3)
    for row, value in zip(embedding, (0.0, 1.5, 999.0), strict=True):
        # One float32 ulp of an angle of 999 is 6e-5.
        np.testing.assert_allclose(
            row,
            np.concatenate([np.cos(value * frequencies), np.sin(value * frequencies)]),
            atol=1e-4,
        )


def test_time_token_absent_label_is_the_null_row():
    module, levels = TimeToken(width=8, num_classes=4), jnp.array([0.1, -0.7])
    variables = module.init(jax.random.key(0), levels)
    null = module.apply(variables, levels, jnp.array([4, 4]))
    np.testing.assert_array_equal(module.apply(variables, levels), null)
    assert np.abs(module.apply(variables, levels, jnp.array([0, 3])) - null).max() > 1e-3


def test_augmentation_labels_of_nothing_add_nothing():
    """As in EDM there is no bias: an absent label is one of zeros."""
    module, levels = TimeToken(width=8, augment_labels=9), jnp.array([0.1, -0.7])
    variables = module.init(jax.random.key(0), levels)
    absent = module.apply(variables, levels)
    np.testing.assert_array_equal(module.apply(variables, levels, None, jnp.zeros((2, 9))), absent)
    labels = np.random.default_rng(0).normal(size=(2, 9)).astype(np.float32)
    added = module.apply(variables, levels, None, labels) - absent
    expected = labels @ np.asarray(variables["params"]["augment_kernel"])
    np.testing.assert_allclose(added, expected, rtol=0, atol=1e-6)


def test_gelu_and_its_gradient():
    """Value and derivative in float64, from the formula."""
    x = np.linspace(-6, 6, 241)
    value, slope = jax.jit(jax.vmap(jax.value_and_grad(gelu)))(jnp.asarray(x, jnp.float32))
    # XLA's float32 tanh is 1.5e-6 away from ±1 where it saturates, which x = 6 magnifies.
    np.testing.assert_allclose(value, gelu_tanh(x), rtol=0, atol=1e-5)
    np.testing.assert_allclose(
        slope, (gelu_tanh(x + 1e-5) - gelu_tanh(x - 1e-5)) / 2e-5, rtol=0, atol=1e-5
    )
    assert gelu(jnp.ones(3, jnp.bfloat16)).dtype == jnp.bfloat16


def test_transformer_block_equals_equations_7_and_8():
    module = DiffiTBlock(num_heads=2, window=2)
    rng = np.random.default_rng(0)
    x, time = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, 3, 4, 8), (2, 5)))
    params = randomise(jax.jit(module.init)(jax.random.key(0), x, time)["params"])
    attention = jax.jit(TMSA(2, 2).apply)(
        {"params": params["attention"]},
        jnp.asarray(layer_norm(np.asarray(x), params["norm_attention"])),
        time,
    )
    middle = np.asarray(attention) + np.asarray(x)
    hidden = layer_norm(middle, params["norm_mlp"]) @ np.asarray(
        params["mlp_in"]["kernel"]
    ) + np.asarray(params["mlp_in"]["bias"])
    expected = (
        gelu_tanh(hidden) @ np.asarray(params["mlp_out"]["kernel"])
        + np.asarray(params["mlp_out"]["bias"])
        + middle
    )
    found = jax.jit(module.apply)({"params": params}, x, time)
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_residual_block_equals_equations_9_and_10():
    module = DiffiTResBlock(num_heads=2, window=2)
    rng = np.random.default_rng(0)
    x, time = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, 4, 6, 8), (2, 5)))
    params = randomise(jax.jit(module.init)(jax.random.key(0), x, time)["params"])
    # Group normalisation over the two groups of four channels, swish, then the convolution tap by
    # tap.
    grouped = np.asarray(x, np.float64).reshape(2, 24, 2, 4)
    mean, variance = grouped.mean((1, 3), keepdims=True), grouped.var((1, 3), keepdims=True)
    normed = ((grouped - mean) / np.sqrt(variance + 1e-6)).reshape(x.shape)
    normed = normed * np.asarray(params["norm"]["scale"]) + np.asarray(params["norm"]["bias"])
    padded = np.pad(normed / (1 + np.exp(-normed)), ((0, 0), (1, 1), (1, 1), (0, 0)))
    convolved = np.zeros(x.shape) + np.asarray(params["conv"]["bias"])
    for row in range(3):
        for column in range(3):
            convolved += padded[:, row : row + 4, column : column + 6] @ np.asarray(
                params["conv"]["kernel"][row, column], np.float64
            )
    out, alone = np.zeros(x.shape), jax.jit(DiffiTBlock(2, 2).apply)
    for row in range(0, 4, 2):  # window by window: TMSA sees nothing beyond
        for column in range(0, 6, 2):
            tokens = convolved[:, row : row + 2, column : column + 2].reshape(2, 1, 4, 8)
            block = alone({"params": params["transformer"]}, np.float32(tokens), time)
            out[:, row : row + 2, column : column + 2] = np.asarray(block).reshape(2, 2, 2, 8)
    found = jax.jit(module.apply)({"params": params}, x, time)
    np.testing.assert_allclose(found, out + np.asarray(x), atol=5e-5)


def test_upsample_is_a_transposed_convolution():
    x = jax.random.normal(jax.random.key(0), (2, 3, 3, 4))
    params = randomise(Upsample(5).init(jax.random.key(1), x)["params"])
    kernel = params["project"]["kernel"].reshape(4, 2, 2, 5).transpose(1, 2, 0, 3)
    # XLA slides the mirrored kernel over the input with gaps.
    expected = jax.lax.conv_transpose(
        x, kernel[::-1, ::-1], (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    bias = jnp.tile(params["project"]["bias"].reshape(2, 2, 5), (3, 3, 1))
    np.testing.assert_allclose(Upsample(5).apply({"params": params}, x), expected + bias, atol=1e-5)


@pytest.mark.parametrize("num_classes", [0, 5])
def test_image_network_shapes_dtypes_gradients(num_classes):
    model = ImageDiffiT(**SMALL, num_classes=num_classes)
    x, level = jax.random.normal(jax.random.key(0), (2, 8, 8, 3)), jnp.array([-1.0, 0.5])
    conditioning = {"label": jnp.array([0, 3])} if num_classes else {}
    params = init(model)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert not jitted(model, params)(x, level, conditioning).any()  # the head starts at zero
    params = randomise(params)
    network = jitted(model, params)
    out = network(x, level, conditioning)
    assert out.shape == x.shape and out.dtype == jnp.float32
    if num_classes:
        np.testing.assert_array_equal(
            network(x, level, {}), network(x, level, {"label": jnp.array([5, 5])})
        )
        assert np.abs(out - network(x, level, {})).max() > 1e-4

    gradient = jax.jit(
        jax.grad(
            lambda p: jnp.sum(models.as_network(model, {"params": p})(x, level, conditioning) ** 2)
        )
    )(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        name = jax.tree_util.keystr(path)
        assert np.isfinite(leaf).all(), name
        if "qkv_bias" in name:  # stacked over the blocks of a stage: (blocks, 3, heads, width)
            assert not leaf[:, 1].any(), name
        elif "time_qkv_kernel" in name:
            assert not leaf[:, :, 1].any(), name
        else:
            assert np.abs(leaf).max() > 0, name


def test_scan_unroll_does_not_change_the_numbers():
    x, level = jax.random.normal(jax.random.key(0), (2, 8, 8, 3)), jnp.array([-1.0, 0.5])
    outputs = []
    for unroll in (1, 2, 9):
        model = ImageDiffiT(**SMALL, scan_unroll=unroll)
        params = randomise(init(model))
        outputs.append(jitted(model, params)(x, level, {}))
    np.testing.assert_allclose(outputs[1], outputs[0], atol=1e-4 * np.abs(outputs[0]).max())
    np.testing.assert_allclose(outputs[2], outputs[0], atol=1e-4 * np.abs(outputs[0]).max())


def test_blocks_of_a_stage_start_different():
    params = init(ImageDiffiT(**SMALL))
    kernel = params["encoder_1"]["conv"]["kernel"]
    assert kernel.shape == (2, 3, 3, 16, 16) and np.abs(kernel[0] - kernel[1]).max() > 0.01


def test_lists_are_as_good_as_tuples():
    lists = {
        key: list(value) if isinstance(value, tuple) else value for key, value in SMALL.items()
    }
    assert any(isinstance(value, list) for value in lists.values())
    model = ImageDiffiT(**lists)
    assert model == ImageDiffiT(**SMALL) and hash(model) == hash(ImageDiffiT(**SMALL))


def test_bfloat16_is_close_to_float32():
    x, level = jax.random.normal(jax.random.key(0), (2, 8, 8, 3)), jnp.array([-1.0, 0.5])
    params = randomise(init(ImageDiffiT(**SMALL)), scale=0.1)
    exact, rounded = (
        jitted(ImageDiffiT(**SMALL, dtype=dtype), params)(x, level, {})
        for dtype in ("float32", "bfloat16")
    )
    assert rounded.dtype == jnp.float32
    error = np.abs(exact - rounded).max() / np.abs(exact).max()
    # 8 bits through some twenty layers; not zero, or it computed in float32.
    assert 1e-5 < error < 0.05


def test_paper_sizes():
    """CIFAR-10 and FFHQ-64 of appendix I.1: stages, windows and channels fit together, and the head
    count follows from them."""
    for size, channels, blocks, window in (
        (32, (128, 256, 256), (2, 2, 2), 4),
        (64, (128, 256, 256, 256), (1, 2, 2, 2), 8),
    ):
        model = ImageDiffiT(size, 3, channels, blocks, window)
        shapes = jax.eval_shape(
            lambda model=model: models.init_variables(model, jax.random.key(0))["params"]
        )
        assert shapes["encoder_0"]["transformer"]["attention"]["relative_position_bias"].shape == (
            blocks[0],
            (2 * window - 1) ** 2,
            2,
        )
        assert shapes["decoder_1"]["transformer"]["attention"]["qkv_kernel"].shape == (
            blocks[1],
            256,
            3,
            4,
            64,
        )
        x = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
        out = jax.eval_shape(
            lambda p, x, model=model: models.as_network(model, {"params": p})(x, jnp.zeros(2), {}),
            shapes,
            x,
        )
        assert out.shape == x.shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(image_size=9), "image_size 9 is not divisible by 2"),
        (
            dict(image_size=12, window=5),
            "stage 0 is 12 pixels wide, which window 5 does not divide",
        ),
        (
            dict(image_size=20, window=4),
            "stage 1 is 10 pixels wide, which window 4 does not divide",
        ),
        (dict(num_blocks=(1,)), "give one entry for each stage"),
        (dict(head_width=6), "stage 0 has 8 channels, which is not a multiple of head_width 6"),
    ],
)
def test_sizes_that_do_not_fit(change, message):
    with pytest.raises(UserError, match=message):
        ImageDiffiT(**(SMALL | change)).check()


def test_module_is_functional():
    """The same parameters and inputs give the same output, and apply changes nothing."""
    model = ImageDiffiT(**SMALL)
    assert isinstance(model, nn.Module)
    params = randomise(init(model))
    x, level = jax.random.normal(jax.random.key(0), (1, 8, 8, 3)), jnp.zeros(1)
    network = jitted(model, params)
    np.testing.assert_array_equal(network(x, level, {}), network(x, level, {}))
