"""The evaluations of a run while it trains, as its section `evaluation` asks for them."""

import dataclasses
import json
import logging
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from diffit_jax.errors import UserError
from diffit_jax.evaluation.evaluator import Comparison, Evaluator
from diffit_jax.evaluation.features import Networks
from diffit_jax.evaluation.images import DatasetImages, DrawnImages
from diffit_jax.evaluation.make_reference import make_reference
from diffit_jax.experiment.config import Experiment
from diffit_jax.interop import dinov2, inception
from diffit_jax.run import workdir as workdirs
from diffit_jax.run.state import Setup, TrainState, open_training_data
from diffit_jax.runtime import backend, distributed, files, hub, npz
from diffit_jax.sampling.decoder import Decoding, LatentDecoder
from diffit_jax.sampling.request import Run, SampleRequest, SamplingOptions
from diffit_jax.sampling.sampler import batch_size, default_labels

log = logging.getLogger(__name__)

_FEW = 5_000  # images of a reference, below which a FID compares with no other
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
    """Yield all averages of a state, and its parameters themselves if `raw`."""

    def variables(params: Any) -> dict[str, Any]:
        return {"params": params, "constants": state.constants}

    yield Kind("ema", variables(state.ema))
    for length, params in zip(experiment.ema.power_lengths, state.power_emas, strict=True):
        yield Kind(f"ema_{length:g}", variables(params), ema_length=length)
    if raw:
        yield Kind("raw", variables(state.params), raw=True)


class EvaluationResult(NamedTuple):
    """An evaluation.

    Attributes:
      step: after which it was.
      seconds: that it took since it began, or was resumed.
      weights: of each kind by name what `Evaluator.run` found.
      images: of each kind by name, (n, H, W, C) uint8.
    """

    step: int
    seconds: float
    weights: dict[str, dict[str, Any]]
    images: dict[str, np.ndarray]

    @property
    def values(self) -> dict[str, float]:
        """Figures by name, `fid/ema` for instance."""
        return {
            f"{metric}/{name}": value
            for name, scores in self.weights.items()
            for metric, value in scores["metrics"].items()
        }

    def describe(self) -> str:
        """Describe the result for the log: each metric with the kinds of weights."""
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
    """Evaluates weights while they are trained, as the verb `evaluate` would.

    The request for samples and the evaluator are the verb's. Results are in
    `evaluations/STEP.json`.

    Attributes:
      decoder: from latents to images, or None.
      space: of the experiment; its samples are images if there is a decoder.
    """

    def __init__(self, setup: Setup, config: Mapping[str, Any], workdir: epath.Path):
        """Open and check everything that evaluations need.

        Args:
          setup: the experiment.
          config: of it, as it is in the work directory.
          workdir: of the run.

        Raises:
          UserError: a reference, FID network or autoencoder that cannot be read or does not fit the
            samples.
        """
        self._setup, self._config, self._workdir = setup, config, workdir
        settings = self._settings = setup.experiment.evaluation
        self._folder = workdir / workdirs.EVALUATIONS
        self.decoder: LatentDecoder | None = None
        self.space = setup.experiment.space
        self._asked: dict[int, SampleRequest] = {}
        self._evaluator: Evaluator | None = None
        try:
            if settings.vae and not settings.measures:
                self.decoder = self._decoding().open(
                    setup.mesh,
                    batch_size(setup.experiment, setup.mesh),
                    setup.experiment.sampling.pixel_rounding,
                )
            if settings.measures:
                self.decoder = self._ask(settings.count).decoder
                self._held_out = None if settings.reference else self._open_held_out()
                if settings.reference:
                    self._evaluator = self._open_evaluator(settings.reference)
                else:  # it is made at the first evaluation: until then nothing is written
                    for key, word in (("inception", inception.RANDOM), ("dinov2", dinov2.DIGITS)):
                        path = getattr(settings, key)
                        if path and path != word:
                            hub.local(path, f"evaluation.{key}", dinov2.FILES)
            if self.decoder:
                shape = setup.experiment.model.sample_shape
                self.space = setup.experiment.space.decoded(self.decoder, shape)
        except UserError as error:
            raise UserError(f"config section evaluation: {error}") from error

    def due(self, step: int) -> bool:
        """Whether there is an evaluation after this step."""
        last = step == self._setup.experiment.training.total_steps
        steps = self._settings.steps
        return self._settings.measures and (last or (steps > 0 and step % steps == 0))

    def _open_held_out(self) -> DatasetImages:
        """Open the images of the test split, which samples are compared with."""
        data = self._setup.experiment.data
        try:
            source = distributed.primary_first(
                lambda: open_training_data(self._setup.experiment, "test")
            )
        except UserError as error:
            raise UserError(
                f"reference is missing, and there is no test split to make one of ({error}): name "
                "an npz file of statistics, or prepare the data with --holdout"
            ) from error
        if len(source) < _FEW:
            log.info(
                "FID is measured against %d held-out images: of so few it is too high, and "
                "compares weights of this run only",
                len(source),
            )
        return DatasetImages(source, f"data set {data.name}, test")

    def _open_evaluator(self, reference: epath.PathLike) -> Evaluator:
        settings = self._settings
        comparison = Comparison(
            reference,
            settings.inception,
            settings.metrics or None,
            batch_per_device=settings.batch_per_device,
            dinov2=settings.dinov2,
            dinov2_resize=settings.dinov2_resize,
        )
        return Evaluator.open(comparison, self._ask(settings.count).shape, self._setup.mesh)

    def _compare(self) -> Evaluator:
        """Return the evaluator; make the reference first if none is named."""
        if self._evaluator is None:
            assert self._held_out is not None
            path, settings = self._workdir / workdirs.REFERENCE, self._settings
            if not distributed.broadcast_flag(path.exists() and self._serves(path)):
                make_reference(
                    self._held_out,
                    output=path,
                    networks=Networks(
                        settings.inception,
                        dinov2=settings.dinov2,
                        dinov2_resize=settings.dinov2_resize,
                    ),
                    batch_per_device=settings.batch_per_device,
                    overwrite=True,
                )
            self._evaluator = self._open_evaluator(path)
        return self._evaluator

    def _serves(self, path: epath.Path) -> bool:
        """Whether the reference in the work directory is of the networks that are asked for now."""
        settings = self._settings
        try:
            there = npz.names(path)
            said = json.loads(str(npz.read(path, "protocol"))) if "protocol" in there else {}
        except (OSError, *npz.DAMAGED):
            return False
        of_dinov2 = said.get("dinov2", {}).get("resize")
        return (not settings.inception or "mu" in there) and (
            not settings.dinov2 or ("mu_dinov2" in there and of_dinov2 == settings.dinov2_resize)
        )

    def done(self, step: int) -> bool:
        """Whether that of a step is in the work directory."""
        return distributed.broadcast_flag(self._file(step).exists())

    def run(self, step: int, state: TrainState) -> EvaluationResult:
        """Evaluate the weights of a step.

        Interrupted, it resumes when it is called again, in another process too. Weights whose
        samples cannot be measured are left out, with a warning.

        Raises:
          interruption.Preempted, interruption.Interrupted: the measured part is kept.
        """
        settings, started = self._settings, time.monotonic()
        last = step == self._setup.experiment.training.total_steps
        count = (last and settings.final_count) or settings.count
        distributed.primary_first(
            lambda: files.make_directory(self._folder, "workdir"), lambda: self._folder
        )
        found, images = {}, {}
        every = list(kinds(self._setup.experiment, state, settings.raw))
        for number, kind in enumerate(every):
            left = settings.max_minutes * 60 - (time.monotonic() - started)
            time_limit = max(left, 1e-3) / (len(every) - number) if settings.max_minutes else 0.0
            try:
                images[kind.name], found[kind.name] = self._measured(kind, count, step, time_limit)
            except UserError as error:  # such as samples that are not finite: training goes on
                log.warning("step %d: %s weights are not evaluated: %s", step, kind.name, error)
        return EvaluationResult(step, time.monotonic() - started, found, images)

    @backend.explain_oom("lower evaluation.batch_per_device, or sampling.batch_per_device")
    def _measured(
        self, kind: Kind, count: int, step: int, max_seconds: float
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Measure samples of weights; return some images, and the result of `Evaluator.run`."""
        evaluator = self._compare()
        drawn = self._drawn(kind, count, step)
        shown = next(drawn.batches(min(SHOWN, count, self._ask(count).sampler.batch_size)))
        place, what = self._partial_path(step, kind.name), f"evaluate {kind.name}"
        return shown, evaluator.run(drawn, place, what=what, max_seconds=max_seconds, keep=True)

    def finish(self, found: EvaluationResult) -> None:
        """Write the results."""
        metadata = {
            "step": found.step,
            "seconds": round(found.seconds, 3),
            "weights": found.weights,
        }

        def write() -> None:
            files.write_json(self._file(found.step), metadata)
            for name in found.weights:
                self._partial_path(found.step, name).unlink(missing_ok=True)

        distributed.on_primary(write)

    def _partial_path(self, step: int, name: str) -> epath.Path:
        """Return the file that keeps a measurement of weights until all are measured."""
        return self._folder / f"{step:08d}.{name}.begun.npz"

    def _file(self, step: int) -> epath.Path:
        return self._folder / f"{step:08d}.json"

    def _decoding(self) -> Decoding:
        return Decoding(self._settings.vae, self._settings.vae_dtype)

    def _ask(self, count: int) -> SampleRequest:
        """Return the verb's request for so many samples; equal batch sizes share a sampler."""
        for request in self._asked.values():
            size = batch_size(request.experiment, self._setup.mesh, count)
            if count not in self._asked and size == request.sampler.batch_size:
                seeds = np.arange(count)
                labels = default_labels(seeds, request.experiment.model.num_classes)
                self._asked[count] = dataclasses.replace(request, seeds=seeds, labels=labels)
                break
        if count not in self._asked:
            run = Run(self._workdir, config=self._config)
            decoding = self._decoding() if self._settings.vae else None
            self._asked[count] = SampleRequest.make(
                run,
                seeds=range(count),
                options=SamplingOptions(decoding=decoding),
                setup=self._setup,
            )
        return self._asked[count]

    def _drawn(self, kind: Kind, count: int, step: int) -> DrawnImages:
        source = Run(self._workdir, ema_length=kind.ema_length, raw=kind.raw, config=self._config)
        request = dataclasses.replace(self._ask(count), source=source)
        return DrawnImages(request, request.bundle(kind.variables, source.origin(step)))
