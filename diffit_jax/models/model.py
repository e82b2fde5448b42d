"""What every network is, beside being a Flax module."""

from typing import TYPE_CHECKING, Annotated, Any

import flax.linen as nn
import jax.numpy as jnp

from diffit_jax import limits
from diffit_jax.limits import FREE, Count, CountOrZero, Dtype, one_of, share
from diffit_jax.models.attention import BACKENDS
from diffit_jax.models.blocks import REMAT_POLICIES


class Model(nn.Module, kw_only=True):
    """A network as a frozen Flax module: sizes are its attributes, arrays its arguments. Another
    network overrides `sample_shape`, `__call__` and what else differs.

    Attributes:
      num_classes: number of labels; 0 makes the model unconditional.
      dropout: of the blocks in training, see `DiffiTBlock`.
      scan_unroll: blocks per iteration of a scan, see `repeat_block`: 1 keeps the program small,
        the full depth is almost twice as fast for a small network on a CPU.
      remat: what the backward pass keeps of a block, a name in `REMAT_POLICIES`: "none" keeps
        everything.
      attention: how attention is computed, a name in `attention.BACKENDS`.
      dtype: dtype of the matrix products of the blocks; parameters, softmax, normalisation and the
        last layer are float32.
    """

    num_classes: CountOrZero = 0
    dropout: Annotated[float, share(below_one=True)] = 0.0
    scan_unroll: Annotated[Count, FREE] = 1
    remat: Annotated[str, one_of(*REMAT_POLICIES), FREE] = "none"
    attention: Annotated[str, one_of(*BACKENDS), FREE] = "xla"
    dtype: Dtype = jnp.float32

    if TYPE_CHECKING:  # Flax makes dataclasses of modules when they are defined

        def __hash__(self) -> int: ...

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of one example."""
        raise NotImplementedError

    @property
    def output_channels(self) -> int:
        """Channels of what the network returns."""
        return self.sample_shape[-1]

    @property
    def augment_labels(self) -> Any:
        """How many numbers tell it what was done to an image in training."""
        return 0

    @property
    def stacked(self) -> tuple[str, ...]:
        """Names of the parameters whose leading axis counts layers."""
        return ()

    @property
    def heads(self) -> tuple[int | None, int | None]:
        """(attention heads, their width), None where blocks differ in it."""
        return None, None

    @property
    def tries_kernel(self) -> bool:
        """Whether the attention kernel is to be used where it can be."""
        return self.attention == "auto"

    def attention_backend(self, platform: str) -> tuple[str, str]:
        """How attention is computed on a platform ("tpu", "gpu" or "cpu"), and why not as asked for
        ("" if it is): `attention.choose_backend`."""
        return "xla", ""

    def with_xla_attention(self) -> "Model":
        """The same function, all of whose matrix products a trace shows."""
        return self.clone(attention="xla")

    def check(self) -> None:
        """Raises `UserError` for values that cannot be or sizes that do not fit together; called
        before anything is allocated or compiled."""
        limits.check(self, "model")
        self.check_sizes()

    def check_sizes(self) -> None:
        """Raises `UserError` if the sizes do not fit together."""
