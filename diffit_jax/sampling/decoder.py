"""From latents to pictures on every device of a mesh."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
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
AT_ONCE = 8  # examples of a slice on an accelerator: rows of a tile of a TPU


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How latents are to be decoded.

    Attributes:
      path: of the autoencoder, see `diffusers.load`.
      dtype: of its convolutions, one of `DTYPES`.
      at_once: latents that a device decodes at once, see `slice_size`.
    """

    path: epath.PathLike
    dtype: str = "float32"
    at_once: int | None = None

    def open(self, mesh: jax.sharding.Mesh, batch_size: int, rounding: str) -> "Decoder":
        """Reads the autoencoder; batches over all devices and the rounding of pixels are those of
        the sampler. Raises `UserError` as `diffusers.load` does."""
        path = hub.local(self.path, "vae", VAE_FILES)
        module, variables = diffusers.load(path, self.dtype, parallel.replicated(mesh))
        per_device = batch_size // mesh.size
        return Decoder(
            module,
            variables,
            mesh,
            batch_per_device=per_device,
            at_once=self.at_once,
            rounding=rounding,
            path=path,
        )


def per_slice(function: Jitted, mesh: jax.sharding.Mesh, size: int) -> Any:
    """A jitted function of (variables on every device, a batch that is divided over them), by which
    each device works through its part in slices, so that its memory holds what is computed for one.

    Args:
      function: of (variables, some examples), to arrays with the examples in front.
      mesh: the devices.
      size: examples of a slice, a divisor of each device's part.
    """

    def work(variables: dict[str, Any], batch: jax.Array) -> Any:
        if len(batch) == size:
            return function(variables, batch)
        slices = batch.reshape(-1, size, *batch.shape[1:])
        worked = jax.lax.map(lambda one: function(variables, one), slices)
        return jax.tree.map(lambda array: array.reshape(-1, *array.shape[2:]), worked)

    return parallel.per_device(work, mesh)


def slice_size(mesh: jax.sharding.Mesh, count: int, at_once: int | None = None) -> int:
    """Examples of a slice of `count` for each device, one where the platform says so.

    Args:
      mesh: the devices.
      count: examples of a device.
      at_once: how many are wanted; None: `AT_ONCE`.
    """
    return 1 if platforms.of_mesh(mesh).decodes_one else min(at_once or AT_ONCE, count)


def batch_sizes(
    mesh: jax.sharding.Mesh, per_device: int, at_once: int | None = None
) -> tuple[int, int]:
    """(examples of a slice, of a call over all devices) where each device shall work through
    `per_device` at least; `at_once` as of `slice_size`."""
    size = slice_size(mesh, per_device, at_once)
    slices = 1 if platforms.of_mesh(mesh).decodes_one else -(-per_device // size)
    return size, parallel.next_batch_size(mesh, slices * size * mesh.size)


class Decoder:
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
        at_once: int | None = None,
        rounding: str = "adm",
        path: epath.PathLike = "",
    ):
        """Prepares a decoder.

        Args:
          module, variables: of the autoencoder.
          mesh: devices to decode on.
          batch_per_device: latents of a call, at least.
          at_once: how many of them a device decodes at once, see `slice_size`.
          rounding: of pixels, a name in `pixels.ROUNDINGS`.
          path: where the variables are from.
        """
        self.path = epath.Path(path)
        self.module, self.variables, self._mesh = module, variables, mesh
        size, self.batch_size = batch_sizes(mesh, batch_per_device, at_once)
        self._decode = per_slice(self._pixels, mesh, size)
        self._rounding = rounding

    def _pixels(self, variables: dict[str, Any], x_Bhwc: jax.Array) -> jax.Array:
        decoded = self.module.apply(variables, self.module.unscaled(x_Bhwc), method="decode")
        assert isinstance(decoded, jax.Array)
        return pixels.to_pixels(decoded, self._rounding)

    @property
    def channels(self) -> int:
        """Of latents."""
        return self.module.latent_channels

    @property
    def dtype(self) -> str:
        """Of the convolutions, one of `DTYPES`."""
        return np.dtype(self.module.dtype).name

    def identity(self) -> dict[str, Any]:
        """JSON values by name of all that pictures of given latents depend on."""
        settings = workdirs.number_settings("autoencoder", self.module)
        return {"contents": checkpoint.fingerprint(self.variables), **settings}

    def lower(self, latent: tuple[int, ...]) -> jax.stages.Lowered:
        """The program for a batch of latents (h, w, c), ready to be compiled."""
        sharding = parallel.batch_sharding(self._mesh)
        shape = (self.batch_size, *latent)
        batch = jax.ShapeDtypeStruct(shape, np.float32, sharding=sharding)
        return self._decode.lower(self.variables, batch)

    def shape_of(self, latent: tuple[int, ...]) -> tuple[int, int, int]:
        """(H, W, C) of the picture of a latent (h, w, c)."""
        factor = self.module.factor
        return latent[0] * factor, latent[1] * factor, self.module.image_channels

    @backend.pinned()
    def __call__(self, latents: np.ndarray) -> np.ndarray:
        """(n, h, w, c) float32 latents as the latent network makes them, any number → (n, H, W, C)
        uint8. The same on every process."""
        arrays = {"latent": np.asarray(latents, np.float32)}

        def decode(batch: dict[str, jax.Array]) -> Any:
            return self._decode(self.variables, batch["latent"])

        return np.concatenate([*parallel.map_batches(decode, self._mesh, self.batch_size, arrays)])
