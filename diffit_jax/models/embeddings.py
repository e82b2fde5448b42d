"""The time token: a noise level, and a label if there is one, as one vector (DiffiT §3.2); and the
fixed embedding of positions.

Shape suffixes: B batch, T width of the time token, L tokens, C channels.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffit_jax.models.placement import FSDP, Dense, Embed, at_least_float32, param


def sinusoidal_embedding(
    noise_level_B: jax.Array, width: int, max_period: float = 10_000.0
) -> jax.Array:
    """Sinusoidal ("positional") embedding of a scalar, the better of the two in the paper's Table
    8.

    Args:
      noise_level_B: (B,) any real dtype; a timestep or EDM's `c_noise`. It is used as it is,
        without scaling.
      width: even number of output channels.
      max_period: the slowest frequency is about 1 / max_period.

    Returns:
      (B, width) float32 (float64 of such levels), `[cos(t w_k), sin(t w_k)]` with
      `w_k = max_period^(-k / (width / 2))` for `k < width / 2`.
    """
    half = width // 2
    dtype = at_least_float32(noise_level_B.dtype)
    frequencies = jnp.exp(-jnp.log(max_period) * jnp.arange(half, dtype=dtype) / half)
    angles = noise_level_B.astype(dtype)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def position_embedding(grid: int, width: int) -> np.ndarray:
    """Fixed two-dimensional sine-cosine embedding of the tokens of a square grid, as the released
    latent model has it.

    Args:
      grid: side of the grid; its L = grid² tokens are in row-major order.
      width: number of channels C, a multiple of 4.

    Returns:
      (L, C) float32, computed in float64. The first half of the channels encodes the column p, the
      second half the row, each as `[sin(p w_k), cos(p w_k)]` with `w_k = 10000^(-k / (C / 4))` for
      `k < C / 4`.
    """
    frequencies = 10_000.0 ** (-np.arange(width // 4) / (width // 4))
    angles = np.arange(grid)[:, None] * frequencies
    line = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    row, column = np.divmod(np.arange(grid * grid), grid)
    return np.concatenate([line[column], line[row]], axis=1).astype(np.float32)


class TimeToken(nn.Module):
    """Noise level (and label) → the token `x_t` that every TMSA layer receives.

    A sinusoidal embedding goes through a two-layer MLP with swish; class-conditional models add a
    row of a learned label table whose last row, index `num_classes`, stands for "no label".

    Attributes:
      width: width T of the token.
      num_classes: number of labels; 0 makes the model unconditional.
      frequency_width: width of the sinusoidal embedding.
      augment_labels: how many numbers tell what was done to an image, see `data.augment`.
      dtype: dtype of the matrix products; parameters are float32.
    """

    width: int
    num_classes: int = 0
    frequency_width: int = 256
    augment_labels: int = 0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        noise_level_B: jax.Array,
        label_B: jax.Array | None = None,
        augment_BA: jax.Array | None = None,
    ) -> jax.Array:
        """Maps (B,) noise levels, (B,) int labels in [0, num_classes] (None: no label) and (B, A)
        augmentation labels (None: nothing was done) to the (B, T) token."""
        init = nn.initializers.normal(0.02)
        token_BT = sinusoidal_embedding(noise_level_B, self.frequency_width)
        token_BT = Dense(self.width, self.dtype, init, name="in")(token_BT)
        token_BT = Dense(self.width, self.dtype, init, name="out")(nn.silu(token_BT))
        if self.num_classes:
            if label_B is None:
                label_B = jnp.full(noise_level_B.shape, self.num_classes, jnp.int32)
            table = Embed(
                self.num_classes + 1,
                self.width,
                embedding_init=init,
                dtype=self.dtype,
                name="label",
            )
            token_BT = token_BT + table(label_B)
        if self.augment_labels:
            # Without a bias, as EDM has it: nothing done adds nothing.
            shape = (self.augment_labels, self.width)
            kernel = param(self, "augment_kernel", init, shape, (None, FSDP))
            if augment_BA is not None:
                token_BT = token_BT + augment_BA.astype(self.dtype) @ kernel.ready(self.dtype)
        return token_BT
