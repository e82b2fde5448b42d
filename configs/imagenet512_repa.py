"""ImageNet at 512×512 with REPA: the recipe of `imagenet256_repa`, on latents of 64×64.

DINOv2 sees the picture at 448 pixels, so that its 32×32 patches match the network's tokens.
"""

from pathlib import Path
from runpy import run_path

from ml_collections import ConfigDict


def get_config(variant: str = "XL/2") -> ConfigDict:
    """Return the config of a network of this size, perhaps with `:irepa` behind it."""
    config = run_path(str(Path(__file__).with_name("imagenet256_repa.py")))["get_config"](variant)
    config.model.input_size = 64
    config.data.name = "imagenet512_latents_images"
    config.sampling.batch_per_device = 16  # as many tokens as with 64 at 256 pixels
    return config
