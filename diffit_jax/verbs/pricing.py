"""What `preflight` compiles beside the training step: drawing samples, and the networks between
images, latents and scores."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffit_jax import models
from diffit_jax.data import pixels
from diffit_jax.errors import UserError
from diffit_jax.evaluation.features import Extractor
from diffit_jax.evaluation.in_training import kinds
from diffit_jax.models.autoencoder import Autoencoder
from diffit_jax.models.inception import SIDE, Inception
from diffit_jax.models.model import count_multiply_adds
from diffit_jax.runtime import parallel
from diffit_jax.sampling.decoder import AT_ONCE, Decoder, per_slice
from diffit_jax.sampling.sampler import copy_bytes, copy_fits, sampler_without_autoguidance
from diffit_jax.tpu.chips import Chip
from diffit_jax.tpu.figures import Chain, Compiled, Drawing, Evaluating, Sampling, Step, TooLarge
from diffit_jax.training.state import Opened

Ask = Callable[[jax.stages.Lowered], Compiled | TooLarge]


def price_sampling(opened: Opened, chip: Chip, chips: int, compiled: Ask) -> Sampling:
    """Drawing a batch as the chip would (autoguidance's second network is not known here; the
    report says so), and the other way if there is one."""
    experiment, variables = opened.experiment, opened.state.ema_variables
    size = copy_bytes(experiment.model, variables)
    wanted = size > 0 and copy_fits(size, chip.memory / chip.devices)

    def price(copy: bool) -> Sampling:
        sampler = sampler_without_autoguidance(experiment, opened.mesh, copy=copy)
        batch = compiled(sampler.lower(variables))
        if isinstance(batch, Compiled):
            flops = 2 * sampler.multiply_adds(variables)
            batch = Drawing.of(batch, chip, chips, images=sampler.batch_size, flops=flops)
        return Sampling(batch, size if copy else 0)

    alternative = price(not wanted) if size else None
    return dataclasses.replace(price(wanted), alternative=alternative)


def price_chain(
    opened: Opened,
    *,
    chip: Chip,
    chips: int,
    compiled: Ask,
    programs: Sequence[str],
    sampling: Sampling | None,
) -> Chain:
    """The networks between images, latents and scores: the published autoencoder in bfloat16, a
    slice on each device, and the FID network, a batch.

    Args:
      opened: the experiment.
      chip, chips: of the topology.
      compiled: asks the compiler.
      programs: which of "encode", "decode" and "inception".
      sampling: how the experiment draws, for what its network and these take together.

    Raises:
      UserError: a program of an autoencoder for an experiment without one.
    """
    with_autoencoder = bool(opened.experiment.data.autoencoder)
    if not with_autoencoder and {"encode", "decode"} & set(programs):
        raise UserError("--programs has encode or decode, but the config names no autoencoder")
    chain = _Chained(opened)
    priced: dict[str, Step | TooLarge] = {}
    for name in programs:
        lowered, images, adds = getattr(chain, name)()
        answer = compiled(lowered)
        if isinstance(answer, Compiled):
            answer = Step.of(answer, chip, chips, images=images, flops=2 * images * adds)
        priced[name] = answer
    held = {
        "autoencoder": _bytes(chain.of_autoencoder) if with_autoencoder else 0,
        "inception": _bytes(chain.of_inception),
    }
    return Chain(priced, held, _together(sampling, priced, held), chip.memory / chip.devices)


_Program = tuple[jax.stages.Lowered, int, int]  # …, its images, and multiply-adds of each


class _Chained:
    """The programs between pictures, latents and scores, lowered; of shapes only.

    Attributes:
      of_autoencoder, of_inception: their variables.
    """

    def __init__(self, opened: Opened):
        self._mesh, self._latent = opened.mesh, opened.experiment.model.sample_shape
        self._autoencoder = Autoencoder(latent_channels=self._latent[-1], dtype=jnp.bfloat16)
        whole = self._autoencoder.factor
        factor = whole if opened.experiment.data.autoencoder else 1
        self._image = (self._latent[0] * factor, self._latent[1] * factor, 3)
        self._inception = Inception()
        self.of_autoencoder = _variables(self._mesh, self._autoencoder, (whole, whole, 3))
        self.of_inception = _variables(self._mesh, self._inception, (SIDE, SIDE, 3))

    def inception(self) -> _Program:
        extractor = Extractor(self._inception, self.of_inception, self._mesh)
        adds = _multiply_adds(self._inception.apply, self.of_inception, (SIDE, SIDE, 3))
        return extractor.lower(self._image), extractor.batch_size, adds

    def decode(self) -> _Program:
        decoder = Decoder(
            self._autoencoder, self.of_autoencoder, self._mesh, batch_per_device=AT_ONCE
        )
        return decoder.lower(self._latent), decoder.batch_size, self._adds("decode", self._latent)

    def encode(self) -> _Program:
        def encode(variables: Any, image_BHWC: jax.Array) -> Any:
            image_BHWC = pixels.to_model(image_BHWC)
            return self._autoencoder.apply(variables, image_BHWC, method="encode")

        count, sharding = AT_ONCE * self._mesh.size, parallel.batch_sharding(self._mesh)
        batch = jax.ShapeDtypeStruct((count, *self._image), np.uint8, sharding=sharding)
        lowered = per_slice(encode, self._mesh, AT_ONCE).lower(self.of_autoencoder, batch)
        return lowered, count, self._adds("encode", self._image)

    def _adds(self, method: str, example: tuple[int, ...]) -> int:
        apply = functools.partial(self._autoencoder.apply, method=method)
        return _multiply_adds(apply, self.of_autoencoder, example)


def price_evaluating(
    opened: Opened,
    *,
    chip: Chip,
    chips: int,
    state_bytes: int,
    sampling: Sampling | None,
    chain: Chain | None,
) -> Evaluating | None:
    """The evaluations that an experiment asks for while it trains; None if it asks for none, or one
    of their programs was not priced.

    Args:
      opened: the experiment.
      chip, chips: of the topology.
      state_bytes: of what each device holds between steps.
      sampling, chain: as they were priced.
    """
    experiment = opened.experiment
    settings = experiment.evaluation
    if not settings.steps or sampling is None or chain is None:
        return None
    wanted = ["decode"] * bool(experiment.data.autoencoder) + ["inception"]
    steps = [sampling.batch, *(chain.programs.get(name) for name in wanted)]
    fitting = [step for step in steps if isinstance(step, Step)]
    if len(fitting) < len(steps):
        return None
    beside = max(map(_beside, fitting))
    seconds = sum(1 / (step.images_per_s_per_chip * chips) for step in fitting)
    weights = len(list(kinds(experiment, opened.state, settings.raw)))
    total = experiment.training.total_steps
    last = settings.final_count or settings.count
    before = -(-total // settings.steps) - 1  # the last one comes after the last update
    images = before * settings.count + last
    return Evaluating(
        kinds=weights,
        seconds_per_image=seconds,
        memory=state_bytes + sum(chain.held.values()) + beside,
        limit=chip.memory / chip.devices,
        run_hours=weights * images * seconds / 3600,
    )


def _beside(step: Step) -> int:
    """Bytes that a program needs beside its arguments."""
    return step.memory.outputs + step.memory.temporaries + step.memory.program


def _variables(mesh: jax.sharding.Mesh, module: Any, example: tuple[int, ...]) -> Any:
    """Shapes of a network's variables, on every device."""
    return parallel.abstract(mesh, models.variable_shapes(module, example))


def _multiply_adds(apply: Callable, variables: Any, example: tuple[int, ...]) -> int:
    """Of one example, (H, W, C)."""
    shape = jax.ShapeDtypeStruct((1, *example), jnp.float32)
    return count_multiply_adds(jax.make_jaxpr(apply)(variables, shape).jaxpr)


def _bytes(variables: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(variables))


def _together(
    sampling: Sampling | None, priced: Mapping[str, Step | TooLarge], held: Mapping[str, int]
) -> int | None:
    """Bytes on each device while samples are drawn, decoded and measured: all weights, and the
    largest of what the programs need beside; None if one of them is not known."""
    wanted = [name for name, size in (("decode", held["autoencoder"]), ("inception", 1)) if size]
    steps = [sampling.batch if sampling else None, *(priced.get(name) for name in wanted)]
    fitting = [step for step in steps if isinstance(step, Step)]
    if len(fitting) < len(steps):
        return None
    weights = fitting[0].memory.arguments + sum(held.values())
    return weights + max(map(_beside, fitting))
