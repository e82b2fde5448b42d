"""From seed numbers to images: the jitted, sharded sampler, and the `sample` verb."""

import dataclasses
import io
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from diffit_jax import checkpoint, experiment, files, models, parallel
from diffit_jax.console import Progress
from diffit_jax.data import pixels
from diffit_jax.diffusion import guidance, samplers
from diffit_jax.errors import UserError
from diffit_jax.experiment import Experiment, Sampling

CHECKPOINTS = "checkpoints"


class Sampler:
    """Draws images with one compiled function for batches of one size.

    An image is a function of (parameters, seed number, label): the batch it is drawn in, its place there and the number of devices change
    it by float rounding only.
    """

    def __init__(self, experiment: Experiment, mesh: jax.sharding.Mesh, settings: Sampling | None = None):
        """Prepares a sampler; `settings` replaces the experiment's section `sampling`."""
        self._model, self._process, self._mesh = experiment.model, experiment.process, mesh
        self._settings = settings or experiment.sampling
        parallel.check_batch_size(mesh, self._settings.batch_size, "sampling.batch_size")
        self._draw = jax.jit(self._draw_batch, out_shardings=parallel.batch_sharding(mesh))

    def _draw_batch(self, params: Any, batch: dict[str, jax.Array]) -> jax.Array:
        settings, network = self._settings, models.as_network(self._model, params)

        def denoise(x_BHWC, sigma_B, conditioning):
            return self._process.denoise(network, x_BHWC, sigma_B, conditioning)

        conditioning = {}
        if self._model.num_classes:
            conditioning["label"] = batch["label"]
            denoise = guidance.classifier_free(denoise, settings.guidance_scale, null_label=self._model.num_classes)
        x_BHWC = samplers.heun(
            denoise,
            samplers.sample_keys(batch["seed"]),
            self._model.image_shape,
            conditioning,
            self._process.sigmas(settings.num_steps),
            settings.churn,
        )
        return x_BHWC

    def batches(self, params: Any, seeds: Sequence[int], labels: Sequence[int]) -> Iterator[np.ndarray]:
        """Draws one image per seed, batch by batch.

        Args:
          params: parameters of the network, on the mesh.
          seeds: n seed numbers in [0, 2³²).
          labels: n labels in [0, num_classes); ignored by an unconditional model.

        Yields:
          (at most batch_size, H, W, C) float32 images in the units of the training images, not clipped, in the order of the seeds.
        """
        size = self._settings.batch_size
        for start in range(0, len(seeds), size):
            batch = {
                "seed": np.asarray(seeds[start : start + size], np.uint32),
                "label": np.asarray(labels[start : start + size], np.int32),
            }
            count = len(batch["seed"])
            padded = {name: np.pad(values, (0, size - count), mode="edge") for name, values in batch.items()}
            yield np.asarray(self._draw(params, parallel.put_batch(self._mesh, padded)))[:count]

    def draw(self, params: Any, seeds: Sequence[int], labels: Sequence[int]) -> np.ndarray:
        """All of `batches` as one (n, H, W, C) float32 array."""
        return np.concatenate(list(self.batches(params, seeds, labels)))


def default_labels(seeds: Sequence[int], num_classes: int) -> np.ndarray:
    """The label of each seed where none is asked for: seed mod num_classes, so that consecutive seeds go round the classes."""
    return np.asarray(seeds, np.int64) % max(num_classes, 1)


def sample(
    workdir: epath.PathLike,
    seeds: Sequence[int],
    labels: Sequence[int] | None = None,
    output: epath.PathLike | None = None,
    **overrides: Any,
) -> epath.Path:
    """Draws samples with the newest checkpoint of a run and writes them as an npz file and a PNG grid.

    Args:
      workdir: of the run.
      seeds: one seed number per sample.
      labels: given out to the samples in turn; None: `default_labels`.
      output: path of the npz; None: `samples_NxHxWxC.npz` in the work directory. The grid of the first 100 has the same name with `.png`.
      **overrides: values that replace those of the config's section `sampling`.

    Returns:
      Path of the npz: `arr_0` (N, H, W, C) uint8, `arr_1` (N,) int64 labels.

    Raises:
      UserError: no run or checkpoint there, a label or seed out of range, an output that cannot be written.
    """
    loaded = experiment.build(experiment.read_config(workdir))
    num_classes = loaded.model.num_classes
    if len(seeds) == 0 or min(seeds) < 0 or max(seeds) >= 2**32:
        raise UserError("seeds must be at least one whole number in [0, 2^32): change --seeds")
    if labels is None:
        labels = default_labels(seeds, num_classes)
    elif not num_classes:
        raise UserError(f"the model in {workdir} is unconditional: leave out --labels")
    elif min(labels) < 0 or max(labels) >= num_classes:
        wrong = next(label for label in labels if not 0 <= label < num_classes)
        raise UserError(f"label {wrong} is outside the classes 0-{num_classes - 1} of the model: change --labels")
    labels = np.resize(np.asarray(labels, np.int64), len(seeds))
    settings = dataclasses.replace(loaded.sampling, **overrides)
    if settings.guidance_scale != 1 and not num_classes:
        raise UserError(f"the model in {workdir} is unconditional: leave out --guidance_scale")
    height, width, channels = loaded.model.image_shape
    output = epath.Path(output or epath.Path(workdir) / f"samples_{len(seeds)}x{height}x{width}x{channels}.npz")
    files.make_directory(output.parent, "output directory")

    mesh = parallel.make_mesh()
    sampler = Sampler(loaded, mesh, settings)
    params = restore_ema(workdir, loaded, parallel.replicated(mesh))
    images = []
    with Progress("sample", len(seeds), unit="image") as progress:
        for batch in sampler.batches(params, seeds, labels):
            images.append(np.asarray(pixels.to_pixels(batch)))
            progress.advance(len(batch))
    images = np.concatenate(images)
    buffer = io.BytesIO()
    np.savez(buffer, arr_0=images, arr_1=labels)
    files.write_bytes(output, buffer.getvalue())
    pixels.write_png(output.with_suffix(".png"), pixels.image_grid(images[:100], columns=10))
    return output


def restore_ema(workdir: epath.PathLike, loaded: Experiment, sharding: jax.sharding.NamedSharding) -> Any:
    """The averaged parameters of the newest usable checkpoint in a work directory, laid out by `sharding`.

    Raises:
      UserError: there is none.
    """
    shapes = jax.eval_shape(lambda: models.init_params(loaded.model, jax.random.key(0)))
    restored = checkpoint.Checkpoints(epath.Path(workdir) / CHECKPOINTS).restore({"ema": parallel.abstract(shapes, sharding)})
    if restored is None:
        raise UserError(f"workdir {workdir} holds no checkpoint: train first")
    return restored[1]["ema"]
