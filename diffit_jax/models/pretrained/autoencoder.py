"""The autoencoder of the latent network: Stable Diffusion's "KL-f8" (Rombach et al. 2022).

    image → conv → stage 0 → down → … → stage S-1 → middle → norm, swish, conv → mean, log variance
    latent → conv → middle → stage S-1 → up → … → stage 0 → norm, swish, conv → image

It computes what diffusers' `AutoencoderKL` computes (Rombach et al., appendix G). Inside, arrays
are (H, W, B, C): batch and channels fill the tiles of a TPU's memory, 8 × 128, whatever the size of
the image, and pointwise operations fuse into the convolutions around them (launch/PERFORMANCE.md
has figures).

Shape suffixes: B batch, H, W, C height, width and channels; h, w, c of a latent; L, K pixels as
tokens; G groups of channels.
"""

import math
from collections.abc import Sequence
from typing import Annotated

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from diffit_jax import limits, platforms
from diffit_jax.errors import UserError
from diffit_jax.limits import Count, Dtype, Width, at_least
from diffit_jax.models.placement import Dense

LOG_VARIANCES = (-30.0, 20.0)  # to which the encoder's are clipped (Rombach et al.'s code)
_EPSILON = 1e-6  # of every normalisation


class Conv(nn.Module):
    """A 3×3 convolution.

    Attributes:
      channels: of the output.
      dtype: of the product.
      stride: in both directions.
      padding: (before, after) in pixels, in both directions.
    """

    channels: int
    dtype: jnp.dtype = jnp.float32
    stride: int = 1
    padding: tuple[int, int] = (1, 1)

    @nn.compact
    def __call__(self, x_HWBC: jax.Array) -> jax.Array:
        """Map (H, W, B, C) to (H', W', B, channels)."""
        shape = (3, 3, x_HWBC.shape[-1], self.channels)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        bias = self.param("bias", nn.initializers.zeros_init(), (self.channels,))
        y_HWBC = jax.lax.conv_general_dilated(
            _batch_in_tiles(x_HWBC.astype(self.dtype)),
            kernel.astype(self.dtype),
            (self.stride, self.stride),
            (self.padding, self.padding),
            dimension_numbers=("HWNC", "HWIO", "HWNC"),
        )
        return y_HWBC + bias.astype(self.dtype)


class GroupNorm(nn.Module):
    """Group normalisation over the pixels and the channels of a group, statistics in float32.

    They are sums over the pixels of each channel first. Grouping the channels of the whole image,
    four to a group, would leave 124 of a TPU's 128 lanes empty.

    Attributes:
      num_groups: groups of neighbouring channels.
      dtype: of the output.
    """

    num_groups: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x_HWBC: jax.Array) -> jax.Array:
        """Normalise (H, W, B, C) over groups of channels and all pixels."""
        height, width, batch, channels = x_HWBC.shape
        scale_C = self.param("scale", nn.initializers.ones_init(), (channels,))
        bias_C = self.param("bias", nn.initializers.zeros_init(), (channels,))
        x = x_HWBC.astype(jnp.float32)

        def of_groups(sums_BC: jax.Array) -> jax.Array:
            """Turn sums over pixels into means over groups, for each channel (B, C)."""
            members = channels // self.num_groups
            means_BG = sums_BC.reshape(batch, self.num_groups, members).sum(-1)
            return jnp.repeat(means_BG / (height * width * members), members, axis=1)

        mean_BC = of_groups(x.sum((0, 1)))
        variance_BC = jnp.maximum(of_groups((x * x).sum((0, 1))) - mean_BC**2, 0)
        factor_BC = scale_C * jax.lax.rsqrt(variance_BC + _EPSILON)
        return (x * factor_BC + (bias_C - mean_BC * factor_BC)).astype(self.dtype)


class ResBlock(nn.Module):
    """Residual block `x + conv(swish(norm(conv(swish(norm(x))))))`.

    The first x goes through a 1×1 convolution where the number of channels changes.

    Attributes:
      channels: of the output.
      num_groups: of the normalisations.
      dtype: of the convolutions.
    """

    channels: int
    num_groups: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x_HWBC: jax.Array) -> jax.Array:
        """Map (H, W, B, C) to (H, W, B, channels)."""
        hidden = x_HWBC
        for number in (1, 2):
            norm = GroupNorm(self.num_groups, self.dtype, name=f"norm_{number}")
            conv = Conv(self.channels, self.dtype, name=f"conv_{number}")
            hidden = conv(nn.swish(norm(hidden)))
        if x_HWBC.shape[-1] != self.channels:
            x_HWBC = Dense(self.channels, self.dtype, name="shortcut")(x_HWBC)
        return x_HWBC + hidden


class PixelAttention(nn.Module):
    """Self-attention of one head over all pixels: `x + out(softmax(q kᵀ / √C) v)` of `norm(x)`.

    Attributes:
      num_groups, dtype: as in `ResBlock`; the softmax is in float32.
    """

    num_groups: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x_HWBC: jax.Array) -> jax.Array:
        """Attend from every pixel to all: (H, W, B, C) to the same shape."""
        height, width, batch, channels = x_HWBC.shape
        normed = GroupNorm(self.num_groups, self.dtype, name="norm")(x_HWBC)
        tokens_LBC = normed.reshape(height * width, batch, channels)
        q, k, v = (Dense(channels, self.dtype, name=name)(tokens_LBC) for name in "qkv")
        logits = jnp.einsum("LBC,KBC->BLK", q, k, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(logits / math.sqrt(channels)).astype(self.dtype)
        mixed_LBC = jnp.einsum("BLK,KBC->LBC", weights, v)
        return x_HWBC + Dense(channels, self.dtype, name="out")(mixed_LBC).reshape(x_HWBC.shape)


class _Down(nn.Module):
    """3×3 convolution of stride 2, padded by a pixel at the right and at the bottom only."""

    channels: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_HWBC: jax.Array) -> jax.Array:
        return Conv(self.channels, self.dtype, stride=2, padding=(0, 1), name="conv")(x_HWBC)


class _Up(nn.Module):
    """Doubles both sides, each pixel a 2×2 square, and a 3×3 convolution behind that."""

    channels: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_HWBC: jax.Array) -> jax.Array:
        height, width, batch, channels = x_HWBC.shape
        squares = jnp.broadcast_to(x_HWBC[:, None, :, None], (height, 2, width, 2, batch, channels))
        x_HWBC = squares.reshape(2 * height, 2 * width, batch, channels)
        return Conv(self.channels, self.dtype, name="conv")(x_HWBC)


class MidBlock(nn.Module):
    """Residual block, attention, residual block, at the lowest resolution.

    Attributes:
      attention: whether there is attention between the blocks.
      num_groups, dtype: as in `ResBlock`.
    """

    attention: bool
    num_groups: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x_HWBC: jax.Array) -> jax.Array:
        """Map (H, W, B, C) to the same shape."""
        channels = x_HWBC.shape[-1]
        x = ResBlock(channels, self.num_groups, self.dtype, name="block_0")(x_HWBC)
        if self.attention:
            x = PixelAttention(self.num_groups, self.dtype, name="attention")(x)
        return ResBlock(channels, self.num_groups, self.dtype, name="block_1")(x)


class Encoder(nn.Module):
    """Images to moments of latents.

    Attributes:
      channels, num_blocks, num_groups, attention, dtype: as in `Autoencoder`.
      outputs: channels of the moments.
      pointwise: whether a 1×1 convolution follows (`quant_conv`).
    """

    channels: Sequence[int]
    num_blocks: int
    num_groups: int
    attention: bool
    dtype: jnp.dtype
    outputs: int
    pointwise: bool

    @nn.compact
    def __call__(self, x_HWBC: jax.Array) -> jax.Array:
        """Map (H, W, B, C) to (h, w, B, outputs), float32."""
        x = Conv(self.channels[0], self.dtype, name="conv_in")(x_HWBC)
        for stage, channels in enumerate(self.channels):
            if stage:
                x = _Down(self.channels[stage - 1], self.dtype, name=f"down_{stage}")(x)
            for number in range(self.num_blocks):
                name = f"stage_{stage}_block_{number}"
                x = ResBlock(channels, self.num_groups, self.dtype, name=name)(x)
        x = MidBlock(self.attention, self.num_groups, self.dtype, name="middle")(x)
        x = nn.swish(GroupNorm(self.num_groups, self.dtype, name="norm_out")(x))
        x = Conv(self.outputs, self.dtype, name="conv_out")(x).astype(jnp.float32)
        return Dense(self.outputs, name="quant")(x) if self.pointwise else x


class Decoder(nn.Module):
    """Latents to images; stages are numbered as in the encoder, the last one first.

    Attributes:
      channels, num_blocks, num_groups, attention, dtype: as in `Autoencoder`.
      outputs: channels of the images.
      pointwise: whether a 1×1 convolution comes first (`post_quant_conv`).
    """

    channels: Sequence[int]
    num_blocks: int
    num_groups: int
    attention: bool
    dtype: jnp.dtype
    outputs: int
    pointwise: bool

    @nn.compact
    def __call__(self, x_HWBC: jax.Array) -> jax.Array:
        """Map (h, w, B, C) to (H, W, B, outputs), float32."""
        x = x_HWBC
        if self.pointwise:
            x = Dense(x.shape[-1], name="quant")(x)
        x = Conv(self.channels[-1], self.dtype, name="conv_in")(x)
        x = MidBlock(self.attention, self.num_groups, self.dtype, name="middle")(x)
        for stage, channels in reversed(list(enumerate(self.channels))):
            for number in range(self.num_blocks + 1):
                name = f"stage_{stage}_block_{number}"
                x = ResBlock(channels, self.num_groups, self.dtype, name=name)(x)
            if stage:
                x = _Up(channels, self.dtype, name=f"up_{stage}")(x)
        x = nn.swish(GroupNorm(self.num_groups, self.dtype, name="norm_out")(x))
        return Conv(self.outputs, self.dtype, name="conv_out")(x).astype(jnp.float32)


class Autoencoder(nn.Module):
    """Encoder and decoder, and what scales latents to about unit variance.

    Attributes:
      channels: of each stage; every stage after the first halves the image's side.
      num_blocks: residual blocks of a stage of the encoder; one of the decoder has one more.
      latent_channels, image_channels: of latents and images.
      num_groups: of the normalisations.
      attention: whether the middle has attention.
      quant_conv, post_quant_conv: whether there is a 1×1 convolution behind the encoder, and before
        the decoder.
      latent_mean: of each channel of latents, or one number for all.
      latent_scale: likewise; the latent network sees `(z - latent_mean) * latent_scale`.
      dtype: of the convolutions; parameters are float32.
    """

    channels: Annotated[Sequence[Width], at_least(1)] = (128, 256, 512, 512)
    num_blocks: Count = 2
    latent_channels: Count = 4
    image_channels: Count = 3
    num_groups: Count = 32
    attention: bool = True
    quant_conv: bool = True
    post_quant_conv: bool = True
    latent_mean: tuple[float, ...] = (0.0,)
    latent_scale: tuple[float, ...] = (0.18215,)
    dtype: Dtype = jnp.float32

    @property
    def factor(self) -> int:
        """Side of an image in sides of its latent."""
        return 2 ** (len(self.channels) - 1)

    def check(self) -> None:
        """Raise `UserError` if the sizes do not fit together."""
        limits.check(self, "autoencoder")
        for channels in self.channels:
            if channels % self.num_groups:
                raise UserError(
                    f"the autoencoder's channels {channels} are not a multiple of its "
                    f"{self.num_groups} groups"
                )

    def setup(self) -> None:
        """Make the two pyramids and the 1×1 convolutions between them."""
        sizes = (self.channels, self.num_blocks, self.num_groups, self.attention, self.dtype)
        moments = 2 * self.latent_channels
        self.encoder = Encoder(*sizes, moments, pointwise=self.quant_conv)
        self.decoder = Decoder(*sizes, self.image_channels, pointwise=self.post_quant_conv)

    def encode(self, image_BHWC: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Compute the Gaussian of an image's latent.

        Args:
          image_BHWC: (B, H, W, image_channels) float32 in [-1, 1], H and W multiples of `factor`.

        Returns:
          Mean and log variance, (B, h, w, latent_channels) float32, unscaled.
        """
        moments = _batch_first(self.encoder(_batch_third(image_BHWC)))
        mean, log_variance = jnp.split(moments, 2, axis=-1)
        return mean, jnp.clip(log_variance, *LOG_VARIANCES)

    def decode(self, z_Bhwc: jax.Array) -> jax.Array:
        """Decode unscaled latents (B, h, w, latent_channels) to images.

        Returns:
          (B, H, W, image_channels) float32, about [-1, 1].
        """
        return _batch_first(self.decoder(_batch_third(z_Bhwc)))

    def __call__(self, image_BHWC: jax.Array) -> jax.Array:
        """Encode images (B, H, W, image_channels) to the mean and decode it; for initialisation."""
        return self.decode(self.encode(image_BHWC)[0])

    def scaled(self, z_Bhwc: jax.Array) -> jax.Array:
        """Scale latents (B, h, w, latent_channels) of the encoder for the latent network."""
        return (z_Bhwc - jnp.asarray(self.latent_mean)) * jnp.asarray(self.latent_scale)

    def unscaled(self, x_Bhwc: jax.Array) -> jax.Array:
        """Invert `scaled`, for latents (B, h, w, latent_channels)."""
        return x_Bhwc / jnp.asarray(self.latent_scale) + jnp.asarray(self.latent_mean)


def _batch_in_tiles(x_HWBC: jax.Array) -> jax.Array:
    """Keep batch and channels as the last two axes, which a TPU stores in tiles.

    Left alone, the compiler puts rows of pixels there for the sake of the first and the last
    convolution, of three channels, and copies everything on the way.
    """
    layout = Layout(major_to_minor=(0, 1, 2, 3))
    return platforms.where(
        "tiles_last_axes", lambda x: (with_layout_constraint(x, layout),), x_HWBC
    )[0]


def _batch_third(x_BHWC: jax.Array) -> jax.Array:
    return jnp.moveaxis(x_BHWC, 0, 2)


def _batch_first(x_HWBC: jax.Array) -> jax.Array:
    return jnp.moveaxis(x_HWBC, 2, 0)
