"""From images to the features that metrics compare, on every device of a mesh."""

import functools
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from diffit_jax.errors import UserError
from diffit_jax.interop import dinov2 as interop_dinov2
from diffit_jax.interop import inception as interop
from diffit_jax.models.pretrained import inception, resizing
from diffit_jax.models.pretrained.dinov2 import DINOv2
from diffit_jax.models.pretrained.inception import SPATIAL_CHANNELS, SPATIAL_SIDE, Inception
from diffit_jax.runtime import backend, checkpoint, hub, parallel

BATCH_PER_DEVICE = 32


class Features(NamedTuple):
    """Of n images, float32; None where the network that makes them is not there.

    Attributes:
      pool: (n, 2048) of Inception, for FID, KID, precision and recall.
      spatial: (n, 2023) of it, for sFID: 17 × 17 × 7, rows first and channels last.
      logits: (n, 1008) of it, for the Inception Score.
      dinov2: (n, d) DINOv2's class token behind its last normalisation.
    """

    pool: Any = None
    spatial: Any = None
    logits: Any = None
    dinov2: Any = None


class OfInception(NamedTuple):
    """The FID network.

    Attributes:
      module, variables: of it.
      rule: how images are resized and scaled, a name in `inception.RULES`.
    """

    module: Inception
    variables: Any
    rule: str = "tf1"

    def sizes(self) -> dict[str, int]:
        """Return the number of features, by the name of their mean in a reference."""
        pooled = self.variables["params"]["logits_kernel"].shape[0]
        return {"mu": pooled, "mu_s": SPATIAL_SIDE**2 * SPATIAL_CHANNELS}

    def metadata(self) -> dict[str, Any]:
        """Return what its features depend on."""
        return {"resize": self.rule, "inception": checkpoint.fingerprint(self.variables)}

    def features(self, variables: Any, images_BHWC: jax.Array) -> dict[str, jax.Array]:
        """Extract features of images (B, H, W, 3) uint8."""
        resized_BHWC = inception.resized(images_BHWC, self.rule)
        found: Any = self.module.apply(variables, inception.normalised(resized_BHWC, self.rule))
        return found._asdict()


class OfDINOv2(NamedTuple):
    """DINOv2, whose class token FD-DINOv2 compares.

    Attributes:
      module, variables: of it; dgm-eval and EDM2 have ViT-L/14.
      rule: how images are resized, a name in `resizing.DISTANCE_RULES`.
    """

    module: DINOv2
    variables: Any
    rule: str = "dgm_eval"

    def sizes(self) -> dict[str, int]:
        """Return the number of features, by the name of their mean in a reference."""
        return {"mu_dinov2": self.module.width}

    def metadata(self) -> dict[str, Any]:
        """Return what its features depend on."""
        return {
            "dinov2": {
                "network": interop_dinov2.name_of(self.module) or "of another size",
                "weights": checkpoint.fingerprint(self.variables),
                "resize": self.rule,
                "positions": self.module.positions,
                "layer": "class token behind the last normalisation",
                "size": self.module.width,
                "dtype": np.dtype(self.module.dtype).name,
            }
        }

    def features(self, variables: Any, images_BHWC: jax.Array) -> dict[str, jax.Array]:
        """Extract features of images (B, H, W, 3) uint8."""
        seen_BHWC = resizing.prepared(images_BHWC, self.rule, self.module.patch)
        found: Any = self.module.apply(variables, seen_BHWC)
        return {"dinov2": found.class_BD}


class Networks(NamedTuple):
    """The networks that make features, as they are named: weights, and rules of resizing.

    Attributes:
      inception: weights of the FID network, see `interop.inception`; "": none.
      resize: a name in `inception.RULES`: ADM's, or pytorch-fid's.
      dinov2: weights of DINOv2, see `interop.dinov2`; "": none.
      dinov2_resize: a name in `resizing.DISTANCE_RULES`: dgm-eval's, EDM2's …
    """

    inception: epath.PathLike = ""
    resize: str = "tf1"
    dinov2: epath.PathLike = ""
    dinov2_resize: str = "dgm_eval"


class Extractor:
    """Networks on a mesh, float32 with the highest precision of products on every platform.

    Each device computes its own images: with the published weights the features are bit-identical
    for any number of devices. (A much narrower network's can differ on a CPU, whose threads divide
    a sum where there are few of them.)

    Attributes:
      batch_size: images of a call, over all devices.
      sizes: of the features of an image: "mu" pooled, "mu_s" spatial, "mu_dinov2" class token.
    """

    def __init__(
        self,
        networks: Mapping[str, OfInception | OfDINOv2],
        mesh: jax.sharding.Mesh,
        batch_per_device: int = BATCH_PER_DEVICE,
    ):
        """Prepare an extractor of networks by name, their variables on every device of the mesh."""
        self._networks, self._mesh = networks, mesh
        self.batch_size = parallel.next_batch_size(mesh, batch_per_device * mesh.size)
        self.sizes = {k: size for one in networks.values() for k, size in one.sizes().items()}
        self._variables = {name: one.variables for name, one in networks.items()}

        def extract(variables: dict[str, Any], images_BHWC: jax.Array) -> Features:
            found: dict[str, jax.Array] = {}
            for name, one in networks.items():
                found |= one.features(variables[name], images_BHWC)
            return Features(**found)

        self._extract = parallel.per_device(extract, mesh)

    @classmethod
    def load(
        cls, networks: Networks, mesh: jax.sharding.Mesh, batch_per_device: int = BATCH_PER_DEVICE
    ) -> "Extractor":
        """Load the weights of files, see `interop.inception` and `interop.dinov2`; errors as there.

        Raises:
          UserError: also if none is named.
        """
        everywhere, found = parallel.replicated(mesh), {}
        path, other = os.fspath(networks.inception), os.fspath(networks.dinov2)
        if not path and not other:
            raise UserError("--inception and --dinov2 are missing: name weights of either, or both")
        if path:
            place = path if path == interop.RANDOM else hub.local(path, "inception")
            found["inception"] = OfInception(*interop.load(place, everywhere), networks.resize)
        if other:
            if networks.dinov2_resize not in resizing.DISTANCE_RULES:
                raise UserError(
                    f"--dinov2_resize {networks.dinov2_resize} is unknown: use "
                    f"{', '.join(resizing.DISTANCE_RULES)}"
                )
            loaded = interop_dinov2.load(other, sharding=everywhere, flag="dinov2")
            found["dinov2"] = OfDINOv2(*loaded, networks.dinov2_resize)
        return cls(found, mesh, batch_per_device)

    @property
    def spaces(self) -> tuple[str, ...]:
        """Names of the networks: "inception", "dinov2"."""
        return tuple(self._networks)

    def metadata(self) -> dict[str, Any]:
        """Return what features depend on, JSON values by name."""
        return {
            "precision": "float32, highest",
            **self._of_networks,
            "device": self._mesh.devices.flat[0].device_kind,
            "devices": self._mesh.size,
        }

    @functools.cached_property
    def _of_networks(self) -> dict[str, Any]:
        """Digests of all weights among it, which take a pass over them."""
        return {k: v for one in self._networks.values() for k, v in one.metadata().items()}

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

        (found,) = parallel.map_batches(extract, self._mesh, self.batch_size, {"image": images})
        spatial = None if found.spatial is None else found.spatial.reshape(len(images), -1)
        return found._replace(spatial=spatial)
