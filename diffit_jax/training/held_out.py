"""The loss on examples that training does not see, at fixed noise levels and with fixed noise.

The cheap signal of a long run: its curve has no noise but that of the parameters.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffit_jax.data.sources import Source
from diffit_jax.errors import UserError
from diffit_jax.evaluation.neighbours import nearest_distances
from diffit_jax.evaluation.small import pixel_features
from diffit_jax.experiment.config import Experiment
from diffit_jax.run.objective import DENOISING
from diffit_jax.run.state import Setup, open_training_data
from diffit_jax.runtime import backend, distributed, parallel
from diffit_jax.training.step import example_keys

# Images of a split that samples are compared with, at most, and their numbers in float64 (128 MB).
_COMPARED, _MOST_NUMBERS = 1_000, 2**24
SEED = 0  # of noise levels and noise, whatever the run's: curves of several runs compare


class HeldOutLoss:
    """The training loss of the first examples of a test split.

    Each with its label and without augmentation and dropout.

    Attributes:
      count: of examples.
    """

    def __init__(self, setup: Setup, source: Source):
        """Prepare; `source`: the test split, see `open_held_out`."""
        experiment, self._mesh, self._source = setup.experiment, setup.mesh, source
        self.count = min(experiment.evaluation.loss_examples, len(source))
        most = experiment.training.batch_size // experiment.training.accumulation
        self._size = parallel.next_batch_size(self._mesh, min(self.count, most))
        sharding = parallel.batch_sharding(self._mesh)
        self._losses = jax.jit(functools.partial(losses, experiment), out_shardings=sharding)

    @backend.reproducible_numerics()
    def __call__(self, networks: Mapping[str, Any]) -> dict[str, float]:
        """Compute the mean loss of networks by name, given their variables by name.

        All processes call it.
        """
        found: dict[str, list[np.ndarray]] = {name: [] for name in networks}
        for start in range(0, self.count, self._size):
            places = np.minimum(np.arange(start, start + self._size), self.count - 1)
            mine = places[parallel.local_batch_indices(self._mesh, self._size)]
            examples = {**self._source.read(mine), "index": mine.astype(np.int32)}
            batch = parallel.put_batch(self._mesh, examples, self._size)
            for name, variables in networks.items():
                with parallel.placement(self._mesh):
                    of_batch = distributed.call_after_barrier(self._losses, variables, batch)
                found[name].append(distributed.gather(of_batch)[: self.count - start])
        return {
            name: float(np.concatenate(each).mean(dtype=np.float64)) for name, each in found.items()
        }


def losses(experiment: Experiment, variables: Any, examples: Mapping[str, jax.Array]) -> jax.Array:
    """Compute the process's loss of each example, (B,) float32.

    `examples` as of a `Source`, with `index` (B,) int32, of which noise level and noise are
    functions.
    """
    key_B = jax.vmap(lambda index: example_keys(SEED, index, 1)[0])(examples["index"])
    return DENOISING(
        experiment, variables, {}, examples, key_B=key_B, update=jnp.int32(0), training=False
    )[0]


class Nearness:
    """How near samples come to training images, beside images that are not trained on.

    It needs no network: a ratio well below 1 means that training images are repeated.
    """

    def __init__(self, train: Source, test: Source):
        """Read some images of both splits, evenly chosen."""
        self._train, held = (self._some(split) for split in (train, test))
        self.held_out = float(np.median(nearest_distances(held, self._train)))

    @staticmethod
    def _some(source: Source) -> np.ndarray:
        count = max(1, min(_COMPARED, _MOST_NUMBERS // math.prod(source.image_shape)))
        chosen = np.unique(np.linspace(0, len(source) - 1, count).astype(np.int64))
        return pixel_features(source.read(chosen)["image"])

    def __call__(self, images: np.ndarray) -> float:
        """Return the median distance of images to the nearest training image, (n, H, W, C) uint8.

        In the units of [-1, 1]; `held_out` is that of held-out images.
        """
        return float(np.median(nearest_distances(pixel_features(images), self._train)))


def open_held_out(experiment: Experiment) -> Source:
    """Open the test split of an experiment's data set.

    Raises:
      UserError: there is none.
    """
    try:
        return open_training_data(experiment, "test")
    except UserError as error:
        raise UserError(
            f"config key evaluation.loss_steps needs a test split: {error}; prepare the data "
            "with --holdout 0.05, or set evaluation.loss_steps to 0"
        ) from error
