"""From seed numbers to samples: the jitted, sharded sampler."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffit_jax import models
from diffit_jax.diffusion import guidance, samplers
from diffit_jax.diffusion.guidance import Guidance
from diffit_jax.diffusion.samplers import SamplerOutput
from diffit_jax.diffusion.types import Network, Process
from diffit_jax.experiment.config import Experiment
from diffit_jax.experiment.sections import SamplingMethod
from diffit_jax.models import Model
from diffit_jax.models.model import CLASS, IMAGE, cast_before_use, count_multiply_adds
from diffit_jax.runtime import backend, distributed, parallel

Variables = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class _Program:
    """The functions that a sampler traces, with all that they depend on: equal ones compile once.

    Attributes:
      model, process: of the experiment.
      method, guidance: how it samples.
      mesh, guide_model, copy: as in `Sampler`.
      guide_class_token: whether guidance acts on a class token too.
      attention: how the networks compute it here, as `parallel.try_kernel` has found out.
    """

    model: Model
    process: Process
    method: SamplingMethod
    guidance: Guidance
    mesh: jax.sharding.Mesh
    guide_model: Model | None
    copy: bool | None
    guide_class_token: bool
    attention: tuple[tuple[str, str], ...]

    def _draw_batch(
        self,
        variables: Variables,
        guide: Variables | None,
        batch: dict[str, jax.Array],
        scale: jax.Array | None = None,
    ) -> jax.Array:
        return self._drawn(variables, guide, batch, scale=scale).samples

    def _sample_trajectory(
        self,
        variables: Variables,
        guide: Variables | None,
        batch: dict[str, jax.Array],
        frames: int,
    ) -> jax.Array:
        return jnp.moveaxis(self._drawn(variables, guide, batch, frames).frames, 0, 1)

    def _drawn(
        self,
        variables: Variables,
        guide: Variables | None,
        batch: dict[str, jax.Array],
        frames: int = 0,
        scale: jax.Array | None = None,
    ) -> SamplerOutput:
        copy = _copies(self.model) and self.copy
        if copy is None:
            memory = parallel.memory_of(parallel.local_device(self.mesh))
            copy = copy_fits(copy_bytes(self.model, variables), memory)
        with parallel.placement(self.mesh, whole_weights=copy):
            if copy:
                variables = self._copied(self.model, variables)
                if guide is not None and self.guide_model is not None:
                    guide = self._copied(self.guide_model, guide)
            return self._trajectory(variables, guide, batch, frames, scale)

    def _copied(self, model: Model, variables: Variables) -> Variables:
        """Copy the variables whole to every device, cast where the network casts them anyway."""

        def copy(path: tuple, leaf: jax.Array, cast: bool) -> jax.Array:
            leaf = leaf.astype(model.dtype) if cast else leaf
            _, axes = parallel.axes_of(path, models.parameter_metadata(model))
            return parallel.whole(self.mesh, axes, leaf)

        return jax.tree_util.tree_map_with_path(copy, variables, cast_before_use(model, variables))

    def _trajectory(
        self,
        variables: Variables,
        guide: Variables | None,
        batch: dict[str, jax.Array],
        frames: int,
        scale: jax.Array | None,
    ) -> SamplerOutput:
        process, method = self.process, self.method
        num_classes = self.model.num_classes

        def model_fn(model: Model, variables: Variables) -> Network:
            return method.model_fn(process, models.as_network(model, variables))

        plain, guiding = model_fn(self.model, variables), None
        if guide is not None and self.guide_model is not None:
            guiding = model_fn(self.guide_model, guide)
        with_inner = None
        if self.model.has_inner_head:
            network = models.as_network(self.model, variables, inner=True)
            with_inner = method.model_fn(process, network)
        guided = guidance.apply_guidance(
            self.guidance,
            plain,
            process.time_of,
            null_label=num_classes or None,
            guide=guiding,
            with_inner=with_inner,
            scale=scale,
            acts_on=self._acts_on(),
        )
        noise = samplers.seeded_noise(batch["seed"], self.model.noise_shapes)
        conditioning = {"label": batch["label"]} if num_classes else {}
        drawn = method.draw(process, guided, noise, conditioning, frames)
        if not self.model.class_token:
            return drawn
        return SamplerOutput(drawn.samples[IMAGE], drawn.frames[IMAGE])

    def _acts_on(self) -> dict[str, int] | None:
        """Return the parts of a sample that are guided; None: there is one."""
        if not self.model.class_token:
            return None
        own = {IMAGE: self.guidance.channels}
        return own | ({CLASS: 0} if self.guide_class_token else {})


@functools.lru_cache(maxsize=4)  # each may hold its machine code in a device's memory
def _jitted(program: _Program) -> tuple[Any, Any]:
    """Return the functions that draw a batch and a trajectory, one pair for equal samplers."""
    sharding = parallel.batch_sharding(program.mesh)
    draw = jax.jit(program._draw_batch, out_shardings=sharding)
    return draw, jax.jit(program._sample_trajectory, out_shardings=sharding, static_argnums=3)


class Sampler:
    """Draws samples with one compiled function for batches of one size.

    A sample is a function of (variables, seed number, label): the batch it is drawn in, its place
    there and the number of devices change it by float rounding only.

    Attributes:
      batch_size: samples per call, over all devices.
    """

    def __init__(
        self,
        experiment: Experiment,
        mesh: jax.sharding.Mesh,
        count: int | None = None,
        guide_model: Model | None = None,
        copy: bool | None = None,
    ):
        """Prepare a sampler.

        Args:
          experiment: model, process and section `sampling`.
          mesh: devices to draw on.
          count: how many samples there are to draw, if that is known: no more than one batch of
            them is made.
          guide_model: autoguidance's guiding network, trained with the same process on the same
            data.
          copy: whether each device holds a copy of the parameters in the dtype in which the network
            uses them, while it draws a batch, instead of casting them and gathering their parts in
            every evaluation; None: where it fits, see `copy_fits`.
        """
        self.batch_size = batch_size(experiment, mesh, count)
        platform = mesh.devices.flat[0].platform
        networks = (experiment.model, guide_model)
        self._program = _Program(
            model=experiment.model,
            process=experiment.process,
            method=experiment.sampling.sampler,
            guidance=experiment.sampling.guidance,
            mesh=mesh,
            guide_model=guide_model,
            copy=copy,
            guide_class_token=experiment.sampling.guide_class_token,
            attention=tuple(one.attention_backend(platform) for one in networks if one is not None),
        )
        self._draw, self._watch = _jitted(self._program)

    def lower(self, variables: Variables) -> jax.stages.Lowered:
        """Lower the function that draws a batch, without autoguidance.

        For variables of these shapes and shardings.
        """
        return self._draw.lower(variables, None, self._batch_shapes())

    def multiply_adds(self, variables: Variables) -> int:
        """Count multiply-adds of matrix products and convolutions for a batch.

        Without autoguidance. A kernel's are those of the products that it replaces.
        """
        model = self._program.model.with_xla_attention()
        counted = dataclasses.replace(self._program, model=model)
        traced = jax.make_jaxpr(counted._draw_batch)(variables, None, self._batch_shapes())
        return count_multiply_adds(traced.jaxpr)

    def _batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        return batch_shapes(self._program.mesh, self.batch_size)

    @backend.reproducible_numerics()
    def draw_batch(
        self,
        variables: Variables,
        seeds: Sequence[int] | np.ndarray,
        labels: Sequence[int] | np.ndarray,
        guide: Variables | None = None,
        scale: float | None = None,
    ) -> np.ndarray:
        """Draw one sample per seed, for at most a batch of them.

        Args:
          variables: `params` and `constants` of the network, on the mesh.
          seeds: n seed numbers in [0, 2³²), n at most the batch size.
          labels: n labels in [0, num_classes], the last one meaning "no label"; ignored by an
            unconditional model.
          guide: variables of the guiding network, for autoguidance.
          scale: of the guidance, instead of the experiment's; one program serves all of them. Where
            it is given, nothing is left out for scales near 1.

        Returns:
          (n, H, W, C) float32 samples in the units of the training data, not clipped, in the order
          of the seeds.
        """
        at = () if scale is None else (np.float32(scale),)
        batch = self._batch(seeds, labels)
        drawn = distributed.call_after_barrier(self._draw, variables, guide, batch, *at)
        return distributed.gather(drawn)[: len(seeds)]

    @backend.reproducible_numerics()
    def sample_trajectory(
        self,
        variables: Variables,
        seeds: Sequence[int] | np.ndarray,
        labels: Sequence[int] | np.ndarray,
        frames: int,
        guide: Variables | None = None,
    ) -> np.ndarray:
        """Draw samples and return their estimates along the way, (n, F, H, W, C) float32.

        At F = `frames` steps from the first to the last; other arguments as of `draw_batch`.
        """
        batch = self._batch(seeds, labels)
        kept = distributed.call_after_barrier(self._watch, variables, guide, batch, frames)
        return distributed.gather(kept)[: len(seeds)]

    def _batch(
        self, seeds: Sequence[int] | np.ndarray, labels: Sequence[int] | np.ndarray
    ) -> dict[str, jax.Array]:
        """Put a batch on the mesh, padded with copies of the last sample."""
        batch = {"seed": np.asarray(seeds, np.uint32), "label": np.asarray(labels, np.int32)}
        return parallel.put_padded(self._program.mesh, batch, self.batch_size)

    def batches(
        self,
        variables: Variables,
        seeds: Sequence[int] | np.ndarray,
        labels: Sequence[int] | np.ndarray,
        guide: Variables | None = None,
    ) -> Iterator[np.ndarray]:
        """Yield `draw_batch` for one batch of n seeds after the other."""
        for start in range(0, len(seeds), self.batch_size):
            part = slice(start, start + self.batch_size)
            yield self.draw_batch(variables, seeds[part], labels[part], guide)

    def draw(
        self,
        variables: Variables,
        seeds: Sequence[int] | np.ndarray,
        labels: Sequence[int] | np.ndarray,
        guide: Variables | None = None,
    ) -> np.ndarray:
        """Draw all of `batches` as one (n, H, W, C) float32 array."""
        return np.concatenate(list(self.batches(variables, seeds, labels, guide)))


def batch_shapes(mesh: jax.sharding.Mesh, size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes of a batch of seeds and labels, (size,) each."""
    sharding = parallel.batch_sharding(mesh)
    return {
        name: jax.ShapeDtypeStruct((size,), dtype, sharding=sharding)
        for name, dtype in (("seed", np.uint32), ("label", np.int32))
    }


def batch_size(experiment: Experiment, mesh: jax.sharding.Mesh, count: int | None = None) -> int:
    """Return the samples per call of the experiment's sampler, over all devices, which divide it.

    Rounded up, since samples can be spare.

    Args:
      experiment: whose `sampling.batch_per_device` counts.
      mesh: the devices.
      count: how many samples there are to draw, if that is known.
    """
    size = experiment.sampling.batch_per_device * mesh.size
    return parallel.next_batch_size(mesh, size if count is None else min(size, count))


@functools.lru_cache(maxsize=4)  # asked for the log, and again for the record
def evaluations(experiment: Experiment) -> int:
    """Count the evaluations of networks for one sample, with guidance's: its NFE.

    By tracing the sampler around a network that does nothing.
    """
    model, process, method = experiment.model, experiment.process, experiment.sampling.sampler
    counted: list[int] = []

    class Counting(guidance.Guided):
        def segments(self, *grid: Any) -> Iterator[guidance.Segment]:
            for segment in super().segments(*grid):
                counted.append(segment.calls * (segment.stop - segment.start))
                yield segment

    def nothing(x_BHWC: jax.Array, _: jax.Array, conditioning: Any) -> jax.Array:
        return jnp.zeros((*x_BHWC.shape[:3], model.output_channels))

    def draw() -> jax.Array:
        plain = method.model_fn(process, nothing)
        both = method.model_fn(process, lambda *given: (nothing(*given),) * 2)
        guided = guidance.apply_guidance(
            experiment.sampling.guidance, plain, process.time_of, null_label=0, guide=plain,
            with_inner=both,
        )  # fmt: skip
        fields = {field.name: getattr(guided, field.name) for field in dataclasses.fields(guided)}
        noise = samplers.seeded_noise(jnp.zeros(1, jnp.uint32), model.sample_shape)
        return method.draw(process, Counting(**fields), noise, {"label": jnp.zeros(1, int)}).samples

    jax.eval_shape(draw)
    return sum(counted)


def sampler_without_autoguidance(
    experiment: Experiment,
    mesh: jax.sharding.Mesh,
    count: int | None = None,
    copy: bool | None = None,
) -> Sampler:
    """Make the experiment's sampler without a guiding network; arguments as of `Sampler`."""
    sampling = experiment.sampling
    if sampling.guidance.needs_guide:
        unguided = dataclasses.replace(sampling, guidance=guidance.Unguided())
        experiment = experiment.with_sampling(unguided)
    return Sampler(experiment, mesh, count, copy=copy)


def copy_bytes(model: Model, variables: Variables) -> int:
    """Return the bytes of the copy that a sampler can hold on each device (see `Sampler`).

    If `tensor` divides nothing; 0 if it makes none.
    """
    if not _copies(model):
        return 0
    casts = cast_before_use(model, variables)
    sizes = jax.tree.map(lambda leaf, cast: cast and leaf.size * 2, variables, casts)
    return sum(jax.tree.leaves(sizes))


def copy_fits(size: int, memory: float | None) -> bool:
    """Return whether a device holds a copy of so many bytes: up to a quarter of its memory.

    None, an unknown memory, counts as large.
    """
    return memory is None or size <= memory / 4


def _copies(model: Model) -> bool:
    return jnp.dtype(model.dtype) == jnp.bfloat16


def default_labels(seeds: Sequence[int] | np.ndarray, num_classes: int) -> np.ndarray:
    """Return the default label of each seed: seed mod num_classes, (n,) int64.

    So consecutive seeds go round the classes.
    """
    return np.asarray(seeds, np.int64) % max(num_classes, 1)
