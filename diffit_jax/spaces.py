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

from diffit_jax.data import pixels
from diffit_jax.diffusion.seams import Conditioning
from diffit_jax.errors import UserError


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
      variables: arrays that `enter` and `leave` compute with (an autoencoder's), a pytree. They are
        arguments of jitted functions, like those of networks.
      note: what is to be said where samples are written; "" is nothing.
    """

    @property
    def example(self) -> str: ...

    @property
    def samples(self) -> str: ...

    @property
    def variables(self) -> Any: ...

    @property
    def note(self) -> str: ...

    def enter(
        self, examples: Mapping[str, jax.Array], key_B: jax.Array, variables: Any
    ) -> tuple[jax.Array, Conditioning]:
        """Inside jit: examples as the network sees them.

        Args:
          examples: a batch of a `Source`.
          key_B: (B,) a key for each example, for what is drawn anew each time it is seen.
          variables: `variables`.

        Returns:
          (B, H, W, C) float32, and what the network is told of it, `augment` for instance.
        """
        ...

    def leave(self, x_BHWC: jax.Array | np.ndarray, variables: Any) -> np.ndarray:
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

    def batch(self, size: int, shape: tuple[int, ...]) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of a batch of `size` examples that the network sees as (H, W, C)."""
        ...


@dataclasses.dataclass(frozen=True)
class PixelSpace:
    """uint8 images, and float32 in [-1, 1] for the network.

    Attributes:
      rounding: of samples, a name in `pixels.ROUNDINGS`.
    """

    rounding: str = "edm"

    @property
    def example(self) -> str:
        return "image"

    @property
    def samples(self) -> str:
        return "samples"

    @property
    def variables(self) -> Any:
        return {}

    @property
    def note(self) -> str:
        return ""

    def enter(
        self, examples: Mapping[str, jax.Array], key_B: jax.Array, variables: Any
    ) -> tuple[jax.Array, Conditioning]:
        return pixels.to_model(examples["image"]), {}

    def leave(self, x_BHWC: jax.Array | np.ndarray, variables: Any) -> np.ndarray:
        return np.asarray(pixels.to_pixels(x_BHWC, self.rounding))

    def shape(self, sample: tuple[int, int, int]) -> tuple[int, int, int]:
        return sample

    def decoded(self, decode: Decode, sample: tuple[int, int, int]) -> "Space":
        raise UserError("the samples are images already: leave out --vae")

    def preview(self, x_BHWC: np.ndarray) -> np.ndarray:
        images = x_BHWC if x_BHWC.dtype == np.uint8 else self.leave(x_BHWC, self.variables)
        return images[..., : 3 if images.shape[-1] >= 3 else 1]

    def batch(self, size: int, shape: tuple[int, ...]) -> dict[str, jax.ShapeDtypeStruct]:
        return {"image": jax.ShapeDtypeStruct((size, *shape), jnp.uint8), **_labels(size)}


@dataclasses.dataclass(frozen=True)
class LatentSpace:
    """Latents of an autoencoder, scaled to about unit variance: float32 on both sides, unless there
    is a decoder.

    Attributes:
      autoencoder: its name.
      decode: makes pictures of samples, or None.
    """

    autoencoder: str
    decode: Decode | None = None

    @property
    def example(self) -> str:
        return "latent"

    @property
    def samples(self) -> str:
        return "samples" if self.decode else "latents"

    @property
    def variables(self) -> Any:
        return {}

    @property
    def note(self) -> str:
        if self.decode:
            return ""
        return f"writing latents of {self.autoencoder}: --vae decodes them to images"

    def enter(
        self, examples: Mapping[str, jax.Array], key_B: jax.Array, variables: Any
    ) -> tuple[jax.Array, Conditioning]:
        return examples["latent"], {}

    def leave(self, x_BHWC: jax.Array | np.ndarray, variables: Any) -> np.ndarray:
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

    def batch(self, size: int, shape: tuple[int, ...]) -> dict[str, jax.ShapeDtypeStruct]:
        return {"latent": jax.ShapeDtypeStruct((size, *shape), jnp.float32), **_labels(size)}


def make_space(autoencoder: str, rounding: str) -> Space:
    """The space of a config: of its `data.autoencoder` ("" for pixels), with its
    `sampling.pixel_rounding`."""
    return LatentSpace(autoencoder) if autoencoder else PixelSpace(rounding)


def _labels(size: int) -> dict[str, jax.ShapeDtypeStruct]:
    return {"label": jax.ShapeDtypeStruct((size,), jnp.int32)}
