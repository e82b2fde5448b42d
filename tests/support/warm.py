"""Commands that start at once: a third of a test that runs one would be importing jax.

A server, one for the whole suite, has imported what commands stand on, and forks for each that the
executable `python()` is asked to run. What the fork inherits nothing else could tell from a fresh
process: no device is taken yet, no thread runs. Whatever the server could not do alike (options of
Python, variables that are read while importing, other systems) a fresh interpreter does.
"""

import contextlib
import gc
import json
import os
import runpy
import select
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

_SOCKET = "DIFFIT_JAX_WARM"
# The client, started for each command, so without site-packages; by its own path it finds this.
_CLIENT = f"""#!{sys.executable} -ISE
import sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from support import warm
warm.ask(sys.argv[1:])
"""
_servers: list[subprocess.Popen] = []  # it ends when this process, and so its stdin, does
_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


def python() -> str:
    """An executable to use like `sys.executable`; until the server is there, and without one, it
    is one."""
    place = os.environ.get(_SOCKET)
    return f"{place}.python" if place else sys.executable


def start(folder: str) -> None:
    """Starts the server, and says to this process and those that it starts where it is."""
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (AttributeError, OSError):  # not Linux, or an old one
        return
    place = os.path.join(folder, "warm")
    with open(f"{place}.python", "w") as client:
        client.write(_CLIENT)
    os.chmod(f"{place}.python", stat.S_IRWXU)
    os.environ[_SOCKET] = place
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r})\n"
    code += f"from support import warm; warm.serve({place!r})"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", code]
    _servers.append(subprocess.Popen(command, stdin=subprocess.PIPE, env=environment))


def _read_early(environment: dict[str, str]) -> dict[str, str]:
    """Of variables those that matter while modules are imported and streams are opened."""
    return {
        name: value
        for name, value in environment.items()
        if name.startswith(("JAX_", "PYTHON", "LC_", "LANG"))
        and name not in ("PYTHON", "PYTHONUNBUFFERED")
    }


# --- The client


def ask(arguments: list[str]) -> None:
    """Runs `python ARGUMENTS` through the server, and ends as that does."""
    place = os.environ.get(_SOCKET, "")
    kept = f"{place}.environment"
    fresh = not (place and arguments and (arguments[0].endswith(".py") or arguments[0] == "-m"))
    deadline = time.monotonic() + 60  # at the beginning of a suite the server still imports
    while not fresh and not os.path.exists(kept) and time.monotonic() < deadline:
        time.sleep(0.1)
    if not fresh and os.path.exists(kept):
        with open(kept) as file:
            fresh = json.load(file) != _read_early(dict(os.environ))
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    if fresh or not os.path.exists(kept) or connection.connect_ex(place):
        os.execv(sys.executable, [sys.executable, *arguments])
    # Signals wait until there is somebody to pass them to.
    signal.pthread_sigmask(signal.SIG_BLOCK, _FORWARDED)
    ignored = [number for number in _FORWARDED if signal.getsignal(number) is signal.SIG_IGN]
    what = [arguments, os.getcwd(), dict(os.environ), ignored, os.umask(0)]
    socket.send_fds(connection, [b"."], [0, 1, 2])
    connection.sendall(json.dumps(what).encode() + b"\n")
    answers = connection.makefile()
    child = int(answers.readline())
    for number in set(_FORWARDED) - set(ignored):
        signal.signal(number, lambda number, _: os.kill(child, number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _FORWARDED)
    status = int(answers.readline())
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(os.waitstatus_to_exitcode(status))


# --- The server


def serve(place: str) -> None:
    """Waits for commands as long as the process that started it lives."""
    early = _read_early(dict(os.environ))
    import_what_takes_long()
    from support.processes import compile_quickly

    compile_quickly()
    gc.set_threshold(200_000, 20, 100)  # as in the tests' own processes
    gc.freeze()  # a fork that looked through this would copy all of it
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(place)
    listener.listen(64)
    with open(f"{place}.begun", "w") as file:
        json.dump(early, file)
    os.rename(f"{place}.begun", f"{place}.environment")  # it is there when it is whole
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [])
        if sys.stdin in ready:  # closed: the suite is over
            os._exit(0)
        connection, _ = listener.accept()
        while _ended():
            pass
        if not os.fork():
            listener.close()
            run = _attend(connection)
            if run:
                return run()  # out of all frames of the server
            os._exit(0)
        connection.close()


def _ended() -> bool:
    try:
        return os.waitpid(-1, os.WNOHANG)[0] != 0
    except ChildProcessError:
        return False


def import_what_takes_long() -> None:
    """All verbs, and so all that they stand on, and what they import when they need it; not `cli`,
    which listens to signals."""
    import importlib
    import pkgutil

    for room in ("sampling", "ingest", "evaluation", "training", "preflight"):
        package = importlib.import_module(f"diffit_jax.{room}")
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{package.__name__}.{module.name}")
    for name in ("sklearn.datasets", "sklearn.svm"):  # where the digits come from and are scored
        importlib.import_module(name)


def _attend(connection: socket.socket):
    """Of one command: in the process that is to be it, what to do; None in the one that tells its
    client how it ends, and ends it if the client is gone."""
    _, descriptors, _, _ = socket.recv_fds(connection, 1, 3)
    with connection.makefile() as lines:
        arguments, folder, environment, ignored, mask = json.loads(lines.readline())
    if not (child := os.fork()):
        connection.close()
        for number, descriptor in enumerate(descriptors):
            os.dup2(descriptor, number)
            os.close(descriptor)
        os.umask(mask)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        for number in ignored:
            signal.signal(number, signal.SIG_IGN)
        return lambda: _become(arguments)
    for descriptor in descriptors:
        os.close(descriptor)
    connection.sendall(f"{child}\n".encode())
    lives = os.pidfd_open(child)
    ready, _, _ = select.select([lives, connection], [], [])
    if lives not in ready:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    with contextlib.suppress(OSError):
        connection.sendall(f"{status}\n".encode())
    return None


def _become(arguments: list[str]) -> None:
    sys.stdin = os.fdopen(0, "r", closefd=False)
    sys.stdout = sys.__stdout__ = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = sys.__stderr__ = os.fdopen(
        2, "w", buffering=1, closefd=False, errors="backslashreplace"
    )
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        sys.path[0] = os.getcwd()
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path[0] = str(Path(arguments[0]).resolve().parent)
        runpy.run_path(arguments[0], run_name="__main__")
