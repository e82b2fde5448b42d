"""The command `diffit VERB …`, and what all verbs share: flags, logging, and one-line errors."""

import ast
import atexit
import contextlib
import difflib
import errno
import gc
import importlib
import logging
import os
import re
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from absl import app, flags
from absl import logging as absl_logging

from diffit_jax.cli import parsing
from diffit_jax.cli.parsing import define_config as define_config
from diffit_jax.cli.parsing import define_positional as define_positional
from diffit_jax.cli.parsing import fail, group
from diffit_jax.cli.parsing import when_parsed as when_parsed
from diffit_jax.errors import CannotWrite, OutOfMemory, UserError
from diffit_jax.runtime import interruption

if TYPE_CHECKING:
    from ml_collections import ConfigDict

    from diffit_jax.runtime.distributed import Cluster

interruption.listen()  # jax and what stands on it are imported later: they take seconds
# Tracing makes many small objects; looking for garbage among them took 8 % of a command's start.
gc.set_threshold(200_000, 20, 100)
# At the end of a process another look takes half a second. Registered first, this comes last.
atexit.register(gc.freeze)


_COMMANDS = Path(__file__).parent / "commands"


def verbs() -> dict[str, str]:
    """Return each verb's summary line by its name.

    Their modules are only parsed: two of them would define the same flags.
    """
    found = {}
    for path in sorted(_COMMANDS.glob("[a-z]*.py")):
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        found[path.stem] = text.partition("\n")[0].rstrip(":.")
    return found


def launch(verb: str) -> None:
    """Run a verb with the arguments of this process."""
    module = importlib.import_module(f"diffit_jax.cli.commands.{verb}")
    sys.modules["__main__"].__doc__ = module.__doc__  # what --help begins with
    run(
        module.main,
        getattr(module, "CLUSTER", None),
        getattr(module, "takes_devices", lambda: True),
        getattr(module, "check", lambda: None),
    )


def main() -> None:
    """Run the console script: the first argument is the verb."""
    known = verbs()
    asked = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if asked.lstrip("-") in ("help", "h"):
        width = max(map(len, known))
        lines = [f"  {verb:{width}}  {text}" for verb, text in known.items()]
        usage = "usage: diffit VERB [--flag=value …]; diffit VERB --help lists its flags"
        try:
            print("\n".join([usage, "", *lines]), flush=True)
        except BrokenPipeError:
            _stop_printing()
        return
    verb = asked.replace("-", "_")
    if verb not in known:
        close = difflib.get_close_matches(verb, known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}"
        sys.exit(f"error: verb {asked} is unknown: {hint}")
    del sys.argv[1]
    launch(verb)


class _PathParser(flags.ArgumentParser):
    """Parser of flags that take a path: absolute, with `~` and `file://` resolved.

    One to read from may be an address on the Hugging Face hub.
    """

    def __init__(self, flag: str, to_read: bool, words: Sequence[str], must_exist: bool):
        self._flag, self._to_read, self._words = flag, to_read, words
        self._must_exist = must_exist

    def parse(self, argument: str) -> str:
        from diffit_jax.runtime import files, hub  # bring etils

        if argument in self._words:
            return argument
        try:
            if self._to_read and hub.is_address(argument):
                hub.parse(argument, self._flag)
                return argument
            path = files.resolve(argument, self._flag)
        except UserError as error:
            fail(str(error))  # absl would add the flag's name and a hint of its own
        if self._to_read and self._must_exist:
            _to_read[self._flag] = path
        return str(path)


_to_read: dict[str, Any] = {}  # paths that have to be there, by their flag


def _check_paths() -> None:
    """End the command if a path to read from is not there."""
    from diffit_jax.runtime import hub

    for flag, path in _to_read.items():
        if not _is_there(path):
            fail(f"{flag} {path} is not there: {hub.elsewhere(path) or _near(path)}")


def _is_there(path: Any) -> bool:
    """Whether a path to read from exists, as far as that is seen at once."""
    from diffit_jax.runtime import files

    return not files.is_local(path) or path.exists() or any(mark in path.name for mark in "*?[")


def _near(path: Any) -> str:
    """Name what lies where a path would, with the most similar name."""
    from diffit_jax.runtime import hub

    folder = Path(path).parent
    if not folder.is_dir():
        return f"there is no folder {folder}{hub.pattern_hint(folder)}"
    close = difflib.get_close_matches(path.name, os.listdir(folder), n=1)
    return f"did you mean {folder / close[0]}?" if close else "name one that is"


def require_run(workdir: str) -> None:
    """End the command if a local directory is that of no run."""
    from diffit_jax.runtime import files

    path = files.resolve(workdir, "--workdir")
    if files.is_local(path) and not (path / "config.json").exists():
        where = "train first, or name the directory of a run" if path.exists() else _near(path)
        fail(f"workdir {path} holds no run (no config.json): {where}")


def define_path(
    name: str,
    help_text: str,
    to_read: bool = False,
    words: Sequence[str] = (),
    must_exist: bool = True,
) -> flags.FlagHolder:
    """Define a flag that takes a path, None if it is not given, see `files.resolve`.

    All paths come in by it.

    Args:
      name: of the flag.
      help_text: of the flag.
      to_read: whether it is read from: then `hf://` will do, see `hub.local`.
      words: other values that are allowed.
      must_exist: whether one to read from has to be there.
    """
    parser = _PathParser(f"--{name}", to_read, words, must_exist)
    return flags.DEFINE(parser, name, None, help_text, serializer=flags.ArgumentSerializer())


class _NumbersParser(flags.ArgumentParser):
    """Parser of whole numbers and ranges, as `console.parse_numbers` reads them."""

    def __init__(self, flag: str):
        self._flag = flag

    def parse(self, argument: str) -> str:
        from diffit_jax.runtime.console import parse_numbers

        try:
            parse_numbers(self._flag, argument)
        except UserError as error:
            fail(str(error))
        return argument


def define_numbers(name: str, default: str | None, help_text: str) -> flags.FlagHolder:
    """Define a flag that takes whole numbers, the text of 7, 0-63 or 0-9,20-29."""
    parser, serializer = _NumbersParser(f"--{name}"), flags.ArgumentSerializer()
    return flags.DEFINE(parser, name, default, help_text, serializer=serializer)


def require_one(**flag_values: str | None) -> None:
    """End the command unless exactly one of the flags is given."""
    if sum(value is not None for value in flag_values.values()) != 1:
        if len(flag_values) == 1:
            fail(f"--{next(iter(flag_values))} is missing (--help lists the flags)")
        fail(
            f"exactly one of {', '.join(f'--{name}' for name in flag_values)} is needed (--help "
            "lists the flags)"
        )


def define_cluster() -> "Callable[[], Cluster]":
    """Define the flags that connect several processes; return a function of their values."""
    with group("several processes"):
        coordinator = flags.DEFINE_string(
            "coordinator", None, "host:port of process 0; not needed on TPU pods and under Slurm."
        )
        num_processes = flags.DEFINE_integer(
            "num_processes",
            None,
            "With --coordinator: how many processes there are.",
            lower_bound=1,
        )
        process_id = flags.DEFINE_integer(
            "process_id", None, "With --coordinator: which one this is, from 0.", lower_bound=0
        )
        timeout = flags.DEFINE_integer(
            "cluster_timeout", 300, "Seconds to wait for all processes to connect.", lower_bound=1
        )

    def cluster() -> "Cluster":
        from diffit_jax.runtime.distributed import Cluster

        return Cluster(coordinator.value, num_processes.value, process_id.value, timeout.value)

    return cluster


def define_fewer_devices() -> "Callable[[ConfigDict], Any]":
    """Define the flag that leaves devices out.

    Returns a function that takes a config and returns the devices to train it on, None for all.
    """
    fewer = flags.DEFINE_bool(
        "fewer_devices",
        False,
        "Where training.batch_size is not divisible by the number of devices, use the largest "
        "number that divides it (one process only).",
    )

    def devices(config: "ConfigDict") -> Any:
        if not fewer.value:
            return None
        from diffit_jax.experiment import config as experiment
        from diffit_jax.runtime import parallel

        built = experiment.build(config)
        return parallel.fitting_devices(
            built.training.batch_size, built.mesh, built.training.accumulation
        )

    return devices


def run(
    main: Callable[[], None],
    cluster: "Callable[[], Cluster] | None" = None,
    takes_devices: Callable[[], bool] = lambda: True,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Parse the flags, join the other processes, take the devices, and call `main`.

    Joins if `cluster` is given, takes devices unless they are for processes of its own. `check`
    looks whether flags go together, before jax is imported. A mistake
    of the user's ends in one line on stderr and exit status 1; a preemption, after everything is
    saved, in exit status 75 (EX_TEMPFAIL), which means: run the same command again to resume.
    """

    def guarded(_: Sequence[str]) -> None:
        logging.getLogger("diffit_jax").setLevel(logging.INFO)
        logging.getLogger("diffit_jax").propagate = False
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(_Plain())
        logging.getLogger("diffit_jax").handlers = [handler]
        # Orbax reports every file that it touches, and each error once more where it is raised.
        absl_logging.set_verbosity(absl_logging.FATAL)
        try:
            _import_jax()
            _cache_programs()
            if config := parsing.config_flag():
                config.finish()
            if takes_devices():
                from diffit_jax.runtime import backend, distributed

                if cluster:
                    distributed.initialize(cluster())
                backend.devices()  # that there are none is said before anything else
            main()
            sys.stdout.flush()
            if takes_devices():
                # At the end jax waits a minute for the others, and then ends all: what the first
                # one still has to write or to send takes longer.
                distributed.barrier()
        except (Exception, KeyboardInterrupt) as error:
            _end_with(error)
        interruption.finished()

    _mend_streams()

    try:
        app.run(guarded, flags_parser=lambda argv: _parse(argv, check))
    except KeyboardInterrupt:  # while flags and configs were read
        interruption.end(
            interruption.EXIT_INTERRUPTED, "interrupted: run the same command again to go on"
        )


def _parse(argv: list[str], check: Callable[[], None]) -> list[str]:
    """Parse the flags, and look whether they go together and what they name is there."""
    rest = parsing.parse(argv, [*verbs()], sys.modules["__main__"].__doc__ or "")
    check()
    _check_paths()
    config = parsing.config_flag()
    if config is not None:
        try:
            config.load()
        except UserError as error:
            fail(str(error))
    return rest


def _end_with(error: BaseException) -> NoReturn:
    """End the command as an error or an interruption asks for; raise other errors again."""
    try:
        raise error
    except CannotWrite as error:  # a library's threads have more to say of it
        interruption.end(1, f"error: {error}")
    except UserError as error:
        fail(str(error) + _preflight_command(error))
    except BrokenPipeError:
        _stop_printing()
        sys.exit(1)
    except OSError as error:
        if error.filename is None and error.errno in (errno.ENOSPC, errno.EIO, errno.EBADF):
            if _was_printing(error):
                done = "what was asked for is done"
                fail(f"the output could not be printed ({error.strerror}); {done}")
            fail(f"a file could not be written ({error.strerror}): make room for it")
        raise
    except MemoryError:
        fail("the host's memory ran out: ask for less at once, or use a machine with more")
    except interruption.Preempted as notice:
        interruption.finished(interruption.EXIT_RESUME)
        print(f"preempted: {notice}; run the same command again to go on", file=sys.stderr)
        sys.exit(interruption.EXIT_RESUME)
    except KeyboardInterrupt as notice:
        line = f"interrupted: {notice}; run the same command again to go on".replace(": ; ", ": ")
        if interruption.pressed() != 1:
            # Does not wait for saves under way, as `sys.exit` would.
            interruption.end(interruption.EXIT_INTERRUPTED, line)
        interruption.finished(interruption.EXIT_INTERRUPTED)
        print(line, file=sys.stderr, flush=True)
        sys.exit(interruption.EXIT_INTERRUPTED)


def _was_printing(error: BaseException) -> bool:
    """Whether an error came from printing a result: from the commands, not from what they call."""
    names = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    ours = [name for name in names if Path(__file__).parents[1] in Path(name).parents]
    return bool(ours) and Path(__file__).parent in Path(ours[-1]).parents


def _stop_printing() -> None:
    """Discard further output: its reader has had enough."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _mend_streams() -> None:
    """Escape characters that the terminal's encoding lacks; make a closed stream swallow all."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            # For as long as the process lives.
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        else:
            with contextlib.suppress(AttributeError, ValueError):  # somebody's own stream
                getattr(sys, name).reconfigure(errors="backslashreplace")


def _import_jax() -> None:
    try:
        import jax  # noqa: F401
    except ValueError as error:  # of a variable that begins with JAX_
        raise UserError(
            f"jax cannot be started ({' '.join(str(error).split())}): correct that variable, or "
            "unset it"
        ) from error


def _preflight_command(error: UserError) -> str:
    """Return the command that says what fits, with this command's config, if memory ran out."""
    if not isinstance(error, OutOfMemory):
        return ""
    of_config = " ".join(
        shlex.quote(argument) for argument in sys.argv[1:] if re.match(r"--?config[.=]", argument)
    )
    given = [
        sys.argv[index + 1]
        for index, argument in enumerate(sys.argv[:-1])
        if argument in ("--config", "-config")
    ]
    config = (
        " ".join(
            [f"--config {shlex.quote(path)}" for path in given] + ([of_config] if of_config else [])
        )
        or "--config FILE"
    )
    return f"; what fits a chip says: diffit preflight {config} --topology v5e:2x2"


def _cache_programs() -> None:
    """Keep compiled programs in the home directory.

    Unless the environment names another one, or there is no such directory.
    """
    import jax

    from diffit_jax.runtime.files import home

    if not jax.config.jax_compilation_cache_dir and home():
        jax.config.update("jax_compilation_cache_dir", str(home() / ".cache/diffit_jax/compiled"))


class _Plain(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        prefix = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        return prefix + record.getMessage()
