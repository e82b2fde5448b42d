"""The verb `train_autoencoder`: from a data set of images to an autoencoder that encodes them."""

import dataclasses
import itertools
import logging
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh

from diffit_jax.data import pixels
from diffit_jax.data.sources import DataSpec, Source, open_dataset
from diffit_jax.errors import UserError
from diffit_jax.ingest import latent_statistics
from diffit_jax.interop import diffusers
from diffit_jax.models.pretrained.autoencoder import Autoencoder
from diffit_jax.runtime import backend, distributed, files, parallel
from diffit_jax.runtime.checkpoint import Checkpoints
from diffit_jax.runtime.console import Progress
from diffit_jax.sampling.decoder import LatentDecoder
from diffit_jax.sampling.encoder import ImageEncoder
from diffit_jax.training.autoencoder import (
    AutoencoderState,
    AutoencoderTraining,
    initial_state,
    make_step,
)
from diffit_jax.training.loop import Hooks, batches_on, run_loop

log = logging.getLogger(__name__)

SETTINGS = "training.json"
CHECKPOINTS = "checkpoints"
IMAGE = "reconstructions.png"
LOG_STEPS, CHECKPOINT_STEPS = 20, 500
MEASURED = 1_000  # images of the test split, for the error
SCALED = 10_000  # images of the train split, for the scale of latents
_SHOWN = 10


class Reconstruction(NamedTuple):
    """How well images come back, of the test split.

    Attributes:
      error: mean absolute difference in levels of 255.
      psnr: peak signal-to-noise ratio in dB, of the mean squared error over all images.
      count: of images.
    """

    error: float
    psnr: float
    count: int


@backend.reproducible_numerics()
@backend.explain_oom("lower --batch_size or --channels")
def train_autoencoder(
    dataset: str,
    *,
    workdir: epath.PathLike,
    settings: AutoencoderTraining = AutoencoderTraining(),
    data_dir: epath.PathLike = "",
) -> Reconstruction:
    """Train an autoencoder, or resume, and write it as a folder of diffusers' that `--vae` takes.

    Its latents have mean 0 and variance 1 in each channel.

    Args:
      dataset: name of prepared images, with a test split, see `open_dataset`.
      workdir: local or `gs://`. It receives the autoencoder (`config.json` and safetensors),
        `reconstructions.png` (images of the test split above their reconstructions) and
        checkpoints.
      settings: the autoencoder, and how it is trained.
      data_dir: where prepared data sets are.

    Raises:
      UserError: an unusable data set, a directory that holds another training, is in use or cannot
        be written.
      interruption.Preempted, interruption.Interrupted: a checkpoint is saved.
    """
    # --- Check everything before the first thing is written.
    workdir = files.resolve(workdir, "workdir")

    def open_split(split: str) -> Source:
        wanted = DataSpec(example="image")
        return distributed.primary_first(lambda: open_dataset(dataset, split, data_dir, wanted))

    train, test = open_split("train"), open_split("test")
    module = settings.module(train.image_shape[-1])
    if train.image_shape[0] % module.factor or train.image_shape[1] % module.factor:
        raise UserError(
            f"data set {dataset} has images of {train.image_shape}: {len(settings.channels)} "
            f"--channels need sides that are multiples of {module.factor}"
        )
    mesh = parallel.any_mesh()
    parallel.check_batch_size(mesh, settings.batch_size, "--batch_size")
    metadata = {
        "dataset": dataset,
        "image": list(train.image_shape),
        **dataclasses.asdict(settings),
    }
    distributed.on_primary(lambda: files.make_directory(workdir, "workdir"))
    with distributed.primary_context(lambda: files.owned(workdir, "workdir")):
        distributed.on_primary(lambda: _claim(workdir, metadata))
        state = _train(settings, module, train, mesh, workdir)
        return _finish(module, state.variables, train=train, test=test, mesh=mesh, workdir=workdir)


def _claim(workdir: epath.Path, metadata: dict[str, Any]) -> None:
    """Make sure that a directory holds this training or none."""
    found = files.Artifact(workdir / SETTINGS, files.plain(metadata)).inspect()
    for key, (was, now) in found.differences.items():
        raise UserError(
            f"workdir {workdir} holds an autoencoder with {key} {was}, not {now}: choose another "
            "workdir, or repeat that command"
        )
    if found.state != "done" and (workdir / diffusers.CONFIG).exists():
        raise UserError(f"workdir {workdir} holds something else: choose another workdir")
    files.write_json(workdir / SETTINGS, metadata)


def _train(
    settings: AutoencoderTraining,
    module: Autoencoder,
    source: Source,
    mesh: Mesh,
    workdir: epath.Path,
) -> AutoencoderState:
    """Train from the newest checkpoint, if there is one; return the state after the last update."""
    checkpoints = Checkpoints(workdir / CHECKPOINTS, keep=2)
    all_hosts = parallel.replicated(mesh)

    def initial() -> AutoencoderState:
        return initial_state(settings, module)

    abstract = parallel.abstract(mesh, jax.eval_shape(initial))
    restored = checkpoints.restore({"state": abstract})
    state = restored[1]["state"] if restored else jax.jit(initial, out_shardings=all_hosts)()
    first = int(state.step)
    if first == settings.steps:
        return state
    stream = batches_on(mesh, source, settings.batch_size, settings.seed, first=first)
    batch = next(stream)
    update = jax.jit(make_step(settings, module), out_shardings=all_hosts)
    step = update.lower(state, batch).compile()
    distributed.barrier()  # see `distributed.call_after_barrier`
    hooks = _Training(settings, checkpoints, step, state)
    stream = itertools.chain([batch], stream)
    del state, batch
    run_loop("train autoencoder", hooks, stream, first, settings.steps)
    return hooks.state


class _Training(Hooks):
    """An autoencoder that is being trained.

    Attributes:
      state: after the last update.
    """

    def __init__(
        self,
        settings: AutoencoderTraining,
        checkpoints: Checkpoints,
        step: Callable[..., Any],
        state: AutoencoderState,
    ):
        self._settings, self.checkpoints, self._step = settings, checkpoints, step
        self.state, self._terms = state, {}

    def update(self, batch: Any) -> None:
        self.state, self._terms = self._step(self.state, batch)

    def evaluate(self, step: int, progress: Progress) -> bool:
        last = step == self._settings.steps
        if step % LOG_STEPS == 0 or last:
            error, kl = (float(self._terms[name]) for name in ("error", "kl"))
            if not np.isfinite(error):
                raise UserError(
                    f"the error is not finite at step {step}: lower --learning_rate, and choose "
                    "another workdir"
                )
            progress.say(f"error {error * 127.5:.2f} of 255 levels | KL {kl:.4f}")
        return step % CHECKPOINT_STEPS == 0 or last

    def save(self, step: int) -> None:
        self.checkpoints.save(step, {"state": self.state}, {"step": step})


def _finish(
    module: Autoencoder,
    variables: Any,
    *,
    train: Source,
    test: Source,
    mesh: Mesh,
    workdir: epath.Path,
) -> Reconstruction:
    """Scale the latents, write the autoencoder, and measure reconstructions."""
    started = time.monotonic()
    encoder = ImageEncoder(
        module, variables, parallel.local_mesh(), batch_per_device=32, orientations=1
    )

    def moments(source: Source, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (images, moments) of the first ones."""
        images = source.read(np.arange(min(count, len(source))))["image"]
        parts = range(0, len(images), encoder.batch_size)
        encoded = [encoder.start(images[at : at + encoder.batch_size]) for at in parts]
        return images, np.concatenate([one.result()[0]["moments"] for one in encoded])

    # Every process encodes all: there are few, and their sums come in one order.
    found = latent_statistics.of_sums(latent_statistics.sums_of(moments(train, SCALED)[1]))
    module = module.clone(
        latent_mean=tuple(found["mean"]),
        latent_scale=tuple(1 / deviation for deviation in found["std"]),
    )
    distributed.on_primary(lambda: diffusers.save(workdir, module, variables))
    images, encoded = moments(test, MEASURED)
    mean = np.split(encoded[:, 0], 2, axis=-1)[0]
    decoder = LatentDecoder(module, variables, mesh, batch_per_device=32, rounding="edm")
    back = decoder(np.asarray(module.scaled(jnp.asarray(mean))))
    difference = images.astype(np.float64) - back
    psnr = 10 * np.log10(255**2 / max(np.mean(difference**2), 1e-9))
    result = Reconstruction(float(np.abs(difference).mean()), float(psnr), len(images))
    if distributed.is_primary():
        # At equal distances: prepared images are in the order of classes.
        places = np.linspace(0, len(images) - 1, min(_SHOWN, len(images))).astype(int)
        shown = np.concatenate([images[places], back[places]])
        grid = pixels.image_grid(shown, columns=len(places), min_side=64)
        pixels.write_png(workdir / IMAGE, grid)
    log.info(
        "reconstruction of %d test images: mean error %.2f of 255 levels, PSNR %.1f dB (%.1f s)",
        *(result.count, result.error, result.psnr, time.monotonic() - started),
    )
    log.info("wrote %s: --vae takes it", workdir)
    return result
