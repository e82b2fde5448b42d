"""What depends on the resolution in a latent DiffiT, carried over to another one: the position
embedding and the position bias.

The finer grid divides the same picture, so token p' of `new` tokens along a side lies at (p' + ½) ·
old / new - ½ in units of the old tokens, and an offset of Δ' tokens is one of Δ' · old / new.
Values between the old positions come from cubic splines; beyond the outermost position the nearest
one's value is taken.
"""

import numpy as np
from scipy import ndimage


def resize_position_embedding(table: np.ndarray, old: int, new: int) -> np.ndarray:
    """(old², C) float32, tokens in row-major order → (new², C) float32."""
    places = (np.arange(new) + 0.5) * old / new - 0.5
    return _resample(table, old, places)


def resize_bias_table(table: np.ndarray, old: int, new: int) -> np.ndarray:
    """((2 old - 1)², heads) float32, offsets in row-major order as in `relative_position_index` →
    ((2 new - 1)², heads) float32."""
    places = np.arange(-(new - 1), new) * old / new + old - 1
    return _resample(table, 2 * old - 1, places)


def _resample(table: np.ndarray, side: int, places: np.ndarray) -> np.ndarray:
    """Values of a (side², C) table at all pairs of `places`, in float64."""
    channels = np.asarray(table, np.float64).reshape(side, side, -1).transpose(2, 0, 1)
    coordinates = np.stack(np.meshgrid(places, places, indexing="ij"))
    values = np.stack(
        [
            ndimage.map_coordinates(channel, coordinates, order=min(3, side - 1), mode="nearest")
            for channel in channels
        ]
    )
    return values.transpose(1, 2, 0).reshape(len(places) ** 2, -1).astype(np.float32)
