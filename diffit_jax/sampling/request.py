"""A request for samples, checked: what is drawn, with which networks, and what it is known by."""

import dataclasses
import hashlib
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from diffit_jax.data.labels import give_out, name_of, parse_labels
from diffit_jax.errors import UserError
from diffit_jax.experiment.config import Experiment
from diffit_jax.experiment.sections import CHOICES, Sampling
from diffit_jax.run import power_ema
from diffit_jax.run import workdir as workdirs
from diffit_jax.run.state import Setup, items_of, setup_experiment
from diffit_jax.runtime import backend, checkpoint, distributed, files, parallel
from diffit_jax.runtime.console import Progress, first_few, in_short
from diffit_jax.sampling.decoder import Decoding, LatentDecoder
from diffit_jax.sampling.sampler import Sampler, Variables, default_labels
from diffit_jax.sampling.weights import (
    CLASSES_CARRIED,
    CONFIG_CARRIED,
    Weights,
    config_for_weights,
    layout_of,
)

__all__ = ["CLASSES_CARRIED", "CONFIG_CARRIED", "Weights", "config_for_weights", "layout_of"]

log = logging.getLogger(__name__)

_LONGEST_NAME = 160


def default_name(kind: str, shape: Sequence[int], differences: Mapping[str, Any]) -> str:
    """Return ADM's name `<kind>_NxHxWxC.npz`, with the differences from the default request.

    For example `samples_4x8x8x1-seeds=4-7,sampler=ddim.npz`.

    Args:
      kind: "samples" or "latents".
      shape: (N, H, W, C).
      differences: values by name.
    """
    name = f"{kind}_{'x'.join(map(str, shape))}"
    words = ",".join(
        f"{key}={re.sub(r'[^A-Za-z0-9_.+@-]+', '_', str(value))}"
        for key, value in differences.items()
    )
    if len(name) + len(words) > _LONGEST_NAME:
        words = hashlib.sha256(words.encode()).hexdigest()[:16]
    return f"{name}{'-' if words else ''}{words}.npz"


def _digest(numbers: np.ndarray) -> str:
    return f"{len(numbers)} numbers, {hashlib.sha256(numbers.tobytes()).hexdigest()[:16]}"


class Run:
    """A network in a work directory, by default the averages of its newest checkpoint."""

    def __init__(
        self,
        workdir: epath.PathLike,
        *,
        ema_length: float | None = None,
        checkpoint: int | None = None,
        allow_nonfinite: bool = False,
        raw: bool = False,
        config: Mapping[str, Any] | None = None,
    ):
        """Read the run's config.

        Args:
          workdir: of the run.
          ema_length: asks for an average made of its snapshots, see `run.power_ema`.
          checkpoint: step of a checkpoint (with `ema_length`: of a snapshot) instead of the newest.
          allow_nonfinite: whether parameters may have NaNs or infinities.
          raw: whether the parameters themselves are asked for, not an average.
          config: of the run, where it is at hand and perhaps not yet in its directory.
        """
        if raw and ema_length is not None:
            raise UserError("--raw and --ema_length both say which weights: leave out either")
        self.directory = files.resolve(workdir, "workdir")
        self.name = f"workdir {self.directory}"
        self.config = workdirs.read_config(self.directory) if config is None else config
        self.config_file = self.directory / workdirs.CONFIG_FILE
        self.classes = workdirs.read_classes(self.directory, self.config)
        self._ema_length, self._checkpoint = ema_length, checkpoint
        self._allow_nonfinite, self._raw = allow_nonfinite, raw
        asked = {"ema_length": ema_length, "checkpoint": checkpoint, "raw": raw or None}
        self.differences = {name: value for name, value in asked.items() if value is not None}

    def load(self, setup: Setup) -> tuple[Variables, dict[str, Any]]:
        """Load (variables, their origin). Raises `UserError` if there is no usable checkpoint."""
        if self._ema_length is None:
            step, variables = restore_variables(
                self.directory, setup, self._checkpoint, self._allow_nonfinite, self._raw
            )
        else:
            step, variables = reconstruct_variables(
                self.directory, setup, self._ema_length, self._checkpoint
            )
        bad = [] if self._allow_nonfinite else checkpoint.not_finite(variables)
        if bad:
            raise UserError(
                f"the averages of {self.name} at step {step} are not finite ({first_few(bad)}): "
                "sample an older one by --checkpoint, or say --allow_nonfinite"
            )
        return variables, self.origin(step)

    def origin(self, step: int) -> dict[str, Any]:
        """Return where weights of a step are from, JSON values by name."""
        of = {"workdir": str(self.directory), "checkpoint": step, "ema_length": self._ema_length}
        return of | ({"raw": True} if self._raw else {})


def restore_variables(
    workdir: epath.PathLike,
    setup: Setup,
    step: int | None = None,
    allow_nonfinite: bool = False,
    raw: bool = False,
) -> tuple[int, Variables]:
    """Restore the newest usable checkpoint's step and variables (averaged parameters, constants).

    Args:
      workdir: of the run.
      setup: its experiment.
      step: of a checkpoint, instead of the newest.
      allow_nonfinite: whether one with NaNs or infinities is usable.
      raw: whether to return the parameters themselves (for which all of the state is read).

    Raises:
      UserError: there is none.
    """
    wanted = {"constants": setup.variables["constants"]}
    if raw:
        wanted["state"] = items_of(setup.state)["state"]
    else:
        wanted["ema"] = setup.variables["params"]
    step, items = _restore_items(workdir, wanted, step, allow_nonfinite)
    params = items["state"]["params"] if raw else items["ema"]
    return step, {"params": params, "constants": items["constants"]}


def _restore_items(
    workdir: epath.PathLike,
    shapes: dict[str, Any],
    step: int | None = None,
    allow_nonfinite: bool = False,
) -> tuple[int, dict[str, Any]]:
    """Restore items of the newest usable checkpoint by name.

    One without arrays is not in a checkpoint, and comes back as it is.
    """
    checkpoints = checkpoint.Checkpoints(epath.Path(workdir) / workdirs.CHECKPOINTS)
    restored = checkpoints.restore(
        {name: tree for name, tree in shapes.items() if tree}, step, allow_nonfinite
    )
    if restored is None:
        raise UserError(f"workdir {workdir} holds no checkpoint: train first")
    step, items = restored
    return step, shapes | items


def reconstruct_variables(
    workdir: epath.PathLike, setup: Setup, length: float, until: int | None = None
) -> tuple[int, Variables]:
    """Return the step of a run's last snapshot used, and variables with an average of any length.

    Args:
      workdir: of the run.
      setup: its experiment, which has the lengths of the averages that it keeps snapshots of.
      length: of the new average.
      until: step of the snapshot at which the average ends; None: the newest.

    Raises:
      UserError: the run keeps no snapshots, one cannot be read, or an impossible length.
    """
    lengths = setup.experiment.ema.power_lengths
    snapshots = checkpoint.Checkpoints(epath.Path(workdir) / workdirs.SNAPSHOTS)
    steps = snapshots.steps()
    if not steps:
        raise UserError(
            f"workdir {workdir} has no snapshots of averages: train with ema.power_lengths, or "
            "leave out --ema_length"
        )
    # Snapshots up to the end of the average, all of which must be whole.
    if until is not None:
        if until not in steps:
            raise UserError(
                f"there is no snapshot {until} in {snapshots.directory}: use "
                f"{', '.join(map(str, steps))}"
            )
        steps = [step for step in steps if step <= until]
    for step in steps:
        if "updates" not in snapshots.metadata(step):
            raise UserError(
                f"snapshot {step} in {snapshots.directory} is damaged: move it away, or leave out "
                "--ema_length"
            )
    # Factors by the updates that were made; skipped ones changed nothing.
    times = [snapshots.metadata(step)["updates"] for step in steps for _ in lengths]
    factors = power_ema.reconstruction(
        times, list(lengths) * len(steps), times[-1], length
    ).reshape(len(steps), len(lengths))
    averages = {str(index): setup.variables["params"] for index in range(len(lengths))}
    # One snapshot in memory at a time.
    params = None
    with Progress(
        "reconstruct", len(steps), unit="snapshot", shown=distributed.is_primary()
    ) as progress:
        for step, row in zip(steps, factors, strict=True):
            restored = snapshots.restore_step(step, {"power_emas": averages})["power_emas"]
            for index, factor in enumerate(row):
                params = power_ema.add_scaled(params, restored[str(index)], factor)
            progress.advance()
    _, items = _restore_items(
        workdir, {"constants": setup.variables["constants"]}, allow_nonfinite=True
    )
    return steps[-1], {"params": params, "constants": items["constants"]}


def open_guide(experiment: Experiment, workdir: str) -> tuple[Run, Setup]:
    """Open the run of autoguidance's guiding network, which must fit the main one.

    Raises:
      UserError: it does not, or there is no run.
    """
    if not workdir:
        raise UserError(
            "autoguidance needs a second, weaker network: name its run by --guidance.workdir, or "
            "choose another guidance"
        )
    run = Run(workdir)
    guide = setup_experiment(run.config, to_train=False, config_file=run.config_file)
    ours, theirs = (
        (one.process, one.model.noise_shapes, one.model.num_classes)
        for one in (experiment, guide.experiment)
    )
    if ours != theirs:
        raise UserError(
            f"guidance.workdir {workdir} differs in process, shape or number of classes: name a "
            "run like the main one"
        )
    return run, guide


class Networks(NamedTuple):
    """What samples are drawn with.

    Attributes:
      variables: of the network.
      guide: of autoguidance's guiding network, or None.
      origin: where they are from, JSON values by name.
    """

    variables: Variables
    guide: Variables | None
    origin: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """How the samples of a network are drawn, as a request says it.

    Attributes:
      labels: one for each sample, or text as `labels.parse_labels` reads it; None: seed modulo
        classes.
      overrides: settings of sampling by key, in place of the config's.
      decoding: by which autoencoder latents become images, or None.
    """

    labels: Sequence[int] | str | None = None
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    decoding: Decoding | None = None


@dataclasses.dataclass(frozen=True)
class SampleRequest:
    """A request for samples, checked.

    Attributes:
      source: of the network.
      setup: the source's experiment on a mesh.
      experiment: the same, sampled as asked for.
      seeds, labels: (N,) int64.
      words: the labels for people; None: the default ones.
      sampler: that draws.
      guide: run of autoguidance's guiding network, and its experiment.
      decoder: from latents to images, or None.
      scale: of the guidance, where the sampler has another one, see `Sampler.draw_batch`.
    """

    source: Run | Weights
    setup: Setup
    experiment: Experiment
    seeds: np.ndarray
    labels: np.ndarray
    words: str | None
    sampler: Sampler
    guide: tuple[Run, Setup] | None
    decoder: LatentDecoder | None
    scale: float | None = None

    @classmethod
    def make(
        cls,
        source: Run | Weights,
        *,
        seeds: Sequence[int],
        options: SamplingOptions = SamplingOptions(),
        setup: Setup | None = None,
    ) -> "SampleRequest":
        """Check a request; errors as of `sample`.

        Args:
          source: of the network.
          seeds: one seed number per sample.
          options: how they are drawn.
          setup: the source's experiment, if it is set up already.
        """
        setup = setup or setup_experiment(
            source.config, to_train=False, config_file=source.config_file
        )
        usual, model = setup.experiment.sampling, setup.experiment.model

        # --- Seeds, labels, settings.
        if len(seeds) == 0 or min(seeds) < 0 or max(seeds) >= 2**32:
            raise UserError("seeds must be at least one whole number in [0, 2^32): change --seeds")
        label_of = _labels(options.labels, seeds, model.num_classes, source)
        sampling = usual.overridden(options.overrides)
        if sampling.guidance.needs_labels and not model.num_classes:
            raise UserError(
                f"the model in {source.name} is unconditional: leave out --guidance.scale"
            )
        experiment = setup.experiment.with_sampling(sampling)
        if sampling.sampler.note:
            log.warning("%s", sampling.sampler.note)
        guide = None
        if sampling.guidance.needs_guide:
            guide = open_guide(experiment, getattr(sampling.guidance, "workdir", ""))
        words = None
        if not np.array_equal(label_of, default_labels(seeds, model.num_classes)):
            text = options.labels
            words = text if isinstance(text, str) else in_short(label_of.tolist())

        # --- The sampler, on devices that hold the right rows, and the decoder behind it.
        guide_model = guide[1].experiment.model if guide else None
        sampler = Sampler(experiment, setup.mesh, len(seeds), guide_model)
        parallel.verify_batch_sharding(setup.mesh, sampler.batch_size)
        decoder = None
        if options.decoding is not None:
            decoder = options.decoding.open(setup.mesh, sampler.batch_size, sampling.pixel_rounding)
            space = experiment.space.decoded(decoder, model.sample_shape)
            experiment = dataclasses.replace(experiment, space=space)
        numbers = np.asarray(seeds, np.int64)
        return cls(source, setup, experiment, numbers, label_of, words, sampler, guide, decoder)

    @property
    def shape(self) -> tuple[int, ...]:
        """(H, W, C) of a sample as it is written."""
        return self.experiment.space.shape(self.experiment.model.sample_shape)

    def with_scale(self, scale: float) -> "SampleRequest":
        """Return the request with another scale of the guidance, for the same compiled function."""
        sampling = self.experiment.sampling
        guidance = dataclasses.replace(sampling.guidance, scale=scale)
        sampling = dataclasses.replace(sampling, guidance=guidance)
        experiment = dataclasses.replace(self.experiment, sampling=sampling)
        return dataclasses.replace(self, experiment=experiment, scale=scale)

    def output(self, path: epath.PathLike | None) -> epath.Path:
        """Return where the samples go: a path that was asked for, or the request's default name.

        Raises:
          UserError: it is no npz file.
        """
        if path is None:
            name = default_name(
                self.experiment.space.samples,
                (len(self.seeds), *self.shape),
                dict(self._differences()) | dict(self.source.differences),
            )
            path = self.source.directory / name
        output = files.resolve(path, "output")
        if output.suffix != ".npz" or output.is_dir():
            raise UserError(f"--output {output} must be a file that ends in .npz: change it")
        return output

    def load(self) -> Networks:
        """Load the networks onto the mesh.

        Raises:
          UserError: there is no checkpoint, or weights that cannot be read or are not finite.
        """
        return self.bundle(*self.source.load(self.setup))

    def bundle(self, variables: Variables, origin: dict[str, Any]) -> Networks:
        """Bundle variables with the guiding network, and record where both came from."""
        guide, origin = None, dict(origin)
        if self.guide:
            guide, guide_origin = self.guide[0].load(self.guide[1])
            origin |= {f"weaker {name}": value for name, value in guide_origin.items()}
        if self.decoder:
            origin |= {"autoencoder": str(self.decoder.path)}
        return Networks(variables, guide, origin)

    def identity(self, networks: Networks) -> dict[str, Any]:
        """Return all that the samples depend on, JSON values by name.

        Not how many are drawn at once, nor on which disk the networks are.
        """
        guide_network = None
        if self.guide and networks.guide is not None:
            guide_network = _network(self.guide[1].experiment, networks.guide)
        return {
            "network": _network(self.experiment, networks.variables),
            "weaker network": guide_network,
            "autoencoder": self.decoder.identity() if self.decoder else None,
            "seeds": _digest(self.seeds),
            "labels": _digest(self.labels),
            "matmul_precision": backend.matmul_precision(),
            **self.settings(),
        }

    def class_name(self, label: int) -> str:
        """Return the name of a class; its number where it has none."""
        return name_of(self.source.classes)(label)

    def settings(self) -> dict[str, Any]:
        """Return the settings of sampling that samples depend on, JSON values by name."""
        sampling = self.experiment.sampling
        return {f"sampling.{name}": value for name, value in _makes_samples(sampling).items()}

    def draw(self, networks: Networks, batch: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Draw a batch of the samples as they are written to files, and which of them are finite.

        (A decoder's pixels too, which are black else.)

        Args:
          networks: from `load`.
          batch: (n,) indices into the seeds, n at most the sampler's batch.

        Returns:
          (n, H, W, C) uint8 images or float32 latents, and (n,) bool.
        """
        seeds, labels = self.seeds[batch], self.labels[batch]
        drawn = self.sampler.draw_batch(
            networks.variables, seeds, labels, networks.guide, self.scale
        )
        return self.experiment.space.from_model_checked(drawn)

    def follow(self, networks: Networks, batch: np.ndarray, frames: int) -> np.ndarray:
        """Draw samples, and return their estimates along the way as they are written to files.

        Args:
          networks: from `load`.
          batch: (n,) indices into the seeds, n at most the sampler's batch.
          frames: F, how many of the sampler's steps, from the first to the last.

        Returns:
          (n, F, H, W, C) uint8 images or float32 latents.
        """
        seeds, labels = self.seeds[batch], self.labels[batch]
        kept = self.sampler.sample_trajectory(
            networks.variables, seeds, labels, frames, networks.guide
        )
        flat = self.experiment.space.from_model(kept.reshape(-1, *kept.shape[2:]))
        return np.asarray(flat).reshape(len(batch), frames, *flat.shape[1:])

    def _differences(self) -> Iterator[tuple[str, Any]]:
        """Yield the differences from the default request, for the file's name."""
        usual, sampling = self.setup.experiment.sampling, self.experiment.sampling
        seeds = self.seeds.tolist()
        if seeds != list(range(len(seeds))):
            yield "seeds", _describe(in_short(seeds))
        if self.words is not None:
            yield "labels", _describe(self.words)
        ours, theirs = _makes_samples(sampling), _makes_samples(usual)
        for name, value in ours.items():
            if value != "" and value != theirs.get(name):
                yield name, value
        place = getattr(sampling.guidance, "workdir", "")
        if place != getattr(usual.guidance, "workdir", ""):
            yield "guidance.workdir", epath.Path(place).name
        if self.decoder and self.decoder.path.stem != self.setup.experiment.data.autoencoder:
            yield "vae", self.decoder.path.stem
        if self.decoder and self.decoder.dtype != "float32":
            yield "vae_dtype", self.decoder.dtype
        if backend.matmul_precision() != "default":
            yield "matmul_precision", backend.matmul_precision()


def _labels(
    asked: Sequence[int] | str | None,
    seeds: Sequence[int],
    num_classes: int,
    source: "Run | Weights",
) -> np.ndarray:
    """Return the label of each seed, (N,) int64."""
    if asked is None:
        return default_labels(seeds, num_classes)
    if not num_classes:
        raise UserError(f"the model in {source.name} is unconditional: leave out --labels")
    if isinstance(asked, str):
        return parse_labels(asked, seeds, num_classes, source.classes)
    return give_out(asked, len(seeds), num_classes)


def _network(experiment: Experiment, variables: Variables) -> dict[str, Any]:
    """Return what a network's samples depend on: its arrays, model and process."""
    return {
        "contents": checkpoint.fingerprint(variables),
        "model": workdirs.identifying_settings("model", experiment.model),
        "process": workdirs.identifying_settings("process", experiment.process),
    }


def _makes_samples(sampling: Sampling) -> dict[str, Any]:
    """Return the settings that samples depend on, by the names of their flags."""
    settings: dict[str, Any] = {"pixel_rounding": sampling.pixel_rounding}
    if not sampling.guide_class_token:  # which came later
        settings["guide_class_token"] = False
    for section, classes in CHOICES.items():
        value = getattr(sampling, section)
        settings[section] = next(name for name, cls in classes.items() if cls is type(value))
        for name, setting in workdirs.identifying_settings(section, value).items():
            if name != "workdir":
                settings[f"{section}.{name}"] = setting
    return settings


def _describe(text: str) -> str:
    return text if len(text) <= 40 else hashlib.sha256(text.encode()).hexdigest()[:12]
