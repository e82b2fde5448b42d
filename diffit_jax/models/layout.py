"""Where activations are laid out on devices: networks say `laid_out(x)`, and whoever traces them says what that means.

The networks know no mesh; by default nothing happens.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator

import jax

_layout: contextvars.ContextVar[Callable[[jax.Array], jax.Array]] = contextvars.ContextVar("activation_layout", default=lambda x: x)


def laid_out(x: jax.Array) -> jax.Array:
    """An activation whose leading axis is the batch, as the surrounding `activation_layout` wants it."""
    return _layout.get()(x)


@contextlib.contextmanager
def activation_layout(layout: Callable[[jax.Array], jax.Array]) -> Iterator[None]:
    """`laid_out` is `layout` for networks that are traced in this block."""
    token = _layout.set(layout)
    try:
        yield
    finally:
        _layout.reset(token)
