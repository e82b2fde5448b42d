"""CIFAR-10 with four blocks in each stage, as appendix H.1 describes the network.

Everything else is as in `cifar10`; `:conditional` too.
"""

from pathlib import Path
from runpy import run_path

from ml_collections import ConfigDict


def get_config(variant: str = "") -> ConfigDict:
    """Return the config; `variant` is "" or "conditional"."""
    config = run_path(str(Path(__file__).with_name("cifar10.py")))["get_config"](variant)
    config.model.num_blocks = (4, 4, 4)
    config.model.scan_unroll = 4
    return config
