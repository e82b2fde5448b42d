"""Images under affine maps, without aliasing, as EDM's augmentation resamples them: a few products
with small matrices, and no lookup by index, which is slow on TPUs.

Shape suffixes: B batch, H, W, C height, width and channels; P points of the finer grid on which
images are resampled.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from diffit_jax import platforms
from diffit_jax.models.placement import platform


def resampled(x_BHWC: jax.Array, inverse_B23: jax.Array) -> jax.Array:
    """Images under affine maps, without aliasing: the image, mirrored beyond its edges, is brought
    to twice the resolution, sampled there bilinearly, and brought back.

    Args:
      x_BHWC: (B, H, W, C) float32.
      inverse_B23: (B, 2, 3) affine maps from pixels of the results to where they come from, counted
        from the image's middle, x to the right and y down.

    Returns:
      Images of the same shape; with the identity, the same images.
    """
    height, width = x_BHWC.shape[1:3]
    rows, columns = _fine_points(height), _fine_points(width)
    # Where each point of the fine grid comes from, in pixels from the middle: (B, P), x and y.
    point = np.stack(
        [
            np.tile(columns, len(rows)),
            np.repeat(rows, len(columns)),
            np.ones(len(rows) * len(columns)),
        ]
    )
    source_B2P = jnp.matmul(inverse_B23, jnp.float32(point), precision=jax.lax.Precision.HIGHEST)
    # A point takes a weighted sum of all pixels, and its weights are a product of those along x and
    # along y.
    from_x_BPW = _weights(source_B2P[:, 0], width)
    from_y_BPH = _weights(source_B2P[:, 1], height)
    einsum = functools.partial(jnp.einsum, precision=platforms.of(platform()).resampling)
    across_BPWC = einsum("bph,bhwc->bpwc", from_y_BPH, x_BHWC)
    fine_BPC = jnp.sum(from_x_BPW[..., None] * across_BPWC, axis=2)
    fine = fine_BPC.reshape(len(x_BHWC), len(rows), len(columns), -1)
    down = einsum("ip,bpqc->biqc", jnp.float32(_coarse(height)), fine)
    return einsum("jq,biqc->bijc", jnp.float32(_coarse(width)), down)


# Low-pass of the symlet of 6 vanishing moments.
_SYM6 = np.array(
    [0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633,
     0.4910559419267466, 0.787641141030194, 0.3379294217276218, -0.07263752278646252,
     -0.021060292512300564, 0.04472490177066578, 0.0017677118642428036, -0.007800708325034148]
)  # fmt: skip
_MARGIN = len(_SYM6) // 4  # pixels beyond each edge that the way back needs


def _fine_points(length: int) -> np.ndarray:
    """(P,) float64 positions of the fine grid along a side, in pixels from its middle."""
    points = 2 * (length + 2 * _MARGIN)
    return (np.arange(points) + 1 - points / 2) / 2


def _coarse(length: int) -> np.ndarray:
    """(length, P) float64: low-pass of the fine grid along a side, and every second point of it."""
    matrix = np.zeros((length, 2 * (length + 2 * _MARGIN)))
    for pixel in range(length):
        start = 2 * (pixel + _MARGIN) - (len(_SYM6) - 1) // 2
        matrix[pixel, start : start + len(_SYM6)] = _SYM6
    return matrix


def _fine(length: int) -> np.ndarray:
    """(M, length) float64: a side, mirrored on both ends, at twice its resolution.

    It is mirrored by length - 1 pixels as in EDM, where nothing lies beyond; by a few more where
    the side is so short that the fine grid of an image left alone would reach beyond.
    """
    beyond = max(length - 1, 2 * _MARGIN + 1)
    mirrored = np.pad(np.arange(length), beyond, mode="reflect")
    matrix = np.zeros((2 * len(mirrored), length))
    for place, pixel in enumerate(mirrored):
        for tap, weight in enumerate(_SYM6[::-1]):
            row = 2 * place + len(_SYM6) // 2 - tap
            if 0 <= row < len(matrix):
                matrix[row, pixel] += weight
    return matrix


def _weights(source_BP: jax.Array, length: int) -> jax.Array:
    """(B, P, length) float32: weights of a side's pixels in what lies at positions on it, in pixels
    from its middle; 0 beyond its mirrored ends."""
    matrix = _fine(length)
    row_BP = 2 * source_BP + len(matrix) / 2 - 1
    hat = jnp.maximum(1 - jnp.abs(row_BP[..., None] - jnp.arange(len(matrix))), 0)
    return jnp.einsum(
        "bpm,mw->bpw", hat, jnp.float32(matrix), precision=platforms.of(platform()).resampling
    )
