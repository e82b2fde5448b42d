"""ImageNet at 256×256 with REG: REPA, and DINOv2-B's class token generated beside the latent.

`--config configs/imagenet256_reg.py` is XL/2, `:L/2`, `:B/2` and `:S/2` after the name a smaller
one. REG is arXiv 2507.01467; what it measured, on SiT's transformer and not on this one:
configs/RECIPES.md. The data are those of `imagenet256_repa`.
"""

from pathlib import Path
from runpy import run_path

from ml_collections import ConfigDict


def get_config(size: str = "XL/2") -> ConfigDict:
    """Return the config of a network of this size."""
    config = run_path(str(Path(__file__).with_name("imagenet256_repa.py")))["get_config"](size)
    with config.unlocked():
        config.model.class_token = 768  # DINOv2-B's width
        config.representation.kind = "reg"
        config.representation.class_weight = 0.03
    return config
