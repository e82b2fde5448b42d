"""DINOv2 (Oquab et al. 2023): the vision transformer whose tokens REPA aligns with, and FD-DINOv2.

    picture → patches of 14 pixels, + positions → [class, registers, patches] → blocks → norm
    block:  x += γ₁ attention(norm x);  x += γ₂ mlp(norm x)

Positions are learned for 37×37 patches, and resampled for other grids. Published implementations
do that by three rules (`POSITIONS`), which are three networks wherever there are no registers.

Shape suffixes: B batch, H, W, C height, width and channels of a picture; T tokens, D width, N
attention heads, K width of a head; R registers, L patches.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffit_jax.models.pretrained.resizing import antialiased_matrix, interpolation_matrix

_EPSILON = 1e-6  # of every normalisation
_UNSET = nn.initializers.zeros_init()  # the weights are read
_KLUDGE = 0.1  # which the official code adds to the wanted size before it takes the ratio
# official: the released code's. antialiased: timm's, which REPA puts in its place. hub: that of
# `transformers`. With registers all do as timm does.
POSITIONS = ("official", "antialiased", "hub")


class EncodedPictures(NamedTuple):
    """Tokens behind the last normalisation, float32.

    Attributes:
      class_BD: the class token.
      registers_BRD: register tokens.
      patches_BLD: patch tokens, row by row.
      layers_NBTD: all tokens behind each block, *before* the last normalisation; None unless asked
        for.
    """

    class_BD: jax.Array
    registers_BRD: jax.Array
    patches_BLD: jax.Array
    layers_NBTD: jax.Array | None = None


class DINOv2(nn.Module):
    """The network from normalised pictures to tokens.

    Attributes:
      width: D, 384, 768, 1024 or 1536.
      depth: number of blocks.
      num_heads: attention heads; of the published ones each is 64 wide.
      hidden: width of the MLP; with `gated` of each of its two halves.
      gated: whether the MLP is SwiGLU (of the giant), else GELU.
      registers: how many register tokens there are.
      grid: patches on each side for which positions were learned.
      patch: side of a patch.
      positions: how they come to other grids, a name in `POSITIONS`.
      dtype: of the matrix products: float32, then with the highest precision, or bfloat16.
    """

    width: int
    depth: int
    num_heads: int
    hidden: int
    gated: bool = False
    registers: int = 0
    grid: int = 37
    patch: int = 14
    positions: str = "official"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BHWC: jax.Array, layers: bool = False) -> EncodedPictures:
        """Encode pictures (B, H, W, 3), normalised (`resizing.prepared`).

        Sides that are no multiples of `patch` are padded with zeros below and at the right, as timm
        does. `layers`: whether to return what every block returns.
        """
        batch, height, width, _ = x_BHWC.shape
        rows, columns = -(-height // self.patch), -(-width // self.patch)
        pad = ((0, 0), (0, rows * self.patch - height), (0, columns * self.patch - width), (0, 0))
        patches = jnp.pad(x_BHWC, pad).reshape(batch, rows, self.patch, columns, self.patch, 3)
        patches = patches.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * columns, -1)
        x_BLD = _linear(self.width, self.dtype, "patch_embed")(patches)

        def vectors(name: str, count: int) -> jax.Array:
            return self.param(name, _UNSET, (count, self.width))

        def for_all(vectors_TD: jax.Array) -> jax.Array:
            return jnp.broadcast_to(vectors_TD, (batch, *vectors_TD.shape))

        place_TD = self._resampled(vectors("pos_embed", 1 + self.grid**2), rows, columns)
        tokens = [for_all(vectors("class_token", 1) + place_TD[:1]), x_BLD + place_TD[1:]]
        if self.registers:
            tokens.insert(1, for_all(vectors("register_tokens", self.registers)))
        x_BTD = jnp.concatenate(tokens, axis=1)
        scan: Any = nn.scan(
            lambda block, x: (x := block(x), x if layers else None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.depth,
        )
        block = Block(self.num_heads, self.hidden, self.gated, self.dtype, name="blocks")
        x_BTD, of_layers = scan(block, x_BTD)
        x_BTD = _norm("norm")(x_BTD)
        ends = [1, 1 + self.registers]
        class_B1D, registers_BRD, patches_BLD = jnp.split(x_BTD, ends, axis=1)
        return EncodedPictures(class_B1D[:, 0], registers_BRD, patches_BLD, of_layers)

    def _resampled(self, place_TD: jax.Array, rows: int, columns: int) -> jax.Array:
        """Return positions of the class token and of a grid, (1 + rows · columns, D)."""
        if rows == columns == self.grid:
            return place_TD
        grid_HWD = place_TD[1:].reshape(self.grid, self.grid, -1)
        matrices = [self._matrix(count).astype(np.float32) for count in (rows, columns)]
        resampled = jnp.einsum(
            "YH,XW,HWD->YXD", *matrices, grid_HWD, precision=jax.lax.Precision.HIGHEST
        )
        return jnp.concatenate([place_TD[:1], resampled.reshape(rows * columns, -1)])

    def _matrix(self, count: int) -> np.ndarray:
        if self.registers or self.positions == "antialiased":
            return antialiased_matrix(self.grid, count)
        about = count + _KLUDGE if self.positions == "official" else count
        return interpolation_matrix(self.grid, count, scale=self.grid / about)


class Block(nn.Module):
    """Attention and an MLP, both scaled by learned vectors (LayerScale) and added.

    Attributes:
      num_heads, hidden, gated, dtype: as of `DINOv2`.
    """

    num_heads: int
    hidden: int
    gated: bool
    dtype: Any

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Map tokens (B, T, D) float32 to such."""
        width = x_BTD.shape[-1]

        def scale(name: str) -> jax.Array:
            return self.param(name, _UNSET, (width,))

        attended = self._attention(_norm("norm_attention")(x_BTD))
        x_BTD = x_BTD + scale("scale_attention") * attended
        hidden = _norm("norm_mlp")(x_BTD)
        if self.gated:
            hidden = _linear(2 * self.hidden, self.dtype, "mlp_in")(hidden)
            gate, value = jnp.split(hidden, 2, axis=-1)
            hidden = nn.silu(gate) * value
        else:
            hidden = _linear(self.hidden, self.dtype, "mlp_in")(hidden)
            hidden = nn.gelu(hidden, approximate=False)
        return x_BTD + scale("scale_mlp") * _linear(width, self.dtype, "mlp_out")(hidden)

    def _attention(self, x_BTD: jax.Array) -> jax.Array:
        batch, tokens, width = x_BTD.shape
        size = width // self.num_heads
        qkv = _linear(3 * width, self.dtype, "qkv")(x_BTD)
        q, k, v = jnp.moveaxis(qkv.reshape(batch, tokens, 3, self.num_heads, size), 2, 0)
        product = functools.partial(
            jnp.einsum, precision=_precision(self.dtype), preferred_element_type=jnp.float32
        )
        q, k, v = (each.astype(self.dtype) for each in (q, k, v))
        weights = jax.nn.softmax(product("BTNK,BSNK->BNTS", q, k) * size**-0.5)
        out = product("BNTS,BSNK->BTNK", weights.astype(self.dtype), v)
        return _linear(width, self.dtype, "project")(out.reshape(batch, tokens, width))


class _Linear(nn.Module):
    """A matrix product with a bias; float32 comes out."""

    features: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", _UNSET, (x.shape[-1], self.features))
        bias = self.param("bias", _UNSET, (self.features,))
        product = jnp.dot(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            precision=_precision(self.dtype),
            preferred_element_type=jnp.float32,
        )
        return product + bias


def _linear(features: int, dtype: Any, name: str) -> _Linear:
    return _Linear(features, dtype, name=name)


def _precision(dtype: Any) -> Any:
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None


def _norm(name: str) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=_EPSILON, use_fast_variance=False, name=name)


def _published(width: int, depth: int, registers: int) -> DINOv2:
    """Return a published network; the giant's MLP is gated."""
    gated = width == 1536
    hidden = 4096 if gated else 4 * width
    return DINOv2(width, depth, width // 64, hidden, gated, registers)


_SIZES = {"s": (384, 12), "b": (768, 12), "l": (1024, 24), "g": (1536, 40)}
# Published networks, and the small one that stands in for them on digits, see
# `interop.dinov2.DIGITS`.
ENCODERS: Mapping[str, DINOv2] = {
    **{f"dinov2_vit{name}14": _published(*size, 0) for name, size in _SIZES.items()},
    **{f"dinov2_vit{name}14_reg": _published(*size, 4) for name, size in _SIZES.items()},
    "digits": DINOv2(width=64, depth=2, num_heads=1, hidden=256, grid=8),
}
