"""Signals that ask a run to end, heard from the first import to the last line.

SIGTERM, SIGHUP and SIGUSR1 announce that the machine is about to be taken away (or the terminal is
closed): whoever is in the middle of something that can be saved holds them (`held`), saves, and
ends with status 75, "run the same command again to go on". Where nothing holds them there is
nothing to save, and the command ends with that status at once, in the middle of an import or a
compilation too. Ctrl-C is for the person who pressed it: status 130, after a checkpoint in
training; pressed twice it does not wait.

Only the standard library is imported here, so that commands listen before their slow imports begin.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

EXIT_RESUME = 75  # EX_TEMPFAIL
EXIT_INTERRUPTED = 130
ENDING = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)
)
# After a Ctrl-C that Python could not act upon, inside a compilation for example.
_PATIENCE_S = 1.0

_lock = threading.RLock()  # a handler may interrupt the main thread where it has it
_end_lock = threading.Lock()
_listening = False
_holders = 0
_holders_of_ctrl_c = 0
_expendable = 0  # blocks in which nothing would be lost
_noticed = threading.Event()
_pressed = 0  # how often Ctrl-C was pressed while signals were held
_forward: Callable[[], None] | None = None


class Preempted(Exception):
    """The machine is about to be taken away, all is saved; the same command resumes later."""


class Interrupted(KeyboardInterrupt):
    """A person pressed Ctrl-C; the message says what is kept."""


def listen() -> None:
    """Begin to listen for signals; commands call it first.

    A signal that is ignored already (`nohup` hands SIGHUP over so) stays ignored.
    """
    global _listening
    if _listening or threading.current_thread() is not threading.main_thread():
        return
    heard, told = os.pipe()
    os.set_blocking(told, False)
    # Python's own handlers wait until the main thread is back from a compilation, which may take
    # minutes; this descriptor does not.
    signal.set_wakeup_fd(told, warn_on_full_buffer=False)
    for number in _wanted():
        signal.signal(number, lambda *_: None)
    threading.Thread(target=_watch, args=(heard,), daemon=True, name="signals").start()
    _listening = True


def forward_to(ending: Callable[[], None] | None) -> None:
    """Register a callback that a signal triggers instead of ending the process.

    For example to notify other processes.
    """
    global _forward
    _forward = ending


@contextlib.contextmanager
def held(ctrl_c: bool = False) -> Iterator[None]:
    """Note signals instead of ending, in this block.

    For a loop that asks `noticed` and then saves and ends.

    Args:
      ctrl_c: whether Ctrl-C is noted too; the second one raises `KeyboardInterrupt`.
    """
    global _holders, _holders_of_ctrl_c, _pressed
    with _lock:
        if not _holders:
            _noticed.clear()
            _pressed = 0
        _holders += 1
        _holders_of_ctrl_c += ctrl_c
    restored = {}
    if threading.current_thread() is threading.main_thread():  # elsewhere nobody can listen
        # SIGTERM stays with whoever tells the other processes.
        ours = (
            []
            if _listening
            else [number for number in _wanted() if not (_forward and number == signal.SIGTERM)]
        )
        handlers: dict[int, Any] = dict.fromkeys(ours, lambda number, _: _on(number))
        if ctrl_c and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            handlers[signal.SIGINT] = _on_ctrl_c
        restored = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in restored.items():
            signal.signal(number, handler)
        with _lock:
            _holders -= 1
            _holders_of_ctrl_c -= ctrl_c


@contextlib.contextmanager
def expendable() -> Iterator[None]:
    """End at once after a signal in this block, held or not: all that there is has been saved.

    For a compilation, say, which may take minutes and hears nothing.
    """
    global _expendable
    with _lock:
        _expendable += 1
    try:
        if _listening and _noticed.is_set() and not _pressed:
            _on(signal.SIGTERM)
        yield
    finally:
        with _lock:
            _expendable -= 1


def is_held() -> bool:
    """Whether this is in a block of `held`."""
    return _holders > 0


def noticed() -> bool:
    """Whether a signal came in the block of `held`."""
    return _noticed.is_set()


def pressed() -> int:
    """Return how often it was Ctrl-C."""
    return _pressed


def end(status: int, line: str) -> NoReturn:
    """End the process at once with a line on stderr; do not wait for saves."""
    with _end_lock:  # never given back: one line, one status
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        with contextlib.suppress(OSError):
            os.write(2, f"{' '.join(line.split())}\n".encode(errors="replace"))
        os._exit(status)


def finished(status: int = 0) -> None:
    """Ignore signals from now on: nothing is left to do.

    They change neither what was written nor the exit status.
    """
    global _holders
    with _lock:
        _holders += 1
    if threading.current_thread() is threading.main_thread():
        # Not a traceback out of the interpreter's own end.
        signal.signal(signal.SIGINT, lambda *_: os._exit(status))
        # Ignored signals stay ignored while the interpreter ends, handlers do not.
        for number in _wanted():
            signal.signal(number, signal.SIG_IGN)


def _wanted() -> list[int]:
    # None: a handler that is not Python's, such as that of jax's service
    return [number for number in ENDING if signal.getsignal(number) not in (signal.SIG_IGN, None)]


def _watch(heard: int) -> None:
    while True:
        for number in os.read(heard, 64):
            if number in ENDING:
                _on(number)
            elif number == signal.SIGINT:
                # Counted here: Python's handler waits for the main thread, and is called once
                # for several signals.
                if _holders_of_ctrl_c and signal.getsignal(signal.SIGINT) is _on_ctrl_c:
                    _press()
                threading.Thread(target=_end_after_ctrl_c, daemon=True).start()


def _on(number: int) -> None:
    if (
        _forward is not None and number != signal.SIGTERM
    ):  # SIGTERM is heard by whoever it is forwarded to
        _forward()
    with _lock:
        if _forward is not None or (_holders and not _expendable):
            _noticed.set()
            return
    end(
        EXIT_RESUME,
        "preempted: nothing was under way that could be saved; run the same command again to go on",
    )


def _on_ctrl_c(*_) -> None:
    """Handle Ctrl-C in the main thread, when it is back from whatever it does."""
    if not _listening:
        _press()
    if _pressed > 1:
        raise Interrupted("not waiting for the save under way; complete checkpoints are kept")


def _press() -> None:
    """Count a Ctrl-C, and answer the first one."""
    global _pressed
    _pressed += 1
    if _pressed > 1:
        return
    _noticed.set()
    if _forward is not None:
        _forward()
    answer = "interrupted: saving before the end (once more: end at once)"
    if not _listening:  # in a notebook, whose stderr is its own
        print(answer, file=sys.stderr, flush=True)
        return
    with contextlib.suppress(OSError):  # not by `print`: the main thread may be in the midst of it
        os.write(2, f"{answer}\n".encode())


def _end_after_ctrl_c() -> None:
    """End the process after Ctrl-C if the main thread does not.

    Python raises KeyboardInterrupt there, where it may be stuck in a compilation.
    """
    time.sleep(_PATIENCE_S)
    if _expendable or not (_holders and _pressed <= 1):
        end(EXIT_INTERRUPTED, "interrupted: run the same command again to go on")
