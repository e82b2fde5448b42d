"""Which rows of a global batch each device and process holds, and how host arrays get there."""

import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from diffit_jax.errors import UserError
from diffit_jax.runtime import backend, distributed
from diffit_jax.runtime.parallel import AXES, DATA, FSDP, MeshShape, batch_sharding, replicated

log = logging.getLogger(__name__)


def check_batch_size(mesh: Mesh, batch_size: int, key: str, parts: int = 1) -> None:
    """Raises `UserError` if `parts` times the devices that share a batch do not divide it; `key` is
    the config key that set its size."""
    shares = mesh.shape[DATA] * mesh.shape[FSDP] * parts
    if batch_size < 1 or batch_size % shares:
        over = f"{mesh.shape[DATA] * mesh.shape[FSDP]} devices" + (
            f" in {parts} parts (training.accumulation)" if parts > 1 else ""
        )
        raise UserError(
            f"{key} {batch_size} does not divide over {over}: change {key} to a multiple of "
            f"{shares}"
        )


def next_batch_size(mesh: Mesh, count: int) -> int:
    """The smallest batch size, at least `count`, that the devices divide."""
    shares = mesh.shape[DATA] * mesh.shape[FSDP]
    return -(-count // shares) * shares


def fitting_devices(
    batch_size: int, shape: MeshShape = MeshShape(), parts: int = 1
) -> Sequence[jax.Device]:
    """All devices, or as many of the first as divide a training batch in `parts` parts, with a line
    of the log that says so.

    For one process: of several, some would be left without a device, and all devices are returned.
    """
    devices = backend.devices()
    for count in range(len(devices), 0, -1):
        try:
            data, fsdp, _ = shape.sizes(count)
        except UserError:
            continue
        if batch_size % (data * fsdp * parts) == 0 and jax.process_count() == 1:
            if count < len(devices):
                log.info(
                    "using %d of %d devices, which training.batch_size %d divides over",
                    count,
                    len(devices),
                    batch_size,
                )
            return devices[:count]
    return devices


@functools.lru_cache(maxsize=8)
def local_rows(mesh: Mesh, batch_size: int, process: int | None = None) -> np.ndarray:
    """Which rows of a global batch the devices of a process hold.

    A mesh follows the pod's torus, so that the rows of a process have gaps, and more than one
    process may hold a row (with `tensor`).

    Args:
      mesh: the mesh.
      batch_size: rows of the global batch, which the devices divide.
      process: number of the process; None: this one.

    Returns:
      (n,) int64, ascending, each row once; not writeable.

    Raises:
      ValueError: the devices do not divide the batch.
    """
    process = jax.process_index() if process is None else process
    shares = batch_sharding(mesh).devices_indices_map((batch_size,))
    bounds = {
        share[0].indices(batch_size)[:2]
        for device, share in shares.items()
        if device.process_index == process
    }
    rows = np.concatenate([np.arange(0), *(np.arange(*each) for each in sorted(bounds))])
    rows.flags.writeable = False  # one array for all who ask
    return rows


def put_batch(mesh: Mesh, batch: dict[str, np.ndarray], batch_size: int) -> dict[str, jax.Array]:
    """Host arrays with this process's rows of a global batch → global arrays split over the mesh.

    Args:
      mesh: the mesh.
      batch: name → array (n, …), row i of which is row `local_rows(mesh, batch_size)[i]` of the
        batch.
      batch_size: rows of the global batch.

    Raises:
      ValueError: an array has another number of rows.
    """
    sharding, rows = batch_sharding(mesh), local_rows(mesh, batch_size)

    def put(name: str, array: np.ndarray) -> jax.Array:
        if len(array) != len(rows):
            raise ValueError(
                f"{name} has {len(array)} rows, but this process holds {len(rows)} of the "
                f"{batch_size} of a batch"
            )
        shape = batch_size, *array.shape[1:]
        devices, shares = [], []
        for device, index in sharding.addressable_devices_indices_map(shape).items():
            start, stop, _ = index[0].indices(batch_size)
            first = int(np.searchsorted(rows, start))
            devices.append(device)
            shares.append(array[first : first + stop - start])
        return jax.make_array_from_single_device_arrays(
            shape, sharding, jax.device_put(shares, devices)
        )

    return {name: put(name, array) for name, array in batch.items()}


def put_padded(
    mesh: Mesh, arrays: Mapping[str, np.ndarray], batch_size: int
) -> dict[str, jax.Array]:
    """Host arrays of at most `batch_size` rows, the same on every process, as a global batch that
    is split over the mesh and filled up with copies of the last row."""
    mine = local_rows(mesh, batch_size)

    def filled(array: np.ndarray) -> np.ndarray:
        widths = (0, batch_size - len(array)), *((0, 0),) * (array.ndim - 1)
        return np.pad(array, widths, mode="edge")[mine]

    return put_batch(mesh, {name: filled(array) for name, array in arrays.items()}, batch_size)


def map_batches(
    function: Callable[[dict[str, jax.Array]], Any],
    mesh: Mesh,
    batch_size: int,
    arrays: Mapping[str, np.ndarray],
) -> Iterator[Any]:
    """Calls a function that all processes compute together with one padded batch after the other.

    Args:
      function: of a batch on the mesh, to a pytree of arrays with its rows in front.
      mesh: the devices.
      batch_size: rows of a batch.
      arrays: by name, of n rows each, the same on every process.

    Yields:
      What it returns, on every process's host, without the rows that were added.
    """
    count = len(next(iter(arrays.values())))
    for start in range(0, count, batch_size):
        part = {name: array[start : start + batch_size] for name, array in arrays.items()}
        found = function(put_padded(mesh, part, batch_size))
        rows = min(batch_size, count - start)
        yield jax.tree.map(lambda array, rows=rows: distributed.gather(array)[:rows], found)


def prove_rows(mesh: Mesh, batch_size: int) -> None:
    """Proves on the devices at hand that every row of a batch comes to its place, and nowhere else.

    Row numbers go the way of data (`local_rows`, `put_batch`), and every device counts those that
    it should not have. All processes take part.

    Raises:
      UserError: on every process; it names the first process that holds wrong rows.
    """
    share = batch_size // (mesh.shape[DATA] * mesh.shape[FSDP])
    rows = put_batch(mesh, {"row": local_rows(mesh, batch_size).astype(np.int32)}, batch_size)[
        "row"
    ]
    wrong = np.asarray(_wrong_rows(mesh, share)(rows).addressable_data(0))
    for device, count in zip(mesh.devices.flat, wrong, strict=True):
        if count:
            raise UserError(
                f"process {device.process_index} has {count} of {share} rows of the batch in wrong "
                f"places on device {device.id}: rows are divided wrongly over the mesh "
                f"{dict(mesh.shape)}; use another mesh (config section mesh), and report this fault"
            )


@functools.lru_cache(maxsize=8)
def _wrong_rows(mesh: Mesh, share: int) -> Callable[[jax.Array], jax.Array]:
    """Of row numbers (B,): how many of its `share` each device should not have, (devices,)."""

    def count(row_B: jax.Array) -> jax.Array:
        place = jax.lax.axis_index(DATA) * mesh.shape[FSDP] + jax.lax.axis_index(FSDP)
        return jnp.sum(row_B != place * share + jnp.arange(share), keepdims=True)

    of_each = jax.shard_map(
        count,
        mesh=mesh,
        in_specs=batch_sharding(mesh).spec,
        out_specs=PartitionSpec(AXES),
        check_vma=False,
    )
    return jax.jit(of_each, out_shardings=replicated(mesh))
