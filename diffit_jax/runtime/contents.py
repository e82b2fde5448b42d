"""What the arrays of a network hold: whether they are finite, and a fingerprint of them. Computed
where they lie."""

import functools
import hashlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

_SMALL = 2**20  # bytes


def fingerprint(tree: Any) -> str:
    """A digest of names, shapes and values of a pytree of arrays: equal for equal contents,
    wherever they come from and however they lie.

    Sums of 32-bit integers do not depend on their order, nor on how an array is divided over
    devices.
    """
    leaves = named(tree)
    sums = _of_each(_sums, leaves)
    digest = hashlib.sha256()
    for (name, leaf), pair in zip(leaves, sums, strict=True):
        digest.update(f"{name} {np.dtype(leaf.dtype).name} {leaf.shape} {pair}\n".encode())
    return digest.hexdigest()[:32]


def not_finite(tree: Any) -> list[str]:
    """Names of the arrays in a pytree that have a NaN or infinity, each with how many."""
    leaves = named(tree)
    counts = _of_each(_count_bad, leaves)
    return [
        f"{name} ({bad} of {leaf.size})"
        for (name, leaf), bad in zip(leaves, counts, strict=True)
        if bad
    ]


def named(tree: Any) -> list[tuple[str, Any]]:
    """The leaves of a pytree with their paths, such as `params/final/bias`."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [(path_name(path), leaf) for path, leaf in flat]


def path_name(path: tuple) -> str:
    """The path of a leaf, as jax's functions of trees give it, as text: `params/final/bias`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _of_each(
    function: Callable[[jax.Array], jax.Array], leaves: list[tuple[str, jax.Array]]
) -> list[Any]:
    """A function of each array, computed in one program, on every process's host."""
    # Small arrays of one shape, of which networks have hundreds, are computed together: one by one
    # they take ten seconds to compile. To stack large ones would take memory.
    alike: dict[Any, list[int]] = {}
    for place, (_, leaf) in enumerate(leaves):
        small = leaf.size * leaf.dtype.itemsize <= _SMALL
        alike.setdefault((leaf.shape, leaf.dtype, None if small else place), []).append(place)
    groups = [[leaves[place][1] for place in places] for places in alike.values()]
    if not groups:
        return []
    everywhere = None
    first = leaves[0][1]
    if isinstance(first, jax.Array) and isinstance(first.sharding, NamedSharding):
        everywhere = NamedSharding(first.sharding.mesh, PartitionSpec())
    results = np.asarray(_program(function, everywhere)(groups).addressable_data(0))
    order = [place for places in alike.values() for place in places]
    return results[np.argsort(order)].tolist()


@functools.lru_cache(maxsize=16)
def _program(
    function: Callable[[jax.Array], jax.Array], everywhere: NamedSharding | None
) -> Callable:
    def of_groups(groups: list[list[jax.Array]]) -> jax.Array:
        stacks = [
            lax.concatenate([lax.expand_dims(leaf, (0,)) for leaf in group], 0) for group in groups
        ]
        return jnp.concatenate([jax.vmap(function)(stack) for stack in stacks])

    return jax.jit(of_groups, out_shardings=everywhere)


def _count_bad(leaf: jax.Array) -> jax.Array:
    return jnp.sum(~jnp.isfinite(leaf), dtype=jnp.uint32)


def _sums(leaf: jax.Array) -> jax.Array:
    """Two sums over all values of an array, each value mixed with its place: (2,) uint32."""
    unsigned = {2: np.uint16, 4: np.uint32}[leaf.dtype.itemsize]
    bits = lax.convert_element_type(lax.bitcast_convert_type(leaf, unsigned), np.uint32)
    place = lax.full(leaf.shape, np.uint32(0))
    for axis, size in enumerate(leaf.shape):
        along = lax.broadcasted_iota(np.uint32, leaf.shape, axis)
        place = lax.add(lax.mul(place, np.uint32(size % 2**32)), along)
    mixed = _mixed(lax.bitwise_xor(bits, _mixed(lax.add(place, np.uint32(1)))))
    again = _mixed(lax.add(mixed, np.uint32(0x9E3779B1)))
    axes = tuple(range(leaf.ndim))
    sums = [lax.reduce(each, np.uint32(0), lax.add, axes) for each in (mixed, again)]
    return lax.concatenate([lax.expand_dims(each, (0,)) for each in sums], 0)


def _mixed(x: jax.Array) -> jax.Array:
    """MurmurHash3's last step: each bit of the result depends on each of x."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        shifted = lax.shift_right_logical(x, np.uint32(shift))
        x = lax.mul(lax.bitwise_xor(x, shifted), np.uint32(factor))
    return lax.bitwise_xor(x, lax.shift_right_logical(x, np.uint32(16)))
