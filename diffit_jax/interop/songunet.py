"""EDM's weights of DDPM++ and NCSN++ in, number for number: safetensors, or EDM's own `.pkl`.

Tensors have the names of EDM's modules, perhaps behind the `model.` of a preconditioned network.
Every size is inferred from them; the head is always one, and dropout is the config's.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from diffit_jax import models
from diffit_jax.errors import UserError
from diffit_jax.interop import tensors
from diffit_jax.interop.edm_pickle import EdmPickle
from diffit_jax.interop.tensors import Leaf
from diffit_jax.interop.weight_files import WeightFiles
from diffit_jax.models.unet.songunet import FAMILIES, SongUNet

_KIND = "EDM's DDPM++ or NCSN++"
_NAMES = r"map_\w+\.\w+|(?:enc|dec)\.\d+x\d+_\w+(?:\.\w+)*"
_FILTER = ".resample_filter"  # a buffer, which follows from the family
_SIZES = (
    "image_size",
    "image_channels",
    "channels",
    "channel_mults",
    "embedding_mult",
    "num_blocks",
    "attention_sizes",
    "family",
    "num_classes",
    "augment_labels",
    "tmsa",
)


def is_song_unet(path: epath.PathLike) -> bool:
    """Whether a file looks like one of these: a `.pkl`, or safetensors with their names."""
    if epath.Path(path).suffix == ".pkl":
        return True
    with WeightFiles(path, _NAMES) as file:
        return any(re.fullmatch(r"enc\.\d+x\d+_conv\.weight", name) for name in file.shapes)


def process_of(path: epath.PathLike) -> str:
    """Return the process that a file's network was trained for: "vp", "ve" or "edm".

    A `.pkl` says it; a safetensors file is taken for EDM's.
    """
    with _open(path) as file:
        return {"VPPrecond": "vp", "VEPrecond": "ve"}.get(getattr(file, "kind", ""), "edm")


def load(
    path: epath.PathLike,
    sharding: jax.sharding.Sharding | Mapping[str, Any] | None = None,
    allow_nonfinite: bool = False,
    **attributes: Any,
) -> tuple[SongUNet, dict[str, Any]]:
    """Read a file of weights; nothing that a pickle names is run.

    Args:
      path: a local or mounted file: safetensors (or the index of several), or EDM's `.pkl`, of
        whose networks the average is taken.
      sharding: where the arrays go, one for all or a tree like the variables; None: the default
        device.
      allow_nonfinite: whether there may be NaNs and infinities.
      **attributes: further attributes of `SongUNet` that do not change the parameters.

    Returns:
      The module and its variables, `params` and `constants`, float32 `jax.Array`s.

    Raises:
      UserError: not such a file, a truncated one, or one with missing, extra, misshapen or
        non-finite tensors (each named, at most ten).
    """
    with _open(path) as file:
        module = _infer_module(path, file).clone(**attributes)
        module.check()
        leaves = leaves_of(module)
        _check_names(path, file, module, leaves)
        tensors.check(path, _KIND, leaves, file)

        def place(leaf: Leaf, array: np.ndarray) -> jax.Array:
            return tensors.put(array, leaf, sharding)

        variables = tensors.read(file, leaves, place, str(path), allow_nonfinite)
        return module, {"constants": {}, **variables}


def fit_config(config: Mapping[str, Any], path: epath.PathLike) -> dict[str, Any]:
    """Return `config` with the sizes of a file in its section `model`; only names are read.

    A file without augmentation labels takes the section `augmentation` away: such a network cannot
    be told.

    Raises:
      UserError: as `load`, or a config without a section `model`.
    """
    if not isinstance(config.get("model"), Mapping):
        raise UserError("the config has no section model: use one like configs/cifar10_songunet.py")
    with _open(path) as file:
        module = _infer_module(path, file)
    kept = {
        name: value
        for name, value in config["model"].items()
        if name in SongUNet.__dataclass_fields__ and name not in _SIZES and name != "name"
    }
    sizes = {name: getattr(module, name) for name in _SIZES}
    fitted = {**config, "model": {"name": "songunet", **sizes, **kept}}
    if not module.augment_labels:
        fitted.pop("augmentation", None)
    return fitted


def _open(path: epath.PathLike) -> WeightFiles | EdmPickle:
    return EdmPickle(path) if epath.Path(path).suffix == ".pkl" else WeightFiles(path, _NAMES)


def _infer_module(path: epath.PathLike, file: tensors.Tensors) -> SongUNet:
    """Infer the module from names, and from the shapes of a few tensors."""
    shapes = file.shapes

    def shape_of(name: str, rank: int) -> tuple[int, ...]:
        if name not in shapes:
            tensors.refuse(path, _KIND, [f"missing {name}"], hint=file.hint)
        if len(shapes[name]) != rank or not all(shapes[name]):
            problem = f"misshapen {name} {shapes[name]}, which must have {rank} axes"
            tensors.refuse(path, _KIND, [problem])
        return shapes[name]

    firsts = [name for name in shapes if re.fullmatch(r"enc\.(\d+)x\1_conv\.weight", name)]
    first = max(firsts, default="enc.32x32_conv.weight", key=len)
    channels, image_channels = shape_of(first, 4)[:2]
    side = int(re.findall(r"\d+", first)[0])
    blocks = [re.fullmatch(r"enc\.(\d+)x\1_block(\d+)\.conv0\.weight", name) for name in shapes]
    places = sorted({(int(found[1]), int(found[2])) for found in blocks if found}, reverse=True)
    sides = [side >> level for level in range(max(1, len({at for at, _ in places})))]
    widths = [shape_of(f"enc.{at}x{at}_block0.conv0.weight", 4)[0] for at in sides]
    embedding = shape_of("map_layer0.weight", 2)[0]
    uneven = [width for width in (*widths, embedding) if width % channels]
    if uneven:
        problem = f"{uneven[0]} channels where {first} has {channels}"
        tensors.refuse(path, _KIND, [problem])
    return SongUNet(
        image_size=side,
        image_channels=image_channels,
        channels=channels,
        channel_mults=tuple(width // channels for width in widths),
        embedding_mult=embedding // channels,
        num_blocks=max((number for at, number in places if at == side), default=0) + 1,
        attention_sizes=tuple(at for at in sides if f"enc.{at}x{at}_block0.qkv.weight" in shapes),
        family="ncsnpp" if "map_noise.freqs" in shapes else "ddpmpp",
        num_classes=shape_of("map_label.weight", 2)[1] if "map_label.weight" in shapes else 0,
        augment_labels=(
            shape_of("map_augment.weight", 2)[1] if "map_augment.weight" in shapes else 0
        ),
    )


def _check_names(
    path: epath.PathLike, file: tensors.Tensors, module: SongUNet, leaves: list[Leaf]
) -> None:
    """Refuse tensors that are missing or of another network."""
    known = {name for leaf in leaves for name in leaf.names}
    taps = len(FAMILIES[module.family][3])
    found = [
        name
        for name, shape in file.shapes.items()
        if not (name.endswith(_FILTER) and shape == (1, 1, taps, taps))
    ]
    tensors.match_names(path, _KIND, tensors.in_order(known), found, hint=file.hint)


def leaves_of(module: SongUNet) -> list[Leaf]:
    """List a module's arrays with names and shapes of the tensors that they are."""
    shapes = models.initial_shapes(module)
    return [
        _leaf(tuple(key.key for key in path), leaf.shape)
        for path, leaf in jax.tree_util.tree_flatten_with_path(shapes)[0]
    ]


def _leaf(path: tuple[str, ...], shape: tuple[int, ...]) -> Leaf:
    def leaf(name: str, theirs: tuple[int, ...], axes: tuple[int, ...] | None = None, **parts: Any):
        own = axes or tuple(range(len(theirs)))
        return Leaf("/".join(path), shape, [name], False, theirs, own, **parts)

    names = list(path[1:])
    if names == ["frequencies"]:
        return leaf("map_noise.freqs", shape)
    if names == ["map_augment"]:
        return leaf("map_augment.weight", shape[::-1], (1, 0))
    # Their modules `enc` and `dec` hold what ours names by both parts.
    names[0] = re.sub(r"^(enc|dec)_", r"\1.", names[0])
    *of_module, kind = [name for name in names if name != "attention"]
    prefix = ".".join(of_module)
    if kind.startswith(("qkv_", "out_")):
        prefix += f".{'qkv' if kind.startswith('qkv_') else 'proj'}"
        kind = kind[4:]
        if path[-1] == "qkv_kernel":  # (C, 3, heads, D) of channels (head, component, q k v)
            width, _, heads, head_width = shape
            parts = (heads, head_width, 3, width)
            return leaf(f"{prefix}.weight", (3 * width, width, 1, 1), (3, 2, 0, 1), parts=parts)
        if path[-1] == "qkv_bias":
            _, heads, head_width = shape
            theirs = (3 * heads * head_width,)
            return leaf(f"{prefix}.bias", theirs, (2, 0, 1), parts=(heads, head_width, 3))
        if path[-1] == "out_kernel":
            heads, head_width, width = shape
            theirs = (width, heads * head_width, 1, 1)
            parts = (width, heads, head_width)
            return leaf(f"{prefix}.weight", theirs, (1, 2, 0), parts=parts)
        return leaf(f"{prefix}.bias", shape)
    if kind == "kernel" and len(shape) == 4:
        return leaf(f"{prefix}.weight", (shape[3], shape[2], *shape[:2]), (2, 3, 1, 0))
    if kind == "kernel" and of_module[-1] == "skip":  # a convolution of 1×1
        return leaf(f"{prefix}.weight", (*shape[::-1], 1, 1), (1, 0, 2, 3))
    if kind == "kernel":
        return leaf(f"{prefix}.weight", shape[::-1], (1, 0))
    return leaf(f"{prefix}.{'weight' if kind == 'scale' else kind}", shape)
