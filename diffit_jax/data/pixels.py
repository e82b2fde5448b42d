"""uint8 pixels to and from the network's [-1, 1], and grids of images."""

import io
import logging
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from PIL import Image, ImageDraw, ImageFont

from diffit_jax.errors import one_line
from diffit_jax.runtime.files import write_bytes

log = logging.getLogger(__name__)


def to_model(pixels: jax.Array) -> jax.Array:
    """Scale uint8 in [0, 255] to float32 in [-1, 1], x = p / 127.5 - 1, elementwise."""
    return pixels.astype(jnp.float32) / 127.5 - 1


ROUNDINGS = ("edm", "adm")


def to_pixels(x: jax.Array | np.ndarray, rounding: str = "edm") -> jax.Array:
    """Round float32 in [-1, 1] to uint8, elementwise, by one of two published rules.

    They differ by half a level.

    Args:
      x: any shape.
      rounding: "edm": clip(127.5 x + 128, 0, 255), truncated (EDM, DiT); "adm": clip(127.5 (x + 1),
        0, 255), truncated (ADM, MDT, DiffiT).
    """
    return jnp.clip(127.5 * x + (128 if rounding == "edm" else 127.5), 0, 255).astype(jnp.uint8)


def latent_preview(x: jax.Array | np.ndarray) -> jax.Array:
    """Show the first channels of latents as an image, [-3, 3] from dark to bright.

    (n, H, W, C) float32 of about unit variance → (n, H, W, 3 or 1) uint8.
    """
    channels = 3 if x.shape[-1] >= 3 else 1
    return to_pixels(x[..., :channels] / 3)


def write_preview(
    path: epath.PathLike,
    samples: np.ndarray,
    preview: Callable[[np.ndarray], np.ndarray],
    columns: int = 10,
    *,
    above: Sequence[str] = (),
    beside: Sequence[str] = (),
) -> np.ndarray | None:
    """Write a grid of samples as a PNG; if it cannot be drawn or written, only warn.

    Nothing depends on it.

    Args:
      path: of the PNG.
      samples: (n, H, W, C), see `preview`.
      preview: of a `Space`: the samples as (n, H', W', 1 or 3) uint8.
      columns: samples in a row.
      above: names of columns, see `image_grid`.
      beside: names of rows.

    Returns:
      The image, (height, width, 1 or 3) uint8, unless there is none.
    """
    try:
        epath.Path(path).parent.mkdir(parents=True, exist_ok=True)
        grid = image_grid(preview(samples), columns, above=above, beside=beside)
        write_png(path, grid)
        return grid
    except Exception as error:
        log.warning(
            "the image %s could not be made (%s: %s)",
            path,
            type(error).__name__,
            one_line(error, 160),
        )


def image_grid(
    images: np.ndarray,
    columns: int,
    min_side: int = 32,
    *,
    above: Sequence[str] = (),
    beside: Sequence[str] = (),
) -> np.ndarray:
    """Tile images in rows, one pixel apart, small ones enlarged to about `min_side` pixels.

    Without smoothing.

    Args:
      images: (n, H, W, C) uint8, C 1 or 3.
      columns: images per row.
      min_side: smallest side of an image in the grid, in pixels.
      above: a name for each column, written over it; or none.
      beside: a name for each row, written to its left; or none.

    Returns:
      (height, width, C) uint8; missing images of the last row are black.
    """
    count, height, width, channels = images.shape
    zoom = -(-min_side // height)
    rows = -(-count // columns)
    cells = np.zeros((rows * columns, height * zoom + 1, width * zoom + 1, channels), np.uint8)
    cells[:count, :-1, :-1] = images.repeat(zoom, axis=1).repeat(zoom, axis=2)
    cells = cells.reshape(rows, columns, *cells.shape[1:]).transpose(0, 2, 1, 3, 4)
    grid = cells.reshape(cells.shape[0] * cells.shape[1], -1, channels)[:-1, :-1]
    cell = height * zoom + 1, width * zoom + 1
    if beside:
        margin = min(_LONGEST_NAME, max(_width(name) for name in beside) + 6)
        places = [(3, row * cell[0] + cell[0] // 2) for row in range(rows)]
        names = _written((grid.shape[0], margin), beside, places, margin - 6, channels)
        grid = np.concatenate([names, grid], axis=1)
    if above:
        left = grid.shape[1] - columns * cell[1] + 1
        places = [(left + column * cell[1] + 1, _LINE // 2) for column in range(columns)]
        names = _written((_LINE, grid.shape[1]), above, places, cell[1] - 2, channels)
        grid = np.concatenate([names, grid], axis=0)
    return grid


_LINE, _LONGEST_NAME = 16, 160  # pixels


def _width(text: str) -> int:
    return int(ImageFont.load_default().getlength(text))


def _written(
    shape: tuple[int, int],
    texts: Sequence[str],
    places: Sequence[tuple[int, int]],
    widest: int,
    channels: int,
) -> np.ndarray:
    """Write texts in a black image: left ends and middles at `places`, cut to a width."""
    image = Image.new("L", (shape[1], shape[0]))
    draw = ImageDraw.Draw(image)
    for number, (text, place) in enumerate(zip(texts, places, strict=False)):
        # The font has plain Latin letters; a name without any is shown by its number.
        text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
        text = text.strip() or str(number)
        while text and _width(text) > widest:
            text = text[:-2] + "…" if len(text) > 2 else ""
        draw.text(place, text, fill=255, anchor="lm")
    return np.repeat(np.asarray(image)[..., None], channels, axis=2)


def padded_rows(rows: Sequence[np.ndarray], columns: int) -> np.ndarray:
    """Join rows of images, (n, H, W, C) each with n at most `columns`, black where they end.

    Returns (rows · columns, H, W, C), for `image_grid`.
    """
    shape = rows[0].shape[1:]
    cells = np.zeros((len(rows), columns, *shape), rows[0].dtype)
    for cell, row in zip(cells, rows, strict=True):
        cell[: len(row)] = row
    return cells.reshape(-1, *shape)


def as_picture(image: np.ndarray) -> Image.Image:
    """Return (H, W, 1 or 3) uint8 as an image of Pillow."""
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def write_png(path: epath.PathLike, image: np.ndarray) -> None:
    """Write (H, W, 1 or 3) uint8 as a PNG, atomically."""
    write_picture(path, as_picture(image), "png")


def write_picture(path: epath.PathLike, picture: Image.Image, kind: str, **options: Any) -> None:
    """Write an image of Pillow atomically; `kind` and options as of its `save`."""
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    write_bytes(path, buffer.getvalue())
