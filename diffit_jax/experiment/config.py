"""An experiment: what a config describes, as checked and typed values.

Every section of a config becomes one frozen object: a model, a process, or settings (`sections`,
`parallel.MeshShape`). `build` makes them all, so that a mistake in a config is reported before
anything is allocated, compiled or written.
"""

import copy
import dataclasses
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from diffit_jax import limits
from diffit_jax.data import augment
from diffit_jax.data.augment import Augmentation
from diffit_jax.diffusion import PROCESSES
from diffit_jax.diffusion.flow import Flow
from diffit_jax.diffusion.flow_map import FlowMap
from diffit_jax.diffusion.map_sampler import MapSampler
from diffit_jax.diffusion.types import Process
from diffit_jax.errors import UserError
from diffit_jax.experiment import catalogue, sections
from diffit_jax.experiment.representation import REPRESENTATIONS, Plain, Representation
from diffit_jax.experiment.sections import EMA, Data, Evaluation, Optimizer, Sampling, Training
from diffit_jax.experiment.spaces import Space, make_space
from diffit_jax.limits import RESUMABLE, at_least
from diffit_jax.models import MODELS, Model
from diffit_jax.runtime import config_files
from diffit_jax.runtime.parallel import MeshShape


@dataclasses.dataclass(frozen=True)
class Experiment(limits.Section, name=""):
    """A whole config.

    Attributes:
      seed: of initial parameters, data order, noise and dropout in training; samples have seeds of
        their own.
      model: the network.
      process: the diffusion process around it.
      data, optimizer, ema, training, sampling: the sections of those names.
      space: how examples enter the step and samples leave it; it follows from `data`,
        `augmentation` and `sampling`.
      representation: the loss on the network's tokens beside the process's, or none.
      augmentation, evaluation, mesh: the sections of those names, which may be left out.
    """

    seed: Annotated[int, at_least(0, le=2**32 - 1)]
    model: Model
    process: Process
    data: Data
    optimizer: Optimizer
    ema: EMA
    training: Training
    sampling: Annotated[Sampling, RESUMABLE]
    space: Annotated[Space, RESUMABLE]
    augmentation: Augmentation = augment.NONE
    representation: Representation = dataclasses.field(default_factory=Plain)
    evaluation: Annotated[Evaluation, RESUMABLE] = dataclasses.field(default_factory=Evaluation)
    mesh: Annotated[MeshShape, RESUMABLE] = dataclasses.field(default_factory=MeshShape)

    def __post_init__(self):
        super().__post_init__()
        self.model.check()
        _check_output(self)
        _check_map(self)
        if self.augmentation.probability or self.model.augment_labels:
            _check_augmentation(self)
        _check_sampling(self)
        self.evaluation.check(self.data.autoencoder)
        self.representation.check(self)

    def with_sampling(self, sampling: Sampling) -> "Experiment":
        """Return the same experiment, sampled in another way.

        Raises:
          UserError: it cannot be sampled so.
        """
        space = make_space(self.data, sampling.pixel_rounding, self.augmentation)
        return dataclasses.replace(self, sampling=sampling, space=space)


# Sections whose class one of their keys chooses: that key, and the classes by name.
CHOICES: Mapping[str, tuple[str, Mapping[str, type]]] = {
    "model": ("name", MODELS),
    "process": ("name", PROCESSES),
    "representation": ("kind", REPRESENTATIONS),
    "sampling.sampler": ("name", sections.SAMPLERS),
    "sampling.guidance": ("kind", sections.GUIDANCE),
}


def build(
    config: ConfigDict | Mapping[str, Any], config_file: epath.PathLike | None = None
) -> Experiment:
    """Check a config and make the objects that it describes; allocate nothing.

    Args:
      config: nested mapping, one entry for each section of `Experiment` (`space` follows from the
        others). Sections in `CHOICES` choose their class by a key. Keys that have a default may be
        left out.
      config_file: of the work directory that it was read from, if it was: perhaps another version
        of this package wrote it.

    Raises:
      UserError: an unknown or missing key, or an impossible value; the message names it, and the
        file.
    """
    plain = config.to_dict() if isinstance(config, ConfigDict) else copy.deepcopy(dict(config))
    if config_file is None:
        return _build(plain, _ErrorContext())
    try:
        return _build(plain, _FileErrorContext(config_file))
    except UserError as error:
        if str(config_file) in str(error):
            raise
        raise UserError(f"{config_file}: {error}") from error


def class_name(section: str, value: Any) -> str | None:
    """Return the name by which a config chooses the class of a section's object, or None."""
    _, classes = CHOICES.get(section, ("", {}))
    return next((name for name, cls in classes.items() if cls is type(value)), None)


def keys_of(section: str, cls: type) -> dict[str, dataclasses.Field]:
    """Return the keys of a section (a dataclass or Flax module) but the one that chooses it."""
    of_flax = ("parent", "name") if section == "model" else ()
    return {
        field.name: field
        for field in dataclasses.fields(cls)
        if field.init and field.name not in of_flax
    }


def has_default(field: dataclasses.Field) -> bool:
    """Whether the key of this field may be left out."""
    missing = dataclasses.MISSING
    return field.default is not missing or field.default_factory is not missing


def section_classes(config: ConfigDict | Mapping[str, Any]) -> dict[str, type]:
    """Return the class of every section of a config by its dotted name, as far as known."""
    classes = {
        field.name: limits.type_of(field.type)
        for field in dataclasses.fields(Experiment)
        if field.name not in ("seed", "space")
    }
    for section, (key, choices) in CHOICES.items():
        classes.pop(section, None)
        name = _node(config, f"{section}.{key}") or _default_name(section)
        if isinstance(name, str) and name in choices:
            classes[section] = choices[name]
    return classes


def _default_name(section: str) -> str | None:
    """Return the name of the class that a section of an experiment has where it is left out."""
    field = next((each for each in dataclasses.fields(Experiment) if each.name == section), None)
    make: Any = field and field.default_factory
    if field is None or make is dataclasses.MISSING:
        return None
    return class_name(section, make())


def given_config(given: config_files.ConfigArgs, config: ConfigDict | None = None) -> ConfigDict:
    """Return the config that a command line names, with the keys that it overrides.

    Any key that a section has can be overridden, whether or not the file lists it.

    Args:
      given: arguments of the command line, which name a file.
      config: that of the file, or of a run, if it is loaded already.

    Raises:
      UserError: a mistake in the file, a key that no section has, or a value of another type.
    """
    if config is None:
        assert given.file is not None
        config = config_files.load(given.file)
    keys = given.keys()
    for section, (key, choices) in CHOICES.items():
        name = given.text_of(f"{section}.{key}")
        if name is not None and name in choices:
            _choose(config, section, name)
    added = _complete(config)
    catalogue.check_overrides(config, given)
    config_files.override(config, given, given.file or "the config")
    _remove(config, set(added) - set(keys))
    return config.lock()


def completed(config: ConfigDict) -> tuple[ConfigDict, set[str]]:
    """Return a copy with all keys that have a default, and the dotted names of those added."""
    config = config.copy_and_resolve_references()
    return config, set(_complete(config))


def _choose(config: ConfigDict, section: str, name: str) -> None:
    """Change the class of a section in `CHOICES`.

    A process, sampler or guidance of another kind keeps the settings that the two have in common.
    """
    key, choices = CHOICES[section]
    with config.unlocked():
        if section not in config and "." not in section:  # one that may be left out
            config[section] = ConfigDict()
    node = _node(config, section)
    if not isinstance(node, ConfigDict) or node.get(key) == name:
        return
    with config.unlocked():
        node[key] = name
        if section != "model":
            known = keys_of(section, choices[name])
            for other in [other for other in node if other != key and other not in known]:
                del node[other]


def _complete(config: ConfigDict) -> list[str]:
    """Add the keys with a default that a config leaves out, in their section's type.

    So each can be overridden. Returns their dotted names.
    """
    added: list[str] = []
    with config.unlocked():
        for section, cls in section_classes(config).items():
            parent, _, last = section.rpartition(".")
            above = _node(config, parent) if parent else config
            if isinstance(above, ConfigDict) and last not in above:
                above[last] = ConfigDict()
                added.append(section)
                if section in CHOICES:
                    key, name = CHOICES[section][0], _default_name(section)
                    above[last] = ConfigDict({key: name})
                    added.append(f"{section}.{key}")
            node = _node(config, section)
            if isinstance(node, ConfigDict):
                added += [f"{section}.{name}" for name in _complete_section(node, section, cls)]
    return added


def _complete_section(node: Any, section: str, cls: type) -> list[str]:
    added = []
    for name, field in keys_of(section, cls).items():
        kind = limits.type_of(field.type)
        if f"{section}.{name}" in CHOICES or not has_default(field):
            continue
        if name not in node:
            make: Any = field.default_factory
            missing = field.default is dataclasses.MISSING
            default: Any = make() if missing else field.default
            node[name] = np.dtype(default).name if kind is np.dtype else default
            added.append(name)
        elif kind is float and node.get_type(name) is int:
            with node.ignore_type():  # `scale=2` may become 1.5
                node[name] = float(node[name])
    return added


def _remove(config: ConfigDict, keys: Iterable[str]) -> None:
    """Take keys out of a config again, and sections that are empty then."""
    with config.unlocked():
        for key in sorted(keys, key=len, reverse=True):
            parent, _, name = key.rpartition(".")
            node: Any = _node(config, parent) if parent else config
            if not isinstance(node[name], ConfigDict) or not len(node[name]):
                del node[name]


def _node(config: Any, section: str) -> Any:
    """Return the section of a dotted name, or whatever is there; None if nothing is."""
    for part in section.split("."):
        is_section = isinstance(config, ConfigDict | Mapping)
        config = config[part] if is_section and part in config else None
    return config


class _ErrorContext:
    """What is wrong with a key of a config that somebody has just written."""

    def unknown(self, key: str, known: Iterable[str]) -> UserError:
        return catalogue.unknown_key(key, known)

    def missing(self, key: str) -> UserError:
        return UserError(f"config key {key} is missing: add it to the config")


class _FileErrorContext(_ErrorContext):
    """What is wrong with a key of a run's config."""

    def __init__(self, path: epath.PathLike):
        self._path = path

    def unknown(self, key: str, known: Iterable[str]) -> UserError:
        return UserError(
            f"{self._path} has the key {key}, which this version of diffit_jax does not know "
            f"(known are {', '.join(known)}): it was written by another version or program; use "
            "that one, or delete the key if the run does not depend on it"
        )

    def missing(self, key: str) -> UserError:
        return UserError(
            f"{self._path} has no key {key}, which this version of diffit_jax needs: it was "
            "written by another version or program; use that one, or add the key"
        )


def _build(config: dict[str, Any], wrong: _ErrorContext) -> Experiment:
    fields = {
        field.name: field for field in dataclasses.fields(Experiment) if field.name != "space"
    }
    required = [name for name, field in fields.items() if not has_default(field)]
    _check_keys("", config, fields, required, wrong)
    values: dict[str, Any] = {}
    for name, given in config.items():
        if name == "seed":
            values[name] = given
        else:
            values[name] = _make(name, given, limits.type_of(fields[name].type), wrong)
    space = make_space(
        values["data"], values["sampling"].pixel_rounding, values.get("augmentation", augment.NONE)
    )
    return Experiment(**values, space=space)


def _make(section: str, given: Any, cls: Any, wrong: _ErrorContext) -> Any:
    """Make the object of a section, and those of the sections in it."""
    if not isinstance(given, Mapping):
        raise UserError(f"config key {section} is {given!r}: it must be a section")
    arguments = dict(given)
    if section in CHOICES:
        key, choices = CHOICES[section]
        name = arguments.pop(key, None)
        if name not in choices:
            raise UserError(f"config key {section}.{key} is {name!r}: use {' or '.join(choices)}")
        cls = choices[name]
    keys = keys_of(section, cls)
    required = [name for name, field in keys.items() if not has_default(field)]
    _check_keys(f"{section}.", arguments, keys, required, wrong)
    for name, value in arguments.items():
        if f"{section}.{name}" in CHOICES:
            arguments[name] = _make(f"{section}.{name}", value, None, wrong)
        elif isinstance(value, list):  # of JSON, where Flax wants hashable tuples
            arguments[name] = tuple(value)
    return cls(**arguments)


def _check_keys(
    prefix: str, given: Mapping, known: Iterable[str], required: Iterable[str], wrong: _ErrorContext
) -> None:
    for key in given:
        if key not in known:
            raise wrong.unknown(f"{prefix}{key}", known)
    for key in required:
        if key not in given:
            raise wrong.missing(f"{prefix}{key}")


def _check_output(experiment: Experiment) -> None:
    model, process = experiment.model, experiment.process
    needed = process.output_channels(model.sample_shape[-1])
    if model.output_channels != needed:
        raise UserError(
            f"the process wants a network with {needed} output channels, the model has "
            f"{model.output_channels}: change model.learn_sigma (latent_diffit), process.variance "
            "and process.loss_type (ddpm) or process.name"
        )


def _check_map(experiment: Experiment) -> None:
    """Raise `UserError` unless process and network agree about a flow map, and what it is told."""
    model, process, training = experiment.model, experiment.process, experiment.training
    is_map = isinstance(process, FlowMap)
    if is_map and not model.is_map:
        raise UserError(
            "config key process.name is flow_map, but the network is told one time alone: set "
            "model.end_time_in (latent_diffit, image_diffit) to blocks, sum or tokens"
        )
    if model.is_map and not is_map:
        raise UserError(
            "config key model.end_time_in tells the network a second time, which the process "
            "flow_map alone has: set it to none, or process.name to flow_map"
        )
    told = isinstance(process, FlowMap) and process.guidance_told
    if told != (model.guidance_in != "none"):
        raise UserError(
            f"config key process.guidance_told is {told}, and model.guidance_in "
            f"{model.guidance_in!r}: tell the network its guidance by both (sum or tokens), or by "
            "neither (False, none)"
        )
    if not isinstance(process, FlowMap):
        return
    if process.guides and not model.num_classes:
        raise UserError(
            "config keys process.guidance_… guide by labels, but model.num_classes is 0: set "
            "guidance_omega to 1, guidance_kappa to 0 and guidance_told to False"
        )
    if process.guides and not training.label_dropout:
        raise UserError(
            "config keys process.guidance_… compare with the network without a label, which "
            "training.label_dropout 0 does not train: set it to 0.1"
        )
    batch, parts = training.batch_size, training.accumulation
    mapped = parts * round(process.share * (batch // parts))
    if (process.share and not mapped) or (process.share < 1 and mapped == batch):
        raise UserError(
            f"config key process.share is {process.share:g}, which is {mapped} examples of {batch} "
            f"in {parts} parts: choose it so that both kinds are there, or 0 or 1"
        )
    if mapped != round(process.share * batch):
        raise UserError(
            f"config key training.accumulation is {parts}, which does not divide the "
            f"{round(process.share * batch)} examples that process.share {process.share:g} is of a "
            f"batch of {batch}: change either"
        )


def _check_augmentation(experiment: Experiment) -> None:
    has = experiment.model.augment_labels
    needed = experiment.augmentation.num_labels
    if has != needed:
        raise UserError(
            f"config key model.augment_labels is {has}, but the augmentation tells the network "
            f"{needed} numbers: set it to {needed}, or augmentation.probability to 0 for none"
        )


def _check_guidance(experiment: Experiment) -> None:
    """Raise `UserError` for a guidance that process, sampler or model cannot take."""
    model, guidance = experiment.model, experiment.sampling.guidance
    process, sampler = experiment.process, experiment.sampling.sampler
    inside = isinstance(process, FlowMap) and process.guides
    if isinstance(process, FlowMap) and process.guidance_told:
        inside = isinstance(sampler, MapSampler) and sampler.told_scale != 1
    if guidance.active and inside:
        raise UserError(
            f"config key sampling.guidance.kind is {guidance.kind}, but this map was trained with "
            "guidance inside (process.guidance_…), and would be guided twice: use none"
        )
    if guidance.of_flow and not isinstance(process, Flow):
        raise UserError(
            f"config key sampling.guidance.kind is {guidance.kind}, which needs the process flow: "
            "use constant or interval"
        )
    if guidance.of_flow == "velocity" and not sampler.follows_velocity(process):
        raise UserError(
            f"config key sampling.guidance.kind is {guidance.kind}, which compares velocities: use "
            "the sampler euler, heun, sde, or general with the schedule flow"
        )
    if guidance.needs_inner and not model.has_inner_head:
        raise UserError(
            f"config key sampling.guidance.kind is {guidance.kind}, but the network has no inner "
            "head: train one with model.inner_head (latent_diffit), or choose another guidance"
        )


def _check_sampling(experiment: Experiment) -> None:
    """Raise `UserError` if the experiment cannot be sampled as its section `sampling` says."""
    model, guidance = experiment.model, experiment.sampling.guidance
    experiment.sampling.sampler.check(experiment.process)
    _check_guidance(experiment)
    if not experiment.sampling.guide_class_token and not (model.class_token and guidance.active):
        raise UserError(
            "config key sampling.guide_class_token is False, but "
            + ("nothing is guided" if model.class_token else "the network has no model.class_token")
            + ": leave it out"
        )
    if guidance.channels > model.sample_shape[-1]:
        raise UserError(
            f"config key sampling.guidance.channels is {guidance.channels}: the model has only "
            f"{model.sample_shape[-1]} channels"
        )
    if guidance.needs_labels and not model.num_classes:
        raise UserError(
            "config key sampling.guidance.scale guides by labels, but model.num_classes is 0: set "
            "it to 1"
        )
