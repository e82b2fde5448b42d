"""What a work directory holds, whose it is, and what may change under a run.

    config.json              the config of the run: with it, the directory holds one
    classes.json             the names of its classes, where its data have some
    checkpoints/STEP         of the whole state; checkpoints_damaged/ those that could not be used
    ema_snapshots/STEP       of the averages of which one of any length is made
    evaluations/STEP.json    the figures of the evaluations of a run
    reference.npz            what they compare with, if it is the test split
    events/  grids/  profile/  for people; wandb.json which run at Weights & Biases it is

A key of a config may differ from that of the run which it continues if it has the mark `RESUMABLE`
at its field: the numbers do not depend on it.
"""

# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# (etils and ml_collections have no stubs.)

import contextlib
import dataclasses
import json
from collections.abc import Generator, Mapping, Sequence
from typing import Any, cast

import flax.linen as nn
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from diffit_jax import limits
from diffit_jax.data import records
from diffit_jax.data.labels import imagenet_names, synonyms_of
from diffit_jax.data.sources import DATASETS, data_folder
from diffit_jax.errors import UserError
from diffit_jax.experiment.config import Experiment, build, class_name
from diffit_jax.runtime import files

CONFIG_FILE = "config.json"
CLASSES_FILE = "classes.json"
ENCODER_FILE = "encoder.json"  # of which weights the encoder of representations is
CHECKPOINTS = "checkpoints"
DAMAGED = "checkpoints_damaged"
SNAPSHOTS = "ema_snapshots"
EVALUATIONS = "evaluations"
EVENTS = "events"
GRIDS = "grids"
PROFILE = "profile"
REFERENCE = "reference.npz"
WANDB_FILE = "wandb.json"


@contextlib.contextmanager
def claimed(workdir: epath.PathLike, config: ConfigDict) -> Generator[None]:
    """Claim a work directory for a run of `config`, and own it for the length of the block.

    Raises:
      UserError: as `claim`, or another living process owns it.
    """
    with files.owned(files.make_directory(workdir, "workdir"), "workdir"):
        claim(workdir, config)
        yield


def claim(workdir: epath.PathLike, config: ConfigDict) -> None:
    """Create a work directory for a run of `config`, or make sure that it holds one already.

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
    trained = _steps(workdir, CHECKPOINTS, DAMAGED, SNAPSHOTS)
    if held is None and trained:
        raise UserError(
            f"workdir {workdir} holds step {max(trained)} of a run without its {CONFIG_FILE}: put "
            "it back, or choose another workdir"
        )
    if held is not None and trained:
        given = cast(dict[str, Any], config.to_dict())
        ours, theirs = all_settings(given), all_settings(held, path)
        for key, (was, now) in sorted(files.differences(ours, theirs).items()):
            raise UserError(
                f"workdir {workdir} holds a run with {key} = {was}, this config has {now}: choose "
                "another workdir or the config of that run"
            )
        newest = max(_steps(workdir, CHECKPOINTS), default=0)
        total_steps = given["training"]["total_steps"]
        if total_steps < newest:
            raise UserError(
                f"config key training.total_steps is {total_steps}, but workdir {workdir} holds "
                f"step {newest}: set it to at least {newest}, or choose another workdir"
            )
    write_config(workdir, config)


def write_config(workdir: epath.PathLike, config: ConfigDict) -> None:
    """Write the config of the run in a work directory."""
    files.write_bytes(epath.Path(workdir) / CONFIG_FILE, config.to_json(indent=2).encode())


def write_classes(workdir: epath.PathLike, classes: Sequence[str]) -> None:
    """Write the names of a run's classes, if its data have some."""
    if classes:
        files.write_json(epath.Path(workdir) / CLASSES_FILE, list(classes))


def keep_encoder(workdir: epath.PathLike, fingerprint: str) -> None:
    """Write which encoder a run is aligned with, or compare it with that of a run that goes on.

    Raises:
      UserError: it is another one.
    """
    path = epath.Path(workdir) / ENCODER_FILE
    if path.exists():
        known = files.read_json(path, dict) or {}
        if known.get("fingerprint", fingerprint) != fingerprint:
            raise UserError(
                f"workdir {workdir} holds a run with other encoder weights than those of config "
                "key representation.encoder_weights: name the same file, or choose another workdir"
            )
    files.write_json(path, {"fingerprint": fingerprint})


def read_classes(workdir: epath.PathLike | None, config: Mapping[str, Any]) -> list[list[str]]:
    """Return the synonyms of a run's classes, by index; none where they have no names.

    Args:
      workdir: of the run, which may have a file of them; None: only the config is asked.
      config: of the run: its data set, if that is there, and whether it is ImageNet.
    """
    data, model = ({} if not isinstance(config.get(section), Mapping) else config[section]
                   for section in ("data", "model"))  # fmt: skip
    count = model.get("num_classes", 0)
    name, found = str(data.get("name", "")), None
    if workdir is not None:
        found = files.read_json(epath.Path(workdir) / CLASSES_FILE, list)
    if found is None and count and name not in DATASETS:
        with contextlib.suppress(UserError):
            folder = data_folder(name, data.get("data_dir", ""))
            found = records.read_manifest(folder, "train").classes
    if found is not None and len(found) == count:
        return synonyms_of([str(each) for each in found])
    is_imagenet = name.startswith("imagenet") and count == len(imagenet_names())
    return imagenet_names() if is_imagenet else []


def _steps(workdir: epath.PathLike, *names: str) -> list[int]:
    """Return the step numbers in some directories of a work directory."""
    folders = [epath.Path(workdir) / name for name in names]
    return [
        int(entry.name)
        for folder in folders
        if folder.exists()
        for entry in folder.iterdir()
        if entry.name.isdigit()
    ]


def read_config(workdir: epath.PathLike) -> dict[str, Any]:
    """Return the config of the run in a work directory, as nested dicts.

    Raises:
      UserError: there is no run, or its config cannot be read.
    """
    path = epath.Path(workdir) / CONFIG_FILE
    try:
        read: Any = json.loads(path.read_text())
        if not isinstance(read, dict):
            raise ValueError("it is not a JSON object")
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
    return cast(dict[str, Any], read)


def number_settings(section: str, value: Any) -> dict[str, Any]:
    """Return the settings of a section's object that change numbers, JSON values by name.

    The name of its class, where a config chooses that, is among them.
    """
    settings: dict[str, Any] = {}
    for field in dataclasses.fields(value):
        flaxs_own = isinstance(value, nn.Module) and field.name in ("parent", "name")
        if not flaxs_own and not limits.is_resumable(field.type):
            settings[field.name] = getattr(value, field.name)
    if "dtype" in settings:
        settings["dtype"] = np.dtype(settings["dtype"]).name
    name = class_name(section, value)
    return settings if name is None else {"name": name} | settings


def identifying_settings(section: str, value: Any) -> dict[str, Any]:
    """Return `number_settings` by which results are known: fields marked `LATER` if not default."""
    later = {field.name: field.default for field in dataclasses.fields(value)
             if limits.is_later(field.type)}  # fmt: skip
    settings = number_settings(section, value)
    return {
        name: setting
        for name, setting in settings.items()
        if name not in later or setting != later[name]
    }


def all_settings(
    config: Mapping[str, Any], config_file: epath.PathLike | None = None
) -> dict[str, Any]:
    """Return every setting of a config that changes numbers, by dotted key, defaults included."""
    experiment = build(config, config_file)
    settings: dict[str, Any] = {}
    for field in dataclasses.fields(Experiment):
        section, value = field.name, getattr(experiment, field.name)
        if limits.is_resumable(field.type):
            continue
        if dataclasses.is_dataclass(value):
            for name, setting in number_settings(section, value).items():
                settings[f"{section}.{name}"] = setting
        else:
            settings[section] = value
    return settings
