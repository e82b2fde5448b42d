"""Samples that are drawn while they are measured; nothing of them is kept on disk."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from diffit_jax.data.labels import spread
from diffit_jax.errors import UserError
from diffit_jax.runtime.ranges import in_short
from diffit_jax.sampling.files import Request, named_seeds
from diffit_jax.sampling.request import Asked, Networks


class DrawnPictures:
    """The samples of a request, as `Pictures`."""

    def __init__(self, asked: Asked, networks: Networks):
        """Takes a checked request and its networks.

        Raises:
          UserError: the samples are no pictures.
        """
        shape = asked.experiment.space.shape(asked.experiment.model.sample_shape)
        if shape[-1] not in (1, 3) or asked.experiment.space.samples != "samples":
            raise UserError(
                f"{asked.source.name} makes latents, which have no FID: name the autoencoder that "
                "decodes them by --vae"
            )
        self._asked, self._networks = asked, networks
        self.count, self.shape = len(asked.seeds), shape
        self.facts: dict[str, Any] = {
            "samples": asked.source.name,
            "labels": f"{asked.words or 'seed modulo classes'}: {spread(asked.labels)}",
            "uint8_rule": asked.experiment.sampling.pixel_rounding,
            "seeds": in_short(asked.seeds.tolist()),
            "request": Request(asked.identity(networks), networks.origin).as_json(),
        }

    def batches(self, size: int, start: int = 0) -> Iterator[np.ndarray]:
        """See `Pictures`. Raises `UserError` at a sample that is not finite: seeds are named."""
        waiting = np.zeros((0, *self.shape), np.uint8)
        per_call = self._asked.sampler.batch_size
        for begin in range(start, self.count, per_call):
            batch = np.arange(begin, min(begin + per_call, self.count))
            drawn, finite = self._asked.draw(self._networks, batch)
            if not finite.all():
                bad = self._asked.seeds[batch[~finite]].tolist()
                raise UserError(
                    f"{len(bad)} of the first {batch[-1] + 1} samples are not finite (seeds "
                    f"{named_seeds(bad)}): use other weights"
                )
            waiting = np.concatenate([waiting, drawn])
            while len(waiting) >= size:
                yield waiting[:size]
                waiting = waiting[size:]
        if len(waiting):
            yield waiting
