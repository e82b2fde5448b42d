"""DINOv2's weights: the released `.pth`, the hub's safetensors, and timm's.

    dinov2_vitb14_pretrain.pth                  names of the released code
    hf://facebook/dinov2-base                   a folder with config.json and model.safetensors
    hf://timm/vit_base_patch14_dinov2.lvd142m   the same, with timm's names

All are read under the released names, below which there is one table. Of a pickle only tensors are
read, see `torch_files`.
"""

import itertools
import json
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

from diffit_jax import models
from diffit_jax.errors import UserError, one_line
from diffit_jax.interop import tensors
from diffit_jax.interop.tensors import Leaf, Tensors
from diffit_jax.interop.torch_files import TorchFile
from diffit_jax.interop.weight_files import WeightFiles
from diffit_jax.models.pretrained.dinov2 import ENCODERS, DINOv2
from diffit_jax.runtime import hub

DIGITS = "digits"  # in place of a path: the stand-in
DIGITS_FILE = epath.Path(Path(__file__).with_name("digits_encoder.safetensors"))
WEIGHTS, CONFIG = "model.safetensors", "config.json"
FILES = (CONFIG, WEIGHTS)  # of a folder on the hub
_KIND = "DINOv2"
log = logging.getLogger(__name__)
_REMEDY = "name dinov2_vit{s,b,l,g}14[_reg4]_pretrain.pth, or hf://facebook/dinov2-{small,base,large,giant}"
# Not of the network, or unused in it.
_OTHERS = re.compile(r"mask_token|(dino_head|ibot_head|head|classifier)\..*")
_HUB = {
    r"embeddings\.(cls_token|mask_token|register_tokens)": r"\1",
    r"embeddings\.position_embeddings": "pos_embed",
    r"embeddings\.patch_embeddings\.projection\.": "patch_embed.proj.",
    r"encoder\.layer\.(\d+)\.": r"blocks.\1.",
    r"attention\.output\.dense\.": "attn.proj.",
    r"layer_scale(\d)\.lambda1": r"ls\1.gamma",
    r"mlp\.weights_in\.": "mlp.w12.",
    r"mlp\.weights_out\.": "mlp.w3.",
    r"^layernorm\.": "norm.",
}
_PARTS = ("query", "key", "value")  # of the hub, in the order of the released `qkv`


def load(
    path: epath.PathLike,
    *,
    size: str = "",
    positions: str = "official",
    dtype: Any = np.float32,
    sharding: jax.sharding.Sharding | None = None,
    flag: str = "representation.encoder_weights",
) -> tuple[DINOv2, dict[str, Any]]:
    """Read a network.

    Args:
      path: see the top of this file; also safetensors with any of these names. `DIGITS` is a small
        network that was trained on digits' labels, and stands in for DINOv2 there, and to try
        commands: scores in its features have no meaning.
      size: name in `ENCODERS` that the file has to be of; "": any.
      positions: how positions come to other grids, a name in `models.pretrained.dinov2.POSITIONS`.
      dtype: of the matrix products, float32 or bfloat16.
      sharding: where the arrays go; None: the default device.
      flag: that names the path, for errors.

    Returns:
      The module, as large as the file's, and its variables, `params` in float32.

    Raises:
      UserError: a file that cannot be read, of another size, or with tensors that are missing,
        extra, misshapen or not finite (each named, at most ten).
    """
    if os.fspath(path) == DIGITS:
        log.warning("the encoder is a small stand-in, trained on digits: it is not DINOv2")
        path = DIGITS_FILE
    path = epath.Path(hub.local(path, flag, FILES))
    weights = path / WEIGHTS if path.is_dir() else path
    opened = TorchFile(weights) if weights.suffix in (".pth", ".pt") else WeightFiles(weights, ".*")
    with opened as raw:
        file = _Renamed(raw)
        config = _config(path)
        module = _module_of(file, weights, config).clone(positions=positions, dtype=dtype)
        if size and not _alike(ENCODERS[size], module):
            raise UserError(
                f"encoder weights {path} are of {name_of(module) or 'another network'} (width "
                f"{module.width}, {module.depth} blocks, {module.registers} registers), the config "
                f"asks for {size}: name that file, or change the encoder"
            )
        expected = tensors.names_of(_table(module), module.depth)
        tensors.match_names(weights, _KIND, expected, file.shapes, hint=file.hint, remedy=_REMEDY)
        leaves = _leaves_of(module)
        tensors.check(weights, _KIND, leaves, file, _REMEDY)

        def place(leaf: Leaf, array: np.ndarray) -> jax.Array:
            return jax.device_put(array, sharding)

        return module, tensors.read(file, leaves, place, str(weights), remedy="use other weights")


def name_of(module: DINOv2) -> str:
    """Return the name in `ENCODERS` of a network, whatever its positions and dtype; "" if none."""
    plain = module.clone(positions="official", dtype=np.float32)
    return next((name for name, one in ENCODERS.items() if _alike(one, plain)), "")


def _alike(one: DINOv2, other: DINOv2) -> bool:
    return one.clone(positions=other.positions, dtype=other.dtype) == other


class _Renamed:
    """The tensors of a file under the released names."""

    def __init__(self, file: Tensors):
        self._file, self.hint = file, file.hint
        self._sources: dict[str, list[str]] = {}
        for name in tensors.in_order(file.shapes):
            released = _released(name)
            if _OTHERS.fullmatch(released):
                continue
            part = re.fullmatch(r"(blocks\.\d+\.)attention\.attention\.(\w+)\.(\w+)", released)
            if part and part[2] in _PARTS:
                released = f"{part[1]}attn.qkv.{part[3]}"
                three = self._sources.setdefault(released, [""] * len(_PARTS))
                three[_PARTS.index(part[2])] = name
            else:
                self._sources[released] = [name]
        for released, names in list(self._sources.items()):
            if "" in names:
                del self._sources[released]
        self._rename_gated()
        self.dtypes = {name: file.dtypes[names[0]] for name, names in self._sources.items()}
        self.shapes = {name: self._shape(name) for name in self._sources}
        # Of timm, with registers: the class token has its position in it already.
        place = self.shapes.get("pos_embed", ())
        self._placed = len(place) == 3 and round(place[1] ** 0.5) ** 2 == place[1]
        if self._placed:
            self.shapes["pos_embed"] = (1, place[1] + 1, place[2])

    def _rename_gated(self) -> None:
        """Give timm's SwiGLU, whose first matrix makes two halves, its released names."""
        first = self._sources.get("blocks.0.mlp.fc1.weight")
        second = self._sources.get("blocks.0.mlp.fc2.weight")
        if not first or not second:
            return
        one, two = (self._file.shapes[names[0]] for names in (first, second))
        if len(one) == len(two) == 2 and one[0] == 2 * two[1]:
            for name in list(self._sources):
                renamed = name.replace("mlp.fc1.", "mlp.w12.").replace("mlp.fc2.", "mlp.w3.")
                self._sources[renamed] = self._sources.pop(name)

    def _shape(self, name: str) -> tuple[int, ...]:
        first, *others = (self._file.shapes[each] for each in self._sources[name])
        return (sum((one[0] for one in others), first[0]), *first[1:]) if others else first

    def tensor(self, name: str) -> np.ndarray:
        """Read one tensor."""
        parts = [self._file.tensor(each) for each in self._sources[name]]
        array = np.concatenate(parts) if len(parts) > 1 else parts[0]
        if name == "pos_embed" and self._placed:
            array = np.concatenate([np.zeros_like(array[:, :1]), array], axis=1)
        return array


def _released(name: str) -> str:
    """Return the released name of a tensor of any of the formats."""
    name = re.sub(r"^(teacher\.|module\.)*(backbone\.|dinov2\.|model\.)?", "", name)
    name = re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name)  # in chunks, as they are trained
    for pattern, released in _HUB.items():
        name = re.sub(pattern, released, name)
    return name.replace("reg_token", "register_tokens")


def _config(path: epath.Path) -> dict[str, Any]:
    """Return the config beside the weights; {} if there is none."""
    beside = path / CONFIG if path.is_dir() else path.with_suffix(".config.json")
    if not beside.exists():
        return {}
    try:
        return dict(json.loads(beside.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{beside} cannot be read ({one_line(error, 100)}): fetch it again"
        ) from error


def _module_of(file: _Renamed, path: epath.Path, config: Mapping[str, Any]) -> DINOv2:
    """Return the network that a file's tensors are of, by their shapes."""
    shapes = file.shapes
    blocks = {int(block[1]) for name in shapes if (block := re.match(r"blocks\.(\d+)\.", name))}
    depth = next(number for number in itertools.count() if number not in blocks)
    place, patches = shapes.get("pos_embed", ()), shapes.get("patch_embed.proj.weight", ())
    gated = "blocks.0.mlp.w12.weight" in shapes
    last = f"blocks.0.mlp.{'w3' if gated else 'fc2'}.weight"
    inner = shapes.get(last, ())
    registers = shapes.get("register_tokens", (1, 0, 0))
    needed = {
        "pos_embed": (place, 3),
        "patch_embed.proj.weight": (patches, 4),
        last: (inner, 2),
        "register_tokens": (registers, 3),
    }
    wrong = [
        f"misshapen {name} {shape}, which must have {rank} axes" if shape else f"missing {name}"
        for name, (shape, rank) in needed.items()
        if len(shape) != rank or 0 in shape[:1] or (name == "pos_embed" and 0 in shape)
    ]
    if not depth or wrong:
        known = {"cls_token", *needed}
        others = [name for name in shapes if name not in known and not name.startswith("blocks.")]
        some = [f"extra {name}" for name in tensors.in_order(others)[:5]] if not depth else []
        tensors.refuse(path, _KIND, wrong, others=some, hint=file.hint, remedy=_REMEDY)
    width, grid = place[2], round((place[1] - 1) ** 0.5)
    names = ("num_attention_heads", "num_heads")
    heads = next((config[name] for name in names if name in config), max(width // 64, 1))
    said = config.get("num_register_tokens", registers[1])
    if said != registers[1]:
        raise UserError(
            f"encoder weights {path} have {registers[1]} register tokens, and their config says "
            f"{said}: fetch both again"
        )
    if type(heads) is not int or heads < 1 or width % heads or grid**2 + 1 != place[1]:
        raise UserError(
            f"encoder weights {path} have {width} channels in {heads} attention heads and "
            f"{place[1]} positions, which cannot be: name DINOv2's files, with their own config"
        )
    return DINOv2(
        width=width,
        depth=depth,
        num_heads=heads,
        hidden=inner[1],
        gated=gated,
        registers=registers[1],
        grid=grid,
        patch=patches[-1],
    )


def _table(module: DINOv2) -> tensors.Table:
    """Released name → (path of ours, axes of theirs in the order of ours)."""
    first, last = ("w12", "w3") if module.gated else ("fc1", "fc2")
    linear = {
        "blocks.{}.attn.qkv": "blocks/qkv",
        "blocks.{}.attn.proj": "blocks/project",
        f"blocks.{{}}.mlp.{first}": "blocks/mlp_in",
        f"blocks.{{}}.mlp.{last}": "blocks/mlp_out",
    }
    norms = {
        "blocks.{}.norm1": "blocks/norm_attention",
        "blocks.{}.norm2": "blocks/norm_mlp",
        "norm": "norm",
    }
    table: dict[str, tuple[str, tuple[int, ...] | None]] = {
        "cls_token": ("params/class_token", None),
        "pos_embed": ("params/pos_embed", None),
        "patch_embed.proj.weight": ("params/patch_embed/kernel", (2, 3, 1, 0)),
        "patch_embed.proj.bias": ("params/patch_embed/bias", None),
        "blocks.{}.ls1.gamma": ("params/blocks/scale_attention", None),
        "blocks.{}.ls2.gamma": ("params/blocks/scale_mlp", None),
    }
    if module.registers:
        table["register_tokens"] = ("params/register_tokens", None)
    for theirs, ours in linear.items():
        table[f"{theirs}.weight"] = (f"params/{ours}/kernel", (1, 0))
        table[f"{theirs}.bias"] = (f"params/{ours}/bias", None)
    for theirs, ours in norms.items():
        table[f"{theirs}.weight"] = (f"params/{ours}/scale", None)
        table[f"{theirs}.bias"] = (f"params/{ours}/bias", None)
    return table


def _leaves_of(module: DINOv2) -> list[Leaf]:
    """List a network's arrays, with the tensors' names and shapes."""
    shapes = models.variable_shapes(module, (module.patch, module.patch, 3))
    width = module.width
    theirs = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 1 + module.grid**2, width),
        "register_tokens": (1, module.registers, width),
        "patch_embed.proj.weight": (width, 3, module.patch, module.patch),
    }
    return tensors.leaves_of(_table(module), shapes, module.depth, theirs)


def released_tensors(module: DINOv2, variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return the tensors of a network under their released names, float32: inverts `load`."""
    found: dict[str, np.ndarray] = {}
    for leaf in _leaves_of(module):
        array = np.asarray(tensors.at(variables, leaf.path), np.float32)
        for layer, name in enumerate(leaf.names):
            found[name] = leaf.to_theirs(array[layer] if leaf.stacked else array)
    return found
