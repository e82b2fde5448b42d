"""From a data set to an endless, shuffled, resumable stream of batches."""

import functools
import threading
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np

from diffit_jax.data.sources import Source


class ShuffledBatches:
    """The batches of a run as a random-access sequence for Grain: batch k is a function of (source,
    batch_size, seed, k) alone.

    Examples have positions in one endless order, epoch after epoch, each shuffled anew; batch k
    holds the positions from k · batch_size on, so a batch may hold the end of one epoch and the
    start of the next. Grain sees one element per batch: its work per element would cost a tenth of
    a small model's step if it saw the examples.
    """

    def __init__(self, source: Source, batch_size: int, seed: int, rows: np.ndarray | None = None):
        """Positions `rows` (n,) of each batch, in this order; None: all of it. Other processes read
        the others."""
        self._source, self._batch_size, self._seed = source, batch_size, seed
        self._rows = np.arange(batch_size) if rows is None else np.asarray(rows, np.int64)
        if self._rows.size and (self._rows.min() < 0 or self._rows.max() >= batch_size):
            raise ValueError(
                f"rows {self._rows.min()} to {self._rows.max()} are not in a batch of {batch_size}"
            )

    def __len__(self) -> int:
        return 1 << 48  # updates; no run ends here

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        epochs, offsets = np.divmod(step * self._batch_size + self._rows, len(self._source))
        indices = np.empty_like(offsets)
        for epoch in np.unique(epochs).tolist():
            with _SHUFFLING:
                order = _order(len(self._source), self._seed, epoch)
            indices[epochs == epoch] = order[offsets[epochs == epoch]]
        return self._source.read(indices)


_SHUFFLING = threading.Lock()  # threads read ahead: one makes the order that all of them need


@functools.lru_cache(maxsize=4)  # at the end of an epoch a stream needs two
def _order(count: int, seed: int, epoch: int) -> np.ndarray:
    """The examples' numbers as an epoch has them."""
    # Ranks of Philox's raw output, which numpy never changes, unlike that of its `permutation`.
    return np.argsort(np.random.Philox(key=[seed, epoch]).random_raw(count), kind="stable")


def batches(
    source: Source, batch_size: int, seed: int, first_step: int = 0, rows: np.ndarray | None = None
) -> Iterator[dict[str, np.ndarray]]:
    """The batches of a training run from a given step on, read ahead in threads; resuming needs
    nothing but the step.

    Args:
      source: the data set.
      batch_size: examples per batch.
      seed: of the shuffle, at least 0.
      first_step: number of the first batch.
      rows: which rows of each global batch this process reads, see `rows.local_rows`; None: all
        of them.

    Returns:
      Endless iterator of dicts: `image` (n, H, W, C) uint8, `label` (n,) int32, a row for each of
      `rows`.
    """
    shuffled: Any = ShuffledBatches(source, batch_size, seed, rows)
    dataset = grain.MapDataset.source(shuffled)
    iterator = iter(
        dataset.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4))
    )
    iterator.set_state({"next_index": first_step})
    return iterator
