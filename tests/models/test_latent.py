"""The latent network against golden data of the released one, and its sizes, parametrisations and
switches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.golden import WEIGHTS, evaluate, golden, golden_tensors

from diffit_jax import models
from diffit_jax.diffusion.guidance import Constant, PowerCosine, Unguided, apply_guidance
from diffit_jax.interop import official
from diffit_jax.interop.parametrisation import to_released, to_slim
from diffit_jax.models.diffit.conditioning import position_embedding
from diffit_jax.models.diffit.latent import LatentDiffiT

SMALL = dict(
    input_size=8,
    input_channels=2,
    patch_size=2,
    hidden_size=16,
    depth=3,
    num_heads=2,
    num_classes=5,
)


@pytest.fixture(scope="module")
def network_a():
    return official.load(WEIGHTS["a"])


def random_variables(model, seed=0, scale=0.3):
    """Random values everywhere: fresh biases and the last layer are zero and would hide
    mistakes."""
    shapes = jax.eval_shape(lambda: models.init_variables(model, jax.random.key(0)))
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * scale, jnp.float32), shapes
    )


def inputs(model, batch=3, seed=0):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(batch, *model.sample_shape)), jnp.float32)
    return (
        x,
        jnp.asarray(rng.uniform(0, 999, batch), jnp.float32),
        {"label": jnp.arange(batch) % model.num_classes},
    )


# --- Golden data. Bounds are those a correct float32 port keeps with room; a LayerNorm epsilon of
# 1e-5 shows as 7e-6 and more.


@pytest.mark.parametrize("name", ["a", "b"])
def test_forward_golden(name):
    module, variables = official.load(WEIGHTS[name])
    data = golden(f"diffit_{name}_forward.npz")
    out = evaluate(module, variables, data["x"], data["t"], {"label": data["y"]})
    assert data["t"].tolist() == [0, 37, 500, 999]
    np.testing.assert_allclose(out[:2], data["out"][:2], rtol=0, atol=4e-6)
    # The time frequencies are multiplied by up to 999; one ulp of them is 1e-5 in the output.
    np.testing.assert_allclose(out[2:], data["out"][2:], rtol=0, atol=2e-5)


def test_activations_golden(network_a):
    module, variables = network_a
    data, acts = golden("diffit_a_forward.npz"), golden("diffit_a_acts.npz")
    ends = np.array([0, 3])
    call = jax.jit(
        lambda v, *i: module.apply(v, *i, capture_intermediates=True, mutable=["intermediates"])
    )
    _, collected = call(variables, data["x"][ends], data["t"][ends], {"label": data["y"][ends]})
    seen = collected["intermediates"]
    first = lambda *path: np.asarray(_at(seen, *path)["__call__"][0])
    blocks = first("blocks")[:, :, 0]  # (depth, B, L, C)
    ours = {
        "patch_embed": first("patch_embed"),
        "t_emb": first("time", "out"),
        "y_emb": first("time", "label"),
        "block0_attn": first("blocks", "attention")[0, :, 0],
        "block0_mlp": first("blocks", "mlp_out")[0, :, 0],
        "block0": blocks[0],
        "block1": blocks[1],
        "final_tokens": first("final"),
    }
    assert ours.keys() == acts.keys()
    for name, value in ours.items():
        np.testing.assert_allclose(value, acts[name], rtol=0, atol=2e-5, err_msg=name)


def _at(tree, *path):
    for key in path:
        tree = tree[key]
    return tree


def test_gradients_golden(network_a):
    """Each tensor within 1e-4 of its own maximum (measured 1.3e-5). The key's share is exactly zero
    here, and noise around it there."""
    module, variables = network_a
    data, expected = golden("diffit_a_forward.npz"), golden_tensors("diffit_a_grads.safetensors")
    with np.load(WEIGHTS["a"].parent / "diffit_a_grad_target.npz") as target:
        goal, golden_loss = np.moveaxis(target["target"], 1, -1), float(target["loss"])

    def objective(params):
        out = models.as_network(module, variables | {"params": params})(
            data["x"], data["t"], {"label": data["y"]}
        )
        return jnp.mean((out - goal) ** 2)

    loss, gradient = jax.jit(jax.value_and_grad(objective))(variables["params"])
    np.testing.assert_allclose(loss, golden_loss, rtol=1e-6)
    compared = 0
    for leaf in official.leaves_of(module):
        if leaf.path.startswith("constants"):
            continue
        ours = _at(gradient, *leaf.path.split("/")[1:])
        for layer, name in enumerate(leaf.names):
            theirs, mine = (
                expected[name],
                leaf.to_theirs(np.asarray(ours[layer] if leaf.stacked else ours)),
            )
            if ".qkv_temb." in name or name.endswith("qkv.bias"):
                third = len(mine) // 3
                assert not mine[third : 2 * third].any()
                mine, theirs = (
                    np.delete(array, np.s_[third : 2 * third], 0) for array in (mine, theirs)
                )
            np.testing.assert_allclose(
                mine, theirs, rtol=0, atol=1e-4 * np.abs(theirs).max(), err_msg=name
            )
            compared += 1
    assert compared == len(expected) == 31


@pytest.mark.parametrize(
    ("name", "key", "guidance"),
    [
        ("a", "out_cfg4.4", PowerCosine(4.4, channels=3, skip_tolerance=0)),
        ("a", "out_cfg4.4_pow0.01", PowerCosine(4.4, power=0.01, channels=3, skip_tolerance=0)),
        ("a", "out_cfg1.49", PowerCosine(1.49, channels=3, skip_tolerance=0)),
        ("b", "out_cfg1.49", Constant(1.49, channels=3)),
        ("b", "out_cfg4.4", Constant(4.4, channels=3)),
    ],
)
def test_guided_evaluation_golden(name, key, guidance):
    """The released guided forward pass: three channels guided by t; the fourth and the variances
    come from each half's own pass."""
    module, variables = official.load(WEIGHTS[name])
    data = golden(f"diffit_{name}_cfg.npz")
    x, t, y = (jnp.asarray(data[k][:4]) for k in ("x", "t", "y"))
    network = lambda *i: evaluate(module, variables, *i)
    guided = apply_guidance(guidance, network, lambda sigma: sigma, null_label=10)
    scales = guidance.scales(np.asarray(t) / 1000, np.ones(4))
    mixed = jax.jit(lambda x, t, y, scale: guided.mixed(x, t, {"label": y}, scale))
    x, t, y = map(np.asarray, (x, t, y))
    out = np.concatenate(
        [mixed(x[i : i + 1], t[i : i + 1], y[i : i + 1], scales[i]) for i in range(4)]
    )
    np.testing.assert_allclose(out, data[key][:4], rtol=0, atol=2e-5)
    if len(data[key]) == 8:  # the unconditional half: the same guided channels, its own others
        own = network(x, t, {"label": jnp.full(4, 10)})
        np.testing.assert_allclose(out[..., :3], data[key][4:, ..., :3], rtol=0, atol=2e-5)
        np.testing.assert_allclose(own[..., 3:], data[key][4:, ..., 3:], rtol=0, atol=2e-5)


def test_guidance_without_a_scale_is_a_plain_forward_pass(network_a):
    module, variables = network_a
    data = golden("diffit_a_cfg.npz")
    network = lambda *i: evaluate(module, variables, *i)
    guided = apply_guidance(Unguided(), network, lambda sigma: sigma, null_label=10)
    batch = data["x"], data["t"], {"label": data["y"]}
    np.testing.assert_array_equal(guided.plain(*batch), network(*batch))


def test_unusual_position_embedding_is_used(network_a):
    """Whatever it is, it is added to the embedded patches: moving it there from the patch
    embedding's bias changes nothing."""
    module, variables = network_a
    x, t, conditioning = inputs(module)
    shift = jnp.asarray(np.random.default_rng(0).normal(size=64), jnp.float32)
    bias = variables["params"]["patch_embed"]["bias"]
    patch_embed = variables["params"]["patch_embed"] | {"bias": bias - shift}
    moved = {
        "params": variables["params"] | {"patch_embed": patch_embed},
        "constants": {"pos_embed": variables["constants"]["pos_embed"] + shift},
    }
    out = evaluate(module, variables, x, t, conditioning)
    np.testing.assert_allclose(evaluate(module, moved, x, t, conditioning), out, rtol=0, atol=2e-5)
    without = variables | {
        "constants": {"pos_embed": jnp.zeros_like(variables["constants"]["pos_embed"])}
    }
    assert np.abs(evaluate(module, without, x, t, conditioning) - out).max() > 0.1


# --- Parts


def test_position_embedding_is_the_released_one():
    """Bit for bit, and by its definition: column in the first half, sine before cosine."""
    released = golden_tensors("diffit_a.safetensors")["pos_embed"][0]
    np.testing.assert_array_equal(position_embedding(16, 64), released)
    row, column, k = 3, 11, 5
    token = position_embedding(16, 64)[16 * row + column]
    angle = 10_000 ** (-k / 16)
    expected = [f(p * angle) for p in (column, row) for f in (np.sin, np.cos)]
    np.testing.assert_allclose(token[[k, 16 + k, 32 + k, 48 + k]], expected, rtol=1e-6)


def test_patches_are_local_and_in_order():
    """With blocks that do nothing, a pixel changes only the patch it is in."""
    model = LatentDiffiT(**SMALL)
    variables = random_variables(model)
    blocks = jax.tree.map(jnp.zeros_like, variables["params"]["blocks"])
    variables = variables | {"params": variables["params"] | {"blocks": blocks}}
    x, t, conditioning = inputs(model, batch=1)
    base = evaluate(model, variables, x, t, conditioning)
    changed = (
        np.abs(evaluate(model, variables, x.at[0, 5, 2, 1].add(1.0), t, conditioning) - base).max(
            axis=(0, 3)
        )
        > 1e-6
    )
    assert changed[4:6, 2:4].all() and changed.sum() == 4


def test_shapes_dtypes_and_null_label():
    model = LatentDiffiT(**SMALL)
    x, t, _ = inputs(model)
    fresh = models.init_variables(model, jax.random.key(0))
    assert not evaluate(model, fresh, x, t, {}).any()  # the last layer starts at zero
    assert {leaf.dtype for leaf in jax.tree.leaves(fresh)} == {jnp.dtype("float32")}
    kernel = fresh["params"]["blocks"]["mlp_in"]["kernel"]
    assert kernel.shape == (3, 16, 64) and np.abs(kernel[0] - kernel[1]).max() > 0.01
    variables = random_variables(model)
    out = evaluate(model, variables, x, t, {})
    assert out.shape == (3, 8, 8, 4) and out.dtype == jnp.float32
    np.testing.assert_array_equal(out, evaluate(model, variables, x, t, {"label": jnp.full(3, 5)}))
    assert (
        np.abs(out - evaluate(model, variables, x, t, {"label": jnp.array([0, 1, 2])})).max() > 1e-3
    )
    rounded = evaluate(model.clone(dtype="bfloat16"), variables, x, t, {})
    error = np.abs(rounded - out).max() / np.abs(out).max()
    # 8 bits through three layers; not zero, or it computed in float32.
    assert rounded.dtype == jnp.float32 and 1e-5 < error < 0.05


def test_unroll_and_remat_change_no_numbers():
    model = LatentDiffiT(**SMALL)
    variables, batch = random_variables(model), inputs(model)

    def gradient(model):
        objective = lambda p: jnp.sum(
            models.as_network(model, variables | {"params": p})(*batch) ** 2
        )
        return jax.jit(jax.value_and_grad(objective))(variables["params"])

    loss, reference = gradient(model)
    for change in (
        dict(scan_unroll=3),
        dict(remat="full"),
        dict(remat="dots"),
        dict(remat="full", scan_unroll=3),
    ):
        other_loss, other = gradient(model.clone(**change))
        np.testing.assert_allclose(other_loss, loss, rtol=1e-5)
        for ours, theirs in zip(jax.tree.leaves(other), jax.tree.leaves(reference), strict=True):
            np.testing.assert_allclose(
                ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max() + 1e-8
            )


def test_remat_saves_less():
    """What the backward pass is handed, in elements: all, the products with weights, or the blocks'
    inputs."""
    sizes = []
    for remat in ("none", "dots", "full"):
        model = LatentDiffiT(**SMALL, remat=remat)
        variables, batch = random_variables(model), inputs(model)
        objective = lambda p, m=model, v=variables, b=batch: jnp.sum(
            models.as_network(m, v | {"params": p})(*b)
        )
        saved = jax.eval_shape(lambda p, f=objective: jax.vjp(f, p)[1], variables["params"])
        sizes.append(sum(leaf.size for leaf in jax.tree.leaves(saved)))
    assert sizes[0] > 1.5 * sizes[1] > 1.5 * 1.5 * sizes[2]


# --- The slim parametrisation


def test_slim_is_the_same_function_and_back():
    model = LatentDiffiT(**SMALL)
    slim = model.clone(slim_tmsa=True)
    variables, batch = random_variables(model), inputs(model)
    slimmed = to_slim(variables)
    shapes = jax.eval_shape(lambda: models.init_variables(slim, jax.random.key(0)))
    assert jax.tree.map(jnp.shape, slimmed) == jax.tree.map(jnp.shape, shapes)
    np.testing.assert_array_equal(
        evaluate(slim, slimmed, *batch), evaluate(model, variables, *batch)
    )
    again = to_released(slimmed)
    assert jax.tree.map(jnp.shape, again) == jax.tree.map(jnp.shape, variables)
    np.testing.assert_array_equal(
        evaluate(model, again, *batch), evaluate(model, variables, *batch)
    )
    attention = again["params"]["blocks"]["attention"]
    assert not attention["qkv_bias"][:, 1].any() and not attention["time_qkv_kernel"][:, :, 1].any()
    np.testing.assert_array_equal(
        attention["time_qkv_kernel"][:, :, ::2],
        variables["params"]["blocks"]["attention"]["time_qkv_kernel"][:, :, ::2],
    )


def test_fresh_slim_parameters_have_the_released_spread():
    model = LatentDiffiT(**(SMALL | dict(hidden_size=64, depth=8)))
    spread = {}
    for slim in (False, True):
        fresh = models.init_variables(model.clone(slim_tmsa=slim), jax.random.key(0))
        kernel = fresh["params"]["blocks"]["attention"][
            "time_qv_kernel" if slim else "time_qkv_kernel"
        ]
        spread[slim] = np.abs(kernel).max()
    np.testing.assert_allclose(spread[True], spread[False], rtol=1e-3)
    np.testing.assert_allclose(spread[False], np.sqrt(6 / (64 + 3 * 64)), rtol=1e-3)
