"""EDM's augmentation of images (Karras et al. 2022, appendix F.2, after StyleGAN2-ADA).

Operations are drawn and applied inside the training step, and the network is conditioned on them,
so that its samples show none of it. Every operation is drawn by the example's own key and applied
with static shapes, without gathers, which are slow on TPUs. Images are resampled under affine maps
without aliasing, by a few products with small matrices.

Shape suffixes: B batch, H, W, C height, width and channels; P points of the finer grid on which
images are resampled.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from diffit_jax import limits, platforms
from diffit_jax.limits import at_least, fraction
from diffit_jax.models.placement import platform

# Strengths, EDM's own.
SCALE_LOG2_STD = 0.2  # of isotropic and anisotropic scaling
TURN_OF_SCALING = 0.5  # how often an anisotropic scaling has an axis of its own
SHIFT_STD = 0.125  # of the side
WHOLE_SHIFT_MOST = 0.125  # of the side
BRIGHTNESS_STD = 0.2
CONTRAST_LOG2_STD = 0.5
SATURATION_LOG2_STD = 1.0

# What was drawn, by name: 0 where an operation is not applied to an image.
Draws = Mapping[str, jax.Array]

Often = Annotated[float, at_least(0)]


@dataclasses.dataclass(frozen=True)
class Augmentation(limits.Section, name="augmentation"):
    """Section `augmentation`: how often each operation is applied.

    An operation is applied to an image with the probability min(`probability` · its multiplier, 1);
    its strength is drawn too.

    Attributes:
      probability: EDM has 0.12 for CIFAR-10 and 0.15 for FFHQ; 0: no augmentation.
      x_flip: multiplier of mirroring left and right, which the draw then does to every second
        image; so large by default that it is always drawn.
      y_flip: of mirroring top and bottom.
      quarter_turn: of turning by 0 to 3 quarters.
      whole_shift: of shifting by whole pixels, at most an eighth of the side.
      scale: of scaling by 2^(0.2 w), w ~ N(0, 1).
      rotation: of turning by any angle.
      stretch: of scaling one axis by 2^(0.2 w) and the other by its inverse; every second time
        these are not the image's axes.
      shift: of shifting by w/8 of the side, w ~ N(0, 1) for each axis.
      brightness: of adding 0.2 w.
      contrast: of multiplying by 2^(0.5 w).
      luma_flip: of mirroring the luma axis, which the draw then does to every second image.
      hue: of turning colours about the luma axis by any angle.
      saturation: of multiplying colours, not luma, by 2^w.
    """

    probability: Annotated[float, fraction()] = 0.0
    x_flip: Often = 1e8
    y_flip: Often = 1.0
    quarter_turn: Often = 0.0
    whole_shift: Often = 0.0
    scale: Often = 1.0
    rotation: Often = 1.0
    stretch: Often = 1.0
    shift: Often = 1.0
    brightness: Often = 0.0
    contrast: Often = 0.0
    luma_flip: Often = 0.0
    hue: Often = 0.0
    saturation: Often = 0.0

    def applies(self, name: str) -> bool:
        """Whether an operation, by the name of its multiplier, is ever applied."""
        return self.probability > 0 and getattr(self, name) > 0

    @property
    def num_labels(self) -> int:
        """How many numbers tell the network what was done to an image; 9 with EDM's operations."""
        return sum(LABELS[name] for name in LABELS if self.applies(name))


NONE = Augmentation()

# The operations in the order in which they are applied, and how many labels each has.
LABELS = {
    "x_flip": 1,
    "y_flip": 1,
    "quarter_turn": 2,
    "whole_shift": 2,
    "scale": 1,
    "rotation": 2,
    "stretch": 2,
    "shift": 2,
    "brightness": 1,
    "contrast": 1,
    "luma_flip": 1,
    "hue": 2,
    "saturation": 1,
}
_RESAMPLED = ("scale", "rotation", "stretch", "shift")
_RECOLOURED = ("brightness", "contrast", "luma_flip", "hue", "saturation")


def augment(
    settings: Augmentation, images_BHWC: jax.Array, key_B: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Augment images (B, H, W, C), each by its own key.

    Args:
      settings: section `augmentation`.
      images_BHWC: (B, H, W, C) float32 in [-1, 1].
      key_B: (B,) keys.

    Returns:
      Images like these, and (B, `num_labels`) float32 labels.
    """
    draws = draw(settings, key_B)
    return apply(settings, images_BHWC, draws), labels(settings, draws, _size(images_BHWC))


def draw(settings: Augmentation, key_B: jax.Array) -> dict[str, jax.Array]:
    """Draw the operations for images with these keys.

    Args:
      settings: section `augmentation`.
      key_B: (B,) keys.

    Returns:
      For each operation that is ever applied, by its name, 0 where it is not applied to an image:
      (B,) float32 `x_flip`, `y_flip`, `luma_flip` in {0, 1}; `quarter_turn` in {0, 1, 2, 3};
      `rotation`, `hue` in [-π, π]; `scale`, `stretch` (and `stretch_angle` in [-π, π]),
      `brightness`, `contrast`, `saturation`, normal; (B, 2) `whole_shift` in [-1, 1] and `shift`,
      normal, along x and y (the latter's y down, the former's up).
    """

    def uniform(key: jax.Array) -> jax.Array:
        return jax.random.uniform(key, minval=-math.pi, maxval=math.pi)

    def coin(key: jax.Array) -> jax.Array:
        return jax.random.bernoulli(key).astype(jnp.float32)

    kinds = {
        "x_flip": coin,
        "y_flip": coin,
        "quarter_turn": lambda key: jax.random.randint(key, (), 0, 4).astype(jnp.float32),
        "whole_shift": lambda key: jax.random.uniform(key, (2,), minval=-1.0, maxval=1.0),
        "rotation": uniform,
        "shift": lambda key: jax.random.normal(key, (2,)),
        "luma_flip": coin,
        "hue": uniform,
    }

    def for_one(key: jax.Array) -> dict[str, jax.Array]:
        drawn: dict[str, jax.Array] = {}
        for number, name in enumerate(LABELS):
            # An operation's own number: its draws stay when others are switched on or off.
            chosen_key, value_key, further_key = jax.random.split(
                jax.random.fold_in(key, number), 3
            )
            if not settings.applies(name):
                continue
            often = settings.probability * getattr(settings, name)
            chosen = jax.random.uniform(chosen_key) < often
            value = kinds.get(name, jax.random.normal)(value_key)
            drawn[name] = jnp.where(chosen, value, 0.0)
            if name == "stretch":
                angle_key, turned_key = jax.random.split(further_key)
                turned = jax.random.uniform(turned_key) < TURN_OF_SCALING
                drawn["stretch_angle"] = jnp.where(chosen & turned, uniform(angle_key), 0.0)
        return drawn

    return jax.vmap(for_one)(key_B)


def labels(settings: Augmentation, draws: Draws, size: tuple[int, int]) -> jax.Array:
    """Return the network's augmentation labels, (B, `num_labels`) float32.

    All 0 for an image that is not augmented.

    Args:
      settings: section `augmentation`.
      draws: as of `draw`.
      size: (H, W) of the images.
    """
    parts: list[jax.Array] = []
    for name in LABELS:
        if not settings.applies(name):
            continue
        value = draws[name]
        if name in ("rotation", "hue"):  # an angle as a point of the circle
            parts += [jnp.cos(value) - 1, jnp.sin(value)]
        elif name == "stretch":
            angle = draws["stretch_angle"]
            parts += [value * jnp.cos(angle), value * jnp.sin(angle)]
        elif name == "quarter_turn":
            parts += [(value == 1) | (value == 2), (value == 2) | (value == 3)]
        elif name == "whole_shift":
            pixels = _whole_pixels(value, size)
            parts += [pixels[:, axis] / (WHOLE_SHIFT_MOST * size[1 - axis]) for axis in (0, 1)]
        elif name == "shift":
            parts += [value[:, 0], value[:, 1]]
        else:
            parts.append(value)
    return jnp.stack([one.astype(jnp.float32) for one in parts], axis=-1)


def apply(settings: Augmentation, images_BHWC: jax.Array, draws: Draws) -> jax.Array:
    """Apply drawn operations to images.

    Args:
      settings: section `augmentation`: which operations there are.
      images_BHWC: (B, H, W, C) float32; 1 or 3 channels if colours change, square if there are
        quarter turns.
      draws: as of `draw`.
    """
    x_BHWC = images_BHWC

    def where(chosen_B: jax.Array, changed_BHWC: jax.Array) -> jax.Array:
        return jnp.where(chosen_B[:, None, None, None], changed_BHWC, x_BHWC)

    if settings.applies("x_flip"):
        x_BHWC = where(draws["x_flip"] == 1, x_BHWC[:, :, ::-1])
    if settings.applies("y_flip"):
        x_BHWC = where(draws["y_flip"] == 1, x_BHWC[:, ::-1])
    if settings.applies("quarter_turn"):
        turn_B, turned = draws["quarter_turn"], x_BHWC
        for quarters in (1, 2, 3):
            turned = jnp.rot90(turned, axes=(1, 2))
            x_BHWC = where(turn_B == quarters, turned)
    if settings.applies("whole_shift"):
        pixels = _whole_pixels(draws["whole_shift"], _size(x_BHWC))
        x_BHWC = _shifted(x_BHWC, pixels)
    if any(settings.applies(name) for name in _RESAMPLED):
        zeros = jnp.zeros(len(x_BHWC))
        inverse = inverse_map({**dict.fromkeys(_RESAMPLED, zeros), **draws}, _size(x_BHWC))
        x_BHWC = resampled(x_BHWC, inverse)
    if any(settings.applies(name) for name in _RECOLOURED):
        x_BHWC = _recoloured(settings, x_BHWC, draws)
    return x_BHWC


# --- Geometry


def _size(x_BHWC: jax.Array) -> tuple[int, int]:
    """Return (H, W)."""
    return x_BHWC.shape[1], x_BHWC.shape[2]


def _whole_pixels(shares_B2: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Return how many pixels a `whole_shift` is along x and y, (B, 2) float32."""
    height, width = size
    return jnp.round(shares_B2 * jnp.array([width, height]) * WHOLE_SHIFT_MOST)


def _shifted(x_BHWC: jax.Array, pixels_B2: jax.Array) -> jax.Array:
    """Shift images (B, H, W, C) by whole pixels to the right and, as EDM has it, up.

    Pixels that come in are mirrored at the edge, which is not repeated.
    """
    height, width = x_BHWC.shape[1:3]

    def rows(length: int, shift_B: jax.Array) -> jax.Array:
        """Return one-hot rows (B, to, from)."""
        source = jnp.arange(length) - shift_B[:, None]
        source = length - 1 - jnp.abs(length - 1 - jnp.abs(source))
        return (source[:, :, None] == jnp.arange(length)).astype(jnp.float32)

    exact = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    x_BHWC = exact("bih,bhwc->biwc", rows(height, -pixels_B2[:, 1]), x_BHWC)
    return exact("bjw,biwc->bijc", rows(width, pixels_B2[:, 0]), x_BHWC)


def inverse_map(draws: Draws, size: tuple[int, int]) -> jax.Array:
    """Return the affine maps from pixels of augmented images to where they come from.

    Args:
      draws: (B,) `scale`, `rotation`, `stretch`, `stretch_angle` (may be left out: 0) and (B, 2)
        `shift`.
      size: (H, W).

    Returns:
      (B, 2, 3) float32 affine map, in pixels from the image's middle, x to the right and y down:
      S(1/s) R(rotation) R(-r) S(1/a, a) R(r) T(-shift), with s = 2^(0.2 scale), a = 2^(0.2
      stretch), r = `stretch_angle`.
    """
    height, width = size

    def turn(angle_B: jax.Array) -> jax.Array:
        cos, sin = jnp.cos(angle_B), jnp.sin(angle_B)
        return jnp.stack([jnp.stack([cos, -sin], -1), jnp.stack([sin, cos], -1)], -2)

    s_B = jnp.exp2(SCALE_LOG2_STD * draws["scale"])
    a_B = jnp.exp2(SCALE_LOG2_STD * draws["stretch"])
    r_B = draws.get("stretch_angle", jnp.zeros_like(a_B))
    stretching = jnp.stack([1 / a_B, a_B], -1)[:, :, None] * jnp.eye(2)
    product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    linear = turn(draws["rotation"]) / s_B[:, None, None]
    linear = product(linear, product(turn(-r_B), product(stretching, turn(r_B))))
    shift_B2 = draws["shift"].reshape(len(s_B), -1) * SHIFT_STD * jnp.array([width, height])
    return jnp.concatenate([linear, -product(linear, shift_B2[:, :, None])], axis=-1)


# --- Colour


def _recoloured(settings: Augmentation, x_BHWC: jax.Array, draws: Draws) -> jax.Array:
    """Apply affine maps of colours to images; to grey ones by the map's mean."""
    batch, channels = len(x_BHWC), x_BHWC.shape[-1]
    luma = np.ones(3) / math.sqrt(3)
    matrix, offset = jnp.broadcast_to(jnp.eye(3), (batch, 3, 3)), jnp.zeros((batch, 3))
    product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)

    def then(step_B33: jax.Array) -> tuple[jax.Array, jax.Array]:
        return product(step_B33, matrix), product(step_B33, offset[..., None])[..., 0]

    onto_luma = jnp.float32(np.outer(luma, luma))
    if settings.applies("brightness"):
        offset = offset + BRIGHTNESS_STD * draws["brightness"][:, None]
    if settings.applies("contrast"):
        factor_B = jnp.exp2(CONTRAST_LOG2_STD * draws["contrast"])
        matrix, offset = then(factor_B[:, None, None] * jnp.eye(3))
    if settings.applies("luma_flip"):
        matrix, offset = then(jnp.eye(3) - 2 * onto_luma * draws["luma_flip"][:, None, None])
    if settings.applies("hue") and channels > 1:
        # Rodrigues' rotation about the luma axis.
        x, y, z = luma
        cross = jnp.float32(np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]]))
        cos, sin = (f(draws["hue"])[:, None, None] for f in (jnp.cos, jnp.sin))
        matrix, offset = then(onto_luma + cos * (jnp.eye(3) - onto_luma) + sin * cross)
    if settings.applies("saturation") and channels > 1:
        factor_B = jnp.exp2(SATURATION_LOG2_STD * draws["saturation"])
        matrix, offset = then(onto_luma + (jnp.eye(3) - onto_luma) * factor_B[:, None, None])
    if channels == 1:
        matrix = matrix.mean(axis=1, keepdims=True).sum(axis=2, keepdims=True)
        offset = offset.mean(axis=1, keepdims=True)
    return product(x_BHWC, matrix.transpose(0, 2, 1)[:, None]) + offset[:, None, None]


def resampled(x_BHWC: jax.Array, inverse_B23: jax.Array) -> jax.Array:
    """Resample images under affine maps, without aliasing.

    The image, mirrored beyond its edges, is brought to twice the resolution, sampled there
    bilinearly, and brought back.

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
    """Return positions of the fine grid along a side, in pixels from its middle, (P,) float64."""
    points = 2 * (length + 2 * _MARGIN)
    return (np.arange(points) + 1 - points / 2) / 2


def _coarse(length: int) -> np.ndarray:
    """Return the matrix that low-passes the fine grid and halves it, (length, P) float64."""
    matrix = np.zeros((length, 2 * (length + 2 * _MARGIN)))
    for pixel in range(length):
        start = 2 * (pixel + _MARGIN) - (len(_SYM6) - 1) // 2
        matrix[pixel, start : start + len(_SYM6)] = _SYM6
    return matrix


def _fine(length: int) -> np.ndarray:
    """Return the matrix that mirrors a side on both ends and doubles it, (M, length) float64.

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
    """Return the weights of a side's pixels at positions on it, (B, P, length) float32.

    Positions are in pixels from the middle; beyond the mirrored ends the weights are 0.
    """
    matrix = _fine(length)
    row_BP = 2 * source_BP + len(matrix) / 2 - 1
    hat = jnp.maximum(1 - jnp.abs(row_BP[..., None] - jnp.arange(len(matrix))), 0)
    return jnp.einsum(
        "bpm,mw->bpw", hat, jnp.float32(matrix), precision=platforms.of(platform()).resampling
    )
