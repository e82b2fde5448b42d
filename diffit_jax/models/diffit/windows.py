"""Windows of an image: cut out, put back, and the offsets between their tokens.

Shape suffixes: B batch, N windows, L tokens of a window, C channels.
"""

import jax
import numpy as np


def relative_position_index(window: int) -> np.ndarray:
    """Return the row of the bias table for each pair of tokens of a window.

    Args:
      window: side w of the square window, L = w² tokens in row-major order.

    Returns:
      (L, L) int32, `[query, key] = (r_q - r_k + w - 1)(2w - 1) + (c_q - c_k + w - 1)`, in [0, (2w -
      1)²).
    """
    row, column = np.divmod(np.arange(window * window), window)
    row_offset = row[:, None] - row[None, :] + window - 1
    column_offset = column[:, None] - column[None, :] + window - 1
    return (row_offset * (2 * window - 1) + column_offset).astype(np.int32)


# Tokens that are computed together: (rows, columns) of pixels, whole windows each way, row by row.
Tile = tuple[int, int]

_LANES = 128  # of a TPU's vector unit; arrays are padded to multiples of it


def dense_tile(height: int, width: int, window: int) -> Tile:
    """Return the tile in which a TPU computes windows together, masked to themselves.

    Windows of 16 tokens by themselves would fill an eighth of a TPU's lanes. A tile has at most 128
    tokens, unless a window has more, and is as wide as the image where it can be: then tokens stay
    in the order in which memory has them.
    """

    def largest(length: int, others: int) -> int:
        sides = range(window, length + 1, window)
        fitting = [side for side in sides if length % side == 0 and side * others <= _LANES]
        return max(fitting, default=window)

    columns = largest(width, window)
    return largest(height, columns) if columns == width else window, columns


def partition(x_BHWC: jax.Array, tile: Tile) -> jax.Array:
    """Cut images into non-overlapping tiles, (B, height, width, C) → (B, N, L, C).

    Tiles and tokens are both row-major.
    """
    batch, height, width, channels = x_BHWC.shape
    rows, columns = tile
    x = x_BHWC.reshape(batch, height // rows, rows, width // columns, columns, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, rows * columns, channels)


def merge(x_BNLC: jax.Array, height: int, width: int, tile: Tile) -> jax.Array:
    """Invert `partition`: (B, N, L, C) → (B, height, width, C)."""
    batch, _, _, channels = x_BNLC.shape
    rows, columns = tile
    x = x_BNLC.reshape(batch, height // rows, width // columns, rows, columns, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height, width, channels)


def tile_index(tile: Tile, window: int) -> tuple[np.ndarray, np.ndarray]:
    """Return `relative_position_index` of a tile, and which tokens share a window.

    Returns:
      (L, L) int32 rows of the bias table, 0 between windows; (L, L) bool, whether two tokens are in
      the same window.
    """
    row, column = np.divmod(np.arange(tile[0] * tile[1]), tile[1])
    of_window = (row // window) * tile[1] + column // window
    shared = of_window[:, None] == of_window[None, :]
    token = (row % window) * window + column % window
    index = relative_position_index(window)[token[:, None], token[None, :]]
    return np.where(shared, index, 0), shared
