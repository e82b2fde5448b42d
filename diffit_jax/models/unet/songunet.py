"""SongUNet: DDPM++ and NCSN++ (Song et al. 2021), in the form of EDM (Karras et al. 2022).

The paper puts TMSA in the place of their attention (Table 5), a switch here. Names of parameters
are those of EDM's modules, with `_` for `.`, so that `interop.songunet` reads its files.

Shape suffixes: B batch, H height, W width, C channels, E width of the conditioning vector.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from diffit_jax.errors import UserError
from diffit_jax.limits import Count, CountOrZero, Side, Width, at_least, one_of
from diffit_jax.models.diffit.attention import TMSA
from diffit_jax.models.diffit.backends import choose_backend
from diffit_jax.models.diffit.blocks import (
    REMAT_POLICIES,
    check_capture,
    conv3x3,
    dropped,
    group_norm,
)
from diffit_jax.models.diffit.conditioning import fixed_frequencies
from diffit_jax.models.model import Model
from diffit_jax.models.placement import FSDP, Dense, at_least_float32, param, placed

# What the two families differ in: embedding of the noise level, its width in multiples of
# `channels`, whether the image enters again at each level of the encoder, taps of the resampling
# filter along an axis.
FAMILIES = {
    "ddpmpp": ("positional", 1, False, (1, 1)),
    "ncsnpp": ("fourier", 2, True, (1, 3, 3, 1)),
}
HALF = 0.5**0.5  # the sum of two branches is scaled by it, so that its variance stays theirs


def _variance(gain: float) -> Any:
    return nn.initializers.variance_scaling(gain**2, "fan_avg", "uniform")


def downsample(x: jax.Array, taps: Sequence[int], axes: Sequence[int]) -> jax.Array:
    """Filter and keep every second pixel along axes, n → (n - len(taps)) / 2 + 1: no padding.

    Args:
      x: (…, n, …), even along `axes`.
      taps: 2 or 4 weights, of which the shares are taken.
      axes: of x.
    """
    for axis in axes:
        length = (x.shape[axis] - len(taps)) // 2 + 1
        pairs = jnp.moveaxis(x, axis, 0).reshape(-1, 2, *np.delete(x.shape, axis))
        pairs = sum(
            pairs[tap // 2 : tap // 2 + length, tap % 2] * (weight / sum(taps))
            for tap, weight in enumerate(taps)
        )
        x = jnp.moveaxis(pairs, 0, axis)
    return x


def upsample(x: jax.Array, taps: Sequence[int], axes: Sequence[int]) -> jax.Array:
    """Double the pixels along axes, (…, n, …) to (…, 2n, …), by a filter that sums to 2.

    With (1, 1) that repeats a pixel; with (1, 3, 3, 1) it is ¾ of the nearest and ¼ of the next,
    zeros outside.
    """
    for axis in axes:
        before, after = _shifted(x, axis)
        share = 2 * taps[0] / sum(taps) if len(taps) == 4 else 0.0
        even, odd = ((1 - share) * x + share * other for other in (before, after))
        shape = list(x.shape)
        shape[axis] *= 2
        x = jnp.stack([even, odd], axis=axis + 1).reshape(shape)
    return x


def _shifted(x: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """Return x[i - 1] and x[i + 1] along an axis, zeros outside."""
    edge = [(0, 0)] * x.ndim
    edge[axis] = (1, 1)
    padded, length = jnp.pad(x, edge), x.shape[axis]
    before = jax.lax.slice_in_dim(padded, 0, length, axis=axis)
    return before, jax.lax.slice_in_dim(padded, 2, length + 2, axis=axis)


_SPACE = (1, 2)  # axes of an image (B, H, W, C)


class _Block(nn.Module):
    """A residual block, perhaps with attention behind it.

    Attributes:
      channels: of the output.
      taps: of the resampling filter.
      resample: "", "down" or "up".
      attention: "" or "plain", or "tmsa": with a position bias, and the vector e in q and v.
      dropout, dtype: as in `Model`.
      backend: of attention.
    """

    channels: int
    taps: tuple[int, ...]
    resample: str = ""
    attention: str = ""
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32
    backend: str = "xla"

    @nn.compact
    def __call__(
        self, x_BHWC: jax.Array, e_BE: jax.Array, dropout_key_B: jax.Array | None
    ) -> jax.Array:
        """Map (B, H, W, C) and the conditioning (B, E) to (B, H', W', channels)."""
        width_in = x_BHWC.shape[-1]
        x_BHWC = x_BHWC.astype(self.dtype)
        hidden = self._resampled(nn.silu(group_norm(width_in, self.dtype, name="norm0")(x_BHWC)))
        hidden = self._conv(hidden, "conv0")
        hidden = hidden + Dense(self.channels, self.dtype, name="affine")(e_BE)[:, None, None]
        hidden = nn.silu(group_norm(self.channels, self.dtype, name="norm1")(hidden))
        if dropout_key_B is not None and self.dropout:
            hidden = dropped(hidden, dropout_key_B, self.dropout)
        hidden = self._conv(hidden, "conv1", gain=1e-5)
        skip = x_BHWC
        if self.resample or width_in != self.channels:
            skip = Dense(self.channels, self.dtype, name="skip")(self._resampled(x_BHWC))
        x_BHWC = HALF * (hidden + skip)
        if not self.attention:
            return x_BHWC
        batch, height, width, channels = x_BHWC.shape
        normed = group_norm(channels, self.dtype, name="norm2")(x_BHWC)
        is_tmsa = self.attention == "tmsa"
        attend = TMSA(
            num_heads=1,
            window=height,
            dtype=self.dtype,
            backend=self.backend,
            time_in="tmsa" if is_tmsa else "",
            position_bias=is_tmsa,
            gains=(0.2**0.5, 1e-5),
            name="attention",
        )
        attended = attend(normed.reshape(batch, 1, height * width, channels), e_BE)
        attended = checkpoint_name(attended, "attention_out")
        return HALF * (x_BHWC + attended.reshape(x_BHWC.shape))

    def _conv(self, x: jax.Array, name: str, gain: float = 1.0) -> jax.Array:
        conv = conv3x3(self.channels, self.dtype, name=name, kernel_init=_variance(gain))
        return checkpoint_name(conv(x), "conv")

    def _resampled(self, x: jax.Array) -> jax.Array:
        if self.resample == "up":
            return upsample(x, self.taps, _SPACE)
        if self.resample == "down":
            border = (len(self.taps) - 1) // 2
            edge = ((0, 0), (border, border), (border, border), (0, 0))
            return downsample(jnp.pad(x, edge), self.taps, _SPACE)
        return x


class SongUNet(Model):
    """DDPM++ or NCSN++, unconditional or class-conditional.

    Attributes:
      image_size: side of the square image in pixels; every level after the first halves it.
      image_channels: channels of the image and of the output.
      channels: channels C of the first convolution.
      channel_mults: channels of each level, in multiples of C.
      embedding_mult: width E of the conditioning vector, in multiples of C.
      num_blocks: blocks of a level of the encoder; the decoder has one more.
      attention_sizes: resolutions in pixels whose blocks have attention.
      family: "ddpmpp" or "ncsnpp", see `FAMILIES`.
      tmsa: which attention is TMSA, on the whole grid with one head: "none" (theirs), "listed" (at
        `attention_sizes`) or "all" (that of the lowest level too; Table 5).
      augment_labels: how many numbers tell the network what was done to an image in training.
    """

    image_size: Side
    image_channels: Count = 3
    channels: Width = 128
    channel_mults: Annotated[Sequence[Count], at_least(1)] = (2, 2, 2)
    embedding_mult: Count = 4
    num_blocks: Count = 4
    attention_sizes: Sequence[Count] = (16,)
    family: Annotated[str, one_of(*FAMILIES)] = "ddpmpp"
    tmsa: Annotated[str, one_of("none", "listed", "all")] = "none"
    augment_labels: CountOrZero = 0

    def __post_init__(self) -> None:
        for name in ("channel_mults", "attention_sizes"):  # jit remembers a network by them
            if isinstance(value := getattr(self, name), list):
                setattr(self, name, tuple(value))
        super().__post_init__()

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of one image."""
        return self.image_size, self.image_size, self.image_channels

    @property
    def sides(self) -> tuple[int, ...]:
        """Pixels along a side of each level."""
        return tuple(self.image_size >> level for level in range(len(self.channel_mults)))

    @property
    def heads(self) -> tuple[int | None, int | None]:
        """(attention heads, their width, None where levels differ in it)."""
        return 1, None

    def attention_backend(self, platform: str) -> tuple[str, str]:
        """Choose the backend at the largest of `attention_sizes`, see `Model.attention_backend`."""
        listed = [side for side in self.sides if side in self.attention_sizes]
        side = max(listed, default=self.sides[-1])
        width = self.channels * self.channel_mults[self.sides.index(side)]
        return choose_backend(self.attention, platform, side, width, self.dtype)

    def check_sizes(self) -> None:
        """Raise `UserError` if the sizes do not fit together."""
        factor = 2 ** (len(self.channel_mults) - 1)
        if self.image_size % factor:
            raise UserError(
                f"image_size {self.image_size} is not divisible by {factor}, which "
                f"{len(self.channel_mults)} levels need: change image_size or channel_mults"
            )
        if self.channels % 8:
            raise UserError(f"channels {self.channels} are not a multiple of 8: change channels")
        for width in (self.channels, *(self.channels * each for each in self.channel_mults)):
            if width % min(32, width // 4):
                raise UserError(
                    f"{width} channels do not divide into {min(32, width // 4)} groups of a "
                    "normalisation: change channels or channel_mults"
                )
        for side in self.attention_sizes:
            if side not in self.sides:
                raise UserError(
                    f"attention_sizes has {side}, but the levels are "
                    f"{', '.join(map(str, self.sides))} pixels wide: name one of these"
                )

    @nn.compact
    def __call__(
        self,
        x_BHWC: jax.Array,
        noise_level_B: jax.Array,
        conditioning: Mapping[str, jax.Array],
        capture: int | None = None,
    ) -> jax.Array | tuple[jax.Array, jax.Array]:
        """Evaluate the network.

        Args:
          x_BHWC: (B, image_size, image_size, image_channels) noisy images, scaled by the diffusion
            process.
          noise_level_B: (B,) `c_noise` of the process, used as it is.
          conditioning: `label`: (B,) int in [0, num_classes], the last one meaning "no label", as
            does an absent key. `augment`: (B, augment_labels) float32, 0 where nothing was done, as
            is an absent key. `dropout_key`: (B,) keys, in training.
          capture: number of a block of the encoder, from 0, whose output is wanted too.

        Returns:
          Array like x_BHWC, float32; with `capture` also (B, H, W, C) of the block's level.
        """
        self.check_sizes()
        check_capture(capture, self.num_blocks * len(self.sides))
        _, _, residual, taps = FAMILIES[self.family]
        e_BE = self._condition(noise_level_B, conditioning)
        dropout_key_B = conditioning.get("dropout_key") if self.dropout else None
        block_class: Any = _Block
        if self.remat != "none":
            block_class = nn.remat(_Block, policy=REMAT_POLICIES[self.remat])
        count = 0

        def run(x: jax.Array, name: str, level: int, resample: str = "", attends: bool = False):
            nonlocal count
            key_B, number = dropout_key_B, count
            if key_B is not None:  # each block its own
                key_B = jax.vmap(lambda key: jax.random.fold_in(key, number))(key_B)
            count += 1
            mult = self.channel_mults[level - (resample == "down") + (resample == "up")]
            listed = self.sides[level] in self.attention_sizes
            has_tmsa = self.tmsa == "all" or (self.tmsa == "listed" and listed)
            block = block_class(
                self.channels * mult,
                taps,
                resample,
                ("tmsa" if has_tmsa else "plain") if attends else "",
                self.dropout,
                self.dtype,
                self.attention,
                name=name,
            )
            return placed(block(placed(x), e_BE, key_B))

        # Down, with every result kept.
        x_BHWC = x_BHWC.astype(self.dtype)
        image, captured, number, skips = x_BHWC, None, 0, []
        for level, side in enumerate(self.sides):
            at = f"enc_{side}x{side}"
            if level:
                x = run(skips[-1], f"{at}_down", level, resample="down")
                if residual:
                    x = image = HALF * (x + self._reduced(image, x.shape[-1], taps, at))
            else:
                x = conv3x3(self.channels, self.dtype, name=f"{at}_conv")(image)
            skips.append(x)
            for index in range(self.num_blocks):
                x = run(x, f"{at}_block{index}", level, attends=side in self.attention_sizes)
                skips.append(x)
                captured = x if number == capture else captured
                number += 1
        # And up: the lowest level attends whatever is listed; elsewhere the last block may.
        x = skips[-1]
        for level in reversed(range(len(self.sides))):
            side = self.sides[level]
            at = f"dec_{side}x{side}"
            if level == len(self.sides) - 1:
                x = run(x, f"{at}_in0", level, attends=True)
                x = run(x, f"{at}_in1", level)
            else:
                x = run(x, f"{at}_up", level, resample="up")
            for index in range(self.num_blocks + 1):
                x = jnp.concatenate([x, skips.pop()], axis=-1)
                attends = index == self.num_blocks and side in self.attention_sizes
                x = run(x, f"{at}_block{index}", level, attends=attends)
        exact = at_least_float32(self.dtype)
        at = f"dec_{self.image_size}x{self.image_size}"
        x = nn.silu(group_norm(x.shape[-1], self.dtype, name=f"{at}_aux_norm")(x)).astype(exact)
        out = conv3x3(self.image_channels, exact, f"{at}_aux_conv", kernel_init=_variance(1e-5))
        y_BHWC = out(x)
        return y_BHWC if captured is None else (y_BHWC, captured)

    def _condition(
        self, noise_level_B: jax.Array, conditioning: Mapping[str, jax.Array]
    ) -> jax.Array:
        """Compute the vector e that every block gets, (B, E) in float32 at least."""
        embedding, mult, _, _ = FAMILIES[self.family]
        half = self.channels * mult // 2
        exact = at_least_float32(self.dtype)
        if embedding == "fourier":
            frequencies = 2 * np.pi * fixed_frequencies(self, half).astype(exact)
        else:
            frequencies = jnp.asarray(10_000.0 ** (-np.arange(half) / (half - 1)))
        angles = noise_level_B.astype(exact)[:, None] * frequencies
        v = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
        label_B = conditioning.get("label")
        if self.num_classes:
            # "No label" is a row of zeros.
            label_B = jnp.full(len(v), self.num_classes) if label_B is None else label_B
            y = jax.nn.one_hot(label_B, self.num_classes)
            v = v + Dense(2 * half, exact, name="map_label")(self.num_classes**0.5 * y)
        if self.augment_labels:
            shape = (self.augment_labels, 2 * half)
            kernel = param(self, "map_augment", _variance(1.0), shape, (None, FSDP))
            if (augment_BA := conditioning.get("augment")) is not None:
                v = v + augment_BA.astype(exact) @ kernel.ready(exact)
        width = self.channels * self.embedding_mult
        for name in ("map_layer0", "map_layer1"):
            v = nn.silu(Dense(width, exact, name=name)(v))
        return v

    def _reduced(self, image: jax.Array, channels: int, taps: tuple, at: str) -> jax.Array:
        """Convolve the image of the level above, beyond its border too, then halve it."""
        border = (len(taps) - 1) // 2
        edge = ((0, 0), (border, border), (border, border), (0, 0))
        conv = conv3x3(channels, self.dtype, name=f"{at}_aux_residual", kernel_init=_variance(1.0))
        # The filter's sum is 1, so that the bias may come before it.
        return downsample(conv(jnp.pad(image, edge)), taps, _SPACE)
