"""What losses on a network's own tokens are made of: targets, projectors, distances.

`run.objective.RepresentationObjective` puts them together; the settings are those of
`experiment.representation`.

Shape suffixes: B batch, L tokens, C channels of the network's tokens, D of an encoder's; H, W
height and width.
"""

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from diffit_jax import models
from diffit_jax.data.records import FEATURES, IMAGE, ArraySpec
from diffit_jax.diffusion.flow import Flow
from diffit_jax.diffusion.types import Noised, Process
from diffit_jax.errors import UserError
from diffit_jax.experiment.config import Experiment
from diffit_jax.experiment.representation import REPA, SelfAligned, SelfFlow
from diffit_jax.experiment.spaces import PixelSpace
from diffit_jax.interop import dinov2 as interop
from diffit_jax.models.model import count_multiply_adds
from diffit_jax.models.pretrained import resizing
from diffit_jax.models.pretrained.dinov2 import ENCODERS, DINOv2
from diffit_jax.runtime import parallel

ENCODER = "encoder"  # name of its variables among the frozen ones
FACTOR = 8  # pixels on a latent's side, of images that are estimated or made up
_HIGHEST = jax.lax.Precision.HIGHEST


# --- Losses


def alignment(target_BLD: jax.Array, projected_BLD: jax.Array) -> jax.Array:
    """Return minus the mean over tokens of their cosines, (B,) float32 (REPA, Eq. 8).

    A token of length 0 has the cosine 0; a projected one then has a gradient of 1e12, as PyTorch's.
    """
    return -jnp.mean(_cosine(target_BLD, projected_BLD, -1), axis=-1)


def _cosine(one: jax.Array, other: jax.Array, axis: int) -> jax.Array:
    """Return the cosine along an axis, float32."""

    def unit(x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        squares = jnp.sum(x**2, axis, keepdims=True)
        return x * jax.lax.rsqrt(jnp.maximum(squares, 1e-24))

    return jnp.sum(unit(one) * unit(other), axis)


def spatially_normalised(target_BLD: jax.Array, gamma: float) -> jax.Array:
    """Return (z - gamma · mean) / (deviation + 1e-6) over tokens, like z, float32 (iREPA).

    The deviation is the unbiased one. With gamma 0 it is z.
    """
    z_BLD = target_BLD.astype(jnp.float32)
    if not gamma:
        return z_BLD
    mean, deviation = z_BLD.mean(1, keepdims=True), z_BLD.std(1, keepdims=True, ddof=1)
    return (z_BLD - gamma * mean) / (deviation + 1e-6)


def dispersive(z_BLC: jax.Array, temperature: float, group: int) -> jax.Array:
    """Return log mean exp(-‖z_i - z_j‖² / (dim · temperature)) of each example's group.

    Args:
      z_BLC: tokens; dim is L · C.
      temperature: scale.
      group: size n of a group, which divides B: those equal modulo B / n.

    Returns:
      (B,) float32, the same for all of a group.
    """
    count = len(z_BLC)
    z_GNK = z_BLC.astype(jnp.float32).reshape(group, count // group, -1).swapaxes(0, 1)
    # Differences of near points, not of near squares: half of the pairs would be lost to rounding.
    about = z_GNK - z_GNK.mean(axis=1, keepdims=True)
    products = jnp.einsum("gik,gjk->gij", about, about, precision=_HIGHEST)
    squares = jnp.diagonal(products, axis1=1, axis2=2)
    far = jnp.maximum(squares[:, :, None] + squares[:, None] - 2 * products, 0)
    # An example's distance to itself is 0, whatever rounding makes of it.
    far = jnp.where(jnp.eye(group, dtype=bool), 0.0, far)
    logits = -far / (z_GNK.shape[-1] * temperature)
    of_group = jax.nn.logsumexp(logits, axis=(1, 2)) - 2 * math.log(group)
    return jnp.tile(of_group, group)


def _smooth_l1(error: jax.Array, beta: float = 0.05) -> jax.Array:
    size = jnp.abs(error)
    return jnp.where(size < beta, error**2 / (2 * beta), size - beta / 2)


def _mean_of(function: Callable[[jax.Array], jax.Array]) -> Callable:
    def distance(student_BLC: jax.Array, teacher_BLC: jax.Array) -> jax.Array:
        error = student_BLC.astype(jnp.float32) - teacher_BLC.astype(jnp.float32)
        return jnp.mean(function(error), axis=(1, 2))

    return distance


# Name in `representation.DISTANCES` → function of both tokens (B, L, C) → (B,).
DISTANCES: Mapping[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "smooth_l1": _mean_of(_smooth_l1),
    "l1": _mean_of(jnp.abs),
    "l2": _mean_of(jnp.square),
    "cosine": lambda student, teacher: jnp.mean(1 - _cosine(student, teacher, -1), axis=-1),
    "cosine_over_tokens": lambda student, teacher: jnp.mean(
        1 - _cosine(student, teacher, 1), axis=-1
    ),
}


# --- Two times in a picture


class Mixed(NamedTuple):
    """Noisy data some of whose tokens have a second time (Self-Flow).

    Attributes:
      first, second: of all tokens at either time, with the same noise.
      second_BL: (B, L) bool, tokens that have the second.
      pixels_BHW1: (B, H, W, 1), the same of what they are made of.
    """

    first: Noised
    second: Noised
    second_BL: jax.Array
    pixels_BHW1: jax.Array

    @property
    def x_BHWC(self) -> jax.Array:
        """What the network sees, (B, H, W, C)."""
        return jnp.where(self.pixels_BHW1, self.second.x_BHWC, self.first.x_BHWC)

    @property
    def told(self) -> dict[str, jax.Array]:
        """What it is told of the second time, beside the first as its noise level."""
        return {"second_level": self.second.level_B, "has_second": self.second_BL}

    @property
    def earlier_B(self) -> jax.Array:
        """The earlier of both times, (B,)."""
        return jnp.minimum(self.first.draws["time"], self.second.draws["time"])

    def loss_of(
        self, process: Process, y_BHWC: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Compute the process's loss, (B,) with terms: each pixel's is that of its own time.

        Args:
          process: that predicts velocities.
          y_BHWC: output of the network.
        """
        # What is put in the place of the others' outputs adds nothing to the mean.
        y_BHWC = y_BHWC[..., : self.first.target_BHWC.shape[-1]]
        parts = (
            process.loss_of(noised, jnp.where(pixels, y_BHWC, noised.target_BHWC))
            for noised, pixels in ((self.first, ~self.pixels_BHW1), (self.second, self.pixels_BHW1))
        )
        return jax.tree.map(jnp.add, *parts)


def mixed(
    experiment: Experiment,
    x_BHWC: jax.Array,
    noised: Noised,
    time_key_B: jax.Array,
    mask_key_B: jax.Array,
) -> Mixed:
    """Give some tokens of each example, (B, H, W, C), a second time.

    Args:
      experiment: of Self-Flow.
      x_BHWC: clean data.
      noised: them at a first time.
      time_key_B: (B,) keys of the second time.
      mask_key_B: (B,) keys of which tokens have it.
    """
    settings, process, model = experiment.representation, experiment.process, experiment.model
    assert isinstance(settings, SelfFlow)
    assert isinstance(process, Flow)
    rows, columns = settings.grid(model)
    count = settings.second_count(model)
    second_BL = jax.vmap(lambda key: jax.random.permutation(key, rows * columns) < count)(
        mask_key_B
    )
    patch = x_BHWC.shape[1] // rows
    of_rows = second_BL.reshape(-1, rows, columns, 1).repeat(patch, axis=1)
    first_B, second_B = noised.draws["time"], jax.vmap(process.draw_time)(time_key_B)
    if settings.second_is == "later":
        first_B, second_B = jnp.minimum(first_B, second_B), jnp.maximum(first_B, second_B)
    first, second = (
        process.noised_at(x_BHWC, time_B, noised.draws["noise"]) for time_B in (first_B, second_B)
    )
    return Mixed(first, second, second_BL, of_rows.repeat(patch, axis=2))


# --- Projectors


def init_projector(experiment: Experiment, key: jax.Array) -> dict[str, Any]:
    """Initialise the projector of an experiment; {} if its loss has none.

    Xavier-uniform kernels and zero biases, float32.
    """
    settings = experiment.representation
    if not isinstance(settings, REPA | SelfAligned):
        return {}
    channels = settings.tokens(experiment.model, "depth")[-1]
    if isinstance(settings, SelfAligned):
        widths = [channels, 2 * channels, channels]
    elif settings.projector == "conv":
        init = jax.nn.initializers.xavier_uniform(in_axis=(0, 1, 2), out_axis=3)
        width = settings.encoder_width
        kernel = init(key, (3, 3, channels, width), jnp.float32)
        return {"conv": {"kernel": kernel, "bias": jnp.zeros(width)}}
    else:
        inner = settings.projector_width
        widths = [channels, inner, inner, settings.encoder_width]
    init, layers = jax.nn.initializers.xavier_uniform(), {}
    for number, shape in enumerate(itertools.pairwise(widths)):
        kernel = init(jax.random.fold_in(key, number), shape, jnp.float32)
        layers[f"layer_{number}"] = {"kernel": kernel, "bias": jnp.zeros(shape[1])}
    return layers


def project(params: Mapping[str, Any], tokens_BLC: jax.Array) -> jax.Array:
    """Project tokens by an MLP with SiLU, or by a 3×3 convolution, (B, L, D) of their dtype.

    Args:
      params: of `init_projector`.
      tokens_BLC: for the convolution those of a square, row by row.
    """
    dtype = tokens_BLC.dtype

    def linear(layer: Mapping[str, jax.Array], x: jax.Array) -> jax.Array:
        return x @ layer["kernel"].astype(dtype) + layer["bias"].astype(dtype)

    if "conv" in params:
        batch, length, channels = tokens_BLC.shape
        side = round(length**0.5)
        found = jax.lax.conv_general_dilated(
            tokens_BLC.reshape(batch, side, side, channels),
            params["conv"]["kernel"].astype(dtype),
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return found.reshape(batch, length, -1) + params["conv"]["bias"].astype(dtype)
    layers = [params[f"layer_{number}"] for number in range(len(params))]
    for layer in layers[:-1]:
        tokens_BLC = jax.nn.silu(linear(layer, tokens_BLC))
    return linear(layers[-1], tokens_BLC)


def flat(tokens: jax.Array) -> jax.Array:
    """Return tokens (B, L, C), row by row, of such or of (B, H, W, C)."""
    return tokens.reshape(len(tokens), -1, tokens.shape[-1])


# --- The encoder


def encoder_of(settings: REPA) -> DINOv2:
    """Return the module of a config's encoder."""
    dtype = jnp.dtype(settings.encoder_dtype)
    return ENCODERS[settings.encoder].clone(positions=settings.positions, dtype=dtype)


def _shapes(module: DINOv2) -> Any:
    """Return shapes and dtypes in which its variables are kept: matrices as it uses them."""
    shapes = models.variable_shapes(module, (module.patch, module.patch, 3))

    def kept(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return leaf.update(dtype=module.dtype if path[-1].key == "kernel" else leaf.dtype)

    return jax.tree_util.tree_map_with_path(kept, shapes)


def abstract_encoder(settings: REPA, mesh: Mesh) -> Any:
    """Return the encoder's variables as shapes, a copy on each device."""
    return parallel.abstract(mesh, _shapes(encoder_of(settings)))


def load_encoder(settings: REPA, mesh: Mesh) -> Any:
    """Read the encoder's variables, a copy on each device.

    Raises:
      UserError: no file is named, or errors of `interop.dinov2.load`.
    """
    path: Any = settings.encoder_weights
    if not path and settings.encoder == "digits":
        path = interop.DIGITS
    if not path:
        raise UserError(
            f"config key representation.encoder_weights is missing: name the weights of "
            f"{settings.encoder}, a .pth or hf://facebook/dinov2-…"
        )
    _, variables = interop.load(path, size=settings.encoder, sharding=parallel.replicated(mesh))
    wanted = _shapes(encoder_of(settings))
    return jax.tree.map(lambda leaf, shape: leaf.astype(shape.dtype), variables, wanted)


def encoded(
    module: DINOv2, variables: Any, pictures_BHWC: jax.Array, grid: tuple[int, int]
) -> jax.Array:
    """Encode pictures to tokens (B, 1 + L, D) float32: the class token, then a grid of patches.

    Args:
      module: the encoder.
      variables: of it.
      pictures_BHWC: in 0 to 255, of three channels or one.
      grid: rows and columns of patches.
    """
    if pictures_BHWC.shape[-1] == 1:
        pictures_BHWC = jnp.repeat(pictures_BHWC, 3, axis=-1)
    side = grid[0] * module.patch, grid[1] * module.patch
    seen_BHWC = resizing.RULES["repa"].apply(pictures_BHWC, side)
    found: Any = module.apply(variables, seen_BHWC)
    return jnp.concatenate([found.class_BD[:, None], found.patches_BLD], axis=1)


# --- What it costs, and needs of the data


def arrays_beside(experiment: Experiment) -> dict[str, ArraySpec]:
    """Return the arrays that examples need beside those of their space, by name.

    The size of an image is that of an autoencoder with 8 pixels on a latent's side.
    """
    settings, model = experiment.representation, experiment.model
    if not isinstance(settings, REPA):
        return {}
    if settings.source == "features":
        rows, columns = settings.grid(model)
        shape = 1, 1 + rows * columns, settings.encoder_width
        return {FEATURES: ArraySpec(shape, "float16")}
    if isinstance(experiment.space, PixelSpace):
        return {}
    height, width, _ = model.sample_shape
    return {IMAGE: ArraySpec((FACTOR * height, FACTOR * width, 3), "uint8")}


def encoder_of_features(experiment: Experiment) -> dict[str, str]:
    """Return which encoder the features of records have to be of; {} where none are needed."""
    settings = experiment.representation
    if not isinstance(settings, REPA) or settings.source != "features":
        return {}
    return {"network": settings.encoder, "positions": settings.positions}


def further_flops(experiment: Experiment, targets: bool = True) -> float:
    """Return the FLOPs of matrix products that the loss adds for an image of an update.

    `targets`: whether what tokens are compared with is computed, see `needs_targets`.
    """
    settings, model = experiment.representation, experiment.model
    if not isinstance(settings, REPA | SelfAligned):
        return 0.0
    shape = settings.tokens(model, "depth")
    tokens = jax.ShapeDtypeStruct((1, int(np.prod(shape[:-1])), shape[-1]), jnp.float32)
    params = jax.eval_shape(lambda: init_projector(experiment, jax.random.key(0)))
    added = 3 * _flops(project, params, tokens)
    return added + (encoder_flops(experiment) if targets and isinstance(settings, REPA) else 0.0)


def encoder_flops(experiment: Experiment) -> float:
    """Return those of the encoder for a picture; 0 where its tokens are in the records."""
    settings = experiment.representation
    assert isinstance(settings, REPA)
    if settings.source != "image":
        return 0.0
    grid, module = settings.grid(experiment.model), encoder_of(settings)
    picture = jax.ShapeDtypeStruct((1, *(module.patch * side for side in grid), 3), jnp.float32)
    return _flops(module.apply, _shapes(module), picture)


def _flops(function: Callable, *arguments: Any) -> float:
    return 2 * count_multiply_adds(jax.make_jaxpr(function)(*arguments).jaxpr)


def teacher_share(experiment: Experiment) -> float:
    """Return which share of a forward pass the average takes, where it is the teacher."""
    settings = experiment.representation
    blocks = getattr(experiment.model, "blocks", 0)
    return settings.teacher_depth / blocks if isinstance(settings, SelfAligned) and blocks else 0.0
