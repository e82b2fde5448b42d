"""The verb `check`: does an installation train as it should?"""

import logging
import tempfile
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from diffit_jax.errors import UserError
from diffit_jax.training.loggers import Curve, read_figures
from diffit_jax.training.train import train

log = logging.getLogger(__name__)


class Checked(NamedTuple):
    """A run compared with a reference curve.

    Attributes:
      updates: (n,) of the reports.
      loss: (n,) of this run.
      low, high: (n,) the band of the curve.
      from_same_seed: the largest distance from the curve of the same seed, as a share of it; None
        if it has none of this seed.
    """

    updates: Sequence[int]
    loss: np.ndarray
    low: np.ndarray
    high: np.ndarray
    from_same_seed: float | None

    @property
    def outside(self) -> list[int]:
        """Places of the reports outside the band."""
        inside = (self.low <= self.loss) & (self.loss <= self.high)
        return [int(place) for place in np.flatnonzero(~inside)]


def check(
    curve: Curve,
    *,
    config: ConfigDict | None = None,
    steps: int = 300,
    workdir: epath.PathLike | None = None,
    devices: Callable[[ConfigDict], Sequence[jax.Device] | None] = lambda _: None,
) -> Checked:
    """Train the first updates of an experiment and compare the losses with a reference curve.

    Args:
      curve: of `configs/curves`.
      config: of the experiment, where the data are elsewhere; None: the curve's own.
      steps: how many updates.
      workdir: of the run, which is resumed if it is there; None: one that is deleted.
      devices: which to train a config on; None of them: all.

    Returns:
      The losses and the band.

    Raises:
      UserError: the curve begins later, or as of `train`.
    """
    count = curve.reports(steps)
    if not count:
        raise UserError(f"--steps is {steps}: the curve begins at update {curve.updates[0]}")
    own = (config or ConfigDict(curve.config)).to_dict()
    own.pop("evaluation", None)
    changed = ConfigDict(own)
    last = curve.updates[count - 1]
    changed.training.update(total_steps=last, log_steps=curve.updates[0], grid_images=10)
    changed.training.update(checkpoint_steps=last, grid_steps=last)
    with tempfile.TemporaryDirectory(prefix="diffit_jax_check_") as folder:
        place = workdir or folder
        train(changed, workdir=place, devices=devices(changed))
        found = read_figures(place)["loss"]
    loss = np.array([found.get(update, np.nan) for update in curve.updates[:count]])
    low, high = curve.band(steps)
    same = curve.loss.get(str(changed.seed))
    distance = None if same is None else float(np.max(np.abs(loss / np.array(same[:count]) - 1)))
    return Checked(curve.updates[:count], loss, low, high, distance)


def table(checked: Checked) -> str:
    """Format the result as text, a line for each report."""
    lines = [f"{'update':>7} {'loss':>9}   band of the curve"]
    for place, update in enumerate(checked.updates):
        mark = "   outside" if place in checked.outside else ""
        bounds = f"{checked.low[place]:9.4f} to {checked.high[place]:.4f}"
        lines.append(f"{update:7} {checked.loss[place]:9.4f}   {bounds}{mark}")
    return "\n".join(lines)
