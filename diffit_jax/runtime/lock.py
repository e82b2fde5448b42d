"""One owner at a time: of a work directory, of the parts of a sampling request, of a data set that
is being prepared.

On a disk it is `flock`, which ends with its process, however that ends. Objects in `gs://` cannot
be locked: there the owner rewrites a small file (a heartbeat), and whoever finds one that does not
beat any more takes over. Nobody is ever refused because of a dead owner.
"""

import contextlib
import errno
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from etils import epath

from diffit_jax.errors import UserError
from diffit_jax.runtime import files

log = logging.getLogger(__name__)

NAME = ".owner"
BEAT_S = 20.0  # between beats of a living owner
PATIENCE_S = 90.0  # an owner elsewhere that does not beat for so long is dead
SETTLE_S = 2.0  # two that came at once have both written by then
POLL_S = 1.0
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@contextlib.contextmanager
def owned(directory: epath.PathLike, what: str, wait: bool = False) -> Iterator[None]:
    """Owns a directory that exists for the length of the block.

    Args:
      directory: absolute; local or `gs://`.
      what: it is, for messages: "workdir".
      wait: until another owner is done, instead of the error.

    Raises:
      UserError: a living process owns it; it is named.
    """
    path = epath.Path(directory) / NAME
    release = None
    if files.is_local(path):
        release = _flock(Path(path), f"{what} {directory}", wait)
    if release is None:
        release = _heartbeat(path, f"{what} {directory}", wait)
    try:
        yield
    finally:
        release()


def _flock(path: Path, what: str, wait: bool) -> Any:
    """A function that gives the lock back; None where this disk has no locks."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    told = False
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = _parsed(os.pread(descriptor, 4096, 0))
            os.close(descriptor)
            if not wait:
                raise _in_use(what, owner) from None
            if not told:
                log.info("%s is in use by %s: waiting for it", what, _name(owner))
                told = True
            time.sleep(POLL_S)
            continue
        except OSError as error:
            os.close(descriptor)
            if error.errno in _NO_LOCKS:
                return None
            raise
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                break
        os.close(descriptor)  # the last owner has just removed it
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(_me()).encode(), 0)

    def release() -> None:
        with contextlib.suppress(OSError):
            os.unlink(path)
        os.close(descriptor)

    return release


def _heartbeat(path: epath.Path, what: str, wait: bool) -> Any:
    """A function that stops the heartbeat and removes it."""
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
    """Returns when no living process owns the place."""
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
    """Who this process is. A number of a process means something only within its machine, boot and
    container."""
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
    """When a process of this machine was started, in the kernel's ticks: numbers of processes come
    again. "" if there is none."""
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
    """What the owner wrote; {} if there is none."""
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
    files.write_bytes(path, json.dumps(owner).encode())
