"""Several processes as one run: how they find each other, and how they make sure that they are doing the same thing."""

import contextlib
import dataclasses
import glob
import hashlib
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from diffit_jax.errors import UserError

T = TypeVar("T")

HEARTBEAT_S = 30  # a process that is silent for so long is dead, and the others end


@dataclasses.dataclass(frozen=True)
class Cluster:
    """How the processes find each other.

    Attributes:
      coordinator: host:port of process 0; None: found out on TPU pods and under Slurm, otherwise there is one process.
      num_processes, process_id: how many processes, and which this one is, if a coordinator is given.
      timeout_s: how long to wait until all have come.
    """

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    timeout_s: int = 300


class Preempted(Exception):
    """The machine is about to be taken away, everything is saved, and the same command goes on later."""


def initialize(cluster: Cluster = Cluster()) -> None:
    """Connects this process to the others, before anything else uses jax. Does nothing where there is only one.

    Raises:
      UserError: impossible flags, or not all processes came in time.
    """
    given = (cluster.coordinator, cluster.num_processes, cluster.process_id)
    if given == (None, None, None):
        if not _on_tpu() and int(os.environ.get("SLURM_NTASKS", "1")) < 2:
            return
    elif None in given:
        raise UserError("--coordinator, --num_processes and --process_id go together: give all three, or none on TPU pods and under Slurm")
    elif not 0 <= cluster.process_id < cluster.num_processes:
        raise UserError(f"--process_id {cluster.process_id} is not in 0-{cluster.num_processes - 1}: change it or --num_processes")
    else:
        _roll_call(cluster)
    # Past its timeout, jax's runtime aborts the process; this thread has the last word before that.
    warning = threading.Timer(max(cluster.timeout_s - 2, 1), _say_who_is_missing, [cluster])
    warning.daemon = True
    warning.start()
    try:
        jax.distributed.initialize(
            *given, initialization_timeout=cluster.timeout_s, heartbeat_timeout_seconds=HEARTBEAT_S, shutdown_timeout_seconds=60
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(f"this process could not join the others ({' '.join(str(error).split())[:160]}): check the flags") from error
    finally:
        warning.cancel()
    if not is_first():
        logging.getLogger("diffit_jax").setLevel(logging.WARNING)  # process 0 speaks for all


def is_first() -> bool:
    """Whether this process is the one that logs and writes files."""
    return jax.process_index() == 0


def check_agreement(facts: Mapping[str, Callable[[], str]]) -> None:
    """Makes sure that every process has the same facts: functions that give a text, of which digests are compared.

    With one process there is nothing to compare, and they are not called.

    Raises:
      UserError: on every process, if one differs from process 0; it says in which fact.
    """
    if jax.process_count() == 1:
        return
    digests = np.stack([np.frombuffer(hashlib.sha256(text().encode()).digest(), np.uint8) for text in facts.values()])
    everyones = multihost_utils.process_allgather(digests)
    for index, name in enumerate(facts):
        others = [process for process in range(jax.process_count()) if (everyones[process, index] != everyones[0, index]).any()]
        if others:
            raise UserError(f"process {others[0]} has another {name} than process 0: start all processes with the same command and code")


def code_version() -> str:
    """Digest of this package's source and of the versions of what it stands on."""
    sources = sorted(Path(__file__).parent.rglob("*.py"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    return f"{digest} jax {jax.__version__}"


def first_then_all(action: Callable[[], T], then: Callable[[], T] | None = None) -> T:
    """Runs `action` on process 0 and, when it is done, `then` (None: `action`) on the others. If either fails anywhere, all fail."""
    if jax.process_count() == 1:
        return action()
    result, error = None, None
    for turn in (True, False):
        if is_first() == turn:
            try:
                result = (action if turn or then is None else then)()
            except UserError as failure:
                error = failure
        failed = multihost_utils.process_allgather(np.array(error is not None))
        if error is not None:
            raise error
        if failed.any():
            raise UserError(f"process {int(np.argmax(failed))} could not go on: its message says why")
    return result


def check_shared(directory: epath.Path) -> None:
    """Makes sure that all processes see the same directory.

    Raises:
      UserError: on every process, if one does not see what process 0 has written there.
    """
    if jax.process_count() == 1:
        return
    token = multihost_utils.broadcast_one_to_all(np.frombuffer(os.urandom(8), np.uint8))
    mark = directory / f".shared-{bytes(np.asarray(token, np.uint8)).hex()}"
    first_then_all(lambda: mark.write_bytes(b""), lambda: None)
    sees = multihost_utils.process_allgather(np.array(mark.exists()))
    if is_first():
        mark.unlink()
    if not sees.all():
        raise UserError(
            f"workdir {directory} is not shared: process {int(np.argmin(sees))} does not see the files of process 0 there, but all write "
            "into the same checkpoints: use gs:// or a shared disk"
        )


def everywhere(value: bool) -> bool:
    """Whether it is so on every process."""
    return value if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.array(value)).all())


def agreed(value: bool) -> bool:
    """What process 0 says, on every process."""
    if jax.process_count() == 1:
        return value
    return bool(multihost_utils.broadcast_one_to_all(np.array(value)))


def from_first(flags: Sequence[bool]) -> list[bool]:
    """The flags of process 0, on every process."""
    if jax.process_count() == 1:
        return list(flags)
    return [bool(flag) for flag in np.asarray(multihost_utils.broadcast_one_to_all(np.array(flags, bool)))]


def gather(array: jax.Array) -> np.ndarray:
    """A global array on every process's host."""
    if array.is_fully_addressable:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


class PreemptionNotice:
    """Tells when this run is to be interrupted: SIGTERM to any process, or the platform's notice. Use it as a context manager."""

    def __init__(self):
        self._signalled = False

    def __enter__(self) -> "PreemptionNotice":
        if jax.process_count() == 1:  # with several processes, jax's own service listens
            with contextlib.suppress(ValueError):  # not in the main thread: nothing to listen to
                self._previous = signal.signal(signal.SIGTERM, self._on_signal)
        return self

    def __exit__(self, *_) -> None:
        if hasattr(self, "_previous"):
            signal.signal(signal.SIGTERM, self._previous)

    def reached(self, step: int) -> bool:
        """Whether to save and end after this step; all processes get the same answer for the same step. Ask at every step."""
        if jax.process_count() == 1:
            return self._signalled
        return multihost_utils.reached_preemption_sync_point(step)

    def _on_signal(self, *_) -> None:
        self._signalled = True


@contextlib.contextmanager
def lost_processes() -> Iterator[None]:
    """Turns what jax says when another process has died into a message."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, RuntimeError) as error:
        text = str(error)
        if jax.process_count() > 1 and re.search(r"(?i)gloo|connection|heartbeat|unavailable|barrier|deadline|coordination", text):
            message = (
                f"another process was lost ({' '.join(text.split())[:160]}): start all processes again to go on from the last checkpoint"
            )
            raise UserError(message) from error
        raise


def _on_tpu() -> bool:
    wanted = os.environ.get("JAX_PLATFORMS", "tpu")
    return "tpu" in wanted and bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"))


def _say_who_is_missing(cluster: Cluster) -> None:
    print(
        f"error: not all processes came within {cluster.timeout_s} s: start the same command on every host, and let them reach the "
        "coordinator's port",
        file=sys.stderr,
        flush=True,
    )


def _roll_call(cluster: Cluster) -> None:
    """Waits at the coordinator's address until all processes have come; then the address is free again.

    Raises:
      UserError: on every process that came, with the numbers of those that did not.
    """
    host, _, port = cluster.coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"--coordinator {cluster.coordinator} is no address: write host:port")
    deadline = time.monotonic() + cluster.timeout_s
    everyone = set(range(cluster.num_processes))
    if cluster.process_id == 0:
        callers: dict[int, socket.socket] = {}
        try:
            server = socket.create_server(("", int(port)), backlog=cluster.num_processes)
        except OSError as error:
            raise UserError(f"--coordinator {cluster.coordinator} cannot be listened on ({error.strerror}): choose another port") from error
        with server:
            while callers.keys() | {0} != everyone and time.monotonic() < deadline:
                server.settimeout(max(deadline - time.monotonic(), 0.01))
                with contextlib.suppress(OSError, ValueError):
                    caller, _ = server.accept()
                    caller.settimeout(5)
                    callers[int(caller.recv(16).decode())] = caller
        missing = sorted(everyone - {0} - callers.keys())
        verdict = ",".join(map(str, missing)) or "go"
        for caller in callers.values():
            with contextlib.suppress(OSError):
                caller.sendall(verdict.encode())
            caller.close()
    else:
        verdict = None
        while verdict is None and time.monotonic() < deadline:
            try:
                with socket.create_connection((host, int(port)), timeout=2) as line:
                    line.sendall(str(cluster.process_id).encode())
                    line.settimeout(max(deadline - time.monotonic(), 0) + 5)
                    verdict = line.recv(4096).decode() or None
            except OSError:
                time.sleep(0.1)
        if verdict is None:
            raise UserError(
                f"process 0 did not answer at {cluster.coordinator} within {cluster.timeout_s} s: start it there, and open its port"
            )
        missing = [] if verdict == "go" else [int(number) for number in verdict.split(",")]
    if missing:
        came = cluster.num_processes - len(missing)
        raise UserError(
            f"{came} of {cluster.num_processes} processes came within {cluster.timeout_s} s (missing: {', '.join(map(str, missing))}): "
            "start the same command on every host"
        )
