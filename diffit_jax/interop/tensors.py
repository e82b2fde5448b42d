"""Arrays of ours and the tensors of a file that they are made of, by a table; for every loader.

A table has a row for each kind of tensor: its name in the file, `{}` standing for the number of a
layer, and (collection and path of ours, axes of theirs in the order of ours). Tensors are read one
array of ours at a time, and at most ten problems are named.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, Protocol

import jax
import ml_dtypes  # noqa: F401
import numpy as np
from etils import epath

from diffit_jax.errors import UserError
from diffit_jax.runtime.console import Progress, first_few

DTYPES = ("F32", "F16", "BF16")  # numpy knows the last one once ml_dtypes is imported

RELEASED = "name a file of the released layout"

Table = Mapping[str, tuple[str, tuple[int, ...] | None]]


class Tensors(Protocol):
    """The tensors of a file, `WeightFiles` or `TorchFile`."""

    hint: str

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of each tensor by its name."""
        ...

    @property
    def dtypes(self) -> Mapping[str, str]:
        """Type of each tensor by its name."""
        ...

    def tensor(self, name: str) -> np.ndarray:
        """Return a tensor as a host array."""
        ...


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array of ours and the tensors that it is made of.

    Attributes:
      path: of ours, such as `params/blocks/mlp_in/kernel`.
      shape: of ours.
      names: of the tensors, one for each layer, or a single one.
      stacked: whether the leading axis of ours counts layers.
      theirs: shape of each tensor.
      axes: of theirs, in the order of ours.
      parts: shape of theirs before `axes` are taken, if one of its axes is several of ours.
    """

    path: str
    shape: tuple[int, ...]
    names: list[str]
    stacked: bool
    theirs: tuple[int, ...]
    axes: tuple[int, ...]
    parts: tuple[int, ...] | None = None

    def to_ours(self, tensor: np.ndarray) -> np.ndarray:
        """Convert one tensor of the file to one layer of ours."""
        tensor = tensor.reshape(self.parts or self.theirs).transpose(self.axes)
        return tensor.reshape(self.shape[1:] if self.stacked else self.shape)

    def to_theirs(self, array: np.ndarray) -> np.ndarray:
        """Invert `to_ours`; contiguous."""
        transposed = [(self.parts or self.theirs)[axis] for axis in self.axes]
        back = array.reshape(transposed).transpose(np.argsort(self.axes))
        return np.ascontiguousarray(back.reshape(self.theirs))


def leaves_of(
    table: Table, shapes: Any, depth: int, theirs: Mapping[str, tuple[int, ...]]
) -> list[Leaf]:
    """Return every array of a table.

    Args:
      table: see the top of this file. Axes None: both have the same order.
      shapes: tree of ours.
      depth: number of layers.
      theirs: shapes of tensors that are not ours transposed, but reshaped too.
    """
    leaves = []
    for name, (path, axes) in table.items():
        ours, stacked = at(shapes, path).shape, "{}" in name
        layer_shape = ours[1:] if stacked else ours
        if name in theirs:
            shape, axes = theirs[name], axes or tuple(range(len(theirs[name])))
        else:
            axes = axes or tuple(range(len(layer_shape)))
            shape = tuple(layer_shape[place] for place in np.argsort(axes))
        leaves.append(Leaf(path, ours, expanded(name, depth), stacked, shape, axes))
    return leaves


def read(
    file: Tensors,
    leaves: Sequence[Leaf],
    place: Callable[[Leaf, np.ndarray], jax.Array],
    what: str,
    allow_nonfinite: bool = False,
    *,
    remedy: str = "use other weights, or say --allow_nonfinite",
) -> dict[str, Any]:
    """Read the arrays of a module as a tree, one at a time in host memory.

    Args:
      file: that holds every tensor, see `check`.
      leaves: of the module.
      place: (leaf, its float32 array) → the array on its devices.
      what: the file, for progress and messages.
      allow_nonfinite: whether there may be NaNs and infinities.
      remedy: ends the message.

    Raises:
      UserError: there are; their tensors are named.
    """
    flat, bad = {}, []
    total = sum(len(leaf.names) for leaf in leaves)
    name_of_file = what.rpartition("/")[2]
    with Progress(f"load {name_of_file}", total, unit="tensor", every_s=2) as progress:
        for leaf in leaves:
            array = np.empty(leaf.shape, np.float32)
            for layer, name in enumerate(leaf.names):
                part = layer if leaf.stacked else ...
                array[part] = leaf.to_ours(file.tensor(name))
                if not np.isfinite(array[part]).all():
                    bad.append(name)
                progress.advance()
            if not bad or allow_nonfinite:  # else the others are only looked at, to be named too
                flat[leaf.path] = jax.block_until_ready(place(leaf, array))
    if bad and not allow_nonfinite:
        raise UserError(
            f"weights {what} are not finite: there are NaNs or infinities in "
            f"{first_few(bad)}; {remedy}"
        )
    return nested(flat)


def put(array: np.ndarray, leaf: Leaf, sharding: Any) -> jax.Array:
    """Put an array of a leaf where it goes: a sharding for all, or a tree of them like ours."""
    of_leaf = at(sharding, leaf.path) if isinstance(sharding, Mapping) else sharding
    return jax.device_put(array, of_leaf)


def check(
    path: epath.PathLike, kind: str, leaves: Iterable[Leaf], file: Tensors, remedy: str = RELEASED
) -> None:
    """Raise `UserError` if tensors of a file have another shape or type than the leaves'.

    `remedy` ends the message.
    """
    problems = []
    for leaf in leaves:
        for name in leaf.names:
            shape, dtype = file.shapes[name], file.dtypes[name]
            if shape != leaf.theirs:
                problems.append(f"misshapen {name} {shape} instead of {leaf.theirs}")
            elif dtype not in DTYPES:
                problems.append(f"{name} of type {dtype} instead of {', '.join(DTYPES)}")
    if problems:
        refuse(path, kind, problems, remedy=remedy)


def match_names(
    path: epath.PathLike,
    kind: str,
    expected: Iterable[str],
    found: Iterable[str],
    *,
    hint: str = "",
    remedy: str = RELEASED,
) -> None:
    """Raise `UserError` unless a file has the expected tensors and no others, by their names.

    Missing ones are named in the order in which they are expected.
    """
    expected, found = list(expected), set(found)
    missing = [f"missing {name}" for name in expected if name not in found]
    extra = [f"extra {name}" for name in in_order(found.difference(expected))]
    if missing or extra:
        refuse(path, kind, missing, others=extra, hint=hint, remedy=remedy)


def refuse(
    path: epath.PathLike,
    kind: str,
    problems: Sequence[str],
    *,
    others: Sequence[str] = (),
    hint: str = "",
    remedy: str = RELEASED,
) -> NoReturn:
    """Raise `UserError` with at most ten problems; of two sorts, each gets five."""
    listed = [*problems[: max(5, 10 - len(others))], *others[: max(5, 10 - len(problems))]]
    left = len(problems) + len(others) - len(listed)
    shown = "; ".join(listed) + (f"; and {left} more" if left else "")
    raise UserError(f"weights {path} are not those of {kind} ({shown}){hint}: {remedy}")


def expanded(pattern: str, depth: int) -> list[str]:
    """Return the names that a name in a table stands for."""
    return [pattern.format(layer) for layer in range(depth)] if "{}" in pattern else [pattern]


def names_of(table: Table, depth: int) -> Iterator[str]:
    """Yield the names of all tensors of a table."""
    return (name for pattern in table for name in expanded(pattern, depth))


def in_order(names: Iterable[str]) -> list[str]:
    """Sort names, numbers in them by value."""

    def parts(name: str) -> list[int | str]:
        return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]

    return sorted(names, key=parts)


def at(tree: Any, path: str) -> Any:
    """Return the node of a tree of dicts at `a/b/c`."""
    for key in path.split("/"):
        tree = tree[key]
    return tree


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Build a tree of dicts from leaves by their paths."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[name] = leaf
    return tree
