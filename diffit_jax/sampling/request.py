"""A request for samples, checked: what is drawn, with which networks, and what it is known by."""

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from diffit_jax import workdir as workdirs
from diffit_jax.data.labels import give_out, parse_labels
from diffit_jax.errors import UserError
from diffit_jax.experiment import Experiment
from diffit_jax.runtime import backend, contents, files, rows
from diffit_jax.runtime.ranges import in_short
from diffit_jax.sampling.decoder import Decoder, Decoding
from diffit_jax.sampling.files import default_name
from diffit_jax.sampling.networks import Run, Weights, open_weaker
from diffit_jax.sampling.sampler import Sampler, Variables, default_labels
from diffit_jax.sections import CHOICES, Sampling
from diffit_jax.training.compiling import Opened, open_experiment


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
        labels: Sequence[int] | str | None,
        overrides: Mapping[str, Any],
        decoding: Decoding | None = None,
        opened: Opened | None = None,
    ) -> "Asked":
        """Checks a request; arguments and errors as of `verbs.sample`. `opened`: the source's
        experiment, if it is open already."""
        opened = opened or open_experiment(
            source.config, to_train=False, config_file=source.config_file
        )
        usual, model = opened.experiment.sampling, opened.experiment.model

        # --- Seeds, labels, settings.
        if len(seeds) == 0 or min(seeds) < 0 or max(seeds) >= 2**32:
            raise UserError("seeds must be at least one whole number in [0, 2^32): change --seeds")
        label_of = _labels(labels, seeds, model.num_classes, source.name)
        sampling = usual.overridden(overrides)
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
            words = labels if isinstance(labels, str) else in_short(label_of.tolist())

        # --- The sampler, on devices that hold the right rows, and the decoder behind it.
        weaker_model = weaker[1].experiment.model if weaker else None
        sampler = Sampler(experiment, opened.mesh, len(seeds), weaker_model)
        rows.prove_rows(opened.mesh, sampler.batch_size)
        decoder = None
        if decoding is not None:
            decoder = decoding.open(opened.mesh, sampler.batch_size, sampling.pixel_rounding)
            space = experiment.space.decoded(decoder, model.sample_shape)
            experiment = dataclasses.replace(experiment, space=space)
        numbers = np.asarray(seeds, np.int64)
        return cls(source, opened, experiment, numbers, label_of, words, sampler, weaker, decoder)

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
            space, shape = self.experiment.space, self.experiment.model.sample_shape
            name = default_name(
                space.samples,
                (len(self.seeds), *space.shape(shape)),
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
        "contents": contents.fingerprint(variables),
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


def _digest(numbers: np.ndarray) -> str:
    return f"{len(numbers)} numbers, {hashlib.sha256(numbers.tobytes()).hexdigest()[:16]}"
