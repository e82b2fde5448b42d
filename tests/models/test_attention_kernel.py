"""The attention kernel, emulated on the CPU, against the equations it stands for and against the
XLA path of the same module."""

import functools
import re
from importlib import metadata

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.configs import config_of, small_config, small_latent_config
from support.counts import multiply_adds

from diffit_jax import models
from diffit_jax.errors import UserError
from diffit_jax.experiment.config import build
from diffit_jax.models.diffit import attention_kernel, attention_outside, attention_tangent_kernel
from diffit_jax.models.diffit.attention import TMSA, TwoTimes
from diffit_jax.models.diffit.backends import BACKENDS, choose_backend
from diffit_jax.models.diffit.windows import relative_position_index
from diffit_jax.models.model import traced_multiply_adds
from diffit_jax.models.placement import Placement, use_placement
from diffit_jax.preflight import compiler
from diffit_jax.run.state import setup_experiment
from diffit_jax.runtime import parallel
from diffit_jax.runtime.parallel import MeshShape
from diffit_jax.training.step import lower_train_step


def inputs(window, width, batch, heads, dtype=np.float32, seed=0):
    """Queries as the kernel wants them, multiplied by log2 e, but all (B, H, L, D)."""
    draw = np.random.default_rng([window, width, seed])
    q, k, v, gradient = (
        draw.standard_normal((batch, heads, window**2, width)).astype(np.float32) * width**-0.25
        for _ in range(4)
    )
    table = draw.standard_normal(((2 * window - 1) ** 2, heads)).astype(np.float32)
    return (
        *(jnp.asarray(x, dtype) for x in (q, k, v)),
        jnp.asarray(table),
        jnp.asarray(gradient, dtype),
    )


def exact(q, k, v, table, gradient, window):
    """softmax(ln 2 · q kᵀ + bias) v as it is written, and all gradients, in float64.

    Without a bias for tokens outside the grid, which follow those of the window.
    """
    q, k, v, table, gradient = (np.asarray(x, np.float64) for x in (q, k, v, table, gradient))
    index = relative_position_index(window)
    outside = (0, q.shape[2] - window**2)
    bias = np.pad(table[index].transpose(2, 0, 1), ((0, 0), outside, outside))
    logits = np.log(2) * q @ k.swapaxes(2, 3) + bias
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    of_weights = gradient @ v.swapaxes(2, 3)
    of_logits = weights * (of_weights - (weights * of_weights).sum(-1, keepdims=True))
    of_table = np.zeros_like(table)
    for head in range(table.shape[1]):
        of_bias = of_logits[:, head, : window**2, : window**2].sum(0)
        np.add.at(of_table[:, head], index, of_bias)
    of_q, of_k = np.log(2) * of_logits @ k, np.log(2) * of_logits.swapaxes(2, 3) @ q
    return weights @ v, of_q, of_k, weights.swapaxes(2, 3) @ gradient, of_table


def kernel(q, k, v, table, window, cores=1):
    """The kernel on (B, H, L, D), in whatever layout it wants these."""

    def laid_out(x):
        return x.swapaxes(2, 3) if attention_kernel.channels_first(q.shape[-1]) else x

    strip = attention_kernel.bias_strip(table, window)
    target = attention_kernel.Target(cores, interpret=True)
    return laid_out(attention_kernel.attention(*map(laid_out, (q, k, v)), strip, target))


def errors(window, cores, q, k, v, table, gradient):
    """Of the output and the gradients of queries, keys, values and table: the norm of the error
    over that of the array."""
    run = jax.jit(functools.partial(kernel, window=window, cores=cores))
    out, pullback = jax.vjp(run, q, k, v, table)
    assert out.dtype == q.dtype
    ours = out, *pullback(gradient)
    assert [x.dtype for x in ours[1:]] == [q.dtype] * 3 + [jnp.float32]
    ours = [np.asarray(x, np.float64) for x in ours]
    theirs = exact(q, k, v, table, gradient, window)
    return [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(ours, theirs, strict=True)]


SHAPES = [  # window, head width, batch, heads, cores of a chip
    (16, 72, 3, 2, 1),  # the released width; a group of three examples
    (16, 128, 1, 2, 2),  # channels last; a batch that two cores cannot divide
    (32, 72, 2, 1, 2),
    (32, 64, 1, 1, 1),
    (32, 128, 1, 1, 1),
]
# Widths that leave other numbers of rows free, channels last among them, from one to six examples.
for number in range(4):
    draw = np.random.default_rng(number)
    width = int(draw.choice([8, 12, 24, 56, 120, 136, 256]))
    SHAPES.append((16, width, int(draw.integers(1, 7)), int(draw.integers(1, 3)), 1 + number % 2))


@pytest.mark.parametrize(("window", "width", "batch", "heads", "cores"), SHAPES)
def test_forward_and_all_gradients(window, width, batch, heads, cores):
    """float32 within 1e-6 (measured 3e-7 to 9e-7, XLA's own attention 4e-7 to 7e-7)."""
    arrays = inputs(window, width, batch, heads)
    assert max(errors(window, cores, *arrays)) <= 1e-6


@pytest.mark.parametrize(
    ("width", "count", "size", "dtype", "bound"),
    [
        (72, 1, 1, np.float32, 1e-6),
        (128, 5, 1, np.float32, 1e-6),  # channels last
        (8, 2, 30, np.float32, 1e-5),  # logits outside of 50, whose rounding is that of the weights
        (72, 3, 1, jnp.bfloat16, 4e-3),
    ],
)
def test_tokens_outside_the_grid(width, count, size, dtype, bound):
    """Beside the kernel: the output and all gradients (float32: measured 2e-7 to 7e-7)."""
    window = 16
    first = attention_kernel.channels_first(width)
    draw = np.random.default_rng(count)
    q, k, v, gradient = (
        jnp.asarray(draw.standard_normal((2, 2, 256 + count, width)) * width**-0.25, dtype)
        for _ in range(4)
    )
    k = k.at[:, :, 256:].multiply(size)
    table = jnp.asarray(draw.standard_normal((31**2, 2)), jnp.float32)

    def laid_out(x):
        return x.swapaxes(2, 3) if first else x

    @jax.jit
    def attend(q, k, v, table):
        parts = [[laid_out(x[:, :, :256]), laid_out(x[:, :, 256:])] for x in (q, k, v)]
        strip = attention_kernel.bias_strip(table, window)
        target = attention_kernel.Target(1, interpret=True)
        found = attention_outside.attention(*zip(*parts, strict=True), strip, target)
        return jnp.concatenate([laid_out(x) for x in found], axis=2)

    out, pullback = jax.vjp(attend, q, k, v, table)
    ours = [np.asarray(x, np.float64) for x in (out, *pullback(gradient))]
    theirs = exact(q, k, v, table, gradient, window)
    for a, b in zip(ours, theirs, strict=True):
        assert np.linalg.norm(a - b) <= bound * np.linalg.norm(b)
        rest = np.linalg.norm((a - b)[..., 256:, :])  # of those outside too
        assert a is ours[-1] or rest <= bound * np.linalg.norm(b[..., 256:, :])


@pytest.mark.parametrize(("window", "width"), [(16, 72), (32, 72), (16, 64), (32, 128)])
def test_bfloat16(window, width):
    """Rounded once each, weights and results are off by 2.4e-3, and no more is added: the bias is
    float32, and the gradient of the table (measured 1.4e-4 to 5e-4) sums float32."""
    *arrays, table = errors(window, 2, *inputs(window, width, 2, 1, jnp.bfloat16))
    assert max(arrays) <= 2.6e-3 and table <= 1e-3


@pytest.mark.parametrize(
    ("window", "width", "cores", "dtype", "bound"),
    [
        (16, 72, 1, jnp.float32, 1e-6),
        (16, 128, 2, jnp.float32, 1e-6),
        (32, 72, 1, jnp.float32, 1e-6),
        (16, 72, 1, jnp.bfloat16, 2.6e-3),
        (16, 64, 2, jnp.bfloat16, 2.6e-3),
    ],
)
def test_the_tangent(window, width, cores, dtype, bound):
    """dO = P∘(dS - rowsum(P∘dS)) V + P dV in float64; measured 4e-7 to 8e-7, and 2.3e-3."""
    q, k, v, table, _ = inputs(window, width, 2, 2, dtype)
    tangents = inputs(window, width, 2, 2, dtype, seed=1)[:3]

    def laid_out(x):
        return x.swapaxes(2, 3) if attention_kernel.channels_first(width) else x

    strip = attention_kernel.bias_strip(table, window)
    target = attention_kernel.Target(cores, interpret=True)
    run = jax.jit(
        lambda primals, tangents: jax.jvp(
            lambda q, k, v: attention_tangent_kernel.attention(q, k, v, strip, target),
            primals,
            tangents,
        )
    )
    found = run(*(tuple(map(laid_out, each)) for each in ((q, k, v), tangents)))
    q, k, v, dq, dk, dv = (np.asarray(x, np.float64) for x in (q, k, v, *tangents))
    bias = np.asarray(table)[relative_position_index(window)].transpose(2, 0, 1)
    logits = np.log(2) * q @ k.swapaxes(2, 3) + bias
    slopes = np.log(2) * (dq @ k.swapaxes(2, 3) + q @ dk.swapaxes(2, 3))
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    sloped = weights * (slopes - (weights * slopes).sum(-1, keepdims=True))
    for ours, expected in zip(found, (weights @ v, sloped @ v + weights @ dv), strict=True):
        off = np.linalg.norm(np.asarray(laid_out(ours), np.float64) - expected)
        assert off / np.linalg.norm(expected) <= bound


@pytest.mark.parametrize("window", [16, 32])
def test_strip_is_the_bias_of_every_row_of_the_window(window):
    """Each row's slice equals the rows of the whole matrix, bit for bit."""
    table = jnp.asarray(
        np.random.default_rng(0).standard_normal(((2 * window - 1) ** 2, 2)), jnp.float32
    )
    whole = np.asarray(table)[relative_position_index(window)].transpose(2, 0, 1)
    strip, tokens = np.asarray(attention_kernel.bias_strip(table, window)), window**2
    assert strip.shape == (2, window, 2 * tokens) and not strip[:, :, -window:].any()
    for row in range(window):
        start, queries = (window - 1 - row) * window, slice(row * window, (row + 1) * window)
        np.testing.assert_array_equal(strip[:, :, start : start + tokens], whole[:, queries])


def test_large_logits_do_not_overflow():
    q, k, v, table, gradient = inputs(16, 8, 1, 1)
    run = functools.partial(kernel, window=16)
    out, pullback = jax.vjp(run, 300 * q, 300 * k, v, table)
    theirs, *_ = exact(300 * q, 300 * k, v, table, gradient, 16)
    # Logits of 1e5 have a last bit of 0.01.
    assert np.linalg.norm(np.asarray(out) - theirs) <= 1e-2 * np.linalg.norm(theirs)
    assert all(np.isfinite(np.asarray(x)).all() for x in (out, *pullback(gradient)))


@pytest.mark.parametrize(
    ("wanted", "platform", "window", "width", "dtype", "chosen", "reason"),
    [
        ("auto", "tpu", 16, 72, "bfloat16", "pallas", ""),
        ("auto", "tpu", 32, 72, "bfloat16", "pallas", ""),
        ("auto", "tpu", 4, 72, "float32", "xla", "4 x 4 tokens are not made of blocks of 128"),
        ("auto", "tpu", 24, 72, "float32", "xla", "24 x 24 tokens are not made of blocks of 128"),
        ("pallas", "tpu", 64, 72, "bfloat16", "xla", "do not fit into a TPU's fast memory"),
        ("auto", "cpu", 16, 72, "bfloat16", "xla", ""),
        ("auto", "gpu", 16, 72, "bfloat16", "xla", ""),
        ("xla", "tpu", 16, 72, "bfloat16", "xla", ""),
        ("cudnn", "gpu", 16, 72, "bfloat16", "cudnn", ""),
        ("cudnn", "gpu", 16, 72, "float32", "xla", "bfloat16 on GPUs"),
        ("cudnn", "gpu", 16, 144, "bfloat16", "xla", "heads of up to 128 channels"),
        ("cudnn", "cpu", 16, 72, "bfloat16", "xla", "bfloat16 on GPUs"),
    ],
)
def test_what_cannot_be_served_falls_back_and_says_why(
    wanted, platform, window, width, dtype, chosen, reason
):
    backend, why = choose_backend(wanted, platform, window, width, dtype)
    assert backend == chosen and reason in why and bool(why) == bool(reason) and wanted in BACKENDS


def test_a_kernel_asked_for_by_name_where_it_does_not_serve_ends_the_run():
    """Before anything is written; "auto" falls back."""
    wrong = small_latent_config(model__attention="pallas")  # 4 x 4 tokens
    with pytest.raises(UserError) as caught:
        setup_experiment(wrong)
    assert str(caught.value) == (
        "config key model.attention is pallas, but the kernel serves windows of 16 x 16 and "
        "32 x 32 tokens, and not this: 4 x 4 tokens are not made of blocks of 128 in whole "
        "rows: use auto"
    )
    setup_experiment(small_latent_config(model__attention="auto"))
    setup_experiment(small_latent_config(**LARGE, model__attention="pallas"))


@pytest.mark.parametrize(
    ("asked", "platform", "words"),
    [
        ("auto", "tpu", "pallas (the kernel serves this network)"),
        ("auto", "cuda", "xla (auto; in bfloat16 model.attention=cudnn may be faster)"),
        ("auto", "cpu", "xla (auto, not on a TPU)"),
        ("xla", "tpu", "xla (as the config says)"),
        ("cudnn", "cpu", "xla (cuDNN serves bfloat16 on GPUs"),
    ],
)
def test_the_first_lines_of_a_run_say_which_attention_and_why(asked, platform, words):
    model = build(small_latent_config(**LARGE, model__attention=asked)).model
    assert models.describe_attention(model, platform).startswith(words)
    image = build(small_config()).model
    assert models.describe_attention(image, platform) == "xla (as the config says)"


LARGE = dict(
    model__input_size=32,
    model__hidden_size=32,
    model__depth=2,
    model__num_heads=4,
    model__num_classes=10,
)


def loss_and_gradient(backend, mesh, remat="none"):
    """Of a small latent network with 16 × 16 tokens on two devices."""
    experiment = build(small_latent_config(**LARGE, model__attention=backend, model__remat=remat))
    variables = models.init_variables(experiment.model, jax.random.key(0))
    # Fresh networks return zeros; these do not.
    variables = jax.tree.map(
        lambda x: x + 0.02 * jax.random.normal(jax.random.key(x.size), x.shape), variables
    )
    x = jax.random.normal(jax.random.key(1), (8, *experiment.model.sample_shape))

    def loss(params):
        network = models.as_network(experiment.model, {**variables, "params": params})
        return jnp.mean(network(x, jnp.linspace(0, 900, 8), {"label": jnp.arange(8)}) ** 2)

    with parallel.placement(mesh):
        value, gradient = jax.jit(jax.value_and_grad(loss))(variables["params"])
    return value, gradient


@pytest.mark.parametrize(
    ("shape", "remat"),
    [
        (MeshShape(data=2), "none"),
        (MeshShape(data=1, fsdp=2), "dots"),
        (MeshShape(data=1, tensor=2), "full"),
    ],
)
def test_network_on_two_devices(shape, remat):
    """The same loss and gradients as XLA, however two devices share the work: 1e-5 of each array's
    largest value (measured 4e-7)."""
    reference_value, reference_gradient = loss_and_gradient(
        "xla", parallel.make_mesh(jax.devices()[:1])
    )
    value, gradient = loss_and_gradient("pallas", parallel.make_mesh(shape=shape), remat)
    np.testing.assert_allclose(value, reference_value, rtol=1e-5)
    paths, _ = jax.tree_util.tree_flatten_with_path(reference_gradient)
    for (path, theirs), ours in zip(paths, jax.tree.leaves(gradient), strict=True):
        scale = max(np.abs(theirs).max(), 1e-7)
        assert np.abs(np.asarray(ours) - np.asarray(theirs)).max() <= 1e-5 * scale, (
            jax.tree_util.keystr(path)
        )
    assert np.abs(gradient["blocks"]["attention"]["relative_position_bias"]).max() > 0


@pytest.mark.parametrize("kind", ["two times", "outside"])
def test_what_else_a_layer_has(kind):
    """Tokens of two times, or outside the grid: by the kernel, channels first, as by XLA."""
    assert attention_kernel.channels_first(8)
    draw = np.random.default_rng(0)
    first, second = draw.normal(size=(2, 2, 6)).astype(np.float32)
    times = first
    module = TMSA(1, 16)
    if kind == "two times":
        times = TwoTimes(first, second, jnp.asarray(draw.random((2, 256)) < 0.3))
    else:
        module = TMSA(1, 16, extra_tokens=3, qk_norm=True)
    x = jnp.asarray(draw.normal(size=(2, 1, 256 + module.extra_tokens, 8)), jnp.float32)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(draw.normal(size=leaf.shape), jnp.float32),
        jax.eval_shape(module.init, jax.random.key(0), x, first)["params"],
    )
    found = [
        jax.jit(module.clone(backend=backend).apply)({"params": params}, x, times)
        for backend in ("xla", "pallas")
    ]
    np.testing.assert_allclose(*found, rtol=0, atol=1e-5 * np.abs(found[0]).max())


def test_flops_are_the_same_for_kernel_and_xla():
    """MFU on a TPU must not depend on how attention is computed: the count equals the closed
    form."""
    model = build(config_of("imagenet256_latent")).model
    with use_placement(Placement(platform="tpu")):
        counts = {
            backend: traced_multiply_adds(model.clone(attention=backend))
            for backend in ("auto", "xla")
        }
    assert (
        counts["auto"]
        == counts["xla"]
        == pytest.approx(sum(multiply_adds(model).values()), rel=1e-3)
    )


def test_training_step_contains_the_kernel_only_where_it_is_asked_for(monkeypatch):
    """On a CPU "auto" is XLA."""
    calls, kernel = [], attention_kernel.attention

    def counted(*inputs, **settings):
        calls.append(inputs)
        return kernel(*inputs, **settings)

    monkeypatch.setattr(attention_kernel, "attention", counted)
    for backend, there in (("auto", False), ("pallas", True)):
        setup = setup_experiment(small_latent_config(**LARGE, model__attention=backend))
        sharding = parallel.batch_sharding(setup.mesh)
        batch = {
            "latent": jax.ShapeDtypeStruct((8, 32, 32, 4), jnp.float32, sharding=sharding),
            "label": jax.ShapeDtypeStruct((8,), jnp.int32, sharding=sharding),
        }
        lower_train_step(setup, setup.state, batch)
        assert bool(calls) == there


def test_cudnn_is_called_forward_and_backward(monkeypatch):
    """Lowered for a GPU, which needs none: cuDNN takes the released head width, and the bias. What
    it computes only a GPU can tell."""
    library = "jax._src.cudnn.fused_attention_stablehlo"
    monkeypatch.setattr(f"{library}.check_cudnn_version", lambda: 91300)
    monkeypatch.setattr(f"{library}.check_compute_capability", lambda _: True)
    module = TMSA(4, 16, jnp.bfloat16, backend="cudnn")
    x, time = (
        jax.ShapeDtypeStruct((2, 1, 256, 288), jnp.bfloat16),
        jax.ShapeDtypeStruct((2, 32), jnp.bfloat16),
    )
    variables = jax.eval_shape(
        lambda: module.init(jax.random.key(0), jnp.zeros((1, 1, 256, 288)), jnp.zeros((1, 32)))
    )

    def loss(variables, x, time):
        return jnp.sum(module.apply(variables, x, time).astype(jnp.float32))

    with use_placement(Placement(platform="gpu")):
        text = (
            jax.jit(jax.grad(loss))
            .trace(variables, x, time)
            .lower(lowering_platforms=("cuda",))
            .as_text()
        )
    assert "__cudnn$fmhaScaleBiasSoftmax(" in text or "__cudnn$fmhaScaleBiasSoftmax " in text
    assert "__cudnn$fmhaScaleBiasSoftmaxBackward" in text


# --- A compiler that does not take the kernel


def test_auto_takes_xlas_attention_where_the_kernel_does_not_compile(monkeypatch):
    """Tried once for a kind of device; what was asked for by name stays, and fails with the
    compiler's own words."""
    asked = []

    class Device:
        device_kind, platform = "TPU v5 lite", "tpu"

    def failing(*_, **__):
        asked.append(1)
        raise RuntimeError(
            "INTERNAL: Failed to deserialize the Mosaic module:\nUnsupported version: expected <= "
            "7 but got 8"
        )

    monkeypatch.setattr(attention_kernel, "_tried", {})
    arguments = "tpu", 16, 64, jnp.bfloat16
    assert choose_backend("auto", *arguments) == ("pallas", "")
    with monkeypatch.context() as patch:
        patch.setattr(jax.sharding, "SingleDeviceSharding", failing)
        attention_kernel.try_to_compile(Device())
        attention_kernel.try_to_compile(Device())
    assert len(asked) == 1
    backend, why = choose_backend("auto", *arguments)
    assert (
        backend == "xla"
        and why.startswith("the kernel does not compile here: INTERNAL: Failed to deserialize")
        and "\n" not in why
    )
    assert choose_backend("pallas", *arguments) == ("pallas", "") and choose_backend(
        "auto", "cpu", *arguments[1:]
    ) == ("xla", "")


def fitting_libtpu():
    """Whether the libtpu at hand is the one that this version of jax asks for."""
    asked = next(text for text in metadata.requires("jax") if text.startswith("libtpu"))
    requirement = re.match(r"libtpu==([\d.]+)", asked)[1].rstrip(".")
    return f"{metadata.version('libtpu')}.".startswith(f"{requirement}.")


@pytest.mark.skipif(
    not fitting_libtpu(),
    reason="Colab has an older libtpu than its jax asks for, and XLA takes the kernel's place",
)
def test_the_compiler_at_hand_takes_the_kernel(monkeypatch):
    """Forward and backward, for a chip that is not here."""
    from diffit_jax.runtime import parallel

    monkeypatch.setattr(attention_kernel, "_tried", {})
    devices = compiler.topology_devices("v5e:2x2")
    with compiler.for_another_machine():
        parallel.try_kernel(parallel.make_mesh(devices))
    assert list(attention_kernel._tried.values()) == [""]
