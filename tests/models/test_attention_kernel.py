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
from diffit_jax.experiment.config import build
from diffit_jax.models.diffit import attention_kernel
from diffit_jax.models.diffit.attention import (
    BACKENDS,
    TMSA,
    choose_backend,
    relative_position_index,
)
from diffit_jax.models.model import traced_multiply_adds
from diffit_jax.models.placement import Placement, use_placement
from diffit_jax.preflight import compiler
from diffit_jax.run.state import setup_experiment
from diffit_jax.runtime import parallel
from diffit_jax.runtime.parallel import MeshShape
from diffit_jax.training.step import lower_train_step


def inputs(window, width, batch, heads, dtype=np.float32):
    draw = np.random.default_rng(window + width)
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


def reference(q, k, v, table, window):
    """softmax(q kᵀ + bias) v as it is written."""
    bias = table[relative_position_index(window)].transpose(2, 0, 1)
    logits = jnp.einsum("bhqd,bhkd->bhqk", q, k, precision="highest") + bias
    return jnp.einsum("bhqk,bhkd->bhqd", jax.nn.softmax(logits), v, precision="highest")


def kernel(q, k, v, table, window):
    return attention_kernel.attention(q, k, v, attention_kernel.bias_strips(table, window), True)


def assert_close(ours, theirs, tolerance):
    """Relative to the largest value."""
    for one, other in zip(ours, theirs, strict=True):
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        assert (
            np.isfinite(one).all() and np.abs(one - other).max() <= tolerance * np.abs(other).max()
        )


def both(function, window, q, k, v, table, gradient):
    """Output and the gradients with respect to queries, keys, values and table."""
    out, pullback = jax.vjp(functools.partial(function, window=window), q, k, v, table)
    return out, *pullback(gradient.astype(out.dtype))


@pytest.mark.parametrize(
    ("window", "width", "batch", "heads"), [(16, 72, 6, 2), (16, 128, 1, 3), (32, 16, 2, 1)]
)
def test_forward_and_all_gradients(window, width, batch, heads):
    """float32: 1e-5 of the largest value (measured 7e-7): sums in another order. Six examples make
    groups of three."""
    q, k, v, table, gradient = inputs(window, width, batch, heads)
    assert_close(
        both(kernel, window, q, k, v, table, gradient),
        both(reference, window, q, k, v, table, gradient),
        1e-5,
    )


def test_bfloat16():
    """Against float32 with the same rounded inputs: within 2e-2, bfloat16 having 8 bits. Measured
    6e-3."""
    q, k, v, table, gradient = inputs(16, 72, 4, 2, jnp.bfloat16)
    exact = both(reference, 16, *(x.astype(jnp.float32) for x in (q, k, v)), table, gradient)
    ours = both(kernel, 16, q, k, v, table, gradient)
    assert ours[0].dtype == jnp.bfloat16 and ours[4].dtype == jnp.float32
    assert_close(ours, exact, 2e-2)


@pytest.mark.parametrize("window", [16, 32])
def test_strips_are_the_bias_of_every_block(window):
    """Each block's slice equals the rows of the whole matrix, bit for bit."""
    table = jnp.asarray(
        np.random.default_rng(0).standard_normal(((2 * window - 1) ** 2, 2)), jnp.float32
    )
    whole = np.asarray(table)[relative_position_index(window)].transpose(2, 0, 1)
    strips, tokens = np.asarray(attention_kernel.bias_strips(table, window)), window**2
    for start in range(0, tokens, attention_kernel.BLOCK):
        offset = tokens - attention_kernel.BLOCK - start
        np.testing.assert_array_equal(
            strips[:, :, offset : offset + tokens], whole[:, start : start + attention_kernel.BLOCK]
        )


def test_large_logits_do_not_overflow():
    q, k, v, table, gradient = inputs(16, 8, 1, 1)
    results = both(kernel, 16, 300 * q, 300 * k, v, table, gradient)
    assert_close(results[:1], [reference(300 * q, 300 * k, v, table, 16)], 1e-4)
    assert all(np.isfinite(np.asarray(result)).all() for result in results)


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
