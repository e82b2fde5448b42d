"""From pictures to the features that metrics compare, on every device of a mesh."""

import os
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from diffit_jax.interop import inception as interop
from diffit_jax.models.pretrained import inception
from diffit_jax.models.pretrained.inception import SPATIAL_CHANNELS, SPATIAL_SIDE, Inception, Taps
from diffit_jax.runtime import backend, checkpoint, hub, parallel

BATCH_PER_DEVICE = 32


class Features(NamedTuple):
    """Of n pictures, float32.

    Attributes:
      pool: (n, 2048), for FID, KID, precision and recall.
      spatial: (n, 2023), for sFID: 17 × 17 × 7, rows first and channels last.
      logits: (n, 1008), for the Inception Score.
    """

    pool: np.ndarray
    spatial: np.ndarray
    logits: np.ndarray


class Extractor:
    """The FID network, float32 with the highest precision of products on every platform. Each
    device works on pictures of its own: of the published network their number changes no bit. (Of a
    much narrower one it can, on a CPU, whose threads divide a sum where there are few of them.)

    Attributes:
      rule: how pictures are resized and scaled, a name in `inception.RULES`.
      batch_size: pictures of a call, over all devices.
      sizes: of the features of a picture: "mu" pooled, "mu_s" spatial.
    """

    def __init__(
        self,
        module: Inception,
        variables: dict[str, Any],
        mesh: jax.sharding.Mesh,
        rule: str = "tf1",
        batch_per_device: int = BATCH_PER_DEVICE,
    ):
        """`variables`: of the network, on every device of the mesh."""
        self.rule, self._mesh, self._variables = rule, mesh, variables
        self.batch_size = parallel.next_batch_size(mesh, batch_per_device * mesh.size)
        pooled = variables["params"]["logits_kernel"].shape[0]
        self.sizes = {"mu": pooled, "mu_s": SPATIAL_SIDE**2 * SPATIAL_CHANNELS}

        def extract(variables: dict[str, Any], images_BHWC: jax.Array) -> Taps:
            pictures = inception.resized(images_BHWC, rule)
            taps = module.apply(variables, inception.normalised(pictures, rule))
            assert isinstance(taps, Taps)
            return taps

        self._extract = parallel.per_device(extract, mesh)

    @classmethod
    def load(
        cls,
        path: epath.PathLike,
        mesh: jax.sharding.Mesh,
        rule: str = "tf1",
        batch_per_device: int = BATCH_PER_DEVICE,
    ) -> "Extractor":
        """With the weights of a file, see `interop.inception`; errors as there."""
        if os.fspath(path) != interop.RANDOM:
            path = hub.local(path, "inception")
        module, variables = interop.load(path, parallel.replicated(mesh))
        return cls(module, variables, mesh, rule, batch_per_device)

    def facts(self) -> dict[str, Any]:
        """JSON values by name of what features depend on."""
        return {
            "resize": self.rule,
            "precision": "float32, highest",
            "inception": checkpoint.fingerprint(self._variables),
            "device": self._mesh.devices.flat[0].device_kind,
            "devices": self._mesh.size,
        }

    def lower(self, shape: tuple[int, ...]) -> jax.stages.Lowered:
        """The program for a batch of pictures of a shape (H, W, 3), ready to be compiled."""
        sharding = parallel.batch_sharding(self._mesh)
        batch = jax.ShapeDtypeStruct((self.batch_size, *shape), np.uint8, sharding=sharding)
        return self._extract.lower(self._variables, batch)

    @backend.pinned()
    def __call__(self, images: np.ndarray) -> Features:
        """Of (n, H, W, 3 or 1) uint8 pictures, at most `batch_size`; grey ones count as three equal
        channels. The same on every process."""
        if images.shape[-1] == 1:
            images = np.repeat(images, 3, axis=-1)

        def extract(batch: dict[str, jax.Array]) -> Any:
            return self._extract(self._variables, batch["image"])

        (taps,) = parallel.map_batches(extract, self._mesh, self.batch_size, {"image": images})
        pool, spatial, logits = taps
        return Features(pool, spatial.reshape(len(images), -1), logits)
