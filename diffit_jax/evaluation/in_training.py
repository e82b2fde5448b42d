"""The evaluations of a run while it trains, as its section `evaluation` asks for them."""

import dataclasses
import logging
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from diffit_jax.errors import UserError
from diffit_jax.evaluation.evaluator import Comparison, Evaluator
from diffit_jax.evaluation.pictures import DrawnPictures
from diffit_jax.experiment.config import Experiment
from diffit_jax.run import workdir as workdirs
from diffit_jax.run.state import Opened, TrainState
from diffit_jax.runtime import backend, distributed, files
from diffit_jax.sampling.decoder import Decoder, Decoding
from diffit_jax.sampling.request import Asked, Drawing, Run
from diffit_jax.sampling.sampler import batch_size, default_labels

log = logging.getLogger(__name__)

SHOWN = 64  # samples of each kind of weights in TensorBoard, at most a batch


class Kind(NamedTuple):
    """Weights that a run has at a step.

    Attributes:
      name: "ema", "raw", or an average and its length, as "ema_0.05".
      variables: of the network.
      ema_length, raw: how the verbs are asked for them.
    """

    name: str
    variables: dict[str, Any]
    ema_length: float | None = None
    raw: bool = False


def kinds(experiment: Experiment, state: TrainState, raw: bool = True) -> Iterator[Kind]:
    """All averages of a state, and its parameters themselves if `raw`."""

    def variables(params: Any) -> dict[str, Any]:
        return {"params": params, "constants": state.constants}

    yield Kind("ema", variables(state.ema))
    for length, params in zip(experiment.ema.power_lengths, state.power_emas, strict=True):
        yield Kind(f"ema_{length:g}", variables(params), ema_length=length)
    if raw:
        yield Kind("raw", variables(state.params), raw=True)


class Evaluated(NamedTuple):
    """An evaluation.

    Attributes:
      step: after which it was.
      seconds: that it took since it was begun, or gone on with.
      weights: of each kind by name what `Evaluator.run` found.
      pictures: of each kind by name, (n, H, W, C) uint8.
    """

    step: int
    seconds: float
    weights: dict[str, dict[str, Any]]
    pictures: dict[str, np.ndarray]

    @property
    def values(self) -> dict[str, float]:
        """Figures by name, `fid/ema` for instance."""
        return {
            f"{metric}/{name}": value
            for name, scores in self.weights.items()
            for metric, value in scores["metrics"].items()
        }

    def in_words(self) -> str:
        """For people: each metric with the kinds of weights."""
        if not self.weights:
            return "nothing was evaluated"
        metrics = next(iter(self.weights.values()))["metrics"]
        return ", ".join(
            f"{metric} "
            + " ".join(
                f"{scores['metrics'][metric]:.4g} ({name})" for name, scores in self.weights.items()
            )
            for metric in metrics
        )


class InTraining:
    """Evaluates weights while they are trained: with the verb's request for samples, its evaluator,
    and so its figures. What is found lies in `evaluations/STEP.json`.

    Attributes:
      decoder: from latents to pictures, or None.
      space: of the experiment, whose samples leave it as pictures if there is a decoder.
    """

    def __init__(self, opened: Opened, config: Mapping[str, Any], workdir: epath.Path):
        """Opens everything that evaluations need, and checks it.

        Args:
          opened: the experiment.
          config: of it, as it is in the work directory.
          workdir: of the run.

        Raises:
          UserError: a reference, FID network or autoencoder that cannot be read or does not fit the
            samples.
        """
        self._opened, self._config, self._workdir = opened, config, workdir
        settings = self._settings = opened.experiment.evaluation
        self._folder = workdir / workdirs.EVALUATIONS
        self.decoder: Decoder | None = None
        self.space = opened.experiment.space
        self._asked: dict[int, Asked] = {}
        self._evaluator: Evaluator | None = None
        try:
            if settings.vae and not settings.steps:
                self.decoder = self._decoding().open(
                    opened.mesh,
                    batch_size(opened.experiment, opened.mesh),
                    opened.experiment.sampling.pixel_rounding,
                )
            if settings.steps:
                asked = self._ask(settings.count)
                self.decoder = asked.decoder
                comparison = Comparison(
                    settings.reference,
                    settings.inception,
                    settings.metrics or None,
                    batch_per_device=settings.batch_per_device,
                )
                self._evaluator = Evaluator.open(comparison, asked.shape, opened.mesh)
            if self.decoder:
                shape = opened.experiment.model.sample_shape
                self.space = opened.experiment.space.decoded(self.decoder, shape)
        except UserError as error:
            raise UserError(f"config section evaluation: {error}") from error

    def due(self, step: int) -> bool:
        """Whether there is an evaluation after this step."""
        last = step == self._opened.experiment.training.total_steps
        return bool(self._settings.steps) and (step % self._settings.steps == 0 or last)

    def done(self, step: int) -> bool:
        """Whether that of a step lies in the work directory."""
        return distributed.agreed(self._file(step).exists())

    def run(self, step: int, state: TrainState) -> Evaluated:
        """Evaluates the weights of a step. Interrupted, it goes on where it was when it is called
        again, in another process too. Weights whose samples cannot be measured are left out, with a
        warning.

        Raises:
          interruption.Preempted, interruption.Interrupted: what is measured is kept.
        """
        settings, started = self._settings, time.monotonic()
        last = step == self._opened.experiment.training.total_steps
        count = (last and settings.final_count) or settings.count
        distributed.first_then_all(
            lambda: files.make_directory(self._folder, "workdir"), lambda: self._folder
        )
        found, pictures = {}, {}
        every = list(kinds(self._opened.experiment, state, settings.raw))
        for number, kind in enumerate(every):
            left = settings.max_minutes * 60 - (time.monotonic() - started)
            share = max(left, 1e-3) / (len(every) - number) if settings.max_minutes else 0.0
            try:
                pictures[kind.name], found[kind.name] = self._measured(kind, count, step, share)
            except UserError as error:  # such as samples that are not finite: training goes on
                log.warning("step %d: %s weights are not evaluated: %s", step, kind.name, error)
        return Evaluated(step, time.monotonic() - started, found, pictures)

    @backend.memory_for("lower evaluation.batch_per_device, or sampling.batch_per_device")
    def _measured(
        self, kind: Kind, count: int, step: int, max_seconds: float
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Some pictures, and what `Evaluator.run` finds."""
        assert self._evaluator is not None
        drawn = self._drawn(kind, count, step)
        shown = next(drawn.batches(min(SHOWN, count, self._ask(count).sampler.batch_size)))
        place, what = self._begun(step, kind.name), f"evaluate {kind.name}"
        return shown, self._evaluator.run(
            drawn, place, what=what, max_seconds=max_seconds, keep=True
        )

    def finish(self, found: Evaluated) -> None:
        """Writes what was found."""
        facts = {"step": found.step, "seconds": round(found.seconds, 3), "weights": found.weights}

        def write() -> None:
            files.write_json(self._file(found.step), facts)
            for name in found.weights:
                self._begun(found.step, name).unlink(missing_ok=True)

        distributed.on_primary(write)

    def _begun(self, step: int, name: str) -> epath.Path:
        """What is measured of weights, until all are."""
        return self._folder / f"{step:08d}.{name}.begun.npz"

    def _file(self, step: int) -> epath.Path:
        return self._folder / f"{step:08d}.json"

    def _decoding(self) -> Decoding:
        return Decoding(self._settings.vae, self._settings.vae_dtype)

    def _ask(self, count: int) -> Asked:
        """The verb's request for so many samples; one sampler serves all of its batch size."""
        for asked in self._asked.values():
            size = batch_size(asked.experiment, self._opened.mesh, count)
            if count not in self._asked and size == asked.sampler.batch_size:
                seeds = np.arange(count)
                labels = default_labels(seeds, asked.experiment.model.num_classes)
                self._asked[count] = dataclasses.replace(asked, seeds=seeds, labels=labels)
                break
        if count not in self._asked:
            run = Run(self._workdir, config=self._config)
            decoding = self._decoding() if self._settings.vae else None
            self._asked[count] = Asked.make(
                run, seeds=range(count), drawing=Drawing(decoding=decoding), opened=self._opened
            )
        return self._asked[count]

    def _drawn(self, kind: Kind, count: int, step: int) -> DrawnPictures:
        source = Run(self._workdir, ema_length=kind.ema_length, raw=kind.raw, config=self._config)
        asked = dataclasses.replace(self._ask(count), source=source)
        return DrawnPictures(asked, asked.beside(kind.variables, source.origin(step)))
