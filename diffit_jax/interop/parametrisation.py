"""The two parametrisations of TMSA: the released one, and the slim one.

The slim one lacks the parameters that can never change the output.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

# Name in the released parametrisation → in the slim one. Query, key and value are on the
# third axis from the right in all of them, stacked over layers or not.
_RENAMED = {
    "time_qkv_kernel": "time_qv_kernel",
    "time_qkv_bias": "time_qv_bias",
    "qkv_bias": "qv_bias",
}
_QKV_AXIS = -3


def to_slim(tree: Any) -> Any:
    """Drop the key's time projection and both key biases wherever they occur in a pytree.

    Args:
      tree: pytree of host or device arrays in which the parameters of a TMSA are a dict:
        parameters, averages, optimizer moments.

    Returns:
      The same tree for a model with `slim_tmsa`, the changed leaves as numpy arrays. Other leaves
      are the same objects.
    """
    return _convert(tree, _RENAMED, lambda array: np.delete(array, 1, axis=_QKV_AXIS))


def to_released(tree: Any) -> Any:
    """Invert `to_slim`, with zeros for the dropped arrays.

    Their gradient is zero, so optimizer moments are exact too.
    """
    renamed = {slim: released for released, slim in _RENAMED.items()}
    return _convert(tree, renamed, lambda array: np.insert(array, 1, 0, axis=_QKV_AXIS))


def _convert(tree: Any, renamed: dict[str, str], change: Callable[[Any], np.ndarray]) -> Any:
    def is_attention(node: Any) -> bool:
        return isinstance(node, dict) and not renamed.keys().isdisjoint(node)

    def convert(node: Any) -> Any:
        if not is_attention(node):
            return node
        return {
            renamed.get(name, name): change(leaf) if name in renamed else leaf
            for name, leaf in node.items()
        }

    return jax.tree.map(convert, tree, is_leaf=is_attention)
