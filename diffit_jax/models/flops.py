"""What an evaluation of a network costs."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from diffit_jax import models


def training_flops(model: models.Model) -> int:
    """FLOPs of matrix products for one image: three forward passes, since the backward pass costs
    two.

    What is computed again in the backward pass, to save memory, is not counted.
    """
    return 3 * 2 * traced_multiply_adds(model)


@functools.cache
def traced_multiply_adds(model: models.Model) -> int:
    """Multiply-adds of the matrix products and convolutions of one evaluation for one example,
    counted in the traced program.

    The same for every way to compute attention: a kernel's are those of the products that it stands
    for.
    """
    model = model.with_xla_attention()
    shapes = jax.eval_shape(lambda: models.init_variables(model, jax.random.key(0)))
    x_BHWC = jax.ShapeDtypeStruct((1, *model.sample_shape), jnp.float32)
    return count_multiply_adds(
        jax.make_jaxpr(lambda v, x: models.as_network(model, v)(x, jnp.zeros(1), {}))(
            shapes, x_BHWC
        ).jaxpr
    )


def count_multiply_adds(jaxpr: Any) -> int:
    """Multiply-adds of the matrix products and convolutions of a traced program, in which loops
    have a fixed length."""
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
