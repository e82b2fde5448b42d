"""Flow matching on 8×8 handwritten digits, with the network of `digits`.

Times and samplers as measured in configs/RECIPES.md.
"""

from pathlib import Path
from runpy import run_path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Return the config."""
    config = run_path(str(Path(__file__).with_name("digits.py")))["get_config"]()
    with config.unlocked():
        config.process = ConfigDict(
            dict(
                name="flow",
                path="linear",
                prediction="velocity",
                clock="t",  # 0 data, 1 noise
                times="logit_normal",  # of SD3 and LightningDiT, against SiT's uniform ones
                time_mean=0.0,
                time_std=1.0,
                sigma_data=0.75,  # standard deviation of the digits in [-1, 1]
            )
        )
        config.sampling.sampler = ConfigDict(dict(name="heun", num_steps=18))
    return config
