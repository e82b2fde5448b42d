"""What every network has, beside being a Flax module."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp


class Tuning(NamedTuple):
    """Settings of a network that decide how fast it is, for reports; None where it has no such.

    Attributes:
      remat: what the backward pass keeps, a name in `REMAT_POLICIES`.
      num_heads, head_width: of attention, if they are the same in all blocks.
    """

    remat: str
    num_heads: int | None
    head_width: int | None


class Model(Protocol):
    """A network as a frozen Flax module: sizes are its attributes, arrays its arguments.

    Attributes:
      num_classes: number of labels; 0: it takes none.
      dropout: share of values dropped in training, where `conditioning` has keys (`dropout_key`).
      dtype: of the matrix products.
    """

    num_classes: int
    dropout: float
    dtype: Any

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of one example."""
        ...

    @property
    def output_channels(self) -> int:
        """Channels of what the network returns."""
        ...

    @property
    def augment_labels(self) -> int:
        """How many numbers tell it what was done to an image in training."""
        ...

    @property
    def stacked(self) -> tuple[str, ...]:
        """Names of the parameters whose leading axis counts layers."""
        ...

    @property
    def tuning(self) -> Tuning: ...

    @property
    def tries_kernel(self) -> bool:
        """Whether the attention kernel is to be used where it can be."""
        ...

    def attention_backend(self, platform: str) -> tuple[str, str]:
        """How attention is computed on a platform ("tpu", "gpu" or "cpu"), and why not as asked
        for ("" if it is)."""
        ...

    def with_xla_attention(self) -> "Model":
        """The same function, all of whose matrix products a trace shows."""
        ...

    def check(self) -> None:
        """Raises `UserError` if the sizes do not fit together; called before anything is allocated
        or compiled."""
        ...

    def init(self, key: jax.Array, *inputs: Any) -> Mapping[str, Any]:
        """Flax's."""
        ...

    def apply(self, variables: Mapping[str, Any], *inputs: Any, **settings: Any) -> jnp.ndarray:
        """Flax's."""
        ...
