"""From images to the moments of their latents, and features, on every device of a mesh."""

import concurrent.futures
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffit_jax.data import pixels
from diffit_jax.data.records import FEATURES, MOMENTS
from diffit_jax.interop import dinov2
from diffit_jax.models.pretrained.autoencoder import Autoencoder
from diffit_jax.models.pretrained.dinov2 import DINOv2
from diffit_jax.run import workdir as workdirs
from diffit_jax.run.representation import encoded
from diffit_jax.runtime import backend, checkpoint, parallel
from diffit_jax.sampling.decoder import batch_sizes, per_slice


class FeatureEncoder(NamedTuple):
    """An encoder whose tokens are kept beside moments.

    Attributes:
      module, variables: of it.
    """

    module: DINOv2
    variables: Any

    def identity(self, grid: tuple[int, int]) -> dict[str, Any]:
        """Return all that features of given images on a grid depend on, JSON values by name."""
        return {
            "network": dinov2.name_of(self.module),
            "contents": checkpoint.fingerprint(self.variables),
            "positions": self.module.positions,
            "dtype": np.dtype(self.module.dtype).name,
            "grid": list(grid),
        }


class ImageEncoder:
    """The autoencoder's encoder on a mesh: each device encodes images of its own, in slices.

    Meanwhile the next ones are brought.

    Attributes:
      module: the autoencoder.
      variables: of it, on every device of the mesh.
      batch_size: images of a call, over all devices.
      waited_s: seconds for which the devices had nothing to do since the first call.
    """

    def __init__(
        self,
        module: Autoencoder,
        variables: dict[str, Any],
        mesh: jax.sharding.Mesh,
        *,
        batch_per_device: int,
        orientations: int = 2,
        chunk_size: int | None = None,
        features: FeatureEncoder | None = None,
    ):
        """Prepare an encoder.

        Args:
          module: the autoencoder.
          variables: of the autoencoder.
          mesh: devices of this process to encode on.
          batch_per_device: images of a call.
          orientations: 2: the image and its mirror image; 1: the image.
          chunk_size: how many of them a device encodes at once, see `slice_size`.
          features: the encoder whose tokens are wanted too.
        """
        self.features = features
        self._variables = {"vae": variables, "encoder": features and features.variables}
        self.module, self.variables, self._mesh = module, variables, mesh
        self.orientations = orientations
        size, self.batch_size = batch_sizes(mesh, batch_per_device, chunk_size)
        self._encode = per_slice(self._arrays, mesh, size)
        self._fetch = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="moments")
        self._last: concurrent.futures.Future | None = None
        self.waited_s = 0.0

    def _arrays(self, variables: dict[str, Any], image_BHWC: jax.Array) -> dict[str, jax.Array]:
        def moments_of(image_BHWC: jax.Array) -> jax.Array:
            x = pixels.to_model(image_BHWC)
            moments: Any = self.module.apply(variables["vae"], x, method="encode")
            return jnp.concatenate(moments, axis=-1)

        def features_of(image_BHWC: jax.Array) -> jax.Array:
            assert self.features is not None
            grid = self.grid_of(image_BHWC.shape[1:])
            return encoded(self.features.module, variables["encoder"], image_BHWC, grid)

        ways = [image_BHWC, image_BHWC[:, :, ::-1]][: self.orientations]
        wanted = {MOMENTS: moments_of} | ({FEATURES: features_of} if self.features else {})
        return {
            name: jnp.stack([function(way) for way in ways], axis=1)
            for name, function in wanted.items()
        }

    def shape_of(self, image: tuple[int, ...]) -> tuple[int, int, int, int]:
        """Return the shape (orientations, h, w, 2c) of the moments of an image (H, W, C)."""
        factor, channels = self.module.factor, self.module.latent_channels
        return self.orientations, image[0] // factor, image[1] // factor, 2 * channels

    def grid_of(self, image: tuple[int, ...]) -> tuple[int, int]:
        """Return rows and columns of an image's features: as a network with patches of 2 has them.

        The image is (H, W, C).
        """
        _, height, width, _ = self.shape_of(image)
        return height // 2, width // 2

    def shape_of_features(self, image: tuple[int, ...]) -> tuple[int, int, int]:
        """Return the shape (orientations, 1 + patches, channels) of those of an image (H, W, C)."""
        assert self.features is not None
        rows, columns = self.grid_of(image)
        return self.orientations, 1 + rows * columns, self.features.module.width

    def identity(self) -> dict[str, Any]:
        """Return all that moments of given images depend on, JSON values by name."""
        return {
            "contents": checkpoint.fingerprint(self.variables),
            "orientations": self.orientations,
            **workdirs.number_settings("autoencoder", self.module),
        }

    @backend.reproducible_numerics()
    def start(self, images: np.ndarray) -> concurrent.futures.Future:
        """Begin to encode.

        Args:
          images: (n, H, W, C) uint8, n at most `batch_size`.

        Returns:
          What becomes (arrays by name, when they were there): `moments` (n, orientations, h, w,
          2c) float32, mean and log variance, and perhaps `features` (n, orientations, 1 + patches,
          channels); seconds of `time.monotonic`.
        """
        now, count = time.monotonic(), len(images)
        if self._last is not None and self._last.done():
            self.waited_s += max(0.0, now - self._last.result()[1])
        batch = parallel.put_padded(self._mesh, {"image": images}, self.batch_size)["image"]
        arrays = self._encode(self._variables, batch)

        def fetch() -> tuple[dict[str, np.ndarray], float]:
            there = {name: np.asarray(array)[:count] for name, array in arrays.items()}
            return there, time.monotonic()

        self._last = self._fetch.submit(fetch)
        return self._last
