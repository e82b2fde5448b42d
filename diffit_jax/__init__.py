"""DiffiT, Diffusion Vision Transformers for Image Generation, in JAX and Flax.

    from diffit_jax import DiffiT

`DiffiT` and `UserError` are here; importing this package alone imports no jax.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffit_jax.errors import UserError
    from diffit_jax.sampling.pipeline import DiffiT, Images

__version__ = "0.3.0"
__all__ = ["DiffiT", "Images", "UserError"]


def __getattr__(name: str) -> Any:
    if name == "UserError":
        from diffit_jax.errors import UserError

        return UserError
    if name in __all__:
        from diffit_jax.sampling import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module 'diffit_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
