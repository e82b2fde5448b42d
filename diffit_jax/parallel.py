"""The device mesh and how arrays lie on it: the only place that names mesh axes."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diffit_jax.errors import UserError

DATA_AXIS = "data"


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A one-dimensional mesh of the devices (None: all); batches are split over it, parameters are copied to each."""
    return Mesh(np.array(devices or jax.devices()), (DATA_AXIS,))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of an array whose leading axis is the global batch."""
    return NamedSharding(mesh, PartitionSpec(DATA_AXIS))


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding of an array of which every device holds a copy."""
    return NamedSharding(mesh, PartitionSpec())


def abstract(tree: Any, sharding: NamedSharding) -> Any:
    """Shapes and dtypes of a pytree (of arrays, or from `eval_shape`) as `ShapeDtypeStruct`s that lie as `sharding` says."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


def check_batch_size(mesh: Mesh, batch_size: int, key: str) -> None:
    """Raises `UserError` if the devices of the mesh do not divide a batch; `key` is the config key that set its size."""
    if batch_size < 1 or batch_size % mesh.size:
        raise UserError(f"{key} {batch_size} does not divide over {mesh.size} devices: change {key} to a multiple of {mesh.size}")


def put_batch(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Host arrays with this process's share of a global batch → global arrays split over the mesh."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in batch.items()}
