"""From the bytes of an image file to an array of one size.

Imported by the worker processes that decode: no jax here.
"""

import dataclasses
import io
import os
import re
import warnings
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageOps

from diffit_jax.errors import UserError, one_line

CROPS = ("none", "center", "adm", "resize")
# Of files that are taken for images whatever they hold: what does not decode is named.
# fmt: off
SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".bmp", ".dib", ".gif", ".tif",
    ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".avif", ".jp2", ".j2k", ".tga",
)
# fmt: on
# Of files that are none, so that a million of them need not be opened.
# fmt: off
_OTHERS = (
    ".json", ".jsonl", ".txt", ".cls", ".csv", ".tsv", ".md", ".html", ".xml", ".yaml", ".yml",
    ".npy", ".npz", ".py", ".pkl", ".pickle", ".pt", ".pth", ".safetensors", ".parquet", ".arrow",
    ".tfrecord", ".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar", ".mp4", ".mov",
    ".mp3", ".wav", ".flac", ".pdf", ".log", ".lock", ".crc", ".idx", ".db", ".ini", ".sha256",
    ".md5",
)
# fmt: on
HEAD = 16  # bytes by which `is_image` knows an image
_FIRST_BYTES = (
    b"\xff\xd8\xff",  # JPEG
    b"\x89PNG\r\n\x1a\n",
    b"GIF87a",
    b"GIF89a",
    b"II*\0",  # TIFF
    b"MM\0*",
    b"\0\0\0\x0cjP  ",  # JPEG 2000
    b"\xff\x4f\xff\x51",
)
_ORIENTATION = 0x0112  # EXIF's tag; 1 is upright


class DecodeError(Exception):
    """A file that is no image; the message says why."""


def is_image(name: str, head: Callable[[], bytes]) -> bool:
    """Whether a file is taken for an image: by its suffix, or by its first bytes.

    Args:
      name: of the file.
      head: returns its first `HEAD` bytes; called only if the suffix does not tell.
    """
    suffix = os.path.splitext(name)[1].lower()
    if suffix in SUFFIXES or suffix in _OTHERS:
        return suffix in SUFFIXES
    first = head()
    boxed = first[4:12] in (b"ftypavif", b"ftypavis")
    riff = first[:4] == b"RIFF" and first[8:12] == b"WEBP"
    bitmap = first[:2] == b"BM" and first[6:10] == b"\0\0\0\0"
    return first.startswith(_FIRST_BYTES) or boxed or riff or bitmap


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """How images are brought to one size.

    Attributes:
      crop: "none": images have one size already; "center": the largest central square, resized by
        Lanczos (EDM's `center-crop`); "adm": ADM's centre crop, see `adm_crop`; "resize": resized
        by Lanczos, whatever the ratio of the sides (EDM's `--resolution`).
      size: side of the result in pixels; 0 for "none".
      channels: 3 for RGB, 1 for grey.
      upright: whether images are turned as EXIF says, as viewers show them. ADM and DiT leave
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


def decode(
    content: bytes, preprocessing: Preprocessing, name: str = ""
) -> tuple[np.ndarray, list[str]]:
    """Decode an image file to an array.

    Grey, palette, CMYK and 16-bit images become what `preprocessing.channels` says; transparent
    pixels are put on white; of animations the first frame is taken.

    Args:
      content: of an image file of any kind that Pillow knows.
      preprocessing: size and channels of the result.
      name: of the file, to note a wrong suffix.

    Returns:
      (H, W, channels) uint8, and notes of what is unusual, "CMYK" for instance.

    Raises:
      DecodeError: it cannot be read.
    """
    if not content:
        raise DecodeError("empty file")
    _check_png(content)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(content)) as image:
                notes = _notes(image, name)
                image.load()
                turned = _upright(image, notes) if preprocessing.upright else image
                mode = "RGB" if preprocessing.channels == 3 else "L"
                plain = _plain(turned, mode, notes, image.format)
    except DecodeError:
        raise
    except Exception as error:  # whatever a reader of one of thirty formats says of damaged bytes
        reason = re.sub(r" ?<[^<>]* at 0x[0-9a-f]+>", "", one_line(error))  # differs each time
        raise DecodeError(f"{type(error).__name__}: {reason}"[:120]) from error
    return _preprocess(plain, preprocessing, notes), notes


def _check_png(content: bytes) -> None:
    """Raise `DecodeError` if pixels of a PNG have another checksum: Pillow does not look."""
    place = 8 if content.startswith(_FIRST_BYTES[1]) else len(content)
    while place + 12 <= len(content):
        end = place + 8 + int.from_bytes(content[place : place + 4], "big")
        chunk, said = content[place + 4 : end], content[end : end + 4]
        if chunk[:4] == b"IDAT" and zlib.crc32(chunk) != int.from_bytes(said, "big"):
            raise DecodeError("its pixels are damaged (another checksum)")
        place = end + 4


def _upright(image: Image.Image, notes: list[str]) -> Image.Image:
    """Turn an image as its EXIF says; leave it where that cannot be read."""
    try:
        if image.getexif().get(_ORIENTATION, 1) == 1:
            return image
        turned = ImageOps.exif_transpose(image)
    except Exception:  # whatever Pillow says of a broken block: the pixels are whole
        notes.append("EXIF cannot be read: not turned")
        return image
    notes.append("turned upright by EXIF")
    return turned


def frame(pixels: np.ndarray, preprocessing: Preprocessing) -> tuple[np.ndarray, list[str]]:
    """Preprocess an array (H, W, 1 or 3) uint8 as `decode` does."""
    if preprocessing.crop == "none" and pixels.shape[-1] == preprocessing.channels:
        return pixels, []
    notes: list[str] = []
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    plain = _plain(image, "RGB" if preprocessing.channels == 3 else "L", notes)
    return _preprocess(plain, preprocessing, notes), notes


def adm_crop(image: Image.Image, size: int) -> Image.Image:
    """Crop the centre as ADM and DiT do (Dhariwal & Nichol 2021).

    The image is halved by boxes while its shorter side is at least `2 size`, then resized by a
    bicubic filter until that side is `size`; its middle is taken.
    """
    while min(image.size) >= 2 * size:
        width, height = image.size
        image = image.resize((width // 2, height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = (round(side * scale) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _preprocess(image: Image.Image, preprocessing: Preprocessing, notes: list[str]) -> np.ndarray:
    if preprocessing.crop != "none":
        if min(image.size) < preprocessing.size:
            notes.append("enlarged")
        image = _cropped(image, preprocessing)
    pixels = np.asarray(image)
    return pixels.reshape(*pixels.shape[:2], preprocessing.channels)


def _cropped(image: Image.Image, preprocessing: Preprocessing) -> Image.Image:
    if preprocessing.crop == "adm":
        return adm_crop(image, preprocessing.size)
    if preprocessing.crop == "center":
        width, height = image.size
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    return image.resize((preprocessing.size, preprocessing.size), Image.Resampling.LANCZOS)


def _notes(image: Image.Image, name: str) -> list[str]:
    """List what is unusual about a file."""
    notes = []
    # A photograph of several parts (MPO) is a JPEG with previews, not an animation.
    if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
        notes.append("animated: its first frame")
    suffix = os.path.splitext(name)[1].lower()
    known = Image.registered_extensions().get(suffix) if suffix else None
    format_ = "JPEG" if image.format == "MPO" else image.format
    if known and known != format_:
        notes.append("misnamed")
    return notes


def _plain(
    image: Image.Image, mode: str, notes: list[str], format_: str | None = None
) -> Image.Image:
    """Convert an image of any mode, read from a file of this format, to RGB or L."""
    if image.mode.startswith(("I", "F")):
        levels = np.asarray(image).astype(np.float64)
        # 16-bit PNG and PGM open as I in older versions of Pillow, and have a plain range.
        plain = image.mode.startswith("I;16") or format_ in ("PNG", "PPM")
        if not plain or levels.min() < 0 or levels.max() > 65535:
            raise DecodeError(
                f"pixels of mode {image.mode} have no known range: save it with 8 or 16 bits"
            )
        notes.append("16-bit")
        image = Image.fromarray(np.rint(levels / 257).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layered = image.convert("RGBA")
        if np.asarray(layered)[..., 3].min() < 255:
            notes.append("transparent: on white")
            white = Image.new("RGBA", layered.size, (255, 255, 255, 255))
            layered = Image.alpha_composite(white, layered)
        image = layered.convert("RGB")
    elif image.mode == "P":
        image = image.convert("RGB")
        notes.append("palette")
    elif image.mode == "CMYK":
        notes.append("CMYK")
    if mode == "RGB" and image.mode in ("L", "1"):
        notes.append("grey")
    return image if image.mode == mode else image.convert(mode)
