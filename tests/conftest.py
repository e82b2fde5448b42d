"""Two virtual devices, so that everything runs sharded, and two small runs that tests share."""

import functools
import gc
import os
import signal
import sys
import tempfile

from support import warm
from support.processes import QUICK_TO_COMPILE, compile_quickly

# Tracing makes many small objects; looking for garbage took a tenth of the time.
gc.set_threshold(200_000, 20, 100)
os.environ.setdefault("XLA_FLAGS", QUICK_TO_COMPILE)  # commands that tests start inherit it
# Under nohup commands would inherit that SIGHUP is ignored; one that is handled they do not.
signal.signal(signal.SIGHUP, lambda *_: None)
# What one test compiled, the next and its commands reuse; a new folder for every run of the suite.
_CACHE = tempfile.TemporaryDirectory(prefix="diffit_jax_compiled_")
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ.get("DIFFIT_JAX_TEST_CACHE", _CACHE.name)
os.environ["DIFFIT_JAX_TEST_CACHE"] = os.environ["JAX_COMPILATION_CACHE_DIR"]
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

if "PYTEST_XDIST_WORKER" not in os.environ:  # one for all workers
    warm.start(_CACHE.name)

import jax
import pytest
from support.configs import small_config, small_latent_config

if "host_platform_device_count" not in os.environ["XLA_FLAGS"]:
    jax.config.update("jax_num_cpu_devices", 2)
# With several virtual devices on few cores, programs in flight can starve each other's collectives
# of threads.
jax.config.update("jax_cpu_enable_async_dispatch", False)
compile_quickly()


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """(workdir, final state) of a finished small run; tests only read it."""
    from diffit_jax.training.train import train

    workdir = tmp_path_factory.mktemp("run")
    return workdir, train(small_config(training__grid_steps=6), workdir=workdir)


@pytest.fixture(scope="session")
def latent_run(tmp_path_factory):
    """The same of the small latent experiment."""
    from diffit_jax.training.train import train

    workdir = tmp_path_factory.mktemp("latent_run")
    return workdir, train(small_latent_config(), workdir=workdir)


@pytest.fixture(scope="module")
def one_extractor_each():
    """One extractor for each FID network, mesh and rule: most of the time of a file that measures
    images would be compiling."""
    from diffit_jax.evaluation.features import Extractor

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Extractor, "load", functools.cache(Extractor.load))
        yield


# Long files, which begin first: at the end one core would be idle beside them.
_LONG = (
    "test_parallel",
    "test_distributed",
    "test_notebooks",
    "test_faults",
    "test_preflight",
    "test_pages",
)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: _LONG.index(item.path.stem) if item.path.stem in _LONG else 99)


@pytest.fixture(scope="module", autouse=True)
def what_is_there_stays():
    """What jax keeps of earlier files is not looked through for garbage again: half a second, each
    time that somebody asks for a collection."""
    gc.freeze()


def pytest_collection_finish():
    # It would end a worker one second after a test's own SIGINT.
    assert "diffit_jax.cli" not in sys.modules, "importing cli listens to signals: use a command"
