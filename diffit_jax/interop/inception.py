"""The FID network's weights, from PyTorch's files or safetensors.

`pt_inception-2015-12-05-6726825d.pth` (pytorch-fid) or
`weights-inception-2015-12-05-6726825d.pth` (torch-fidelity), or safetensors with the same names.
Of a pickle only tensors are read, see `torch_files`.
"""

import logging
import os
import re
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from etils import epath

from diffit_jax import models
from diffit_jax.interop import tensors
from diffit_jax.interop.tensors import Leaf, Tensors
from diffit_jax.interop.torch_files import TorchFile
from diffit_jax.interop.weight_files import WeightFiles
from diffit_jax.models.pretrained.inception import BLOCKS, SIDE, STEM, Inception

log = logging.getLogger(__name__)

_STEM = ("1a_3x3", "2a_3x3", "2b_3x3", "3b_1x1", "4a_3x3")
_MIXED = ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c")
_KIND = "the FID Inception network"
_REMEDY = (
    "name pytorch-fid's pt_inception-2015-12-05-6726825d.pth, torch-fidelity's file, or safetensors"
)
_BATCH_NORM = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}


RANDOM = "random"  # in place of a path
RANDOM_WIDTH = 1 / 8


def load(
    path: epath.PathLike, sharding: jax.sharding.Sharding | None = None
) -> tuple[Inception, dict[str, Any]]:
    """Read the network.

    Args:
      path: see the top of this file; `RANDOM` is a network of an eighth of the width with random
        weights, always the same ones, to try commands with: its scores have no meaning.
      sharding: where the arrays go; None: the default device.

    Returns:
      The module, as wide as the file's, and its variables, `params` in float32.

    Raises:
      UserError: a file that cannot be read, or tensors that are missing, extra, misshapen or not
        finite (each named, at most ten).
    """
    if os.fspath(path) == RANDOM:
        return _random(sharding)
    path, table = epath.Path(path), names()
    pattern = "|".join(re.escape(name) for name in table)
    weights_file = TorchFile(path) if path.suffix in (".pth", ".pt") else WeightFiles(path, pattern)
    with weights_file as file:
        found = {name for name in file.shapes if not name.endswith("num_batches_tracked")}
        tensors.match_names(path, _KIND, table, found, hint=file.hint, remedy=_REMEDY)
        module = Inception(width=_width(file))
        shapes = models.variable_shapes(module, (SIDE, SIDE, 3))
        leaves = tensors.leaves_of(table, shapes, 0, {})
        tensors.check(path, _KIND, leaves, file, _REMEDY)

        def place(leaf: Leaf, array: np.ndarray) -> jax.Array:
            return jax.device_put(array, sharding)

        return module, tensors.read(file, leaves, place, str(path), remedy="use other weights")


def _random(sharding: jax.sharding.Sharding | None) -> tuple[Inception, dict[str, Any]]:
    """Return a network whose features keep about the variance of images."""
    log.warning("the FID network has random weights: its figures have no meaning")
    module, draws = Inception(width=RANDOM_WIDTH), np.random.RandomState(0)

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name, fan_in = path[-1].key, np.prod(leaf.shape[:-1])
        if name in ("kernel", "logits_kernel"):
            array = draws.standard_normal(leaf.shape) * np.sqrt(2 / fan_in)
        else:
            array = np.full(leaf.shape, float(name in ("scale", "var")))
        return jax.device_put(array.astype(np.float32), sharding)

    shapes = models.variable_shapes(module, (SIDE, SIDE, 3))
    return module, jax.tree_util.tree_map_with_path(draw, shapes)


def _width(file: Tensors) -> float:
    """Return the width multiplier, inferred from the widest layer, where rounding matters least."""
    name, published = "Mixed_7c.branch3x3dbl_1.conv.weight", 448
    return file.shapes[name][0] / published if file.shapes[name] else 1.0


def names() -> dict[str, tuple[str, tuple[int, ...] | None]]:
    """Name in the file → (path of ours, axes of theirs in the order of ours)."""
    table: dict[str, tuple[str, tuple[int, ...] | None]] = {}
    for theirs, ours in _units():
        table[f"{theirs}.conv.weight"] = (f"params/{ours}/conv/kernel", (2, 3, 1, 0))
        for name, other in _BATCH_NORM.items():
            table[f"{theirs}.bn.{name}"] = (f"params/{ours}/{other}", None)
    table["fc.weight"] = ("params/logits_kernel", (1, 0))
    table["fc.bias"] = ("params/logits_bias", None)
    return table


def _units() -> Iterator[tuple[str, str]]:
    """Yield (name in the file, path of ours) of every unit."""
    stem = [name for name in STEM if name.startswith("conv")]
    for theirs, ours in zip(_STEM, stem, strict=True):
        yield f"Conv2d_{theirs}", ours
    for theirs, (ours, branches) in zip(_MIXED, BLOCKS.items(), strict=True):
        for name, branch in branches.items():
            units = [f"_{number}" for number in branch.units]
            if len(units) == 1 and not branch.pair:
                units = [""]
            last = len(branch.units) + 1
            sides = {"row": f"_{last}a", "column": f"_{last}b"} if branch.pair else {}
            of_file = name.replace("_double", "dbl")
            if name == "pool":
                of_file = "_pool"
            elif ours == "mixed_8" and name == "7x7":
                of_file = "7x7x3"
            for number, end in zip(branch.units, units, strict=True):
                yield f"Mixed_{theirs}.branch{of_file}{end}", f"{ours}/{name}_{number}"
            for side, end in sides.items():
                yield f"Mixed_{theirs}.branch{of_file}{end}", f"{ours}/{name}_{side}"
