"""Attention with DiffiT's relative position bias as a Pallas kernel for TPUs, forward and backward.

The bias of a window of w² tokens depends on the offset between query and key alone: a table of (2w
- 1)² numbers for each head stands for a matrix of w⁴. At 512 pixels (w = 32) writing that matrix,
its gradient and the logits to memory takes longer than all matrix products. Here none of them
leaves the chip's fast memory: the kernel takes the bias as *strips*, 128 (2 L - 128) of the L²
entries of the matrix (see `bias_strips`), and its backward pass returns the gradient of the strips,
which XLA turns into that of the table.

Softmax needs whole rows, and they fit: a block of 128 queries sees all L keys at once. The backward
pass computes logits and softmax again instead of reading them.

Shape suffixes: B batch (times windows), H heads, L tokens, D head width, w side of the window.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from diffit_jax.errors import one_line

# Queries that are worked on at once: the lanes of a vector register, to which slices of the strips
# must be aligned.
BLOCK = 128


def supports(window: int) -> str:
    """Return why the kernel cannot serve windows of this side; "" if it can."""
    if BLOCK % window or window * window % BLOCK:
        return f"{window} x {window} tokens are not made of blocks of {BLOCK} in whole rows"
    if window > 32:
        return f"rows of {window * window} logits do not fit into a TPU's fast memory"
    return ""


# Why a small kernel could not be compiled for this process's TPUs, by their kind; "" if it could.
_tried: dict[str, str] = {}


def refusal() -> str:
    """Return why the TPU compiler refuses the kernel, "" if it does not.

    Known only after `try_to_compile`.
    """
    return next((reason for reason in _tried.values() if reason), "")


def try_to_compile(device: jax.Device) -> None:
    """Compile a small kernel for a TPU, forward and backward, once per process.

    jax and libtpu may not fit together; without this check, "auto" would choose a kernel that ends
    the run.
    """
    if device.device_kind in _tried:
        return
    small, window = (1, 1, BLOCK * 2, 64), 16
    shapes = [small] * 3 + [((2 * window - 1) ** 2, 1)]

    def total(q, k, v, table):
        return jnp.sum(
            attention(q, k, v, bias_strips(table.astype(jnp.float32), window)), dtype=jnp.float32
        )

    try:
        there = jax.sharding.SingleDeviceSharding(device)
        arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=there) for shape in shapes]
        jax.jit(jax.grad(total, argnums=(0, 1, 2, 3))).lower(*arrays).compile()
        _tried[device.device_kind] = ""
    except Exception as error:  # whatever the library says
        _tried[device.device_kind] = one_line(error, 120) or type(error).__name__


def bias_strips(table: jax.Array, window: int) -> jax.Array:
    """Lay the position bias out as one array of which each block of 128 queries takes a slice.

    A block is 128/w rows of the window; the next block's bias is the same matrix moved by 128 keys,
    since only offsets matter.

    Args:
      table: ((2w - 1)², H) float32, row (r_q - r_k + w - 1)(2w - 1) + (c_q - c_k + w - 1) for an
        offset.
      window: w, a divisor of 128.

    Returns:
      (H, 128, 2 L - 128) float32; the bias of queries 128 i … 128 i + 127 is `[:, :, start : start
      + L]` with start = L - 128 (i + 1).
    """
    heads, tokens, rows = table.shape[1], window * window, BLOCK // window
    # One row of the window sees w keys of a row d above it through a w × w Toeplitz matrix: a
    # product with zeros and ones, which rounds nothing, and whose transpose adds up the gradient.
    table_DXH = table.reshape(2 * window - 1, 2 * window - 1, heads)[::-1]
    toeplitz_HQDK = jnp.einsum(
        "dxh,xqk->hqdk", table_DXH, _one_hot(window), precision=jax.lax.Precision.HIGHEST
    )
    strip = toeplitz_HQDK.reshape(heads, window, (2 * window - 1) * window)
    # The r-th row of a block sees the strip moved by r rows of keys.
    width = 2 * tokens - BLOCK
    shifted = [strip[:, :, (rows - 1 - row) * window :][:, :, :width] for row in range(rows)]
    return jnp.stack(shifted, axis=1).reshape(heads, BLOCK, width)


@functools.cache
def _one_hot(window: int) -> np.ndarray:
    """Return a (2w - 1, w, w) table of ones where x = c_q - c_k + w - 1."""
    column = np.arange(window)
    offset = column[:, None] - column[None, :] + window - 1
    return (np.arange(2 * window - 1)[:, None, None] == offset).astype(np.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def attention(
    q_BHLD: jax.Array,
    k_BHLD: jax.Array,
    v_BHLD: jax.Array,
    strips: jax.Array,
    interpret: bool = False,
) -> jax.Array:
    """Compute softmax(q kᵀ + bias) v, logits and softmax in float32.

    Args:
      q_BHLD: queries, already scaled, float32 or bfloat16.
      k_BHLD: keys, of the same shape and dtype.
      v_BHLD: values, of the same shape and dtype.
      strips: the bias, from `bias_strips`; the kernel reads it in the queries' dtype.
      interpret: emulate the kernel, on any device.

    Returns:
      (B, H, L, D) of the queries' dtype.
    """
    arrays = q_BHLD, k_BHLD, v_BHLD, strips.astype(q_BHLD.dtype)
    like = jax.ShapeDtypeStruct(q_BHLD.shape, q_BHLD.dtype)
    head, strip = _blocks(q_BHLD, strips)
    # Two products of L × L × D.
    options = _options("tmsa_forward", ("parallel", "parallel"), 2, (*arrays, like), interpret)
    return pl.pallas_call(
        _forward_kernel,
        in_specs=[head, head, head, strip],
        out_specs=head,
        out_shape=like,
        **options,
    )(*arrays)


def _forward(q_BHLD, k_BHLD, v_BHLD, strips, interpret):
    return attention(q_BHLD, k_BHLD, v_BHLD, strips, interpret), (q_BHLD, k_BHLD, v_BHLD, strips)


def _backward(interpret, saved, gradient_BHLD):
    q_BHLD, k_BHLD, v_BHLD, strips = saved
    arrays = q_BHLD, k_BHLD, v_BHLD, strips.astype(q_BHLD.dtype), gradient_BHLD
    like = jax.ShapeDtypeStruct(q_BHLD.shape, q_BHLD.dtype)
    results = [like, like, like, jax.ShapeDtypeStruct(strips.shape, jnp.float32)]
    head, strip = _blocks(q_BHLD, strips)
    # The gradient of a head's strips is added up over the batch, which therefore goes one by one.
    options = _options(
        "tmsa_backward", ("parallel", "arbitrary"), 5, (*arrays, *results), interpret
    )
    sums = [pltpu.VMEM(q_BHLD.shape[2:], jnp.float32)] * 2
    return pl.pallas_call(
        _backward_kernel,
        in_specs=[head, head, head, strip, head],
        out_specs=[head, head, head, strip],
        out_shape=results,
        scratch_shapes=sums,
        **options,
    )(*arrays)


attention.defvjp(_forward, lambda *args: tuple(_backward(*args)))


def _blocks(q_BHLD: jax.Array, strips: jax.Array) -> tuple[pl.BlockSpec, pl.BlockSpec]:
    """Return the blocks of a grid step: one head of a few examples, and that head's strips."""
    _, _, tokens, width = q_BHLD.shape
    head = pl.BlockSpec(
        (examples_per_step(len(q_BHLD), tokens), 1, tokens, width), lambda h, b: (b, h, 0, 0)
    )
    return head, pl.BlockSpec((1, *strips.shape[1:]), lambda h, _: (h, 0, 0))


def examples_per_step(batch: int, tokens: int) -> int:
    """Return how many examples a grid step takes.

    With 1,024 queries at hand, one block's matrix products fill the gaps of another's softmax.
    """
    most = max(1024 // tokens, 1)
    return max(count for count in range(1, most + 1) if batch % count == 0)


def _options(
    name: str, order: tuple[str, str], products: int, arrays: tuple, interpret: bool
) -> dict:
    batch, heads, tokens, width = arrays[0].shape
    logits = batch * heads * tokens * tokens
    estimate = pl.CostEstimate(
        flops=2 * products * logits * width,
        transcendentals=logits,
        bytes_accessed=sum(x.size * x.dtype.itemsize for x in arrays),
    )
    # Beside two copies of each block (one at work, one under way) there are logits of 128 × L, a
    # few times.
    semantics: Any = order
    compiler_params = pltpu.CompilerParams(
        dimension_semantics=semantics, vmem_limit_bytes=64 * 2**20
    )
    return dict(
        grid=(heads, batch // examples_per_step(batch, tokens)),
        compiler_params=compiler_params,
        cost_estimate=estimate,
        interpret=interpret,
        name=name,
    )


def _forward_kernel(q_ref, k_ref, v_ref, strips_ref, out_ref):
    """Compute one head of a few examples."""
    examples, _, tokens, _ = q_ref.shape
    for example in range(examples):
        k, v = k_ref[example, 0], v_ref[example, 0]
        for start in range(0, tokens, BLOCK):
            rows = pl.ds(start, BLOCK)
            weights, total = _softmax(_logits(q_ref[example, 0, rows], k, strips_ref, start))
            out_ref[example, 0, rows] = (_dot(weights.astype(v.dtype), v, 1, 0) / total).astype(
                out_ref.dtype
            )


def _backward_kernel(*references):
    """Compute gradients of one head of a few examples.

    The gradient of the strips is summed over the batch.
    """
    # Inputs, results, and sums in fast memory.
    (
        q_ref,
        k_ref,
        v_ref,
        strips_ref,
        gradient_ref,
        q_out_ref,
        k_out_ref,
        v_out_ref,
        strips_out_ref,
        k_sum_ref,
        v_sum_ref,
    ) = references

    @pl.when(pl.program_id(1) == 0)
    def _():
        strips_out_ref[...] = jnp.zeros_like(strips_out_ref)

    examples, _, tokens, _ = q_ref.shape
    for example in range(examples):
        k, v = k_ref[example, 0], v_ref[example, 0]
        for start in range(0, tokens, BLOCK):
            rows = pl.ds(start, BLOCK)
            q, gradient = q_ref[example, 0, rows], gradient_ref[example, 0, rows]
            weights, total = _softmax(_logits(q, k, strips_ref, start))
            weights = weights / total
            weights_gradient = _dot(gradient, v, 1, 1)
            mean = jnp.sum(weights * weights_gradient, axis=1, keepdims=True)
            logits_gradient = weights * (weights_gradient - mean)
            strips_out_ref[0, :, _keys(tokens, start)] += logits_gradient
            weights, logits_gradient = weights.astype(v.dtype), logits_gradient.astype(v.dtype)
            q_out_ref[example, 0, rows] = _dot(logits_gradient, k, 1, 0).astype(q_out_ref.dtype)
            k_part, v_part = _dot(logits_gradient, q, 0, 0), _dot(weights, gradient, 0, 0)
            k_sum_ref[...] = k_part if start == 0 else k_sum_ref[...] + k_part
            v_sum_ref[...] = v_part if start == 0 else v_sum_ref[...] + v_part
        k_out_ref[example, 0] = k_sum_ref[...].astype(k_out_ref.dtype)
        v_out_ref[example, 0] = v_sum_ref[...].astype(v_out_ref.dtype)


def _logits(q: jax.Array, k: jax.Array, strips_ref, start: int) -> jax.Array:
    """Compute the logits of the queries from `start` on, their bias included, (128, L) float32."""
    return _dot(q, k, 1, 1) + strips_ref[0, :, _keys(len(k), start)].astype(jnp.float32)


def _keys(tokens: int, start: int) -> pl.Slice | slice:
    """Return the columns of the strips for the block of queries that begins at `start`."""
    return pl.ds(tokens - BLOCK - start, tokens)


def _softmax(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return weights before the division by their total, and the total of each row."""
    weights = jnp.exp(logits - jnp.max(logits, axis=1, keepdims=True))
    return weights, jnp.sum(weights, axis=1, keepdims=True)


def _dot(a: jax.Array, b: jax.Array, a_axis: int, b_axis: int) -> jax.Array:
    """Multiply over one axis of each, accumulated in float32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a,
        b,
        (((a_axis,), (b_axis,)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )
