"""How networks are laid out on devices: they say where, and whoever traces them says what that
means.

The networks know no mesh; by default nothing happens.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype


@dataclasses.dataclass(frozen=True)
class Layout:
    """What networks that are traced inside `layout(…)` do.

    Attributes:
      activation: an activation whose leading axis is the batch → the same, where it should lie.
      weight: (path of a parameter, such as "mlp_in/kernel", its value) → the same, whole, as far as
        the product that follows needs it.
      per_shard: a function of arrays (B, H, …), (B, H, …), (B, H, …), (…, H) → the same function,
        computed by every device for its own examples and heads. For what the compiler cannot divide
        by itself.
      platform: "tpu", "cpu" …; None: that of jax's default device.
    """

    activation: Callable[[jax.Array], jax.Array] = lambda x: x
    weight: Callable[[str, jax.Array], jax.Array] = lambda _, x: x
    per_shard: Callable[[Callable], Callable] = lambda function: function
    platform: str | None = None


_layout: contextvars.ContextVar[Layout] = contextvars.ContextVar("layout")


def _current() -> Layout:
    return _layout.get(_NOWHERE)


_NOWHERE = Layout()


@contextlib.contextmanager
def layout(value: Layout) -> Iterator[None]:
    """Networks that are traced in this block are laid out like this."""
    token = _layout.set(value)
    try:
        yield
    finally:
        _layout.reset(token)


@contextlib.contextmanager
def laid_out_nowhere() -> Iterator[None]:
    """Networks that are traced in this block, to be looked at only, are for the same platform but
    lie on no devices."""
    with layout(Layout(platform=_current().platform)):
        yield


def laid_out(x: jax.Array) -> jax.Array:
    """An activation whose leading axis is the batch, where it should lie."""
    return _current().activation(x)


def weight(name: str, value: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """A parameter in the dtype of the product that follows, ready for it. Cast first: half as much
    has to be moved."""
    return _current().weight(name, value.astype(dtype))


def dense(
    features: int,
    dtype: jnp.dtype,
    name: str,
    kernel_init: Callable = nn.initializers.xavier_uniform(),
) -> nn.Dense:
    """`nn.Dense` whose kernel is laid out like other weights."""

    def promote(
        x: jax.Array, kernel: jax.Array, bias: jax.Array | None, *, dtype: jnp.dtype
    ) -> tuple:
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=dtype)
        return x, _current().weight(f"{name}/kernel", kernel), bias

    return nn.Dense(
        features, kernel_init=kernel_init, dtype=dtype, name=name, promote_dtype=promote
    )


def per_shard(function: Callable) -> Callable:
    """A function of (B, H, …) arrays and one (…, H) array, computed by every device for its own
    examples and heads."""
    return _current().per_shard(function)


def platform() -> str:
    """What the network is traced for: "tpu", "gpu" or "cpu"."""
    name = _current().platform or jax.default_backend()
    return "gpu" if name in ("cuda", "rocm") else name
