"""How examples of a data set enter the training step, and how samples leave the sampler: as pixels,
or as latents of an autoencoder. Nothing else asks which of the two an experiment has.

Shape suffixes: B batch, H, W, C height, width and channels of what the network sees.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from diffit_jax.data import augment, pixels
from diffit_jax.data.augment import Augmentation
from diffit_jax.diffusion.seams import Conditioning
from diffit_jax.errors import UserError
from diffit_jax.experiment.sections import Data


class Decode(Protocol):
    """From latents to pictures, on every process.

    Attributes:
      channels: of latents.
    """

    @property
    def channels(self) -> int: ...

    def shape_of(self, latent: tuple[int, ...]) -> tuple[int, int, int]:
        """(H, W, C) of the picture of a latent (h, w, c)."""
        ...

    def __call__(self, latents: np.ndarray) -> np.ndarray:
        """(n, h, w, c) float32 → (n, H, W, C) uint8."""
        ...


class Space(Protocol):
    """What lies between a data set and the network.

    Attributes:
      example: name of the examples in a batch.
      samples: what samples are called in file names.
      note: what is to be said where samples are written; "" is nothing.
    """

    @property
    def example(self) -> str: ...

    @property
    def samples(self) -> str: ...

    @property
    def note(self) -> str: ...

    def enter(
        self, examples: Mapping[str, jax.Array], key_B: jax.Array, frozen: Mapping[str, Any]
    ) -> tuple[jax.Array, Conditioning]:
        """Inside jit: examples as the network sees them.

        Args:
          examples: a batch of a `Source`.
          key_B: (B,) a key for each example, for what is drawn anew each time it is seen.
          frozen: variables by name that training does not change (an autoencoder's).

        Returns:
          (B, H, W, C) float32, and what the network is told of it, `augment` for instance.
        """
        ...

    def leave(self, x_BHWC: jax.Array | np.ndarray) -> np.ndarray:
        """Samples of the network, (n, H, W, C) float32, as they are written to files. Every process
        calls it."""
        ...

    def shape(self, sample: tuple[int, int, int]) -> tuple[int, int, int]:
        """(H, W, C) of what `leave` makes of a sample (H, W, C)."""
        ...

    def decoded(self, decode: Decode, sample: tuple[int, int, int]) -> "Space":
        """The same space, whose samples (H, W, C) leave it as pictures.

        Raises:
          UserError: they are pictures already, or latents of another kind.
        """
        ...

    def preview(self, x_BHWC: np.ndarray) -> np.ndarray:
        """The same, or what `leave` has made of them, as (n, H', W', 1 or 3) uint8 pictures."""
        ...

    def undisturbed(self) -> "Space":
        """The same space, which examples enter as they are, without augmentation."""
        ...

    def batch(self, size: int, shape: tuple[int, ...]) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of a batch of `size` examples that the network sees as (H, W, C)."""
        ...


@dataclasses.dataclass(frozen=True)
class PixelSpace:
    """uint8 images, and float32 in [-1, 1] for the network, augmented anew each time an example is
    seen.

    Attributes:
      rounding: of samples, a name in `pixels.ROUNDINGS`.
      augmentation: what is done to images in training; the network is told by `augment`.
    """

    rounding: str = "edm"
    augmentation: Augmentation = augment.NONE

    @property
    def example(self) -> str:
        return "image"

    @property
    def samples(self) -> str:
        return "samples"

    @property
    def note(self) -> str:
        return ""

    def enter(
        self, examples: Mapping[str, jax.Array], key_B: jax.Array, frozen: Mapping[str, Any]
    ) -> tuple[jax.Array, Conditioning]:
        images = pixels.to_model(examples["image"])
        if not self.augmentation.num_labels:
            return images, {}
        images, labels = augment.augment(self.augmentation, images, key_B)
        return images, {"augment": labels}

    def leave(self, x_BHWC: jax.Array | np.ndarray) -> np.ndarray:
        return np.asarray(pixels.to_pixels(x_BHWC, self.rounding))

    def shape(self, sample: tuple[int, int, int]) -> tuple[int, int, int]:
        return sample

    def decoded(self, decode: Decode, sample: tuple[int, int, int]) -> "Space":
        raise UserError("the samples are images already: leave out --vae")

    def preview(self, x_BHWC: np.ndarray) -> np.ndarray:
        images = x_BHWC if x_BHWC.dtype == np.uint8 else self.leave(x_BHWC)
        return images[..., : 3 if images.shape[-1] >= 3 else 1]

    def undisturbed(self) -> "Space":
        return dataclasses.replace(self, augmentation=augment.NONE)

    def batch(self, size: int, shape: tuple[int, ...]) -> dict[str, jax.ShapeDtypeStruct]:
        return {"image": jax.ShapeDtypeStruct((size, *shape), jnp.uint8), **_labels(size)}


@dataclasses.dataclass(frozen=True)
class LatentSpace:
    """Latents of an autoencoder, scaled to about unit variance. They enter as such, float32, or are
    drawn from their posterior anew each time an example is seen; they leave as such, unless there
    is a decoder.

    Attributes:
      autoencoder: its name.
      latent_mean, latent_scale: of moments, see `sections.Data`.
      decode: makes pictures of samples, or None.
    """

    autoencoder: str
    latent_mean: tuple[float, ...] = (0.0,)
    latent_scale: tuple[float, ...] = (0.18215,)
    decode: Decode | None = None

    @property
    def example(self) -> str:
        return "latent"

    @property
    def samples(self) -> str:
        return "samples" if self.decode else "latents"

    @property
    def note(self) -> str:
        if self.decode:
            return ""
        return f"writing latents of {self.autoencoder}: --vae decodes them to images"

    def enter(
        self, examples: Mapping[str, jax.Array], key_B: jax.Array, frozen: Mapping[str, Any]
    ) -> tuple[jax.Array, Conditioning]:
        if "latent" in examples:
            return examples["latent"], {}
        z_BHWC = drawn(examples["moments"], key_B)
        mean, scale = jnp.array(self.latent_mean), jnp.array(self.latent_scale)
        return (z_BHWC - mean) * scale, {}

    def leave(self, x_BHWC: jax.Array | np.ndarray) -> np.ndarray:
        return self.decode(np.asarray(x_BHWC)) if self.decode else np.asarray(x_BHWC)

    def shape(self, sample: tuple[int, int, int]) -> tuple[int, int, int]:
        return self.decode.shape_of(sample) if self.decode else sample

    def decoded(self, decode: Decode, sample: tuple[int, int, int]) -> "Space":
        if decode.channels != sample[-1]:
            raise UserError(
                f"--vae has latents of {decode.channels} channels, the network makes "
                f"{sample[-1]}: name the autoencoder that it was trained with"
            )
        return dataclasses.replace(self, decode=decode)

    def preview(self, x_BHWC: np.ndarray) -> np.ndarray:
        pictures = x_BHWC.dtype == np.uint8
        return x_BHWC if pictures else np.asarray(pixels.latent_preview(x_BHWC))

    def undisturbed(self) -> "Space":
        return self

    def batch(self, size: int, shape: tuple[int, ...]) -> dict[str, jax.ShapeDtypeStruct]:
        return {"latent": jax.ShapeDtypeStruct((size, *shape), jnp.float32), **_labels(size)}


def drawn(moments_BOHWC: jax.Array, key_B: jax.Array) -> jax.Array:
    """Latents from posteriors, each of an orientation drawn at random.

    Args:
      moments_BOHWC: (B, orientations, H, W, 2C) of any float dtype: mean and log variance.
      key_B: (B,) keys.

    Returns:
      (B, H, W, C) float32: mean + exp(log variance / 2) · noise.
    """
    orientations = moments_BOHWC.shape[1]
    mean_BOHWC, log_variance_BOHWC = jnp.split(moments_BOHWC.astype(jnp.float32), 2, axis=-1)
    turn_key_B, noise_key_B = jax.vmap(jax.random.split, out_axes=1)(key_B)
    turn_B = jax.vmap(lambda key: jax.random.randint(key, (), 0, orientations))(turn_key_B)

    def chosen(x_BOHWC: jax.Array) -> jax.Array:
        # A choice between few, where a gather would be slow.
        picked = x_BOHWC[:, 0]
        for turn in range(1, orientations):
            picked = jnp.where((turn_B == turn)[:, None, None, None], x_BOHWC[:, turn], picked)
        return picked

    mean, log_variance = chosen(mean_BOHWC), chosen(log_variance_BOHWC)
    noise = jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:]))(noise_key_B)
    return mean + jnp.exp(log_variance / 2) * noise


def make_space(data: Data, rounding: str, augmentation: Augmentation = augment.NONE) -> Space:
    """The space of a config: of its sections `data` and `augmentation`, with its
    `sampling.pixel_rounding`.

    Raises:
      UserError: an augmentation of latents.
    """
    if not data.autoencoder:
        return PixelSpace(rounding, augmentation)
    if augmentation.num_labels:
        raise UserError(
            f"config key augmentation.probability is {augmentation.probability}, but the examples "
            f"are latents of {data.autoencoder}: only images are augmented; set it to 0"
        )
    return LatentSpace(data.autoencoder, tuple(data.latent_mean), tuple(data.latent_scale))


def _labels(size: int) -> dict[str, jax.ShapeDtypeStruct]:
    return {"label": jax.ShapeDtypeStruct((size,), jnp.int32)}
