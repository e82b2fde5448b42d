"""A request for samples, checked: what is drawn, with which networks, and what it is known by."""

import dataclasses
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from diffit_jax.data.labels import give_out, parse_labels
from diffit_jax.errors import UserError
from diffit_jax.experiment.config import Experiment
from diffit_jax.experiment.sections import CHOICES, Sampling
from diffit_jax.interop import official
from diffit_jax.run import power_ema
from diffit_jax.run import workdir as workdirs
from diffit_jax.run.state import Opened, TrainState, items_of, open_experiment
from diffit_jax.runtime import backend, checkpoint, config_files, distributed, files, hub, parallel
from diffit_jax.runtime.console import Progress
from diffit_jax.runtime.ranges import first_few, in_short
from diffit_jax.sampling.decoder import Decoder, Decoding
from diffit_jax.sampling.sampler import Sampler, Variables, default_labels

_LONGEST_NAME = 160


def default_name(kind: str, shape: Sequence[int], differences: Mapping[str, Any]) -> str:
    """ADM's name `<kind>_NxHxWxC.npz`, with what differs from the default request:
    `samples_4x8x8x1-seeds=4-7,sampler=ddim.npz`.

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
    """A network in a work directory: the averaged parameters of its newest usable checkpoint, or an
    average of another length."""

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
        """Reads the run's config.

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
        self._ema_length, self._checkpoint = ema_length, checkpoint
        self._allow_nonfinite, self._raw = allow_nonfinite, raw
        asked = {"ema_length": ema_length, "checkpoint": checkpoint, "raw": raw or None}
        self.differences = {name: value for name, value in asked.items() if value is not None}

    def load(self, opened: Opened) -> tuple[Variables, dict[str, Any]]:
        """(variables, where they are from). Raises `UserError` if there is no usable checkpoint."""
        if self._ema_length is None:
            step, variables = restore_variables(
                self.directory, opened.state, self._checkpoint, self._allow_nonfinite, self._raw
            )
        else:
            lengths = opened.experiment.ema.power_lengths
            step, variables = reconstruct_variables(
                self.directory, opened.state, lengths, self._ema_length, self._checkpoint
            )
        bad = [] if self._allow_nonfinite else checkpoint.not_finite(variables)
        if bad:
            raise UserError(
                f"the averages of {self.name} at step {step} are not finite ({first_few(bad)}): "
                "sample an older one by --checkpoint, or say --allow_nonfinite"
            )
        return variables, self.origin(step)

    def origin(self, step: int) -> dict[str, Any]:
        """Where weights of a step are from, JSON values by name."""
        of = {"workdir": str(self.directory), "checkpoint": step, "ema_length": self._ema_length}
        return of | ({"raw": True} if self._raw else {})


class Weights:
    """A network in a file of released weights, sampled as a config says whose `model` takes the
    file's sizes."""

    config_file = None
    differences: Mapping[str, Any] = {}

    def __init__(
        self, path: epath.PathLike, config: Mapping[str, Any], allow_nonfinite: bool = False
    ):
        """Reads the names and shapes of the tensors; `allow_nonfinite`: whether they may have NaNs
        or infinities."""
        self._path, self._allow_nonfinite = hub.local(path, "weights"), allow_nonfinite
        self.name = f"weights {self._path}"
        self.directory = hub.beside(path, self._path)
        self.config = official.fit_config(config, self._path)

    def load(self, opened: Opened) -> tuple[Variables, dict[str, Any]]:
        """(variables, where they are from)."""
        shardings = jax.tree.map(lambda leaf: leaf.sharding, opened.state.ema_variables)
        _, variables = official.load(
            self._path, sharding=shardings, allow_nonfinite=self._allow_nonfinite
        )
        return variables, {"weights": str(self._path)}


def restore_variables(
    workdir: epath.PathLike,
    state: TrainState,
    step: int | None = None,
    allow_nonfinite: bool = False,
    raw: bool = False,
) -> tuple[int, Variables]:
    """Step and variables (averaged parameters, constants) of the newest usable checkpoint in a work
    directory.

    Args:
      workdir: of the run.
      state: shapes and shardings of its state.
      step: of a checkpoint that is wanted instead.
      allow_nonfinite: whether one with NaNs or infinities is usable.
      raw: whether the parameters themselves are wanted (for which all of the state is read).

    Raises:
      UserError: there is none.
    """
    items = items_of(state)
    wanted = {"constants": items.get("constants", state.constants)}
    wanted |= {"state": items["state"]} if raw else {"ema": items["ema"]}
    step, items = _restore_items(workdir, wanted, step, allow_nonfinite)
    params = items["state"]["params"] if raw else items["ema"]
    return step, {"params": params, "constants": items["constants"]}


def _restore_items(
    workdir: epath.PathLike,
    shapes: dict[str, Any],
    step: int | None = None,
    allow_nonfinite: bool = False,
) -> tuple[int, dict[str, Any]]:
    """Items of the newest usable checkpoint by name; one without arrays is not in a checkpoint, and
    comes back as it is."""
    checkpoints = checkpoint.Checkpoints(epath.Path(workdir) / workdirs.CHECKPOINTS)
    restored = checkpoints.restore(
        {name: tree for name, tree in shapes.items() if tree}, step, allow_nonfinite
    )
    if restored is None:
        raise UserError(f"workdir {workdir} holds no checkpoint: train first")
    step, items = restored
    return step, shapes | items


def reconstruct_variables(
    workdir: epath.PathLike,
    state: TrainState,
    lengths: Sequence[float],
    length: float,
    until: int | None = None,
) -> tuple[int, Variables]:
    """Step of the newest snapshot of a run, and its network's variables with averages of a length
    of choice.

    Args:
      workdir: of the run.
      state: shapes and shardings of its state.
      lengths: of the averages that it keeps snapshots of (`ema.power_lengths`).
      length: that is wanted.
      until: step of the snapshot at which the average shall end instead.

    Raises:
      UserError: the run keeps no snapshots, one cannot be read, or an impossible length.
    """
    snapshots = checkpoint.Checkpoints(epath.Path(workdir) / workdirs.SNAPSHOTS)
    steps = snapshots.steps()
    if not steps:
        raise UserError(
            f"workdir {workdir} has no snapshots of averages: train with ema.power_lengths, or "
            "leave out --ema_length"
        )
    if until is not None:
        if until not in steps:
            raise UserError(
                f"there is no snapshot {until} in {snapshots.directory}: use "
                f"{', '.join(map(str, steps))}"
            )
        steps = [step for step in steps if step <= until]
    for step in steps:
        if "updates" not in snapshots.facts(step):
            raise UserError(
                f"snapshot {step} in {snapshots.directory} is damaged: move it away, or leave out "
                "--ema_length"
            )
    times = [snapshots.facts(step)["updates"] for step in steps for _ in lengths]
    factors = power_ema.reconstruction(
        times, list(lengths) * len(steps), times[-1], length
    ).reshape(len(steps), len(lengths))
    items = {"power_emas": {str(index): shapes for index, shapes in enumerate(state.power_emas)}}
    params = None
    with Progress(
        "reconstruct", len(steps), unit="snapshot", shown=distributed.is_first()
    ) as progress:
        for step, row in zip(steps, factors, strict=True):
            averages = snapshots.restore_step(step, items)["power_emas"]
            for index, factor in enumerate(row):
                params = power_ema.add_scaled(params, averages[str(index)], factor)
            progress.advance()
    _, items = _restore_items(workdir, {"constants": state.constants}, allow_nonfinite=True)
    return steps[-1], {"params": params, "constants": items["constants"]}


def open_weaker(experiment: Experiment, workdir: str) -> tuple[Run, Opened]:
    """The run of the weaker network of autoguidance, which must take and give what the main one
    does.

    Raises:
      UserError: it does not, or there is no run.
    """
    if not workdir:
        raise UserError(
            "autoguidance needs a second, weaker network: name its run by --guidance.workdir, or "
            "choose another guidance"
        )
    run = Run(workdir)
    weaker = open_experiment(run.config, to_train=False, config_file=run.config_file)
    ours, theirs = (
        (one.process, one.model.sample_shape, one.model.num_classes)
        for one in (experiment, weaker.experiment)
    )
    if ours != theirs:
        raise UserError(
            f"guidance.workdir {workdir} differs in process, shape or number of classes: name a "
            "run like the main one"
        )
    return run, weaker


def config_for_weights(
    config: ConfigDict | None, weights: str, input_size: int | None = None
) -> dict[str, Any]:
    """The config that released weights are used with: the one given, or that of their size in
    `configs/`.

    Args:
      config: as it is given, None if it is not.
      weights: file of weights.
      input_size: side of the latents, if not that of the file.
    """
    if config is not None:
        return config.to_dict()
    size = official.read_input_size(weights) if input_size is None else input_size
    name = "imagenet256_latent" if size <= 32 else "imagenet512_latent"
    return config_files.load(str(config_files.own(f"{name}.py", "--config"))).to_dict()


class Networks(NamedTuple):
    """What samples are drawn with.

    Attributes:
      variables: of the network.
      weaker: of the second network of autoguidance, or None.
      origin: where they are from, JSON values by name.
    """

    variables: Variables
    weaker: Variables | None
    origin: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Drawing:
    """How the samples of a network are drawn, as a request says it.

    Attributes:
      labels: one for each sample, or text as `labels.parse_labels` reads it; None: seed modulo
        classes.
      overrides: settings of sampling by key, in place of the config's.
      decoding: by which autoencoder latents become pictures, or None.
    """

    labels: Sequence[int] | str | None = None
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    decoding: Decoding | None = None


@dataclasses.dataclass(frozen=True)
class Asked:
    """What is asked for, checked.

    Attributes:
      source: of the network.
      opened: the source's experiment on a mesh.
      experiment: the same, sampled as asked for.
      seeds, labels: (N,) int64.
      words: the labels for people; None: the default ones.
      sampler: that draws.
      weaker: run of the second network of autoguidance, and its experiment.
      decoder: from latents to pictures, or None.
      scale: of the guidance, where the sampler has another one, see `Sampler.draw_batch`.
    """

    source: Run | Weights
    opened: Opened
    experiment: Experiment
    seeds: np.ndarray
    labels: np.ndarray
    words: str | None
    sampler: Sampler
    weaker: tuple[Run, Opened] | None
    decoder: Decoder | None
    scale: float | None = None

    @classmethod
    def make(
        cls,
        source: Run | Weights,
        *,
        seeds: Sequence[int],
        drawing: Drawing = Drawing(),
        opened: Opened | None = None,
    ) -> "Asked":
        """Checks a request; arguments and errors as of `sample`. `opened`: the source's experiment,
        if it is open already."""
        opened = opened or open_experiment(
            source.config, to_train=False, config_file=source.config_file
        )
        usual, model = opened.experiment.sampling, opened.experiment.model

        # --- Seeds, labels, settings.
        if len(seeds) == 0 or min(seeds) < 0 or max(seeds) >= 2**32:
            raise UserError("seeds must be at least one whole number in [0, 2^32): change --seeds")
        label_of = _labels(drawing.labels, seeds, model.num_classes, source.name)
        sampling = usual.overridden(drawing.overrides)
        if sampling.guidance.needs_labels and not model.num_classes:
            raise UserError(
                f"the model in {source.name} is unconditional: leave out --guidance.scale"
            )
        experiment = opened.experiment.with_sampling(sampling)
        weaker = None
        if sampling.guidance.needs_weaker:
            weaker = open_weaker(experiment, getattr(sampling.guidance, "workdir", ""))
        words = None
        if not np.array_equal(label_of, default_labels(seeds, model.num_classes)):
            text = drawing.labels
            words = text if isinstance(text, str) else in_short(label_of.tolist())

        # --- The sampler, on devices that hold the right rows, and the decoder behind it.
        weaker_model = weaker[1].experiment.model if weaker else None
        sampler = Sampler(experiment, opened.mesh, len(seeds), weaker_model)
        parallel.prove_rows(opened.mesh, sampler.batch_size)
        decoder = None
        if drawing.decoding is not None:
            decoder = drawing.decoding.open(
                opened.mesh, sampler.batch_size, sampling.pixel_rounding
            )
            space = experiment.space.decoded(decoder, model.sample_shape)
            experiment = dataclasses.replace(experiment, space=space)
        numbers = np.asarray(seeds, np.int64)
        return cls(source, opened, experiment, numbers, label_of, words, sampler, weaker, decoder)

    @property
    def shape(self) -> tuple[int, ...]:
        """(H, W, C) of a sample as it is written."""
        return self.experiment.space.shape(self.experiment.model.sample_shape)

    def with_scale(self, scale: float) -> "Asked":
        """The same with another scale of the guidance, drawn by the same compiled function."""
        sampling = self.experiment.sampling
        guidance = dataclasses.replace(sampling.guidance, scale=scale)
        sampling = dataclasses.replace(sampling, guidance=guidance)
        experiment = dataclasses.replace(self.experiment, sampling=sampling)
        return dataclasses.replace(self, experiment=experiment, scale=scale)

    def output(self, path: epath.PathLike | None) -> epath.Path:
        """Where the samples go: a path that was asked for, or the one that the request names.

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
        """The networks, on the mesh.

        Raises:
          UserError: there is no checkpoint, or weights that cannot be read or are not finite.
        """
        return self.beside(*self.source.load(self.opened))

    def beside(self, variables: Variables, origin: dict[str, Any]) -> Networks:
        """The network of these variables, which are from there, and what is needed beside it."""
        weaker, origin = None, dict(origin)
        if self.weaker:
            weaker, weaker_origin = self.weaker[0].load(self.weaker[1])
            origin |= {f"weaker {name}": value for name, value in weaker_origin.items()}
        if self.decoder:
            origin |= {"autoencoder": str(self.decoder.path)}
        return Networks(variables, weaker, origin)

    def identity(self, networks: Networks) -> dict[str, Any]:
        """JSON values by name of all that the samples depend on: not how many are drawn at once,
        nor where the networks lie."""
        weaker_network = None
        if self.weaker and networks.weaker is not None:
            weaker_network = _network(self.weaker[1].experiment, networks.weaker)
        return {
            "network": _network(self.experiment, networks.variables),
            "weaker network": weaker_network,
            "autoencoder": self.decoder.identity() if self.decoder else None,
            "seeds": _digest(self.seeds),
            "labels": _digest(self.labels),
            "matmul_precision": backend.matmul_precision(),
            **self.settings(),
        }

    def settings(self) -> dict[str, Any]:
        """The settings of sampling that samples depend on, JSON values by name."""
        sampling = self.experiment.sampling
        return {f"sampling.{name}": value for name, value in _makes_samples(sampling).items()}

    def draw(self, networks: Networks, batch: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A batch of the samples, as they are written to files, and which of them are finite.

        Args:
          networks: from `load`.
          batch: (n,) places among the seeds, n at most the sampler's batch.
        """
        seeds, labels = self.seeds[batch], self.labels[batch]
        drawn = self.sampler.draw_batch(
            networks.variables, seeds, labels, networks.weaker, self.scale
        )
        finite = np.asarray(np.isfinite(drawn).reshape(len(drawn), -1).all(axis=1))
        space = self.experiment.space
        return space.leave(drawn), finite

    def _differences(self) -> Iterator[tuple[str, Any]]:
        """What of the request differs from the default one, in words."""
        usual, sampling = self.opened.experiment.sampling, self.experiment.sampling
        seeds = self.seeds.tolist()
        if seeds != list(range(len(seeds))):
            yield "seeds", _in_words(in_short(seeds))
        if self.words is not None:
            yield "labels", _in_words(self.words)
        ours, theirs = _makes_samples(sampling), _makes_samples(usual)
        for name, value in ours.items():
            if value != "" and value != theirs.get(name):
                yield name, value
        place = getattr(sampling.guidance, "workdir", "")
        if place != getattr(usual.guidance, "workdir", ""):
            yield "guidance.workdir", epath.Path(place).name
        if self.decoder and self.decoder.path.stem != self.opened.experiment.data.autoencoder:
            yield "vae", self.decoder.path.stem
        if self.decoder and self.decoder.dtype != "float32":
            yield "vae_dtype", self.decoder.dtype
        if backend.matmul_precision() != "default":
            yield "matmul_precision", backend.matmul_precision()


def _labels(
    asked: Sequence[int] | str | None, seeds: Sequence[int], num_classes: int, name: str
) -> np.ndarray:
    """The label of each seed, (N,) int64."""
    if asked is None:
        return default_labels(seeds, num_classes)
    if not num_classes:
        raise UserError(f"the model in {name} is unconditional: leave out --labels")
    if isinstance(asked, str):
        return parse_labels(asked, seeds, num_classes)
    return give_out(asked, len(seeds), num_classes)


def _network(experiment: Experiment, variables: Variables) -> dict[str, Any]:
    """What makes a network's samples beside the settings: what its arrays hold, and what is
    computed with them."""
    return {
        "contents": checkpoint.fingerprint(variables),
        "model": workdirs.number_settings("model", experiment.model),
        "process": workdirs.number_settings("process", experiment.process),
    }


def _makes_samples(sampling: Sampling) -> dict[str, Any]:
    """Settings that samples depend on, by the names of their flags."""
    settings: dict[str, Any] = {"pixel_rounding": sampling.pixel_rounding}
    for section, classes in CHOICES.items():
        value = getattr(sampling, section)
        settings[section] = next(name for name, cls in classes.items() if cls is type(value))
        for name, setting in dataclasses.asdict(value).items():
            if name != "workdir":
                settings[f"{section}.{name}"] = setting
    return settings


def _in_words(text: str) -> str:
    return text if len(text) <= 40 else hashlib.sha256(text.encode()).hexdigest()[:12]
