"""Autoencoders as diffusers saves its `AutoencoderKL`, into `Autoencoder`, and back.

A folder with `config.json` and safetensors; arrays carry over number for number. Keys that a config
leaves out take diffusers' defaults. Attention may be named as today (`to_q`) or as in files of
before 2023 (`query`).
"""

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from etils import epath

from diffit_jax import models
from diffit_jax.errors import UserError, one_line
from diffit_jax.interop import tensors
from diffit_jax.interop.tensors import Leaf
from diffit_jax.interop.weight_files import DIGEST, NO_DIGEST, WeightFiles
from diffit_jax.models.pretrained.autoencoder import Autoencoder
from diffit_jax.runtime import files
from diffit_jax.runtime.console import first_few

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model"
_DEFAULTS = {  # of AutoencoderKL's constructor, diffusers 0.42.1
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"],
    "block_out_channels": [64],
    "layers_per_block": 1,
    "act_fn": "silu",
    "latent_channels": 4,
    "norm_num_groups": 32,
    "scaling_factor": 0.18215,
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}
# What another value of would make another network.
_ONLY = {"_class_name": ("AutoencoderKL",), "act_fn": ("silu", "swish")}
_BLOCKS = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}
_STATISTICS = ("shift_factor", "latents_mean", "latents_std")  # which may be null
_CONV, _LINEAR, _SAME = (2, 3, 1, 0), (1, 0), None
_KIND = "this autoencoder"
_REMEDY = "name the files of diffusers' AutoencoderKL that belong to this config"
# Older name of a part of attention → today's.
_OLDER = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def load(
    path: epath.PathLike, dtype: Any = jnp.float32, sharding: jax.sharding.Sharding | None = None
) -> tuple[Autoencoder, dict[str, Any]]:
    """Read an autoencoder.

    Args:
      path: a folder as diffusers saves it (or the folder of a pipeline, whose `vae` is taken), or a
        safetensors file with its config next to it, as `config.json` or under its own name
        (`NAME.config.json`).
      dtype: of its convolutions.
      sharding: where the arrays go; None: the default device.

    Returns:
      The module, with the scaling of its latents, and its variables, `params` in float32.

    Raises:
      UserError: no such files, another kind of network, or tensors that are missing, extra,
        misshapen or not finite (each named, at most ten).
    """
    config_path, weights_path = _places(epath.Path(path))
    module = read_config(config_path).clone(dtype=dtype)
    module.check()
    table = _table(module)
    older = {_older(name): name for name in table}
    names = "|".join(map(re.escape, {*table, *older}))
    with WeightFiles(weights_path, names) as file:
        renamed = {older.get(name, name): name for name in file.shapes}
        tensors.match_names(weights_path, _KIND, table, renamed, hint=file.hint, remedy=_REMEDY)
        side = module.factor
        shapes = models.variable_shapes(module, (side, side, module.image_channels))
        leaves = [
            _as_in_file(leaf, renamed, file.shapes)
            for leaf in tensors.leaves_of(table, shapes, 0, {})
        ]
        tensors.check(weights_path, _KIND, leaves, file, _REMEDY)

        def place(leaf: Leaf, array: np.ndarray) -> jax.Array:
            return jax.device_put(array, sharding)

        return module, tensors.read(file, leaves, place, str(weights_path), remedy="use another")


def save(folder: epath.PathLike, module: Autoencoder, variables: Mapping[str, Any]) -> None:
    """Write an autoencoder as a folder that diffusers and `load` read.

    float32, with diffusers' names and shapes. Each file appears when it is complete, `config.json`
    last.

    Args:
      folder: local or `gs://`; it is made if need be.
      module: the autoencoder, with the scaling of its latents.
      variables: its `params`.
    """
    folder = epath.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for name, (path, axes) in _table(module).items():
        array = np.asarray(tensors.at(variables, path), np.float32)
        array = array if axes is None else array.transpose(np.argsort(axes))
        if name.endswith(("quant_conv.weight", "conv_shortcut.weight")):  # 1×1 convolutions there
            array = array[..., None, None]
        arrays[name] = np.ascontiguousarray(array)
    content = safetensors.numpy.save(arrays, {"format": "pt", DIGEST: NO_DIGEST})
    digest = hashlib.sha256(content[8:]).hexdigest()
    content = content.replace(NO_DIGEST.encode(), digest.encode(), 1)
    files.write_bytes(folder / f"{WEIGHTS}.safetensors", content)
    config = json.dumps(_config_of(module), indent=2) + "\n"
    files.write_bytes(folder / CONFIG, config.encode())


def _config_of(module: Autoencoder) -> dict[str, Any]:
    """Return the content of a `config.json`, the inverse of `read_config`."""
    stages = len(module.channels)
    config = _DEFAULTS | {
        "_class_name": _ONLY["_class_name"][0],
        "in_channels": module.image_channels,
        "out_channels": module.image_channels,
        **{key: [block] * stages for key, block in _BLOCKS.items()},
        "block_out_channels": list(module.channels),
        "layers_per_block": module.num_blocks,
        "latent_channels": module.latent_channels,
        "norm_num_groups": module.num_groups,
        "mid_block_add_attention": module.attention,
        "use_quant_conv": module.quant_conv,
        "use_post_quant_conv": module.post_quant_conv,
    }
    mean, scale = module.latent_mean, module.latent_scale
    if len(mean) == len(scale) == 1:
        return config | {"shift_factor": mean[0], "scaling_factor": scale[0]}
    channels = module.latent_channels
    return config | {
        "latents_mean": np.broadcast_to(mean, channels).tolist(),
        "latents_std": (1 / np.broadcast_to(scale, channels)).tolist(),
    }


def read_config(path: epath.Path) -> Autoencoder:
    """Return the module that a `config.json` describes.

    Raises:
      UserError: it cannot be read, or describes another kind of network.
    """
    try:
        given = json.loads(path.read_text())
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror or error}): make it readable, or name another"
        ) from error
    except (ValueError, RecursionError) as error:
        reason = one_line(error, 100)
        raise UserError(f"{path} is not a JSON config ({reason}): fetch it again") from error
    if not isinstance(given, Mapping):
        raise UserError(f"{path} is not a JSON object: name the config of an autoencoder")
    # Refuse what would load and compute something else.
    config = _DEFAULTS | dict(given)
    _check_values(path, config)
    for key, known in _ONLY.items():
        if config.get(key, known[0]) not in known:
            raise UserError(
                f"{path} has {key} {config[key]!r}: only {' or '.join(known)} can be loaded"
            )
    for key, known in _BLOCKS.items():
        others = sorted({str(block) for block in config[key]} - {known})
        if others:
            raise UserError(
                f"{path} has {key} {', '.join(others)}: only autoencoders of {known} can be loaded"
            )
        if len(config[key]) != len(config["block_out_channels"]):
            raise UserError(
                f"{path} has {len(config[key])} {key} and {len(config['block_out_channels'])} "
                "block_out_channels: fetch it again"
            )
    if config["in_channels"] != config["out_channels"]:
        raise UserError(f"{path} has in_channels and out_channels that differ: that is not known")
    # The remaining keys are sizes.
    mean, scale = _scaling(path, config)
    return Autoencoder(
        channels=tuple(config["block_out_channels"]),
        num_blocks=config["layers_per_block"],
        latent_channels=config["latent_channels"],
        image_channels=config["in_channels"],
        num_groups=config["norm_num_groups"],
        attention=config["mid_block_add_attention"],
        quant_conv=config["use_quant_conv"],
        post_quant_conv=config["use_post_quant_conv"],
        latent_mean=mean,
        latent_scale=scale,
    )


def _check_values(path: epath.Path, config: Mapping[str, Any]) -> None:
    """Raise `UserError` for a key whose value cannot be: null, of another type, or no size."""
    for key, default in _DEFAULTS.items():
        value = config[key]
        if key in _STATISTICS:
            listed = value if isinstance(value, list) else [value]
            wanted, good = "null or finite numbers", value is None or all(map(_is_number, listed))
            good = good and (key != "latents_std" or value is None or min(listed) > 0)
        elif isinstance(default, bool):
            wanted, good = "true or false", isinstance(value, bool)
        elif isinstance(default, str):
            wanted, good = "a name", isinstance(value, str)
        elif key == "scaling_factor":
            wanted, good = "a positive number", _is_number(value) and value > 0
        elif isinstance(default, int):
            wanted, good = "a whole number of at least 1", _is_size(value)
        else:
            kind = _is_size if key == "block_out_channels" else lambda one: isinstance(one, str)
            wanted = "a list of " + ("sizes" if key == "block_out_channels" else "names")
            good = isinstance(value, list) and len(value) > 0 and all(map(kind, value))
        if not good:
            shown = json.dumps(value)
            raise UserError(
                f"{path} has {key} {shown:.40}, wanted is {wanted}: correct it, or leave the key "
                "out where diffusers' default is meant"
            )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**20


def _scaling(
    path: epath.Path, config: Mapping[str, Any]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return `latent_mean` and `latent_scale`.

    By channel where the config has both statistics of the channels, else by one number.
    """
    mean, std = config["latents_mean"], config["latents_std"]
    if mean is None or std is None:
        return (float(config["shift_factor"] or 0),), (float(config["scaling_factor"]),)
    for key in ("latents_mean", "latents_std"):
        if np.size(config[key]) != config["latent_channels"]:
            raise UserError(
                f"{path} has {np.size(config[key])} {key} for {config['latent_channels']} "
                "latent_channels: fetch it again"
            )
    return tuple(np.ravel(mean).tolist()), tuple((1 / np.ravel(std)).tolist())


def _places(path: epath.Path) -> tuple[epath.Path, epath.Path]:
    """Find the files of config and weights."""
    if not path.is_dir():
        candidates = [path.with_name(f"{path.stem}.config.json"), path.with_name(CONFIG)]
        config = next((place for place in candidates if place.exists()), None)
        if not path.exists() or config is None:
            what = "is not there" if not path.exists() else f"has no {CONFIG} beside it"
            raise UserError(f"autoencoder {path} {what}: name a folder as diffusers saves it")
        return config, path
    if not (path / CONFIG).exists() and (path / "vae" / CONFIG).exists():
        path = path / "vae"
    names = [f"{WEIGHTS}{end}" for end in (".safetensors", ".safetensors.index.json")]
    names.append(f"{WEIGHTS}.fp16.safetensors")
    weights = next((path / name for name in names if (path / name).exists()), None)
    if weights is None:  # of another name: diffusers knows variants, and people rename
        others = sorted(path.glob("*.safetensors"), key=str)
        if len(others) > 1:
            raise UserError(
                f"autoencoder {path} has {first_few([other.name for other in others])}, and no "
                f"{names[0]}: name the file instead of the folder"
            )
        weights = others[0] if others else None
    if not (path / CONFIG).exists() or weights is None:
        lacking = CONFIG if weights is not None else names[0]
        pickled = sorted(
            other.name for end in ("bin", "ckpt", "pth") for other in path.glob(f"*.{end}")
        )
        instead = f", but {pickled[0]}, a pickle: save it as safetensors, or" if pickled else ":"
        if lacking == CONFIG:
            instead = ":"
        raise UserError(
            f"autoencoder {path} has no {lacking}{instead} name a folder as diffusers saves it"
        )
    return path / CONFIG, weights


_Table = dict[str, tuple[str, tuple[int, ...] | None]]


def _layer(theirs: str, ours: str, axes: tuple[int, ...]) -> _Table:
    return {
        f"{theirs}.weight": (f"params/{ours}/kernel", axes),
        f"{theirs}.bias": (f"params/{ours}/bias", _SAME),
    }


def _norm(theirs: str, ours: str) -> _Table:
    return {
        f"{theirs}.weight": (f"params/{ours}/scale", _SAME),
        f"{theirs}.bias": (f"params/{ours}/bias", _SAME),
    }


def _block(theirs: str, ours: str, shortcut: bool) -> _Table:
    table: _Table = {}
    for number in (1, 2):
        table |= _norm(f"{theirs}.norm{number}", f"{ours}/norm_{number}")
        table |= _layer(f"{theirs}.conv{number}", f"{ours}/conv_{number}", _CONV)
    return table | (
        _layer(f"{theirs}.conv_shortcut", f"{ours}/shortcut", _LINEAR) if shortcut else {}
    )


def _table(module: Autoencoder) -> _Table:
    """Name in the file → (path of ours, axes of theirs in the order of ours)."""
    table: _Table = {}
    for half in ("encoder", "decoder"):
        table |= _layer(f"{half}.conv_in", f"{half}/conv_in", _CONV)
        for number in (0, 1):
            ours = f"{half}/middle/block_{number}"
            table |= _block(f"{half}.mid_block.resnets.{number}", ours, False)
        if module.attention:
            theirs, ours = f"{half}.mid_block.attentions.0", f"{half}/middle/attention"
            table |= _norm(f"{theirs}.group_norm", f"{ours}/norm")
            for name, other in zip(("q", "k", "v", "out"), _OLDER.values(), strict=True):
                table |= _layer(f"{theirs}.{other}", f"{ours}/{name}", _LINEAR)
        table |= _norm(f"{half}.conv_norm_out", f"{half}/norm_out")
        table |= _layer(f"{half}.conv_out", f"{half}/conv_out", _CONV)
    for stage in range(len(module.channels)):
        table |= _stage(module, stage)
    if module.quant_conv:
        table |= _layer("quant_conv", "encoder/quant", _LINEAR)
    if module.post_quant_conv:
        table |= _layer("post_quant_conv", "decoder/quant", _LINEAR)
    return table


def _stage(module: Autoencoder, stage: int) -> _Table:
    """Return the table of one resolution, on the way down and up."""
    channels, last = tuple(module.channels), len(module.channels) - 1
    down, up = f"encoder.down_blocks.{stage}", f"decoder.up_blocks.{last - stage}"
    table: _Table = {}
    for half, theirs, count, entering in (
        ("encoder", down, module.num_blocks, channels[max(stage - 1, 0)]),
        ("decoder", up, module.num_blocks + 1, channels[min(stage + 1, last)]),
    ):
        for number in range(count):
            changes = number == 0 and entering != channels[stage]
            ours = f"{half}/stage_{stage}_block_{number}"
            table |= _block(f"{theirs}.resnets.{number}", ours, changes)
    if stage < last:
        table |= _layer(f"{down}.downsamplers.0.conv", f"encoder/down_{stage + 1}/conv", _CONV)
    if stage:
        table |= _layer(f"{up}.upsamplers.0.conv", f"decoder/up_{stage}/conv", _CONV)
    return table


def _older(name: str) -> str:
    """Return the name that a tensor had in files of before 2023."""
    for old, new in _OLDER.items():
        name = name.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
    return name


def _as_in_file(
    leaf: Leaf, renamed: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]
) -> Leaf:
    """Return a leaf under its tensor's name in the file; a matrix may be a 1×1 convolution."""
    (name,) = leaf.names
    shape, leaf = shapes[renamed[name]], dataclasses.replace(leaf, names=[renamed[name]])
    if len(leaf.theirs) == 2 and shape == (*leaf.theirs, 1, 1):
        return dataclasses.replace(leaf, theirs=shape, axes=(*leaf.axes, 2, 3))
    return leaf
