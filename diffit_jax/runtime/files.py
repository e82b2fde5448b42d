"""Paths as people write them, atomic writes, results of earlier requests, locks on directories.

On local disks and `gs://` alike.
"""

import codecs
import contextlib
import dataclasses
import errno
import hashlib
import importlib.util
import json
import logging
import os
import re
import secrets
import socket
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from etils import epath

from diffit_jax.errors import UserError

log = logging.getLogger(__name__)


def resolve(path: epath.PathLike, flag: str) -> epath.Path:
    """Resolve a path that a person wrote to an absolute one.

    `~` and `file://` are resolved, other URLs stay as they are.

    Args:
      path: relative to the current directory, or absolute, or a URL such as `gs://bucket/run`.
      flag: the flag, config key or argument that named it, for the error message.

    Raises:
      UserError: it is empty (an unset variable of the shell, perhaps), names a home directory that
        is not there, or is half a URL.
    """
    # A variable of the shell that is not set arrives as an empty text.
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
    # URLs stay as they are; a disk would take a mistyped one for a directory.
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
        absolute = str(Path(text).absolute())
        encoding = codecs.lookup(sys.getfilesystemencoding()).name
        # Libraries in C++ write names in UTF-8, whatever Python does: there would be two places.
        if encoding != "utf-8" and not absolute.isascii():
            raise UserError(
                f"{flag} {absolute!a} has letters beyond ASCII, and file names are in "
                f"{encoding} here: set the variable LC_ALL to C.UTF-8"
            )
        return epath.Path(absolute)
    except OSError as error:  # the current directory is gone
        raise UserError(
            f"{flag} {text} is relative to a directory that is not there ({error.strerror}): write "
            "the whole path"
        ) from error


# Packages that read and write paths of a scheme.
_SCHEMES = {"gs": "gcsfs", "s3": "s3fs"}


def _check_scheme(url: str, flag: str) -> None:
    """Raise `UserError` for a URL of a scheme that cannot be used here."""
    scheme = url.partition(":")[0].lower()
    if scheme == "hf":
        raise UserError(
            f"{flag} {url} is on the Hugging Face hub, which is only read from, where weights, "
            "images or prepared data are named: use a path of a disk, or gs://bucket/path"
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
    """Return the home directory; None for a container's user without an entry and no HOME."""
    expanded = os.path.expanduser("~")
    return None if expanded.startswith("~") else Path(expanded)


def is_local(path: epath.PathLike) -> bool:
    """Whether an absolute path is on a disk of this machine (or mounted on it), not a URL."""
    return "://" not in os.fspath(path)


def size(path: epath.PathLike) -> int:
    """Return the bytes of a file."""
    path = epath.Path(path)
    # etils' also asks for the owner's name, who may have none.
    return os.stat(path).st_size if is_local(path) else path.stat().length


def version(path: epath.PathLike) -> tuple[int, ...]:
    """Return what tells a file on a disk from a later one of its name; () for URLs.

    For whoever keeps files open: in a notebook they are made anew under their names.
    """
    if not is_local(path):
        return ()
    facts = os.stat(path)
    return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns


def sha256(path: epath.Path) -> str:
    """Return the hash of a file's bytes, read part by part."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(2**22):
            digest.update(part)
    return digest.hexdigest()


def read_json(path: epath.PathLike, kind: type = dict) -> Any:
    """Return the content of a JSON file if it exists and is of this kind; otherwise None."""
    try:
        content = json.loads(epath.Path(path).read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, kind) else None


def write_json(path: epath.PathLike, content: Any) -> None:
    """Write a JSON file atomically, indented."""
    write_bytes(path, (json.dumps(content, indent=2) + "\n").encode())


class Found(NamedTuple):
    """The file at a path where a command writes, compared with its request.

    Attributes:
      state: "missing"; "partial", begun for the same request; "done", of the same request; "other",
        of another one, or of unknown origin.
      content: of the file; {} if it cannot be read.
      differences: (theirs, ours) of each part of the request that differs, by its name.
    """

    state: str
    content: Mapping[str, Any]
    differences: Mapping[str, tuple[Any, Any]]


@dataclasses.dataclass(frozen=True)
class Artifact:
    """A file that a command makes, and whether an earlier one may be used.

    It may if it answers the same request, judged by its content, not by its name.

    Attributes:
      path: of the file.
      fingerprint: JSON values by name of all that the work depends on.
      of: returns the fingerprint in the content of the file; None: it has none.
      complete: whether by that content the work is done.
      read: returns the content of the file; None: it is missing, or damaged.
    """

    path: epath.Path
    fingerprint: Mapping[str, Any]
    of: Callable[[Any], Mapping[str, Any] | None] = lambda content: content
    complete: Callable[[Any], bool] = lambda content: True
    read: Callable[[epath.Path], Mapping[str, Any] | None] | None = None

    def inspect(self) -> Found:
        """Compare the file with the request."""
        content = (self.read or read_json)(self.path)
        if content is None:
            return Found("other" if self.path.exists() else "missing", {}, {})
        theirs, ours = self.of(content), self.fingerprint
        differing = {} if theirs is None else differences(ours, theirs)
        if theirs is None or differing:
            return Found("other", content, differing)
        return Found("done" if self.complete(content) else "partial", content, {})


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return (theirs, ours) by name of the values that differ as JSON has them."""
    one, other = plain(ours), plain(theirs)
    names = [name for name in {**one, **other} if one.get(name) != other.get(name)]
    return {name: (theirs.get(name), ours.get(name)) for name in names}


def plain(value: Any) -> Any:
    """Return a value as JSON gives it back: tuples are lists."""
    return json.loads(json.dumps(value))


@contextlib.contextmanager
def writing(path: epath.PathLike) -> Iterator[Any]:
    """Open a binary file to write to, which appears under its name when the block ends.

    Until then it has a temporary name, and it is removed if the block fails.

    Raises:
      UserError: the file cannot be written.
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
                f"{path} cannot be written ({error.strerror or error}): "
                f"{_make_room(error, 'choose another place')}"
            ) from error
        raise


def write_bytes(path: epath.PathLike, content: bytes) -> None:
    """Write a file atomically, see `writing`."""
    with writing(path) as file:
        file.write(content)


def replace_with_notice(path: epath.PathLike, content: bytes) -> None:
    """Write a file as `write_bytes` does, and log it if one was there.

    For figures, which are soon made again.
    """
    if epath.Path(path).exists():
        log.warning("%s is replaced", path)
    write_bytes(path, content)


def remedy_for_writing(error: BaseException) -> str | None:
    """Return what helps if a file could not be written; None if the program is at fault.

    Libraries wrap the system's error, so that the whole chain of causes is looked at, by number or
    by text.
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
    # The first remedy that any cause asks for.
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
    """Return an error, its cause, and so on."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    return chain


def refuse_existing(path: epath.PathLike, flag: str, overwrite: bool) -> None:
    """Raise `UserError` if the file that `flag` names exists, unless it may be replaced."""
    if not overwrite and epath.Path(path).exists():
        raise UserError(f"{flag} {path} is there already: name another file, or say --overwrite")


def make_directory(path: epath.PathLike, flag: str) -> epath.Path:
    """Create a directory, if need be, and make sure that files can be written there.

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
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
        raise UserError(
            f"{flag} {path} cannot be written ({error.strerror or error}): "
            f"{_make_room(error, 'choose another directory')}"
        ) from error
    return path


def _make_room(error: OSError, otherwise: str) -> str:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return "make room, or choose another place" if full else otherwise


NAME = ".owner"
BEAT_S = 20.0  # between beats of a living owner
PATIENCE_S = 90.0  # an owner elsewhere that does not beat for so long is dead
SETTLE_S = 2.0  # two that came at once have both written by then
POLL_S = 1.0
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@contextlib.contextmanager
def owned(directory: epath.PathLike, what: str, wait: bool = False) -> Iterator[None]:
    """Own a directory that exists for the length of the block.

    Args:
      directory: absolute; local or `gs://`.
      what: it is, for messages: "workdir".
      wait: until another owner is done, instead of the error.

    Raises:
      UserError: a living process owns it; it is named.
    """
    path = epath.Path(directory) / NAME
    release = None
    try:
        if is_local(path):
            release = _flock(Path(path), f"{what} {directory}", wait)
        if release is None:
            release = _heartbeat(path, f"{what} {directory}", wait)
    except OSError as error:
        raise UserError(
            f"{what} {directory} cannot be written ({error.strerror or error}): "
            f"{_make_room(error, 'choose another place')}"
        ) from error
    try:
        yield
    finally:
        release()


def _flock(path: Path, what: str, wait: bool) -> Any:
    """Take a lock of the operating system; return a function that releases it.

    None where this disk has no locks.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    waiting = False
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = _parsed(os.pread(descriptor, 4096, 0))
            os.close(descriptor)
            if not wait:
                raise _in_use(what, owner) from None
            if not waiting:
                log.info("%s is in use by %s: waiting for it", what, _name(owner))
                waiting = True
            time.sleep(POLL_S)
            continue
        except OSError as error:
            os.close(descriptor)
            if error.errno in _NO_LOCKS:
                return None
            raise
        # The lock counts only if the file is still the one with this name.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                break
        os.close(descriptor)  # the last owner has just removed it
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(_me()).encode(), 0)
    except OSError:
        os.unlink(path)
        os.close(descriptor)
        raise

    def release() -> None:
        with contextlib.suppress(OSError):
            os.unlink(path)
        os.close(descriptor)

    return release


def _heartbeat(path: epath.Path, what: str, wait: bool) -> Any:
    """Own a directory by a file that is touched all the time; return a function that ends it."""
    me = _me() | {"token": secrets.token_hex(8), "beat": 0}
    while True:
        _await_silence(path, what, wait)
        _write(path, me)
        time.sleep(SETTLE_S)
        winner = _read(path)
        if winner.get("token") == me["token"]:
            break
        if not wait:
            raise _in_use(what, winner)
    # While the block runs, a thread shows that this process is alive.
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(BEAT_S):
            try:
                if (owner := _read(path)).get("token", me["token"]) != me["token"]:
                    log.error(
                        "%s was taken over by %s, since this process gave no sign of life for %.0f "
                        "s",
                        what,
                        _name(owner),
                        PATIENCE_S,
                    )
                    return
                me["beat"] += 1
                _write(path, me)
            except Exception as error:  # the network; the next beat may get through
                log.warning("no sign of life could be written to %s (%s)", path, error)

    thread = threading.Thread(target=beat, daemon=True, name="heartbeat")
    thread.start()

    def release() -> None:
        stop.set()
        thread.join()
        with contextlib.suppress(Exception):
            if _read(path).get("token") == me["token"]:
                path.unlink(missing_ok=True)

    return release


def _await_silence(path: epath.Path, what: str, wait: bool) -> None:
    """Wait until no living process owns the directory."""
    seen, since = _read(path), time.monotonic()
    if not seen:
        return
    if _is_dead_here(seen):
        log.info("%s was left behind by %s, which has ended: taking over", what, _name(seen))
        return
    log.info(
        "%s belongs to %s: waiting up to %.0f s for a sign of life", what, _name(seen), PATIENCE_S
    )
    while time.monotonic() - since < PATIENCE_S:
        time.sleep(min(POLL_S, PATIENCE_S / 10))
        now = _read(path)
        if not now:
            return
        if now != seen:
            if not wait:
                raise _in_use(what, now)
            seen, since = now, time.monotonic()
    log.warning("%s: no sign of life of %s for %.0f s: taking over", what, _name(seen), PATIENCE_S)


def _me() -> dict[str, Any]:
    """Describe this process. Its number is unique only within its machine, boot and container."""
    with contextlib.suppress(OSError):
        machine = Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink(
            "/proc/self/ns/pid"
        )
        return {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "machine": machine,
            "started": _started(os.getpid()),
            "since": _now(),
        }
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "machine": "",
        "started": "",
        "since": _now(),
    }


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")


def _started(pid: int) -> str:
    """Return the start time of a process in kernel ticks (PIDs are reused); "" if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


def _is_dead_here(owner: dict[str, Any]) -> bool:
    """Whether an owner ran on this machine and does not any more."""
    me = _me()
    return (
        bool(me["machine"])
        and owner.get("machine") == me["machine"]
        and _started(int(owner.get("pid") or 0)) != owner.get("started")
    )


def _in_use(what: str, owner: dict[str, Any]) -> UserError:
    return UserError(
        f"{what} is in use by {_name(owner)}: wait until it has ended, or choose another place"
    )


def _name(owner: dict[str, Any]) -> str:
    return (
        f"process {owner.get('pid', '?')} on {owner.get('host', 'an unknown host')} (since "
        f"{owner.get('since', '?')})"
    )


def _read(path: epath.Path) -> dict[str, Any]:
    """Return the owner's description; {} if there is none."""
    try:
        return _parsed(path.read_bytes()) or {"token": "?"}
    except FileNotFoundError:
        return {}


def _parsed(content: bytes) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _write(path: epath.Path, owner: dict[str, Any]) -> None:
    write_bytes(path, json.dumps(owner).encode())
