"""The device mesh and how arrays are divided over it: meshes and shardings are made here.

* `data`: every device group has all parameters and its share of the batch.
* `fsdp`: shares of the batch too, and each device keeps only its part of parameters, optimizer
  state and averages; XLA gathers a layer's parameters when the layer needs them.
* `tensor`: heads and the MLP's hidden channels are divided, so that one example is computed by
several devices.
"""

import contextlib
import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diffit_jax import limits, platforms
from diffit_jax.errors import UserError
from diffit_jax.limits import Count, at_least
from diffit_jax.models.diffit import attention_kernel, attention_tangent_kernel
from diffit_jax.models.placement import FSDP, TENSOR, Axes, ParamMetadata, Placement, use_placement
from diffit_jax.runtime import backend, distributed

log = logging.getLogger(__name__)

DATA = "data"
AXES = (DATA, FSDP, TENSOR)

# With so many parts of XL/2's state, 9 GB, the part of each device is small compared with its
# activations; more parts only mean longer messages.
_FSDP_FILL = 16


@dataclasses.dataclass(frozen=True)
class MeshShape(limits.Section, name="mesh"):
    """Section `mesh`.

    Attributes:
      data: devices that divide the batch; -1: all that are left.
      fsdp: devices that divide the batch, and the parameters with their optimizer state; -1: all
        that are left or, where `data` is -1 too, the largest divisor of these up to 16.
      tensor: devices that divide heads and hidden channels; -1: all that are left. The product of
        the three is the number of devices.
      num_slices: TPU slices connected by the data-centre network; `data` is divided over them, the
        other axes stay within a slice.
    """

    data: Annotated[int, at_least(1, also=(-1,))] = -1
    fsdp: Annotated[int, at_least(1, also=(-1,))] = 1
    tensor: Annotated[int, at_least(1, also=(-1,))] = 1
    num_slices: Count = 1

    def __post_init__(self):
        super().__post_init__()
        sizes = self.data, self.fsdp, self.tensor
        if sizes.count(-1) > (2 if self.data == self.fsdp == -1 else 1):
            raise UserError(
                f"config section mesh is {dataclasses.asdict(self)}: one may be -1, or data and "
                "fsdp"
            )

    def sizes(self, num_devices: int) -> tuple[int, int, int]:
        """Return (data, fsdp, tensor) for a number of devices.

        Raises:
          UserError: they do not make that number.
        """
        sizes = [self.data, self.fsdp, self.tensor]
        known = math.prod(size for size in sizes if size != -1)
        if num_devices % known or (-1 not in sizes and known != num_devices):
            raise UserError(
                f"config section mesh has data {self.data} × fsdp {self.fsdp} × tensor "
                f"{self.tensor}, which does not make {num_devices} "
                "devices: change a size, or set one to -1"
            )
        left = num_devices // known
        if self.data == self.fsdp == -1:
            sizes[1] = max(size for size in range(1, _FSDP_FILL + 1) if left % size == 0)
            left //= sizes[1]
        data, fsdp, tensor = (left if size == -1 else size for size in sizes)
        if data % self.num_slices:
            raise UserError(
                f"config key mesh.data is {data}, which {self.num_slices} slices do not divide: "
                "change mesh.data or mesh.num_slices"
            )
        return data, fsdp, tensor


def make_mesh(devices: Sequence[jax.Device] | None = None, shape: MeshShape = MeshShape()) -> Mesh:
    """Make the mesh of the devices, with axes `data`, `fsdp`, `tensor`.

    None: all devices of all processes.

    Raises:
      UserError: the shape does not fit the devices.
    """
    devices = list(devices or backend.devices())
    sizes, num_slices = shape.sizes(len(devices)), _count_slices(devices)
    if num_slices != shape.num_slices:
        raise UserError(
            f"config key mesh.num_slices is {shape.num_slices}, but the devices form {num_slices}: "
            f"set it to {num_slices}"
        )
    if shape.num_slices > 1:
        within, between = (sizes[0] // shape.num_slices, *sizes[1:]), (shape.num_slices, 1, 1)
        return Mesh(
            mesh_utils.create_hybrid_device_mesh(
                within, between, devices, allow_split_physical_axes=True
            ),
            AXES,
        )
    return Mesh(mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True), AXES)


def any_mesh(devices: Sequence[jax.Device] | None = None, shape: MeshShape = MeshShape()) -> Mesh:
    """Make the mesh of a shape, or where that does not fit, one that divides the batch alone.

    For work without a training batch.
    """
    devices = list(devices or backend.devices())
    num_slices = _count_slices(devices)
    try:
        return make_mesh(devices, dataclasses.replace(shape, num_slices=num_slices))
    except UserError as error:
        log.info("%s; going on with the batch divided over all devices", error)
        return make_mesh(devices, MeshShape(num_slices=num_slices))


def local_mesh() -> Mesh:
    """Make a mesh of this process's own devices."""
    return Mesh(np.array(jax.local_devices()).reshape(-1, 1, 1), AXES)


def _count_slices(devices: Sequence[jax.Device]) -> int:
    return len(
        {
            getattr(device, "slice_index", None) or 0
            for device in devices
            if device.platform == "tpu"
        }
        or {0}
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of a global batch's leading axis: over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec((DATA, FSDP)))


def per_device(function: Callable[[Any, jax.Array], Any], mesh: Mesh) -> Any:
    """Jit `function(variables, batch)` with replicated variables and the batch divided."""
    divided = batch_sharding(mesh)
    mapped = jax.shard_map(
        function,
        mesh=mesh,
        in_specs=(PartitionSpec(), divided.spec),
        out_specs=divided.spec,
        check_vma=False,
    )
    return jax.jit(mapped, out_shardings=divided)


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array of which every device holds a copy."""
    return NamedSharding(mesh, PartitionSpec())


ParamMetadataByPath = Mapping[
    str, ParamMetadata
]  # of parameters by their paths, see `models.parameter_metadata`


def shardings(mesh: Mesh, tree: Any, metadata: ParamMetadataByPath) -> Any:
    """Return the sharding of every leaf of a pytree of arrays or shapes.

    Args:
      mesh: the devices.
      tree: parameters, or a tree like theirs: a leaf is divided as the parameter is with whose path
        its own ends, dimensions that an axis does not divide are not, and what is like no parameter
        is copied to each device.
      metadata: of the parameters.

    Raises:
      UserError: `tensor` does not divide the heads or channels of an array that it should.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, _spec(mesh, path, leaf.shape, metadata)), tree
    )


def abstract(mesh: Mesh, tree: Any, metadata: ParamMetadataByPath = MappingProxyType({})) -> Any:
    """Return a pytree (of arrays, or from `eval_shape`) as `ShapeDtypeStruct`s with `shardings`."""

    def lay(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(lay, tree, shardings(mesh, tree, metadata))


def check_axes(mesh: Mesh, params: Any, metadata: ParamMetadataByPath) -> None:
    """Raise `UserError` if a mesh axis divides no parameter, or not one that it should."""
    used = {
        axis
        for sharding in jax.tree.leaves(shardings(mesh, params, metadata))
        for axis in jax.tree.leaves(tuple(sharding.spec))
    }
    for axis in (FSDP, TENSOR):
        if mesh.shape[axis] > 1 and axis not in used:
            raise UserError(
                f"config key mesh.{axis} is {mesh.shape[axis]}, but no rule divides a parameter "
                "over it: set it to 1"
            )


def local_device(mesh: Mesh) -> jax.Device:
    """Return the first device of the mesh that belongs to this process.

    It can ask for its memory. Not `mesh.local_mesh`, which a process whose devices have gaps on the
    mesh does not have.
    """
    return next(
        device for device in mesh.devices.flat if device.process_index == jax.process_index()
    )


def try_kernel(mesh: Mesh, forward_mode: bool = False) -> None:
    """Find out on TPUs whether the compiler takes the attention kernel.

    With `forward_mode` that with a tangent too. See `attention_kernel.try_to_compile`.
    """
    devices = list(mesh.devices.flat)
    if platforms.of_mesh(mesh).compiles_kernel:
        local = (device for device in devices if device.process_index == jax.process_index())
        device = next(local, devices[0])
        attention_kernel.try_to_compile(device)
        if forward_mode:
            attention_tangent_kernel.try_to_compile(device)


def memory_of(device: jax.Device) -> float | None:
    """Return the bytes that programs may use on a device; None where it does not say."""
    return (device.memory_stats() or {}).get("bytes_limit")


@contextlib.contextmanager
def placement(mesh: Mesh, whole_weights: bool = False) -> Iterator[None]:
    """Trace programs in this block for the mesh: its platform, its shardings.

    Activations are divided as the batch is, and each layer gathers its weights. Such a trace is of
    no use outside, see `models.placement`.

    Args:
      mesh: the devices.
      whole_weights: whether every device has all that `fsdp` divides already (`whole`). Then a
        layer's weights are taken out of their stack before its products: XLA:TPU would take them
        out piece by piece inside, which made sampling 1.17 times as long (estimate).
    """
    examples_heads = PartitionSpec((DATA, FSDP), TENSOR)

    def per_shard(function: Callable) -> Callable:
        def run(*arrays: jax.Array) -> Any:
            specs = (examples_heads,) * (len(arrays) - 1) + (PartitionSpec(None, TENSOR),)
            return jax.shard_map(
                function, mesh=mesh, in_specs=specs, out_specs=examples_heads, check_vma=False
            )(*arrays)

        return run

    def kept_whole(_: Axes, weight: jax.Array) -> jax.Array:
        return jax.lax.optimization_barrier(weight)

    value = Placement(
        activation=lambda x: jax.lax.with_sharding_constraint(x, batch_sharding(mesh)),
        weight=kept_whole if whole_weights else functools.partial(_gathered, mesh),
        per_shard=per_shard,
        platform=mesh.devices.flat[0].platform,
        # TPU devices alone say so.
        cores=getattr(mesh.devices.flat[0], "num_cores", None) or 1,
        batch_shards=mesh.shape[DATA] * mesh.shape[FSDP],
    )
    with use_placement(value):
        yield


def whole(mesh: Mesh, axes: Axes, weight: jax.Array) -> jax.Array:
    """All-gather a parameter over the fsdp axis, by the axes that divide it. Call inside jit."""
    kept = tuple(None if axis == FSDP else axis for axis in axes)
    spec = _divided(mesh, kept, weight.shape)
    return jax.lax.with_sharding_constraint(weight, NamedSharding(mesh, spec))


def _gathered(mesh: Mesh, axes: Axes, weight: jax.Array) -> jax.Array:
    """All-gather a weight over `fsdp` before its use; its gradient is divided again at once.

    Left to itself, XLA:TPU multiplies by one part after the other as they come, and products with
    1152 / 16 = 72 columns fill half of a matrix unit.
    """
    if mesh.shape[FSDP] == 1:
        return weight
    # A constraint is its own transpose: backwards the two divide the gradient again.
    divided = NamedSharding(mesh, _divided(mesh, axes, weight.shape))
    return whole(mesh, axes, jax.lax.with_sharding_constraint(weight, divided))


def axes_of(path: tuple, metadata: ParamMetadataByPath) -> tuple[str, Axes]:
    """Return a path as text, and the axes of the parameter with whose path it ends, else ()."""
    name = path_name(path)
    ends = name.split("/")
    tails = ("/".join(ends[start:]) for start in range(len(ends)))
    entry = next((metadata[tail] for tail in tails if tail in metadata), None)
    return name, entry.axes if entry else ()


def _spec(
    mesh: Mesh, path: tuple, shape: tuple[int, ...], metadata: ParamMetadataByPath
) -> PartitionSpec:
    name, axes = axes_of(path, metadata)
    if axes and TENSOR in axes:
        size = shape[len(shape) - len(axes) + axes.index(TENSOR)]
        if size % mesh.shape[TENSOR]:
            raise UserError(
                f"config key mesh.tensor is {mesh.shape[TENSOR]}, which does not divide the {size} "
                f"heads or channels of {name} {shape}: change mesh.tensor, or the number of heads"
            )
    return _divided(mesh, axes, shape)


def _divided(mesh: Mesh, axes: Axes, shape: tuple[int, ...]) -> PartitionSpec:
    axes = (None,) * (len(shape) - len(axes)) + axes
    return PartitionSpec(
        *(
            axis if axis and size % mesh.shape[axis] == 0 else None
            for size, axis in zip(shape, axes, strict=True)
        )
    )


def check_batch_size(mesh: Mesh, batch_size: int, key: str, parts: int = 1) -> None:
    """Raise `UserError` if the devices that divide a batch, times `parts`, do not divide its size.

    `key` is the config key that set it.
    """
    num_shards = mesh.shape[DATA] * mesh.shape[FSDP] * parts
    if batch_size < 1 or batch_size % num_shards:
        over = f"{mesh.shape[DATA] * mesh.shape[FSDP]} devices" + (
            f" in {parts} parts (training.accumulation)" if parts > 1 else ""
        )
        raise UserError(
            f"{key} {batch_size} does not divide over {over}: change {key} to a multiple of "
            f"{num_shards}"
        )


def next_batch_size(mesh: Mesh, count: int) -> int:
    """Return the smallest batch size, at least `count`, that the devices divide."""
    num_shards = mesh.shape[DATA] * mesh.shape[FSDP]
    return -(-count // num_shards) * num_shards


def fitting_devices(
    batch_size: int, shape: MeshShape = MeshShape(), parts: int = 1
) -> Sequence[jax.Device]:
    """Return all devices, or as many of the first as divide a training batch in `parts` parts.

    If some are left out, a line of the log says so. For one process: of several, some would be left
    without a device, and all devices are returned.
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
def local_batch_indices(mesh: Mesh, batch_size: int, process: int | None = None) -> np.ndarray:
    """Return which rows of a global batch the devices of a process hold.

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
    num_shards = batch_sharding(mesh).devices_indices_map((batch_size,))
    bounds = {
        rows_per_device[0].indices(batch_size)[:2]
        for device, rows_per_device in num_shards.items()
        if device.process_index == process
    }
    rows = np.concatenate([np.arange(0), *(np.arange(*each) for each in sorted(bounds))])
    rows.flags.writeable = False  # one array for all who ask
    return rows


def put_batch(mesh: Mesh, batch: dict[str, np.ndarray], batch_size: int) -> dict[str, jax.Array]:
    """Put host arrays with this process's rows of a global batch on the mesh.

    Args:
      mesh: the mesh.
      batch: name → array (n, …), row i of which is row `local_batch_indices(mesh, batch_size)[i]`
        of the batch.
      batch_size: rows of the global batch.

    Raises:
      ValueError: an array has another number of rows.
    """
    sharding, rows = batch_sharding(mesh), local_batch_indices(mesh, batch_size)

    def put(name: str, array: np.ndarray) -> jax.Array:
        if len(array) != len(rows):
            raise ValueError(
                f"{name} has {len(array)} rows, but this process holds {len(rows)} of the "
                f"{batch_size} of a batch"
            )
        shape = batch_size, *array.shape[1:]
        devices, num_shards = [], []
        for device, index in sharding.addressable_devices_indices_map(shape).items():
            start, stop, _ = index[0].indices(batch_size)
            first = int(np.searchsorted(rows, start))
            devices.append(device)
            num_shards.append(array[first : first + stop - start])
        return jax.make_array_from_single_device_arrays(
            shape, sharding, jax.device_put(num_shards, devices)
        )

    return {name: put(name, array) for name, array in batch.items()}


def put_padded(
    mesh: Mesh, arrays: Mapping[str, np.ndarray], batch_size: int
) -> dict[str, jax.Array]:
    """Put host arrays of at most `batch_size` rows on the mesh, padded to a global batch.

    They are the same on every process; copies of the last row fill the batch up.
    """
    mine = local_batch_indices(mesh, batch_size)

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
    """Apply a function that all processes compute together to padded batches of arrays.

    Args:
      function: of a batch on the mesh, to a pytree of arrays with its rows in front.
      mesh: the devices.
      batch_size: rows of a batch.
      arrays: by name, of n rows each, the same on every process.

    Yields:
      Its results, on every process's host, without the rows that were added.
    """
    count = len(next(iter(arrays.values())))
    for start in range(0, count, batch_size):
        part = {name: array[start : start + batch_size] for name, array in arrays.items()}
        found = function(put_padded(mesh, part, batch_size))
        rows = min(batch_size, count - start)
        yield jax.tree.map(lambda array, rows=rows: distributed.gather(array)[:rows], found)


def verify_batch_sharding(mesh: Mesh, batch_size: int) -> None:
    """Verify on the devices that every row of a batch comes to its device, and no other.

    Row numbers go the way of data (`local_batch_indices`, `put_batch`), and every device counts
    those that it should not have. All processes take part.

    Raises:
      UserError: on every process; it names the first process that holds wrong rows.
    """
    rows_per_device = batch_size // (mesh.shape[DATA] * mesh.shape[FSDP])
    rows = put_batch(
        mesh, {"row": local_batch_indices(mesh, batch_size).astype(np.int32)}, batch_size
    )["row"]
    wrong = np.asarray(_wrong_rows(mesh, rows_per_device)(rows).addressable_data(0))
    for device, count in zip(mesh.devices.flat, wrong, strict=True):
        if count:
            raise UserError(
                f"process {device.process_index} has {count} of {rows_per_device} rows of the "
                f"batch in wrong places on device {device.id}: rows are divided wrongly over the "
                f"mesh {dict(mesh.shape)}; use another mesh (config section mesh), and report this "
                "fault"
            )


@functools.lru_cache(maxsize=8)
def _wrong_rows(mesh: Mesh, rows_per_device: int) -> Callable[[jax.Array], jax.Array]:
    """Return a function that counts misplaced ones of row numbers (B,): (devices,) int32."""

    def count(row_B: jax.Array) -> jax.Array:
        place = jax.lax.axis_index(DATA) * mesh.shape[FSDP] + jax.lax.axis_index(FSDP)
        return jnp.sum(
            row_B != place * rows_per_device + jnp.arange(rows_per_device), keepdims=True
        )

    of_each = jax.shard_map(
        count,
        mesh=mesh,
        in_specs=batch_sharding(mesh).spec,
        out_specs=PartitionSpec(AXES),
        check_vma=False,
    )
    return jax.jit(of_each, out_shardings=replicated(mesh))


def named(tree: Any) -> list[tuple[str, Any]]:
    """List the leaves of a pytree with their paths, such as `params/final/bias`."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [(path_name(path), leaf) for path, leaf in flat]


def path_name(path: tuple) -> str:
    """Return a leaf's path, as jax's functions of trees give it, as text: `params/final/bias`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")
