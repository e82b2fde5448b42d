"""`DiffiT`: a trained network in Python, in three lines.

    from diffit_jax import DiffiT

    model = DiffiT.load("runs/digits")
    images = model.sample(labels=[3, 5], seeds=range(8), guidance_scale=1.5)
    images.grid()

It draws with the functions of the command `diffit sample`, and so the same samples, bit for bit.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from PIL import Image

from diffit_jax import models
from diffit_jax.data import pixels
from diffit_jax.data.labels import class_named, give_out
from diffit_jax.errors import UserError
from diffit_jax.models.pretrained.autoencoder import Autoencoder
from diffit_jax.run.state import setup_experiment
from diffit_jax.runtime import backend, files, hub, parallel
from diffit_jax.sampling.analysis import analyse
from diffit_jax.sampling.analysis.analyse import Analysed
from diffit_jax.sampling.decoder import Decoding, LatentDecoder
from diffit_jax.sampling.encoder import ImageEncoder
from diffit_jax.sampling.image_files import grid_columns
from diffit_jax.sampling.request import (
    Run,
    SampleRequest,
    SamplingOptions,
    Weights,
    config_for_weights,
)
from diffit_jax.sampling.sample import segments


class Images(np.ndarray):
    """Images, (N, H, W, 1 or 3) uint8: an array that can be shown and saved.

    Attributes:
      labels: (N,) int64, or None.
      seeds: (N,) the number that each was drawn from.
      class_names: by label; none where classes have no names.
    """

    labels: np.ndarray | None = None
    seeds: np.ndarray | None = None
    class_names: Sequence[str] = ()

    @classmethod
    def of(
        cls,
        images: np.ndarray,
        labels: np.ndarray | None,
        seeds: np.ndarray,
        class_names: Sequence[str],
    ) -> "Images":
        """Make them of an array (N, H, W, C) uint8, labels (N,) or None, and seeds (N,)."""
        made = np.asarray(images).view(cls)
        made.labels, made.seeds, made.class_names = labels, seeds, class_names
        return made

    def grid(self, columns: int | None = None) -> Image.Image:
        """Return all images as one, as a notebook shows it.

        A column for each class, with its name, where labels repeat after ten or fewer images.

        Args:
          columns: images in a row; None: as said.
        """
        above: list[str] = []
        if columns is None:
            named = None if self.labels is None else self._name
            labels = np.arange(len(self)) if self.labels is None else self.labels
            columns, above = grid_columns(labels, named)
            columns = min(columns, len(self))
        return pixels.as_picture(pixels.image_grid(np.asarray(self), columns, above=above))

    def _name(self, label: int) -> str:
        return self.class_names[label] if self.class_names else str(label)

    def save(self, path: epath.PathLike) -> None:
        """Write them: to `.npz` (`arr_0`, `arr_1`, as ADM's evaluator reads them), or as a grid.

        Args:
          path: ends in .npz; or in .png, .jpg or .webp for an image of all.

        Raises:
          UserError: it ends in something else, or cannot be written.
        """
        target = files.resolve(path, "path")
        kinds = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
        if target.suffix == ".npz":
            arrays: dict[str, Any] = {"arr_0": np.asarray(self)}
            arrays |= {} if self.labels is None else {"arr_1": self.labels}
            with files.writing(target) as file:
                np.savez(file, **arrays)
        elif target.suffix.lower() in kinds:
            pixels.write_picture(target, self.grid(), kinds[target.suffix.lower()])
        else:
            raise UserError(f"{target} must end in .npz, .png, .jpg or .webp: change it")


class _OpenedOnce(Decoding):
    """An autoencoder that is read once, for one mesh, and compiled once for each size of batch."""

    @functools.cached_property
    def _held(self) -> dict[Any, Any]:
        return {}

    def read(self, mesh: jax.sharding.Mesh) -> tuple[epath.Path, Autoencoder, dict[str, Any]]:
        if "arrays" not in self._held:
            self._held["arrays"] = super().read(mesh)
        return self._held["arrays"]

    def open(self, mesh: jax.sharding.Mesh, batch_size: int, rounding: str) -> LatentDecoder:
        if (batch_size, rounding) not in self._held:
            self._held[batch_size, rounding] = super().open(mesh, batch_size, rounding)
        return self._held[batch_size, rounding]


class DiffiT:
    """A trained network, on all devices, with which images are drawn, denoised and explained.

    Attributes:
      config: of its run, nested dicts.
      class_names: of its labels, by index; none where they have no names.
    """

    def __init__(
        self, source: Run | Weights, vae: epath.PathLike | None = None, vae_dtype: str = "float32"
    ):
        """Take a network that `load` has opened; arguments as of it."""
        self._source = source
        self._decoding = None if vae is None else _OpenedOnce(vae, vae_dtype)
        self._setup = setup_experiment(
            source.config, to_train=False, config_file=source.config_file
        )
        self.config = source.config
        self.class_names = [synonyms[0] for synonyms in source.classes]

    @classmethod
    def load(
        cls,
        path: epath.PathLike,
        vae: epath.PathLike | None = None,
        *,
        config: str | None = None,
        checkpoint: int | None = None,
        ema_length: float | None = None,
        raw: bool = False,
        vae_dtype: str = "float32",
    ) -> "DiffiT":
        """Open a run or a file of weights; its arrays are read when they are first needed.

        Args:
          path: work directory of a run, or weights: a file, or `hf://owner/name/path`.
          vae: autoencoder (a folder, or `hf://owner/name`) that decodes latents to images.
          config: with weights: a config by name or file; None: the one that the file carries, else
            the one of its size in `configs/`.
          checkpoint: of a run: an older one.
          ema_length: of a run: average the parameters over this share of training.
          raw: of a run: the parameters without averaging.
          vae_dtype: of the autoencoder's convolutions, float32 or bfloat16.

        Raises:
          UserError: there is no run, or no weights that can be read.
        """
        if not hub.is_address(path) and files.resolve(path, "path").is_dir():
            run = Run(path, checkpoint=checkpoint, ema_length=ema_length, raw=raw)
            return cls(run, vae, vae_dtype)
        if checkpoint is not None or ema_length is not None or raw:
            raise UserError(
                f"{path} is a file of weights, which holds one average: leave out checkpoint, "
                "ema_length and raw"
            )
        from diffit_jax.runtime import config_files

        local = str(hub.local(path, "path"))
        named = None if config is None else config_files.load(config)
        return cls(Weights(path, config_for_weights(named, local)), vae, vae_dtype)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of a sample: of an image, or of a latent where there is no autoencoder."""
        sample = self._setup.experiment.model.sample_shape
        return sample if self._decoding is None else self._decoder.shape_of(sample)

    @backend.reproducible_numerics()
    def sample(
        self,
        labels: Sequence[int | str] | int | str | None = None,
        seeds: Sequence[int] | int = range(4),
        *,
        guidance_scale: float | None = None,
        sampler: str | None = None,
        num_steps: int | None = None,
        **settings: Any,
    ) -> "Images | np.ndarray":
        """Draw one sample for each seed.

        Args:
          labels: indices or names of classes, given out in turn; or text as `--labels` takes it;
            None: seed modulo the number of classes.
          seeds: numbers in [0, 2³²); a sample is a function of its seed, its label and the weights.
          guidance_scale: of the guidance; None: the config's, as for what follows.
          sampler: "heun", "ddim" …
          num_steps: of the sampler.
          **settings: further ones by their flag, with `_` for the dot: `sampler_churn_amount=40`,
            `guidance="interval"`, `batch_per_device=16`.

        Returns:
          (N, H, W, C) uint8 `Images`; of a latent network without an autoencoder (N, H, W, C)
          float32 latents.

        Raises:
          UserError: a label, seed or setting that cannot be, or samples that are not finite.
        """
        named = {"guidance_scale": guidance_scale, "sampler": sampler, "num_steps": num_steps}
        request = self._asked(labels, seeds, {**named, **settings})
        networks = request.bundle(*self._network)
        parts, bad = [], []
        for batch in segments(np.arange(len(request.seeds)), request.sampler.batch_size):
            samples, finite = request.draw(networks, batch)
            parts.append(samples)
            bad += request.seeds[batch][~finite].tolist()
        if bad:
            raise UserError(f"samples of seeds {bad[:10]} are not finite: use other weights")
        drawn = np.concatenate(parts)
        if request.experiment.space.samples != "samples":
            return drawn
        labelled = request.experiment.model.num_classes > 0
        return Images.of(
            drawn, request.labels if labelled else None, request.seeds, self.class_names
        )

    @backend.reproducible_numerics()
    def trajectory(
        self,
        labels: Sequence[int | str] | int | str | None = None,
        seeds: Sequence[int] | int = range(4),
        *,
        frames: int = 8,
        **settings: Any,
    ) -> np.ndarray:
        """Draw samples, and return the clean samples as they are estimated along the way.

        Args:
          labels: as of `sample`.
          seeds: as of `sample`.
          frames: F, how many of the sampler's steps are kept, from the first to the last.
          **settings: as of `sample`.

        Returns:
          (N, F, H, W, C) uint8 images, or float32 latents.

        Raises:
          UserError: as of `sample`, or fewer steps than frames.
        """
        request = self._asked(labels, seeds, settings)
        steps = request.experiment.sampling.sampler.steps(request.experiment.process)
        if not 1 <= frames <= steps:
            raise UserError(f"frames is {frames}: the sampler has {steps} steps")
        networks, found = request.bundle(*self._network), []
        for batch in segments(np.arange(len(request.seeds)), request.sampler.batch_size):
            found.append(request.follow(networks, batch, frames))
        return np.concatenate(found)

    @backend.reproducible_numerics()
    def denoise(
        self,
        x: np.ndarray | jax.Array,
        sigma: float | Sequence[float] | np.ndarray,
        labels: Sequence[int | str] | int | str | None = None,
    ) -> np.ndarray:
        """Estimate clean samples D(x; sigma), without guidance.

        Args:
          x: (N, H, W, C) float32 clean samples, in the network's units (images: [-1, 1]), plus
            noise of standard deviation sigma.
          sigma: one noise level, or N. Of a flow `process.sigma_of(t)`, with t from 0, data, to 1,
            noise: on the linear path sigma_data t / (1 - t).
          labels: indices or names of classes, given out in turn; None: no label.

        Returns:
          (N, H, W, C) float32.

        Raises:
          UserError: another shape, or a label that there is not.
        """
        model = self._setup.experiment.model
        x = np.asarray(x, np.float32)
        if model.class_token:
            raise UserError(
                "this network denoises a class token beside x (model.class_token): draw samples"
            )
        if x.ndim != 4 or x.shape[1:] != model.sample_shape:
            raise UserError(f"x has the shape {x.shape}: it must be (N, {_sizes(model)})")
        count = len(x)
        given = [model.num_classes] if labels is None else self._labels(labels)
        batch = {
            "x": x,
            "sigma": np.broadcast_to(np.asarray(sigma, np.float32), (count,)),
            "label": np.resize(np.asarray(given, np.int32), count),
        }
        mesh = self._setup.mesh
        size = parallel.next_batch_size(mesh, count)
        with parallel.placement(mesh):
            put = parallel.put_padded(mesh, batch, size)
            denoised = self._denoiser(self._network[0], put)
        return np.asarray(denoised)[:count]

    def _denoise(self, variables: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
        experiment = self._setup.experiment
        network = models.as_network(experiment.model, variables)
        conditioning = {"label": batch["label"]} if experiment.model.num_classes else {}
        return experiment.process.denoise(network, batch["x"], batch["sigma"], conditioning)

    def encode(self, images: np.ndarray) -> np.ndarray:
        """Encode images (N, H, W, 3) uint8 to latents (N, h, w, c) float32, the posterior's mean.

        In the network's units, as `denoise` takes them. Raises `UserError` without an autoencoder.
        """
        encoder, decoder, found = self._encoder, self._decoder, []
        for start in range(0, len(images), encoder.batch_size):
            batch = np.asarray(images[start : start + encoder.batch_size], np.uint8)
            arrays, _ = encoder.start(batch).result()
            found.append(arrays["moments"][:, 0, :, :, : decoder.channels])
        return np.asarray(decoder.module.scaled(jnp.asarray(np.concatenate(found))))

    def decode(self, latents: np.ndarray) -> Images:
        """Decode latents (N, h, w, c) float32, as `encode` gives them, to images.

        Raises:
          UserError: there is no autoencoder.
        """
        images, finite = self._decoder.checked(np.asarray(latents, np.float32))
        if not finite.all():
            bad = np.flatnonzero(~finite)[:10].tolist()
            raise UserError(f"images of the latents {bad} are not finite: use another autoencoder")
        return Images.of(images, None, np.arange(len(images)), ())

    def attention(
        self,
        *,
        images: int = analyse.IMAGES,
        steps: int = analyse.STEPS,
        query: tuple[float, float] = (0.5, 0.5),
        frozen: float = 0.5,
    ) -> Analysed:
        """Follow samples from noise to data and measure what attention does on the way.

        Args:
          images: samples that are followed, of the seeds and labels 0, 1, 2 …
          steps: noise levels T.
          query: (row, column) of the token whose attention is kept, in shares of the side.
          frozen: where in the T levels time stands still in the comparisons, a share.

        Raises:
          UserError: a network without attention.
        """
        return analyse.follow(
            self._setup, self._network[0], images=images, steps=steps, query=query, frozen=frozen
        )

    def _asked(
        self,
        labels: Sequence[int | str] | int | str | None,
        seeds: Sequence[int] | int,
        settings: Mapping[str, Any],
    ) -> SampleRequest:
        """Return the request for samples; arguments as of `sample`."""
        overrides = {}
        for name, value in settings.items():
            section, _, key = name.partition("_")
            dotted = f"{section}.{key}" if section in ("sampler", "guidance") and key else name
            if value is not None:
                overrides["sampler.num_steps" if name == "num_steps" else dotted] = value
        numbers = [seeds] if isinstance(seeds, int) else list(seeds)
        return self._request(numbers, labels, overrides)

    def _request(
        self, seeds: Sequence[int], labels: Any, overrides: Mapping[str, Any]
    ) -> SampleRequest:
        asked: Any = labels
        if labels is not None and not isinstance(labels, str):
            asked = self._labels(labels)
        options = SamplingOptions(asked, overrides, self._decoding)
        return SampleRequest.make(self._source, seeds=seeds, options=options, setup=self._setup)

    def _labels(self, labels: Sequence[int | str] | int | str) -> list[int]:
        """Return the indices of classes that are named or numbered; errors as of `sample`."""
        num_classes = self._setup.experiment.model.num_classes
        if not num_classes:
            raise UserError(f"the model in {self._source.name} is unconditional: leave out labels")
        several = [labels] if isinstance(labels, int | str | np.integer) else list(labels)
        numbers = [
            class_named(each, self._source.classes) if isinstance(each, str) else int(each)
            for each in several
        ]
        return give_out(numbers, len(numbers), num_classes).tolist()

    @functools.cached_property
    def _network(self) -> tuple[Any, dict[str, Any]]:
        """The variables of the network, and their origin."""
        return self._source.load(self._setup)

    @functools.cached_property
    def _denoiser(self) -> Any:
        return jax.jit(self._denoise)

    @functools.cached_property
    def _decoder(self) -> LatentDecoder:
        if self._decoding is None:
            raise UserError("there is no autoencoder: name one by DiffiT.load(…, vae=…)")
        rounding = self._setup.experiment.sampling.pixel_rounding
        return self._decoding.open(self._setup.mesh, self._setup.mesh.size, rounding)

    @functools.cached_property
    def _encoder(self) -> ImageEncoder:
        module, variables = self._decoder.module, self._decoder.variables
        return ImageEncoder(module, variables, self._setup.mesh, batch_per_device=1, orientations=1)


def _sizes(model: models.Model) -> str:
    return ", ".join(map(str, model.sample_shape))
