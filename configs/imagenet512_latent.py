"""ImageNet at 512×512 in the latent space of a VAE: the paper reports FID 2.67.

Everything else is as at 256×256.
"""

from pathlib import Path
from runpy import run_path

from ml_collections import ConfigDict


def get_config(size: str = "XL/2") -> ConfigDict:
    """Return the config of a network of this size."""
    config = run_path(str(Path(__file__).with_name("imagenet256_latent.py")))["get_config"](size)
    config.data.name = "imagenet512_latents"
    config.model.input_size = 64  # 512 pixels over the VAE's factor 8
    config.optimizer.learning_rate = 1e-4  # I.2
    config.training.batch_size = 512  # I.2
    config.ema.halflife_images = 3_548_736  # decay 0.9999 per update of 512 images (I.2)
    config.training.total_steps = 3_000_000  # not stated; DiT's at 512×512
    # The release, for latents larger than 32; the scale is Table 1's too.
    guidance = dict(kind="constant", scale=1.49, channels=3, skip_tolerance=1e-3)
    with config.unlocked():
        config.sampling.guidance = ConfigDict(guidance)
    config.sampling.batch_per_device = 16  # as many tokens as with 64 at 256 pixels
    return config
