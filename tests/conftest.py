"""Two virtual devices, so that everything runs sharded, and small experiments that compile in
seconds."""

import gc
import os
import signal
import tempfile

from processes import QUICK_TO_COMPILE

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

import jax
import pytest
from ml_collections import ConfigDict

if "host_platform_device_count" not in os.environ["XLA_FLAGS"]:
    jax.config.update("jax_num_cpu_devices", 2)
# With several virtual devices on few cores, programs in flight can starve each other's collectives
# of threads.
jax.config.update("jax_cpu_enable_async_dispatch", False)


def small_config(**overrides) -> ConfigDict:
    """A conditional 8×8 experiment that trains in seconds; `overrides` are keys
    with `__` between their parts."""
    config = ConfigDict(
        {
            "seed": 0,
            "data": {"name": "synthetic"},
            "model": {
                "name": "image_diffit",
                "image_size": 8,
                "image_channels": 1,
                # One stage: a third of the time to compile; tests of the network have more.
                "channels": (8,),
                "num_blocks": (2,),
                "window": 4,
                "time_width": 16,
                "head_width": 8,
                "num_classes": 10,
                "scan_unroll": 1,
            },
            "process": {"name": "edm"},
            "optimizer": {"learning_rate": 1e-3, "warmup_steps": 4},
            "ema": {"halflife_images": 64},
            "training": {
                "batch_size": 8,
                "label_dropout": 0.1,
                "total_steps": 6,
                "log_steps": 2,
                "grid_steps": 6,
                "checkpoint_steps": 2,
                "keep_checkpoints": 3,
                "grid_images": 4,
            },
            "sampling": {
                "sampler": {"name": "heun", "num_steps": 3},
                "guidance": {"kind": "constant", "scale": 1.5},
                "batch_per_device": 2,
            },
        }
    )
    return _override(config, overrides)


def small_latent_config(**overrides) -> ConfigDict:
    """A latent DDPM experiment on random latents that trains in seconds; `overrides` as above."""
    config = small_config()
    config.data = ConfigDict({"name": "synthetic", "autoencoder": "sd-vae-ft-ema"})
    config.model = ConfigDict(
        {
            "name": "latent_diffit",
            "input_size": 8,
            "input_channels": 4,
            "patch_size": 2,
            "hidden_size": 16,
            "depth": 2,
            "num_heads": 2,
            "num_classes": 10,
        }
    )
    config.process = ConfigDict({"name": "ddpm"})
    config.sampling = ConfigDict(
        {
            "sampler": {"name": "ddpm", "num_steps": 4},
            "guidance": {"kind": "power_cosine", "scale": 4.4},
            "batch_per_device": 2,
        }
    )
    return _override(config, overrides)


def _override(config: ConfigDict, overrides: dict) -> ConfigDict:
    for key, value in overrides.items():
        *parents, name = key.split("__")
        node = config
        for parent in parents:
            node = node[parent]
        node[name] = value
    return config


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """(workdir, final state) of a finished small run; tests only read it."""
    from diffit_jax.verbs.train import train

    workdir = tmp_path_factory.mktemp("run")
    return workdir, train(small_config(), workdir)


@pytest.fixture(scope="session")
def latent_run(tmp_path_factory):
    """The same of the small latent experiment."""
    from diffit_jax.verbs.train import train

    workdir = tmp_path_factory.mktemp("latent_run")
    return workdir, train(small_latent_config(), workdir)
