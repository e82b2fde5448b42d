"""The device mesh and how arrays lie on it: the only place that names mesh axes.

* `data`: every device group has all parameters and its share of the batch.
* `fsdp`: shares of the batch too, and each device keeps only its part of parameters, optimizer state and averages; XLA gathers a layer's
  parameters when the layer needs them.
* `tensor`: heads and the MLP's hidden channels are divided, so that one example is computed by several devices.
"""

import contextlib
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diffit_jax.errors import UserError
from diffit_jax.models.layout import Layout, layout

DATA, FSDP, TENSOR = AXES = ("data", "fsdp", "tensor")

# With so many parts of XL/2's state, 9 GB, what each device keeps is small beside its activations; more parts only mean longer messages.
_FSDP_FILL = 16

# How parameters, and whatever is shaped like them, are divided: (pattern of the path, axes of the *last* dimensions). The first pattern
# that is found counts; dimensions before (the layers of a stack) are not divided, and neither are those that `fsdp` does not divide.
PARAMETER_RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"attention/(time_)?qk?v_kernel$", (FSDP, None, TENSOR, None)),  # (C, shares, heads, head width)
    (r"attention/(time_)?qk?v_bias$", (None, TENSOR, None)),
    (r"attention/relative_position_bias$", (None, TENSOR)),  # (offsets, heads)
    (r"attention/out_kernel$", (TENSOR, None, FSDP)),  # (heads, head width, C)
    (r"mlp_in/kernel$", (FSDP, TENSOR)),
    (r"mlp_in/bias$", (TENSOR,)),
    (r"mlp_out/kernel$", (TENSOR, FSDP)),
    (r"(kernel|embedding)$", (FSDP,)),  # convolutions, other matrices and tables: their last dimension
)


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """Section `mesh`.

    Attributes:
      data, fsdp, tensor: sizes of the axes; their product is the number of devices. One may be -1: whatever is left. With `data` and
        `fsdp` both -1, `fsdp` is the largest divisor of what is left up to 16, `data` the rest: a config for any number of devices.
      num_slices: TPU slices connected by the data-centre network; `data` is divided over them, the other axes stay within a slice.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    num_slices: int = 1

    def __post_init__(self):
        sizes = self.data, self.fsdp, self.tensor
        if (
            sizes.count(-1) > (2 if self.data == self.fsdp == -1 else 1)
            or any(size < 1 and size != -1 for size in sizes)
            or self.num_slices < 1
        ):
            raise UserError(f"config section mesh is {dataclasses.asdict(self)}: sizes must be at least 1; one may be -1, or data and fsdp")

    def sizes(self, num_devices: int) -> tuple[int, int, int]:
        """(data, fsdp, tensor) for a number of devices.

        Raises:
          UserError: they do not make that number.
        """
        sizes = [self.data, self.fsdp, self.tensor]
        known = math.prod(size for size in sizes if size != -1)
        if num_devices % known or (-1 not in sizes and known != num_devices):
            raise UserError(
                f"config section mesh has data {self.data} × fsdp {self.fsdp} × tensor {self.tensor}, which does not make {num_devices} "
                "devices: change a size, or set one to -1"
            )
        left = num_devices // known
        if self.data == self.fsdp == -1:
            sizes[1] = max(size for size in range(1, _FSDP_FILL + 1) if left % size == 0)
            left //= sizes[1]
        data, fsdp, tensor = (left if size == -1 else size for size in sizes)
        if data % self.num_slices:
            raise UserError(
                f"config key mesh.data is {data}, which {self.num_slices} slices do not divide: change mesh.data or mesh.num_slices"
            )
        return data, fsdp, tensor


def make_mesh(devices: Sequence[jax.Device] | None = None, shape: MeshShape = MeshShape()) -> Mesh:
    """The mesh of the devices (None: all of all processes), with the axes `data`, `fsdp` and `tensor`.

    Raises:
      UserError: the shape does not fit the devices.
    """
    devices = list(devices or jax.devices())
    sizes = shape.sizes(len(devices))
    slices = {getattr(device, "slice_index", None) or 0 for device in devices if device.platform == "tpu"} or {0}
    if len(slices) != shape.num_slices:
        raise UserError(f"config key mesh.num_slices is {shape.num_slices}, but the devices form {len(slices)}: set it to {len(slices)}")
    if shape.num_slices > 1:
        within, between = (sizes[0] // shape.num_slices, *sizes[1:]), (shape.num_slices, 1, 1)
        return Mesh(mesh_utils.create_hybrid_device_mesh(within, between, devices, allow_split_physical_axes=True), AXES)
    return Mesh(mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True), AXES)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of an array whose leading axis is the global batch: over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec((DATA, FSDP)))


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding of an array of which every device holds a copy."""
    return NamedSharding(mesh, PartitionSpec())


def shardings(mesh: Mesh, tree: Any) -> Any:
    """The sharding of every leaf of a pytree (of arrays or shapes) by `PARAMETER_RULES`; what no rule knows is copied to each device.

    Raises:
      UserError: `tensor` does not divide the heads or channels of an array that it should.
    """
    return jax.tree_util.tree_map_with_path(lambda path, leaf: NamedSharding(mesh, _spec(mesh, path, leaf.shape)), tree)


def abstract(mesh: Mesh, tree: Any) -> Any:
    """Shapes and dtypes of a pytree (of arrays, or from `eval_shape`) as `ShapeDtypeStruct`s that lie as `shardings` says."""
    lay = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)  # noqa: E731
    return jax.tree.map(lay, tree, shardings(mesh, tree))


def check_axes(mesh: Mesh, params: Any) -> None:
    """Raises `UserError` if `fsdp` or `tensor` has several devices but divides no parameter, or `tensor` does not divide one."""
    used = {axis for sharding in jax.tree.leaves(shardings(mesh, params)) for axis in jax.tree.leaves(tuple(sharding.spec))}
    for axis in (FSDP, TENSOR):
        if mesh.shape[axis] > 1 and axis not in used:
            raise UserError(f"config key mesh.{axis} is {mesh.shape[axis]}, but no rule divides a parameter over it: set it to 1")


def check_batch_size(mesh: Mesh, batch_size: int, key: str, parts: int = 1) -> None:
    """Raises `UserError` if `parts` times the devices that share a batch do not divide it; `key` is the config key that set its size."""
    shares = mesh.shape[DATA] * mesh.shape[FSDP] * parts
    if batch_size < 1 or batch_size % shares:
        over = f"{mesh.shape[DATA] * mesh.shape[FSDP]} devices" + (f" in {parts} parts (training.accumulation)" if parts > 1 else "")
        raise UserError(f"{key} {batch_size} does not divide over {over}: change {key} to a multiple of {shares}")


def next_batch_size(mesh: Mesh, count: int) -> int:
    """The smallest batch size, at least `count`, that the devices divide."""
    shares = mesh.shape[DATA] * mesh.shape[FSDP]
    return -(-count // shares) * shares


def local_rows(mesh: Mesh, batch_size: int) -> tuple[int, int]:
    """(start, stop): the contiguous block of a global batch that this process's devices hold."""
    slices = [index[0].indices(batch_size)[:2] for index in batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()]
    return min(start for start, _ in slices), max(stop for _, stop in slices)


def put_batch(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Host arrays with this process's block of a global batch (`local_rows`) → global arrays split over the mesh."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in batch.items()}


@contextlib.contextmanager
def activations(mesh: Mesh) -> Iterator[None]:
    """While a program is traced in this block, activations of networks lie as the batch does, and each layer gathers its weights."""
    examples_heads = PartitionSpec((DATA, FSDP), TENSOR)

    def per_shard(function: Callable) -> Callable:
        specs = (examples_heads,) * 3 + (PartitionSpec(None, TENSOR),)
        return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=examples_heads, check_vma=False)

    value = Layout(
        activation=lambda x: jax.lax.with_sharding_constraint(x, batch_sharding(mesh)),
        weight=functools.partial(_gathered, mesh),
        per_shard=per_shard,
        platform=mesh.devices.flat[0].platform,
    )
    with layout(value):
        yield


def _gathered(mesh: Mesh, name: str, weight: jax.Array) -> jax.Array:
    """A weight whose parts over `fsdp` are put together before it is used; its gradient is divided again at once.

    Left to itself, XLA:TPU multiplies by one part after the other as they come, and products with 1152 / 16 = 72 columns fill half of a
    matrix unit.
    """
    if mesh.shape[FSDP] == 1:
        return weight
    divided = _rule_spec(mesh, name, weight.shape)
    whole = PartitionSpec(*(None if axis == FSDP else axis for axis in divided))
    constrain = lambda x, spec: jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))  # noqa: E731

    @jax.custom_vjp
    def gather(x: jax.Array) -> jax.Array:
        return constrain(x, whole)

    gather.defvjp(lambda x: (gather(x), None), lambda _, gradient: (constrain(constrain(gradient, whole), divided),))
    return gather(weight)


def _spec(mesh: Mesh, path: tuple, shape: tuple[int, ...]) -> PartitionSpec:
    return _rule_spec(mesh, jax.tree_util.keystr(path, simple=True, separator="/"), shape)


def _rule_spec(mesh: Mesh, name: str, shape: tuple[int, ...]) -> PartitionSpec:
    axes = next((axes for pattern, axes in PARAMETER_RULES if re.search(pattern, name)), ())
    axes = (None,) * (len(shape) - len(axes)) + axes
    for size, axis in zip(shape, axes, strict=True):
        if axis == TENSOR and size % mesh.shape[TENSOR]:
            raise UserError(
                f"config key mesh.tensor is {mesh.shape[TENSOR]}, which does not divide the {size} heads or channels of {name} {shape}: "
                "change mesh.tensor, or the number of heads"
            )
    return PartitionSpec(*(axis if axis and size % mesh.shape[axis] == 0 else None for size, axis in zip(shape, axes, strict=True)))
