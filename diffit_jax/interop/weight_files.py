"""Files of weights: one safetensors file or several, with or without a prefix before the names."""

import collections
import contextlib
import functools
import hashlib
import json
import logging
import re
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath
from safetensors import SafetensorError, safe_open

from diffit_jax.errors import UserError
from diffit_jax.runtime import files

log = logging.getLogger(__name__)

# Numbers that trainers save with the weights.
_BOOKKEEPING = {
    "step",
    "steps",
    "global_step",
    "epoch",
    "iteration",
    "num_updates",
    "n_averaged",
    "decay",
    "ema_decay",
    "initted",
}


# Of a file that this package wrote: SHA-256 of all behind its first 8 bytes, in hexadecimal, with
# `NO_DIGEST` in its own place.
DIGEST, NO_DIGEST = "diffit_jax_sha256", "0" * 64


@functools.lru_cache(maxsize=16)  # a command opens its weights several times
def digest_of(path: epath.Path, stored: str, version: tuple[int, ...]) -> str:
    """Return the digest of a safetensors file in which `stored` stands for it.

    `version`: of the file, see `files.version`.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        header = file.read(int.from_bytes(file.read(8), "little"))
        digest.update(header.replace(stored.encode(), NO_DIGEST.encode()))
        while part := file.read(2**22):
            digest.update(part)
    return digest.hexdigest()


class WeightFiles:
    """The tensors of a network in safetensors files, as a context manager.

    Attributes:
      shapes, dtypes: of each tensor by its name, without a prefix; dtypes as safetensors names them
        ("F32").
      hint: what else may be wrong if tensors are missing, for the error message; "" if nothing.
    """

    def __init__(self, path: epath.PathLike, known: str):
        """Open the files and read their names.

        Args:
          path: of a safetensors file, or of the index of several (`model.safetensors.index.json`),
            on a local or mounted disk.
          known: regular expression of the names that the network's tensors have.

        Raises:
          UserError: they cannot be read, or are something else.
        """
        self._stack = contextlib.ExitStack()
        path = epath.Path(path)
        if not files.is_local(path):
            raise UserError(
                f"weights {path} must lie on a local or mounted disk, since they are read through "
                "a memory map: copy them first"
            )
        # All files stay open, or none.
        with contextlib.ExitStack() as stack:
            places: dict[str, Any] = {}
            for part in _parts(path):
                file = stack.enter_context(_open(part))
                places |= dict.fromkeys(file.keys(), file)
            self._stack = stack.pop_all()
        self._places = _without_prefix(path, places, known)
        slices = {name: file.get_slice(full) for name, (file, full) in self._places.items()}
        self.shapes = {name: tuple(each.get_shape()) for name, each in slices.items()}
        self.dtypes = {name: each.get_dtype() for name, each in slices.items()}
        # Trainers save their count of updates too.
        for name in [
            name
            for name in self.shapes
            if name.rpartition(".")[2] in _BOOKKEEPING and np.prod(self.shapes[name]) <= 1
        ]:
            log.info("weights %s hold the trainer's number %s too: left out", path, name)
            del self.shapes[name], self.dtypes[name]
        shard = re.search(r"(.*)-\d+-of-(\d+)\.safetensors$", path.name)
        self.hint = (
            f" (it is one of {int(shard[2])} files: name their index, "
            f"{shard[1]}.safetensors.index.json)"
            if shard
            else ""
        )

    def __enter__(self) -> "WeightFiles":
        return self

    def __exit__(self, *_) -> None:
        self._stack.close()

    def tensor(self, name: str) -> np.ndarray:
        """Read one tensor."""
        file, full = self._places[name]
        return file.get_tensor(full)


def read_metadata(path: epath.PathLike, name: str) -> Any:
    """Return a JSON value that a safetensors file carries in its header; None if there is none."""
    try:
        with safe_open(epath.Path(path), framework="numpy") as file:
            return json.loads((file.metadata() or {}).get(name, "null"))
    except (OSError, SafetensorError, ValueError):
        return None


def _parts(path: epath.Path) -> list[epath.Path]:
    """Return the safetensors files of a path: itself, or those that it lists as an index."""
    if path.suffix != ".json":
        return [path]
    try:
        index = json.loads(path.read_text())
        names = sorted(set(index["weight_map"].values()))
    except OSError as error:
        raise UserError(
            f"weights {path} cannot be read ({error.strerror or error}): name a safetensors file"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"weights {path} are JSON, but no index of safetensors files: name a safetensors file, "
            "or the index of several"
        ) from error
    parts = [path.parent / str(name) for name in names]
    missing = [part.name for part in parts if not part.exists()]
    if missing or not parts:
        raise UserError(
            f"weights {path} list {len(parts)} files, of which {', '.join(missing[:3]) or 'none'} "
            "is not there: fetch it too"
        )
    return parts


def _open(path: epath.Path) -> Any:
    try:
        with path.open("rb") as file:
            start = file.read(512)
        opened = safe_open(path, framework="numpy")
        digest = (opened.metadata() or {}).get(DIGEST)
        if digest is not None and digest != digest_of(path, digest, files.version(path)):
            raise UserError(
                f"weights {path} have changed since they were written (their digest is another): "
                "fetch or convert them again"
            )
        return opened
    except OSError as error:
        raise UserError(
            f"weights {path} cannot be read ({error.strerror or error}): name a safetensors file"
        ) from error
    except SafetensorError as error:
        raise UserError(f"weights {path} {_what_it_is(path, start, error)}") from error


def _what_it_is(path: epath.Path, start: bytes, error: Exception) -> str:
    """Describe a file that is no safetensors file, and the remedy."""
    # What a download often is instead of the file.
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith(b"version https://git-lfs"):
        return (
            "are a Git LFS pointer, not the file itself: run git lfs pull there, or download "
            "the file from its page"
        )
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return (
            "are a web page that was saved under this name: download the file itself (on "
            "Hugging Face, the address with /resolve/)"
        )
    if text.startswith((b"{", b"[")):
        return (
            "are JSON text: name a safetensors file, or an index of several by its name "
            "(….safetensors.index.json)"
        )
    # Archives, by what they hold.
    if start.startswith(b"PK\x03\x04"):
        try:
            with path.open("rb") as file, zipfile.ZipFile(file) as archive:
                names = archive.namelist()
        except (OSError, zipfile.BadZipFile):
            names = []
        if names and all(name.endswith(".npy") for name in names):
            return "are an npz file of numpy arrays: convert them to safetensors first"
        if any(name.endswith(".pkl") for name in names):
            return (
                "are a pickle, which could run code and is never read: convert them to "
                "safetensors first"
            )
        return "are a zip archive: unpack it, and name the safetensors file in it"
    if start[:1] == b"\x80" and start[1:2] <= b"\x05":
        return (
            "are a pickle, which could run code and is never read: convert them to safetensors "
            "first"
        )
    if start.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")):
        return "are compressed: unpack them first"
    kinds = {b"\x93NUMPY": "a numpy array", b"\x89HDF": "an HDF5 file", b"GGUF": "a GGUF file"}
    for magic, kind in kinds.items():
        if start.startswith(magic):
            return f"are {kind}: convert them to safetensors first"
    return f"are truncated or no safetensors file ({error}): fetch them again"


def _without_prefix(
    path: epath.Path, places: Mapping[str, Any], known: str
) -> dict[str, tuple[Any, str]]:
    """Name without prefix → (file, name in it).

    Wrappers and compilers put their own names before a network's (`module.`, `_orig_mod.`,
    `model.diffusion_model.`), and trainers keep an average of it (`ema.`), which is then the one to
    use.
    """
    found: collections.Counter[str] = collections.Counter()
    for name in places:
        match = re.fullmatch(rf"((?:[^.]+\.)*?)(?:{known})", name)
        if match:
            found[match[1]] += 1
    if not found or found.keys() == {""}:
        return {name: (file, name) for name, file in places.items()}
    most = max(found.values())
    whole = [prefix for prefix, count in found.items() if count == most]
    averages = [prefix for prefix in whole if "ema" in prefix.lower()]
    if len(whole) > 1 and "" in whole and not averages:
        whole = [""]
    if len(averages or whole) > 1:
        raise UserError(
            f"weights {path} hold {len(whole)} networks, with names that begin with "
            f"{', '.join(sorted(whole))}: save the wanted one alone"
        )
    (prefix,) = averages or whole
    if prefix:
        others = len(places) - sum(name.startswith(prefix) for name in places)
        left = f"; {others} other tensors are left out" if others else ""
        log.info("names in weights %s begin with %s: it is taken off%s", path, prefix, left)
    return {
        name.removeprefix(prefix): (file, name)
        for name, file in places.items()
        if name.startswith(prefix)
    }
