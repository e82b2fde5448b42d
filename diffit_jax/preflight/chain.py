"""The programs between images, latents and scores that preflight prices, of shapes only."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffit_jax import models
from diffit_jax.data import pixels
from diffit_jax.errors import UserError
from diffit_jax.evaluation.features import Extractor, OfDINOv2, OfInception
from diffit_jax.experiment.representation import REPA
from diffit_jax.models.model import count_multiply_adds
from diffit_jax.models.pretrained import resizing
from diffit_jax.models.pretrained.autoencoder import Autoencoder
from diffit_jax.models.pretrained.dinov2 import ENCODERS
from diffit_jax.models.pretrained.inception import SIDE, Inception
from diffit_jax.run import representation
from diffit_jax.run.state import Setup
from diffit_jax.runtime import parallel
from diffit_jax.sampling.decoder import CHUNK_SIZE, LatentDecoder, per_slice

CHAIN = ("encode", "decode", "inception", "dinov2", "encoder")
Program = tuple[jax.stages.Lowered, int, int]  # …, its images, and multiply-adds of each


class Chain:
    """The programs between images, latents and scores, lowered; of shapes only.

    Attributes:
      of_autoencoder, of_inception, of_dinov2: their variables.
    """

    def __init__(self, setup: Setup):
        """Take an experiment on a mesh; read nothing."""
        self._experiment = setup.experiment
        self._mesh, self._latent = setup.mesh, setup.experiment.model.sample_shape
        self._autoencoder = Autoencoder(latent_channels=self._latent[-1], dtype=jnp.bfloat16)
        whole = self._autoencoder.factor
        factor = whole if setup.experiment.data.autoencoder else 1
        self._image = (self._latent[0] * factor, self._latent[1] * factor, 3)
        self._inception = Inception()
        self._dinov2 = ENCODERS["dinov2_vitl14"]
        self.of_dinov2 = _variables(self._mesh, self._dinov2, (14, 14, 3))
        self.of_autoencoder = _variables(self._mesh, self._autoencoder, (whole, whole, 3))
        self.of_inception = _variables(self._mesh, self._inception, (SIDE, SIDE, 3))

    def of_encoder(self) -> Any:
        """Return shapes of a config's encoder of representations, in the step.

        Raises:
          UserError: there is none.
        """
        settings = self._experiment.representation
        if not isinstance(settings, REPA) or settings.source != "image":
            raise UserError(
                "--programs has encoder, but the config has none in its step: set "
                "representation.kind to repa or reg, and source to image"
            )
        return representation.abstract_encoder(settings, self._mesh)

    def encoder(self) -> Program:
        """Lower it for the pictures of an update, as the step has it."""
        variables, settings = self.of_encoder(), self._experiment.representation
        assert isinstance(settings, REPA)
        module, grid = representation.encoder_of(settings), settings.grid(self._experiment.model)

        def encode(variables: Any, image_BHWC: jax.Array) -> jax.Array:
            return representation.encoded(module, variables, image_BHWC, grid)

        count, sharding = self._experiment.training.batch_size, parallel.batch_sharding(self._mesh)
        batch = jax.ShapeDtypeStruct((count, *self._image), np.uint8, sharding=sharding)
        adds = round(representation.encoder_flops(self._experiment) / 2)
        lowered = jax.jit(encode, out_shardings=sharding).lower(variables, batch)
        return lowered, count, adds

    def inception(self) -> Program:
        """Lower the FID network for a batch."""
        network = OfInception(self._inception, self.of_inception)
        extractor = Extractor({"inception": network}, self._mesh)
        adds = _multiply_adds(self._inception.apply, self.of_inception, (SIDE, SIDE, 3))
        return extractor.lower(self._image), extractor.batch_size, adds

    def dinov2(self) -> Program:
        """Lower the network of FD-DINOv2 for a batch."""
        rule = self._experiment.evaluation.dinov2_resize
        network = OfDINOv2(self._dinov2, self.of_dinov2, rule)
        extractor = Extractor({"dinov2": network}, self._mesh)
        side = resizing.RULES[rule].side(self._image[0], self._dinov2.patch)
        adds = _multiply_adds(self._dinov2.apply, self.of_dinov2, (side, side, 3))
        return extractor.lower(self._image), extractor.batch_size, adds

    def decode(self) -> Program:
        """Lower the autoencoder's decoder for a slice on each device."""
        decoder = LatentDecoder(
            self._autoencoder, self.of_autoencoder, self._mesh, batch_per_device=CHUNK_SIZE
        )
        return decoder.lower(self._latent), decoder.batch_size, self._adds("decode", self._latent)

    def encode(self) -> Program:
        """Lower the autoencoder's encoder for a slice on each device."""

        def encode(variables: Any, image_BHWC: jax.Array) -> Any:
            image_BHWC = pixels.to_model(image_BHWC)
            return self._autoencoder.apply(variables, image_BHWC, method="encode")

        count, sharding = CHUNK_SIZE * self._mesh.size, parallel.batch_sharding(self._mesh)
        batch = jax.ShapeDtypeStruct((count, *self._image), np.uint8, sharding=sharding)
        lowered = per_slice(encode, self._mesh, CHUNK_SIZE).lower(self.of_autoencoder, batch)
        return lowered, count, self._adds("encode", self._image)

    def _adds(self, method: str, example: tuple[int, ...]) -> int:
        apply = functools.partial(self._autoencoder.apply, method=method)
        return _multiply_adds(apply, self.of_autoencoder, example)


def _variables(mesh: jax.sharding.Mesh, module: Any, example: tuple[int, ...]) -> Any:
    """Return shapes of a network's variables, on every device."""
    return parallel.abstract(mesh, models.variable_shapes(module, example))


def _multiply_adds(apply: Callable, variables: Any, example: tuple[int, ...]) -> int:
    """Count multiply-adds for one example, (H, W, C)."""
    shape = jax.ShapeDtypeStruct((1, *example), jnp.float32)
    return count_multiply_adds(jax.make_jaxpr(apply)(variables, shape).jaxpr)


def bytes_of(variables: Any) -> int:
    """Return the bytes of arrays, or of shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(variables))
