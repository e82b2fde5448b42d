"""The base class of networks, and what is done with any of them.

Variables are made (`init_variables`), bound (`as_network`) and found out about by tracing (casts
before use, multiply-adds).
"""

import contextlib
import functools
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffit_jax import limits, platforms
from diffit_jax.limits import RESUMABLE, Count, CountOrZero, Dtype, fraction, one_of
from diffit_jax.models import placement
from diffit_jax.models.diffit.attention import Statistics, measured_by
from diffit_jax.models.diffit.attention import forward_mode as forward_mode_of_attention
from diffit_jax.models.diffit.backends import BACKENDS
from diffit_jax.models.diffit.blocks import REMAT_POLICIES

# Of samples with a class token: a dict of both, (B, H, W, C) and (B, 1, 1, D).
IMAGE, CLASS = "image", "class"


class Model(nn.Module, kw_only=True):
    """A network as a frozen Flax module: sizes are its attributes, arrays its arguments.

    A subclass overrides `sample_shape`, `__call__` and whatever else differs.

    Attributes:
      num_classes: number of labels; 0 makes the model unconditional.
      dropout: of the blocks in training, see `DiffiTBlock`.
      scan_unroll: blocks per iteration of a scan, see `repeat_block`: 1 keeps the program small,
        the full depth is almost twice as fast for a small network on a CPU.
      remat: what the backward pass keeps of a block, a name in `REMAT_POLICIES`: "none" keeps
        everything.
      attention: how attention is computed, a name in `backends.BACKENDS`.
      dtype: dtype of the matrix products of the blocks; parameters, softmax, normalisation and the
        last layer are float32.
    """

    num_classes: CountOrZero = 0
    dropout: Annotated[float, fraction(below_one=True)] = 0.0
    scan_unroll: Annotated[Count, RESUMABLE] = 1
    remat: Annotated[str, one_of(*REMAT_POLICIES), RESUMABLE] = "none"
    attention: Annotated[str, one_of(*BACKENDS), RESUMABLE] = "xla"
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
    def has_inner_head(self) -> bool:
        """Whether the network returns the output of an inner head beside its own."""
        return False

    @property
    def is_map(self) -> bool:
        """Whether the network is told a second time, the one that a flow map goes to."""
        return False

    @property
    def takes_two_levels(self) -> bool:
        """Whether tokens of one sample may have two noise levels, see `LatentDiffiT`."""
        return False

    @property
    def class_token(self) -> Any:
        """Width of the class token that is generated beside the sample (REG); 0: none is."""
        return 0

    @property
    def noise_shapes(self) -> Any:
        """Shapes of the noise that a sample is made of: `sample_shape`, or a dict of such.

        With a class token the network maps `IMAGE` (B, H, W, C) and `CLASS` (B, 1, 1, D) to the
        same.
        """
        if not self.class_token:
            return self.sample_shape
        return {IMAGE: self.sample_shape, CLASS: (1, 1, self.class_token)}

    @property
    def guidance_in(self) -> Any:
        """How it is told the guidance of a flow map, "none": it is not."""
        return "none"

    @property
    def stacked(self) -> tuple[str, ...]:
        """Names of the subtrees of parameters whose leading axis counts layers."""
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
        """Choose how attention is computed on a platform ("tpu", "gpu" or "cpu").

        Returns:
          A name in `backends.BACKENDS`, and why the configured one does not serve, "" if it does.
        """
        return "xla", ""

    def with_xla_attention(self) -> "Model":
        """Return the same network with attention by XLA; a trace then shows all products."""
        return self.clone(attention="xla")

    def check(self) -> None:
        """Raise `UserError` for impossible values, or sizes that do not fit together.

        Called before anything is allocated or compiled.
        """
        limits.check(self, "model")
        self.check_sizes()

    def check_sizes(self) -> None:
        """Raise `UserError` if the sizes do not fit together."""


@functools.partial(jax.jit, static_argnums=0)
def init_variables(model: Model, key: jax.Array) -> dict[str, Any]:
    """Initialise float32 variables of a network from a scalar key.

    Jitted, so that a network is traced once for everybody who asks for its variables or their
    shapes, whatever the placement: they do not depend on it. Call it under another `jit` to have
    them made in their places, or under `eval_shape`.

    Returns:
      `params`: what training changes; `constants`: fixed arrays that belong to the model
        (`pos_embed`), empty for some models.
    """
    x_BHWC = jnp.zeros((1, *model.sample_shape), jnp.float32)
    variables = model.init(key, x_BHWC, jnp.zeros((1,), jnp.float32), {})
    return {"params": variables["params"], "constants": variables.get("constants", {})}


def initial_shapes(model: Model) -> Any:
    """Return the shapes of `init_variables`, a tree of `ShapeDtypeStruct`; allocate nothing."""
    return jax.eval_shape(lambda: init_variables(model, jax.random.key(0)))


@functools.cache
def parameter_metadata(model: Model) -> Mapping[str, placement.ParamMetadata]:
    """Return sharding axes and weight decay of each parameter, by its path.

    They are declared where the parameter is made, by `placement.param`.
    """
    x_BHWC = jax.ShapeDtypeStruct((1, *model.sample_shape), jnp.float32)
    level_B = jax.ShapeDtypeStruct((1,), jnp.float32)
    with placement.collect_metadata() as metadata, placement.no_placement():
        jax.eval_shape(lambda x, t: model.init(jax.random.key(0), x, t, {}), x_BHWC, level_B)
    return metadata


def variable_shapes(module: nn.Module, example: tuple[int, ...]) -> Any:
    """Return shapes and dtypes of the variables of another module (autoencoder, FID network).

    The module takes (B, *example) float32. It is traced once per process.
    """
    return jax.eval_shape(lambda: _variables_of(module, example))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _variables_of(module: nn.Module, example: tuple[int, ...]) -> Any:
    return module.init(jax.random.key(0), jnp.zeros((1, *example), jnp.float32))


def as_network(
    model: Model,
    variables: Mapping[str, Any],
    *,
    forward_mode: bool = False,
    capture: int | None = None,
    inner: bool = False,
) -> Callable[[jax.Array, jax.Array, Any], Any]:
    """Bind variables: return the function `(x_BHWC, noise_level_B, conditioning) -> y_BHWC`.

    Call it inside jit with `variables` (`params` and `constants`) an argument of the jitted
    function: captured from outside, they would become constants of the program.

    Args:
      model: the network.
      variables: of the network.
      forward_mode: whether `jax.jvp` is to go through it: attention then has a derivative in this
        direction (by the TPU kernel where it is used, else by XLA), and perhaps none for `grad`.
      capture: number of a block, from 0 (in the U: of the encoder), after which tokens are
        captured: the function returns (y_BHWC, tokens), with tokens (B, L, C), the class token's
        first if there is one, or (B, H, W, C) in the U.
      inner: whether to return the output of a model's inner head too: (y_BHWC, y_inner), before
        tokens. A model that has one always returns both; otherwise callers see y_BHWC alone.
    """
    mode = forward_mode_of_attention if forward_mode else contextlib.nullcontext
    settings: dict[str, Any] = {} if capture is None else {"capture": capture}

    def network(x_BHWC: jax.Array, noise_level_B: jax.Array, conditioning: Any) -> Any:
        with mode():
            found: Any = model.apply(variables, x_BHWC, noise_level_B, conditioning, **settings)
        if not model.has_inner_head or inner:
            return found
        return found[0] if capture is None else (found[0], found[2])

    return network


def measured_network(
    model: Model, variables: Mapping[str, Any], statistics: Statistics
) -> Callable[[jax.Array, jax.Array, Any], tuple[jax.Array, dict[str, dict[str, jax.Array]]]]:
    """Bind variables as `as_network` does, and measure every attention layer on the way.

    Args:
      model: the network.
      variables: of the network.
      statistics: of a layer, computed inside it: weights (B, N, H, L, L) stay there.

    Returns:
      A function `(x_BHWC, noise_level_B, conditioning) -> (y_BHWC, statistics by layer)`: names of
      layers with their number in brackets, in the order of their use as far as names tell it.
    """
    # Without an inner head, which would cut the stack in two.
    settings: dict[str, Any] = {"inner_head": 0} if model.has_inner_head else {}
    model = model.clone(remat="none", **settings)

    def network(x_BHWC: jax.Array, noise_level_B: jax.Array, conditioning: Any) -> Any:
        with measured_by(statistics):
            y_BHWC, found = model.apply(
                variables, x_BHWC, noise_level_B, conditioning, mutable=["statistics"]
            )
        return y_BHWC, _by_layer(model, dict(found).get("statistics", {}))

    return network


def _by_layer(model: Model, tree: Mapping[str, Any]) -> dict[str, dict[str, jax.Array]]:
    layers: dict[str, dict[str, jax.Array]] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        *module, name = (key.key for key in path)
        if module[0] in model.stacked:
            for number in range(len(leaf)):
                layers.setdefault(f"{module[0]}[{number}]", {})[name] = leaf[number]
        else:
            layers.setdefault(module[0], {})[name] = leaf
    return layers


def describe_attention(model: Model, platform: str) -> str:
    """Say how a network computes attention on a platform, and why, for the log.

    For example "xla (the kernel serves windows of …)".
    """
    backend, reason = model.attention_backend(platform)
    if not reason and model.attention == "auto":
        reason = platforms.of(platform).auto_reason
    elif not reason:
        reason = "as the config says"
    return f"{backend} ({reason})"


# Parameter of an equation → its inner program, whose inputs are those of the equation, one for one.
_INNER = ("jaxpr", "call_jaxpr")
_NOT_ONE_FOR_ONE = ("pallas_call",)


def cast_before_use(model: Model, variables: Mapping[str, Any]) -> Any:
    """Find by tracing the parameters that are only used after a cast to the model's dtype.

    Args:
      model: the network.
      variables: its `params` and `constants`, arrays or shapes.

    Returns:
      A tree of bools like `variables`.
    """
    x_BHWC = jax.ShapeDtypeStruct((1, *model.sample_shape), jnp.float32)
    label_B = {"label": jax.ShapeDtypeStruct((1,), jnp.int32)} if model.num_classes else {}
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), variables)
    level_B = jax.ShapeDtypeStruct((1,), jnp.float32)

    def evaluate(variables: Any, *inputs: Any) -> jax.Array:
        return as_network(model, variables)(*inputs)

    with placement.no_placement():  # one example, which no devices divide
        jaxpr = jax.make_jaxpr(evaluate)(shapes, x_BHWC, level_B, label_B).jaxpr
    leaves, tree = jax.tree.flatten(shapes)
    dtype = jnp.dtype(model.dtype)
    flags = [
        leaf.dtype != dtype and _only_cast(jaxpr, index, dtype) for index, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(tree, flags)


def _only_cast(jaxpr: Any, index: int, dtype: jnp.dtype) -> bool:
    """Whether input number `index` of a program is used, and only as its cast to a dtype."""
    variable, used = jaxpr.invars[index], False
    if any(out is variable for out in jaxpr.outvars):
        return False
    for equation in jaxpr.eqns:
        for place, operand in enumerate(equation.invars):
            if operand is not variable:
                continue
            used = True
            if (
                equation.primitive.name == "convert_element_type"
                and equation.params["new_dtype"] == dtype
            ):
                continue
            inner = next(
                (equation.params[name] for name in _INNER if name in equation.params), None
            )
            inner = getattr(inner, "jaxpr", inner)
            if (
                inner is None
                or equation.primitive.name in _NOT_ONE_FOR_ONE
                or len(inner.invars) != len(equation.invars)
            ):
                return False
            if not _only_cast(inner, place, dtype):
                return False
    return used


def training_flops(model: Model) -> int:
    """Count the FLOPs of matrix products per training image: three forward passes.

    The backward pass costs two. Recomputation in the backward pass, to save memory, does not count.
    """
    return 3 * 2 * traced_multiply_adds(model)


@functools.cache
def traced_multiply_adds(model: Model) -> int:
    """Count multiply-adds of matrix products and convolutions for one example, by tracing.

    Every way to compute attention gives the same count: a kernel's are those of the products that
    it replaces.
    """
    model = model.with_xla_attention()
    shapes = initial_shapes(model)
    x_BHWC = jax.ShapeDtypeStruct((1, *model.sample_shape), jnp.float32)
    return count_multiply_adds(
        jax.make_jaxpr(lambda v, x: as_network(model, v)(x, jnp.zeros(1), {}))(shapes, x_BHWC).jaxpr
    )


def count_multiply_adds(jaxpr: Any) -> int:
    """Count multiply-adds of matrix products and convolutions in a jaxpr.

    Its loops have a fixed length.
    """
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            total += equation.outvars[0].aval.size * math.prod(
                equation.invars[0].aval.shape[axis] for axis in contracted
            )
        elif equation.primitive.name == "conv_general_dilated":
            kernel, layout = (
                equation.invars[1].aval.shape,
                equation.params["dimension_numbers"].rhs_spec,
            )
            total += equation.outvars[0].aval.size * math.prod(kernel) // kernel[layout[0]]
        # A scanned body counts as often as it runs.
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                total += times * count_multiply_adds(inner)
    return total
