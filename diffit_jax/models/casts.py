"""Which parameters a network casts before each use, so that a copy in that dtype is as good as the
original."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from diffit_jax import models
from diffit_jax.models import placement

# Parameter of an equation → its inner program, whose inputs are those of the equation, one for one.
_INNER = ("jaxpr", "call_jaxpr")
_NOT_ONE_FOR_ONE = ("pallas_call",)


def cast_before_use(model: models.Model, variables: Mapping[str, Any]) -> Any:
    """Finds the variables of which an evaluation uses nothing but their cast to the model's dtype,
    in the traced program.

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
        return models.as_network(model, variables)(*inputs)

    with placement.nowhere():  # one example, which no devices divide
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
