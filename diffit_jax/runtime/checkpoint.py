"""Checkpoints: named pytrees saved together, restored into shapes with shardings, by Orbax."""

import contextlib
import functools
import gc
import hashlib
import logging
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging as absl_logging
from etils import epath
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from diffit_jax import platforms
from diffit_jax.errors import CannotWrite, UserError
from diffit_jax.runtime import distributed, files, parallel
from diffit_jax.runtime.console import first_few

log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints in one directory, each a step number with several named pytrees ("items").

    A checkpoint is written in the background and appears under its name when it is complete, with
    all its items.

    Three values of its metadata say whether it is a good one: `finite`, whether its arrays are;
    `skipped_in_row`, 0 if the loss of its step was finite; and `updates`, how many of its steps
    changed the parameters. One that has fewer of them than there are by now was followed by a
    finite loss of its own parameters. Where one is not there, as in checkpoints of other kinds,
    nothing speaks against it.

    A fourth one, `sums`, has two sums of the bits of each array (see `sums_of`), compared when it
    is restored: a bit that was flipped on a disk is noticed.
    """

    def __init__(
        self, directory: epath.PathLike, keep: int | None = None, keep_every: int | None = None
    ):
        """Open `directory`, to read only if `keep` is None.

        Args:
          directory: local or `gs://`.
          keep: how many checkpoints stay: the newest, and the newest good ones before it, at least
            one of these and one that was followed by a finite loss.
          keep_every: those whose step is a multiple of this stay too.
        """
        self.directory = files.resolve(directory, "directory of checkpoints")
        self._keep, self._keep_every, self._metadata = keep, keep_every, {}
        if keep is not None:
            _cut_large_arrays_only()
        # Orbax would create a directory that is only read from.
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self if keep is not None else None,
            create=keep is not None,
            cleanup_tmp_directories=keep is not None,
        )
        self._manager = (
            ocp.CheckpointManager(self.directory, options=options)
            if keep or self.directory.exists()
            else None
        )

    def steps(self) -> list[int]:
        """Return the step numbers of all complete checkpoints, ascending."""
        return sorted(self._manager.all_steps()) if self._manager else []

    def save(self, step: int, items: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
        """Start writing pytrees of arrays under a step number; return when the arrays are copied.

        Args:
          step: number of the checkpoint; checkpoints that need not stay (see `keep`) are deleted
            once it is complete.
          items: name → pytree of `jax.Array`.
          metadata: JSON values saved with the items.
        """
        arguments = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        self._metadata[step] = dict(metadata)
        facts = {**metadata, "sums": sums_of(items)}
        with self._writing():
            if not self._manager.save(
                step, args=ocp.args.Composite(**arguments, facts=ocp.args.JsonSave(facts))
            ):
                raise UserError(
                    f"checkpoint {step} was not written: {self.directory} holds it or a newer one; "
                    "move these away"
                )

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        """Answer Orbax which checkpoints stay, the newest one included."""
        steps = sorted(info.step for info in checkpoints)
        stay = set(steps)
        if self._keep is not None and len(steps) > self._keep:
            *older, newest = steps
            good, followed = (
                [step for step in self.good_steps(steps, which) if step in older]
                for which in (None, self._updates(newest))
            )
            stay = {newest, *good[-max(self._keep - 1, 1) :], *followed[-1:]}
        return [
            info.step in stay or bool(self._keep_every and info.step % self._keep_every == 0)
            for info in checkpoints
        ]

    def good_steps(
        self, steps: Sequence[int] | None = None, updates: int | None = None
    ) -> list[int]:
        """Return the steps of good checkpoints, ascending: finite, with a finite loss.

        Args:
          steps: their step numbers; None: all complete ones.
          updates: how many updates there have been by now: only those that were followed by one;
            None: all.
        """
        good = []
        for step in self.steps() if steps is None else sorted(steps):
            metadata = self.metadata(step)
            if (
                metadata.get("finite", True)
                and not metadata.get("skipped_in_row")
                and (updates is None or self._updates(step) < updates)
            ):
                good.append(step)
        return good

    def _updates(self, step: int) -> int:
        return self.metadata(step).get("updates", step)

    def wait(self) -> None:
        """Wait until nothing is being written any more."""
        if self._manager:
            with self._writing():
                self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turn a failure to write, now or in the background, into one line."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            remedy = files.remedy_for_writing(error)
            if remedy is None:
                raise
            good = self.steps() if self.directory.exists() else []
            last = f"checkpoint {good[-1]} is the last good one" if good else "there is none yet"
            raise CannotWrite(
                f"a checkpoint could not be written to {self.directory} ({_first_line(error)}): "
                f"{remedy}; {last}"
            ) from error

    def restore(
        self,
        abstract_items: Mapping[str, Any],
        step: int | None = None,
        allow_nonfinite: bool = False,
    ) -> tuple[int, dict[str, Any]] | None:
        """Restore items of the newest usable checkpoint, and log which ones were not.

        Args:
          abstract_items: name → pytree of `ShapeDtypeStruct` with shardings; items of the
            checkpoint that are not named are not read.
          step: the checkpoint of this step, and no other one.
          allow_nonfinite: whether one whose parameters or averages are not finite can be used.

        Returns:
          (step, items), or None if there is no checkpoint.

        Raises:
          UserError: there are checkpoints but none can be used, or not the one that is asked for.
        """
        reasons, steps = [], self.steps()
        if step is not None and step not in steps:
            raise UserError(
                f"there is no checkpoint {step} in {self.directory}: use "
                f"{', '.join(map(str, steps)) or 'none'}"
            )
        for candidate in reversed(steps if step is None else [step]):
            items: Any = None
            reason = ""
            try:
                items = self.restore_step(candidate, abstract_items)
            except Exception as error:
                # Whatever a damaged or foreign file leads to inside Orbax: older ones may be good.
                reason = self._differences(candidate, abstract_items) or _first_line(error)
            if not distributed.all_hosts(items is not None):
                reason = reason or "another process could not read it"
            elif not allow_nonfinite:
                reason = self._diverged(candidate, items or {})
            if reason:
                reasons.append(f"checkpoint {candidate}: {reason}")
                log.warning(
                    "checkpoint %d in %s cannot be used (%s)", candidate, self.directory, reason
                )
                continue
            if reasons:
                log.warning("checkpoint %d is used instead", candidate)
            return candidate, items
        if reasons:
            remedy = (
                "--allow_nonfinite uses it all the same"
                if "are not finite" in reasons[0]
                else "move it away to start anew"
            )
            raise UserError(
                f"no checkpoint in {self.directory} can be used ({reasons[0]}): {remedy}"
            )
        return None

    def _diverged(self, step: int, items: Mapping[str, Any]) -> str:
        """Return why a checkpoint is unusable if its numbers are not finite; else ""."""
        metadata = self.metadata(step)
        if metadata.get("finite"):  # else false, or of a version that did not record it
            return ""
        bad = not_finite(_without_moments(items))
        if not bad and "finite" not in metadata:
            return ""
        named = f" ({first_few(bad)})" if bad else ""
        return f"it has parameters or averages that are not finite{named}: the run had diverged"

    def set_aside_after(self, step: int) -> None:
        """Move checkpoints newer than `step`, which are unusable, to `<directory>_damaged`.

        Nothing overwrites them there.
        """
        damaged = self.directory.parent / f"{self.directory.name}_damaged"

        def move() -> None:
            for newer in [other for other in self.steps() if other > step]:
                damaged.mkdir(parents=True, exist_ok=True)
                target = damaged / str(newer)
                if target.exists():
                    target.rmtree()
                shutil.move(self.directory / str(newer), target) if files.is_local(target) else (
                    self.directory / str(newer)
                ).rename(target)
                log.warning("checkpoint %d was moved to %s", newer, target)

        distributed.on_primary(move)
        self._manager.reload()

    def _differences(self, step: int, abstract_items: Mapping[str, Any]) -> str:
        """Say how a checkpoint's arrays differ from the requested ones, the first three by name.

        "" if they do not, or cannot be read.
        """
        differences = []
        for item, wanted in abstract_items.items():
            try:
                found = (
                    ocp.StandardCheckpointer()
                    .metadata(self.directory / str(step) / item)
                    .item_metadata.tree
                )
            except Exception:  # damaged: the restore has said what is wrong
                return ""
            here, there = _shapes(wanted), _shapes(found)
            for name in sorted(here.keys() | there.keys()):
                if here.get(name) != there.get(name):
                    differences.append(
                        f"{item}/{name} is {there.get(name, 'missing')} there, "
                        f"{here.get(name, 'missing')} here"
                    )
        more = f", and {len(differences) - 3} more" if len(differences) > 3 else ""
        return f"it is of another model: {'; '.join(differences[:3])}{more}" if differences else ""

    def metadata(self, step: int) -> dict[str, Any]:
        """Return the metadata of a checkpoint; {} if they cannot be read."""
        if step not in self._metadata:
            try:
                self._metadata[step] = dict(
                    self._manager.restore(
                        step, args=ocp.args.Composite(facts=ocp.args.JsonRestore())
                    )["facts"]
                )
            except Exception:  # a damaged checkpoint, or a foreign one: whoever restores it says so
                return {}
        return self._metadata[step]

    def restore_step(self, step: int, abstract_items: Mapping[str, Any]) -> dict[str, Any]:
        """Restore the items of one checkpoint, see `restore`; raise Orbax's errors as they are."""
        arguments = {name: ocp.args.StandardRestore(tree) for name, tree in abstract_items.items()}
        with _quiet_cleanup():
            restored = self._manager.restore(
                step, args=ocp.args.Composite(**arguments, facts=ocp.args.JsonRestore())
            )
        if restored["facts"]["step"] != step:
            raise ValueError(f"it is of step {restored['facts']['step']}")
        items = {name: restored[name] for name in abstract_items}
        if "sums" not in restored["facts"]:
            log.info("checkpoint %d is of an earlier version, without sums of its arrays", step)
            return items
        changed = _changed(items, restored["facts"]["sums"])
        if changed:
            raise ValueError(
                f"{first_few(changed)} came back with other bits than were saved: a disk or memory "
                "has flipped some"
            )
        return items


def _changed(items: Mapping[str, Any], sums: Mapping[str, Sequence[Any]]) -> list[str]:
    """Return the names of arrays with other sums than those that were saved.

    Arrays that are restored as another dtype are not compared.
    """
    found = sums_of(items)
    return [
        name
        for name, (dtype, *ours) in found.items()
        if name in sums and sums[name][0] == dtype and list(sums[name][1:]) != ours
    ]


@functools.cache
def _cut_large_arrays_only() -> None:
    """Have Orbax, in this process, divide an array for writing only above 1 MiB per device.

    Cutting small ones takes longer than writing them (a save of 125 on two devices blocks a run for
    0.32 s, without that for 0.05 s).
    """
    handler = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=2**20)
    loudness = absl_logging.get_verbosity()
    absl_logging.set_verbosity(absl_logging.ERROR)  # that there was another one is no news
    try:
        ocp.type_handlers.register_type_handler(jax.Array, handler, override=True)
    finally:
        absl_logging.set_verbosity(loudness)


def _without_moments(items: Mapping[str, Any]) -> dict[str, Any]:
    """Select parameters and averages, by their paths.

    An optimizer's moments may overflow while the run is sound.
    """
    return {
        name: leaf for name, leaf in parallel.named(items) if "opt_state" not in name.split("/")
    }


def _shapes(tree: Any) -> dict[str, str]:
    """Return dtype and shape of every array by its path."""
    return {
        name: f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"
        for name, leaf in parallel.named(tree)
    }


def _first_line(error: Exception) -> str:
    return (
        f"{type(error).__name__}: "
        f"{str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    )[:200]


@contextlib.contextmanager
def _quiet_cleanup() -> Iterator[None]:
    """Keep Python from printing a page for each half-done read that a failed restore leaves."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        yield
    except BaseException:
        gc.collect()  # half a second: only where there is something to clean up
        raise
    finally:
        sys.unraisablehook = hook


# --- Digests of arrays, computed on their devices.

_SMALL, _SLICE = 2**20, 2**19  # bytes


def fingerprint(tree: Any) -> str:
    """Digest names, shapes and values of a pytree of arrays.

    Equal for equal values, wherever they come from and however they are sharded: sums of 32-bit
    integers do not depend on their order, nor on how an array is divided over devices.
    """
    leaves = parallel.named(tree)
    sums = _of_each(_sums, leaves)
    digest = hashlib.sha256()
    for (name, leaf), pair in zip(leaves, sums, strict=True):
        digest.update(f"{name} {np.dtype(leaf.dtype).name} {leaf.shape} {pair}\n".encode())
    return digest.hexdigest()[:32]


def sums_of(tree: Any) -> dict[str, list[Any]]:
    """Return dtype and two sums of the bits of each array in a pytree, by its path.

    Integer sums, the plain one and one weighted by position: any flipped bit changes the first, and
    both are the same however an array is divided over devices and hosts. Made where the arrays lie,
    by one program that reads each once.
    """
    leaves = [(name, leaf) for name, leaf in parallel.named(tree) if leaf.dtype.itemsize <= 4]
    pairs = _of_each(_weighted_sums, leaves, _weighted_sums_by_slices)
    return {
        name: [np.dtype(leaf.dtype).name, *pair]
        for (name, leaf), pair in zip(leaves, pairs, strict=True)
    }


def not_finite(tree: Any) -> list[str]:
    """Name the arrays in a pytree that have a NaN or infinity, each with how many."""
    leaves = parallel.named(tree)
    counts = _of_each(_count_bad, leaves)
    return [
        f"{name} ({bad} of {leaf.size})"
        for (name, leaf), bad in zip(leaves, counts, strict=True)
        if bad
    ]


def _of_each(
    function: Callable[[jax.Array], jax.Array],
    leaves: list[tuple[str, jax.Array]],
    of_large: Callable[[jax.Array], jax.Array] | None = None,
) -> list[Any]:
    """Apply a function to each array in one program; return the results on every process's host.

    `of_large`: the same function for arrays of several axes that are large, where the platform
    works by slices.
    """
    # Small arrays of one shape, of which networks have hundreds, are computed together: one by one
    # they take ten seconds to compile. To stack large ones would take memory.
    alike: dict[Any, list[int]] = {}
    for place, (_, leaf) in enumerate(leaves):
        small = leaf.size * leaf.dtype.itemsize <= _SMALL
        alike.setdefault((leaf.shape, leaf.dtype, None if small else place), []).append(place)
    groups = [[leaves[place][1] for place in places] for places in alike.values()]
    if not groups:
        return []
    all_hosts = None
    first = leaves[0][1]
    if isinstance(first, jax.Array) and isinstance(first.sharding, NamedSharding):
        all_hosts = NamedSharding(first.sharding.mesh, PartitionSpec())
    sliced = of_large if isinstance(first, jax.Array) and _by_slices(first) else None
    results = np.asarray(_program(function, sliced, all_hosts)(groups).addressable_data(0))
    order = [place for places in alike.values() for place in places]
    return results[np.argsort(order)].tolist()


def _by_slices(array: jax.Array) -> bool:
    device = next(iter(array.sharding.device_set))
    return platforms.of(device.platform).sums_by_slices


@functools.lru_cache(maxsize=16)
def _program(
    function: Callable[[jax.Array], jax.Array],
    of_large: Callable[[jax.Array], jax.Array] | None,
    all_hosts: NamedSharding | None,
) -> Callable:
    def of_group(group: list[jax.Array]) -> jax.Array:
        large = group[0].size * group[0].dtype.itemsize > _SMALL and group[0].ndim > 1
        if large and of_large:  # it is alone
            return of_large(group[0])[None]
        stack = lax.concatenate([lax.expand_dims(leaf, (0,)) for leaf in group], 0)
        return jax.vmap(function)(stack)

    def of_groups(groups: list[list[jax.Array]]) -> jax.Array:
        return jnp.concatenate([of_group(group) for group in groups])

    return jax.jit(of_groups, out_shardings=all_hosts)


def _count_bad(leaf: jax.Array) -> jax.Array:
    return jnp.sum(~jnp.isfinite(leaf), dtype=jnp.uint32)


def _bits(leaf: jax.Array) -> jax.Array:
    """Return the bits of each value, uint32."""
    unsigned = {1: np.uint8, 2: np.uint16, 4: np.uint32}[leaf.dtype.itemsize]
    leaf = lax.convert_element_type(leaf, np.uint8) if leaf.dtype == bool else leaf
    return lax.convert_element_type(lax.bitcast_convert_type(leaf, unsigned), np.uint32)


def _places(shape: tuple[int, ...], axes: int) -> jax.Array:
    """Return the number of each value's place along the first axes, in the order of memory."""
    place = lax.full(shape, np.uint32(0))
    for axis, size in enumerate(shape[:axes]):
        along = lax.broadcasted_iota(np.uint32, shape, axis)
        place = lax.add(lax.mul(place, np.uint32(size % 2**32)), along)
    return place


def _weighted_sums(leaf: jax.Array) -> jax.Array:
    """Return the sum of all bits of an array, and the sum weighted by odd numbers: (2,) uint32.

    The weights are 2 place + 1.
    """
    leaf = leaf.reshape(1, -1) if leaf.ndim < 2 else leaf
    leading = tuple(range(leaf.ndim - 1))
    bits, rows = _bits(leaf), _places(leaf.shape, leaf.ndim - 1)
    plain_C, by_row_C = (
        lax.reduce(each, np.uint32(0), lax.add, leading) for each in (bits, lax.mul(bits, rows))
    )
    return _of_columns(plain_C, by_row_C)


def _weighted_sums_by_slices(leaf: jax.Array) -> jax.Array:
    """Return `_weighted_sums` of a large array on a CPU, in slices that its cache holds.

    There XLA would write the bits of all of it to memory first: five times as slow.
    """
    columns = leaf.shape[-1]
    rows = leaf.size // columns
    most = max(1, _SLICE // (columns * leaf.dtype.itemsize))
    size = next(size for size in range(min(most, rows), 0, -1) if rows % size == 0)

    def add(sums: tuple[jax.Array, jax.Array, jax.Array], slice_RC: jax.Array) -> Any:
        plain_C, by_row_C, first = sums
        bits = _bits(slice_RC)
        sum_C, weighted_C = (
            lax.reduce(each, np.uint32(0), lax.add, (0,))
            for each in (bits, lax.mul(bits, lax.broadcasted_iota(np.uint32, bits.shape, 0)))
        )
        return (plain_C + sum_C, by_row_C + weighted_C + sum_C * first, first + size), None

    zeros_C = jnp.zeros(columns, np.uint32)
    start = zeros_C, zeros_C, jnp.zeros((), np.uint32)
    (plain_C, by_row_C, _), _ = lax.scan(add, start, leaf.reshape(-1, size, columns))
    return _of_columns(plain_C, by_row_C)


def _of_columns(plain_C: jax.Array, by_row_C: jax.Array) -> jax.Array:
    """Return the two sums of an array, given those of its columns, and those weighted by rows."""
    (columns,) = plain_C.shape
    odd_C = lax.broadcasted_iota(np.uint32, (columns,), 0) * np.uint32(2) + np.uint32(1)
    weighted_C = plain_C * odd_C + by_row_C * np.uint32(2 * columns % 2**32)
    sums = [lax.reduce(each, np.uint32(0), lax.add, (0,)) for each in (plain_C, weighted_C)]
    return lax.concatenate([lax.expand_dims(each, (0,)) for each in sums], 0)


def _sums(leaf: jax.Array) -> jax.Array:
    """Return two sums over all values of an array, each mixed with its index: (2,) uint32."""
    bits, place = _bits(leaf), _places(leaf.shape, leaf.ndim)
    mixed = _mixed(lax.bitwise_xor(bits, _mixed(lax.add(place, np.uint32(1)))))
    again = _mixed(lax.add(mixed, np.uint32(0x9E3779B1)))
    axes = tuple(range(leaf.ndim))
    sums = [lax.reduce(each, np.uint32(0), lax.add, axes) for each in (mixed, again)]
    return lax.concatenate([lax.expand_dims(each, (0,)) for each in sums], 0)


def _mixed(x: jax.Array) -> jax.Array:
    """Mix by MurmurHash3's last step: each bit of the result depends on each of x."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        shifted = lax.shift_right_logical(x, np.uint32(shift))
        x = lax.mul(lax.bitwise_xor(x, shifted), np.uint32(factor))
    return lax.bitwise_xor(x, lax.shift_right_logical(x, np.uint32(16)))
