"""Logs of a run: TensorBoard's events always, Weights & Biases where `training.wandb` is set.

And curves, read from events or reference files and compared.
"""

import contextlib
import dataclasses
import json
import logging
import os
import struct
import tempfile
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from etils import epath
from flax import traverse_util
from ml_collections import ConfigDict
from tensorboardX import SummaryWriter, summary
from tensorboardX.proto.event_pb2 import Event, SessionLog

from diffit_jax.errors import UserError, one_line
from diffit_jax.run import workdir as workdirs
from diffit_jax.runtime import files

log = logging.getLogger(__name__)


class Logger(Protocol):
    """One place for figures and images."""

    def figures(self, step: int, values: Mapping[str, float]) -> None:
        """Log scalars of a step, by name."""
        ...

    def image(self, step: int, name: str, image_HWC: np.ndarray) -> None:
        """Log a uint8 image of 1 or 3 channels."""
        ...

    def flush(self) -> None:
        """Wait until everything logged is written, where that can be waited for."""
        ...

    def close(self) -> None:
        """End the log."""
        ...


class TensorBoard:
    """Event files in a work directory, which TensorBoard shows with `--logdir`."""

    def __init__(self, workdir: epath.Path, config: ConfigDict, first_step: int):
        """Begin a file of events.

        Events after `first_step`, which a restored run repeats, are purged.
        """
        self._place = workdir / workdirs.EVENTS
        self._writer = SummaryWriter(str(self._place), purge_step=first_step + 1)
        for part in summary.hparams(flat(config), {"loss": 0}):
            self._writer.file_writer.add_summary(part)

    def figures(self, step: int, values: Mapping[str, float]) -> None:
        """Log scalars of a step."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def image(self, step: int, name: str, image_HWC: np.ndarray) -> None:
        """Log a uint8 image of 1 or 3 channels."""
        self._writer.add_image(name, image_HWC, step, dataformats="HWC")

    def flush(self) -> None:
        """Write the events. Raises `UserError` if they cannot be written."""
        try:
            self._writer.flush()
        except OSError as error:
            raise UserError(
                f"{self._place} cannot be written ({error.strerror or error}): "
                f"{files.remedy_for_writing(error)}; complete checkpoints are kept"
            ) from error

    def close(self) -> None:
        """End the file."""
        self._writer.close()


class WeightsAndBiases:
    """A run at wandb.ai (or offline, with WANDB_MODE=offline).

    Its id is kept in the work directory, so that a run which is resumed continues there too. A run
    does not end for lack of a log: when wandb fails, that is a warning, and no more
    is sent.
    """

    def __init__(self, workdir: epath.Path, config: ConfigDict, project: str):
        self._workdir, self._run = workdir, None
        entity, _, name = project.rpartition("/")
        settings = {
            "project": name,
            "entity": entity or None,
            "id": self._own_id(project),
            "resume": "allow",
            "name": workdir.name,
            "dir": tempfile.gettempdir() if "://" in str(workdir) else str(workdir),
            "config": flat(config),
        }
        self._guarded(lambda: self._begin(settings))

    def _own_id(self, project: str) -> str:
        """Return the id of the run in the work directory, or a new one for another project."""
        path = self._workdir / workdirs.WANDB_FILE
        kept = {}
        if path.exists():
            with contextlib.suppress(ValueError):  # half a file, of a full disk: a new run
                kept = json.loads(path.read_text())
        if kept.get("project") != project:
            kept = {"project": project, "id": uuid.uuid4().hex[:8]}
            files.write_bytes(path, json.dumps(kept).encode())
        return kept["id"]

    def _begin(self, settings: Mapping[str, Any]) -> None:
        import wandb

        quiet = wandb.Settings(console="off", silent=True)
        self._run = wandb.init(**settings, settings=quiet)
        # Not wandb's own counter: a run that is resumed repeats some steps.
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")
        log.info("wandb: run %s, %s", self._run.id, self._run.dir if _offline() else self._run.url)

    def figures(self, step: int, values: Mapping[str, float]) -> None:
        """Log scalars of a step."""
        self._send({"step": step, **values})

    def image(self, step: int, name: str, image_HWC: np.ndarray) -> None:
        """Log a uint8 image of 1 or 3 channels."""
        import wandb

        image = image_HWC[..., 0] if image_HWC.shape[-1] == 1 else image_HWC
        self._send({"step": step, name: wandb.Image(image)})

    def flush(self) -> None:
        """Do nothing: wandb sends by itself, from a process of its own."""

    def close(self) -> None:
        """End the run."""
        if run := self._run:
            self._guarded(run.finish)

    def _send(self, values: dict[str, Any]) -> None:
        if run := self._run:
            self._guarded(lambda: run.log(values))

    def _guarded(self, act: Callable[[], Any]) -> None:
        try:
            act()
        except Exception as error:
            self._run = None
            text = one_line(error, 160)
            log.warning("wandb: %s (%s); training goes on without it", type(error).__name__, text)


class Loggers:
    """Several loggers as one; none of them on all processes but the first."""

    def __init__(self, loggers: Sequence[Logger] = ()):
        self._loggers = loggers

    @classmethod
    def open(cls, workdir: epath.Path, config: ConfigDict, first_step: int) -> "Loggers":
        """Open the loggers that a config asks for."""
        project = config.training.get("wandb", "")
        more = [WeightsAndBiases(workdir, config, project)] if project else []
        return cls([TensorBoard(workdir, config, first_step), *more])

    def __bool__(self) -> bool:
        """Whether anything is logged."""
        return bool(self._loggers)

    def figures(self, step: int, values: Mapping[str, float]) -> None:
        """Log scalars of a step, by name."""
        for logger in self._loggers:
            logger.figures(step, values)

    def image(self, step: int, name: str, image_HWC: np.ndarray) -> None:
        """Log a uint8 image of 1 or 3 channels."""
        for logger in self._loggers:
            logger.image(step, name, image_HWC)

    def flush(self) -> None:
        """Wait until everything logged is written."""
        for logger in self._loggers:
            logger.flush()

    def close(self) -> None:
        """End the logs."""
        for logger in self._loggers:
            logger.close()


def check_wandb(project: str) -> None:
    """Whether a run can be logged there, before anything is written.

    Raises:
      UserError: wandb is not installed, or has no key and is not offline.
    """
    if not project:
        return
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            f"config key training.wandb is {project!r}, but wandb is not installed: "
            'pip install wandb, or set it to ""'
        ) from error
    if _offline():
        return
    try:
        there = wandb.login(prompt=False)
    except Exception as error:  # a key of another length, a network that is not there
        log.warning(
            "wandb: %s (%s); training begins all the same",
            *(type(error).__name__, one_line(error, 160)),
        )
        return
    if not there:
        raise UserError(
            f"config key training.wandb is {project!r}, but there is no key for wandb: run `wandb "
            "login`, set WANDB_API_KEY, or log here only with WANDB_MODE=offline"
        )


def _offline() -> bool:
    off = os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1", "yes", "on")
    return off or os.environ.get("WANDB_MODE", "online") in ("offline", "disabled", "dryrun")


def flat(config: ConfigDict) -> dict[str, bool | int | float | str]:
    """Return a config's values by dotted name; lists as text."""
    values = traverse_util.flatten_dict(config.to_dict(), sep=".")
    return {
        name: value if isinstance(value, (bool, int, float, str)) else str(value)
        for name, value in values.items()
    }


# So many standard deviations of a report's loss, over seeds, are in the band on either side. With
# fifteen reports one sound run in a thousand leaves it.
BAND_DEVIATIONS = 4.0


def read_figures(workdir: epath.PathLike) -> dict[str, dict[int, float]]:
    """Read the figures of a run as TensorBoard shows them: name → {step: value}, by step.

    Figures after the checkpoint from which a run resumed are left out, as is a record that is not
    whole (yet).
    """
    found: dict[str, dict[int, float]] = {}
    files = list((epath.Path(workdir) / workdirs.EVENTS).glob("events.*"))
    for path in sorted(files, key=lambda path: (path.name.split(".")[3], path.stat().mtime)):
        for event in events_in(path.read_bytes()):
            if event.session_log.status == SessionLog.START:
                for values in found.values():
                    for step in [step for step in values if step >= event.step]:
                        del values[step]
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    found.setdefault(value.tag, {})[event.step] = value.simple_value
    return {name: dict(sorted(values.items())) for name, values in found.items()}


def events_in(content: bytes) -> Sequence[Event]:
    """Parse events. A record is its length, a checksum, the message and a checksum."""
    events, at = [], 0
    while at + 12 <= len(content):
        (size,) = struct.unpack("<Q", content[at : at + 8])
        if at + 16 + size > len(content):
            break
        events.append(Event.FromString(content[at + 12 : at + 12 + size]))
        at += size + 16
    return events


@dataclasses.dataclass(frozen=True)
class Curve:
    """How an experiment trains, of several seeds; a JSON file of these.

    Attributes:
      config: of the experiment, as plain values; of the first seed.
      made_on: the device and version of jax, in words.
      updates: numbers of the reports' updates, ascending; each is the mean since the last.
      loss: seed → the losses of these reports.
      score_updates: after which updates the scores were taken.
      scores: name → seed → the scores there.
    """

    config: Mapping[str, Any]
    made_on: str
    updates: Sequence[int]
    loss: Mapping[str, Sequence[float]]
    score_updates: Sequence[int] = ()
    scores: Mapping[str, Mapping[str, Sequence[float]]] = dataclasses.field(default_factory=dict)

    @classmethod
    def read(cls, path: epath.PathLike) -> "Curve":
        """Read a curve. Raises `UserError` if it is no such file."""
        try:
            return cls(**json.loads(epath.Path(path).read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(
                f"{path} is no reference curve ({' '.join(str(error).split())[:120]}): name a file "
                "of configs/curves"
            ) from error

    def band(self, up_to: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (low, high), the bounds of the losses of the reports up to an update.

        mean ± `BAND_DEVIATIONS` · d · mean, where d is the standard deviation of the losses of the
        seeds relative to their mean, pooled over these reports: the loss of a report is noisy by
        the examples and noise levels that it happens to be of, by about the same share everywhere.
        """
        losses = np.array([row[: self.reports(up_to)] for row in self.loss.values()])
        mean = losses.mean(axis=0)
        deviation = np.sqrt(np.mean(losses.var(axis=0, ddof=1) / mean**2))
        return mean * (1 - BAND_DEVIATIONS * deviation), mean * (1 + BAND_DEVIATIONS * deviation)

    def reports(self, up_to: int) -> int:
        """Return how many reports there are up to an update."""
        return sum(update <= up_to for update in self.updates)
