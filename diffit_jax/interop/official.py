"""Released DiffiT weights in and out of `LatentDiffiT`, number for number.

`diffit_256.safetensors` and `diffit_512.safetensors` have the names of the authors' PyTorch
modules, a tensor for each layer; ours are stacked over the layers. Every tensor is a transpose and
a reshape of ours. The transposes are in `_TENSORS`; shapes follow from the module.

Position embedding and position bias can be carried over to another resolution. The finer grid
divides the same image, so token p' of `new` tokens along a side lies at (p' + ½) · old / new - ½
in units of the old tokens, and an offset of Δ' tokens is one of Δ' · old / new. Values between the
old positions come from cubic splines; beyond the outermost position the nearest one's value is
taken.
"""

import collections
import copy
import hashlib
import json
import math
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from diffit_jax import models
from diffit_jax.errors import UserError
from diffit_jax.interop import tensors
from diffit_jax.interop.parametrisation import to_released
from diffit_jax.interop.tensors import Leaf
from diffit_jax.interop.weight_files import DIGEST, NO_DIGEST, WeightFiles
from diffit_jax.models.diffit.latent import LatentDiffiT
from diffit_jax.models.diffit.windows import relative_position_index
from diffit_jax.runtime import files
from diffit_jax.runtime.console import Progress

_LINEAR = (1, 0)  # PyTorch's (out, in) → (in, out)
_SAME = None

# Name in the file, `{}` standing for the layer: (collection and path of ours, axes of theirs in the
# order of ours).
_TENSORS = {
    "pos_embed": ("constants/pos_embed", _SAME),
    "x_embedder.proj.weight": ("params/patch_embed/kernel", (2, 3, 1, 0)),
    "x_embedder.proj.bias": ("params/patch_embed/bias", _SAME),
    "t_embedder.mlp.0.weight": ("params/time/in/kernel", _LINEAR),
    "t_embedder.mlp.0.bias": ("params/time/in/bias", _SAME),
    "t_embedder.mlp.2.weight": ("params/time/out/kernel", _LINEAR),
    "t_embedder.mlp.2.bias": ("params/time/out/bias", _SAME),
    "y_embedder.embedding_table.weight": ("params/time/label/embedding", _SAME),
    "blocks.{}.attn.relative_position_bias_table": (
        "params/blocks/attention/relative_position_bias",
        _SAME,
    ),
    "blocks.{}.attn.qkv_temb.weight": ("params/blocks/attention/time_qkv_kernel", _LINEAR),
    "blocks.{}.attn.qkv_temb.bias": ("params/blocks/attention/time_qkv_bias", _SAME),
    "blocks.{}.attn.qkv.weight": ("params/blocks/attention/qkv_kernel", _LINEAR),
    "blocks.{}.attn.qkv.bias": ("params/blocks/attention/qkv_bias", _SAME),
    "blocks.{}.attn.proj.weight": ("params/blocks/attention/out_kernel", _LINEAR),
    "blocks.{}.attn.proj.bias": ("params/blocks/attention/out_bias", _SAME),
    "blocks.{}.mlp.fc1.weight": ("params/blocks/mlp_in/kernel", _LINEAR),
    "blocks.{}.mlp.fc1.bias": ("params/blocks/mlp_in/bias", _SAME),
    "blocks.{}.mlp.fc2.weight": ("params/blocks/mlp_out/kernel", _LINEAR),
    "blocks.{}.mlp.fc2.bias": ("params/blocks/mlp_out/bias", _SAME),
    "final_layer.linear.weight": ("params/final/kernel", _LINEAR),
    "final_layer.linear.bias": ("params/final/bias", _SAME),
}
# Of a network with an inner head, which the released code does not have; with the number of blocks
# before it.
_INNER = {
    "inner_layer_{inner}.linear.weight": ("params/inner_final/kernel", _LINEAR),
    "inner_layer_{inner}.linear.bias": ("params/inner_final/bias", _SAME),
}
# Of one with QK-norm, which it does not have either, named as in timm's attention.
_QK_NORM = {
    "blocks.{}.attn.q_norm.weight": ("params/blocks/attention/q_scale", _SAME),
    "blocks.{}.attn.k_norm.weight": ("params/blocks/attention/k_scale", _SAME),
}
# Of one that generates a class token (REG), which it does not have either.
_CLASS = {
    "class_embedder.proj.weight": ("params/class_embed/kernel", _LINEAR),
    "class_embedder.proj.bias": ("params/class_embed/bias", _SAME),
    "class_embedder.norm.weight": ("params/class_norm/scale", _SAME),
    "class_embedder.norm.bias": ("params/class_norm/bias", _SAME),
    "final_layer.class_linear.weight": ("params/class_final/kernel", _LINEAR),
    "final_layer.class_linear.bias": ("params/class_final/bias", _SAME),
}
_INNER_NAME = "|".join(re.escape(name).replace(r"\{inner\}", r"\d{1,4}") for name in _INNER)
_INDEX = "blocks.{}.attn.relative_position_index"  # follows from the grid; a file may hold it
# What a file says: the sizes, that it is in the released parametrisation, and where time enters.
# All other attributes are the config's.
SIZES = (
    "input_size",
    "input_channels",
    "patch_size",
    "hidden_size",
    "depth",
    "num_heads",
    "mlp_ratio",
    "num_classes",
    "learn_sigma",
    "slim_tmsa",
    "inner_head",
    "class_token",
    "qk_norm",
    "time_in",
    "time_embedding",
)
TUNING = tuple(
    name for name in LatentDiffiT.__dataclass_fields__ if name not in (*SIZES, "parent", "name")
)
_KIND = "a latent DiffiT"


def load(
    path: epath.PathLike,
    input_size: int | None = None,
    sharding: jax.sharding.Sharding | Mapping[str, Any] | None = None,
    allow_nonfinite: bool = False,
    **attributes: Any,
) -> tuple[LatentDiffiT, dict[str, Any]]:
    """Read a released weight file.

    Every size is inferred from the tensors. One array of ours is read at a time, so that host
    memory stays below the parameters plus two of the stacked arrays. In float32 the network then
    equals the released one to rounding; on TPUs and GPUs that takes
    `jax.default_matmul_precision("highest")`.

    Args:
      path: a local or mounted safetensors file in float32, float16 or bfloat16, or the index of
        several; see `weight_files`.
      input_size: side of the latents that the model shall take; None: that of the file. Another
        size interpolates the position embedding and the position bias, see the top of this file.
      sharding: where the arrays go, one for all or a tree like the variables; None: the default
        device.
      allow_nonfinite: whether there may be NaNs and infinities.
      **attributes: further attributes of `LatentDiffiT` that do not change the parameters: `dtype`,
        `scan_unroll`, `remat`, `attention`.

    Returns:
      The module, in the released parametrisation, and its variables: `params` and `constants`,
      float32 `jax.Array`s.

    Raises:
      UserError: not a safetensors file, a truncated one, or one with missing, extra or misshapen
        tensors, or such that are not finite (each named, at most ten).
    """
    if not attributes.keys() <= set(TUNING):
        raise TypeError(
            f"load takes the attributes {', '.join(TUNING)}, not "
            f"{', '.join(attributes.keys() - set(TUNING))}"
        )
    path = epath.Path(path)
    with _open(path) as file:
        found = _infer_module(path, file)
        leaves = leaves_of(found)
        tensors.check(path, _KIND, leaves, file)
        size = found.input_size if input_size is None else input_size
        module = found.clone(input_size=size, **attributes)
        module.check()

        def place(leaf: Leaf, array: np.ndarray) -> jax.Array:
            if module.grid != found.grid:
                array = _resized(leaf.path, array, found.grid, module.grid)
            return tensors.put(array, leaf, sharding)

        return module, tensors.read(file, leaves, place, str(path), allow_nonfinite)


def fit_config(config: Mapping[str, Any], path: epath.PathLike, **model: Any) -> dict[str, Any]:
    """Return `config` with the sizes of a weight file in its section `model`.

    Args:
      config: of a latent experiment. Attributes that a file does not determine (`TUNING`, and every
        attribute to come that is no size) stay.
      path: as in `load`; only names and shapes are read.
      **model: attributes that replace the file's and the config's.

    Raises:
      UserError: as `load`.
    """
    if not isinstance(config.get("model"), Mapping):
        raise UserError(
            "the config has no section model: use one of a latent experiment, like "
            "configs/imagenet256_latent.py"
        )
    module = _read_module(path)
    config = copy.deepcopy(dict(config))
    sizes = {name: getattr(module, name) for name in SIZES}
    kept = {name: value for name, value in config["model"].items() if name in TUNING}
    config["model"] = {"name": "latent_diffit", **sizes, **kept, **model}
    return config


def read_input_size(path: epath.PathLike) -> int:
    """Return the side of the latents of the network in a weight file.

    Only names and shapes are read. Raises as `load`.
    """
    return _read_module(path).input_size


def save(
    path: epath.PathLike,
    module: Any,
    variables: Mapping[str, Any],
    index_buffers: bool = False,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write variables as a file that the released code can load.

    float32, with its names and shapes.

    Args:
      path: file to write, local or `gs://`; it appears when it is complete.
      module: the network; a slim one is written with zeros for the parameters that it leaves out.
      variables: `params` and `constants` of the network.
      index_buffers: also write the int64 buffer `relative_position_index` of every block, which the
        released code derives itself but asks for when it loads strictly.
      metadata: JSON values by name that the file carries, see `weight_files.read_metadata`; a
        digest of its tensors is among them.

    Raises:
      UserError: an unconditional module, or one with another switch, which the released code does
        not have, or a file that cannot be written.
    """
    if not module.num_classes:
        raise UserError(
            "the released code has no unconditional model: weights of a model without classes "
            "cannot be written for it"
        )
    if (module.time_in, module.time_embedding) != ("tmsa", "positional"):
        raise UserError(
            f"the released code has time_in 'tmsa' and time_embedding 'positional' alone, not "
            f"{module.time_in!r} and {module.time_embedding!r}: such weights cannot be written for "
            "it"
        )
    if module.own_tokens or module.end_time_in == "sum" or module.guidance_in != "none":
        raise UserError(
            f"a file of weights has no place for what model.end_time_in {module.end_time_in!r} and "
            f"model.guidance_in {module.guidance_in!r} add: only maps with 'blocks' and 'none' can "
            "be written"
        )
    if module.slim_tmsa:
        module, variables = module.clone(slim_tmsa=False), to_released(dict(variables))

    def parts() -> Iterator[bytes | memoryview]:
        for _ in range(module.depth if index_buffers else 0):
            yield relative_position_index(module.grid).astype(np.int64).tobytes()
        for leaf in leaves_of(module):
            array = np.asarray(tensors.at(variables, leaf.path), np.float32)
            for layer in array if leaf.stacked else array[None]:
                yield leaf.to_theirs(layer).data

    carried = {name: json.dumps(value) for name, value in (metadata or {}).items()}
    carried[DIGEST] = NO_DIGEST
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **carried}}
    offset = 0
    entries = entries_of(module, index_buffers)
    for name, dtype, shape in entries:
        size = {"F32": 4, "I64": 8}[dtype] * math.prod(shape)
        header[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256(text)
    for part in parts():
        digest.update(part)
    text = text.replace(NO_DIGEST.encode(), digest.hexdigest().encode(), 1)

    # The library's writer wants all tensors in memory at once.
    with (
        files.writing(path) as file,
        Progress(
            f"save {epath.Path(path).name}", len(entries), unit="tensor", every_s=2
        ) as progress,
    ):
        file.write(len(text).to_bytes(8, "little") + text)
        for part in parts():
            file.write(part)
            progress.advance()


def entries_of(module: LatentDiffiT, index_buffers: bool) -> list[tuple[str, Any, tuple[int, ...]]]:
    """Return (name, dtype, shape) of every tensor of a file, in the order of writing."""
    shape = (module.grid**2, module.grid**2)
    buffers = (
        [(_INDEX.format(layer), "I64", shape) for layer in range(module.depth)]
        if index_buffers
        else []
    )
    # The buffers come first, where their 8 bytes are aligned.
    return buffers + [
        (name, "F32", leaf.theirs) for leaf in leaves_of(module) for name in leaf.names
    ]


def _open(path: epath.PathLike) -> WeightFiles:
    names = [
        re.escape(name).replace(re.escape("{}"), r"\d+")
        for name in (*_TENSORS, *_QK_NORM, *_CLASS, _INDEX)
    ]
    return WeightFiles(path, "|".join([*names, _INNER_NAME]))


def _table(
    inner_head: int, qk_norm: bool, class_token: bool
) -> dict[str, tuple[str, tuple[int, ...] | None]]:
    """Return the tensors of a network with, or (0) without, an inner head, and two more parts."""
    inner = _INNER if inner_head else {}
    table = _TENSORS | (_QK_NORM if qk_norm else {}) | (_CLASS if class_token else {})
    return table | {name.replace("{inner}", str(inner_head)): ours for name, ours in inner.items()}


def _read_module(path: epath.PathLike) -> LatentDiffiT:
    with _open(path) as file:
        return _infer_module(path, file)


def leaves_of(module: LatentDiffiT) -> list[Leaf]:
    """List a module's arrays in the released parametrisation, with tensors' names and shapes."""
    shapes = models.initial_shapes(module)
    width, hidden, patch = (
        module.hidden_size,
        module.mlp_ratio * module.hidden_size,
        module.patch_size,
    )
    theirs = {
        "pos_embed": (1, module.grid**2, width),
        "x_embedder.proj.weight": (width, module.input_channels, patch, patch),
        "blocks.{}.attn.qkv_temb.weight": (3 * width, width),
        "blocks.{}.attn.qkv_temb.bias": (3 * width,),
        "blocks.{}.attn.qkv.weight": (3 * width, width),
        "blocks.{}.attn.qkv.bias": (3 * width,),
        "blocks.{}.attn.proj.weight": (width, width),
        "blocks.{}.mlp.fc1.weight": (hidden, width),
    }
    table = _table(module.inner_head, module.qk_norm, bool(module.class_token))
    return tensors.leaves_of(table, shapes, module.depth, theirs)


def _infer_module(path: epath.PathLike, file: WeightFiles) -> LatentDiffiT:
    """Infer the module whose tensors these are.

    Where tensors disagree about a size, the majority decides, so that the others are reported.
    """
    shapes = file.shapes
    depth = _depth(shapes)
    heads = [name for name in sorted(shapes) if re.fullmatch(_INNER_NAME, name)]
    inner_head = int(re.findall(r"\d+", heads[0])[0]) if heads else 0
    qk_norm = any(name.format(0) in shapes for name in _QK_NORM)
    of_class = shapes.get("class_embedder.proj.weight", ())
    table = _table(inner_head, qk_norm, bool(of_class))
    known = set(tensors.names_of(table, depth))
    found = shapes.keys() - {_INDEX.format(layer) for layer in range(depth)}
    tensors.match_names(path, _KIND, tensors.in_order(known), found, hint=file.hint)

    def vote(*witnesses: tuple[str, int, Callable[[tuple[int, ...]], int]]) -> int:
        """Return the size that most tensors have: (pattern, rank, their shape → the size)."""
        sizes = [
            size(shapes[name])
            for pattern, rank, size in witnesses
            for name in tensors.expanded(pattern, depth)
            if len(shapes[name]) == rank
        ]
        if not sizes:
            name, rank = witnesses[0][0].format(0), witnesses[0][1]
            tensors.refuse(
                path, _KIND, [f"misshapen {name} {shapes[name]}, which must have {rank} axes"]
            )
        return collections.Counter(sizes).most_common(1)[0][0]

    axis = operator.itemgetter
    biases = (
        "x_embedder.proj.bias",
        "t_embedder.mlp.2.bias",
        "blocks.{}.attn.proj.bias",
        "blocks.{}.mlp.fc2.bias",
    )
    width = vote(*((name, 1, axis(0)) for name in biases))
    biases_of = "blocks.{}.attn.relative_position_bias_table"
    grid = vote(
        (biases_of, 2, lambda shape: (math.isqrt(shape[0]) + 1) // 2),
        ("pos_embed", 3, lambda shape: math.isqrt(shape[1])),
    )
    patch = vote(("x_embedder.proj.weight", 4, axis(3)))
    channels = vote(("x_embedder.proj.weight", 4, axis(1)))
    heads = vote((biases_of, 2, axis(1)))
    outputs = vote(("final_layer.linear.bias", 1, axis(0)))
    hidden = vote(("blocks.{}.mlp.fc1.bias", 1, axis(0)), ("blocks.{}.mlp.fc1.weight", 2, axis(0)))
    classes = vote(("y_embedder.embedding_table.weight", 2, axis(0))) - 1

    # Sizes that no DiffiT can have, with the tensors that say so.
    suspects = []
    if width < 1 or width % 4:
        suspects.append("blocks.0.attn.proj.bias")
    if heads < 1 or width % max(heads, 1) or grid < 1:
        suspects.append(biases_of.format(0))
    if (
        patch < 1
        or channels < 1
        or outputs not in (patch * patch * channels, 2 * patch * patch * channels)
    ):
        suspects += ["x_embedder.proj.weight", "final_layer.linear.bias"]
    if hidden < 1 or hidden % max(width, 1):
        suspects.append("blocks.0.mlp.fc1.bias")
    if classes < 1:
        suspects.append("y_embedder.embedding_table.weight")
    if of_class and (len(of_class) != 2 or of_class[1] < 1):
        suspects.append("class_embedder.proj.weight")
    if suspects:
        tensors.refuse(path, _KIND, [f"misshapen {name} {shapes[name]}" for name in suspects])
    return LatentDiffiT(
        input_size=grid * patch,
        input_channels=channels,
        patch_size=patch,
        hidden_size=width,
        depth=depth,
        num_heads=heads,
        mlp_ratio=hidden // width,
        num_classes=classes,
        learn_sigma=outputs != patch * patch * channels,
        inner_head=inner_head,
        class_token=of_class[1] if of_class else 0,
        qk_norm=qk_norm,
    )


def _depth(names: Iterable[str]) -> int:
    """Return the number of layers: up to the last one that has at least half of its tensors.

    Those after it are extra.
    """
    found = collections.Counter(
        int(match[1]) for name in names if (match := re.match(r"blocks\.(\d+)\.", name))
    )
    per_layer = sum("{}" in pattern for pattern in _TENSORS)
    return max((layer for layer, count in found.items() if 2 * count >= per_layer), default=0) + 1


def _resized(path: str, array: np.ndarray, old: int, new: int) -> np.ndarray:
    if path.endswith("pos_embed"):
        return resize_position_embedding(array, old, new)
    if path.endswith("relative_position_bias"):
        return np.stack([resize_bias_table(layer, old, new) for layer in array])
    return array


def resize_position_embedding(table: np.ndarray, old: int, new: int) -> np.ndarray:
    """Resize (old², C) float32, tokens in row-major order, to (new², C) float32."""
    places = (np.arange(new) + 0.5) * old / new - 0.5
    return _resample(table, old, places)


def resize_bias_table(table: np.ndarray, old: int, new: int) -> np.ndarray:
    """Resize a table of position biases to another window.

    ((2 old - 1)², heads) float32, offsets in row-major order as in `relative_position_index` →
    ((2 new - 1)², heads) float32.
    """
    places = np.arange(-(new - 1), new) * old / new + old - 1
    return _resample(table, 2 * old - 1, places)


def _resample(table: np.ndarray, side: int, places: np.ndarray) -> np.ndarray:
    """Interpolate a (side², C) table at all pairs of `places`, in float64."""
    from scipy import ndimage  # a tenth of what a command imports, and hardly ever needed

    channels = np.asarray(table, np.float64).reshape(side, side, -1).transpose(2, 0, 1)
    coordinates = np.stack(np.meshgrid(places, places, indexing="ij"))
    values = np.stack(
        [
            ndimage.map_coordinates(channel, coordinates, order=min(3, side - 1), mode="nearest")
            for channel in channels
        ]
    )
    return values.transpose(1, 2, 0).reshape(len(places) ** 2, -1).astype(np.float32)
