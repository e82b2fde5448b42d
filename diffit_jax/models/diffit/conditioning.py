"""The conditioning of a DiffiT: noise level, label and augmentation → the time token x_t.

Shape suffixes: B batch, L tokens, C channels, T width of the time token.
"""

from typing import Annotated

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffit_jax.errors import UserError
from diffit_jax.limits import LATER, one_of
from diffit_jax.models.diffit.attention import xla_only
from diffit_jax.models.model import Model
from diffit_jax.models.placement import FSDP, Dense, Embed, at_least_float32, param

# Where a block takes in the time token, see `blocks.DiffiTBlock`.
TIME_IN = ("tmsa", "bias", "mlp", "token", "adaln", "add")
EMBEDDINGS = ("positional", "fourier")


class TimeConditioned(Model, kw_only=True):
    """A network of DiffiT blocks, with the switches of the paper's Tables 6 to 8.

    Attributes:
      time_in: where the blocks take in the time token, see `DiffiTBlock`: "tmsa", or what the paper
        compares with it: "bias" (images only), "mlp", "token", "adaln", "add".
      time_embedding: of the noise level: "positional", or "fourier" for levels of order 1, see
        `TimeToken`.
    """

    time_in: Annotated[str, one_of(*TIME_IN), LATER] = "tmsa"
    time_embedding: Annotated[str, one_of(*EMBEDDINGS), LATER] = "positional"

    def check_sizes(self) -> None:
        """Raise `UserError` if an attention is asked for that cannot take time in there."""
        reason = xla_only(self.time_in)
        if reason and self.attention not in ("auto", "xla"):
            raise UserError(
                f"config key model.attention is {self.attention!r}, but model.time_in is "
                f"{self.time_in!r}: {reason}; set model.attention to auto or xla"
            )


def sinusoidal_embedding(
    noise_level_B: jax.Array, width: int, max_period: float = 10_000.0
) -> jax.Array:
    """Embed a scalar by sines and cosines ("positional", the better choice in the paper's Table 8).

    Args:
      noise_level_B: (B,) any real dtype; a timestep or EDM's `c_noise`, used without scaling.
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


def fixed_frequencies(module: nn.Module, count: int) -> jax.Array:
    """Return a module's frequencies of Fourier features, (count,): drawn once, never trained."""
    return module.variable(
        "constants",
        "frequencies",
        lambda: 16 * jax.random.normal(module.make_rng("params"), (count,)),
    ).value


def fourier_embedding(noise_level_B: jax.Array, frequencies: jax.Array) -> jax.Array:
    """Embed a scalar by Fourier features of random frequencies (the paper's Table 8, as in EDM).

    Args:
      noise_level_B: (B,) any real dtype, of order 1, as EDM's `c_noise` is.
      frequencies: (width / 2,) float32.

    Returns:
      (B, width) float32 (float64 of such levels), `[cos(2π t f), sin(2π t f)]`.
    """
    dtype = at_least_float32(noise_level_B.dtype)
    angles = 2 * np.pi * noise_level_B.astype(dtype)[:, None] * frequencies.astype(dtype)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def position_embedding(grid: int, width: int) -> np.ndarray:
    """Return the fixed two-dimensional sine-cosine embedding of the released latent model.

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

    An embedding of the noise level goes through a two-layer MLP with swish; class-conditional
    models add a row of a learned label table whose last row, index `num_classes`, stands for "no
    label".

    Attributes:
      width: width T of the token.
      num_classes: number of labels; 0 makes the model unconditional.
      frequency_width: width of the embedding.
      embedding: "positional" (`sinusoidal_embedding`) or "fourier", whose frequencies are 16 times
        draws of a normal distribution, fixed when the network is made (constants/…/frequencies).
      augment_labels: how many numbers tell what was done to an image, see `data.augment`.
      dtype: dtype of the matrix products; parameters are float32.
    """

    width: int
    num_classes: int = 0
    frequency_width: int = 256
    augment_labels: int = 0
    dtype: jnp.dtype = jnp.float32
    embedding: str = "positional"

    @nn.compact
    def __call__(
        self,
        noise_level_B: jax.Array,
        label_B: jax.Array | None = None,
        augment_BA: jax.Array | None = None,
    ) -> jax.Array:
        """Map noise levels, labels and augmentation labels to the time token, (B, T).

        Args:
          noise_level_B: (B,) noise levels.
          label_B: (B,) int labels in [0, num_classes]; None: no label.
          augment_BA: (B, A) augmentation labels; None: not augmented.
        """
        init = nn.initializers.normal(0.02)
        if self.embedding == "fourier":
            frequencies = fixed_frequencies(self, self.frequency_width // 2)
            token_BT = fourier_embedding(noise_level_B, frequencies)
        else:
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
