"""Attention and its derivative along a direction as one Pallas kernel for TPUs: forward mode.

With weights P = softmax(S) and tangents dq, dk, dv, dS = (dq kᵀ + q dkᵀ) / √D,

    dO = P∘(dS - rowsum(P∘dS)) V + P dV

so that a block of queries, beside what `attention_kernel` does, multiplies for dS and accumulates
(P∘dS) V and P dV; nothing of size L × L leaves the fast memory. XLA's way through the same took 30
percent of a flow map's step at 512 pixels (estimate). The bias has no tangent.

Layouts and names as in `attention_kernel`.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from diffit_jax.errors import one_line
from diffit_jax.models.diffit import attention_kernel as one
from diffit_jax.models.diffit.attention_kernel import TPU, Sizes, Target

_LN_2 = 1 / one.LOG2_E


# As of `attention_kernel`: why it could not be compiled, by the kind of TPU; "" if it could.
_tried: dict[str, str] = {}


def refusal() -> str:
    """Return why the TPU compiler refuses this kernel, "" if it does not, or was not asked."""
    return next((reason for reason in _tried.values() if reason), "")


def try_to_compile(device: jax.Device) -> None:
    """Compile small kernels for a TPU, once per process; see `attention_kernel.try_to_compile`."""
    if device.device_kind in _tried:
        return
    try:
        there = jax.sharding.SingleDeviceSharding(device)
        for head in ((64, 2 * one.BLOCK), (2 * one.BLOCK, one.BLOCK)):  # in both layouts
            q = jax.ShapeDtypeStruct((1, 1, *head), jnp.bfloat16, sharding=there)
            strip = jax.ShapeDtypeStruct((1, 16, 4 * one.BLOCK), jnp.float32, sharding=there)
            jax.jit(with_tangent).lower([q] * 3, strip, [q] * 3).compile()
        _tried[device.device_kind] = ""
    except Exception as error:  # whatever the library says
        _tried[device.device_kind] = one_line(error, 120) or type(error).__name__


@functools.partial(jax.custom_jvp, nondiff_argnums=(4,))
def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, strip: jax.Array, target: Target = TPU
) -> jax.Array:
    """Compute `attention_kernel.attention`, with a derivative for `jax.jvp` (and none for grad).

    Arguments (B, H, D, L) or (B, H, L, D) and value as there; the strip is not to be perturbed.
    """
    return one.attention(q, k, v, strip, target)


@attention.defjvp
def _attention_jvp(target: Target, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    return with_tangent(primals[:3], primals[3], tangents[:3], target)


def with_tangent(
    qkv: Sequence[jax.Array], strip: jax.Array, tangents: Sequence[jax.Array], target: Target = TPU
) -> tuple[jax.Array, jax.Array]:
    """Compute attention and its tangent, arrays like q.

    Queries, keys and values (B, H, D, L) or (B, H, L, D), and the tangent of each; the rest as
    `attention`'s.
    """
    q, k, v = qkv
    sizes = one.sizes_of(q.shape, strip.shape[2] // 2, target.cores)
    head, _, of_strip = one._blocks(sizes)
    like = jax.ShapeDtypeStruct(q.shape, q.dtype)
    logits = one._logits_scratch(sizes)
    scratch = [one._bias_scratch(sizes), logits, logits]
    if sizes.spare:
        scratch += one._extended_scratch(sizes, q.dtype)
    inputs = q, k, v, strip, *tangents
    return pl.pallas_call(
        functools.partial(_kernel, sizes),
        in_specs=[head, head, head, of_strip, head, head, head],
        out_specs=[head, head],
        out_shape=[like, like],
        scratch_shapes=scratch,
        # q k, dq k, q dk; P v, (P dS) v, P dv.
        **one._options("tmsa_tangent", sizes, 6, inputs, (like, like)),
        interpret=target.interpret,
    )(*inputs)


def _kernel(sizes: Sizes, *references):
    """Compute a head of a few examples: the output, and its tangent."""
    q_ref, k_ref, v_ref, strip_ref, dq_ref, dk_ref, dv_ref, out_ref, tangent_ref = references[:9]
    bias_ref, logits_ref, slopes_ref, *more = references[9:]
    v_more_ref: Any = more[0] if more else None
    width, dtype = sizes.width, v_ref.dtype

    @pl.when(pl.program_id(2) == 0)
    def _():
        one._spread(sizes, strip_ref, bias_ref)
        if sizes.spare:  # ones behind the values: the product with them is a sum over keys
            v_more_ref[...] = jnp.ones_like(v_more_ref)

    blocks = one._blocks_of(sizes)

    def write_logits(number: int) -> None:
        example, start = blocks[number]
        q, dq = (one._tokens(sizes, ref, example, start) for ref in (q_ref, dq_ref))
        k, dk = (ref[example, 0] for ref in (k_ref, dk_ref))
        products = one._over_width(sizes, q, k)
        logits_ref[number % 2] = products + bias_ref[:, one._keys(sizes, start)]
        slopes = one._over_width(sizes, dq, k) + one._over_width(sizes, q, dk)
        slopes_ref[number % 2] = slopes * _LN_2

    write_logits(0)
    for number, (example, start) in enumerate(blocks):
        if sizes.spare and start == 0:
            v_more_ref[example, :width] = v_ref[example, 0]
        # The matrix units multiply the next block while the vector unit works on this one.
        if number + 1 < len(blocks):
            write_logits(number + 1)
        logits = logits_ref[number % 2]
        weights = jnp.exp2(logits - jnp.max(logits, axis=1, keepdims=True))
        slopes = weights * slopes_ref[number % 2]
        if sizes.spare:
            weighted = one._over_keys(sizes, v_more_ref[example], weights.astype(dtype))
            sloped = one._over_keys(sizes, v_more_ref[example], slopes.astype(dtype))
            total, mean = weighted[width : width + 1], sloped[width : width + 1]
            weighted, sloped = weighted[:width], sloped[:width]
        else:
            total = jnp.sum(weights, axis=1, keepdims=True)
            mean = jnp.sum(slopes, axis=1, keepdims=True)
            weighted = one._over_keys(sizes, v_ref[example, 0], weights.astype(dtype))
            sloped = one._over_keys(sizes, v_ref[example, 0], slopes.astype(dtype))
        out = weighted / total
        of_values = one._over_keys(sizes, dv_ref[example, 0], weights.astype(dtype))
        tangent = (sloped + of_values - mean * out) / total
        one._tokens(sizes, out_ref, example, start, out.astype(dtype))
        one._tokens(sizes, tangent_ref, example, start, tangent.astype(dtype))
