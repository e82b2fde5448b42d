"""ImageNet at 512×512 in one to four steps: as `imagenet256_map`, with DMF's values for 512.

DMF's network has QK-norm at 512. It cannot be added to a trained one: train the flow with it
(`--config.model.qk_norm=True`), and the map has it too.
"""

from pathlib import Path
from runpy import run_path

from ml_collections import ConfigDict


def get_config(variant: str = "XL/2") -> ConfigDict:
    """Return the config of a network of this size, perhaps with a recipe behind it."""
    config = run_path(str(Path(__file__).with_name("imagenet256_map.py")))["get_config"](variant)
    config.data.name = "imagenet512_latents"
    config.model.input_size = 64  # 512 pixels over the VAE's factor 8
    if config.model.end_time_in == "blocks":  # DMF's
        config.process.guidance_kappa = 0.8
        config.training.total_steps = 800_000
        with config.unlocked():
            config.process.sampling_shift = 1.5
    config.sampling.batch_per_device = 16  # as many tokens as with 64 at 256 pixels
    return config
