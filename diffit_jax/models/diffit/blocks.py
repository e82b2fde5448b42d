"""The DiffiT transformer block (Eq. 7-8) and its image-space ResBlock (Eq. 9-10).

Shape suffixes: B batch, N windows, L tokens of a window, C channels, T width of the time token; H,
W height and width of an image.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend.random import threefry_2x32

from diffit_jax import platforms
from diffit_jax.errors import UserError
from diffit_jax.models.diffit.attention import TMSA, Time, keeps_weights, of_each_token
from diffit_jax.models.diffit.backends import choose_backend, xla_only
from diffit_jax.models.diffit.windows import Tile, dense_tile, merge, partition
from diffit_jax.models.placement import (
    FSDP,
    TENSOR,
    Conv,
    Dense,
    GroupNorm,
    LayerNorm,
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

    Where the time token x_t enters is a choice; W are linear maps with a bias. SA is self-attention
    with a position bias, without time:

        tmsa    as above                                                      Table 6, H; Table 7
        bias    SA whose position bias has x_t in it, see `TMSA`              Table 6, F
        mlp     x̂ = SA(LN(x)) + x, then MLP(LN(x̂) + W x_t) + x̂               Table 6, G
        token   SA among the window's tokens and one that x_t makes           Table 7, "separate"
        adaln   x̂ = g ⊙ SA(s ⊙ LN(x) + b) + x, likewise the MLP, where        Fig. 7b: DiT's block
                s - 1, b and g are W x_t, W = 0 at first
        add     x + W x_t in the place of x                                   Table 4, A-C

    Attributes:
      num_heads, window, dtype: as in `TMSA`.
      mlp_ratio: width of the MLP's hidden layer, in multiples of C.
      slim_tmsa, attention, tile: `slim`, `backend` and `tile` of `TMSA`.
      affine_norm: whether the layer normalisations have a learned scale and shift; "adaln" makes
        them of x_t.
      dropout: share of what the MLP adds that training drops. (EDM's blocks have it before their
        last convolution, which is as wide; before the MLP's last product there would be four times
        as many values to draw for, an estimated sixth of a training step on a TPU.)
      remat: under which policy it is repeated, see `repeat_block`.
      time_in: where the time token enters, a name in `conditioning.TIME_IN`.
      extra_tokens: number E of tokens outside the grid behind each window's, see
        `with_extra_tokens`; with "token" the network makes them.
      qk_norm: as in `TMSA`.
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
    time_in: str = "tmsa"
    extra_tokens: int = 0
    qk_norm: bool = False

    @nn.compact
    def __call__(
        self, x_BNLC: jax.Array, time_BT: Time, dropout_key_B: jax.Array | None = None
    ) -> jax.Array:
        """Map tokens (B, N, L + E, C) and the time token (B, T) to (B, N, L + E, C), Eq. 7-8.

        Two times in an image go with N = 1 and E = 0. Dropout acts only if `dropout_key_B`, (B,)
        keys, are given.
        """
        channels = x_BNLC.shape[-1]

        def from_time(width: int, name: str, init: Callable = XAVIER) -> jax.Array:
            dense = Dense(width, self.dtype, init, name=name)
            return of_each_token(lambda token_BT: dense(token_BT)[:, None, None], time_BT, 2)

        affine = self.affine_norm and self.time_in != "adaln"
        into_attention = out_of_attention = into_mlp = out_of_mlp = _unchanged
        if self.time_in == "adaln":
            numbers = from_time(6 * channels, "time_modulation", nn.initializers.zeros_init())
            (into_attention, out_of_attention), (into_mlp, out_of_mlp) = (
                _modulations(of_branch) for of_branch in jnp.split(numbers, 2, axis=-1)
            )
        elif self.time_in == "add":
            x_BNLC = x_BNLC + from_time(channels, "time_add").astype(x_BNLC.dtype)

        normed = layer_norm(self.dtype, affine, name="norm_attention")(x_BNLC)
        attention = TMSA(
            num_heads=self.num_heads,
            window=self.window,
            dtype=self.dtype,
            slim=self.slim_tmsa,
            backend=self.attention,
            tile=self.tile,
            time_in=self.time_in,
            extra_tokens=self.extra_tokens,
            qk_norm=self.qk_norm,
            name="attention",
        )
        attended = checkpoint_name(attention(into_attention(normed), time_BT), "attention_out")
        x_BNLC = x_BNLC + out_of_attention(attended)
        normed = layer_norm(self.dtype, affine, name="norm_mlp")(x_BNLC)
        if self.time_in == "mlp":
            normed = normed + from_time(channels, "time_mlp")
        hidden = Dense(self.mlp_ratio * channels, self.dtype, axes=(FSDP, TENSOR), name="mlp_in")(
            into_mlp(normed)
        )
        hidden = gelu(checkpoint_name(hidden, "mlp_in"), self.remat == "none")
        hidden = Dense(channels, self.dtype, axes=(TENSOR, FSDP), name="mlp_out")(hidden)
        if dropout_key_B is not None and self.dropout:
            hidden = dropped(hidden, dropout_key_B, self.dropout)
        return x_BNLC + out_of_mlp(hidden)


def _unchanged(x: jax.Array) -> jax.Array:
    return x


def _modulations(numbers: jax.Array) -> tuple[Callable, Callable]:
    """Return what a branch of a DiT block does to its input and output; numbers: (B, …, 3C)."""
    shift, scale, gate = jnp.split(numbers, 3, axis=-1)
    return lambda x: x * (1 + scale) + shift, lambda x: x * gate


def with_extra_tokens(x_BNLC: jax.Array, extra_tokens_BEC: jax.Array) -> jax.Array:
    """Put E tokens outside the grid behind those of every window: (B, N, L + E, C)."""
    batch, windows, _, channels = x_BNLC.shape
    shape = (batch, windows, extra_tokens_BEC.shape[1], channels)
    copies = jnp.broadcast_to(extra_tokens_BEC[:, None], shape).astype(x_BNLC.dtype)
    return jnp.concatenate([x_BNLC, copies], axis=2)


class DiffiTResBlock(nn.Module):
    """Eq. 9-10: `x̂ = Conv3×3(Swish(GN(x)))`, then `DiffiTBlock(x̂, x_t) + x`, on an image.

    Attributes:
      num_heads, window, mlp_ratio, dtype, dropout, attention, remat, time_in, qk_norm: as in
        `DiffiTBlock`.
      conv: whether Eq. 9 has its convolution; else x̂ = Swish(GN(x)).
    """

    num_heads: int
    window: int
    mlp_ratio: int = 4
    dtype: jnp.dtype = jnp.float32
    dropout: float = 0.0
    attention: str = "xla"
    remat: str = "none"
    time_in: str = "tmsa"
    conv: bool = True
    qk_norm: bool = False

    @nn.compact
    def __call__(
        self,
        x: jax.Array | tuple[jax.Array, jax.Array],
        time_BT: jax.Array,
        dropout_key_B: jax.Array | None = None,
    ) -> jax.Array | tuple[jax.Array, jax.Array]:
        """Map an image (B, H, W, C) and the time token (B, T) to (B, H, W, C), Eq. 9-10.

        H and W are multiples of `window`. A pair of an image and tokens outside the grid, (B, N, E,
        C) for N windows, becomes such a pair. Dropout acts only if `dropout_key_B`, (B,) keys, are
        given.
        """
        x_BHWC, extra_BNEC = x if isinstance(x, tuple) else (x, None)
        _, height, width, channels = x_BHWC.shape
        tile = (self.window, self.window)
        width_of_head = channels // self.num_heads
        asked = self.attention, platform(), self.window, width_of_head, self.dtype
        chosen = choose_backend(*asked, obstacle=xla_only(self.attention, self.time_in))[0]
        dense = platforms.of(platform()).dense_tiles and chosen == "xla"
        dense = dense and not keeps_weights(self)
        if dense and extra_BNEC is None:  # such a token belongs to one window
            tile = dense_tile(height, width, self.window)
        hidden = nn.swish(group_norm(channels, self.dtype, name="norm")(x_BHWC))
        if self.conv:
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
            time_in=self.time_in,
            extra_tokens=0 if extra_BNEC is None else extra_BNEC.shape[2],
            qk_norm=self.qk_norm,
            name="transformer",
        )
        tokens = partition(hidden, tile)
        if extra_BNEC is None:
            tokens = block(tokens, time_BT, dropout_key_B)
            return x_BHWC + merge(tokens, height, width, tile)
        both = jnp.concatenate([tokens, extra_BNEC.astype(self.dtype)], axis=2)
        both = block(both, time_BT, dropout_key_B)
        tokens, extra = jnp.split(both, [tokens.shape[2]], axis=2)
        return x_BHWC + merge(tokens, height, width, tile), extra.astype(extra_BNEC.dtype)


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
    # Results of matrix products with weights are kept (in a `SongUNet`, of convolutions), and of
    # attention where a kernel computes it.
    "dots": jax.checkpoint_policies.save_only_these_names(
        "qkv", "attention", "attention_out", "mlp_in", "conv"
    ),
    "full": jax.checkpoint_policies.nothing_saveable,  # only the block's input is kept
}


def repeat_block(
    block: nn.Module,
    x: Any,
    time_BT: Time,
    num_blocks: int,
    *,
    unroll: int = 1,
    remat: str = "none",
    dropout_key_B: jax.Array | None = None,
    captures: Iterable[int] = (),
) -> tuple[Any, dict[int, Any]]:
    """Apply `num_blocks` copies of a block one after the other, as one scanned layer.

    Args:
      block: module that maps (x, time_BT, dropout_key_B) to what is like x. Its parameters get a
        leading axis of `num_blocks`.
      x: input of the first copy, (B, …) or a pair of such.
      time_BT: (B, T) time token, the same for every copy, or (num_blocks, B, T), one for each; or
        two times.
      num_blocks: how many copies.
      unroll: copies per iteration of the scan. 1 keeps the compiled program small; `num_blocks`
        shows the compiler all of them at once, which is faster for a small network on a CPU.
      remat: a name in `REMAT_POLICIES`.
      dropout_key_B: (B,) keys, from which each copy gets its own; None: no dropout.
      captures: numbers of copies whose outputs are returned too.

    Returns:
      The output of the last copy, shaped like x, and those of the copies captured, by number.
    """

    def run(block: nn.Module, x: Any, time_BT: Time, key_B: jax.Array | None) -> Any:
        return jax.tree.map(placed, block(jax.tree.map(placed, x), time_BT, key_B))

    if remat != "none":
        # In a loop of its own a block's forward and backward pass cannot be merged by XLA; unrolled
        # they could.
        run = nn.remat(run, policy=REMAT_POLICIES[remat], prevent_cse=unroll > 1)

    times_of_blocks = time_BT if isinstance(time_BT, jax.Array) and time_BT.ndim == 3 else None
    time_axis = nn.broadcast if times_of_blocks is None else 0
    keys_NB = None
    if dropout_key_B is not None:
        keys_NB = jax.vmap(
            lambda number: jax.vmap(lambda key: jax.random.fold_in(key, number))(dropout_key_B)
        )(jnp.arange(num_blocks))

    def scanned(x: Any, copies: slice) -> Any:
        scan: Any = nn.scan(
            lambda block, x, time_BT, key_B: (run(block, x, time_BT, key_B), None),
            variable_axes={"params": 0, "intermediates": 0, "statistics": 0},
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
            times = time_BT if times_of_blocks is None else times_of_blocks[copies]
            keys = None if keys_NB is None else keys_NB[copies]
        return scan(block, x, times, keys)[0]

    numbers = sorted(set(captures))
    if not numbers or block.is_initializing():  # which makes the whole stack, of these shapes
        x = scanned(x, _ALL)
        return x, dict.fromkeys(numbers, x)
    # Cut in two there, a step of XL/2 on a TPU takes 1.4 % longer by estimate; to carry the tokens
    # through the whole scan, 2.9 %.
    kept, start = {}, 0
    for number in numbers:
        x = kept[number] = scanned(x, slice(start, number + 1))
        start = number + 1
    return (scanned(x, slice(start, num_blocks)) if start < num_blocks else x), kept


_ALL = slice(None)


def check_capture(capture: int | None, num_blocks: int) -> None:
    """Raise `UserError` unless a block has this number."""
    if capture is not None and not 0 <= capture < num_blocks:
        raise UserError(
            f"there is no block {capture} to capture: the blocks are 0 to {num_blocks - 1}"
        )
