"""ImageNet at 512×512 by flow matching: as `imagenet256_flow`, with times shifted to more noise."""

from pathlib import Path
from runpy import run_path

from ml_collections import ConfigDict


def get_config(variant: str = "XL/2") -> ConfigDict:
    """Return the config of a network of this size, perhaps with `:sit` behind it."""
    config = run_path(str(Path(__file__).with_name("imagenet256_flow.py")))["get_config"](variant)
    config.data.name = "imagenet512_latents"
    config.model.input_size = 64  # 512 pixels over the VAE's factor 8
    with config.unlocked():
        # The root of the ratio of pixels (SD3): noise hides as much of an image of twice the side.
        config.process.shift = 2.0
    config.sampling.batch_per_device = 16  # as many tokens as with 64 at 256 pixels
    return config
