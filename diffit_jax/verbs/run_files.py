"""What a run looks at, and leaves in its work directory, while it goes on."""

import logging
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from diffit_jax import workdir as workdirs
from diffit_jax.data import pixels
from diffit_jax.errors import OutOfMemory
from diffit_jax.evaluation.in_training import InTraining, kinds
from diffit_jax.runtime import backend, distributed, files, interruption
from diffit_jax.runtime.checkpoint import Checkpoints
from diffit_jax.sampling.sampler import Sampler, default_labels, sampler_without_autoguidance
from diffit_jax.training.compiling import Opened
from diffit_jax.training.held_out import HeldOutLoss, open_held_out
from diffit_jax.training.loggers import Loggers, check_wandb
from diffit_jax.training.saving import named, restore_state, save_state
from diffit_jax.training.state import TrainState

log = logging.getLogger(__name__)


class Looks(NamedTuple):
    """What looks at weights while they are trained.

    Attributes:
      grid_sampler: draws the sample grids.
      evaluations: compare samples with a reference.
      held_out: the loss on examples that are not trained on, or None.
    """

    grid_sampler: Sampler
    evaluations: InTraining
    held_out: HeldOutLoss | None

    @classmethod
    def open(cls, opened: Opened, config: ConfigDict, workdir: epath.Path) -> "Looks":
        """Opens and checks everything; writes nothing. Errors as of `InTraining` and
        `open_held_out`."""
        experiment, held_out = opened.experiment, None
        wandb = experiment.training.wandb if distributed.is_first() else ""
        distributed.first_then_all(lambda: check_wandb(wandb))
        count = experiment.training.grid_images
        grid_sampler = sampler_without_autoguidance(experiment, opened.mesh, count)
        evaluations = InTraining(opened, config.to_dict(), workdir)
        if experiment.evaluation.loss_steps:
            source = distributed.first_then_all(lambda: open_held_out(experiment))
            held_out = HeldOutLoss(opened, source)
        return cls(grid_sampler, evaluations, held_out)


class RunFiles:
    """What a run leaves in its work directory while it goes on."""

    def __init__(self, opened: Opened, config: ConfigDict, workdir: epath.Path, looks: Looks):
        self.workdir, self._opened, self._config = workdir, opened, config
        self._experiment, self._looks = opened.experiment, looks
        training = opened.experiment.training
        keep, keep_every = training.keep_checkpoints, training.keep_every_steps
        self.checkpoints = Checkpoints(workdir / workdirs.CHECKPOINTS, keep, keep_every)
        self._snapshots: Checkpoints | None = None
        if opened.experiment.ema.power_lengths:
            self._snapshots = Checkpoints(workdir / workdirs.SNAPSHOTS, keep=10**6)
        self._loggers = Loggers()
        self._first_step = 0

    def restore(self) -> TrainState | None:
        """The state of the newest usable checkpoint; newer ones, which are not, are set aside."""
        state = restore_state(self.checkpoints, self._opened.state)
        if state is not None:
            self._first_step = int(state.step)
            self.checkpoints.set_aside_after(self._first_step)
        return state

    def open_log(self) -> None:
        """Begins to log figures and pictures, on process 0."""
        if distributed.is_first() and not self._loggers:
            self._loggers = Loggers.open(self.workdir, self._config, self._first_step)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Writes figures of a step."""
        self._loggers.figures(step, values)

    def save(self, state: TrainState) -> None:
        """Begins to write a checkpoint. When it is there, so is all that was left before it."""
        if self._snapshots:
            self._snapshots.wait()
        self._loggers.flush()
        self._put_back()
        save_state(self.checkpoints, state, self._experiment.training.batch_size)

    def _put_back(self) -> None:
        """What was in the directory beside checkpoints, if somebody has deleted it."""
        if self._loggers and not (self.workdir / workdirs.CONFIG_FILE).exists():
            log.warning(
                "%s was deleted while the run went on; its config and events are written anew",
                self.workdir,
            )
            workdirs.write_config(files.make_directory(self.workdir, "workdir"), self._config)
            self._loggers.close()
            self._loggers = Loggers.open(self.workdir, self._config, self._first_step)

    def evaluates(self, step: int) -> bool:
        """Whether samples are compared with a reference after this step."""
        return self._looks.evaluations.due(step)

    def measures_loss(self, step: int) -> bool:
        """Whether the loss on held-out examples is measured after this step."""
        steps = self._experiment.evaluation.loss_steps
        return bool(steps) and self.every(steps, step)

    def leaves_something(self, step: int) -> bool:
        """Whether `leave_behind` has something to do."""
        return self._snapshot_due(step) or self._grid_due(step) or self.evaluates(step)

    def every(self, steps: int, step: int) -> bool:
        """Every so many steps, and at the last one."""
        return step % steps == 0 or step == self._experiment.training.total_steps

    def _snapshot_due(self, step: int) -> bool:
        due = self.every(self._experiment.ema.snapshot_steps, step)
        return self._snapshots is not None and due

    def _grid_due(self, step: int) -> bool:
        return self.every(self._experiment.training.grid_steps, step)

    def leave_behind(self, step: int, state: TrainState, restored: bool = False) -> None:
        """What a step leaves behind beside checkpoints: a snapshot of averages, a grid of samples,
        an evaluation. A restored step may have ended before it did; what is there stays.

        Raises:
          interruption.Preempted, interruption.Interrupted: in an evaluation. The checkpoint of
            `step` is there, and so is what is measured.
        """
        snapshots = self._snapshots
        if snapshots and self._snapshot_due(step) and step not in snapshots.steps():
            facts = {"step": step, "updates": step - int(state.skipped)}
            # One after the other: Orbax's processes wait for each other under names made of steps.
            self.checkpoints.wait()
            snapshots.save(step, {"power_emas": dict(named(state.power_emas))}, facts)
        if self._grid_due(step):
            grid = self.workdir / workdirs.GRIDS / f"{step:08d}.png"
            if not (restored and distributed.agreed(grid.exists())):
                self._write_grid(step, grid, state)
        if self.evaluates(step) and not (restored and self._looks.evaluations.done(step)):
            self._evaluate(step, state)

    def _write_grid(self, step: int, path: epath.Path, state: TrainState) -> None:
        """Samples with the seeds 0, 1, 2 …, the same each time, so that pictures of different steps
        can be compared.

        A run does not end because there is no picture of it: one that cannot be made is a warning.
        """
        sampler, space = self._looks.grid_sampler, self._looks.evaluations.space
        seeds = np.arange(self._experiment.training.grid_images)
        labels = default_labels(seeds, self._experiment.model.num_classes)
        try:
            with backend.memory_for("fewer training.grid_images take less"):
                samples = sampler.draw(state.ema_variables, seeds, labels)
                finite = np.isfinite(samples).reshape(len(samples), -1).all(axis=1)
                if self._looks.evaluations.decoder:
                    samples = space.leave(samples)
        except OutOfMemory as error:
            log.warning("the grid %s could not be drawn: %s", path, error)
            return
        if not distributed.is_first():
            return
        if not finite.all():
            bad = int((~finite).sum())
            log.warning("%d of the %d samples in %s are not finite", bad, len(samples), path)
        grid = pixels.write_preview(path, samples, space.preview)
        if grid is not None:
            self._loggers.picture(step, "grid", grid)

    def measure_loss(self, step: int, state: TrainState) -> None:
        """Logs the loss on held-out examples, of the parameters and every average."""
        assert self._looks.held_out
        weights = kinds(self._experiment, state)
        found = self._looks.held_out({one.name: one.variables for one in weights})
        self.log(step, {f"held_out_loss/{name}": loss for name, loss in found.items()})
        losses = ", ".join(f"{name} {loss:.4f}" for name, loss in found.items())
        log.info("step %d: held-out loss %s", step, losses)

    def _evaluate(self, step: int, state: TrainState) -> None:
        """Compares samples of the weights of a step with the reference."""
        try:
            found = self._looks.evaluations.run(step, state)
        except (interruption.Preempted, interruption.Interrupted) as notice:
            self.wait()
            kept = f"checkpoint {step} is saved in {self.checkpoints.directory}, and {notice}"
            raise type(notice)(kept) from notice
        self.open_log()
        self.log(step, found.values)
        for name, pictures in found.pictures.items():
            grid = pixels.image_grid(pictures, columns=8)
            self._loggers.picture(step, f"samples/{name}", grid)
        self._loggers.flush()
        self._looks.evaluations.finish(found)  # last: what is there is not done again
        log.info("step %d: %s; it took %.3g s", step, found.in_words(), found.seconds)

    def wait(self) -> None:
        """Returns when nothing is being written any more."""
        self.checkpoints.wait()
        if self._snapshots:
            self._snapshots.wait()

    def close(self) -> None:
        """Ends the log."""
        self._loggers.close()
