"""Where a network comes from: a run, an average of any length of it, or released weights."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from diffit_jax import workdir as workdirs
from diffit_jax.errors import UserError
from diffit_jax.experiment import Experiment
from diffit_jax.interop import official
from diffit_jax.runtime import checkpoint, config_files, contents, distributed, files, hub
from diffit_jax.runtime.console import Progress
from diffit_jax.runtime.ranges import first_few
from diffit_jax.sampling.sampler import Variables
from diffit_jax.training import power_ema
from diffit_jax.training.compiling import Opened, open_experiment
from diffit_jax.training.saving import items_of
from diffit_jax.training.state import TrainState


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
          ema_length: asks for an average made of its snapshots, see `training.power_ema`.
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
        bad = [] if self._allow_nonfinite else contents.not_finite(variables)
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
    package, script = Path(__file__).resolve().parents[1], Path(sys.argv[0]).resolve()
    # Beside the package in a checkout, inside of it or beside the script where it is installed.
    folders = [package.parent, package, script.parents[1]]
    places = [folder / "configs" / f"{name}.py" for folder in folders]
    path = next((place for place in places if place.exists()), None)
    if path is None:
        raise UserError(
            f"there is no configs/{name}.py in this installation ({places[0]}): name a config by "
            "--config"
        )
    return config_files.load(str(path)).to_dict()
