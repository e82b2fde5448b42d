"""The DiffiT transformer block (Eq. 7-8) and its image-space ResBlock (Eq. 9-10).

Shape suffixes: B batch, N windows, L tokens of a window, C channels, T width of the time token; H,
W height and width of an image.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.extend.random import threefry_2x32

from diffit_jax import platforms
from diffit_jax.errors import UserError
from diffit_jax.models.diffit.attention import (
    TMSA,
    Tile,
    choose_backend,
    dense_tile,
    merge,
    partition,
)
from diffit_jax.models.placement import (
    FSDP,
    TENSOR,
    Conv,
    Dense,
    Embed,
    GroupNorm,
    LayerNorm,
    at_least_float32,
    param,
    placed,
    platform,
)

XAVIER = nn.initializers.xavier_uniform()


def _computed_once(*arrays: jax.Array):
    """Keep XLA's CPU compiler from fusing a computation into each of its consumers.

    It would repeat the computation there.
    """
    return platforms.where("repeats_fusions", lambda *xs: jax.lax.optimization_barrier(xs), *arrays)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def gelu(x: jax.Array, keeps_input: bool = True) -> jax.Array:
    """Apply GELU in its tanh form, ½ x (1 + tanh(√(2/π) (x + 0.044715 x³))), elementwise.

    Each pass computes the tanh once: a training step of a small network on a CPU takes two thirds
    of what it takes where XLA repeats it in every consumer, see `_computed_once`. On other devices
    it is what XLA makes of `jax.nn.gelu`.

    Args:
      x: of any shape.
      keeps_input: whether a backward pass is handed x, and not the derivative at x. (Handed that, a
        step on a CPU takes 1.25 times as long.) Under another `jax.checkpoint`, which decides what
        is kept, x would be kept twice.
    """
    return _computed_once(nn.gelu(x))[0]


@gelu.defjvp
def _gelu_jvp(
    keeps_input: bool, primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    def multiplied(x: jax.Array, tangent: jax.Array) -> jax.Array:
        (x,) = _computed_once(x)
        _, derivative = jax.jvp(nn.gelu, (x,), (jnp.ones_like(x),))
        return _computed_once(derivative * tangent)[0]

    if keeps_input:
        multiplied = jax.checkpoint(multiplied, prevent_cse=False)
    return gelu(*primals, keeps_input), multiplied(*primals, *tangents)


def dropped(x: jax.Array, key_B: jax.Array, rate: float) -> jax.Array:
    """Apply dropout: zero each value with probability `rate`, rescale the others.

    The probability is rounded to a multiple of 1/65,536.

    Args:
      x: (B, …, C), C a multiple of 4.
      key_B: (B,) threefry keys: an example's mask does not depend on the others.
      rate: in [0, 1).

    Returns:
      An array like x.
    """
    threshold = round(rate * 2**16)
    # Random bits cost more than all else here: 16 will do, and `jax.random.bits` would leave half
    # of those that it makes.
    words = 2 * (x[0].size // 4)

    def bits_for(key: jax.Array) -> jax.Array:
        bits = threefry_2x32(jax.random.key_data(key), jnp.arange(words, dtype=jnp.uint32))
        bits = bits.reshape(2, *x.shape[1:-1], x.shape[-1] // 4)
        return jnp.concatenate([*(bits >> 16), *(bits & 0xFFFF)], axis=-1)

    bits = jax.vmap(bits_for)(key_B)
    return jnp.where(bits >= threshold, x * (2**16 / (2**16 - threshold)), 0).astype(x.dtype)


class DiffiTBlock(nn.Module):
    """Eq. 7-8: `x̂ = TMSA(LN(x), x_t) + x`, then `MLP(LN(x̂)) + x̂`, on tokens in windows.

    Attributes:
      num_heads, window, dtype: as in `TMSA`.
      mlp_ratio: width of the MLP's hidden layer, in multiples of C.
      slim_tmsa, attention, tile: `slim`, `backend` and `tile` of `TMSA`.
      affine_norm: whether the layer normalisations have a learned scale and shift.
      dropout: share of what the MLP adds that training drops. (EDM's blocks have it before their
        last convolution, which is as wide; before the MLP's last product there would be four times
        as many values to draw for, an estimated sixth of a training step on a TPU.)
      remat: under which policy it is repeated, see `repeat_block`.
    """

    num_heads: int
    window: int
    mlp_ratio: int = 4
    dtype: jnp.dtype = jnp.float32
    slim_tmsa: bool = False
    affine_norm: bool = True
    attention: str = "xla"
    dropout: float = 0.0
    tile: Tile | None = None
    remat: str = "none"

    @nn.compact
    def __call__(
        self, x_BNLC: jax.Array, time_BT: jax.Array, dropout_key_B: jax.Array | None = None
    ) -> jax.Array:
        """Map tokens (B, N, L, C) and the time token (B, T) to (B, N, L, C), Eq. 7-8.

        Dropout acts only if `dropout_key_B`, (B,) keys, are given.
        """
        channels = x_BNLC.shape[-1]
        normed = layer_norm(self.dtype, self.affine_norm, name="norm_attention")(x_BNLC)
        attention = TMSA(
            num_heads=self.num_heads,
            window=self.window,
            dtype=self.dtype,
            slim=self.slim_tmsa,
            backend=self.attention,
            tile=self.tile,
            name="attention",
        )
        x_BNLC = x_BNLC + checkpoint_name(attention(normed, time_BT), "attention_out")
        normed = layer_norm(self.dtype, self.affine_norm, name="norm_mlp")(x_BNLC)
        hidden = Dense(self.mlp_ratio * channels, self.dtype, axes=(FSDP, TENSOR), name="mlp_in")(
            normed
        )
        hidden = gelu(checkpoint_name(hidden, "mlp_in"), self.remat == "none")
        hidden = Dense(channels, self.dtype, axes=(TENSOR, FSDP), name="mlp_out")(hidden)
        if dropout_key_B is not None and self.dropout:
            hidden = dropped(hidden, dropout_key_B, self.dropout)
        return x_BNLC + hidden


class DiffiTResBlock(nn.Module):
    """Eq. 9-10: `x̂ = Conv3×3(Swish(GN(x)))`, then `DiffiTBlock(x̂, x_t) + x`, on an image.

    Attributes:
      num_heads, window, mlp_ratio, dtype, dropout, attention, remat: as in `DiffiTBlock`.
    """

    num_heads: int
    window: int
    mlp_ratio: int = 4
    dtype: jnp.dtype = jnp.float32
    dropout: float = 0.0
    attention: str = "xla"
    remat: str = "none"

    @nn.compact
    def __call__(
        self, x_BHWC: jax.Array, time_BT: jax.Array, dropout_key_B: jax.Array | None = None
    ) -> jax.Array:
        """Map (B, H, W, C) and the time token (B, T) to (B, H, W, C), Eq. 9-10.

        H and W are multiples of `window`. Dropout acts only if `dropout_key_B`, (B,) keys, are
        given.
        """
        _, height, width, channels = x_BHWC.shape
        tile = (self.window, self.window)
        width_of_head = channels // self.num_heads
        chosen = choose_backend(self.attention, platform(), self.window, width_of_head, self.dtype)[
            0
        ]
        captured = self.is_mutable_collection("intermediates")
        if platforms.of(platform()).dense_tiles and chosen == "xla" and not captured:
            tile = dense_tile(height, width, self.window)
        hidden = nn.swish(group_norm(channels, self.dtype, name="norm")(x_BHWC))
        hidden = conv3x3(channels, self.dtype, name="conv")(hidden)
        block = DiffiTBlock(
            self.num_heads,
            self.window,
            self.mlp_ratio,
            self.dtype,
            attention=self.attention,
            dropout=self.dropout,
            tile=tile,
            remat=self.remat,
            name="transformer",
        )
        hidden = block(partition(hidden, tile), time_BT, dropout_key_B)
        return x_BHWC + merge(hidden, height, width, tile)


def layer_norm(dtype: jnp.dtype, affine: bool, name: str) -> LayerNorm:
    """Return a layer normalisation over the channels, with statistics in float32.

    `affine` gives it a learned scale and shift.
    """
    return LayerNorm(epsilon=1e-6, dtype=dtype, use_scale=affine, use_bias=affine, name=name)


def group_norm(channels: int, dtype: jnp.dtype, name: str) -> GroupNorm:
    """Return a group normalisation: groups of at least four channels, at most 32 groups (EDM's)."""
    return GroupNorm(num_groups=min(32, channels // 4), epsilon=1e-6, dtype=dtype, name=name)


def conv3x3(
    channels: int, dtype: jnp.dtype, name: str, stride: int = 1, kernel_init=XAVIER
) -> Conv:
    """Return a 3×3 convolution to `channels`, padded by one pixel on each side."""
    return Conv(
        channels, (3, 3), stride, padding=1, kernel_init=kernel_init, dtype=dtype, name=name
    )


class Upsample(nn.Module):
    """Transposed 2×2 convolution of stride 2, computed as one matrix product.

    Each pixel becomes a 2×2 square.

    Attributes:
      channels: of the output.
      dtype: dtype of the matrix product.
    """

    channels: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        """Map (B, H, W, C) to (B, 2H, 2W, channels)."""
        batch, height, width, _ = x_BHWC.shape
        squares = Dense(4 * self.channels, self.dtype, name="project")(x_BHWC)
        squares = squares.reshape(batch, height, width, 2, 2, self.channels).transpose(
            0, 1, 3, 2, 4, 5
        )
        return squares.reshape(batch, 2 * height, 2 * width, self.channels)


# What a block keeps for the backward pass; everything else is computed again.
REMAT_POLICIES = {
    "none": None,  # everything is kept
    # Results of matrix products with weights are kept, and of attention where a kernel computes it.
    "dots": jax.checkpoint_policies.save_only_these_names(
        "qkv", "attention", "attention_out", "mlp_in"
    ),
    "full": jax.checkpoint_policies.nothing_saveable,  # only the block's input is kept
}


def repeat_block(
    block: nn.Module,
    x: jax.Array,
    time_BT: jax.Array,
    num_blocks: int,
    *,
    unroll: int = 1,
    remat: str = "none",
    dropout_key_B: jax.Array | None = None,
    capture: int | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """Apply `num_blocks` copies of a block one after the other, as one scanned layer.

    Args:
      block: module that maps (x, time_BT, dropout_key_B) to an array like x. Its parameters get a
        leading axis of `num_blocks`.
      x: input of the first copy.
      time_BT: (B, T) time token, the same for every copy, or (num_blocks, B, T), one for each.
      num_blocks: how many copies.
      unroll: copies per iteration of the scan. 1 keeps the compiled program small; `num_blocks`
        shows the compiler all of them at once, which is faster for a small network on a CPU.
      remat: a name in `REMAT_POLICIES`.
      dropout_key_B: (B,) keys, from which each copy gets its own; None: no dropout.
      capture: number of a copy whose output is returned too.

    Returns:
      The output of the last copy, shaped like x, and that of copy `capture`, or None.
    """

    def run(
        block: nn.Module, x: jax.Array, time_BT: jax.Array, key_B: jax.Array | None
    ) -> jax.Array:
        return placed(block(placed(x), time_BT, key_B))

    if remat != "none":
        # In a loop of its own a block's forward and backward pass cannot be merged by XLA; unrolled
        # they could.
        run = nn.remat(run, policy=REMAT_POLICIES[remat], prevent_cse=unroll > 1)

    time_axis = 0 if time_BT.ndim == 3 else nn.broadcast
    keys_NB = None
    if dropout_key_B is not None:
        keys_NB = jax.vmap(
            lambda number: jax.vmap(lambda key: jax.random.fold_in(key, number))(dropout_key_B)
        )(jnp.arange(num_blocks))

    def scanned(x: jax.Array, copies: slice) -> jax.Array:
        scan: Any = nn.scan(
            lambda block, x, time_BT, key_B: (run(block, x, time_BT, key_B), None),
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            in_axes=(time_axis, 0),  # pyright: ignore[reportArgumentType] (its stub forgets it)
            length=len(range(num_blocks)[copies]),
            unroll=unroll,
            # Flax would trace a block twice to find variables that all copies share: there are
            # none.
            check_constancy_invariants=False,
        )
        times, keys = time_BT, keys_NB
        if copies != _ALL:
            scan = nn.map_variables(
                scan, "params", lambda tree: jax.tree.map(lambda leaf: leaf[copies], tree)
            )
            times = time_BT[copies] if time_axis == 0 else time_BT
            keys = None if keys_NB is None else keys_NB[copies]
        return scan(block, x, times, keys)[0]

    if capture is None or block.is_initializing():  # which makes the whole stack, of these shapes
        x = scanned(x, _ALL)
        return x, None if capture is None else x
    # Cut in two there, a step of XL/2 on a TPU takes 1.4 % longer by estimate; to carry the tokens
    # through the whole scan, 2.9 %.
    kept = scanned(x, slice(0, capture + 1))
    rest = slice(capture + 1, num_blocks)
    return (scanned(kept, rest) if capture + 1 < num_blocks else kept), kept


_ALL = slice(None)


def check_capture(capture: int | None, num_blocks: int) -> None:
    """Raise `UserError` unless a block has this number."""
    if capture is not None and not 0 <= capture < num_blocks:
        raise UserError(
            f"there is no block {capture} to capture: the blocks are 0 to {num_blocks - 1}"
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
        """Map noise levels, labels and augmentation labels to the time token, (B, T).

        Args:
          noise_level_B: (B,) noise levels.
          label_B: (B,) int labels in [0, num_classes]; None: no label.
          augment_BA: (B, A) augmentation labels; None: not augmented.
        """
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
