"""The machine below: numbers do not depend on jax's modes, and a missing platform or memory is one
line."""

import contextlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.configs import small_config, small_latent_config
from support.processes import ROOT, command, environment, write_config

from diffit_jax.errors import UserError
from diffit_jax.run import workdir
from diffit_jax.run.state import create_state, setup_experiment
from diffit_jax.runtime import backend
from diffit_jax.sampling.sample import sample
from diffit_jax.sampling.sampler import Sampler
from diffit_jax.training.train import train


@contextlib.contextmanager
def mode(name, value):
    """A mode of jax as a notebook or the environment switches it on."""
    before = getattr(jax.config, name)
    jax.config.update(name, value)
    try:
        yield
    finally:
        jax.config.update(name, before)


# --- Numbers

MODES = {
    "jax_enable_x64": True,
    "jax_threefry_partitionable": False,
    "jax_numpy_dtype_promotion": "strict",
    "jax_default_prng_impl": "rbg",
}


@pytest.mark.parametrize(
    "chosen", [["jax_enable_x64"], list(MODES)[1:]], ids=["64 bits", "the others"]
)
def test_modes_change_no_number(chosen, latent_run, tmp_path):
    """Fresh parameters, a training run and samples are the same, bit for bit, and of the same
    types."""
    workdir, state = latent_run

    def numbers(name):
        path = sample(workdir, seeds=range(4), output=tmp_path / f"{name}.npz")
        setup = setup_experiment(small_latent_config())
        fresh = create_state(setup.experiment, setup.mesh)
        drawn = Sampler(setup.experiment, setup.mesh).draw(
            fresh.ema_variables, range(4), [0, 1, 2, 3]
        )
        with np.load(path) as arrays:
            return arrays["arr_0"], fresh, drawn

    reference = numbers("usual"), state
    jax.clear_caches()  # jax does not see every mode in a function that was traced before
    with contextlib.ExitStack() as stack:
        for name in chosen:
            stack.enter_context(mode(name, MODES[name]))
        ours = numbers("modes"), train(small_latent_config(), workdir=tmp_path / "run")
    for left, right in zip(jax.tree.leaves(ours), jax.tree.leaves(reference), strict=True):
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("jax_disable_jit", True),
        ("jax_numpy_rank_promotion", "raise"),
        ("jax_random_seed_offset", 3),
    ],
    ids=lambda value: str(value),
)
def test_debugging_modes_end_in_one_line(name, value, latent_run, tmp_path):
    with mode(name, value):
        for action in (
            lambda: train(small_latent_config(), workdir=tmp_path / "run"),
            lambda: sample(latent_run[0], seeds=[0]),
        ):
            with pytest.raises(
                UserError, match=rf"jax's mode {name.upper()} is switched on, .*: unset it"
            ) as error:
                action()
            assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_precision_is_logged_and_belongs_to_a_request(latent_run, tmp_path, caplog):
    """A setting of jax's own that changes numbers is left to its owner, but never silent."""
    output = tmp_path / "s.npz"
    with caplog.at_level("INFO", logger="diffit_jax"):
        sample(latent_run[0], seeds=range(2), output=output)
        assert "precision" not in caplog.text
        with jax.default_matmul_precision("highest"):
            with pytest.raises(
                UserError,
                match=r"another matmul_precision \(default, now highest\): name another --output, "
                r"or say --overwrite",
            ):
                sample(latent_run[0], seeds=range(2), output=output)
            sample(latent_run[0], seeds=range(2), output=tmp_path / "t.npz")
        assert "precision of float32 matrix products: highest" in caplog.text


# --- Platforms


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("JAX_PLATFORMS", "tpu", "JAX_PLATFORMS is tpu, which cannot be used here"),
        ("JAX_PLATFORMS", "cuda", "JAX_PLATFORMS is cuda, which cannot be used here"),
        ("JAX_PLATFORMS", "CPU", "cpu, tpu or cuda, in small letters"),
        ("JAX_PLATFORMS", "abacus", "JAX_PLATFORMS is abacus"),
        (
            "JAX_ENABLE_X64",
            "maybe",
            "jax cannot be started (invalid truth value 'maybe' for environment 'JAX_ENABLE_X64')",
        ),
        ("JAX_DEFAULT_MATMUL_PRECISION", "utmost", "jax cannot be started"),
    ],
)
def test_what_jax_cannot_start_with_is_one_line(variable, value, message, latent_run, tmp_path):
    status, errors = command(
        "sample", "--workdir", latent_run[0], "--seeds", "1", cwd=tmp_path, **{variable: value}
    )
    last = errors.splitlines()[-1]
    assert (
        status == 1 and last.startswith("error: ") and message in last and "Traceback" not in errors
    ), errors


def test_devices_that_another_process_holds(monkeypatch):
    text = (
        "Unable to initialize backend 'tpu': ABORTED: The TPU is already in use by process with "
        "pid 4711. Not attempting to load it"
    )
    monkeypatch.setattr(jax, "devices", lambda *_: (_ for _ in ()).throw(RuntimeError(text)))
    with pytest.raises(
        UserError, match=r"held by another process .*pid 4711.*: end it, or wait for it"
    ):
        backend.devices()


# --- Memory


@pytest.mark.parametrize(
    ("said", "ours"),
    [
        ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 395137867968 bytes.", True),
        (
            "INTERNAL: during context [Pre-optimization]: Out of memory allocating 395137867968 "
            "bytes.",
            True,
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 31.75G of 15.75G hbm.",
            True,
        ),
        ("INTERNAL: Mosaic failed to compile TPU kernel", False),
        ("INVALID_ARGUMENT: shapes differ in a room of 4", False),
    ],
)
def test_what_is_said_when_memory_runs_out(said, ours):
    expected = backend.OutOfMemory if ours else jax.errors.JaxRuntimeError
    with pytest.raises(expected) as error, backend.explain_oom(backend.TRAINING_OOM_HINT):
        raise jax.errors.JaxRuntimeError(said)
    if ours:
        assert (
            "memory ran out" in str(error.value)
            and "training.accumulation" in str(error.value)
            and "\n" not in str(error.value)
        )


def test_too_much_for_this_machine(tmp_path):
    """Really too much: the line has the keys and preflight's command with this config; a smaller
    batch may follow in the same directory."""
    path = write_config(tmp_path / "c.py", small_config(model__image_size=512))
    flags = f"--config {path} --workdir run --config.training.batch_size"
    command = f"ulimit -v 9000000; {sys.executable} {ROOT}/launch/train.py {flags}=512"
    result = subprocess.run(
        ["bash", "-c", command],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=200,
    )
    last = result.stderr.strip().splitlines()[-1]
    assert (
        result.returncode == 1
        and last.startswith("error: memory ran out (")
        and "Traceback" not in result.stderr
    ), result.stderr
    preflight = f"diffit preflight --config {path} --config.training.batch_size=512 --topology"
    for words in ("training.batch_size", "training.accumulation", "mesh.fsdp", preflight):
        assert words in last, last
    config = small_config(model__image_size=512, training__batch_size=2)
    workdir.claim(tmp_path / "run", config)


def test_pinned_is_for_threads_and_nested_calls():
    with mode("jax_enable_x64", True):
        with backend.reproducible_numerics(), backend.reproducible_numerics():
            assert jnp.zeros(1).dtype == jnp.float32
        assert jnp.zeros(1).dtype == jnp.float64
