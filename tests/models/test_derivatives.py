"""Networks are differentiable forwards: `jax.jvp`, and `vmap` of it, equal central differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.trees import random_like

from diffit_jax import models
from diffit_jax.models.diffit.image import ImageDiffiT
from diffit_jax.models.diffit.latent import LatentDiffiT
from diffit_jax.runtime import parallel
from diffit_jax.runtime.backend import enable_x64

# Of every kind of part: two stages, heads, a window smaller than the image, dropout's place.
NETWORKS = {
    "image": ImageDiffiT(
        image_size=8,
        channels=(8, 16),
        num_blocks=(2, 1),
        head_width=8,
        time_width=16,
        num_classes=3,
        augment_labels=2,
        dtype=jnp.float64,
    ),
    "latent": LatentDiffiT(
        input_size=8,
        hidden_size=16,
        depth=3,
        num_heads=2,
        num_classes=3,
        attention="auto",
        dtype=jnp.float64,
    ),
}


@pytest.fixture(params=NETWORKS, scope="module")
def network(request):
    """(function of (variables, x, level), its derivative, a point, a direction), all float64."""
    model = NETWORKS[request.param]
    shapes = jax.eval_shape(lambda: models.init_variables(model, jax.random.key(0)))
    with enable_x64(True):
        level, other = np.array([-0.7, 0.4]), np.array([1.0, -0.5])
        x = jax.ShapeDtypeStruct((2, *model.sample_shape), jnp.float64)
        point = random_like(shapes, 1), random_like(x, 2), level
        direction = random_like(shapes, 3), random_like(x, 4), other
        conditioning = {"label": jnp.array([0, 3])}

        def evaluate(variables, x, level):
            return models.as_network(model, variables, forward_mode=True)(x, level, conditioning)

        forward = jax.jit(lambda *a: jax.jvp(evaluate, a[:3], a[3:]))
        yield jax.jit(evaluate), forward, point, direction


def moved(point, direction, step):
    return jax.tree.map(lambda a, b: np.asarray(a) + step * np.asarray(b), point, direction)


def central_difference(function, point, direction, step=2e-4):
    """Of fourth order: its error is about step⁴ = 2e-15 times a fifth derivative, and rounding
    adds 1e-16 / step."""
    one, two = (
        np.subtract(
            function(*moved(point, direction, k * step)),
            function(*moved(point, direction, -k * step)),
        )
        / (2 * k * step)
        for k in (1, 2)
    )
    return (4 * one - two) / 3


def test_jvp_is_the_central_difference(network):
    function, forward, point, direction = network
    with enable_x64(True):
        value, tangent = map(np.asarray, forward(*point, *direction))
        assert value.dtype == tangent.dtype == np.float64
        np.testing.assert_array_equal(value, function(*point))
        difference = central_difference(function, point, direction)
        scale = np.abs(difference).max()
        assert scale > 0.1  # or nothing would have been shown
        np.testing.assert_allclose(tangent / scale, difference / scale, rtol=0, atol=1e-8)


def test_vmap_of_jvp_is_every_directions(network):
    function, _, point, direction = network
    with enable_x64(True):
        direction = jax.tree.map(np.asarray, direction)
        many = jax.tree.map(lambda leaf: np.stack([leaf, -2 * leaf, leaf**2]), direction)

        @jax.jit
        def tangents(point, many):
            return jax.vmap(lambda one: jax.jvp(function, point, one)[1])(many)

        found = np.asarray(tangents(point, many))
        for index, each in enumerate(found):
            one = jax.tree.map(lambda leaf, index=index: leaf[index], many)
            difference = central_difference(function, point, one)
            scale = np.abs(difference).max()
            np.testing.assert_allclose(each / scale, difference / scale, rtol=0, atol=1e-8)


def test_backward_and_forward_derivatives_agree(network):
    """⟨J v, w⟩ = ⟨v, Jᵀ w⟩, to float64's rounding of some thousand summands."""
    function, forward, point, direction = network
    with enable_x64(True):
        _, tangent = forward(*point, *direction)
        weights = random_like(tangent, 5)
        gradient = jax.jit(jax.grad(lambda p: jnp.sum(function(*p) * weights)))(point)
        ours = sum(jax.tree.leaves(jax.tree.map(np.vdot, gradient, direction)))
        np.testing.assert_allclose(ours, np.vdot(tangent, weights), rtol=1e-10)


def test_the_derivative_goes_through_a_divided_network():
    """With parameters that are gathered over `fsdp` and heads over `tensor`: the same numbers as
    on one device, in float32."""
    model = NETWORKS["latent"].clone(dtype=jnp.float32)
    shapes = jax.eval_shape(lambda: models.init_variables(model, jax.random.key(0)))
    variables, direction = (
        jax.tree.map(lambda leaf: leaf.astype(jnp.float32), random_like(shapes, seed))
        for seed in (1, 3)
    )
    x = random_like(jax.ShapeDtypeStruct((2, *model.sample_shape), jnp.float32), 2)
    found, metadata = [], models.parameter_metadata(model)
    for shape in (dict(data=1, fsdp=2), dict(data=2, fsdp=1)):
        mesh = parallel.make_mesh(shape=parallel.MeshShape(**shape))
        here, there = (
            jax.device_put(tree, parallel.shardings(mesh, tree, metadata))
            for tree in (variables, direction)
        )

        def tangent(variables, direction, x, model=model):
            def function(variables):
                return models.as_network(model, variables, forward_mode=True)(x, jnp.ones(2), {})

            one = jax.jvp(function, (variables,), (direction,))[1]
            mapped = jax.vmap(lambda d: jax.jvp(function, (variables,), (d,))[1])
            return one, mapped(jax.tree.map(lambda leaf: leaf[None], direction))[0]

        with parallel.placement(mesh):
            one, mapped = jax.jit(tangent)(here, there, x)
        np.testing.assert_allclose(one, mapped, rtol=1e-5, atol=1e-5)
        found.append(np.asarray(one))
    np.testing.assert_allclose(*found, rtol=1e-4, atol=1e-4 * np.abs(found[0]).max())
