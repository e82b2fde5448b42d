"""From a data set to an endless, shuffled, resumable stream of batches."""

from collections.abc import Iterator

import grain
import numpy as np

from diffit_jax.data.sources import Source


def batches(source: Source, batch_size: int, seed: int, first_step: int = 0) -> Iterator[dict[str, np.ndarray]]:
    """The batches of a training run from a given step on.

    Examples are shuffled anew in every epoch, and epochs follow each other without a gap (a batch may hold the end of one and the start
    of the next). Batch number k is a function of (source, batch_size, seed, k) alone: resuming needs nothing but the step.

    Args:
      source: the data set.
      batch_size: examples per batch.
      seed: of the shuffle.
      first_step: number of the first batch.

    Returns:
      Endless iterator of dicts: `image` (batch_size, H, W, C) uint8, `label` (batch_size,) int32. Batches are read ahead in threads.
    """
    dataset = grain.MapDataset.source(source).seed(seed).shuffle().repeat().batch(batch_size)
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)
    iterator = iter(dataset.to_iter_dataset(options))
    iterator.set_state({"next_index": first_step})
    return iterator
