"""Time-dependent multi-head self-attention (TMSA), DiffiT Eq. 3-6, inside non-overlapping windows.

Shape suffixes: B batch, N windows, L tokens of a window, C channels, T width of the time token, H heads, D head width.

Eq. 3-6 as written, for spatial tokens x_s and the time token x_t:

    q = x_s W_qs + x_t W_qt,  k = x_s W_ks + x_t W_kt,  v = x_s W_vs + x_t W_vt
    TMSA = softmax(q kᵀ / √D + bias) v

Two exact simplifications are built in (tests/test_attention.py proves both against the equations above):

  * Whatever is the same for every key (x_t W_kt, and any key bias) adds a constant to each row of logits, which the softmax ignores.
    It can never change the output, so it is never computed and its gradient is exactly zero.
  * The weights of a row sum to one, so whatever is the same for every value passes straight through:
    TMSA = softmax((q_s + q_t) k_sᵀ / √D + bias) v_s + v_t.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffit_jax.errors import UserError


def relative_position_index(window: int) -> np.ndarray:
    """Row of the bias table that belongs to each pair of tokens of a window.

    Args:
      window: side w of the square window, L = w² tokens in row-major order.

    Returns:
      (L, L) int32, `[query, key] = (r_q - r_k + w - 1)(2w - 1) + (c_q - c_k + w - 1)`, in [0, (2w - 1)²).
    """
    row, column = np.divmod(np.arange(window * window), window)
    row_offset = row[:, None] - row[None, :] + window - 1
    column_offset = column[:, None] - column[None, :] + window - 1
    return (row_offset * (2 * window - 1) + column_offset).astype(np.int32)


def partition_windows(x_BHWC: jax.Array, window: int) -> jax.Array:
    """Cuts (B, height, width, C) into non-overlapping windows: (B, N, L, C), windows and tokens both row-major."""
    batch, height, width, channels = x_BHWC.shape
    x = x_BHWC.reshape(batch, height // window, window, width // window, window, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, window * window, channels)


def merge_windows(x_BNLC: jax.Array, height: int, width: int) -> jax.Array:
    """Puts the windows of `partition_windows` back together: (B, N, L, C) → (B, height, width, C)."""
    batch, _, tokens, channels = x_BNLC.shape
    window = int(tokens**0.5)
    x = x_BNLC.reshape(batch, height // window, width // window, window, window, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height, width, channels)


def _xavier_to_heads(scale: float = 1.0):
    """Xavier-uniform for kernels (C, shares, heads, head width), with `scale` times its variance."""
    return nn.initializers.variance_scaling(scale, "fan_avg", "uniform", in_axis=0, out_axis=(1, 2, 3))


class TMSA(nn.Module):
    """Time-dependent self-attention among the tokens of each window.

    The parameters are those of the released model, (q, k, v) × heads × head width with a bias for the spatial and the time projection,
    although the key's share of `time_qkv` and both key biases have no effect (see the top of this file). The slim parametrisation
    leaves these out, and computes the same functions.

    Attributes:
      num_heads: number of heads; must divide C.
      window: side of the square window, L = window².
      dtype: dtype of the matrix products; parameters, logits and softmax are float32.
      slim: whether `time_qv_kernel`, `time_qv_bias` and `qv_bias` (without the key's share) take the place of `time_qkv_kernel`,
        `time_qkv_bias` and `qkv_bias`.
    """

    num_heads: int
    window: int
    dtype: jnp.dtype = jnp.float32
    slim: bool = False

    @nn.compact
    def __call__(self, x_BNLC: jax.Array, time_BT: jax.Array) -> jax.Array:
        """Maps tokens (B, N, L, C) and the time token (B, T) to (B, N, L, C)."""
        channels, heads = x_BNLC.shape[-1], self.num_heads
        if channels % heads:
            raise UserError(f"{channels} channels do not divide into {heads} heads: change channels or the head width")
        head_width = channels // heads

        # Without the key's share, the bounds of a fresh time projection stay those of the released shape.
        letters, shares = ("qv", 2) if self.slim else ("qkv", 3)
        query, value = 0, shares - 1
        time_width = time_BT.shape[-1]
        slim_scale = (time_width + shares * channels) / (time_width + 3 * channels)
        zeros = nn.initializers.zeros_init()
        qkv_kernel = self.param("qkv_kernel", _xavier_to_heads(), (channels, 3, heads, head_width))
        qkv_bias = self.param(f"{letters}_bias", zeros, (shares, heads, head_width))
        time_kernel = self.param(f"time_{letters}_kernel", _xavier_to_heads(slim_scale), (time_width, shares, heads, head_width))
        time_bias = self.param(f"time_{letters}_bias", zeros, (shares, heads, head_width))
        bias_table = self.param("relative_position_bias", nn.initializers.truncated_normal(0.02), ((2 * self.window - 1) ** 2, heads))

        x_BNLC, qkv_kernel = x_BNLC.astype(self.dtype), qkv_kernel.astype(self.dtype)
        q_BNHLD, k_BNHLD, v_BNHLD = jnp.einsum("bnlc,cihd->ibnhld", x_BNLC, qkv_kernel)
        q_time_BHD, v_time_BHD = (
            jnp.einsum("bt,thd->bhd", time_BT.astype(self.dtype), time_kernel[:, i].astype(self.dtype))
            + (time_bias[i] + qkv_bias[i]).astype(self.dtype)
            for i in (query, value)
        )

        q_BNHLD = (q_BNHLD + q_time_BHD[:, None, :, None]) * head_width**-0.5
        bias_LLH = bias_table[relative_position_index(self.window)]
        logits = jnp.einsum("bnhqd,bnhkd->bnhqk", q_BNHLD, k_BNHLD, preferred_element_type=jnp.float32)
        weights = nn.softmax(logits + bias_LLH.transpose(2, 0, 1))
        self.sow("intermediates", "attention", weights)  # kept only when the caller asks for "intermediates"
        out_BNHLD = jnp.einsum("bnhqk,bnhkd->bnhqd", weights.astype(self.dtype), v_BNHLD)
        out_BNHLD = out_BNHLD + v_time_BHD[:, None, :, None]

        out_kernel = self.param(
            "out_kernel",
            nn.initializers.variance_scaling(1.0, "fan_avg", "uniform", in_axis=(0, 1), out_axis=2),
            (heads, head_width, channels),
        )
        out_bias = self.param("out_bias", zeros, (channels,))
        return jnp.einsum("bnhld,hdc->bnlc", out_BNHLD, out_kernel.astype(self.dtype)) + out_bias.astype(self.dtype)
