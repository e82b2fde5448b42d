"""ImageNet at 512×512 with batches of 4,096, for pods.

Everything else is as in `imagenet512_latent`.
"""

import math
from pathlib import Path
from runpy import run_path

from ml_collections import ConfigDict

BATCH_SIZE, PAPER_BATCH_SIZE = 4096, 512


def get_config(size: str = "XL/2") -> ConfigDict:
    """Return the config of a network of this size."""
    config = run_path(str(Path(__file__).with_name("imagenet512_latent.py")))["get_config"](size)
    config.training.batch_size = BATCH_SIZE

    # Adam divides a gradient by its own root mean square. Where noise dominates that is the noise,
    # which falls with the root of the batch size; the signal in an update then grows with the root,
    # and so may the rate (Malladi et al. 2022, square-root scaling). A linear rule, which holds for
    # SGD, would ask for 8e-4. Their rule also scales 1 - beta and epsilon; with these the memory of
    # the moments would shrink to an eighth in updates. The common practice, followed here, leaves
    # them.
    config.optimizer.learning_rate *= math.sqrt(BATCH_SIZE / PAPER_BATCH_SIZE)  # 1e-4 → 2.83e-4

    # The larger rate meets second moments that are still estimates of a few updates: beta2 = 0.999
    # has a memory of 1,000. Five of these.
    config.optimizer.warmup_steps = 5_000

    # As many images as the paper's recipe, in an eighth of the updates. The average's half-life is
    # in images, so it stays.
    config.training.total_steps = config.training.total_steps * PAPER_BATCH_SIZE // BATCH_SIZE
    config.training.checkpoint_steps = 1_000
    config.training.grid_steps = 5_000
    return config
