"""Time-dependent multi-head self-attention (TMSA), DiffiT Eq. 3-6, inside non-overlapping windows.

Shape suffixes: B batch, N windows, L tokens of a window, C channels, T width of the time token, H
heads, D head width.

Eq. 3-6 as written, for spatial tokens x_s and the time token x_t:

    q = x_s W_qs + x_t W_qt,  k = x_s W_ks + x_t W_kt,  v = x_s W_vs + x_t W_vt
    TMSA = softmax(q kᵀ / √D + bias) v

Two exact simplifications are built in (tests/models/test_attention.py proves both against the
equations above):

  * Whatever is the same for every key (x_t W_kt, and any key bias) adds a constant to each row of
    logits, which the softmax ignores. It can never change the output, so it is never computed and
    its gradient is exactly zero. (Not so where keys are normalised, `qk_norm`: there it is.)
  * The weights of a row sum to one, so whatever is the same for every value passes straight
    through: TMSA = softmax((q_s + q_t) k_sᵀ / √D + bias) v_s + v_t.

Where tokens of one image have different times (`TwoTimes`) neither holds, and neither is used.

The same module is attention without time in it, or with time in its position bias alone: the
paper's Table 6 compares them.
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from diffit_jax import platforms
from diffit_jax.errors import UserError
from diffit_jax.models.diffit import attention_kernel, attention_outside, attention_tangent_kernel
from diffit_jax.models.diffit.backends import choose_backend, xla_only
from diffit_jax.models.diffit.windows import Tile, relative_position_index, tile_index
from diffit_jax.models.placement import (
    FSDP,
    TENSOR,
    Param,
    at_least_float32,
    cores,
    param,
    per_shard,
    platform,
)


def _xavier_to_heads(scale: float = 1.0):
    """Return a Xavier-uniform initialiser for kernels (C, projections, heads, head width).

    `scale` multiplies its variance.
    """
    return nn.initializers.variance_scaling(
        scale, "fan_avg", "uniform", in_axis=0, out_axis=(1, 2, 3)
    )


def _softmax_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, table: jax.Array, *, window: int, backend: str
) -> jax.Array:
    """Compute softmax(q kᵀ + bias) v by the TPU kernel or cuDNN. The table's heads come last."""
    if backend == "pallas":
        strip, target = attention_kernel.bias_strip(table, window), _target()
        kernel = attention_tangent_kernel if _forward_mode.get() else attention_kernel
        return kernel.attention(q, k, v, strip, target)
    bias_HLL = table[relative_position_index(window)].transpose(2, 0, 1).astype(q.dtype)
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
    return jax.nn.dot_product_attention(
        q, k, v, bias_HLL[None], scale=1.0, implementation="cudnn"
    ).transpose(0, 2, 1, 3)


def _outside_attention(*arrays: jax.Array, window: int) -> tuple[jax.Array, jax.Array]:
    """Compute attention by the TPU kernel with tokens outside the grid.

    Queries, keys and values of the window, those outside, and the table.
    """
    q, k, v, q_outside, k_outside, v_outside, table = arrays
    strip = attention_kernel.bias_strip(table, window)
    outside = q_outside, k_outside, v_outside
    return attention_outside.attention((q, k, v), outside, strip, _target())


def _target() -> attention_kernel.Target:
    """Return what the kernel is compiled for."""
    return attention_kernel.Target(cores(), not platforms.of(platform()).compiles_kernel)


@jax.custom_vjp
def _reverse_attention(q: jax.Array, k: jax.Array, v: jax.Array, bias_HLL: jax.Array) -> jax.Array:
    """Compute softmax(q kᵀ + bias) v of (B, N, H, L, D), with a backward pass written for CPUs.

    XLA:CPU is slow where it sums over leading axes, and in the derivative of a softmax. Rows are
    divided behind the products, over D channels and not L keys; the mean of a row's gradient is
    taken from the output; and the gradient of the bias is summed over examples by a product.
    """
    return _reverse_forward(q, k, v, bias_HLL)[0]


def _reverse_forward(q, k, v, bias_HLL):
    logits = _logits(q, k) + bias_HLL
    weights = jnp.exp(logits - logits.max(-1, keepdims=True))
    totals = weights.sum(-1, keepdims=True)
    weights = weights.astype(q.dtype)
    out = (jnp.einsum("bnhqk,bnhkd->bnhqd", weights, v) / totals).astype(q.dtype)
    return out, (q, k, v, weights, totals, out)


def _reverse_backward(saved, gradient):
    q, k, v, weights, totals, out = saved
    exact = totals.dtype
    divided = gradient.astype(exact) / totals
    means = jnp.sum(divided * out.astype(exact), axis=-1, keepdims=True)
    divided = divided.astype(q.dtype)
    of_weights = _logits(divided, v)
    of_logits = weights.astype(exact) * (of_weights - means)
    # (B N, H L L) summed over its rows.
    flat = of_logits.reshape(-1, of_logits[0, 0].size)
    of_bias = jnp.ones((1, len(flat)), exact) @ flat
    of_logits = of_logits.astype(q.dtype)
    return (
        jnp.einsum("bnhqk,bnhkd->bnhqd", of_logits, k),
        jnp.einsum("bnhqk,bnhqd->bnhkd", of_logits, q),
        jnp.einsum("bnhqk,bnhqd->bnhkd", weights, divided),
        of_bias.reshape(of_logits.shape[2:]),
    )


_reverse_attention.defvjp(_reverse_forward, _reverse_backward)


def _logits(q: jax.Array, k: jax.Array) -> jax.Array:
    """Multiply queries and keys, (B, N, H, L, D) each, to (B, N, H, L, L) in float32 at least."""
    return jnp.einsum("bnhqd,bnhkd->bnhqk", q, k, preferred_element_type=at_least_float32(q.dtype))


class Attended(NamedTuple):
    """What statistics of an attention layer are made of, float32.

    Attributes:
      q: (B, N, H, L + E, D) queries divided by √D, with time's part and all biases.
      k, v: (B, N, H, L + E, D) keys and values of the tokens alone, without biases.
      time_BT: time token.
      q_of_time: time tokens (B, T) → their part of q, (B, 1, H, 1, D); zeros where there is none.
      k_time, v_time: time's part of keys (which has no effect) and values, (B, 1, H, 1, D).
      bias: (H, L + E, L + E), with time in it (B, 1, H, L + E, L + E).
      window: side of the window, L = window².
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    time_BT: jax.Array
    q_of_time: Callable[[jax.Array], jax.Array]
    k_time: jax.Array
    v_time: jax.Array
    bias: jax.Array
    window: int


# Of a layer: arrays by name, which become the collection "statistics" of the network.
Statistics = Callable[[Attended], Mapping[str, jax.Array]]
_statistics: contextvars.ContextVar[Statistics | None] = contextvars.ContextVar(
    "statistics", default=None
)


@contextlib.contextmanager
def measured_by(statistics: Statistics) -> Iterator[None]:
    """Let attention layers that are traced in this block sow these statistics of theirs."""
    token = _statistics.set(statistics)
    try:
        yield
    finally:
        _statistics.reset(token)


_forward_mode: contextvars.ContextVar[bool] = contextvars.ContextVar("forward_mode", default=False)


@contextlib.contextmanager
def forward_mode() -> Iterator[None]:
    """Let attention that is traced in this block have a derivative for `jax.jvp`, none for grad."""
    token = _forward_mode.set(True)
    try:
        yield
    finally:
        _forward_mode.reset(token)


def keeps_weights(module: nn.Module) -> bool:
    """Whether attention weights are to be kept or measured, for which XLA computes them."""
    return any(module.is_mutable_collection(name) for name in ("intermediates", "statistics"))


class TwoTimes(NamedTuple):
    """Time tokens of an image whose tokens have two noise levels, in the place of one.

    Attributes:
      first_BT, second_BT: (B, T) of either level.
      second_BL: (B, L) bool, which of the L tokens have the second.
    """

    first_BT: jax.Array
    second_BT: jax.Array
    second_BL: jax.Array


# A time token (B, T) for all tokens, or two.
Time = jax.Array | TwoTimes


def of_each_token(
    function: Callable[[jax.Array], jax.Array], time_BT: Time, axis: int
) -> jax.Array:
    """Apply a function to the time token that each token has.

    Args:
      function: (B, T) → an array with B first and 1 along `axis`.
      time_BT: of all tokens, or two of them.
      axis: that counts tokens, from 1 or from -1.

    Returns:
      Its result; of two times with L in the place of that 1.
    """
    if not isinstance(time_BT, TwoTimes):
        return function(time_BT)
    first, second = function(time_BT.first_BT), function(time_BT.second_BT)
    shape = [1] * first.ndim
    shape[0], shape[axis] = time_BT.second_BL.shape
    return jnp.where(time_BT.second_BL.reshape(shape), second, first)


class TMSA(nn.Module):
    """Time-dependent self-attention among the tokens of each window.

    Tokens outside the grid may follow those of each window: they attend and are attended to, and
    their rows and columns of the position bias are zero.

    The parameters are those of the released model, (q, k, v) × heads × head width with a bias for
    the spatial and the time projection, although the key's share of `time_qkv` and both key biases
    have no effect (see the top of this file). The slim parametrisation leaves these out, and
    computes the same functions.

    Attributes:
      num_heads: number of heads; must divide C.
      window: side of the square window, L = window².
      dtype: dtype of the matrix products; parameters, logits and softmax are float32 (at least).
      slim: whether `time_qv_kernel`, `time_qv_bias` and `qv_bias` (without the key's share) take
        the place of `time_qkv_kernel`, `time_qkv_bias` and `qkv_bias`.
      backend: how attention is computed, a name in `backends.BACKENDS`. Attention weights are kept
        ("intermediates") with XLA only, which is therefore used when they are asked for.
      tile: tokens that are computed together, if they are of several windows (`dense_tile`).
      time_in: "tmsa": Eq. 3-6. "bias": x_t adds `time_bias_kernel` x_t to the bias table, a number
        for each offset and head, zero at first, and enters q, k and v not at all (Table 6, F).
        Others: attention without time; the parameters of `slim` do not exist then.
      extra_tokens: number E of tokens outside the grid, behind the L of each window.
      position_bias: whether there is a bias table.
      gains: factors on the initial values of the projection in and of that out.
      qk_norm: whether q and k, with time's parts and all biases, are divided by the root of their
        mean square over a head's channels, in float32, and multiplied by learned `q_scale` and
        `k_scale` (D,). Then the key's part of time has an effect.
    """

    num_heads: int
    window: int
    dtype: jnp.dtype = jnp.float32
    slim: bool = False
    backend: str = "xla"
    tile: Tile | None = None
    time_in: str = "tmsa"
    extra_tokens: int = 0
    position_bias: bool = True
    gains: tuple[float, float] = (1.0, 1.0)
    qk_norm: bool = False

    @nn.compact
    def __call__(self, x_BNLC: jax.Array, time_BT: Time) -> jax.Array:
        """Map tokens (B, N, L + E, C) and the time token (B, T) to (B, N, L + E, C), in `dtype`.

        Of two times in an image N is 1, E is 0, and the parametrisation is not the slim one.
        """
        channels = x_BNLC.shape[-1]
        if channels % self.num_heads:
            raise UserError(
                f"{channels} channels do not divide into {self.num_heads} heads: change channels "
                "or the head width"
            )
        head_width = channels // self.num_heads
        differs = isinstance(time_BT, TwoTimes)  # from token to token
        width = (time_BT.first_BT if differs else time_BT).shape[-1]
        spatial, time = self._input_projections(channels, width)
        differs = differs and time is not None
        bias_table = self._bias_table(time_BT)
        x_BNLC = x_BNLC.astype(self.dtype)
        spatial_kernel = spatial.kernel.ready(self.dtype)
        query, value = 0, len(spatial.bias) - 1  # a slim time projection has no key between
        backend = self._backend(head_width)
        # The kernel may want the tokens last, and computes its softmax in powers of two.
        tokens_last = backend == "pallas" and attention_kernel.channels_first(head_width)
        head = "dl" if tokens_last else "ld"
        scale = head_width**-0.5 * (attention_kernel.LOG2_E if backend == "pallas" else 1)

        of_time = self._time_shares(spatial, time, 4 if tokens_last else 3)

        # A kernel takes the tokens of the grid by themselves.
        parts = [x_BNLC]
        if backend == "pallas" and self.extra_tokens:
            parts = jnp.split(x_BNLC, [self.window**2], axis=2)
        # Eq. 3-5, the spatial part of all three. The key gets no share of the time token, and no
        # bias: both would cancel in the softmax (top of this file), unless keys are normalised or
        # have different times.
        spatial_parts = [
            [
                jnp.einsum(f"bnlc,chd->bnh{head}", part, spatial_kernel[:, index])
                for index in range(3)
            ]
            for part in parts
        ]
        # Eq. 3 and 5, the part of the time token, with both biases.
        q_time, v_time = of_time(query, time_BT), of_time(value, time_BT)
        k_time = of_time(1, time_BT) if self.qk_norm or differs else None
        scales = self._scales(head_width) if self.qk_norm else None

        def with_time(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, ...]:
            q = q + q_time
            if k_time is not None:
                k = k + k_time
            if scales is not None:
                q, k = (self._normed(*each, head) for each in zip((q, k), scales, strict=True))
            if differs:
                v = v + v_time
            return tuple(checkpoint_name(x, "qkv") for x in (q * scale, k, v))

        qkv = [with_time(*part) for part in spatial_parts]
        if self.is_mutable_collection("statistics") and not isinstance(time_BT, TwoTimes):
            self._measure(qkv[0], time_BT, time, bias_table)

        # Eq. 6. The weights of a row sum to one, so that the time's share of the values, if it is
        # the same for every token, is added behind them.
        outs = self._attend(qkv, bias_table, backend)
        if not differs:
            outs = [out + v_time for out in outs]
        return self._project_out(outs, head, channels)

    def _time_shares(
        self, spatial: "_Projection", time: "_Projection | None", axis: int
    ) -> Callable[[int, Time], jax.Array]:
        """Return (number of a projection, time) → what is added to it, with both biases.

        It has five axes: examples, one, heads, and tokens at `axis` 3 or 4, channels at the other.
        """
        kernel = time.kernel.ready(self.dtype) if time else None

        def of_all(index: int, time_BT: jax.Array) -> jax.Array:
            if time is None or kernel is None:
                of_head = spatial.bias[index].astype(self.dtype)[None]
            else:
                projected = jnp.einsum("bt,thd->bhd", time_BT.astype(self.dtype), kernel[:, index])
                of_head = projected + (time.bias[index] + spatial.bias[index]).astype(self.dtype)
            return jnp.expand_dims(of_head, (1, axis))

        def of_time(index: int, time_BT: Time) -> jax.Array:
            if time is None and isinstance(time_BT, TwoTimes):
                time_BT = time_BT.first_BT  # neither has a share
            return of_each_token(functools.partial(of_all, index), time_BT, axis)

        return of_time

    def _scales(self, head_width: int) -> tuple[jax.Array, jax.Array]:
        """Make the factors of normalised queries and keys, (D,) each."""
        ones, shape = nn.initializers.ones_init(), (head_width,)
        q_scale = param(self, "q_scale", ones, shape, decays=False).value
        return q_scale, param(self, "k_scale", ones, shape, decays=False).value

    def _normed(self, x: jax.Array, factor: jax.Array, head: str) -> jax.Array:
        """Divide by the root mean square of each head's channels, where `head` has its "d"."""
        axis, exact = head.index("d") - 2, at_least_float32(self.dtype)
        x_exact = x.astype(exact)
        size = jax.lax.rsqrt(jnp.mean(x_exact**2, axis, keepdims=True) + 1e-6)
        factor = factor[:, None] if axis == -2 else factor
        return (x_exact * size * factor).astype(self.dtype)

    def _input_projections(
        self, channels: int, time_width: int
    ) -> tuple["_Projection", "_Projection | None"]:
        """Make parameters, released or slim: spatial projection, and time's if there is one."""
        heads, head_width = self.num_heads, channels // self.num_heads
        letters, num_projections = ("qv", 2) if self.slim else ("qkv", 3)
        # Without the key's share, the bounds of a fresh time projection stay those of the released
        # shape.
        slim_scale = (time_width + num_projections * channels) / (time_width + 3 * channels)
        over = (FSDP, None, TENSOR, None)  # (C, projections, heads, head width)

        def projection(prefix: str, width: int, count: int, kernel: str, init: Any) -> _Projection:
            biases = (num_projections, heads, head_width)
            return _Projection(
                param(self, f"{prefix}{kernel}_kernel", init, (width, count, *biases[1:]), over),
                param(
                    self,
                    f"{prefix}{letters}_bias",
                    nn.initializers.zeros_init(),
                    biases,
                    (None, TENSOR, None),
                    decays=False,
                ).value,
            )

        spatial = projection("", channels, 3, "qkv", _xavier_to_heads(self.gains[0] ** 2))
        if self.time_in != "tmsa":
            return spatial, None
        return spatial, projection(
            "time_", time_width, num_projections, letters, _xavier_to_heads(slim_scale)
        )

    def _measure(
        self,
        qkv: tuple[jax.Array, ...],
        time_BT: jax.Array,
        time: "_Projection | None",
        bias_table: jax.Array,
    ) -> None:
        """Sow what `measured_by` asks for."""
        statistics = _statistics.get()
        if statistics is None:
            return
        if self.qk_norm:
            raise UserError(
                "attention over time is measured of queries and keys that are sums; of a network "
                "with model.qk_norm it is not"
            )
        exact = at_least_float32(self.dtype)
        q, k, v = (x.astype(exact) for x in qkv)

        def of_time(time_BT: jax.Array, projection: int | None) -> jax.Array:
            if time is None or projection is None:
                return jnp.zeros((len(time_BT), 1, q.shape[2], 1, q.shape[-1]), exact)
            kernel = time.kernel.value[:, projection].astype(exact)
            of_head = jnp.einsum("bt,thd->bhd", time_BT.astype(exact), kernel)
            return jnp.expand_dims(of_head + time.bias[projection], (1, 3))

        has_key = time is not None and len(time.bias) == 3
        attended = Attended(
            q,
            k,
            v,
            time_BT,
            lambda other_BT: of_time(other_BT, 0) * q.shape[-1] ** -0.5,
            of_time(time_BT, 1 if has_key else None),
            of_time(time_BT, None if time is None else len(time.bias) - 1),
            self._bias(bias_table),
            self.window,
        )
        for name, value in statistics(attended).items():
            self.put_variable("statistics", name, value)

    def _bias_table(self, time_BT: Time) -> jax.Array:
        """Make the position bias: (offsets, H) float32, with time in it (B, offsets, H)."""
        shape = ((2 * self.window - 1) ** 2, self.num_heads)
        if not self.position_bias:
            return jnp.zeros(shape)
        init = nn.initializers.truncated_normal(0.02)
        name = "relative_position_bias"
        table = param(self, name, init, shape, (None, TENSOR), decays=False).value
        if self.time_in != "bias":
            return table
        assert not isinstance(time_BT, TwoTimes)
        kernel = param(
            self,
            "time_bias_kernel",
            nn.initializers.zeros_init(),
            (time_BT.shape[-1], *shape),
            (FSDP, None, TENSOR),
        ).ready(self.dtype)
        # A bias of this projection would be the table once more.
        of_time = jnp.einsum("bt,toh->boh", time_BT.astype(self.dtype), kernel)
        return table + of_time.astype(table.dtype)

    def _backend(self, head_width: int) -> str:
        """Return how attention is computed: by XLA where its weights are to be kept."""
        if keeps_weights(self):
            return "xla"
        asked = self.backend, platform(), self.window, head_width, self.dtype
        outside = self.extra_tokens > 0
        obstacle = xla_only(self.backend, self.time_in, outside)
        chosen = choose_backend(*asked, obstacle=obstacle)[0]
        backwards_only = chosen == "cudnn" or outside or attention_tangent_kernel.refusal()
        return "xla" if _forward_mode.get() and backwards_only else chosen

    def _attend(
        self, qkv: list[tuple[jax.Array, ...]], bias_table: jax.Array, backend: str
    ) -> list[jax.Array]:
        """Compute softmax(q kᵀ + bias) v by XLA, a kernel or cuDNN: the only branch.

        Queries, keys and values are (B, N, H, L, D), with a kernel that wants it (B, N, H, D, L).
        There are those of all tokens, or of the grid's and of the others.
        """
        q, k, v = qkv[0]
        if backend == "xla":
            bias = self._bias(bias_table)
            kept = keeps_weights(self) or bias_table.ndim == 3 or _forward_mode.get()
            if self.backend == "auto" and platforms.of(platform()).own_attention and not kept:
                return [_reverse_attention(q, k, v, bias)]
            weights = nn.softmax(_logits(q, k) + bias)
            # Kept only when the caller asks for "intermediates".
            self.sow("intermediates", "attention", weights)
            return [jnp.einsum("bnhqk,bnhkd->bnhqd", weights.astype(self.dtype), v)]
        windows = [x.reshape(-1, *x.shape[2:]) for part in qkv for x in part]
        if len(qkv) == 2:
            attend = functools.partial(_outside_attention, window=self.window)
            outs = per_shard(attend)(*windows, bias_table)
            return [out.reshape(part[0].shape) for out, part in zip(outs, qkv, strict=True)]
        attend = functools.partial(_softmax_attention, window=self.window, backend=backend)
        return [per_shard(attend)(*windows, bias_table).reshape(q.shape)]

    def _bias(self, table: jax.Array) -> jax.Array:
        """Look the bias of each pair of tokens up: (offsets, H) → (H, L + E, L + E).

        Of examples, (B, offsets, H) → (B, 1, H, L + E, L + E).
        """
        if table.ndim == 3:
            return jax.vmap(self._bias)(table)[:, None]
        index_LL, shared_LL = tile_index(self.tile or (self.window, self.window), self.window)
        bias_LLH = table[index_LL]
        if not shared_LL.all():
            bias_LLH = jnp.where(shared_LL[..., None], bias_LLH, -jnp.inf)
        if self.extra_tokens:
            outside = (0, self.extra_tokens)
            bias_LLH = jnp.pad(bias_LLH, (outside, outside, (0, 0)))
        return bias_LLH.transpose(2, 0, 1)

    def _project_out(self, outs: list[jax.Array], head: str, channels: int) -> jax.Array:
        """Join the heads, (B, N, H, …), by the output projection: (B, N, L + E, C).

        `head` names the last two axes, "ld" or "dl", of the outputs of all tokens or parts of them.
        """
        heads, head_width = self.num_heads, channels // self.num_heads
        kernel = param(
            self,
            "out_kernel",
            nn.initializers.variance_scaling(
                self.gains[1] ** 2, "fan_avg", "uniform", in_axis=(0, 1), out_axis=2
            ),
            (heads, head_width, channels),
            (TENSOR, None, FSDP),
        ).ready(self.dtype)
        zeros = nn.initializers.zeros_init()
        bias = param(self, "out_bias", zeros, (channels,), decays=False).value
        parts = [jnp.einsum(f"bnh{head},hdc->bnlc", out, kernel) for out in outs]
        whole = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=2)
        return whole + bias.astype(self.dtype)


class _Projection(NamedTuple):
    """A projection to q, k, v (or q, v) of every head.

    Attributes:
      kernel: (C or T, projections, H, D).
      bias: (projections, H, D).
    """

    kernel: Param
    bias: jax.Array
