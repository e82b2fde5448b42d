"""The ImageNet flow recipe in small: the latent network of `digits_latent` with flow matching."""

from pathlib import Path
from runpy import run_path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Return the config."""
    config = run_path(str(Path(__file__).with_name("digits_latent.py")))["get_config"]()
    config.model.learn_sigma = False  # a velocity alone
    flow = run_path(str(Path(__file__).with_name("digits_flow.py")))["get_config"]()
    with config.unlocked():
        config.process = flow.process  # the same data
        config.sampling.sampler = ConfigDict(dict(name="heun", num_steps=25))
    return config
