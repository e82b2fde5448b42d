"""An experiment: what a config describes, as checked and typed values.

Every section of a config becomes one frozen object: a model, a process, or settings (`sections`,
`parallel.MeshShape`). `build` makes them all, so that a mistake in a config is reported before
anything is allocated, compiled or written.
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
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from diffit_jax import limits
from diffit_jax.diffusion.ddpm import DDPM
from diffit_jax.diffusion.edm import EDM
from diffit_jax.errors import UserError
from diffit_jax.limits import at_least
from diffit_jax.models import MODELS
from diffit_jax.runtime import files, lock
from diffit_jax.runtime.parallel import MeshShape
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
      seed: of parameters, data order, noise and dropout in training (samples have seeds of their
        own).
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


# What may differ between a config and the run that it continues, because the numbers do not depend
# on it: whole sections, and keys.
_FREE_SECTIONS = ("mesh", "sampling")
_FREE_KEYS = {
    "data.data_dir",
    "ema.snapshot_steps",
    "model.attention",
    "model.remat",
    "model.scan_unroll",
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
}


def build(
    config: ConfigDict | Mapping[str, Any], config_file: epath.PathLike | None = None
) -> Experiment:
    """Checks a config and makes the objects that it describes; allocates nothing.

    Args:
      config: nested mapping, one entry for each attribute of `Experiment`; `model` and `process`
        choose their class by `name`. Keys that have a default may be left out.
      config_file: of the work directory that it was read from, if it was: perhaps another version
        of this package wrote it.

    Raises:
      UserError: an unknown or missing key, or a value that cannot be; the message names it, and the
        file.
    """
    if config_file is None:
        return _build(config, _Here())
    try:
        return _build(config, _InFile(config_file))
    except UserError as error:
        if str(config_file) in str(error):
            raise
        raise UserError(f"{config_file}: {error}") from error


class _Here:
    """What is wrong with a key of a config that somebody has just written."""

    def unknown(self, key: str, known: Iterable[str]) -> UserError:
        prefix, _, name = key.rpartition(".")
        close = difflib.get_close_matches(name, known, n=1)
        hint = (
            f"did you mean {prefix}{'.' if prefix else ''}{close[0]}?"
            if close
            else f"known are {', '.join(known)}"
        )
        return UserError(f"config key {key} is unknown: {hint}")

    def missing(self, key: str) -> UserError:
        return UserError(f"config key {key} is missing: add it to the config")


class _InFile(_Here):
    """What is wrong with a key of a run's config."""

    def __init__(self, path: epath.PathLike):
        self._path = path

    def unknown(self, key: str, known: Iterable[str]) -> UserError:
        return UserError(
            f"{self._path} has the key {key}, which this version of diffit_jax does not know "
            f"(known are {', '.join(known)}): it was "
            "written by another version or program; use that one, or delete the key if the run "
            "does not depend on it"
        )

    def missing(self, key: str) -> UserError:
        return UserError(
            f"{self._path} has no key {key}, which this version of diffit_jax needs: it was "
            "written by another version or program; use "
            "that one, or add the key"
        )


def _build(config: ConfigDict | Mapping[str, Any], wrong: _Here) -> Experiment:
    config = config.to_dict() if isinstance(config, ConfigDict) else copy.deepcopy(dict(config))
    kinds = {field.name: field.type for field in dataclasses.fields(Experiment)}
    _check_keys("", config, kinds, [section for section in kinds if section != "mesh"], wrong)
    for section in kinds:
        if section != "seed" and not isinstance(config.get(section, {}), Mapping):
            raise UserError(f"config key {section} is {config[section]!r}: it must be a section")
    for section, choices in (("model", MODELS), ("process", PROCESSES)):
        name = config[section].pop("name", None)
        if name not in choices:
            raise UserError(f"config key {section}.name is {name!r}: use {' or '.join(choices)}")
        kinds[section] = choices[name]

    values = {"seed": config.pop("seed")}
    for section, arguments in config.items():
        parameters = dict(inspect.signature(kinds[section]).parameters)
        parameters.pop("parent", None)  # Flax's own
        if section == "model":
            parameters.pop("name", None)
        required = [
            name
            for name, parameter in parameters.items()
            if parameter.default is inspect.Parameter.empty
        ]
        _check_keys(f"{section}.", arguments, parameters, required, wrong)
        # A config read back from JSON has lists where Flax wants hashable tuples.
        values[section] = kinds[section](
            **{
                name: tuple(value) if isinstance(value, list) else value
                for name, value in arguments.items()
            }
        )
    experiment = Experiment(**values)
    _check_output(experiment)
    check_sampling(experiment, experiment.sampling)
    return experiment


def check_sampling(experiment: Experiment, settings: Sampling) -> None:
    """Raises `UserError` if an experiment cannot be sampled with these settings (its own, or
    overridden ones)."""
    model, process = experiment.model, experiment.process
    if settings.discrete and not isinstance(process, DDPM):
        raise UserError(
            f"config key sampling.sampler is {settings.sampler}, which needs the process ddpm: use "
            "euler, heun or dpm_solver"
        )
    if settings.discrete:
        process.steps(settings.respacing or str(settings.num_steps))
    else:
        process.sigmas(settings.num_steps)
    if settings.guide_channels > model.sample_shape[-1]:
        raise UserError(
            f"config key sampling.guide_channels is {settings.guide_channels}: the model has only "
            f"{model.sample_shape[-1]} channels"
        )
    if settings.guide.active and settings.guidance != "autoguidance" and not model.num_classes:
        raise UserError(
            "config key sampling.guidance_scale guides by labels, but model.num_classes is 0: set "
            "guidance_scale to 1"
        )


def _check_output(experiment: Experiment) -> None:
    model, process = experiment.model, experiment.process
    needed = process.output_channels(model.sample_shape[-1])
    if model.output_channels != needed:
        raise UserError(
            f"the process wants a network with {needed} output channels, the model has "
            f"{model.output_channels}: "
            "change model.learn_sigma (latent_diffit) or process.variance and process.loss_type "
            "(ddpm)"
        )


@contextlib.contextmanager
def claimed_workdir(workdir: epath.PathLike, config: ConfigDict) -> Iterator[None]:
    """Claims a work directory for a run of `config`, as `claim_workdir` does, and owns it for the
    length of the block.

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
      config: as given to `build`. Keys that do not change the numbers (intervals, `total_steps`,
        sampling) may differ from the run's, and all of them as long as nothing has been trained
        there.

    Raises:
      UserError: it cannot be written, holds a run of another config, or one that is past
        `total_steps`.
    """
    path = files.make_directory(workdir, "workdir") / CONFIG_FILE
    held = read_config(workdir) if path.exists() else None
    if held is not None and not {"model", "process", "training"} <= held.keys():
        raise UserError(
            f"workdir {workdir} holds a {CONFIG_FILE} of another program: choose another workdir"
        )
    trained = _steps(workdir, CHECKPOINTS, f"{CHECKPOINTS}_damaged", SNAPSHOTS)
    if held is None and trained:
        raise UserError(
            f"workdir {workdir} holds step {max(trained)} of a run without its {CONFIG_FILE}: put "
            "it back, or choose another workdir"
        )
    if held is not None and trained:
        ours, theirs = _settings(config.to_dict()), _settings(held, path)
        for key in sorted(ours.keys() | theirs.keys()):
            if ours.get(key) != theirs.get(key):
                raise UserError(
                    f"workdir {workdir} holds a run with {key} = {theirs.get(key)}, this config "
                    f"has {ours.get(key)}: "
                    "choose another workdir or the config of that run"
                )
        newest = max(_steps(workdir, CHECKPOINTS), default=0)
        if config.training.total_steps < newest:
            raise UserError(
                f"config key training.total_steps is {config.training.total_steps}, but workdir "
                f"{workdir} holds step {newest}: set it "
                f"to at least {newest}, or choose another workdir"
            )
    write_config(workdir, config)


def write_config(workdir: epath.PathLike, config: ConfigDict) -> None:
    """Writes the config of the run in a work directory."""
    files.write_bytes(epath.Path(workdir) / CONFIG_FILE, config.to_json(indent=2).encode())


def _steps(workdir: epath.PathLike, *names: str) -> list[int]:
    """Step numbers of what some directories in a work directory hold."""
    folders = [epath.Path(workdir) / name for name in names]
    return [
        int(entry.name)
        for folder in folders
        if folder.exists()
        for entry in folder.iterdir()
        if entry.name.isdigit()
    ]


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
        raise UserError(
            f"workdir {workdir} holds no run (no {CONFIG_FILE}): train first, or name the "
            "directory of a run"
        ) from error
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror or error}): ask its owner for permission, or "
            "copy the run"
        ) from error
    except ValueError as error:
        raise UserError(
            f"{path} is not a config ({error}): restore it or choose another workdir"
        ) from error


def _check_keys(
    prefix: str, given: Mapping, known: Iterable[str], required: Iterable[str], wrong: _Here
) -> None:
    for key in given:
        if key not in known:
            raise wrong.unknown(f"{prefix}{key}", known)
    for key in required:
        if key not in given:
            raise wrong.missing(f"{prefix}{key}")


def number_settings(section: str, value: Any) -> dict[str, Any]:
    """The settings of a section's object that change numbers, JSON values by name; `name` of a
    model and a process is among them."""
    names = [
        field.name
        for field in dataclasses.fields(value)
        if not (isinstance(value, nn.Module) and field.name in ("parent", "name"))
    ]
    settings = {
        name: getattr(value, name) for name in names if f"{section}.{name}" not in _FREE_KEYS
    }
    if "dtype" in settings:
        settings["dtype"] = np.dtype(settings["dtype"]).name
    kinds = {kind: name for name, kind in (MODELS | PROCESSES).items()}
    return {"name": kinds[type(value)]} | settings if type(value) in kinds else settings


def _settings(
    config: Mapping[str, Any], config_file: epath.PathLike | None = None
) -> dict[str, Any]:
    """Every setting of a config that changes numbers by its dotted key, defaults included."""
    settings = {}
    for section, value in vars(build(config, config_file)).items():
        if section in _FREE_SECTIONS:
            continue
        if dataclasses.is_dataclass(value):
            settings |= {
                f"{section}.{name}": setting
                for name, setting in number_settings(section, value).items()
            }
        else:
            settings[section] = value
    return settings
