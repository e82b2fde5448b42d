"""Paths as people write them, and files that appear whole or not at all, on local disks and `gs://`
alike."""

import contextlib
import errno
import importlib.util
import json
import logging
import os
import re
import secrets
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from etils import epath

from diffit_jax.errors import UserError

log = logging.getLogger(__name__)


def resolve(path: epath.PathLike, flag: str) -> epath.Path:
    """A path as a person writes it, as an absolute one: `~` and `file://` are resolved, other URLs
    stay as they are.

    Args:
      path: relative to the current directory, or absolute, or a URL such as `gs://bucket/run`.
      flag: the flag, config key or argument that named it, for the error message.

    Raises:
      UserError: it is empty (an unset variable of the shell, perhaps), names a home directory that
        is not there, or is half a URL.
    """
    text = os.fspath(path).strip() if isinstance(path, str | os.PathLike) else ""
    if not text:
        raise UserError(f"{flag} is empty: name a path (was a variable of the shell not set?)")
    if text.lower().startswith("file:"):
        url = urllib.parse.urlsplit(text)
        if url.netloc not in ("", "localhost"):
            raise UserError(
                f"{flag} {text} names a file of the host {url.netloc}: write file:///path, or just "
                "the path"
            )
        text = urllib.parse.unquote(url.path)
    if re.match(r"[A-Za-z][\w+.-]+:/", text):  # one letter is a drive
        if not re.match(r"[^:]+://[^/]", text):
            raise UserError(f"{flag} {text} is half a URL: write gs://bucket/path")
        _check_scheme(text, flag)
        return epath.Path(text)
    if text in ("None", "null", "nan"):
        raise UserError(
            f"{flag} is {text}, which is not a path: leave it out, or write ./{text} if a file is "
            "really called so"
        )
    if text.startswith("~"):
        expanded = os.path.expanduser(text)
        if expanded.startswith("~"):
            raise UserError(
                f"{flag} {text} names a home directory that is not known here: write the whole path"
            )
        text = expanded
    try:
        return epath.Path(Path(text).absolute())
    except OSError as error:  # the current directory is gone
        raise UserError(
            f"{flag} {text} is relative to a directory that is not there ({error.strerror}): write "
            "the whole path"
        ) from error


# What paths of a scheme are read and written with, beside this package.
_SCHEMES = {"gs": "gcsfs", "s3": "s3fs"}


def _check_scheme(url: str, flag: str) -> None:
    """Raises `UserError` where a URL cannot be used: wherever a path is taken, not in the middle of
    a run."""
    scheme = url.partition(":")[0].lower()
    if scheme == "hf":
        raise UserError(
            f"{flag} {url} is on the Hugging Face hub, which is only read from, where weights, "
            "pictures or prepared data are named: use a path of a disk, or gs://bucket/path"
        )
    if scheme in ("http", "https", "ftp"):
        raise UserError(
            f"{flag} {url} is an address in the web: download it first, and name the file"
        )
    if scheme not in _SCHEMES:
        raise UserError(
            f"{flag} {url} has the scheme {scheme}://, which is not known: use a path of a mounted "
            "disk, or gs://bucket/path"
        )
    library = _SCHEMES[scheme]
    if importlib.util.find_spec(library) is None:
        raise UserError(
            f"{flag} {url} cannot be used without the library {library}: pip install {library}"
        )


def home() -> Path | None:
    """The home directory, None where there is none (a container's user without an entry, and no
    HOME)."""
    expanded = os.path.expanduser("~")
    return None if expanded.startswith("~") else Path(expanded)


def is_local(path: epath.PathLike) -> bool:
    """Whether an absolute path is on a disk of this machine (or mounted on it), not a URL."""
    return "://" not in os.fspath(path)


def size(path: epath.PathLike) -> int:
    """Bytes of a file."""
    path = epath.Path(path)
    # etils' also asks for the owner's name, who may have none.
    return os.stat(path).st_size if is_local(path) else path.stat().length


def read_json(path: epath.PathLike, kind: type = dict) -> Any:
    """The content of a JSON file, if it is there and of a kind; otherwise None."""
    try:
        content = json.loads(epath.Path(path).read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, kind) else None


@contextlib.contextmanager
def writing(path: epath.PathLike) -> Iterator[Any]:
    """A binary file to write to: it has a temporary name of its own until the block ends, and goes
    away if the block fails.

    Raises:
      UserError: the place cannot be written.
    """
    path = epath.Path(path)
    # Two may write the same file at once.
    temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}.partial"
    try:
        with temporary.open("wb") as file:
            yield file
        temporary.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise UserError(
                f"{path} cannot be written ({error.strerror or error}): choose another place"
            ) from error
        raise


def write_bytes(path: epath.PathLike, content: bytes) -> None:
    """Writes a file whole or not at all, see `writing`."""
    with writing(path) as file:
        file.write(content)


def replace_in_words(path: epath.PathLike, content: bytes) -> None:
    """Writes a file as `write_bytes` does, and says so if one was there: for figures, which are
    soon made again."""
    if epath.Path(path).exists():
        log.warning("%s is replaced", path)
    write_bytes(path, content)


def remedy_for_writing(error: BaseException) -> str | None:
    """What helps if a file could not be written: None if the fault is not the place's, but the
    program's.

    Libraries wrap what the system says, so that the whole chain of causes is looked at, by number
    or by text.
    """
    remedies = {
        "make room": (
            (errno.ENOSPC, errno.EDQUOT),
            r"no space left|disk quota exceeded|RESOURCE_EXHAUSTED",
        ),
        "make it writable": (
            (errno.EACCES, errno.EPERM, errno.EROFS),
            r"permission denied|read-only file system|PERMISSION_DENIED",
        ),
        "put the directory back, which has been moved or deleted": (
            (errno.ENOENT, errno.ENOTDIR),
            r"no such file or directory|NOT_FOUND",
        ),
        "look at the disk or network": (
            (
                errno.EIO,
                errno.ESTALE,
                errno.ETIMEDOUT,
                errno.ECONNRESET,
                errno.EMFILE,
                errno.ENFILE,
            ),
            r"input/output error|stale file handle|timed out|UNAVAILABLE|DEADLINE_EXCEEDED",
        ),
    }
    chain = causes_of(error)
    for remedy, (numbers, pattern) in remedies.items():
        for link in chain:
            by_number = isinstance(link, OSError) and link.errno in numbers
            by_text = isinstance(link, OSError | ValueError | RuntimeError) and re.search(
                rf"(?i){pattern}", str(link)
            )
            if by_number or by_text:
                return remedy
    return "choose another place" if any(isinstance(link, OSError) for link in chain) else None


def causes_of(error: BaseException) -> list[BaseException]:
    """An error, what it came from, and so on."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    return chain


def refuse_existing(path: epath.PathLike, flag: str, overwrite: bool) -> None:
    """Raises `UserError` if a file that `flag` names is there already, unless it may be
    replaced."""
    if not overwrite and epath.Path(path).exists():
        raise UserError(f"{flag} {path} is there already: name another file, or say --overwrite")


def make_directory(path: epath.PathLike, flag: str) -> epath.Path:
    """Creates a directory, if need be, and makes sure that files can be written there.

    Args:
      path: the directory.
      flag: the flag or config key that named it, for the error message.

    Raises:
      UserError: it cannot be created or written.
    """
    path = epath.Path(path)
    if not is_local(path):
        _check_scheme(str(path), flag)
    probe = path / f".writable-{secrets.token_hex(4)}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"{flag} {path} cannot be written ({error.strerror or error}): choose another directory"
        ) from error
    return path
