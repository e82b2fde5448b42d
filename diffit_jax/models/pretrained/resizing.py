"""How pictures reach a pretrained encoder: the resizing and scaling rules of metrics and of REPA.

Every resampling is a pair of matrices or of taps, one for each side of the picture, known before
anything is compiled. `jax.image.resize` would be one of these rules ("cubic", antialiased, a = -½).

Shape suffixes: B batch, H, W, C height, width and channels.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffit_jax.models.pretrained.inception import resize_matrix

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and deviation, of [0, 1]
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_PIL_BITS = 22  # of the fractions of Pillow's weights


def cubic(x: np.ndarray, a: float) -> np.ndarray:
    """Return Keys' cubic kernel (1981) at distances x, shaped like them; a is its slope at 1."""
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def interpolation_matrix(size: int, out: int, *, scale: float | None = None) -> np.ndarray:
    """Return cubic interpolation of one side as a matrix (out, size) float64.

    PyTorch's: a = -¾, four taps however large the side (no antialias), those outside clamped.

    Args:
      size: of the side.
      out: its size afterwards.
      scale: of a step of the output, in those of the input; None: size / out.
    """
    places = (np.arange(out) + 0.5) * (size / out if scale is None else scale) - 0.5
    first = np.floor(places).astype(np.int64)
    matrix = np.zeros((out, size))
    for offset in range(-1, 3):
        taps = np.clip(first + offset, 0, size - 1)
        np.add.at(matrix, (np.arange(out), taps), cubic(places - first - offset, -0.75))
    return matrix


def antialiased_matrix(size: int, out: int) -> np.ndarray:
    """Return antialiased cubic resampling of one side as a matrix (out, size) float64.

    Pillow's and PyTorch's: a = -½; where pictures shrink, the kernel is stretched by the ratio, and
    its weights inside of the picture are normalised.
    """
    scale = size / out
    stretch = max(scale, 1.0)
    centres = (np.arange(out) + 0.5)[:, None] * scale
    low = np.maximum(np.floor(centres - 2 * stretch + 0.5), 0)
    high = np.minimum(np.floor(centres + 2 * stretch + 0.5), size)
    taps = np.arange(size)[None]
    weights = cubic((taps - centres + 0.5) / stretch, -0.5)
    matrix = np.where((taps >= low) & (taps < high), weights, 0.0)
    return matrix / matrix.sum(axis=1, keepdims=True)


Matrix = Callable[[int, int], np.ndarray]  # (size, out) → (out, size)


def resized(images_BHWC: jax.Array, side: tuple[int, int], matrix: Matrix) -> jax.Array:
    """Resize images (B, H, W, C) to (B, *side, C) float32, by a matrix for each side."""
    _, height, width, _ = images_BHWC.shape
    if (height, width) == side:
        return images_BHWC.astype(jnp.float32)
    return jnp.einsum(
        "YH,XW,BHWC->BYXC",
        matrix(height, side[0]).astype(np.float32),
        matrix(width, side[1]).astype(np.float32),
        images_BHWC.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )


def pil_resized(images_BHWC: jax.Array, side: tuple[int, int]) -> jax.Array:
    """Resize uint8 images as Pillow does: (B, H, W, C) to (B, *side, C) uint8.

    Its weights are whole numbers of 2⁻²², and each pass rounds to uint8. To the bit of those that
    are no taller than wide; of others Pillow 13 mostly begins with the columns.
    """
    for axis in (2, 1):
        if images_BHWC.shape[axis] != side[axis - 1]:
            images_BHWC = _pil_pass(images_BHWC, axis, side[axis - 1])
    return images_BHWC


def _pil_pass(images_BHWC: jax.Array, axis: int, out: int) -> jax.Array:
    matrix = antialiased_matrix(images_BHWC.shape[axis], out)
    # Those of a row lie side by side: as many as the widest has, from the first that counts.
    counts = matrix != 0  # but between its first and last weight a row may have zeros
    first, last = counts.argmax(axis=1), matrix.shape[1] - 1 - counts[:, ::-1].argmax(axis=1)
    width = int((last - first).max() + 1)
    first = np.minimum(first, matrix.shape[1] - width)
    total = jnp.int32(1 << (_PIL_BITS - 1))
    for tap in range(width):
        weights = matrix[np.arange(out), first + tap]
        whole = np.trunc(weights * (1 << _PIL_BITS) + np.copysign(0.5, weights)).astype(np.int32)
        shape = [1] * 4
        shape[axis] = out
        taken = jnp.take(images_BHWC, first + tap, axis=axis).astype(jnp.int32)
        total = total + taken * whole.reshape(shape)
    return jnp.clip(total >> _PIL_BITS, 0, 255).astype(jnp.uint8)


def normalised(images_BHWC: jax.Array, statistics: tuple = IMAGENET) -> jax.Array:
    """Scale images (B, H, W, 3) in [0, 1] by mean and deviation of each channel, float32."""
    mean, deviation = (np.asarray(each, np.float32) for each in statistics)
    return (images_BHWC - mean) / deviation


class Rule(NamedTuple):
    """From pictures to what an encoder sees.

    Attributes:
      side: (side of the picture, of a patch) → side of what the encoder sees.
      apply: of pictures (B, H, W, 3) in 0 to 255, uint8 or float32, and a side (height, width).
    """

    side: Callable[[int, int], int]
    apply: Callable[[jax.Array, tuple[int, int]], jax.Array]


def _always_224(picture: int, patch: int) -> int:
    return 224


def _as_latents(picture: int, patch: int) -> int:
    """Return REPA's side: 16 patches for each 256 pixels, as its network has tokens."""
    return max(picture // 256, 1) * 16 * patch


def _dgm_eval(pictures: jax.Array, side: tuple[int, int]) -> jax.Array:
    # Not even those of the right size are left alone by Pillow's rounding to uint8.
    pixels = pictures.astype(jnp.uint8)
    return normalised(pil_resized(pixels, side).astype(jnp.float32) / 255)


def _dgm_eval_clean(pictures: jax.Array, side: tuple[int, int]) -> jax.Array:
    return normalised(jnp.clip(resized(pictures, side, antialiased_matrix), 0, 255) / 255)


def _edm2(pictures: jax.Array, side: tuple[int, int]) -> jax.Array:
    return normalised(resized(pictures, side, antialiased_matrix) / 255)


def _tf1_matrix(size: int, out: int) -> np.ndarray:
    return resize_matrix(size, "tf1", out)


def _torch_fidelity(pictures: jax.Array, side: tuple[int, int]) -> jax.Array:
    return normalised(jnp.clip(resized(pictures, side, _tf1_matrix), 0, 255) / 255)


def _repa(pictures: jax.Array, side: tuple[int, int]) -> jax.Array:
    scaled = normalised(pictures.astype(jnp.float32) / 255)
    return resized(scaled, side, interpolation_matrix)


def _repa_clip(pictures: jax.Array, side: tuple[int, int]) -> jax.Array:
    scaled = resized(pictures.astype(jnp.float32) / 255, side, interpolation_matrix)
    return normalised(scaled, CLIP)


def _repa_mae(pictures: jax.Array, side: tuple[int, int]) -> jax.Array:
    return normalised(pictures.astype(jnp.float32) / 255)


def _fdr6(pictures: jax.Array, side: tuple[int, int]) -> jax.Array:
    clipped = jnp.clip(pictures.astype(jnp.float32) / 255, 0, 1)
    return normalised(resized(clipped, side, antialiased_matrix))


RULES: Mapping[str, Rule] = {
    # Of distances. EDM2's `pil` is dgm-eval's to the bit.
    "dgm_eval": Rule(_always_224, _dgm_eval),
    "dgm_eval_clean": Rule(_always_224, _dgm_eval_clean),
    "edm2": Rule(_always_224, _edm2),
    "torch_fidelity": Rule(_always_224, _torch_fidelity),
    "fdr6": Rule(lambda picture, patch: 256 if picture <= 256 else 518, _fdr6),
    # Of REPA: DINOv2's, and CLIP's and MAE's, whose encoders are others.
    "repa": Rule(_as_latents, _repa),
    "repa_clip": Rule(_as_latents, _repa_clip),
    "repa_mae": Rule(lambda picture, patch: picture, _repa_mae),
}
DISTANCE_RULES = ("dgm_eval", "edm2", "dgm_eval_clean", "torch_fidelity", "fdr6")


def prepared(pictures_BHWC: jax.Array, rule: str, patch: int = 14) -> jax.Array:
    """Prepare pictures as a rule has it, for an encoder with patches of this side.

    Args:
      pictures_BHWC: (B, H, W, 3) in 0 to 255, uint8 or float32.
      rule: a name in `RULES`.
      patch: side of a patch in pixels.

    Returns:
      (B, H', W', 3) float32, normalised.
    """
    _, height, width, _ = pictures_BHWC.shape
    chosen = RULES[rule]
    return chosen.apply(pictures_BHWC, (chosen.side(height, patch), chosen.side(width, patch)))
