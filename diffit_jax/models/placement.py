"""How modules state the sharding of their arrays, and how a trace resolves it.

The networks know no mesh; by default nothing happens. A trace is valid only under the placement in
which it was made, which jit's cache does not know: call `jit` inside the block of `use_placement`,
on a function of its own, and never use that function outside.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype

# Axes of a mesh over which a parameter's dimensions may be divided, see `runtime.parallel`.
FSDP, TENSOR = "fsdp", "tensor"
Axes = tuple[str | None, ...]  # of the last dimensions; those before are not divided


@dataclasses.dataclass(frozen=True)
class Placement:
    """What networks that are traced inside `use_placement(…)` do.

    Attributes:
      activation: an activation whose leading axis is the batch → the same, constrained.
      weight: (axes of a parameter, its value) → the same, whole, as far as the product that follows
        needs it. A stacked parameter comes as one of its layers.
      per_shard: a function of arrays (B, H, …) and a last one (…, H) → the same function, computed
        by every device for its own examples and heads. For what the compiler cannot divide by
        itself.
      platform: "tpu", "cpu" …; None: that of jax's default device.
      cores: of a chip that share a program.
      batch_shards: parts into which the batch of an activation is divided.
    """

    activation: Callable[[jax.Array], jax.Array] = lambda x: x
    weight: Callable[[Axes, jax.Array], jax.Array] = lambda _, x: x
    per_shard: Callable[[Callable], Callable] = lambda function: function
    platform: str | None = None
    cores: int = 1
    batch_shards: int = 1


_NOWHERE = Placement()
_current: contextvars.ContextVar[Placement] = contextvars.ContextVar("placement", default=_NOWHERE)


@contextlib.contextmanager
def use_placement(placement: Placement) -> Iterator[None]:
    """Trace networks in this block with their arrays placed like this."""
    token = _current.set(placement)
    try:
        yield
    finally:
        _current.reset(token)


@contextlib.contextmanager
def no_placement() -> Iterator[None]:
    """Trace networks without sharding in this block, for the platform that is set."""
    current = _current.get()
    with use_placement(Placement(platform=current.platform, cores=current.cores)):
        yield


def at_least_float32(dtype: jnp.dtype) -> jnp.dtype:
    """Return the dtype of computations that stay out of a network's lower precision.

    float32, or float64 in a float64 network.
    """
    return jnp.promote_types(dtype, jnp.float32)


def placed(x: jax.Array) -> jax.Array:
    """Constrain the sharding of an activation (B, …), whose leading axis is the batch."""
    return _current.get().activation(x)


class ParamMetadata(NamedTuple):
    """What is declared of a parameter where it is made.

    Attributes:
      axes: that divide it.
      decays: whether weight decay acts on it.
    """

    axes: Axes
    decays: bool


_metadata: contextvars.ContextVar[dict[str, ParamMetadata] | None] = contextvars.ContextVar(
    "metadata", default=None
)


@contextlib.contextmanager
def collect_metadata() -> Iterator[dict[str, ParamMetadata]]:
    """Collect the metadata of parameters that are made in this block, by their paths."""
    found: dict[str, ParamMetadata] = {}
    token = _metadata.set(found)
    try:
        yield found
    finally:
        _metadata.reset(token)


class Param(NamedTuple):
    """A parameter: its value, and the axes that divide it."""

    value: jax.Array
    axes: Axes

    def ready(self, dtype: jnp.dtype) -> jax.Array:
        """Return the value in `dtype`, gathered as far as the next product needs it.

        Shaped like the parameter. Cast first: half as much has to be moved.
        """
        return _current.get().weight(self.axes, self.value.astype(dtype))


def param(
    module: nn.Module,
    name: str,
    init: Callable[..., jax.Array],
    shape: tuple[int, ...],
    axes: Axes = (),
    *,
    decays: bool = True,
) -> Param:
    """Make a parameter of a module, and declare its sharding and weight decay.

    Args:
      module: the module that has it.
      name: of the parameter within the module.
      init: initialiser of its value.
      shape: of the value.
      axes: mesh axes that divide its last dimensions.
      decays: whether weight decay acts on it.
    """
    _note(module, name, axes, decays)
    return Param(module.param(name, init, shape), axes)


def _note(module: nn.Module, name: str, axes: Axes, decays: bool) -> None:
    found = _metadata.get()
    if found is not None:
        found["/".join((*module.path, name))] = ParamMetadata(axes, decays)


class _Noted(nn.Module):
    """A module of Flax, whose kernel or table is divided over its last dimension; kernels decay."""

    def param(self, name: str, *arguments: Any, **settings: Any) -> Any:
        matrix = name in ("kernel", "embedding")
        _note(self, name, (FSDP,) if matrix else (), name == "kernel")
        return super().param(name, *arguments, **settings)


class Conv(_Noted, nn.Conv):
    """`nn.Conv`, see `_Noted`."""


class Embed(_Noted, nn.Embed):
    """`nn.Embed`, see `_Noted`."""


class LayerNorm(_Noted, nn.LayerNorm):
    """`nn.LayerNorm`, see `_Noted`."""


class GroupNorm(_Noted, nn.GroupNorm):
    """`nn.GroupNorm`, see `_Noted`."""


class Dense(nn.Module):
    """`nn.Dense` whose kernel is placed like other weights.

    Attributes:
      features: channels of the output.
      dtype: of the matrix product; parameters are float32.
      kernel_init: of the kernel.
      axes: that divide the kernel (C, features).
    """

    features: int
    dtype: jnp.dtype = jnp.float32
    kernel_init: Callable = nn.initializers.xavier_uniform()
    axes: Axes = (None, FSDP)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (…, C) to (…, features)."""
        shape, zeros = (x.shape[-1], self.features), nn.initializers.zeros_init()
        kernel = param(self, "kernel", self.kernel_init, shape, self.axes)
        of_bias = (TENSOR,) if self.axes[-1] == TENSOR else ()
        bias = param(self, "bias", zeros, (self.features,), of_bias, decays=False).value
        x, value, bias = promote_dtype(x, kernel.value, bias, dtype=self.dtype)
        y = jax.lax.dot_general(
            x, kernel._replace(value=value).ready(value.dtype), (((x.ndim - 1,), (0,)), ((), ()))
        )
        return y + bias.reshape((1,) * (y.ndim - 1) + (-1,))


def per_shard(function: Callable) -> Callable:
    """Wrap a function of (B, H, …) arrays and one (…, H) array to run per device.

    Every device computes its own examples and heads.
    """
    return _current.get().per_shard(function)


def platform() -> str:
    """Return the platform that the network is traced for, see `platforms.of`."""
    return _current.get().platform or jax.default_backend()


def divisible(count: int) -> int:
    """Return the next number of examples, from `count` on, that the devices divide."""
    shards = _current.get().batch_shards
    return -(-count // shards) * shards


def cores() -> int:
    """Return how many cores of a chip share the program that is traced."""
    return _current.get().cores
