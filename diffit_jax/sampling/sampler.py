"""From seed numbers to samples: the jitted, sharded sampler."""

import copy
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffit_jax import models
from diffit_jax.diffusion import ddpm, guidance, samplers
from diffit_jax.experiment import Experiment, Sampling, check_sampling
from diffit_jax.models.casts import cast_before_use
from diffit_jax.models.flops import count_multiply_adds
from diffit_jax.runtime import backend, distributed, parallel

Variables = dict[str, Any]

_EDM_SAMPLERS = {"euler": samplers.euler, "heun": samplers.heun, "dpm_solver": samplers.dpm_solver}


class Sampler:
    """Draws samples with one compiled function for batches of one size.

    A sample is a function of (variables, seed number, label): the batch it is drawn in, its place
    there and the number of devices change it by float rounding only.
    """

    def __init__(
        self,
        experiment: Experiment,
        mesh: jax.sharding.Mesh,
        settings: Sampling | None = None,
        weaker_model: nn.Module | None = None,
        copy: bool | None = None,
    ):
        """Prepares a sampler.

        Args:
          experiment: model and process.
          mesh: devices to draw on.
          settings: replaces the experiment's section `sampling`; its batch is made one that the
            devices divide, see `batch_settings`.
          weaker_model: the second network of autoguidance, trained with the same process on the
            same data.
          copy: whether each device holds a copy of the parameters in the dtype in which the network
            uses them, while it draws a batch, instead of casting them and gathering their parts in
            every evaluation; None: where it fits, see `copy_fits`.

        Raises:
          UserError: settings that do not fit the experiment.
        """
        self._model, self._process, self._mesh = experiment.model, experiment.process, mesh
        self._settings, self._weaker_model = (
            batch_settings(settings or experiment.sampling, mesh),
            weaker_model,
        )
        check_sampling(experiment, self._settings)
        self._copy = copy
        self._draw = jax.jit(self._draw_batch, out_shardings=parallel.batch_sharding(mesh))

    def _draw_batch(
        self, variables: Variables, weaker: Variables | None, batch: dict[str, jax.Array]
    ) -> jax.Array:
        copy = _copies(self._model) and self._copy
        if copy is None:
            copy = copy_fits(
                copy_bytes(self._model, variables),
                parallel.memory_of(parallel.local_device(self._mesh)),
            )
        with parallel.activations(self._mesh, whole_weights=copy):
            if copy:
                variables, weaker = (
                    self._copied(self._model, variables),
                    weaker and self._copied(self._weaker_model, weaker),
                )
            return self._trajectory(variables, weaker, batch)

    def _copied(self, model: nn.Module, variables: Variables) -> Variables:
        """The variables whole on every device, those that the network casts before use in its
        dtype."""

        def copy(path: tuple, leaf: jax.Array, cast: bool) -> jax.Array:
            leaf = leaf.astype(model.dtype) if cast else leaf
            return parallel.whole(
                self._mesh, jax.tree_util.keystr(path, simple=True, separator="/"), leaf
            )

        return jax.tree_util.tree_map_with_path(copy, variables, cast_before_use(model, variables))

    def _trajectory(
        self, variables: Variables, weaker: Variables | None, batch: dict[str, jax.Array]
    ) -> jax.Array:
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
                return ddpm.ancestral(
                    process, guided, noise, conditioning, steps, settings.clip_denoised
                )
            return ddpm.ddim(
                process, guided, noise, conditioning, steps, settings.eta, settings.clip_denoised
            )
        options = {"churn": settings.churn} if settings.sampler == "heun" else {}
        return _EDM_SAMPLERS[settings.sampler](
            guided, noise, conditioning, process.sigmas(settings.num_steps), **options
        )

    def lower(self, variables: Variables) -> jax.stages.Lowered:
        """The function that draws a batch, without autoguidance, ready to be compiled for variables
        of these shapes and shardings."""
        return self._draw.lower(variables, None, self._batch_shapes())

    def multiply_adds(self, variables: Variables) -> int:
        """Multiply-adds of the matrix products and convolutions that draw a batch, without
        autoguidance."""
        if hasattr(
            self._model, "attention"
        ):  # a kernel's are those of the products that it stands for
            counted = copy.copy(self)
            counted._model = self._model.clone(attention="xla")
        else:
            counted = self
        return count_multiply_adds(
            jax.make_jaxpr(counted._draw_batch)(variables, None, self._batch_shapes()).jaxpr
        )

    @property
    def batch_size(self) -> int:
        """Samples per call, over all devices."""
        return self._settings.batch_size

    def _batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        sharding, shapes = (
            parallel.batch_sharding(self._mesh),
            {"seed": np.uint32, "label": np.int32},
        )
        return {
            name: jax.ShapeDtypeStruct((self.batch_size,), dtype, sharding=sharding)
            for name, dtype in shapes.items()
        }

    @backend.pinned()
    def draw_batch(
        self,
        variables: Variables,
        seeds: Sequence[int],
        labels: Sequence[int],
        weaker: Variables | None = None,
    ) -> np.ndarray:
        """Draws one sample per seed, for at most a batch of them.

        Args:
          variables: `params` and `constants` of the network, on the mesh.
          seeds: n seed numbers in [0, 2³²), n at most the batch size.
          labels: n labels in [0, num_classes], the last one meaning "no label"; ignored by an
            unconditional model.
          weaker: variables of the weaker network, for autoguidance.

        Returns:
          (n, H, W, C) float32 samples in the units of the training data, not clipped, in the order
          of the seeds.
        """
        batch = {"seed": np.asarray(seeds, np.uint32), "label": np.asarray(labels, np.int32)}
        count = len(batch["seed"])
        size = self._settings.batch_size
        mine = parallel.local_rows(self._mesh, size)
        padded = {
            name: np.pad(values, (0, size - count), mode="edge")[mine]
            for name, values in batch.items()
        }
        return distributed.gather(
            self._draw(variables, weaker, parallel.put_batch(self._mesh, padded, size))
        )[:count]

    def batches(
        self,
        variables: Variables,
        seeds: Sequence[int],
        labels: Sequence[int],
        weaker: Variables | None = None,
    ) -> Iterator[np.ndarray]:
        """`draw_batch` for one batch of n seeds after the other."""
        size = self._settings.batch_size
        for start in range(0, len(seeds), size):
            yield self.draw_batch(
                variables, seeds[start : start + size], labels[start : start + size], weaker
            )

    def draw(
        self,
        variables: Variables,
        seeds: Sequence[int],
        labels: Sequence[int],
        weaker: Variables | None = None,
    ) -> np.ndarray:
        """All of `batches` as one (n, H, W, C) float32 array."""
        return np.concatenate(list(self.batches(variables, seeds, labels, weaker)))


def batch_settings(
    settings: Sampling, mesh: jax.sharding.Mesh, count: int | None = None
) -> Sampling:
    """Settings whose `batch_size` is a number of samples over all devices, which these divide:
    rounded up, since samples can be spare.

    Args:
      settings: with a batch size over all devices, or negative for each.
      mesh: the devices.
      count: how many samples there are to draw, if that is known: no more than one batch of them is
        made.
    """
    size = settings.batch_size if settings.batch_size > 0 else -settings.batch_size * mesh.size
    size = size if count is None else min(size, count)
    return dataclasses.replace(settings, batch_size=parallel.next_batch_size(mesh, size))


def sampler_without_autoguidance(
    experiment: Experiment, mesh: jax.sharding.Mesh, batch_size: int, copy: bool | None = None
) -> Sampler:
    """The experiment's sampler where no weaker network is at hand; `batch_size` as in the section
    `sampling`, `copy` as in `Sampler`."""
    settings = experiment.sampling
    guidance = "none" if settings.guidance == "autoguidance" else settings.guidance
    return Sampler(
        experiment,
        mesh,
        dataclasses.replace(settings, batch_size=batch_size, guidance=guidance),
        copy=copy,
    )


def copy_bytes(model: nn.Module, variables: Variables) -> int:
    """Bytes of the copy that a sampler can hold on each device (see `Sampler`), if `tensor` divides
    nothing; 0 if it makes none."""
    if not _copies(model):
        return 0
    sizes = jax.tree.map(
        lambda leaf, cast: cast and leaf.size * 2, variables, cast_before_use(model, variables)
    )
    return sum(jax.tree.leaves(sizes))


def copy_fits(size: int, memory: float | None) -> bool:
    """Whether a device holds a copy of so many bytes: up to a quarter of its memory (None: unknown,
    and large), beside what it computes."""
    return memory is None or size <= memory / 4


def _copies(model: nn.Module) -> bool:
    return jnp.dtype(model.dtype) == jnp.bfloat16


def default_labels(seeds: Sequence[int], num_classes: int) -> np.ndarray:
    """The label of each seed where none is asked for: seed mod num_classes, so that consecutive
    seeds go round the classes."""
    return np.asarray(seeds, np.int64) % max(num_classes, 1)
