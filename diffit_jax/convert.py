"""The verb `convert`: between released weights and work directories, and between the two parametrisations of TMSA."""

from collections.abc import Mapping
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from diffit_jax import experiment, files, parallel
from diffit_jax.checkpoint import Checkpoints
from diffit_jax.errors import UserError
from diffit_jax.experiment import CHECKPOINTS, Experiment
from diffit_jax.generate import restore_variables
from diffit_jax.interop import official
from diffit_jax.interop.parametrisation import to_released, to_slim
from diffit_jax.models.latent import LatentDiffiT
from diffit_jax.training.loop import restore_state, save_state
from diffit_jax.training.state import TrainState, abstract_state, fresh_state


def weights_to_workdir(
    weights: epath.PathLike, workdir: epath.PathLike, config: Mapping[str, Any], input_size: int | None = None, slim: bool = False
) -> None:
    """Turns a released file into a work directory with a checkpoint of step 0, to sample from or to train on.

    Args:
      weights: as in `official.load`.
      workdir: directory to write, local or `gs://`.
      config: config of the run; its model takes the sizes of the file.
      input_size: side of the latents, if not that of the file.
      slim: whether to leave out the parameters of TMSA that have no effect.

    Raises:
      UserError: a file that cannot be read, a config that cannot be, a directory that holds a run or cannot be written.
    """
    change = {"slim_tmsa": slim} | ({} if input_size is None else {"input_size": input_size})
    config = official.fit_config(config, weights, **change)
    loaded = experiment.build(config)
    _refuse_run(workdir)
    _, variables = official.load(weights, input_size)
    if slim:
        variables = to_slim(variables)
    state = jax.jit(lambda variables: fresh_state(variables, loaded))(variables)
    _write(workdir, config, loaded, state)


def workdir_to_weights(workdir: epath.PathLike, weights: epath.PathLike, index_buffers: bool = False) -> None:
    """Writes the averaged parameters of a run's newest checkpoint as a file that the released code can load.

    Raises:
      UserError: no run or checkpoint there, a model of another kind, a file that cannot be written.
    """
    loaded = _latent(workdir)
    _, variables = restore_variables(workdir, loaded, parallel.make_mesh())
    official.save(weights, loaded.model, variables, index_buffers)


def workdir_to_workdir(workdir: epath.PathLike, target: epath.PathLike, slim: bool | None) -> None:
    """Writes the newest checkpoint of a run, optimizer state and all, into another work directory with a parametrisation of choice.

    Training there goes on at the same step with the same losses.

    Args:
      workdir: of the run.
      target: directory to write.
      slim: the parametrisation of the new run; None: that of the old.

    Raises:
      UserError: as `workdir_to_weights`, or a target that holds a run.
    """
    loaded, config = _latent(workdir), experiment.read_config(workdir)
    _refuse_run(target)
    mesh = parallel.make_mesh()
    checkpoints = Checkpoints(epath.Path(workdir) / CHECKPOINTS)
    state = restore_state(checkpoints, abstract_state(loaded, mesh))
    if state is None:
        raise UserError(f"workdir {workdir} holds no checkpoint: train first")
    was_slim = loaded.model.slim_tmsa
    if slim is not None and slim != was_slim:
        state = (to_slim if slim else to_released)(state)
        state = jax.device_put(state, parallel.shardings(mesh, state))
        config["model"]["slim_tmsa"] = slim
    _write(target, config, loaded, state)


def _write(workdir: epath.PathLike, config: Mapping[str, Any], loaded: Experiment, state: TrainState) -> None:
    directory = files.make_directory(workdir, "--to_workdir")
    checkpoints = Checkpoints(directory / CHECKPOINTS, keep=loaded.training.keep_checkpoints)
    save_state(checkpoints, state, loaded.training.batch_size)
    checkpoints.wait()
    experiment.claim_workdir(workdir, ConfigDict(config))  # last: with it, the directory holds a run


def _latent(workdir: epath.PathLike) -> Experiment:
    loaded = experiment.build(experiment.read_config(workdir))
    if not isinstance(loaded.model, LatentDiffiT):
        raise UserError(f"workdir {workdir} holds no latent_diffit: only that model can be converted")
    return loaded


def _refuse_run(workdir: epath.PathLike) -> None:
    path = epath.Path(workdir)
    if (path / experiment.CONFIG_FILE).exists() or (path / CHECKPOINTS).exists():
        raise UserError(f"--to_workdir {workdir} holds a run already: choose another directory")
