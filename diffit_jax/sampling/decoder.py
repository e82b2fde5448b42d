"""From latents to pictures on every device of a mesh."""

from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec

from diffit_jax.data import pixels
from diffit_jax.models.autoencoder import Autoencoder
from diffit_jax.runtime import backend, distributed, parallel, rows


class Decoder:
    """The autoencoder's decoder. Each device decodes latents of its own, in slices, so that its
    memory holds the activations of one slice; their size changes no picture beyond rounding.

    Attributes:
      module: the autoencoder.
      variables: of it, on every device of the mesh.
      batch_size: latents of a call, over all devices.
    """

    def __init__(
        self,
        module: Autoencoder,
        variables: dict[str, Any],
        mesh: jax.sharding.Mesh,
        batch_per_device: int,
        slice_size: int = 1,
        rounding: str = "adm",
    ):
        """
        Args:
          module, variables: of the autoencoder.
          mesh: devices to decode on.
          batch_per_device: latents of a call.
          slice_size: how many a device decodes at once.
          rounding: of pixels, a name in `pixels.ROUNDINGS`.
        """
        self.module, self.variables, self._mesh = module, variables, mesh
        self.batch_size = rows.next_batch_size(mesh, batch_per_device * mesh.size)
        slice_size = min(slice_size, self.batch_size // mesh.size)

        def decode(variables: dict[str, Any], x_Bhwc: jax.Array) -> jax.Array:
            def of_slice(x_hwc: jax.Array) -> jax.Array:
                return module.apply(variables, module.unscaled(x_hwc[None]), method="decode")[0]

            return pixels.to_pixels(jax.lax.map(of_slice, x_Bhwc, batch_size=slice_size), rounding)

        divided = parallel.batch_sharding(mesh).spec
        per_device = jax.shard_map(
            decode,
            mesh=mesh,
            in_specs=(PartitionSpec(), divided),
            out_specs=divided,
            check_vma=False,
        )
        self._decode = jax.jit(per_device, out_shardings=parallel.batch_sharding(mesh))

    def shape_of(self, latent: tuple[int, ...]) -> tuple[int, int, int]:
        """(H, W, C) of the picture of a latent (h, w, c)."""
        factor = self.module.factor
        return latent[0] * factor, latent[1] * factor, self.module.image_channels

    @backend.pinned()
    def __call__(self, latents: np.ndarray) -> np.ndarray:
        """(n, h, w, c) float32 latents as the latent network makes them, any number → (n, H, W, C)
        uint8. The same on every process."""
        size, pictures = self.batch_size, []
        mine = rows.local_rows(self._mesh, size)
        for start in range(0, len(latents), size):
            part = np.asarray(latents[start : start + size], np.float32)
            padded = np.pad(part, ((0, size - len(part)), *[(0, 0)] * 3), mode="edge")
            batch = rows.put_batch(self._mesh, {"latent": padded[mine]}, size)["latent"]
            decoded = distributed.gather(self._decode(self.variables, batch))
            pictures.append(decoded[: len(part)])
        return np.concatenate(pictures)
