"""The table of platforms: every decision follows its entry, whatever runs here."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest
from support.configs import small_latent_config
from support.processes import ROOT

from diffit_jax import models, platforms
from diffit_jax.experiment.config import build
from diffit_jax.platforms import PLATFORMS
from diffit_jax.run.state import setup_experiment
from diffit_jax.runtime import parallel
from diffit_jax.sampling.decoder import slice_size
from diffit_jax.training.step import batch_shapes, lower_train_step


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

    def donated():
        batch = batch_shapes(setup.experiment, setup.mesh)
        return "tf.aliasing_output" in lower_train_step(setup, setup.state, batch).as_text()

    assert not donated()
    as_cpu(donates=True)
    assert donated()


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
