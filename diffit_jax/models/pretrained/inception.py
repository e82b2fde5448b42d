"""The Inception network of FID: TensorFlow's graph of 2015-12-05, as ADM's evaluator runs it.

Against the well-known Inception v3 (Szegedy et al. 2016): the average pools of branches leave the
padding out, the last block's pool is a maximum, there are 1008 classes, and images come as
(x - 128) / 128.

Shape suffixes: B batch, H, W, C height, width and channels.
"""

from collections.abc import Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

SIDE = 299  # of the images that the network sees
# Of `mixed_6/conv`, what sFID is made of (Nash et al. 2021).
SPATIAL_CHANNELS, SPATIAL_SIDE = 7, 17
CLASSES = 1008
_EPSILON = 1e-3  # of the batch normalisations
_UNSET = nn.initializers.zeros_init()  # the weights are read; to draw them takes long to trace


class InceptionOutputs(NamedTuple):
    """What is read out of the network, float32.

    Attributes:
      pool: (B, 2048) means over pixels of the last block: `pool_3:0`.
      spatial: (B, 17, 17, 7), the first channels of `mixed_6/conv:0`.
      logits: (B, 1008) without the bias, as ADM's evaluator multiplies them.
    """

    pool: jax.Array
    spatial: jax.Array
    logits: jax.Array


class ConvBN(nn.Module):
    """Convolution without a bias, batch normalisation with running statistics, ReLU.

    Attributes:
      channels: of the output.
      kernel: (height, width).
      stride: in both directions.
      padding: "SAME" or "VALID".
    """

    channels: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: str = "SAME"

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        """Map (B, H, W, C) to (B, H', W', channels)."""
        x = nn.Conv(
            self.channels,
            self.kernel,
            self.stride,
            padding=self.padding,
            use_bias=False,
            kernel_init=_UNSET,
            precision=jax.lax.Precision.HIGHEST,
            name="conv",
        )(x_BHWC)
        ones, zeros = nn.initializers.ones_init(), nn.initializers.zeros_init()
        scale, bias, mean, variance = (
            self.param(name, init, (self.channels,))
            for name, init in (("scale", ones), ("bias", zeros), ("mean", zeros), ("var", ones))
        )
        factor = scale * jax.lax.rsqrt(variance + _EPSILON)
        return nn.relu((x - mean) * factor + bias)


class Branch(NamedTuple):
    """One branch of a block.

    Its pool first ("", "avg" or "max"), its units by name as (channels, kernel, stride), and a last
    pair of units side by side.
    """

    pool: str
    units: Mapping[str, tuple]
    pair: Mapping[str, tuple] = {}


def _pointwise(channels: int) -> tuple:
    return channels, (1, 1)


def _block_a(pooled: int) -> dict[str, Branch]:
    """Describe a block at 35×35: `mixed` to `mixed_2`."""
    return {
        "1x1": Branch("", {"1": _pointwise(64)}),
        "5x5": Branch("", {"1": _pointwise(48), "2": (64, (5, 5))}),
        "3x3_double": Branch("", {"1": _pointwise(64), "2": (96, (3, 3)), "3": (96, (3, 3))}),
        "pool": Branch("avg", {"1": _pointwise(pooled)}),
    }


def _block_c(width: int) -> dict[str, Branch]:
    """Describe a block at 17×17: `mixed_4` to `mixed_7`."""
    row, column = (1, 7), (7, 1)
    return {
        "1x1": Branch("", {"1": _pointwise(192)}),
        "7x7": Branch("", {"1": _pointwise(width), "2": (width, row), "3": (192, column)}),
        "7x7_double": Branch(
            "",
            {
                "1": _pointwise(width),
                "2": (width, column),
                "3": (width, row),
                "4": (width, column),
                "5": (192, row),
            },
        ),
        "pool": Branch("avg", {"1": _pointwise(192)}),
    }


def _block_e(pool: str) -> dict[str, Branch]:
    """Describe a block at 8×8: `mixed_9` and `mixed_10`."""
    pair = {"row": (384, (1, 3)), "column": (384, (3, 1))}
    return {
        "1x1": Branch("", {"1": _pointwise(320)}),
        "3x3": Branch("", {"1": _pointwise(384)}, pair),
        "3x3_double": Branch("", {"1": _pointwise(448), "2": (384, (3, 3))}, pair),
        "pool": Branch(pool, {"1": _pointwise(192)}),
    }


# Those of stride 2 halve the sides; their pool has no units behind it.
BLOCKS: Mapping[str, Mapping[str, Branch]] = {
    "mixed_0": _block_a(32),
    "mixed_1": _block_a(64),
    "mixed_2": _block_a(64),
    "mixed_3": {
        "3x3": Branch("", {"1": (384, (3, 3), 2)}),
        "3x3_double": Branch("", {"1": _pointwise(64), "2": (96, (3, 3)), "3": (96, (3, 3), 2)}),
        "pool": Branch("max", {}),
    },
    "mixed_4": _block_c(128),
    "mixed_5": _block_c(160),
    "mixed_6": _block_c(160),
    "mixed_7": _block_c(192),
    "mixed_8": {
        "3x3": Branch("", {"1": _pointwise(192), "2": (320, (3, 3), 2)}),
        "7x7": Branch(
            "",
            {"1": _pointwise(192), "2": (192, (1, 7)), "3": (192, (7, 1)), "4": (192, (3, 3), 2)},
        ),
        "pool": Branch("max", {}),
    },
    "mixed_9": _block_e("avg"),
    "mixed_10": _block_e("max"),
}
# Before them: (channels, kernel, stride, padding) of a unit, or the pool between.
STEM: Mapping[str, tuple] = {
    "conv_0": (32, (3, 3), 2, "VALID"),
    "conv_1": (32, (3, 3), 1, "VALID"),
    "conv_2": (64, (3, 3), 1, "SAME"),
    "pool_0": (),
    "conv_3": (80, (1, 1), 1, "VALID"),
    "conv_4": (192, (3, 3), 1, "VALID"),
    "pool_1": (),
}


class Block(nn.Module):
    """Parallel branches, whose outputs are concatenated.

    Attributes:
      branches: by name.
      width: of all units, as a share of the network's own.
    """

    branches: Mapping[str, Branch]
    width: float = 1.0

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Map (B, H, W, C) to (B, H', W', C'), and to the output of the first branch."""

        def unit(name: str, channels: int, kernel: tuple[int, int], stride: int = 1) -> ConvBN:
            padding = "SAME" if stride == 1 else "VALID"
            return ConvBN(_scaled(channels, self.width), kernel, stride, padding, name=name)

        outputs = []
        for name, (pool, units, pair) in self.branches.items():
            x = x_BHWC if not pool else _pool(x_BHWC, pool, 1 if units else 2)
            for number, sizes in units.items():
                x = unit(f"{name}_{number}", *sizes)(x)
            outputs += [unit(f"{name}_{side}", *sizes)(x) for side, sizes in pair.items()] or [x]
        return jnp.concatenate(outputs, -1), outputs[0]


class Inception(nn.Module):
    """The network from images of 299×299 to its taps.

    Attributes:
      width: of all layers, as a share of the published network's; below 1 for tests, whose figures
        mean nothing.
    """

    width: float = 1.0

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> InceptionOutputs:
        """Map images (B, 299, 299, 3) float32, about [-1, 1], to features and logits."""
        x = x_BHWC
        for name, sizes in STEM.items():
            if not sizes:
                x = _pool(x, "max", 2)
                continue
            channels, *others = sizes
            x = ConvBN(_scaled(channels, self.width), *others, name=name)(x)
        spatial = None
        for name, branches in BLOCKS.items():
            x, first = Block(branches, self.width, name=name)(x)
            if name == "mixed_6":
                spatial = first[..., :SPATIAL_CHANNELS]
        assert spatial is not None
        pool = x.mean((1, 2))
        # The bias is in the file, and read by whoever wants probabilities as the authors had them.
        kernel = self.param("logits_kernel", _UNSET, (pool.shape[-1], CLASSES))
        self.param("logits_bias", nn.initializers.zeros_init(), (CLASSES,))
        logits = jnp.dot(pool, kernel, precision=jax.lax.Precision.HIGHEST)
        return InceptionOutputs(pool, spatial, logits)


def _scaled(channels: int, width: float) -> int:
    return max(round(channels * width), SPATIAL_CHANNELS)


def _pool(x_BHWC: jax.Array, kind: str, stride: int) -> jax.Array:
    """Pool 3×3: padded mean over pixels inside of the image at stride 1; unpadded at stride 2."""
    padding = "SAME" if stride == 1 else "VALID"
    strides = (stride, stride)
    if kind == "max":
        return nn.max_pool(x_BHWC, (3, 3), strides, padding)
    return nn.avg_pool(x_BHWC, (3, 3), strides, padding, count_include_pad=False)


def resize_matrix(size: int, rule: str, out: int = SIDE) -> np.ndarray:
    """Return bilinear resizing of one side to 299 pixels as a matrix (299, size) float32.

    Never antialiased: both rules take two neighbours, however large the image.

    Args:
      size: of the side.
      rule: "tf1": pixel j lies at j · size / 299, in float32 (TensorFlow 1's kernel, which ADM's
        evaluator runs); "pytorch_fid": at (j + ½) · size / 299 - ½, not below 0.
      out: pixels in place of 299.
    """
    places = np.arange(out, dtype=np.float32)
    scale = np.float32(size / out)
    if rule == "tf1":
        places = places * scale
    else:
        places = np.maximum((places + np.float32(0.5)) * scale - np.float32(0.5), 0)
    low = np.minimum(places.astype(np.int64), size - 1)
    high, fraction = np.minimum(low + 1, size - 1), places - low
    matrix = np.zeros((out, size), np.float32)
    rows = np.arange(out)
    np.add.at(matrix, (rows, low), 1 - fraction)
    np.add.at(matrix, (rows, high), fraction)
    return matrix


def resized(images_BHWC: jax.Array, rule: str) -> jax.Array:
    """Resize (B, H, W, 3), 0 to 255, to (B, 299, 299, 3) float32, 0 to 255; see `resize_matrix`."""
    _, height, width, _ = images_BHWC.shape
    rows, columns = resize_matrix(height, rule), resize_matrix(width, rule)
    return jnp.einsum(
        "YH,XW,BHWC->BYXC",
        rows,
        columns,
        images_BHWC.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )


def normalised(images_BHWC: jax.Array, rule: str) -> jax.Array:
    """Scale images (B, H, W, 3) in 0 to 255: (x - 128) / 128, or 2x / 255 - 1 (pytorch-fid)."""
    if rule == "tf1":
        return (images_BHWC - 128) / 128
    return images_BHWC * (2 / 255) - 1


RULES = ("tf1", "pytorch_fid")
