"""FFHQ at 64×64 with four blocks in each stage, as appendix H.1 describes the network.

Everything else is as in `ffhq64`.
"""

from pathlib import Path
from runpy import run_path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Return the config."""
    config = run_path(str(Path(__file__).with_name("ffhq64.py")))["get_config"]()
    config.model.num_blocks = (4, 4, 4, 4)
    config.model.scan_unroll = 4
    return config
