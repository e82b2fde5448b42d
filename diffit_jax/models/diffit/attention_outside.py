"""Attention among a window's tokens and a few outside its grid, with the TPU kernel for the window.

A window of 16 × 16 tokens fills the kernel's blocks, one token more would not. So the kernel takes
the window, and the few others are put in behind it: with z = Σ_j 2^s_j over a query's logits with
the window's keys, and out its attention to them,

    out_all = (z out + Σ_e 2^s_e v_e) / z_all,    z_all = z + Σ_e 2^s_e    over keys e outside.

Backwards the kernel reads an output and log₂ of a sum. Handed out_all and log₂ z_all, its weights
2^s_j / z_all and the mean of their gradients, out_all · d out_all, are those of the whole softmax:
the gradients of the window's share come out of it as they are. The others' share, E columns
instead of L, is XLA's, and so are the E rows of the queries outside.

Shape suffixes: B batch (times windows), H heads, L tokens of a window, E outside it, D head width.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from diffit_jax.models.diffit import attention_kernel as one
from diffit_jax.models.diffit.attention_kernel import TPU, Target

_LN_2 = 1 / one.LOG2_E
# Queries, keys and values, (B, H, D, tokens) if `channels_first(D)`, else (B, H, tokens, D).
Parts = tuple[jax.Array, jax.Array, jax.Array]


def attention(
    window: Parts, outside: Parts, strip: jax.Array, target: Target = TPU
) -> tuple[jax.Array, jax.Array]:
    """Compute softmax(ln 2 · q kᵀ + bias) v of all tokens, with a bias inside the window alone.

    Args:
      window: queries, keys and values of the L tokens of the window, (B, H, D, L) or (B, H, L, D),
        as `attention_kernel.attention` takes them.
      outside: those of the E others, (B, H, D, E) or (B, H, E, D).
      strip: the bias, from `attention_kernel.bias_strip`.
      target: of the compilation.

    Returns:
      Arrays like the queries of both.
    """
    return (
        _of_window(window, outside[1:], strip, target),
        _of_outside(window, outside, strip, target),
    )


def _letters(q: jax.Array, strip: jax.Array, target: Target) -> tuple[str, str]:
    """Return the last two axes of arrays of the window, and of those outside."""
    first = one.sizes_of(q.shape, strip.shape[2] // 2, target.cores).channels_first
    return ("dl", "de") if first else ("ld", "ed")


def _times(axes: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Multiply, accumulated in float32; `axes` as of `jnp.einsum`."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(axes, a, b, precision=precision, preferred_element_type=jnp.float32)


def _of_outside(window: Parts, outside: Parts, strip: jax.Array, target: Target) -> jax.Array:
    """Compute the rows of the queries outside, which no bias concerns."""
    dl, de = _letters(window[0], strip, target)
    q = outside[0]
    logits = [
        _times(f"bh{de.replace('e', 'q')},bh{axes}->bhq{axes.strip('d')}", q, k)
        for axes, k in ((dl, window[1]), (de, outside[1]))
    ]
    tokens = logits[0].shape[-1]
    weights = jax.nn.softmax(jnp.concatenate(logits, axis=-1) * _LN_2).astype(q.dtype)
    weighted = [
        _times(f"bhq{axes.strip('d')},bh{axes}->bh{de.replace('e', 'q')}", part, v)
        for axes, part, v in (
            (dl, weights[..., :tokens], window[2]),
            (de, weights[..., tokens:], outside[2]),
        )
    ]
    return (weighted[0] + weighted[1]).astype(q.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _of_window(
    window: Parts, outside: tuple[jax.Array, jax.Array], strip: jax.Array, target: Target
) -> jax.Array:
    """Compute the rows of the window's queries, with keys and values outside."""
    return _forward(window, outside, strip, target)[0]


def _turned(x: jax.Array, dl: str) -> jax.Array:
    """Lay numbers of tokens, (B, H, 1, L), out as arrays of the window are, or back."""
    return x if dl == "dl" else x.swapaxes(2, 3)


def _forward(window, outside, strip, target):
    (q, k, v), (k_outside, v_outside) = window, outside
    dl, de = _letters(q, strip, target)
    out, (*_, log_sums) = one._forward(q, k, v, strip, target)
    logits = _times(f"bh{dl},bh{de}->bhel", q, k_outside)
    largest = jnp.maximum(log_sums, logits.max(axis=2, keepdims=True))
    sums = jnp.exp2(log_sums - largest) + jnp.exp2(logits - largest).sum(axis=2, keepdims=True)
    whole = largest + jnp.log2(sums)  # log₂ of the sums of all
    weights = jnp.exp2(logits - whole).astype(v.dtype)
    share = _turned(jnp.exp2(log_sums - whole), dl)
    out = out * share + _times(f"bhel,bh{de}->bh{dl}", weights, v_outside)
    out = checkpoint_name(out.astype(q.dtype), "attention")
    whole = checkpoint_name(whole, "attention")
    return out, (window, outside, strip, out, whole)


def _backward(target: Target, saved: Any, gradient: jax.Array):
    (q, k, v), (k_outside, v_outside), strip, out, whole = saved
    dl, de = _letters(q, strip, target)
    of_q, of_k, of_v, of_strip = one._backward(target, (q, k, v, strip, out, whole), gradient)
    products = out.astype(jnp.float32) * gradient
    means = _turned(jnp.sum(products, axis=dl.index("d") + 2, keepdims=True), dl)
    weights = jnp.exp2(_times(f"bh{dl},bh{de}->bhel", q, k_outside) - whole)
    of_weights = _times(f"bh{dl},bh{de}->bhel", gradient, v_outside)
    of_logits = (weights * (of_weights - means) * _LN_2).astype(q.dtype)
    of_q = of_q + _times(f"bhel,bh{de}->bh{dl}", of_logits, k_outside)
    of_outside = (
        _times(f"bhel,bh{dl}->bh{de}", of_logits, q).astype(q.dtype),
        _times(f"bhel,bh{dl}->bh{de}", weights.astype(q.dtype), gradient).astype(q.dtype),
    )
    return (of_q.astype(q.dtype), of_k, of_v), of_outside, of_strip


_of_window.defvjp(_forward, _backward)
