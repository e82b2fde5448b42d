"""The table of platforms: every decision follows its entry, whatever runs here."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.configs import small_latent_config
from support.processes import ROOT

from diffit_jax import models, platforms
from diffit_jax.experiment.config import build
from diffit_jax.platforms import PLATFORMS
from diffit_jax.run.state import create_state, setup_experiment
from diffit_jax.runtime import parallel
from diffit_jax.sampling.decoder import slice_size
from diffit_jax.training.step import batch_shapes, compile_train_step, lower_train_step


@pytest.fixture
def as_cpu(monkeypatch):
    """Replaces decisions of the CPU's entry."""

    def replace(**decisions):
        entry = dataclasses.replace(platforms.of("cpu"), **decisions)
        monkeypatch.setitem(PLATFORMS, "cpu", entry)

    return replace


def test_names_of_devices_lead_to_an_entry():
    assert platforms.of("cuda") is platforms.of("rocm") is PLATFORMS["gpu"]
    assert platforms.of("METAL") == platforms.Platform()


def test_the_step_takes_over_memory_where_the_entry_says_so(as_cpu):
    setup = setup_experiment(small_latent_config())

    def program():
        batch = batch_shapes(setup.experiment, setup.mesh)
        text = lower_train_step(setup, setup.state, batch).as_text()
        return "tf.aliasing_output" in text, text.count("stablehlo.case")

    parameters = sum(leaf.size for leaf in jax.tree.leaves(setup.state.params))
    donated, branches = program()
    assert not donated
    as_cpu(donates_from=parameters + 1)
    assert program() == (False, branches)
    as_cpu(donates_from=parameters)
    assert program() == (True, branches + 1)
    as_cpu(donates_from=0, skips_by_branch=False)
    assert program() == (True, branches)


def test_an_update_left_out_by_a_branch_is_one_left_out_by_a_choice(as_cpu):
    """Made with the same numbers, to a rounding, and left out whole where the gradient is not
    finite."""
    results = []
    for large in (False, True):
        as_cpu(donates_from=0 if large else 1e9)
        setup = setup_experiment(small_latent_config())
        state, shapes = (
            create_state(setup.experiment, setup.mesh),
            batch_shapes(setup.experiment, setup.mesh),
        )
        draw = np.random.default_rng(0)
        latent = draw.normal(size=shapes["latent"].shape).astype(np.float32)
        rest = {k: np.zeros(x.shape, x.dtype) for k, x in shapes.items()}
        size = len(latent)
        batch = parallel.put_batch(setup.mesh, rest | {"latent": latent}, size)
        broken = parallel.put_batch(setup.mesh, rest | {"latent": latent * np.nan}, size)
        step, collected, _ = compile_train_step(setup, state, batch)
        state, collected = step(state, collected, batch, {})
        once = jax.device_get(state)
        state, _ = step(state, collected, broken, {})
        for before, after in zip(*map(jax.tree.leaves, (once.params, state.params)), strict=True):
            np.testing.assert_array_equal(before, after)
        assert (int(state.step), int(state.skipped), int(state.consecutive_skipped)) == (2, 1, 1)
        results.append(once)
    for one, other in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_initialisation_is_compiled_as_the_entry_says(as_cpu):
    """With the option that users have: the same weights, but for rounding."""
    setup, states = setup_experiment(small_latent_config()), []
    for once in ({"xla_backend_optimization_level": 1}, None):
        as_cpu(once=once)
        states.append(create_state(setup.experiment, setup.mesh))
    for one, other in zip(*(jax.tree.leaves(state.params) for state in states), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)


def test_slices_and_attention_follow_the_entry(as_cpu):
    mesh = parallel.make_mesh()
    model = build(small_latent_config(model__attention="auto")).model
    assert slice_size(mesh, 32) == 1
    assert models.describe_attention(model, "cpu") == "xla (auto, not on a TPU)"
    as_cpu(decodes_one=False, auto_reason="as an entry says")
    assert slice_size(mesh, 32) == 8
    assert models.describe_attention(model, "cpu") == "xla (as an entry says)"


def test_a_function_is_lowered_for_the_platforms_of_a_decision(as_cpu):
    def doubled(x):
        return platforms.where("repeats_fusions", lambda x: (2 * x,), x)[0]

    assert jax.jit(lambda x: doubled(x))(jnp.float32(3)) == 6
    as_cpu(repeats_fusions=False)
    assert jax.jit(lambda x: doubled(x))(jnp.float32(3)) == 3


def test_nobody_else_decides_by_the_names_of_platforms():
    """But where devices are counted or looked for."""
    for path in sorted((ROOT / "diffit_jax").rglob("*.py")):
        name = str(path.relative_to(ROOT / "diffit_jax"))
        known = {"platforms.py", "runtime/parallel.py", "training/benchmark.py"}
        if name not in known and not name.startswith("preflight/"):
            found = re.findall(
                r"platform\w*(?:\(\))? [!=]= \"\w+\"|platform_dependent\(", path.read_text()
            )
            assert not found, (name, found)
