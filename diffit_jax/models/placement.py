"""Where arrays of a network lie on devices: networks say *what* they have, and whoever traces them
says where that goes.

The networks know no mesh; by default nothing happens. A trace is valid only under the placement in
which it was made, which jit's cache does not know: call `jit` inside the block of `under`, on a
function of its own, and never use that function outside.
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
class Placement:
    """What networks that are traced inside `under(…)` do.

    Attributes:
      activation: an activation whose leading axis is the batch → the same, where it should lie.
      weight: (path of a parameter, such as "blocks/mlp_in/kernel", its value) → the same, whole, as
        far as the product that follows needs it. A stacked parameter comes as one of its layers.
      per_shard: a function of arrays (B, H, …), (B, H, …), (B, H, …), (…, H) → the same function,
        computed by every device for its own examples and heads. For what the compiler cannot divide
        by itself.
      platform: "tpu", "cpu" …; None: that of jax's default device.
    """

    activation: Callable[[jax.Array], jax.Array] = lambda x: x
    weight: Callable[[str, jax.Array], jax.Array] = lambda _, x: x
    per_shard: Callable[[Callable], Callable] = lambda function: function
    platform: str | None = None


_NOWHERE = Placement()
_current: contextvars.ContextVar[Placement] = contextvars.ContextVar("placement", default=_NOWHERE)


@contextlib.contextmanager
def under(placement: Placement) -> Iterator[None]:
    """Arrays of networks that are traced in this block lie like this."""
    token = _current.set(placement)
    try:
        yield
    finally:
        _current.reset(token)


@contextlib.contextmanager
def nowhere() -> Iterator[None]:
    """Networks that are traced in this block, to be looked at only, are for the same platform but
    lie on no devices."""
    with under(Placement(platform=_current.get().platform)):
        yield


def at_least_float32(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype of what is not computed in a network's lower precision: float32, or float64 in a
    network that is that."""
    return jnp.promote_types(dtype, jnp.float32)


def placed(x: jax.Array) -> jax.Array:
    """An activation whose leading axis is the batch, where it should lie."""
    return _current.get().activation(x)


def weight(module: nn.Module, name: str, value: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """A parameter in the dtype of the product that follows, ready for it. Cast first: half as much
    has to be moved.

    Args:
      module: whose parameter it is; its own path is the name by which rules know the parameter.
      name: of the parameter within the module.
      value: of the parameter.
      dtype: of the product.
    """
    return _current.get().weight("/".join((*module.path, name)), value.astype(dtype))


class Dense(nn.Module):
    """`nn.Dense` whose kernel is placed like other weights.

    Attributes:
      features: channels of the output.
      dtype: of the matrix product; parameters are float32.
      kernel_init: of the kernel.
    """

    features: int
    dtype: jnp.dtype = jnp.float32
    kernel_init: Callable = nn.initializers.xavier_uniform()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (…, C) to (…, features)."""
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,))
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        kernel = weight(self, "kernel", kernel, kernel.dtype)
        y = jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))
        return y + bias.reshape((1,) * (y.ndim - 1) + (-1,))


def per_shard(function: Callable) -> Callable:
    """A function of (B, H, …) arrays and one (…, H) array, computed by every device for its own
    examples and heads."""
    return _current.get().per_shard(function)


def platform() -> str:
    """What the network is traced for: "tpu", "gpu" or "cpu"."""
    name = _current.get().platform or jax.default_backend()
    return "gpu" if name in ("cuda", "rocm") else name
