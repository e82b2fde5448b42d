"""The ImageNet flow recipe in small: the latent network of `digits_latent` with flow matching."""

from pathlib import Path
from runpy import run_path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Return the config."""
    config = run_path(str(Path(__file__).with_name("digits_latent.py")))["get_config"]()
    config.model.learn_sigma = False  # a velocity alone
    with config.unlocked():
        config.process = ConfigDict(
            dict(
                name="flow",
                path="linear",
                prediction="velocity",
                clock="t",  # 0 data, 1 noise
                times="logit_normal",
                time_mean=0.0,
                time_std=1.0,
                sigma_data=0.75,  # standard deviation of the digits in [-1, 1]
            )
        )
        config.sampling.sampler = ConfigDict(dict(name="heun", num_steps=25))
    return config
