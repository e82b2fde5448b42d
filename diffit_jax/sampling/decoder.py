"""From latents to images on every device of a mesh."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from diffit_jax import platforms
from diffit_jax.data import pixels
from diffit_jax.interop import diffusers
from diffit_jax.models.pretrained.autoencoder import Autoencoder
from diffit_jax.run import workdir as workdirs
from diffit_jax.runtime import backend, checkpoint, hub, parallel

Jitted = Callable[[dict[str, Any], jax.Array], Any]

DTYPES = ("float32", "bfloat16")
VAE_FILES = ("config.json", "diffusion_pytorch_model*.safetensors*")  # of a folder on the hub
CHUNK_SIZE = 8  # examples of a slice on an accelerator: rows of a tile of a TPU


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How latents are to be decoded.

    Attributes:
      path: of the autoencoder, see `diffusers.load`.
      dtype: of its convolutions, one of `DTYPES`.
      chunk_size: latents that a device decodes at once, see `slice_size`.
    """

    path: epath.PathLike
    dtype: str = "float32"
    chunk_size: int | None = None

    def read(self, mesh: jax.sharding.Mesh) -> tuple[epath.Path, Autoencoder, dict[str, Any]]:
        """Read the autoencoder onto a mesh: where it is, its module and variables.

        Raises `UserError` as `diffusers.load` does.
        """
        path = hub.local(self.path, "vae", VAE_FILES)
        return path, *diffusers.load(path, self.dtype, parallel.replicated(mesh))

    def open(self, mesh: jax.sharding.Mesh, batch_size: int, rounding: str) -> "LatentDecoder":
        """Read the autoencoder's decoder.

        Batches over all devices and the rounding of pixels are those of the sampler. Errors as of
        `read`.
        """
        path, module, variables = self.read(mesh)
        per_device = batch_size // mesh.size
        return LatentDecoder(
            module,
            variables,
            mesh,
            batch_per_device=per_device,
            chunk_size=self.chunk_size,
            rounding=rounding,
            path=path,
        )


def per_slice(function: Jitted, mesh: jax.sharding.Mesh, size: int) -> Any:
    """Jit a function by which each device works through its part of a batch in slices.

    So its memory holds the activations of one slice.

    Args:
      function: of (variables, some examples), to arrays with the examples in front.
      mesh: the devices, each of which has the variables and a part of the batch.
      size: examples of a slice, a divisor of each device's part.
    """

    def work(variables: dict[str, Any], batch: jax.Array) -> Any:
        if len(batch) == size:
            return function(variables, batch)
        slices = batch.reshape(-1, size, *batch.shape[1:])
        worked = jax.lax.map(lambda one: function(variables, one), slices)
        return jax.tree.map(lambda array: array.reshape(-1, *array.shape[2:]), worked)

    return parallel.per_device(work, mesh)


def slice_size(mesh: jax.sharding.Mesh, count: int, chunk_size: int | None = None) -> int:
    """Return the examples of a slice of `count` for each device; one where the platform says so.

    Args:
      mesh: the devices.
      count: examples of a device.
      chunk_size: how many are wanted; None: `CHUNK_SIZE`.
    """
    return 1 if platforms.of_mesh(mesh).decodes_one else min(chunk_size or CHUNK_SIZE, count)


def batch_sizes(
    mesh: jax.sharding.Mesh, per_device: int, chunk_size: int | None = None
) -> tuple[int, int]:
    """Return the sizes of a slice, and of a call over all devices.

    Each device works through at least `per_device` examples; `chunk_size` as of `slice_size`.
    """
    size = slice_size(mesh, per_device, chunk_size)
    slices = 1 if platforms.of_mesh(mesh).decodes_one else -(-per_device // size)
    return size, parallel.next_batch_size(mesh, slices * size * mesh.size)


class LatentDecoder:
    """The autoencoder's decoder. Each device decodes latents of its own, in slices.

    Attributes:
      module: the autoencoder.
      variables: of it, on every device of the mesh.
      batch_size: latents of a call, over all devices.
      path: where it was read from.
    """

    def __init__(
        self,
        module: Autoencoder,
        variables: dict[str, Any],
        mesh: jax.sharding.Mesh,
        *,
        batch_per_device: int,
        chunk_size: int | None = None,
        rounding: str = "adm",
        path: epath.PathLike = "",
    ):
        """Prepare a decoder.

        Args:
          module: the autoencoder.
          variables: of the autoencoder.
          mesh: devices to decode on.
          batch_per_device: latents of a call, at least.
          chunk_size: how many of them a device decodes at once, see `slice_size`.
          rounding: of pixels, a name in `pixels.ROUNDINGS`.
          path: where the variables are from.
        """
        self.path = epath.Path(path)
        self.module, self.variables, self._mesh = module, variables, mesh
        size, self.batch_size = batch_sizes(mesh, batch_per_device, chunk_size)
        self._decode = per_slice(self._pixels, mesh, size)
        self._rounding = rounding

    def _pixels(self, variables: dict[str, Any], x_Bhwc: jax.Array) -> tuple[jax.Array, jax.Array]:
        decoded = self.module.apply(variables, self.module.unscaled(x_Bhwc), method="decode")
        assert isinstance(decoded, jax.Array)
        # Rounded, what is not finite is black.
        finite_B = jnp.isfinite(decoded).reshape(len(decoded), -1).all(axis=1)
        return pixels.to_pixels(decoded, self._rounding), finite_B

    @property
    def channels(self) -> int:
        """Of latents."""
        return self.module.latent_channels

    @property
    def dtype(self) -> str:
        """Of the convolutions, one of `DTYPES`."""
        return np.dtype(self.module.dtype).name

    def identity(self) -> dict[str, Any]:
        """Return all that images of given latents depend on, JSON values by name."""
        settings = workdirs.number_settings("autoencoder", self.module)
        return {"contents": checkpoint.fingerprint(self.variables), **settings}

    def lower(self, latent: tuple[int, ...]) -> jax.stages.Lowered:
        """Lower the program for a batch of latents (h, w, c)."""
        sharding = parallel.batch_sharding(self._mesh)
        shape = (self.batch_size, *latent)
        batch = jax.ShapeDtypeStruct(shape, np.float32, sharding=sharding)
        return self._decode.lower(self.variables, batch)

    def shape_of(self, latent: tuple[int, ...]) -> tuple[int, int, int]:
        """Return the shape of the image (H, W, C) of a latent (h, w, c)."""
        factor = self.module.factor
        return latent[0] * factor, latent[1] * factor, self.module.image_channels

    @property
    def scaling(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and scale of the autoencoder's latents, see `Autoencoder`."""
        return self.module.latent_mean, self.module.latent_scale

    def __call__(self, latents: np.ndarray) -> np.ndarray:
        """Decode latents (n, h, w, c) float32 of the latent network to images (n, H, W, C) uint8.

        Any number, the same on every process.
        """
        return self.checked(latents)[0]

    @backend.reproducible_numerics()
    def checked(self, latents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Decode as a call does; return also (n,) bool, whose pixels were finite."""
        arrays = {"latent": np.asarray(latents, np.float32)}

        def decode(batch: dict[str, jax.Array]) -> Any:
            return self._decode(self.variables, batch["latent"])

        parts = [*parallel.map_batches(decode, self._mesh, self.batch_size, arrays)]
        images, finite = (np.concatenate(each) for each in zip(*parts, strict=True))
        return images, finite
