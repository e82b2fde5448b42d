"""A fingerprint is that of the contents, however arrays lie; what is not finite is named."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from diffit_jax.runtime import checkpoint, parallel
from diffit_jax.runtime.console import first_few


def tree(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "a": jnp.asarray(rng.normal(size=(4, 6)), jnp.float32),
        "b": {"c": jnp.asarray(rng.normal(size=8), jnp.bfloat16)},
    }


def test_it_does_not_depend_on_how_arrays_are_divided():
    mesh = parallel.make_mesh()
    reference = checkpoint.fingerprint(tree())
    for spec in (PartitionSpec(), PartitionSpec("data")):
        assert (
            checkpoint.fingerprint(jax.device_put(tree(), NamedSharding(mesh, spec))) == reference
        )


def test_any_change_changes_it():
    """Another value, the last bit of one, two values exchanged, another shape, name or type."""
    seen = {checkpoint.fingerprint(tree())}
    ours = tree()
    changes = [
        tree(1),
        ours | {"a": ours["a"].at[1, 2].set(jnp.nextafter(ours["a"][1, 2], jnp.float32(9)))},
        ours | {"a": ours["a"].at[0, 0].set(ours["a"][3, 5]).at[3, 5].set(ours["a"][0, 0])},
        ours | {"a": ours["a"].reshape(6, 4)},
        ours | {"a": -ours["a"]},
        {"z": ours["a"], "b": ours["b"]},
        ours | {"b": {"c": ours["b"]["c"].astype(jnp.float32)}},
        ours | {"a": jnp.zeros((4, 6))},
        ours | {"a": jnp.zeros((4, 6)).at[0, 0].set(1e-45)},
    ]
    for change in changes:
        seen.add(checkpoint.fingerprint(change))
    assert len(seen) == 1 + len(changes)


def test_what_is_not_finite_is_named():
    ours = tree()
    assert checkpoint.not_finite(ours) == [] and checkpoint.not_finite({}) == []
    ours["a"] = ours["a"].at[0, 0].set(jnp.nan).at[1, 1].set(-jnp.inf)
    ours["b"]["c"] = ours["b"]["c"].at[3].set(jnp.inf)
    assert checkpoint.not_finite(ours) == ["a (2 of 24)", "b/c (1 of 8)"]
    assert first_few(["p", "q", "r", "s", "t"]) == "p, q, r and 2 more"
