"""Whether all processes of a run have come, asked before jax, which answers with a page of C++."""

import contextlib
import socket
import time

from diffit_jax.errors import UserError


def roll_call(coordinator: str, num_processes: int, process_id: int, timeout_s: int) -> None:
    """Waits at the coordinator's address until all processes have come; then the address is free
    again.

    Args:
      coordinator: host:port of process 0.
      num_processes, process_id: how many processes, and which this one is.
      timeout_s: how long to wait.

    Raises:
      UserError: on every process that came, with the numbers of those that did not.
    """
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise UserError(f"--coordinator {coordinator} is not an address: write host:port")
    deadline = time.monotonic() + timeout_s
    if process_id == 0:
        missing = _call(coordinator, int(port), num_processes, deadline)
    else:
        missing = _answer(host, int(port), process_id, deadline)
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


def _call(coordinator: str, port: int, num_processes: int, deadline: float) -> list[int]:
    """Process 0: listens for the others and tells them the verdict; returns who is missing."""
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


def _answer(host: str, port: int, process_id: int, deadline: float) -> list[int] | None:
    """Any other process: says its number to process 0; returns who is missing, None if process 0
    did not say."""
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
