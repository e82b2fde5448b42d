"""Several processes as one run: how they connect, agree, wait for each other and end."""

import contextlib
import dataclasses
import glob
import hashlib
import inspect
import itertools
import logging
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from diffit_jax.errors import UserError
from diffit_jax.runtime import interruption

T = TypeVar("T")

HEARTBEAT_S = 30  # a process that is silent for so long is dead, and the others end
BARRIER_TIMEOUT_S = 7 * 24 * 3600  # for one that is only late they wait

_barriers = itertools.count()  # of this process, see `barrier`


@dataclasses.dataclass(frozen=True)
class Cluster:
    """How the processes find each other.

    Attributes:
      coordinator: host:port of process 0; None: found out on TPU pods and in a Slurm step of
        several tasks, otherwise there is one process.
      num_processes, process_id: how many processes, and which this one is, if a coordinator is
        given. With `num_processes` 1 and no coordinator there is one process, whatever the
        environment says.
      timeout_s: how long to wait until all have come.
    """

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    timeout_s: int = 300


def initialize(cluster: Cluster = Cluster()) -> None:
    """Connect this process to the others, before anything else uses jax.

    Does nothing where there is only one.

    Raises:
      UserError: impossible flags, or not all processes came in time.
    """
    coordinator, count, number = cluster.coordinator, cluster.num_processes, cluster.process_id
    given = (coordinator, count, number)
    if given == (None, 1, None):
        return
    if given == (None, None, None):
        tasks = _slurm_tasks()
        if tasks > 1:
            given = (None, tasks, int(os.environ["SLURM_PROCID"]))
        elif not _on_tpu():
            return
    elif coordinator is None or count is None or number is None:
        raise UserError(
            "--coordinator, --num_processes and --process_id go together: give all three, none on "
            "TPU pods and under Slurm, or --num_processes=1 alone for one process anywhere"
        )
    elif not 0 <= number < count:
        raise UserError(
            f"--process_id {number} is not in 0-{count - 1}: change it or --num_processes"
        )
    else:
        wait_for_processes(coordinator, count, number, cluster.timeout_s)
    # Past its timeout, jax's runtime aborts the process with a page of C++; this thread ends it
    # before that.
    warning = threading.Timer(max(cluster.timeout_s - 2, 1), _end_without_the_others, [cluster])
    warning.daemon = True
    warning.start()
    options: dict[str, Any] = {
        "initialization_timeout": cluster.timeout_s,
        "heartbeat_timeout_seconds": HEARTBEAT_S,
        "shutdown_timeout_seconds": 60,
    }
    known = inspect.signature(jax.distributed.initialize).parameters  # 0.7.2 has not the last one
    try:
        jax.distributed.initialize(
            *given, **{name: value for name, value in options.items() if name in known}
        )
    except (RuntimeError, ValueError, LookupError, OSError) as error:
        raise UserError(
            f"this process could not join the others ({' '.join(str(error).split())[:160]}): check "
            "the flags"
        ) from error
    finally:
        warning.cancel()
    if jax.process_count() > 1:
        # jax's service hears SIGTERM to any process and tells all of them; other signals reach it
        # in that form.
        interruption.forward_to(lambda: os.kill(os.getpid(), signal.SIGTERM))
    if not is_primary():
        logging.getLogger("diffit_jax").setLevel(logging.WARNING)  # process 0 speaks for all


def wait_for_processes(
    coordinator: str, num_processes: int, process_id: int, timeout_s: int
) -> None:
    """Wait at the coordinator's address until all processes have come, then free the address.

    jax itself would answer a missing process with a page of C++.

    Args:
      coordinator: host:port of process 0.
      num_processes: how many processes there are.
      process_id: number of this one.
      timeout_s: how long to wait.

    Raises:
      UserError: on every process that came, with the numbers of those that did not.
    """
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise UserError(f"--coordinator {coordinator} is not an address: write host:port")
    deadline = time.monotonic() + timeout_s
    if process_id == 0:
        missing = _gather_others(coordinator, int(port), num_processes, deadline)
    else:
        missing = _report_to_primary(host, int(port), process_id, deadline)
    if missing is None:
        raise UserError(
            f"process 0 did not answer at {coordinator} within {timeout_s} s: start it there, and "
            "open its port"
        )
    if missing:
        raise UserError(
            f"{num_processes - len(missing)} of {num_processes} processes came within {timeout_s} "
            f"s (missing: {', '.join(map(str, missing))}): start the same command on every host"
        )


def _gather_others(coordinator: str, port: int, num_processes: int, deadline: float) -> list[int]:
    """Listen for the other processes on process 0 and answer each; return the missing ones."""
    others = set(range(1, num_processes))
    callers: dict[int, socket.socket] = {}
    try:
        server = socket.create_server(("", port), backlog=num_processes)
    except OSError as error:
        raise UserError(
            f"--coordinator {coordinator} cannot be listened on ({error.strerror}): choose another "
            "port"
        ) from error
    with server:
        while callers.keys() != others and time.monotonic() < deadline:
            server.settimeout(max(deadline - time.monotonic(), 0.01))
            with contextlib.suppress(OSError, ValueError):
                caller, _ = server.accept()
                caller.settimeout(5)
                callers[int(caller.recv(16).decode())] = caller
    missing = sorted(others - callers.keys())
    verdict = ",".join(map(str, missing)) or "go"
    for caller in callers.values():
        with contextlib.suppress(OSError):
            caller.sendall(verdict.encode())
        caller.close()
    return missing


def _report_to_primary(host: str, port: int, process_id: int, deadline: float) -> list[int] | None:
    """Send this process's number to process 0.

    Returns:
      The missing processes; None if process 0 did not answer.
    """
    while time.monotonic() < deadline:
        try:
            with socket.create_connection((host, port), timeout=2) as line:
                line.sendall(str(process_id).encode())
                line.settimeout(max(deadline - time.monotonic(), 0) + 5)
                verdict = line.recv(4096).decode()
        except OSError:
            time.sleep(0.1)
            continue
        if verdict:
            return [] if verdict == "go" else [int(number) for number in verdict.split(",")]
    return None


def is_primary() -> bool:
    """Whether this process is the one that logs and writes files."""
    return jax.process_index() == 0


def check_agreement(texts: Mapping[str, Callable[[], str]]) -> None:
    """Make sure that every process has the same texts, by comparing digests.

    Args:
      texts: functions that return a text, by its name; not called with one process.

    Raises:
      UserError: on every process, if one differs from process 0; it names the entry.
    """
    if jax.process_count() == 1:
        return
    digests = np.stack(
        [
            np.frombuffer(hashlib.sha256(text().encode()).digest(), np.uint8)
            for text in texts.values()
        ]
    )
    everyones = _of_each_process(digests)
    for index, name in enumerate(texts):
        others = [
            process
            for process in sorted(everyones)
            if (everyones[process][index] != everyones[0][index]).any()
        ]
        if others:
            raise UserError(
                f"process {others[0]} has another {name} than process 0: start all processes with "
                "the same command and code"
            )


def barrier() -> None:
    """Wait until every process is here, however late it comes; return at once with one process.

    Between two barriers a process may take minutes: it reads, downloads, scores or compiles.
    Devices do not wait that long: a collective's first use ends after 30 s on CPUs if a process has
    not come, and the run with it.

    Raises:
      UserError: another process was lost.
    """
    if jax.process_count() == 1:
        return
    from orbax.checkpoint import multihost  # takes a second

    wait = multihost.get_barrier_sync_fn()
    with lost_processes():
        wait(key=f"diffit_jax.meeting.{next(_barriers)}", timeout_ms=BARRIER_TIMEOUT_S * 1000)


def call_after_barrier(function: Any, *arguments: Any) -> Any:
    """Call a jitted function over the devices of all processes, once all have compiled it.

    Compiling may take them minutes more or less, since only the first one finds earlier programs in
    a cache, and devices do not wait, see `barrier`. Where the arguments are on this process's
    devices alone it is called at once.
    """
    arrays = (leaf for leaf in jax.tree.leaves(arguments) if isinstance(leaf, jax.Array))
    if not all(array.is_fully_addressable for array in arrays):
        function.lower(*arguments).compile()  # the call finds it
        barrier()
    return function(*arguments)


def _of_each_process(value: np.ndarray) -> dict[int, np.ndarray]:
    """Return an array of each process by its number.

    `process_allgather` does not say in which order they come.
    """
    barrier()
    numbers = multihost_utils.process_allgather(np.array(jax.process_index()))
    return dict(
        zip(np.ravel(numbers).tolist(), multihost_utils.process_allgather(value), strict=True)
    )


def code_version() -> str:
    """Digest of this package's source and of the versions of what it stands on."""
    sources = sorted(Path(__file__).parents[1].rglob("*.py"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    return f"{digest} jax {jax.__version__}"


def primary_first(action: Callable[[], T], then: Callable[[], T] | None = None) -> T:
    """Run `action` on process 0 and, when it is done, `then` (None: `action`) on the others.

    If either fails anywhere, all fail.
    """
    if jax.process_count() == 1:
        return action()
    result: Any = None
    error = None
    for turn in (True, False):
        if is_primary() == turn:
            try:
                result = (action if turn or then is None else then)()
            except UserError as failure:
                error = failure
        failed = [
            process
            for process, flag in sorted(_of_each_process(np.array(error is not None)).items())
            if flag
        ]
        if error is not None:
            raise error
        if failed:
            raise UserError(f"process {failed[0]} could not go on: its message says why")
    return result


def on_primary(action: Callable[[], T]) -> T:
    """Run `action` on process 0 while the others wait; return None there. If it fails, all fail."""
    return primary_first(action, lambda: cast(T, None))


@contextlib.contextmanager
def primary_context(context: Callable[[], contextlib.AbstractContextManager]) -> Iterator[None]:
    """Enter a context (a lock, say) on process 0 for all in this block; if it fails, all fail."""
    with contextlib.ExitStack() as stack:
        on_primary(lambda: stack.enter_context(context()))
        yield


def check_shared(directory: epath.Path) -> None:
    """Make sure that all processes see the same directory.

    Raises:
      UserError: on every process, if one does not see what process 0 has written there.
    """
    if jax.process_count() == 1:
        return
    token = _of_each_process(np.frombuffer(os.urandom(8), np.uint8))[0]
    mark = directory / f".shared-{token.tobytes().hex()}"
    on_primary(lambda: mark.write_bytes(b""))
    blind = [
        process
        for process, sees in sorted(_of_each_process(np.array(mark.exists())).items())
        if not sees
    ]
    if is_primary():
        mark.unlink()
    if blind:
        raise UserError(
            f"workdir {directory} is not shared: process {blind[0]} does not see the files of "
            "process 0 there, but all write into the same checkpoints: use gs:// or a shared disk"
        )


def all_hosts(value: bool) -> bool:
    """Whether it is so on every process."""
    if jax.process_count() == 1:
        return value
    return all(bool(one) for one in _of_each_process(np.array(value)).values())


def broadcast_flag(value: bool) -> bool:
    """Return process 0's value on every process."""
    return broadcast([value])[0]


def broadcast(flags: Sequence[bool]) -> list[bool]:
    """Return process 0's flags on every process."""
    if jax.process_count() == 1:
        return list(flags)
    return [bool(flag) for flag in _of_each_process(np.array(flags, bool))[0]]


def gather(array: jax.Array) -> np.ndarray:
    """Gather a global array to every process's host."""
    if array.is_fully_addressable:
        return np.asarray(array)
    barrier()  # each compiled the program by itself
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


_questions = itertools.count()  # of this process, see `PreemptionNotice.reached`


_told = False  # whether a question was answered yes


def is_to_end() -> bool:
    """Whether to save and end now, in a block of `PreemptionNotice`.

    All processes get the same answer to their n-th question, whoever asks in whichever loop; once
    told, it stays so until the outermost block ends.
    """
    global _told
    number = next(_questions)
    if jax.process_count() == 1:
        return interruption.noticed()
    _told = multihost_utils.reached_preemption_sync_point(number) or _told
    return _told


class PreemptionNotice:
    """Tells when this run is to be interrupted: a signal to any process, or the platform's notice.

    Use it as a context manager.
    """

    def __init__(self, ctrl_c: bool = False):
        """Listen; `ctrl_c`: whether Ctrl-C counts too, and does not end the run at once."""
        self._held = interruption.held(ctrl_c)

    def __enter__(self) -> "PreemptionNotice":
        global _told
        if not interruption.is_held():
            _told = False
        self._held.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self._held.__exit__(*error)

    def reached(self) -> bool:
        """Ask whether to save and end now, see `is_to_end`. Ask after every piece of work."""
        return is_to_end()

    def ending(self, what_is_kept: str) -> BaseException:
        """Return the exception to raise when everything is saved."""
        return (interruption.Interrupted if interruption.pressed() else interruption.Preempted)(
            what_is_kept
        )


@contextlib.contextmanager
def lost_processes() -> Iterator[None]:
    """Turn jax's error about a lost process into one line."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, RuntimeError) as error:
        text = str(error)
        if jax.process_count() > 1 and re.search(
            r"(?i)gloo|connection|heartbeat|unavailable|barrier|deadline|coordination", text
        ):
            message = (
                f"another process was lost ({' '.join(text.split())[:160]}): start all "
                "processes again to go on from the last checkpoint"
            )
            raise UserError(message) from error
        raise


def _slurm_tasks() -> int:
    """Return the tasks of the Slurm step that started this process.

    Of an allocation's tasks only those that srun started are processes of a run.
    """
    text = os.environ.get("SLURM_STEP_NUM_TASKS", "")
    return int(text) if text.isdigit() and os.environ.get("SLURM_PROCID", "").isdigit() else 1


def _on_tpu() -> bool:
    wanted = os.environ.get("JAX_PLATFORMS", "tpu")
    return "tpu" in wanted and bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"))


def _end_without_the_others(cluster: Cluster) -> None:
    slurm = ""
    if cluster.coordinator is None and _slurm_tasks() > 1:
        slurm = (
            f"Slurm's variables speak of a step of {_slurm_tasks()} tasks; for one process "
            "alone add --num_processes=1, otherwise "
        )
    interruption.end(
        1,
        f"error: not all processes came within {cluster.timeout_s} s: {slurm}start the same "
        "command on every host, and let them reach the coordinator's port",
    )
