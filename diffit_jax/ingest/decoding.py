"""From the bytes of a picture file to an array of one size.

Imported by the processes that decode beside the chips: no jax here.
"""

import dataclasses
import io
import os
import warnings

import numpy as np
from PIL import Image, ImageOps

from diffit_jax.errors import UserError

CROPS = ("none", "center", "adm", "resize")
SUFFIXES = [
    ".jpg",
    ".jpeg",
    ".png",
    ".webp",
    ".bmp",
    ".gif",
    ".tif",
    ".tiff",
    ".ppm",
    ".pgm",
]  # of files that are taken for pictures
_ORIENTATION = 0x0112  # EXIF's tag; 1 is upright


class Broken(Exception):
    """A file that is no picture; the message says why."""


@dataclasses.dataclass(frozen=True)
class Framing:
    """How pictures are brought to one size.

    Attributes:
      crop: "none": pictures have one size already; "center": the largest central square, resized by
        Lanczos (EDM's `center-crop`); "adm": ADM's centre crop, see `adm_crop`; "resize": resized
        by Lanczos, whatever the ratio of the sides (EDM's `--resolution`).
      size: side of the result in pixels; 0 for "none".
      channels: 3 for RGB, 1 for grey.
      upright: whether pictures are turned as EXIF says, as viewers show them. ADM and DiT leave
        them as they are stored.
    """

    crop: str = "none"
    size: int = 0
    channels: int = 3
    upright: bool = True

    def __post_init__(self):
        if self.crop not in CROPS:
            raise UserError(f"--crop {self.crop} is unknown: use {', '.join(CROPS)}")
        if (self.crop == "none") != (self.size == 0):
            raise UserError(
                f"--crop {self.crop} and --size {self.size} do not go together: name the side in "
                f"pixels with {', '.join(CROPS[1:])}, and none with --crop none"
            )
        if self.size < 0 or self.channels not in (1, 3):
            raise UserError("--size must be positive, and --channels 1 or 3")


def decode(content: bytes, framing: Framing, name: str = "") -> tuple[np.ndarray, list[str]]:
    """A picture as an array.

    Grey, palette, CMYK and 16-bit pictures become what `framing.channels` says; what is transparent
    lies on white; of animations the first frame is taken.

    Args:
      content: of a picture file of any kind that Pillow knows.
      framing: its size and channels.
      name: of the file: that its suffix is wrong is remarked.

    Returns:
      (H, W, channels) uint8, and remarks: what was not as usual, "CMYK" for instance.

    Raises:
      Broken: it cannot be read.
    """
    if not content:
        raise Broken("empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(content)) as picture:
                remarks = _remarks(picture, name)
                picture.load()
                if framing.upright and picture.getexif().get(_ORIENTATION, 1) != 1:
                    remarks.append("turned upright by EXIF")
                    turned = ImageOps.exif_transpose(picture)
                else:
                    turned = picture
                plain = _plain(turned, "RGB" if framing.channels == 3 else "L", remarks)
    except Broken:
        raise
    except Exception as error:  # whatever a reader of one of thirty formats says of damaged bytes
        raise Broken(f"{type(error).__name__}: {error}"[:120]) from error
    return _framed(plain, framing, remarks), remarks


def frame(pixels: np.ndarray, framing: Framing) -> tuple[np.ndarray, list[str]]:
    """The same of an array (H, W, 1 or 3) uint8."""
    if framing.crop == "none" and pixels.shape[-1] == framing.channels:
        return pixels, []
    remarks: list[str] = []
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    plain = _plain(picture, "RGB" if framing.channels == 3 else "L", remarks)
    return _framed(plain, framing, remarks), remarks


def adm_crop(picture: Image.Image, size: int) -> Image.Image:
    """ADM's centre crop, also DiT's (Dhariwal & Nichol 2021): halved by boxes while the shorter
    side is at least `2 size`, then resized by a bicubic filter until it is `size`, and the middle
    of it."""
    while min(picture.size) >= 2 * size:
        width, height = picture.size
        picture = picture.resize((width // 2, height // 2), Image.Resampling.BOX)
    scale = size / min(picture.size)
    width, height = (round(side * scale) for side in picture.size)
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return picture.crop((left, top, left + size, top + size))


def _framed(picture: Image.Image, framing: Framing, remarks: list[str]) -> np.ndarray:
    if framing.crop != "none":
        if min(picture.size) < framing.size:
            remarks.append("enlarged")
        picture = _cropped(picture, framing)
    pixels = np.asarray(picture)
    return pixels.reshape(*pixels.shape[:2], framing.channels)


def _cropped(picture: Image.Image, framing: Framing) -> Image.Image:
    if framing.crop == "adm":
        return adm_crop(picture, framing.size)
    if framing.crop == "center":
        width, height = picture.size
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        picture = picture.crop((left, top, left + side, top + side))
    return picture.resize((framing.size, framing.size), Image.Resampling.LANCZOS)


def _remarks(picture: Image.Image, name: str) -> list[str]:
    """What is unusual about a file."""
    remarks = []
    # A photograph of several parts (MPO) is a JPEG with previews, not an animation.
    if picture.format != "MPO" and getattr(picture, "n_frames", 1) > 1:
        remarks.append("animated: its first frame")
    suffix = os.path.splitext(name)[1].lower()
    known = Image.registered_extensions().get(suffix) if suffix else None
    format_ = "JPEG" if picture.format == "MPO" else picture.format
    if known and known != format_:
        remarks.append("misnamed")
    return remarks


def _plain(picture: Image.Image, mode: str, remarks: list[str]) -> Image.Image:
    """A picture of any mode as RGB or L."""
    if picture.mode.startswith(("I", "F")):
        levels = np.asarray(picture).astype(np.float64)
        if picture.mode == "F" or levels.min() < 0 or levels.max() > 65535:
            raise Broken(f"pixels of mode {picture.mode} have no known range")
        remarks.append("16-bit")
        picture = Image.fromarray(np.rint(levels / 257).astype(np.uint8))
    if picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        layered = picture.convert("RGBA")
        if np.asarray(layered)[..., 3].min() < 255:
            remarks.append("transparent: on white")
            white = Image.new("RGBA", layered.size, (255, 255, 255, 255))
            layered = Image.alpha_composite(white, layered)
        picture = layered.convert("RGB")
    elif picture.mode == "P":
        picture = picture.convert("RGB")
        remarks.append("palette")
    elif picture.mode == "CMYK":
        remarks.append("CMYK")
    if mode == "RGB" and picture.mode in ("L", "1"):
        remarks.append("grey")
    return picture if picture.mode == mode else picture.convert(mode)
