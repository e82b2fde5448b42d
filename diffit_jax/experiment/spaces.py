"""Spaces: how examples become the network's input, and samples become files.

As pixels, or as latents of an autoencoder. Nothing else asks which of the two an experiment has.

Shape suffixes: B batch, H, W, C height, width and channels of the network's input.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from diffit_jax.data import augment, pixels
from diffit_jax.data.augment import Augmentation
from diffit_jax.diffusion.types import Conditioning
from diffit_jax.errors import UserError
from diffit_jax.experiment.sections import Data


class Decode(Protocol):
    """From latents to images, on every process.

    Attributes:
      channels: of latents.
    """

    @property
    def channels(self) -> int:
        """Channels of a latent."""
        ...

    def shape_of(self, latent: tuple[int, ...]) -> tuple[int, int, int]:
        """Return the shape of the image (H, W, C) of a latent (h, w, c)."""
        ...

    def __call__(self, latents: np.ndarray) -> np.ndarray:
        """Decode latents (n, h, w, c) float32 to images (n, H, W, C) uint8."""
        ...

    def checked(self, latents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Decode as a call does; return also (n,) bool, whose pixels were finite."""
        ...

    @property
    def scaling(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and scale of the latents, see `LatentSpace`."""
        ...


class Space(Protocol):
    """The conversions between a data set and the network.

    Attributes:
      example: name of the examples in a batch.
      samples: what samples are called in file names.
      note: what is to be said where samples are written; "" is nothing.
    """

    @property
    def example(self) -> str:
        """The word for examples in a batch: image or latent."""
        ...

    @property
    def samples(self) -> str:
        """The word for samples in file names: "samples" or "latents"."""
        ...

    @property
    def note(self) -> str:
        """A remark for the log where samples are written; empty is none."""
        ...

    def to_model(
        self, examples: Mapping[str, jax.Array], key_B: jax.Array, frozen: Mapping[str, Any]
    ) -> tuple[jax.Array, Conditioning]:
        """Turn examples into the network's input. Call inside jit.

        Args:
          examples: a batch of a `Source`.
          key_B: (B,) a key for each example, for what is drawn anew each time it is seen.
          frozen: variables by name that training does not change (an autoencoder's).

        Returns:
          (B, H, W, C) float32, and the conditioning that follows, `augment` for instance.
        """
        ...

    def beside(
        self, examples: Mapping[str, jax.Array], x_BHWC: jax.Array, key_B: jax.Array
    ) -> dict[str, jax.Array]:
        """Return what belongs to the network's input, in the orientation that was drawn for it.

        Args:
          examples: a batch of a `Source`.
          x_BHWC: what `to_model` made of them.
          key_B: (B,) keys, the same.

        Returns:
          `image` (B, H, W, C) in 0 to 255, and `features` (B, 1 + L, D), those that are there.
        """
        ...

    def from_model(self, x_BHWC: jax.Array | np.ndarray) -> np.ndarray:
        """Turn samples of the network, (n, H, W, C) float32, into the arrays of files.

        Every process calls it.
        """
        ...

    def from_model_checked(self, x_BHWC: jax.Array | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Do as `from_model`; return also (n,) bool, which samples and pixels are finite."""
        ...

    def shape(self, sample: tuple[int, int, int]) -> tuple[int, int, int]:
        """Return the shape (H, W, C) of `from_model`'s result for a sample (H, W, C)."""
        ...

    def decoded(self, decode: Decode, sample: tuple[int, int, int]) -> "Space":
        """Return the same space, whose samples (H, W, C) are decoded to images.

        Raises:
          UserError: they are images already, or latents of another kind.
        """
        ...

    def preview(self, x_BHWC: np.ndarray) -> np.ndarray:
        """Show samples (n, H, W, C), or results of `from_model`, as images.

        (n, H', W', 1 or 3) uint8.

        """
        ...

    def without_augmentation(self) -> "Space":
        """Return the same space without augmentation."""
        ...

    def batch(self, size: int, shape: tuple[int, ...]) -> dict[str, jax.ShapeDtypeStruct]:
        """Return shapes and dtypes of a batch of `size` examples, (H, W, C) for the network."""
        ...


@dataclasses.dataclass(frozen=True)
class PixelSpace:
    """Pixels: uint8 images in files, float32 in [-1, 1] for the network.

    Images are augmented anew each time an example is seen.

    Attributes:
      rounding: of samples, a name in `pixels.ROUNDINGS`.
      augmentation: of images in training; the network is conditioned on it (`augment`).
    """

    rounding: str = "edm"
    augmentation: Augmentation = augment.NONE

    @property
    def example(self) -> str:
        """The array of a record that it takes."""
        return "image"

    @property
    def samples(self) -> str:
        """The word for samples in file names."""
        return "samples"

    @property
    def note(self) -> str:
        """A remark for the log where samples are written: none."""
        return ""

    def to_model(
        self, examples: Mapping[str, jax.Array], key_B: jax.Array, frozen: Mapping[str, Any]
    ) -> tuple[jax.Array, Conditioning]:
        """Scale uint8 images (B, H, W, C) to [-1, 1] and augment them."""
        images = pixels.to_model(examples["image"])
        if not self.augmentation.probability or not self.augmentation.num_labels:
            return images, {}
        images, labels = augment.augment(self.augmentation, images, key_B)
        return images, {"augment": labels}

    def beside(
        self, examples: Mapping[str, jax.Array], x_BHWC: jax.Array, key_B: jax.Array
    ) -> dict[str, jax.Array]:
        """Return `image`, the augmented one (B, H, W, C) float32, and `features`, if they are."""
        found = {"image": (x_BHWC + 1) * 127.5}
        if "features" in examples and not self.augmentation.probability:
            found["features"] = examples["features"][:, 0]
        return found

    def from_model(self, x_BHWC: jax.Array | np.ndarray) -> np.ndarray:
        """Round samples (n, H, W, C) to uint8."""
        return np.asarray(pixels.to_pixels(x_BHWC, self.rounding))

    def from_model_checked(self, x_BHWC: jax.Array | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Round samples (n, H, W, C) to uint8; return also (n,) bool, which are finite."""
        return self.from_model(x_BHWC), _finite(x_BHWC)

    def shape(self, sample: tuple[int, int, int]) -> tuple[int, int, int]:
        """Return the shape of a sample in a file: the network's."""
        return sample

    def decoded(self, decode: Decode, sample: tuple[int, int, int]) -> "Space":
        """Raise `UserError`: samples are images already."""
        raise UserError("the samples are images already: leave out --vae")

    def preview(self, x_BHWC: np.ndarray) -> np.ndarray:
        """Return the images, (n, H, W, C) uint8."""
        images = x_BHWC if x_BHWC.dtype == np.uint8 else self.from_model(x_BHWC)
        return images[..., : 3 if images.shape[-1] >= 3 else 1]

    def without_augmentation(self) -> "Space":
        """Return the same space without augmentation."""
        return dataclasses.replace(self, augmentation=augment.NONE)

    def batch(self, size: int, shape: tuple[int, ...]) -> dict[str, jax.ShapeDtypeStruct]:
        """Return the shapes of a batch of uint8 images (B, H, W, C) with labels (B,)."""
        return {"image": jax.ShapeDtypeStruct((size, *shape), jnp.uint8), **_labels(size)}


def _finite(x_BHWC: jax.Array | np.ndarray) -> np.ndarray:
    return np.asarray(np.isfinite(np.asarray(x_BHWC)).reshape(len(x_BHWC), -1).all(axis=1))


@dataclasses.dataclass(frozen=True)
class LatentSpace:
    """Latents of an autoencoder, scaled to about unit variance.

    Examples are float32 latents, or moments from whose posterior latents are drawn anew each time
    an example is seen. Samples are latents too, unless there is a decoder.

    Attributes:
      autoencoder: its name.
      latent_mean, latent_scale: of moments, see `sections.Data`.
      decode: decodes samples to images, or None.
    """

    autoencoder: str
    latent_mean: tuple[float, ...] = (0.0,)
    latent_scale: tuple[float, ...] = (0.18215,)
    decode: Decode | None = None

    @property
    def example(self) -> str:
        """The array of a record that it takes."""
        return "latent"

    @property
    def samples(self) -> str:
        """The word for samples in file names."""
        return "samples" if self.decode else "latents"

    @property
    def note(self) -> str:
        """A remark for the log where latents are written, how to decode them; "" with a decoder."""
        if self.decode:
            return ""
        return f"writing latents of {self.autoencoder}: --vae decodes them to images"

    def to_model(
        self, examples: Mapping[str, jax.Array], key_B: jax.Array, frozen: Mapping[str, Any]
    ) -> tuple[jax.Array, Conditioning]:
        """Draw latents (B, H, W, C) from moments and scale them, or take float32 latents."""
        if "latent" in examples:
            return examples["latent"], {}
        z_BHWC = sample_posterior(examples["moments"], key_B)
        mean, scale = jnp.array(self.latent_mean), jnp.array(self.latent_scale)
        return (z_BHWC - mean) * scale, {}

    def beside(
        self, examples: Mapping[str, jax.Array], x_BHWC: jax.Array, key_B: jax.Array
    ) -> dict[str, jax.Array]:
        """Return `image` (B, H, W, C) uint8 and `features`, turned as the latents are."""
        turn_B = jnp.zeros(len(x_BHWC), jnp.int32)
        if "moments" in examples:
            turn_B = drawn_turn(key_B, examples["moments"].shape[1])
        found = {}
        if "image" in examples:
            image_BHWC = examples["image"]
            turned = (turn_B == 1)[:, None, None, None]
            found["image"] = jnp.where(turned, image_BHWC[:, :, ::-1], image_BHWC)
        if "features" in examples:
            found["features"] = _of_turn(examples["features"], turn_B)
        return found

    def from_model(self, x_BHWC: jax.Array | np.ndarray) -> np.ndarray:
        """Decode samples (n, H, W, C) to images, or return them as they are."""
        return self.decode(np.asarray(x_BHWC)) if self.decode else np.asarray(x_BHWC)

    def from_model_checked(self, x_BHWC: jax.Array | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Decode samples if there is a decoder; return also (n,) bool, which are finite."""
        finite = _finite(x_BHWC)
        if self.decode is None:
            return np.asarray(x_BHWC), finite
        images, decoded = self.decode.checked(np.asarray(x_BHWC))
        return images, finite & decoded

    def shape(self, sample: tuple[int, int, int]) -> tuple[int, int, int]:
        """Return the shape of a sample in a file: the network's, or a decoded image's."""
        return self.decode.shape_of(sample) if self.decode else sample

    def decoded(self, decode: Decode, sample: tuple[int, int, int]) -> "Space":
        """Return the space with a decoder. Raises `UserError` for latents of another kind."""
        if decode.channels != sample[-1]:
            raise UserError(
                f"--vae has latents of {decode.channels} channels, the network makes "
                f"{sample[-1]}: name the autoencoder that it was trained with"
            )
        self.check_scaling(*decode.scaling)
        return dataclasses.replace(self, decode=decode)

    def check_scaling(self, mean: Sequence[float], scale: Sequence[float]) -> None:
        """Raise `UserError` if an autoencoder's latents are scaled otherwise than these."""
        theirs = {"latent_mean": mean, "latent_scale": scale}
        for key, numbers in theirs.items():
            ours = getattr(self, key)
            alike = len(ours) == len(numbers) or 1 in (len(ours), len(numbers))
            if not (alike and np.allclose(ours, numbers)):
                given, listed = (
                    ", ".join(f"{number:g}" for number in dict.fromkeys(each))
                    for each in (numbers, ours)
                )
                raise UserError(
                    f"--vae has {key} {given} (by its config), the network's latents have {listed} "
                    f"(config key data.{key}): name the autoencoder that it was trained with"
                )

    def preview(self, x_BHWC: np.ndarray) -> np.ndarray:
        """Return images (n, H', W', C) as they are, of latents the first channels as an image."""
        decoded = x_BHWC.dtype == np.uint8
        return x_BHWC if decoded else np.asarray(pixels.latent_preview(x_BHWC))

    def without_augmentation(self) -> "Space":
        """Return itself: latents have no augmentation."""
        return self

    def batch(self, size: int, shape: tuple[int, ...]) -> dict[str, jax.ShapeDtypeStruct]:
        """Return the shapes of a batch of float32 latents (B, H, W, C) with labels (B,)."""
        return {"latent": jax.ShapeDtypeStruct((size, *shape), jnp.float32), **_labels(size)}


def sample_posterior(moments_BOHWC: jax.Array, key_B: jax.Array) -> jax.Array:
    """Draw latents from posteriors, each of a random orientation.

    Args:
      moments_BOHWC: (B, orientations, H, W, 2C) of any float dtype: mean and log variance.
      key_B: (B,) keys.

    Returns:
      (B, H, W, C) float32: mean + exp(log variance / 2) · noise.
    """
    orientations = moments_BOHWC.shape[1]
    mean_BOHWC, log_variance_BOHWC = jnp.split(moments_BOHWC.astype(jnp.float32), 2, axis=-1)
    _, noise_key_B = _turn_and_noise(key_B)
    turn_B = drawn_turn(key_B, orientations)
    mean, log_variance = (_of_turn(each, turn_B) for each in (mean_BOHWC, log_variance_BOHWC))
    noise = jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:]))(noise_key_B)
    return mean + jnp.exp(log_variance / 2) * noise


def drawn_turn(key_B: jax.Array, orientations: int) -> jax.Array:
    """Return the orientation that `sample_posterior` draws: (B,) int32, 0 as it is, 1 mirrored."""
    turn_key_B, _ = _turn_and_noise(key_B)
    return jax.vmap(lambda key: jax.random.randint(key, (), 0, orientations))(turn_key_B)


def _turn_and_noise(key_B: jax.Array) -> jax.Array:
    return jax.vmap(jax.random.split, out_axes=1)(key_B)


def _of_turn(x_BO: jax.Array, turn_B: jax.Array) -> jax.Array:
    """Choose one of the orientations of each example, (B, …) of (B, orientations, …)."""
    # A choice between few, where a gather would be slow.
    picked = x_BO[:, 0]
    for turn in range(1, x_BO.shape[1]):
        chosen_B = (turn_B == turn).reshape(-1, *(1,) * (picked.ndim - 1))
        picked = jnp.where(chosen_B, x_BO[:, turn], picked)
    return picked


def make_space(data: Data, rounding: str, augmentation: Augmentation = augment.NONE) -> Space:
    """Make the space of a config's sections `data` and `augmentation`.

    Args:
      data: section `data`.
      rounding: its `sampling.pixel_rounding`.
      augmentation: section `augmentation`.

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
