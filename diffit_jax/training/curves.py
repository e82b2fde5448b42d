"""Curves of runs: those in a work directory, and reference curves that others are compared with."""

import dataclasses
import json
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from tensorboardX.proto.event_pb2 import Event, SessionLog

from diffit_jax import workdir as workdirs
from diffit_jax.errors import UserError

# So many standard deviations of a report's loss, over seeds, are in the band on either side. With
# fifteen reports one sound run in a thousand leaves it.
BAND_DEVIATIONS = 4.0


def read_figures(workdir: epath.PathLike) -> dict[str, dict[int, float]]:
    """The figures of a run as TensorBoard shows them: name → {step: value}, in the order of steps.

    What a run logged after the checkpoint from which it went on is left out, as is a record that
    is not whole (yet).
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
    """A record is its length, a checksum, the message and a checksum."""
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
        """Raises `UserError` if it is no such file."""
        try:
            return cls(**json.loads(epath.Path(path).read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(
                f"{path} is no reference curve ({' '.join(str(error).split())[:120]}): name a file "
                "of configs/curves"
            ) from error

    def band(self, up_to: int) -> tuple[np.ndarray, np.ndarray]:
        """(low, high), the bounds of the losses of the reports up to an update.

        mean ± `BAND_DEVIATIONS` · d · mean, where d is the standard deviation of the losses of the
        seeds relative to their mean, pooled over these reports: the loss of a report is noisy by
        the examples and noise levels that it happens to be of, by about the same share everywhere.
        """
        losses = np.array([row[: self.reports(up_to)] for row in self.loss.values()])
        mean = losses.mean(axis=0)
        deviation = np.sqrt(np.mean(losses.var(axis=0, ddof=1) / mean**2))
        return mean * (1 - BAND_DEVIATIONS * deviation), mean * (1 + BAND_DEVIATIONS * deviation)

    def reports(self, up_to: int) -> int:
        """How many reports there are up to an update."""
        return sum(update <= up_to for update in self.updates)
