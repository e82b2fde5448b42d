"""An experiment: what a config describes, as checked and typed values.

Every section of a config becomes one frozen object: a model, a process, or settings (`sections`, `parallel.MeshShape`). `build` makes them
all, so that a mistake in a config is reported before anything is allocated, compiled or written.
"""

import contextlib
import copy
import dataclasses
import difflib
import inspect
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any

import flax.linen as nn
from etils import epath
from ml_collections import ConfigDict

from diffit_jax import files, limits, lock
from diffit_jax.diffusion.ddpm import DDPM
from diffit_jax.diffusion.edm import EDM
from diffit_jax.errors import UserError
from diffit_jax.limits import at_least
from diffit_jax.models import MODELS
from diffit_jax.parallel import MeshShape
from diffit_jax.sections import EMA, Data, Optimizer, Sampling, Training

Process = EDM | DDPM
PROCESSES = {"edm": EDM, "ddpm": DDPM}
# What a work directory holds.
CONFIG_FILE = "config.json"
CHECKPOINTS = "checkpoints"
SNAPSHOTS = "ema_snapshots"


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A whole config.

    Attributes:
      seed: of parameters, data order, noise and dropout in training (samples have seeds of their own).
      model: the network.
      process: the diffusion process around it.
      data, optimizer, ema, training, sampling: the sections of those names.
      mesh: the section of that name, which may be left out.
    """

    seed: Annotated[int, at_least(0, most=2**32 - 1)]
    model: nn.Module
    process: Process
    data: Data
    optimizer: Optimizer
    ema: EMA
    training: Training
    sampling: Sampling
    mesh: MeshShape = dataclasses.field(default_factory=MeshShape)

    def __post_init__(self):
        limits.check(self, section="")
        self.model.check()


# What may differ between a config and the run that it continues, because the numbers do not depend on it.
_FREE_KEYS = (
    "data.data_dir",
    "ema.snapshot_steps",
    "mesh",
    "model.attention",
    "model.remat",
    "model.scan_unroll",
    "sampling",
    "training.accumulation",
    "training.checkpoint_minutes",
    "training.checkpoint_steps",
    "training.grid_images",
    "training.grid_steps",
    "training.keep_checkpoints",
    "training.keep_every_steps",
    "training.log_steps",
    "training.max_bad_steps",
    "training.total_steps",
)


def build(config: ConfigDict | Mapping[str, Any]) -> Experiment:
    """Checks a config and makes the objects that it describes; allocates nothing.

    Args:
      config: nested mapping, one entry for each attribute of `Experiment`; `model` and `process` choose their class by `name`.

    Raises:
      UserError: an unknown or missing key, or a value that cannot be; the message names it.
    """
    config = config.to_dict() if isinstance(config, ConfigDict) else copy.deepcopy(dict(config))
    kinds = {field.name: field.type for field in dataclasses.fields(Experiment)}
    _check_keys("", config, kinds, required=kinds.keys() - {"mesh"})
    for section, choices in (("model", MODELS), ("process", PROCESSES)):
        name = config[section].pop("name", None)
        if name not in choices:
            raise UserError(f"config key {section}.name is {name!r}: use {' or '.join(choices)}")
        kinds[section] = choices[name]

    values = {"seed": config.pop("seed")}
    for section, arguments in config.items():
        if not isinstance(arguments, Mapping):
            raise UserError(f"config key {section} is {arguments!r}: it must be a section")
        parameters = dict(inspect.signature(kinds[section]).parameters)
        parameters.pop("parent", None)  # Flax's own
        required = [name for name, parameter in parameters.items() if parameter.default is inspect.Parameter.empty]
        _check_keys(f"{section}.", arguments, parameters, required)
        # A config read back from JSON has lists where Flax wants hashable tuples.
        arguments = {name: tuple(value) if isinstance(value, list) else value for name, value in arguments.items()}
        values[section] = kinds[section](**arguments)
    experiment = Experiment(**values)
    _check_output(experiment)
    check_sampling(experiment, experiment.sampling)
    return experiment


def check_sampling(experiment: Experiment, settings: Sampling) -> None:
    """Raises `UserError` if an experiment cannot be sampled with these settings (its own, or overridden ones)."""
    model, process = experiment.model, experiment.process
    if settings.discrete and not isinstance(process, DDPM):
        raise UserError(f"config key sampling.sampler is {settings.sampler}, which needs the process ddpm: use euler, heun or dpm_solver")
    if settings.discrete:
        process.steps(settings.respacing or str(settings.num_steps))
    else:
        process.sigmas(settings.num_steps)
    if settings.guide_channels > model.sample_shape[-1]:
        raise UserError(
            f"config key sampling.guide_channels is {settings.guide_channels}: the model has only {model.sample_shape[-1]} channels"
        )
    if settings.guide.active and settings.guidance != "autoguidance" and not model.num_classes:
        raise UserError("config key sampling.guidance_scale guides by labels, but model.num_classes is 0: set guidance_scale to 1")


def _check_output(experiment: Experiment) -> None:
    model, process = experiment.model, experiment.process
    needed = process.output_channels(model.sample_shape[-1])
    if model.output_channels != needed:
        raise UserError(
            f"the process wants a network with {needed} output channels, the model has {model.output_channels}: "
            "change model.learn_sigma (latent_diffit) or process.variance and process.loss_type (ddpm)"
        )


@contextlib.contextmanager
def claimed_workdir(workdir: epath.PathLike, config: ConfigDict) -> Iterator[None]:
    """Claims a work directory for a run of `config`, as `claim_workdir` does, and owns it for the length of the block.

    Raises:
      UserError: as `claim_workdir`, or another living process owns it.
    """
    with lock.owned(files.make_directory(workdir, "workdir"), "workdir"):
        claim_workdir(workdir, config)
        yield


def claim_workdir(workdir: epath.PathLike, config: ConfigDict) -> None:
    """Creates a work directory for a run of `config`, or makes sure that it holds one already.

    Args:
      workdir: absolute; local or `gs://`.
      config: as given to `build`. Keys that do not change the numbers (intervals, `total_steps`, sampling) may differ from the run's, and
        all of them as long as nothing has been trained there.

    Raises:
      UserError: it cannot be written, holds a run of another config, or one that is past `total_steps`.
    """
    path = files.make_directory(workdir, "workdir") / CONFIG_FILE
    text = config.to_json(indent=2)
    held = read_config(workdir) if path.exists() else None
    if held is not None and not {"model", "process", "training"} <= held.keys():
        raise UserError(f"workdir {workdir} holds a {CONFIG_FILE} of another program: choose another workdir")
    if held is not None and _steps(workdir, CHECKPOINTS, f"{CHECKPOINTS}_damaged", SNAPSHOTS):
        ours, theirs = _settings(config.to_dict()), _settings(held)
        for key in sorted(ours.keys() | theirs.keys()):
            if not key.startswith(_FREE_KEYS) and ours.get(key) != theirs.get(key):
                raise UserError(
                    f"workdir {workdir} holds a run with {key} = {theirs.get(key)}, this config has {ours.get(key)}: "
                    "choose another workdir or the config of that run"
                )
        newest = max(_steps(workdir, CHECKPOINTS), default=0)
        if config.training.total_steps < newest:
            raise UserError(
                f"config key training.total_steps is {config.training.total_steps}, but workdir {workdir} holds step {newest}: set it "
                f"to at least {newest}, or choose another workdir"
            )
    files.write_bytes(path, text.encode())


def _steps(workdir: epath.PathLike, *names: str) -> list[int]:
    """Step numbers of what some directories in a work directory hold."""
    folders = [epath.Path(workdir) / name for name in names]
    return [int(entry.name) for folder in folders if folder.exists() for entry in folder.iterdir() if entry.name.isdigit()]


def read_config(workdir: epath.PathLike) -> dict[str, Any]:
    """The config of the run in a work directory, as nested dicts.

    Raises:
      UserError: there is no run, or its config cannot be read.
    """
    path = epath.Path(workdir) / CONFIG_FILE
    try:
        config = json.loads(path.read_text())
        if not isinstance(config, dict):
            raise ValueError("it is not a JSON object")
        return config
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"workdir {workdir} holds no run (no {CONFIG_FILE}): train first, or name the directory of a run") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}): ask its owner for permission, or copy the run") from error
    except ValueError as error:
        raise UserError(f"{path} is not a config ({error}): restore it or choose another workdir") from error


def _check_keys(prefix: str, given: Mapping, known: Iterable[str], required: Iterable[str]) -> None:
    for key in given:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {prefix}{close[0]}?" if close else f"known are {', '.join(known)}"
            raise UserError(f"config key {prefix}{key} is unknown: {hint}")
    for key in required:
        if key not in given:
            raise UserError(f"config key {prefix}{key} is missing: add it to the config")


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Every setting of a config by its dotted key, defaults included."""
    settings = {f"{section}.name": config[section]["name"] for section in ("model", "process")}
    for section, value in vars(build(config)).items():
        if not dataclasses.is_dataclass(value):
            settings[section] = value
            continue
        names = {field.name for field in dataclasses.fields(value)} - {"parent", "name"}
        settings |= {f"{section}.{name}": getattr(value, name) for name in names}
    settings["data.name"] = config["data"]["name"]
    return settings
