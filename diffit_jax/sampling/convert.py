"""The verb `convert`: released weights, work directories, and parametrisations of TMSA."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from ml_collections import ConfigDict

import diffit_jax
from diffit_jax import models
from diffit_jax.errors import UserError
from diffit_jax.experiment.config import Experiment
from diffit_jax.interop import official
from diffit_jax.interop.parametrisation import to_released, to_slim
from diffit_jax.models.diffit.latent import LatentDiffiT
from diffit_jax.run import workdir as workdirs
from diffit_jax.run.objective import objective_of
from diffit_jax.run.state import (
    Setup,
    TrainState,
    fresh_state,
    restore_state,
    save_state,
    setup_experiment,
)
from diffit_jax.runtime import backend, files, hub, parallel
from diffit_jax.runtime.checkpoint import Checkpoints
from diffit_jax.sampling.request import restore_variables
from diffit_jax.sampling.weights import (
    CLASSES_CARRIED,
    CONFIG_CARRIED,
    OF_FLOW,
    OF_MAP,
    check_process,
    layout_of,
    process_of,
)


@backend.reproducible_numerics()
def weights_to_workdir(
    weights: epath.PathLike,
    *,
    workdir: epath.PathLike,
    config: Mapping[str, Any],
    input_size: int | None = None,
    slim: bool = False,
    allow_nonfinite: bool = False,
    num_classes: int | None = None,
) -> None:
    """Turn a released file into a work directory with a checkpoint of step 0.

    To sample from or to train on.

    Args:
      weights: as in `official.load`, or `songunet.load`, with which `input_size`, `slim` and
        `num_classes` do not go.
      workdir: directory to write, local or `gs://`.
      config: config of the run; its model takes the sizes of the file. With the process flow or
        flow_map, a network of ADM's or DiT's recipe becomes one, see `flow_config`; with flow_map a
        flow does, see `map_config`.
      input_size: side of the latents, if not that of the file.
      slim: whether to leave out the parameters of TMSA that have no effect.
      allow_nonfinite: whether the file may have NaNs and infinities.
      num_classes: of the new run, to be trained on other data: its label table is a new one, every
        row of which is the file's row for "no label", so that training begins with the
        unconditional network. None: the table of the file.

    Raises:
      UserError: a file that cannot be read, or without a label table to take a row from; an
        impossible config; a directory that holds a run or cannot be written.
    """
    weights, workdir = hub.local(weights, "--weights"), files.resolve(workdir, "--to_workdir")
    layout, size = layout_of(weights), {} if input_size is None else {"input_size": input_size}
    change: dict[str, Any] = {"slim_tmsa": slim, **size} if layout is official else {}
    change |= {} if num_classes is None else {"num_classes": num_classes}
    if layout is not official and (slim or size or change):
        raise UserError(
            f"weights {weights} are not of a latent DiffiT: leave out --parametrisation, "
            "--input_size and --num_classes"
        )
    into_flow, theirs = becomes_flow(weights, config), process_of(weights)
    if into_flow:
        config = flow_config(config)
        change["learn_sigma"] = False
    elif (theirs.get("name"), config.get("process", {}).get("name")) == ("flow", "flow_map"):
        config = map_config(config, theirs)
    else:
        check_process(weights, config)
    if config.get("process", {}).get("name") == "flow_map" != theirs.get("name"):
        check_map(config)
    config = layout.fit_config(config, weights, **change)
    experiment = setup_experiment(config, to_train=False).experiment
    _refuse_run(workdir)
    _, variables = layout.load(weights, allow_nonfinite=allow_nonfinite, **size)
    if into_flow:
        variables = _without_variance(variables, experiment.model)
    if num_classes is not None:
        variables = _with_new_labels(variables, num_classes, weights)
    if slim:
        variables = to_slim(variables)
    objective = objective_of(experiment)
    state = jax.jit(lambda given: fresh_state(given, experiment, objective))(variables)
    _write(workdir, config, experiment, state)


@backend.reproducible_numerics()
def workdir_to_weights(
    workdir: epath.PathLike,
    *,
    weights: epath.PathLike,
    index_buffers: bool = False,
    allow_nonfinite: bool = False,
    overwrite: bool = False,
) -> None:
    """Write the averaged parameters of a run's newest checkpoint as a released weight file.

    It carries the run's config and the names of its classes; beside it lies a model card.

    Args:
      workdir: of the run.
      weights: file to write.
      index_buffers: see `official.save`.
      allow_nonfinite: whether the parameters may have NaNs and infinities.
      overwrite: whether a file that is there may be replaced.

    Raises:
      UserError: no run or checkpoint there, a model of another kind, a file that cannot be written.
    """
    weights = files.resolve(weights, "--to_weights")
    files.refuse_existing(weights, "--to_weights", overwrite)
    files.refuse_existing(weights.with_suffix(".md"), "--to_weights", overwrite)
    workdir, setup = _open_latent(workdir)
    step, variables = restore_variables(workdir, setup, allow_nonfinite=allow_nonfinite)
    model: Any = setup.experiment.model
    config = workdirs.read_config(workdir)
    classes = [names[0] for names in workdirs.read_classes(workdir, config)]
    carried = {CONFIG_CARRIED: config, CLASSES_CARRIED: classes}
    official.save(weights, model, variables, index_buffers, carried)
    card = _card(weights, setup.experiment, config, step, classes)
    files.write_bytes(weights.with_suffix(".md"), card.encode())  # last: with it, all is there


def _card(
    weights: epath.Path,
    experiment: Experiment,
    config: Mapping[str, Any],
    step: int,
    classes: Sequence[str],
) -> str:
    """Return the model card of a file of weights: what it is, what made it, and how to use it."""
    model: Any = experiment.model
    count = sum(leaf.size for leaf in jax.tree.leaves(models.initial_shapes(model)["params"]))
    batch, sampling = experiment.training.batch_size, experiment.sampling
    settings = json.dumps({"sampling": config["sampling"], "process": config["process"]}, indent=2)
    several = f"{model.num_classes} classes" if model.num_classes else "no classes"
    named = f" ({', '.join(classes[:10])}{' …' if len(classes) > 10 else ''})" if classes else ""
    vae = ", vae=…" if experiment.data.autoencoder else ""
    return f"""---
library_name: diffit_jax
tags: [diffit, diffusion, jax, image-generation]
---
# {weights.stem}

A latent DiffiT (arXiv 2312.02139) of {count:,} parameters: depth {model.depth}, width
{model.hidden_size}, {model.num_heads} heads, for latents of {model.input_size}×{model.input_size}
of the autoencoder {experiment.data.autoencoder or "(none)"}, {several}{named}.

Trained with diffit_jax {diffit_jax.__version__} on the data set {experiment.data.name}, {step}
updates of {batch} images; these are the averaged parameters. How good its samples are has not been
measured here: `diffit evaluate --weights {weights.name} …` does it.

```python
from diffit_jax import DiffiT

DiffiT.load("{weights.name}"{vae}).sample(seeds=range(4)).grid()
```

The file carries its config and the names of its classes; its names and shapes are those of the
authors' release. Sampled by {type(sampling.sampler).__name__} unless said otherwise:

```json
{settings}
```
"""


@backend.reproducible_numerics()
def workdir_to_workdir(
    workdir: epath.PathLike,
    *,
    target: epath.PathLike,
    slim: bool | None,
    allow_nonfinite: bool = False,
) -> None:
    """Write the newest checkpoint of a run, optimizer state and all, into another work directory.

    Its parametrisation is of choice; training there resumes at the same step with the same losses.

    Args:
      workdir: of the run.
      target: directory to write.
      slim: the parametrisation of the new run; None: that of the old.
      allow_nonfinite: whether parameters and averages may have NaNs and infinities.

    Raises:
      UserError: as `workdir_to_weights`, or a target that holds a run.
    """
    target = files.resolve(target, "--to_workdir")
    workdir, setup = _open_latent(workdir)
    config = workdirs.read_config(workdir)
    _refuse_run(target)
    checkpoints = Checkpoints(workdir / workdirs.CHECKPOINTS)
    state = restore_state(checkpoints, setup.state, allow_nonfinite)
    if state is None:
        raise UserError(f"workdir {workdir} holds no checkpoint: train first")
    if slim is not None and slim != setup.experiment.model.slim_tmsa:
        if setup.experiment.model.time_in != "tmsa":
            raise UserError(
                f"workdir {workdir} has model.time_in {setup.experiment.model.time_in!r}: only "
                "'tmsa' has two parametrisations; leave out --parametrisation"
            )
        state = (to_slim if slim else to_released)(state)
        other: Any = setup.experiment.model
        metadata = models.parameter_metadata(other.clone(slim_tmsa=slim))
        state = jax.device_put(state, parallel.shardings(setup.mesh, state, metadata))
        config["model"]["slim_tmsa"] = slim
    classes = files.read_json(workdir / workdirs.CLASSES_FILE, list) or ()
    _write(target, config, setup.experiment, state)
    workdirs.write_classes(target, classes)


def becomes_flow(weights: epath.PathLike, config: Mapping[str, Any]) -> bool:
    """Return whether weights predict noise at DDPM's timesteps, and a config has the process flow.

    Raises:
      UserError: they do, on another schedule than a flow knows.
    """
    theirs, ours = process_of(weights), config.get("process", {})
    if theirs.get("name") != "ddpm" or ours.get("name") not in ("flow", "flow_map"):
        return False
    for key, known in (("schedule", "linear"), ("num_timesteps", 1000), ("respacing", "")):
        if theirs.get(key, known) != known:
            raise UserError(
                f"weights {weights} are of a network with process.{key} {theirs[key]}: a flow can "
                f"be made of one with {known or 'none'} alone"
            )
    return True


def flow_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config of a flow whose network predicts noise and is told DDPM's timesteps.

    At equal noise levels it is the denoiser that it was; its loss is that of velocities.
    """
    is_map = config["process"]["name"] == "flow_map"  # whose loss is of velocities anyway
    process = dict(config["process"]) | {
        "prediction": "noise",
        "clock": "timesteps",
        "weighting": "none" if is_map else "velocity",
        "direction_weight": 0.0,
    }
    return {**config, "process": process}


@backend.reproducible_numerics()
def flow_to_map(
    workdir: epath.PathLike,
    *,
    target: epath.PathLike,
    config: Mapping[str, Any],
    allow_nonfinite: bool = False,
) -> None:
    """Make a flow map of a flow: the same network, whose last blocks are told another time.

    Where both times are equal it is the flow that it was. The new run begins with the averaged
    parameters of the newest checkpoint, its averages with them.

    Args:
      workdir: of the flow's run.
      target: directory to write.
      config: of the new run, with the process flow_map; its sizes, its data and their augmentation
        are the old run's.
      allow_nonfinite: whether the parameters may have NaNs and infinities.

    Raises:
      UserError: no run of a flow, a config of no map or of one with further parameters, a target
        that holds a run.
    """
    target = files.resolve(target, "--to_workdir")
    workdir = files.resolve(workdir, "--workdir")
    theirs, file = workdirs.read_config(workdir), workdir / workdirs.CONFIG_FILE
    known, asked = (one.get("process", {}).get("name") for one in (theirs, config))
    if (known, asked) != ("flow", "flow_map"):
        raise UserError(
            f"workdir {workdir} holds a run of the process {known}, and --config has {asked}: a "
            "flow (process flow) can be made a map (process flow_map)"
        )
    setup = setup_experiment(theirs, to_train=False, config_file=file)
    config = map_config(config, theirs["process"])
    check_map(config)
    norm = (bool(one["model"].get("qk_norm")) for one in (config, theirs))
    if tuple(norm) == (True, False):
        raise UserError(
            f"config key model.qk_norm is True, and the flow in {workdir} has no QK-norm, which "
            "cannot be added to a trained network: leave it out"
        )
    chosen = {name: config["model"][name] for name in _OF_NEW_RUN if name in config["model"]}
    config = {**config, "model": {**theirs["model"], **chosen}, "data": theirs["data"]}
    if "augmentation" in theirs:
        config["augmentation"] = theirs["augmentation"]
    experiment = setup_experiment(config, to_train=False).experiment
    _refuse_run(target)
    _, variables = restore_variables(workdir, setup, allow_nonfinite=allow_nonfinite)
    objective = objective_of(experiment)
    state = jax.jit(lambda given: fresh_state(given, experiment, objective))(variables)
    classes = files.read_json(workdir / workdirs.CLASSES_FILE, list) or ()
    _write(target, config, experiment, state)
    workdirs.write_classes(target, classes)


# Attributes of a model that change no parameters, but how a run computes them.
_OF_NEW_RUN = (*OF_MAP, "dtype", "dropout", "remat", "attention", "scan_unroll")


def map_config(config: Mapping[str, Any], flow: Mapping[str, Any]) -> dict[str, Any]:
    """Return a map's config for the network of a flow with this section `process`."""
    kept = {name: flow.get(name, default) for name, default in OF_FLOW.items()}
    return {**config, "process": {**config["process"], **kept}}


def check_map(config: Mapping[str, Any]) -> None:
    """Raise `UserError` if the map of a config has parameters that a trained flow has not."""
    model = config.get("model", {})
    told = model.get("end_time_in", "none"), model.get("guidance_in", "none")
    if told != ("blocks", "none"):
        raise UserError(
            f"the config has model.end_time_in {told[0]!r} and model.guidance_in {told[1]!r}: a "
            "trained network becomes a map with 'blocks' and 'none', which add no parameters; "
            "train others from scratch"
        )


def _without_variance(variables: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """Return the variables of a network with a learned variance without what predicts it."""
    final = variables["params"]["final"]
    outputs = model.patch_size**2 * model.input_channels
    if final["bias"].size == outputs:
        return dict(variables)

    def of_noise(leaf: jax.Array) -> jax.Array:
        by_channel = leaf.reshape(*leaf.shape[:-1], -1, 2, model.input_channels)
        return by_channel[..., 0, :].reshape(*leaf.shape[:-1], outputs)

    params = variables["params"] | {"final": jax.tree.map(of_noise, final)}
    return {**variables, "params": params}


def _with_new_labels(
    variables: Mapping[str, Any], num_classes: int, weights: epath.Path
) -> dict[str, Any]:
    """Return the variables with a label table for other classes."""
    time = variables["params"]["time"]
    if "label" not in time:
        raise UserError(f"{weights} has no label table: leave out --num_classes")
    no_label = time["label"]["embedding"][-1:]
    table = {"embedding": jnp.tile(no_label, (num_classes + 1, 1))}
    params = variables["params"] | {"time": time | {"label": table}}
    return {**variables, "params": params}


def _write(
    workdir: epath.Path, config: Mapping[str, Any], experiment: Experiment, state: TrainState
) -> None:
    """Write a work directory with one checkpoint; remove it if that fails."""
    with files.owned(files.make_directory(workdir, "--to_workdir"), "--to_workdir"):
        _refuse_run(workdir)  # another conversion may have been faster
        try:
            keep = experiment.training.keep_checkpoints
            checkpoints = Checkpoints(workdir / workdirs.CHECKPOINTS, keep)
            save_state(checkpoints, state, experiment.training.batch_size)
            checkpoints.wait()
            # Last: with it, the directory holds a run.
            workdirs.write_config(workdir, ConfigDict(config))
        except BaseException:
            if (workdir / workdirs.CHECKPOINTS).exists():
                (workdir / workdirs.CHECKPOINTS).rmtree()
            raise


def _open_latent(workdir: epath.PathLike) -> tuple[epath.Path, Setup]:
    workdir = files.resolve(workdir, "--workdir")
    setup = setup_experiment(
        workdirs.read_config(workdir), to_train=False, config_file=workdir / workdirs.CONFIG_FILE
    )
    if not isinstance(setup.experiment.model, LatentDiffiT):
        raise UserError(
            f"workdir {workdir} holds no latent_diffit: only that model can be converted"
        )
    return workdir, setup


def _refuse_run(workdir: epath.Path) -> None:
    if (workdir / workdirs.CONFIG_FILE).exists():
        raise UserError(f"--to_workdir {workdir} holds a run already: choose another directory")
    folder = workdir / workdirs.CHECKPOINTS  # a conversion that was killed leaves it empty
    if folder.exists() and any(entry.name.isdigit() for entry in folder.iterdir()):
        raise UserError(
            f"--to_workdir {workdir} holds a run already, though without its config: move {folder} "
            "away, or choose another directory"
        )
