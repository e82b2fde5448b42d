"""TMSA against Eq. 3-6 as written, in float64 and one element at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffit_jax.errors import UserError
from diffit_jax.models.diffit.attention import TMSA, TwoTimes
from diffit_jax.models.diffit.blocks import DiffiTResBlock
from diffit_jax.models.diffit.windows import dense_tile, merge, partition, relative_position_index
from diffit_jax.models.placement import Placement, use_placement

WINDOW, HEADS, CHANNELS, TIME = 3, 2, 8, 6


def tmsa_as_written(params, x_BNLC, time_BT, window, heads):
    """Eq. 3-6 with q, k and v each the sum of a spatial and a time projection, in float64, key time
    projection and all."""
    p = {name: np.asarray(value, np.float64) for name, value in params.items()}
    batch, windows, tokens, channels = x_BNLC.shape
    width = channels // heads
    out = np.zeros(x_BNLC.shape)
    for b in range(batch):
        for n in range(windows):
            x = np.asarray(x_BNLC[b, n], np.float64)
            spatial = np.einsum("lc,cihd->ilhd", x, p["qkv_kernel"]) + p["qkv_bias"][:, None]
            # One time token of all tokens, (T,), or one of each, (L, T).
            time_LT = np.atleast_2d(np.asarray(time_BT[b], np.float64))
            time = np.einsum("lt,tihd->ilhd", time_LT, p["time_qkv_kernel"])
            q, k, v = spatial + time + p["time_qkv_bias"][:, None]
            heads_out = np.zeros((tokens, heads, width))
            for h in range(heads):
                for i in range(tokens):
                    logits = np.zeros(tokens)
                    for j in range(tokens):
                        rows, columns = i // window - j // window, i % window - j % window
                        row = (rows + window - 1) * (2 * window - 1) + columns + window - 1
                        logits[j] = (
                            q[i, h] @ k[j, h] / np.sqrt(width) + p["relative_position_bias"][row, h]
                        )
                    weights = np.exp(logits - logits.max())
                    heads_out[i, h] = weights / weights.sum() @ v[:, h]
            out[b, n] = np.einsum("lhd,hdc->lc", heads_out, p["out_kernel"]) + p["out_bias"]
    return out


@pytest.fixture(scope="module")
def case():
    """Module, parameters that are all random (fresh biases are zero and would hide mistakes), and
    inputs."""
    module = TMSA(HEADS, WINDOW)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 3, WINDOW**2, CHANNELS)), jnp.float32)
    time = jnp.asarray(rng.normal(size=(2, TIME)), jnp.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x, time)["params"]
    params = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.5, jnp.float32), shapes
    )
    return module, params, x, time


def test_cheap_form_equals_equations_as_written(case):
    module, params, x, time = case
    ours = module.apply({"params": params}, x, time)
    reference = tmsa_as_written(params, x, time, WINDOW, HEADS)
    # float32 rounding of sums over at most 9 terms of order 1; measured 1e-6.
    np.testing.assert_allclose(ours, reference, rtol=0, atol=1e-5)
    assert np.abs(reference).max() > 1


def two_times(tokens):
    """Two time tokens of two images, which tokens have the second, and each token's own."""
    rng = np.random.default_rng(1)
    first, second = rng.normal(size=(2, 2, TIME)).astype(np.float32)
    has_second = rng.random((2, tokens)) < 0.4
    each = np.where(has_second[..., None], second[:, None], first[:, None])
    return TwoTimes(*(jnp.asarray(x) for x in (first, second, has_second))), each


def test_tokens_of_two_times_follow_the_equations_as_written(case):
    """Eq. 3-6 with each token's own time token; keys have their share of it, which matters."""
    module, params, x, _ = case
    x = x[:, :1]
    times, each = two_times(WINDOW**2)
    attend = jax.jit(lambda params, times: module.apply({"params": params}, x, times))
    reference = tmsa_as_written(params, x, each, WINDOW, HEADS)
    np.testing.assert_allclose(attend(params, times), reference, rtol=0, atol=1e-5)
    shareless = params | {"time_qkv_kernel": params["time_qkv_kernel"].at[:, 1].set(0)}
    assert np.abs(attend(shareless, times) - reference).max() > 0.1
    both_first = times._replace(second_BT=times.first_BT)
    of_one = module.apply({"params": params}, x, times.first_BT)
    np.testing.assert_allclose(attend(params, both_first), of_one, rtol=0, atol=1e-5)


def test_key_time_projection_never_matters(case):
    module, params, x, time = case
    reference = tmsa_as_written(params, x, time, WINDOW, HEADS)
    rng = np.random.default_rng(1)
    for name in ("time_qkv_kernel", "time_qkv_bias", "qkv_bias"):
        key = np.asarray(params[name])
        index = (slice(None), 1) if name == "time_qkv_kernel" else (1,)
        changed = key.copy()
        changed[index] = 10 * rng.normal(size=changed[index].shape)
        altered = params | {name: jnp.asarray(changed)}
        # In the equations as written it cancels in the softmax (float64: 1e-14 of the values' size)
        # …
        np.testing.assert_allclose(
            tmsa_as_written(altered, x, time, WINDOW, HEADS), reference, rtol=0, atol=1e-11
        )
        # … and here it is not read at all.
        ours = module.apply({"params": altered}, x, time)
        np.testing.assert_array_equal(ours, module.apply({"params": params}, x, time))
        for other in (0, 2):  # the query's and the value's share of the same parameter do matter
            changed = key.copy()
            changed[(slice(None), other) if name == "time_qkv_kernel" else (other,)] += 1
            assert (
                np.abs(
                    module.apply({"params": params | {name: jnp.asarray(changed)}}, x, time) - ours
                ).max()
                > 1e-3
            )


def test_gradients(case):
    module, params, x, time = case
    gradient = jax.jit(jax.grad(lambda p: jnp.sum(jnp.sin(module.apply({"params": p}, x, time)))))(
        params
    )
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert (
        not gradient["time_qkv_kernel"][:, 1].any()
        and not gradient["time_qkv_bias"][1].any()
        and not gradient["qkv_bias"][1].any()
    )
    # Against central differences of the equations as written, for one entry of every parameter that
    # matters.
    objective = lambda p: np.sum(np.sin(tmsa_as_written(p, x, time, WINDOW, HEADS)))
    for name, leaf in params.items():
        index = tuple(
            size // 2 if axis != int(name.endswith("kernel")) else 0
            for axis, size in enumerate(leaf.shape)
        )
        if name.startswith("out") or name == "relative_position_bias":
            index = tuple(size // 2 for size in leaf.shape)
        numbers = np.asarray(leaf, np.float64)
        step = np.zeros_like(numbers)
        step[index] = 1e-5
        slope = (
            objective(params | {name: numbers + step}) - objective(params | {name: numbers - step})
        ) / 2e-5
        # Sums of a few hundred float32 terms of order 1; measured 2e-5.
        np.testing.assert_allclose(gradient[name][index], slope, rtol=1e-4, atol=2e-4, err_msg=name)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 2e-6), (jnp.bfloat16, 3e-2)])
def test_the_backward_pass_for_cpus_is_the_derivative(case, dtype, tolerance):
    """ "auto" on a CPU; the derivative that JAX takes of the plain attention in float32, relative
    to each array's largest value. Measured 4e-7, and bfloat16's rounding 1e-2."""
    _, params, x, time = case

    def gradients(module):
        def loss(params, x):
            out = module.apply({"params": params}, x, time).astype(jnp.float32)
            return jnp.sum(jnp.sin(out)), out

        return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, x)

    with use_placement(Placement(platform="cpu")):
        ours = gradients(TMSA(HEADS, WINDOW, dtype, backend="auto"))
        plain = gradients(TMSA(HEADS, WINDOW, dtype, backend="xla"))
    exact = gradients(TMSA(HEADS, WINDOW, backend="xla"))
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (ours, plain)), strict=True))
    for one, other in zip(*map(jax.tree.leaves, (ours, exact)), strict=True):
        assert np.abs(one - other).max() <= tolerance * max(np.abs(other).max(), 1e-6)


def test_sown_attention_weights(case):
    module, params, x, time = case
    _, collected = module.apply({"params": params}, x, time, mutable=["intermediates"])
    (weights,) = collected["intermediates"]["attention"]
    assert weights.shape == (2, 3, HEADS, WINDOW**2, WINDOW**2) and weights.dtype == jnp.float32
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)


def test_bfloat16_compute_keeps_float32_parameters(case):
    _, params, x, time = case
    module = TMSA(HEADS, WINDOW, jnp.bfloat16)
    fresh = module.init(jax.random.key(0), x, time)["params"]
    assert {leaf.dtype for leaf in jax.tree.leaves(fresh)} == {jnp.dtype("float32")}
    out = module.apply({"params": params}, x, time)
    assert out.dtype == jnp.bfloat16
    reference = tmsa_as_written(params, x, time, WINDOW, HEADS)
    # bfloat16 has 8 bits: a few roundings of 2^-9 relative to the largest value.
    assert np.abs(np.asarray(out, np.float64) - reference).max() < 0.03 * np.abs(reference).max()


def test_relative_position_index():
    for window in (1, 2, 5):
        index = relative_position_index(window)
        assert index.shape == (window**2, window**2) and index.dtype == np.int32
        # Every row of the table is used.
        assert set(index.ravel()) == set(range((2 * window - 1) ** 2))
        for query in range(window**2):
            for key in range(window**2):
                rows, columns = query // window - key // window, query % window - key % window
                assert (
                    index[query, key]
                    == (rows + window - 1) * (2 * window - 1) + columns + window - 1
                )


def test_windows_brute_force():
    x = np.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
    windows = np.asarray(partition(jnp.asarray(x), (2, 2)))
    assert windows.shape == (2, 6, 4, 3)
    for row in range(4):
        for column in range(6):
            expected = x[:, row, column]
            np.testing.assert_array_equal(
                windows[:, row // 2 * 3 + column // 2, row % 2 * 2 + column % 2], expected
            )
    np.testing.assert_array_equal(merge(jnp.asarray(windows), 4, 6, (2, 2)), x)


def test_heads_must_divide_channels():
    with pytest.raises(UserError, match="8 channels do not divide into 3 heads"):
        TMSA(3, 2).init(jax.random.key(0), jnp.zeros((1, 1, 4, 8)), jnp.zeros((1, 4)))


@pytest.mark.parametrize(
    "height, width, window, tile",
    [
        (32, 32, 4, (4, 32)),  # rows of CIFAR-10's network: eight windows
        (16, 16, 4, (8, 16)),
        (8, 8, 4, (8, 8)),
        (64, 64, 8, (8, 16)),  # of FFHQ's: two
        (32, 32, 8, (8, 16)),
        (16, 16, 8, (8, 16)),
        (8, 8, 8, (8, 8)),
        (16, 16, 16, (16, 16)),  # more than 128 tokens
        (24, 12, 4, (8, 12)),
        (9, 9, 3, (9, 9)),
        (5, 5, 1, (5, 5)),
    ],
)
def test_tiles_of_whole_windows(height, width, window, tile):
    assert dense_tile(height, width, window) == tile


@pytest.mark.parametrize("height, width, window", [(8, 8, 4), (16, 32, 4), (32, 32, 8), (6, 9, 3)])
def test_windows_are_the_same_in_tiles(height, width, window):
    """On a TPU they are computed together; outputs and gradients are those of each by itself."""
    block = DiffiTResBlock(num_heads=2, window=window)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, height, width, 8)), jnp.float32)
    time = jnp.asarray(rng.normal(size=(2, TIME)), jnp.float32)
    shapes = jax.eval_shape(block.init, jax.random.key(0), x, time)
    variables = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.3, jnp.float32), shapes
    )

    def outputs(platform):
        def loss(variables, x):
            y = block.apply(variables, x, time)
            return jnp.sum(jnp.sin(y)), y

        with use_placement(Placement(platform=platform)):
            return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(variables, x)

    here, there = outputs("cpu"), outputs("tpu")
    # Other orders of the sums: 3e-6 of each array's largest value was measured.
    for one, other in zip(jax.tree.leaves(here), jax.tree.leaves(there), strict=True):
        np.testing.assert_allclose(other, one, rtol=0, atol=2e-5 * np.abs(one).max())
    with use_placement(Placement(platform="tpu")):  # attention weights are kept by window
        kept = jax.jit(lambda *given: block.apply(*given, mutable="intermediates")[1])(
            variables, x, time
        )
    (weights,) = kept["intermediates"]["transformer"]["attention"]["attention"]
    assert weights.shape == (2, height * width // window**2, 2, window**2, window**2)
