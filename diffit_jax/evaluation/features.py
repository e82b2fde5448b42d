"""From images to the features that metrics compare, on every device of a mesh."""

import os
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from diffit_jax.interop import inception as interop
from diffit_jax.models.pretrained import inception
from diffit_jax.models.pretrained.inception import (
    SPATIAL_CHANNELS,
    SPATIAL_SIDE,
    Inception,
    InceptionOutputs,
)
from diffit_jax.runtime import backend, checkpoint, hub, parallel

BATCH_PER_DEVICE = 32


class Features(NamedTuple):
    """Of n images, float32.

    Attributes:
      pool: (n, 2048), for FID, KID, precision and recall.
      spatial: (n, 2023), for sFID: 17 × 17 × 7, rows first and channels last.
      logits: (n, 1008), for the Inception Score.
    """

    pool: np.ndarray
    spatial: np.ndarray
    logits: np.ndarray


class Extractor:
    """The FID network on a mesh, float32 with the highest precision of products on every platform.

    Each device computes its own images: with the published weights the features are bit-identical
    for any number of devices. (A much narrower network's can differ on a CPU, whose threads divide
    a sum where there are few of them.)

    Attributes:
      rule: how images are resized and scaled, a name in `inception.RULES`.
      batch_size: images of a call, over all devices.
      sizes: of the features of an image: "mu" pooled, "mu_s" spatial.
    """

    def __init__(
        self,
        module: Inception,
        variables: dict[str, Any],
        mesh: jax.sharding.Mesh,
        rule: str = "tf1",
        batch_per_device: int = BATCH_PER_DEVICE,
    ):
        """Prepare an extractor; `variables`: of the network, on every device of the mesh."""
        self.rule, self._mesh, self._variables = rule, mesh, variables
        self.batch_size = parallel.next_batch_size(mesh, batch_per_device * mesh.size)
        pooled = variables["params"]["logits_kernel"].shape[0]
        self.sizes = {"mu": pooled, "mu_s": SPATIAL_SIDE**2 * SPATIAL_CHANNELS}

        def extract(variables: dict[str, Any], images_BHWC: jax.Array) -> InceptionOutputs:
            resized_BHWC = inception.resized(images_BHWC, rule)
            outputs = module.apply(variables, inception.normalised(resized_BHWC, rule))
            assert isinstance(outputs, InceptionOutputs)
            return outputs

        self._extract = parallel.per_device(extract, mesh)

    @classmethod
    def load(
        cls,
        path: epath.PathLike,
        mesh: jax.sharding.Mesh,
        rule: str = "tf1",
        batch_per_device: int = BATCH_PER_DEVICE,
    ) -> "Extractor":
        """Load the weights of a file, see `interop.inception`; errors as there."""
        if os.fspath(path) != interop.RANDOM:
            path = hub.local(path, "inception")
        module, variables = interop.load(path, parallel.replicated(mesh))
        return cls(module, variables, mesh, rule, batch_per_device)

    def metadata(self) -> dict[str, Any]:
        """Return what features depend on, JSON values by name."""
        return {
            "resize": self.rule,
            "precision": "float32, highest",
            "inception": checkpoint.fingerprint(self._variables),
            "device": self._mesh.devices.flat[0].device_kind,
            "devices": self._mesh.size,
        }

    def lower(self, shape: tuple[int, ...]) -> jax.stages.Lowered:
        """Lower the program for a batch of images of a shape (H, W, 3)."""
        sharding = parallel.batch_sharding(self._mesh)
        batch = jax.ShapeDtypeStruct((self.batch_size, *shape), np.uint8, sharding=sharding)
        return self._extract.lower(self._variables, batch)

    @backend.reproducible_numerics()
    def __call__(self, images: np.ndarray) -> Features:
        """Extract the features of images (n, H, W, 3 or 1) uint8, n at most `batch_size`.

        Grey ones count as three equal channels. The same on every process.
        """
        if images.shape[-1] == 1:
            images = np.repeat(images, 3, axis=-1)

        def extract(batch: dict[str, jax.Array]) -> Any:
            return self._extract(self._variables, batch["image"])

        (outputs,) = parallel.map_batches(extract, self._mesh, self.batch_size, {"image": images})
        pool, spatial, logits = outputs
        return Features(pool, spatial.reshape(len(images), -1), logits)
