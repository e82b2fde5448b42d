"""Attention with DiffiT's relative position bias as a Pallas kernel for TPUs, forward and backward.

The bias of a window of w² tokens depends on the offset between query and key alone: a table of (2w
- 1)² numbers for each head stands for a matrix of w⁴. At 512 pixels (w = 32) writing that matrix,
its gradient and the logits to memory takes longer than all matrix products. Here none of them
leaves the chip's fast memory: the kernel takes one row of the window's queries against all keys
(`bias_strip`), lays it out for a block of queries once a head, and returns the gradient of the
strip, which XLA turns into that of the table.

Softmax needs whole rows, and they fit: a block of 128 queries sees all L keys at once. It is
computed in powers of two, which is what the hardware has: queries come multiplied by log₂ e. The
backward pass reads the output and the logarithm of each row's sum, and needs no sum over keys.

A matrix unit takes 128 channels at a time. Heads of another width come as `(B, H, D, L)`
(`channels_first`): then it is the tokens that fill its rows, nothing is padded in memory, and the
rows of the contraction that are left over carry sums and shifts which would otherwise be passes
over the logits.

Shape suffixes: B batch (times windows), H heads, L tokens, D head width, w side of the window.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from diffit_jax.errors import one_line

# Queries that are worked on at once: the lanes of a vector register.
BLOCK = 128
LOG2_E = 1.4426950408889634
_LN_2 = 1 / LOG2_E


def supports(window: int) -> str:
    """Return why the kernel cannot serve windows of this side; "" if it can."""
    if BLOCK % window or window * window % BLOCK:
        return f"{window} x {window} tokens are not made of blocks of {BLOCK} in whole rows"
    if window > 32:
        return f"rows of {window * window} logits do not fit into a TPU's fast memory"
    return ""


def channels_first(head_width: int) -> bool:
    """Return whether heads of this width come as (B, H, D, L), not (B, H, L, D).

    They do where they leave eight rows or more of a matrix unit unused, and fill whole registers.
    """
    return head_width % 8 == 0 and head_width % BLOCK > 0


# Why a small kernel could not be compiled for this process's TPUs, by their kind; "" if it could.
_tried: dict[str, str] = {}


def refusal() -> str:
    """Return why the TPU compiler refuses the kernel, "" if it does not.

    Known only after `try_to_compile`.
    """
    return next((reason for reason in _tried.values() if reason), "")


def try_to_compile(device: jax.Device) -> None:
    """Compile small kernels for a TPU, forward and backward, once per process.

    jax and libtpu may not fit together; without this check, "auto" would choose a kernel that ends
    the run.
    """
    if device.device_kind in _tried:
        return
    window = 16

    def total(q, k, v, table):
        return jnp.sum(attention(q, k, v, bias_strip(table, window)), dtype=jnp.float32)

    try:
        there = jax.sharding.SingleDeviceSharding(device)
        for head in ((64, 2 * BLOCK), (2 * BLOCK, BLOCK)):  # in both layouts
            q = jax.ShapeDtypeStruct((1, 1, *head), jnp.bfloat16, sharding=there)
            table = jax.ShapeDtypeStruct(((2 * window - 1) ** 2, 1), jnp.float32, sharding=there)
            jax.jit(jax.grad(total, argnums=(0, 1, 2, 3))).lower(q, q, q, table).compile()
        _tried[device.device_kind] = ""
    except Exception as error:  # whatever the library says
        _tried[device.device_kind] = one_line(error, 120) or type(error).__name__


def bias_strip(table: jax.Array, window: int) -> jax.Array:
    """Lay the position bias out as what one row of the window's queries sees.

    The bias of queries in row r of the window is a slice of it: only offsets matter.

    Args:
      table: ((2w - 1)², H) float32, row (r_q - r_k + w - 1)(2w - 1) + (c_q - c_k + w - 1) for an
        offset.
      window: w, a divisor of 128.

    Returns:
      (H, w, 2 L) float32; the bias of the queries of row r is `[:, :, start : start + L]` with
      start = (w - 1 - r) w. The last w columns are zero, and not read.
    """
    heads, side = table.shape[1], 2 * window - 1
    # One row of the window sees w keys of a row d above it through a w × w Toeplitz matrix: a
    # product with zeros and ones, which rounds nothing, and whose transpose adds up the gradient.
    table_DXH = table.reshape(side, side, heads)[::-1]
    toeplitz_HQDK = jnp.einsum(
        "dxh,xqk->hqdk", table_DXH, _one_hot(window), precision=jax.lax.Precision.HIGHEST
    )
    return jnp.pad(
        toeplitz_HQDK.reshape(heads, window, side * window), [(0, 0)] * 2 + [(0, window)]
    )


@functools.cache
def _one_hot(window: int) -> np.ndarray:
    """Return a (2w - 1, w, w) table of ones where x = c_q - c_k + w - 1."""
    column = np.arange(window)
    offset = column[:, None] - column[None, :] + window - 1
    return (np.arange(2 * window - 1)[:, None, None] == offset).astype(np.float32)


class Sizes(NamedTuple):
    """The sizes of a call.

    Attributes:
      batch, heads, tokens, width: B, H, L, D.
      channels_first: whether arrays are (B, H, D, L).
      groups: of the batch, one for each core of a chip; 1 where they do not divide it.
      examples: that a step of the grid takes.
    """

    batch: int
    heads: int
    tokens: int
    width: int
    channels_first: bool
    groups: int
    examples: int

    @property
    def steps(self) -> int:
        """Steps of the grid for each group and head."""
        return self.batch // self.groups // self.examples

    @property
    def window(self) -> int:
        """Side of the window."""
        return round(self.tokens**0.5)

    @property
    def spare(self) -> int:
        """Rows beside the width that complete a register; 0 where channels come last."""
        return (-self.width % 16 or 16) if self.channels_first else 0


def sizes_of(shape: tuple[int, ...], tokens: int, cores: int) -> Sizes:
    """Return the sizes of a call of the kernel.

    Args:
      shape: of queries, (B, H, D, L) or (B, H, L, D) by `channels_first`.
      tokens: L.
      cores: of a chip, over which the batch is divided.
    """
    batch, heads, *head = shape
    width = head[0] * head[1] // tokens
    groups = cores if batch % cores == 0 else 1
    # With 1,024 queries at hand, one block's products fill the gaps of another's softmax.
    most = max(1024 // tokens, 1)
    examples = max(count for count in range(1, most + 1) if batch // groups % count == 0)
    return Sizes(batch, heads, tokens, width, channels_first(width), groups, examples)


class Target(NamedTuple):
    """What the kernel is compiled for.

    Attributes:
      cores: of a chip, that share a program.
      interpret: emulate the kernel, on any device.
    """

    cores: int = 1
    interpret: bool = False


TPU = Target()  # with one core


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, strip: jax.Array, target: Target = TPU
) -> jax.Array:
    """Compute softmax(ln 2 · q kᵀ + bias) v, logits and softmax in float32.

    Args:
      q: queries, scaled, and multiplied by `LOG2_E`; (B, H, D, L) if `channels_first(D)`, else (B,
        H, L, D); float32 or bfloat16.
      k: keys, of the same shape and dtype.
      v: values, of the same shape and dtype.
      strip: the bias, from `bias_strip`.
      target: of the compilation.

    Returns:
      An array like q.
    """
    return _forward(q, k, v, strip, target)[0]


def _forward(q, k, v, strip, target):
    sizes = sizes_of(q.shape, strip.shape[2] // 2, target.cores)
    head, row, of_strip = _blocks(sizes)
    like = jax.ShapeDtypeStruct(q.shape, q.dtype)
    log_sums = jax.ShapeDtypeStruct((sizes.batch, sizes.heads, 1, sizes.tokens), jnp.float32)
    scratch = [_bias_scratch(sizes), _logits_scratch(sizes)]
    if sizes.spare:
        scratch += _extended_scratch(sizes, q.dtype)
    out, log_sums = pl.pallas_call(
        functools.partial(_forward_kernel, sizes),
        in_specs=[head, head, head, of_strip],
        out_specs=[head, row],
        out_shape=[like, log_sums],
        scratch_shapes=scratch,
        # Two products of L × L × D.
        **_options("tmsa_forward", sizes, 2, (q, k, v, strip), (like, log_sums)),
        interpret=target.interpret,
    )(q, k, v, strip)
    out, log_sums = checkpoint_name(out, "attention"), checkpoint_name(log_sums, "attention")
    return out, (q, k, v, strip, out, log_sums)


def _backward(target, saved, gradient):
    q, _, _, strip, _, _ = saved
    sizes = sizes_of(q.shape, strip.shape[2] // 2, target.cores)
    head, row, of_strip = _blocks(sizes)
    like = jax.ShapeDtypeStruct(q.shape, q.dtype)
    of_group = pl.BlockSpec((None, 1, *strip.shape[1:]), lambda group, h, _: (group, h, 0, 0))
    results = [like] * 3 + [jax.ShapeDtypeStruct((sizes.groups, *strip.shape), jnp.float32)]
    sums = [pltpu.VMEM(q.shape[2:], jnp.float32)] * 2
    scratch = [_bias_scratch(sizes)] * 2 + [_logits_scratch(sizes), *sums]
    if sizes.spare:
        scratch += _extended_scratch(sizes, q.dtype) * 4
    *gradients, of_strips = pl.pallas_call(
        functools.partial(_backward_kernel, sizes),
        in_specs=[head, head, head, of_strip, head, row, head],
        out_specs=[head, head, head, of_group],
        out_shape=results,
        scratch_shapes=scratch,
        # Five of them.
        **_options("tmsa_backward", sizes, 5, (*saved, gradient), results),
        interpret=target.interpret,
    )(*saved, gradient)
    return *gradients, of_strips.sum(0)


attention.defvjp(_forward, _backward)


def _blocks(sizes: Sizes) -> tuple[pl.BlockSpec, pl.BlockSpec, pl.BlockSpec]:
    """Return the blocks of a grid step: a head of some examples, a row of numbers, the strip."""

    def examples(*shape: int) -> pl.BlockSpec:
        block = (sizes.examples, 1, *shape)
        return pl.BlockSpec(block, lambda group, h, b: (group * sizes.steps + b, h, 0, 0))

    tokens, width = sizes.tokens, sizes.width
    head = examples(width, tokens) if sizes.channels_first else examples(tokens, width)
    strip = pl.BlockSpec((1, sizes.window, 2 * tokens), lambda _, h, __: (h, 0, 0))
    return head, examples(1, tokens), strip


def _bias_scratch(sizes: Sizes) -> Any:
    """Fast memory for the bias of a block of queries, which every block takes a slice of."""
    return pltpu.VMEM((BLOCK, 2 * sizes.tokens - BLOCK), jnp.float32)


def _logits_scratch(sizes: Sizes) -> Any:
    """Fast memory for the logits of a block of queries, and for those of the next."""
    return pltpu.VMEM((2, BLOCK, sizes.tokens), jnp.float32)


def _extended_scratch(sizes: Sizes, dtype: jnp.dtype) -> list:
    """Fast memory for a head with its spare rows."""
    return [pltpu.VMEM((sizes.examples, sizes.width + sizes.spare, sizes.tokens), dtype)]


def _options(
    name: str, sizes: Sizes, products: int, inputs: Sequence[Any], results: Sequence[Any]
) -> dict:
    logits = sizes.batch * sizes.heads * sizes.tokens**2
    estimate = pl.CostEstimate(
        flops=2 * products * logits * sizes.width,
        transcendentals=logits,
        bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*inputs, *results)),
    )
    # The cores of a chip share the groups, or where there is one, the heads. The examples of a
    # head go one by one: they share its bias, and the sum of its gradient.
    semantics: Any = ("parallel", "arbitrary", "arbitrary")
    if sizes.groups == 1:
        semantics = ("arbitrary", "parallel", "arbitrary")
    # Arrays that lie in the stack of a scan over layers are read there, not copied out of it first.
    compiler_params = pltpu.CompilerParams(
        dimension_semantics=semantics,
        vmem_limit_bytes=64 * 2**20,
        allow_input_fusion=[True] * len(inputs),
    )
    return dict(
        grid=(sizes.groups, sizes.heads, sizes.steps),
        compiler_params=compiler_params,
        cost_estimate=estimate,
        name=name,
    )


def _forward_kernel(sizes: Sizes, *references):
    """Compute a head of a few examples: the output, and log₂ of the sums of its rows."""
    q_ref, k_ref, v_ref, strip_ref, out_ref, log_sums_ref = references[:6]
    bias_ref, logits_ref, *more = references[6:]
    v_more_ref: Any = more[0] if more else None

    @pl.when(pl.program_id(2) == 0)
    def _():
        _spread(sizes, strip_ref, bias_ref)
        if sizes.spare:  # ones behind the values: the product with them is the sum of the weights
            v_more_ref[...] = jnp.ones_like(v_more_ref)

    blocks = _blocks_of(sizes)

    def write_logits(number: int) -> None:
        example, start = blocks[number]
        products = _over_width(sizes, _tokens(sizes, q_ref, example, start), k_ref[example, 0])
        logits_ref[number % 2] = products + bias_ref[:, _keys(sizes, start)]

    write_logits(0)
    for number, (example, start) in enumerate(blocks):
        if sizes.spare and start == 0:
            v_more_ref[example, : sizes.width] = v_ref[example, 0]
        # The matrix units multiply the next block while the vector unit works on this one.
        if number + 1 < len(blocks):
            write_logits(number + 1)
        logits = logits_ref[number % 2]
        largest = jnp.max(logits, axis=1, keepdims=True)
        weights = jnp.exp2(logits - largest)
        if sizes.spare:
            weighted = _over_keys(sizes, v_more_ref[example], weights.astype(v_ref.dtype))
            weighted, total = weighted[: sizes.width], weighted[sizes.width : sizes.width + 1]
            log_sums = _turned(largest)[:1] + jnp.log2(total)
        else:
            total = jnp.sum(weights, axis=1, keepdims=True)
            weighted = _over_keys(sizes, v_ref[example, 0], weights.astype(v_ref.dtype))
            log_sums = _turned(largest + jnp.log2(total))[:1]
        _tokens(sizes, out_ref, example, start, (weighted / total).astype(out_ref.dtype))
        log_sums_ref[example, 0, :, pl.ds(start, BLOCK)] = log_sums


def _backward_kernel(sizes: Sizes, *references):
    """Compute gradients of one head of a few examples, and that of the strip over the batch."""
    q_ref, k_ref, v_ref, strip_ref, out_ref, log_sums_ref, gradient_ref = references[:7]
    q_out_ref, k_out_ref, v_out_ref, strip_out_ref = references[7:11]
    bias_ref, bias_sum_ref, logits_ref, k_sum_ref, v_sum_ref, *more = references[11:]
    q_more_ref, k_more_ref, v_more_ref, gradient_more_ref = more or [None] * 4
    width, dtype = sizes.width, q_ref.dtype

    @pl.when(pl.program_id(2) == 0)
    def _():
        _spread(sizes, strip_ref, bias_ref)
        bias_sum_ref[...] = jnp.zeros_like(bias_sum_ref)
        for ref in more:  # of keys and values the spare rows stay ones
            ref[...] = jnp.ones_like(ref)

    means = []  # of the gradients of a query's weights
    for example in range(sizes.examples):
        out, gradient = (ref[example, 0].astype(jnp.float32) for ref in (out_ref, gradient_ref))
        axis = 0 if sizes.channels_first else 1
        means.append(jnp.sum(out * gradient, axis=axis, keepdims=True))
        if sizes.spare:
            # Ones behind the keys meet what is to be taken from the logits, behind the queries.
            log_sums = log_sums_ref[example, 0]
            q_more_ref[example, :width] = q_ref[example, 0]
            k_more_ref[example, :width] = k_ref[example, 0]
            v_more_ref[example, :width] = v_ref[example, 0]
            gradient_more_ref[example, :width] = gradient_ref[example, 0]
            q_more_ref[example, width:] = _in_parts(-log_sums, sizes.spare, 3, dtype)
            gradient_more_ref[example, width:] = _in_parts(-means[example], sizes.spare, 2, dtype)

    def write_logits(number: int) -> None:
        example, start = blocks[number]
        rows = pl.ds(start, BLOCK)
        if sizes.spare:
            products = _over_width(sizes, q_more_ref[example, :, rows], k_more_ref[example])
        else:
            products = _over_width(sizes, q_ref[example, 0, rows], k_ref[example, 0])
            products -= _turned(log_sums_ref[example, 0, :, rows])[:, :1]
        logits_ref[number % 2] = products + bias_ref[:, _keys(sizes, start)]

    blocks = _blocks_of(sizes)
    write_logits(0)
    for number, (example, start) in enumerate(blocks):
        rows = pl.ds(start, BLOCK)
        if sizes.spare:
            upwards = gradient_more_ref[example, :, rows]
            weights_gradient = _over_width(sizes, upwards, v_more_ref[example])
        else:
            upwards = gradient_ref[example, 0, rows]
            weights_gradient = _over_width(sizes, upwards, v_ref[example, 0])
            weights_gradient -= means[example][start : start + BLOCK]
        if number + 1 < len(blocks):
            write_logits(number + 1)
        weights = jnp.exp2(logits_ref[number % 2])
        logits_gradient = weights * weights_gradient
        bias_sum_ref[:, _keys(sizes, start)] += logits_gradient
        weights, logits_gradient = weights.astype(dtype), logits_gradient.astype(dtype)
        q_part = _over_keys(sizes, k_ref[example, 0], logits_gradient) * _LN_2
        _tokens(sizes, q_out_ref, example, start, q_part.astype(dtype))
        k_part = _over_queries(sizes, _tokens(sizes, q_ref, example, start), logits_gradient)
        v_part = _over_queries(sizes, _tokens(sizes, gradient_ref, example, start), weights)
        k_sum_ref[...] = k_part if start == 0 else k_sum_ref[...] + k_part
        v_sum_ref[...] = v_part if start == 0 else v_sum_ref[...] + v_part
        if start + BLOCK == sizes.tokens:
            k_out_ref[example, 0] = (k_sum_ref[...] * _LN_2).astype(dtype)
            v_out_ref[example, 0] = v_sum_ref[...].astype(dtype)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        _fold(sizes, bias_sum_ref, strip_out_ref)


def _blocks_of(sizes: Sizes) -> list[tuple[int, int]]:
    """Return (example, first query) of the blocks of a grid step."""
    starts = range(0, sizes.tokens, BLOCK)
    return [(example, start) for example in range(sizes.examples) for start in starts]


def _shifts(sizes: Sizes) -> list[tuple[pl.Slice | slice, int]]:
    """Return (queries, columns that the strip is moved by) for each row of the window in a block.

    The next block's bias is the same matrix moved by 128 keys.
    """
    rows = BLOCK // sizes.window
    return [
        (pl.ds(row * sizes.window, sizes.window), (rows - 1 - row) * sizes.window)
        for row in range(rows)
    ]


def _spread(sizes: Sizes, strip_ref, bias_ref) -> None:
    """Write the bias of a block of queries, (128, 2 L - 128), for powers of two."""
    strip = strip_ref[0] * LOG2_E
    for queries, shift in _shifts(sizes):
        moved = pltpu.roll(strip, strip.shape[1] - shift, 1) if shift else strip
        bias_ref[queries] = moved[:, : bias_ref.shape[1]]


def _fold(sizes: Sizes, sum_ref, strip_ref) -> None:
    """Add up the gradient of `_spread`."""
    total = jnp.zeros(strip_ref.shape[1:], jnp.float32)
    rest = jnp.zeros((sizes.window, BLOCK), jnp.float32)
    for queries, shift in _shifts(sizes):
        part = jnp.concatenate([sum_ref[queries], rest], axis=1)
        total += pltpu.roll(part, shift, 1) if shift else part
    strip_ref[0] = total


def _keys(sizes: Sizes, start: int) -> pl.Slice | slice:
    """Return the columns of the bias for the block of queries that begins at `start`."""
    return pl.ds(sizes.tokens - BLOCK - start, sizes.tokens)


def _turned(numbers: jax.Array) -> jax.Array:
    """Transpose 128 numbers, a row or a column, to a square of equal columns or rows."""
    return jnp.transpose(jnp.broadcast_to(numbers, (BLOCK, BLOCK)))


def _in_parts(row: jax.Array, rows: int, count: int, dtype: jnp.dtype) -> jax.Array:
    """Return rows of `dtype` that add up to a row of float32, the others zero.

    Args:
      row: (1, L) float32.
      rows: of the result.
      count: how many bfloat16 numbers a float32 becomes, of eight bits each.
      dtype: of the result.
    """
    index = jax.lax.broadcasted_iota(jnp.int32, (rows, row.shape[1]), 0)
    result = jnp.zeros(index.shape, jnp.float32)
    for part in range(1 if dtype == jnp.float32 else count):
        top = row
        if dtype != jnp.float32:  # cut off: XLA removes a conversion to bfloat16 and back
            bits = jax.lax.bitcast_convert_type(row, jnp.uint32) & jnp.uint32(0xFFFF0000)
            top = jax.lax.bitcast_convert_type(bits, jnp.float32)
        result = jnp.where(index == part, top, result)
        row = row - top
    return result.astype(dtype)


def _tokens(sizes: Sizes, ref, example: int, start: int, value: jax.Array | None = None) -> Any:
    """Read or write a block of tokens, (D, 128) or (128, D)."""
    tokens = pl.ds(start, BLOCK)
    where = (example, 0, slice(None), tokens) if sizes.channels_first else (example, 0, tokens)
    if value is None:
        return ref[where]
    ref[where] = value
    return None


# The three kinds of products: D is what the matrix units push, or what fills their lanes.


def _over_width(sizes: Sizes, queries: jax.Array, keys: jax.Array) -> jax.Array:
    """Multiply a block of queries with all keys over the channels, (128, L)."""
    axis = 0 if sizes.channels_first else 1
    return _dot(queries, keys, axis, axis)


def _over_keys(sizes: Sizes, values: jax.Array, weights: jax.Array) -> jax.Array:
    """Multiply weights (128, L) with all values over the keys, (D, 128) or (128, D)."""
    return _dot(values, weights, 1, 1) if sizes.channels_first else _dot(weights, values, 1, 0)


def _over_queries(sizes: Sizes, block: jax.Array, weights: jax.Array) -> jax.Array:
    """Multiply weights (128, L) with a block of tokens over these, (D, L) or (L, D)."""
    return _dot(block, weights, 1, 0) if sizes.channels_first else _dot(weights, block, 0, 0)


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
