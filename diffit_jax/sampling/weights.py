"""Networks in files of weights: their layouts, their configs, and what they predict."""

import logging
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from diffit_jax.data.labels import synonyms_of
from diffit_jax.errors import UserError
from diffit_jax.interop import official, songunet, weight_files
from diffit_jax.run import workdir as workdirs
from diffit_jax.run.state import Setup
from diffit_jax.runtime import config_files, hub
from diffit_jax.sampling.sampler import Variables

log = logging.getLogger(__name__)

# What a file that `convert` has written carries of its run: its config, and the names of classes.
CONFIG_CARRIED, CLASSES_CARRIED = "diffit_jax_config", "diffit_jax_classes"


class Weights:
    """A network in a file of released weights, with a config whose `model` has the file's sizes."""

    config_file = None
    differences: Mapping[str, Any] = {}

    def __init__(
        self, path: epath.PathLike, config: Mapping[str, Any], allow_nonfinite: bool = False
    ):
        """Read the names and shapes of the tensors.

        Args:
          path: of the file.
          config: for everything but the sizes of the model.
          allow_nonfinite: whether the tensors may have NaNs or infinities.
        """
        self._path, self._allow_nonfinite = hub.local(path, "weights"), allow_nonfinite
        self.name = f"weights {self._path}"
        self.directory = hub.output_directory(path, self._path)
        self._layout = layout_of(self._path)
        check_process(self._path, config)
        self.config = self._layout.fit_config(config, self._path)
        carried = weight_files.read_metadata(self._path, CLASSES_CARRIED)
        self.classes = synonyms_of(carried) if carried else workdirs.read_classes(None, self.config)

    def load(self, setup: Setup) -> tuple[Variables, dict[str, Any]]:
        """Load (variables, their origin)."""
        shardings = jax.tree.map(lambda leaf: leaf.sharding, setup.variables)
        _, variables = self._layout.load(
            self._path, sharding=shardings, allow_nonfinite=self._allow_nonfinite
        )
        return variables, {"weights": str(self._path)}


def layout_of(weights: epath.PathLike) -> Any:
    """Return the module of `interop` that reads a file of weights: `official` or `songunet`."""
    return songunet if songunet.is_song_unet(weights) else official


def config_for_weights(
    config: ConfigDict | None, weights: str, input_size: int | None = None
) -> dict[str, Any]:
    """Return the config for weights: the one given, that of the file, or of its size in `configs/`.

    Args:
      config: as it is given, None if it is not.
      weights: file of weights.
      input_size: side of the latents, if not that of the file.
    """
    if config is not None:
        return config.to_dict()
    carried = weight_files.read_metadata(weights, CONFIG_CARRIED)
    if carried is not None and input_size is None:
        return carried
    if layout_of(weights) is songunet:
        file = config_files.own("cifar10_songunet.py", "--config")
        log.info("sampling as %s says, by the layers of the file; --config names another", file)
        return config_files.load(f"{file}:{songunet.process_of(weights)}").to_dict()
    size = official.read_input_size(weights) if input_size is None else input_size
    name = "imagenet256_latent" if size <= 32 else "imagenet512_latent"
    log.info("sampling as configs/%s.py says, by the size of %s; --config names another", name,
             epath.Path(weights).name)  # fmt: skip
    return config_files.load(str(config_files.own(f"{name}.py", "--config"))).to_dict()


# How a map's network is told its second time; not to be seen in its parameters.
OF_MAP = {"end_time_in": "none", "end_time_from": 0, "guidance_in": "none"}
# What of a process a network is made for, and cannot be told otherwise.
OF_FLOW = {"prediction": "velocity", "clock": "t", "path": "linear", "sigma_data": 1.0}
_OF_NETWORK = {
    "flow": OF_FLOW,
    "flow_map": OF_FLOW,
    "ddpm": {"schedule": "linear", "num_timesteps": 1000},
}


def process_of(weights: epath.PathLike) -> Mapping[str, Any]:
    """Return the section `process` of a file's run, as far as the file tells.

    The released layout, without a config that it carries, is ADM's.
    """
    carried = weight_files.read_metadata(weights, CONFIG_CARRIED)
    if isinstance(carried, Mapping) and isinstance(carried.get("process"), Mapping):
        return carried["process"]
    known = "ddpm" if layout_of(weights) is official else songunet.process_of(weights)
    return {"name": known}


def check_process(weights: epath.PathLike, config: Mapping[str, Any]) -> None:
    """Raise `UserError` if a config's process is another than the one that the weights are for."""
    theirs, ours = process_of(weights), config.get("process", {})
    known, asked = theirs.get("name"), ours.get("name")
    if known != asked and {"flow", "flow_map"} & {known, asked}:
        makes = {("ddpm", "flow"): "flow", ("ddpm", "flow_map"): "map", ("flow", "flow_map"): "map"}
        made = makes.get((str(known), str(asked)))
        remedy = f"diffit convert makes a {made} of it" if made else "use its own config"
        raise UserError(
            f"weights {weights} are of the process {known}, and the config has {asked}: {remedy}"
        )
    for key, default in _OF_NETWORK.get(str(known), {}).items() if known == asked else ():
        one, other = theirs.get(key, default), ours.get(key, default)
        if one != other:
            raise UserError(
                f"weights {weights} are of a network with process.{key} {one}, and the config has "
                f"{other}: set it to {one}"
            )
    carried = weight_files.read_metadata(weights, CONFIG_CARRIED)
    if known == asked == "flow_map" and isinstance(carried, Mapping):
        for key, usual in OF_MAP.items():
            one, other = (each["model"].get(key, usual) for each in (carried, config))
            if one != other:
                raise UserError(
                    f"weights {weights} are of a network with model.{key} {one}, and the config "
                    f"has {other}: set it to {one}"
                )
