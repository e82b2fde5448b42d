"""From seed numbers to samples: the jitted, sharded sampler."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from diffit_jax import distributed, models, parallel
from diffit_jax.diffusion import ddpm, guidance, samplers
from diffit_jax.experiment import Experiment, Sampling, check_sampling

Variables = dict[str, Any]

_EDM_SAMPLERS = {"euler": samplers.euler, "heun": samplers.heun, "dpm_solver": samplers.dpm_solver}


class Sampler:
    """Draws samples with one compiled function for batches of one size.

    A sample is a function of (variables, seed number, label): the batch it is drawn in, its place there and the number of devices change
    it by float rounding only.
    """

    def __init__(
        self,
        experiment: Experiment,
        mesh: jax.sharding.Mesh,
        settings: Sampling | None = None,
        weaker_model: nn.Module | None = None,
    ):
        """Prepares a sampler.

        Args:
          experiment: model and process.
          mesh: devices to draw on.
          settings: replaces the experiment's section `sampling`.
          weaker_model: the second network of autoguidance, trained with the same process on the same data.

        Raises:
          UserError: settings that do not fit the experiment, or a batch that the devices do not divide.
        """
        self._model, self._process, self._mesh = experiment.model, experiment.process, mesh
        self._settings, self._weaker_model = settings or experiment.sampling, weaker_model
        check_sampling(experiment, self._settings)
        parallel.check_batch_size(mesh, self._settings.batch_size, "sampling.batch_size")
        self._draw = jax.jit(self._draw_batch, out_shardings=parallel.batch_sharding(mesh))

    def _draw_batch(self, variables: Variables, weaker: Variables | None, batch: dict[str, jax.Array]) -> jax.Array:
        with parallel.activations(self._mesh):
            return self._trajectory(variables, weaker, batch)

    def _trajectory(self, variables: Variables, weaker: Variables | None, batch: dict[str, jax.Array]) -> jax.Array:
        settings, process = self._settings, self._process
        num_classes = self._model.num_classes

        def evaluation(model: nn.Module, variables: Variables) -> guidance.Evaluation:
            network = models.as_network(model, variables)
            return network if settings.discrete else functools.partial(process.denoise, network)

        guided = guidance.guide(
            settings.guide,
            evaluation(self._model, variables),
            process.time_of,
            null_label=num_classes or None,
            weaker=None if weaker is None else evaluation(self._weaker_model, weaker),
        )
        noise = samplers.seeded_noise(batch["seed"], self._model.sample_shape)
        conditioning = {"label": batch["label"]} if num_classes else {}
        if settings.discrete:
            steps = process.steps(settings.respacing or str(settings.num_steps))
            if settings.sampler == "ddpm":
                return ddpm.ancestral(process, guided, noise, conditioning, steps, settings.clip_denoised)
            return ddpm.ddim(process, guided, noise, conditioning, steps, settings.eta, settings.clip_denoised)
        options = {"churn": settings.churn} if settings.sampler == "heun" else {}
        return _EDM_SAMPLERS[settings.sampler](guided, noise, conditioning, process.sigmas(settings.num_steps), **options)

    def lower(self, variables: Variables) -> jax.stages.Lowered:
        """The function that draws a batch, without autoguidance, ready to be compiled for variables of these shapes and shardings."""
        sharding, size = parallel.batch_sharding(self._mesh), self._settings.batch_size
        shapes = {"seed": np.uint32, "label": np.int32}
        batch = {name: jax.ShapeDtypeStruct((size,), dtype, sharding=sharding) for name, dtype in shapes.items()}
        return self._draw.lower(variables, None, batch)

    def draw_batch(self, variables: Variables, seeds: Sequence[int], labels: Sequence[int], weaker: Variables | None = None) -> np.ndarray:
        """Draws one sample per seed, for at most a batch of them.

        Args:
          variables: `params` and `constants` of the network, on the mesh.
          seeds: n seed numbers in [0, 2³²), n at most the batch size.
          labels: n labels in [0, num_classes], the last one meaning "no label"; ignored by an unconditional model.
          weaker: variables of the weaker network, for autoguidance.

        Returns:
          (n, H, W, C) float32 samples in the units of the training data, not clipped, in the order of the seeds.
        """
        batch = {"seed": np.asarray(seeds, np.uint32), "label": np.asarray(labels, np.int32)}
        count = len(batch["seed"])
        size = self._settings.batch_size
        mine = slice(*parallel.local_rows(self._mesh, size))
        padded = {name: np.pad(values, (0, size - count), mode="edge")[mine] for name, values in batch.items()}
        return distributed.gather(self._draw(variables, weaker, parallel.put_batch(self._mesh, padded)))[:count]

    def batches(
        self, variables: Variables, seeds: Sequence[int], labels: Sequence[int], weaker: Variables | None = None
    ) -> Iterator[np.ndarray]:
        """`draw_batch` for one batch of n seeds after the other."""
        size = self._settings.batch_size
        for start in range(0, len(seeds), size):
            yield self.draw_batch(variables, seeds[start : start + size], labels[start : start + size], weaker)

    def draw(self, variables: Variables, seeds: Sequence[int], labels: Sequence[int], weaker: Variables | None = None) -> np.ndarray:
        """All of `batches` as one (n, H, W, C) float32 array."""
        return np.concatenate(list(self.batches(variables, seeds, labels, weaker)))


def sampler_without_autoguidance(experiment: Experiment, mesh: jax.sharding.Mesh, num_images: int) -> Sampler:
    """The experiment's sampler for batches of at least `num_images`, where no weaker network is at hand."""
    settings, size = experiment.sampling, parallel.next_batch_size(mesh, num_images)
    guidance = "none" if settings.guidance == "autoguidance" else settings.guidance
    return Sampler(experiment, mesh, dataclasses.replace(settings, batch_size=size, guidance=guidance))


def default_labels(seeds: Sequence[int], num_classes: int) -> np.ndarray:
    """The label of each seed where none is asked for: seed mod num_classes, so that consecutive seeds go round the classes."""
    return np.asarray(seeds, np.int64) % max(num_classes, 1)
