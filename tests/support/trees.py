"""Comparing pytrees, and making them."""

import jax
import jax.numpy as jnp
import numpy as np


def assert_equal_trees(one, other):
    """Bit for bit."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


def random_like(tree, seed):
    """Values of the size of trained ones everywhere, also where a fresh network has zeros."""
    draws = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(draws.normal(size=leaf.shape) * 0.3), tree)
