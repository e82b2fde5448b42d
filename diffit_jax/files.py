"""Paths as people write them, and files that appear whole or not at all, on local disks and `gs://` alike."""

import contextlib
import os
import re
import secrets
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from etils import epath

from diffit_jax.errors import UserError


def resolve(path: epath.PathLike, flag: str) -> epath.Path:
    """A path as a person writes it, as an absolute one: `~` and `file://` are resolved, other URLs stay as they are.

    Args:
      path: relative to the current directory, or absolute, or a URL such as `gs://bucket/run`.
      flag: the flag, config key or argument that named it, for the error message.

    Raises:
      UserError: it is empty (an unset variable of the shell, perhaps), names a home directory that is not there, or is half a URL.
    """
    text = os.fspath(path).strip() if isinstance(path, str | os.PathLike) else ""
    if not text:
        raise UserError(f"{flag} is empty: name a path (was a variable of the shell not set?)")
    if text.lower().startswith("file:"):
        url = urllib.parse.urlsplit(text)
        if url.netloc not in ("", "localhost"):
            raise UserError(f"{flag} {text} names a file of the host {url.netloc}: write file:///path, or just the path")
        text = urllib.parse.unquote(url.path)
    if re.match(r"[A-Za-z][\w+.-]+:/", text):  # one letter is a drive
        if not re.match(r"[^:]+://[^/]", text):
            raise UserError(f"{flag} {text} is half a URL: write gs://bucket/path")
        return epath.Path(text)
    if text.startswith("~"):
        expanded = os.path.expanduser(text)
        if expanded.startswith("~"):
            raise UserError(f"{flag} {text} names a home directory that is not known here: write the whole path")
        text = expanded
    try:
        return epath.Path(Path(text).absolute())
    except OSError as error:  # the current directory is gone
        raise UserError(f"{flag} {text} is relative to a directory that is not there ({error.strerror}): write the whole path") from error


def home() -> Path | None:
    """The home directory, None where there is none (a container's user without an entry, and no HOME)."""
    expanded = os.path.expanduser("~")
    return None if expanded.startswith("~") else Path(expanded)


def is_local(path: epath.PathLike) -> bool:
    """Whether an absolute path is on a disk of this machine (or mounted on it), not a URL."""
    return "://" not in os.fspath(path)


@contextlib.contextmanager
def writing(path: epath.PathLike) -> Iterator[BinaryIO]:
    """A binary file to write to: it has a temporary name of its own until the block ends, and goes away if the block fails.

    Raises:
      UserError: the place cannot be written.
    """
    path = epath.Path(path)
    temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}.partial"  # two may write the same file at once
    try:
        with temporary.open("wb") as file:
            yield file
        temporary.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise UserError(f"{path} cannot be written ({error.strerror or error}): choose another place") from error
        raise


def write_bytes(path: epath.PathLike, content: bytes) -> None:
    """Writes a file whole or not at all, see `writing`."""
    with writing(path) as file:
        file.write(content)


def make_directory(path: epath.PathLike, flag: str) -> epath.Path:
    """Creates a directory, if need be, and makes sure that files can be written there.

    Args:
      path: the directory.
      flag: the flag or config key that named it, for the error message.

    Raises:
      UserError: it cannot be created or written.
    """
    path = epath.Path(path)
    probe = path / f".writable-{secrets.token_hex(4)}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise UserError(f"{flag} {path} cannot be written ({error.strerror or error}): choose another directory") from error
    except ImportError as error:  # gs:// needs gcsfs, which also brings what writes TensorBoard events there
        raise UserError(f"{flag} {path} cannot be used ({error}): pip install gcsfs") from error
    return path
