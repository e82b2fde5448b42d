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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from absl import app, flags
from absl import logging as absl_logging

from diffit_jax.errors import OutOfMemory, UserError, one_line
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
    )


def main() -> None:
    """Run the console script: the first argument is the verb."""
    known = verbs()
    asked = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if asked.lstrip("-") in ("help", "h"):
        width = max(map(len, known))
        lines = [f"  {verb:{width}}  {text}" for verb, text in known.items()]
        usage = "usage: diffit VERB [--flag=value …]; diffit VERB --help says which"
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

    def __init__(self, flag: str, to_read: bool, words: Sequence[str]):
        self._flag, self._to_read, self._words = flag, to_read, words

    def parse(self, argument: str) -> str:
        from diffit_jax.runtime import files, hub  # bring etils

        if argument in self._words:
            return argument
        try:
            if self._to_read and hub.is_address(argument):
                hub.parse(argument, self._flag)
                return argument
            return str(files.resolve(argument, self._flag))
        except UserError as error:
            fail(str(error))  # absl would add the flag's name and a hint of its own


def define_path(
    name: str, help_text: str, to_read: bool = False, words: Sequence[str] = ()
) -> flags.FlagHolder:
    """Define a flag that takes a path, None if it is not given, see `files.resolve`.

    All paths come in by it. `to_read`: whether `hf://` will do, see `hub.local`; `words`: other
    values that are allowed.
    """
    parser = _PathParser(f"--{name}", to_read, words)
    return flags.DEFINE(parser, name, None, help_text, serializer=flags.ArgumentSerializer())


class ConfigFlag:
    """The flag `--config FILE`, whose keys can be overridden by `--config.section.key=value`."""

    def __init__(self, help_text: str, required: bool):
        # For --help and --flagfile only: the value is taken out before flags are parsed.
        flags.DEFINE_string("config", None, help_text)
        self.value: ConfigDict | None = None
        self._required = required

    def take_from(self, arguments: Sequence[str]) -> list[str]:
        """Load the config that a command line names; return the other arguments."""
        arguments = flags.FLAGS.read_flags_from_files(list(arguments), False)
        others = list(arguments)
        if any(re.match(r"--?(no)?config\b", argument) for argument in arguments):
            from diffit_jax.experiment import config as experiment
            from diffit_jax.runtime import config_files

            given = config_files.ConfigArgs.find(arguments)
            others = list(given.others)
            if given.file is not None:
                self.value = experiment.given_config(given)
            elif given.overrides:
                raise UserError(f"{given.overrides[0]} needs a config: name one by --config")
        if self._required and self.value is None:
            raise UserError("--config is missing: name a file with get_config()")
        return others


_config: ConfigFlag | None = None
when_parsed: list[Callable[[], None]] = []  # what defines more flags, just before they are parsed


def define_config(
    help_text: str = "File with get_config(); override keys by --config.section.key=value.",
    required: bool = False,
) -> ConfigFlag:
    """Define the flag `--config`; `required`: whether the command ends if it is not given."""
    global _config
    _config = ConfigFlag(help_text, required)
    return _config


def require_one(**flag_values: str | None) -> None:
    """End the command unless exactly one of the flags is given."""
    if sum(value is not None for value in flag_values.values()) != 1:
        fail(
            f"exactly one of {', '.join(f'--{name}' for name in flag_values)} is needed (--help "
            "lists the flags)"
        )


def define_cluster() -> "Callable[[], Cluster]":
    """Define the flags that connect several processes; return a function of their values."""
    coordinator = flags.DEFINE_string(
        "coordinator", None, "host:port of process 0; not needed on TPU pods and under Slurm."
    )
    num_processes = flags.DEFINE_integer(
        "num_processes", None, "With --coordinator: how many processes there are.", lower_bound=1
    )
    process_id = flags.DEFINE_integer(
        "process_id", None, "With --coordinator: which one this is, from 0.", lower_bound=0
    )
    timeout = flags.DEFINE_integer(
        "cluster_timeout", 300, "Seconds to wait until all processes have come.", lower_bound=1
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
        "Where training.batch_size does not divide over all devices, use as many as it does (one "
        "process).",
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
) -> None:
    """Parse the flags, join the other processes, take the devices, and call `main`.

    Joins if `cluster` is given, takes devices unless they are for processes of its own. A mistake
    of the user's ends in one line on stderr and exit status 1; a preemption, after everything is
    saved, in exit status 75 (EX_TEMPFAIL), which means: run the same command again to resume.
    """

    def guarded(_: Sequence[str]) -> None:
        logging.getLogger("diffit_jax").setLevel(logging.INFO)
        logging.getLogger("diffit_jax").propagate = False
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(_Plain())
        logging.getLogger("diffit_jax").handlers = [handler]
        absl_logging.set_verbosity(absl_logging.ERROR)  # Orbax reports every file that it touches
        try:
            _import_jax()
            _cache_programs()
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
        app.run(guarded, flags_parser=_parse)
    except KeyboardInterrupt:  # while flags and configs were read
        interruption.end(
            interruption.EXIT_INTERRUPTED, "interrupted: run the same command again to go on"
        )


def _end_with(error: BaseException) -> NoReturn:
    """End the command as an error or an interruption asks for; raise other errors again."""
    try:
        raise error
    except UserError as error:
        fail(str(error) + _preflight_command(error))
    except BrokenPipeError:
        _stop_printing()
        sys.exit(1)
    except OSError as error:
        if error.filename is None and error.errno in (
            errno.ENOSPC,
            errno.EIO,
            errno.EBADF,
        ):  # `print`, to a file on a full disk, say
            fail(f"the output could not be printed ({error.strerror}); what was asked for is done")
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
    return f"; what fits a chip says: python launch/preflight.py {config} --topology v5e:2x2"


def _cache_programs() -> None:
    """Keep compiled programs in the home directory.

    Unless the environment names another one, or there is no such directory.
    """
    import jax

    from diffit_jax.runtime.files import home

    if not jax.config.jax_compilation_cache_dir and home():
        jax.config.update("jax_compilation_cache_dir", str(home() / ".cache/diffit_jax/compiled"))


def _parse(argv: list[str]) -> list[str]:
    try:
        if when_parsed or _config:
            _import_jax()
        for define in when_parsed:
            define()
    except UserError as error:
        fail(str(error))
    # Help without absl's, which lists the flags of every library.
    wanted = next(
        (
            argument
            for argument in argv[1:]
            if argument.lstrip("-") in ("help", "h", "helpshort", "helpfull")
        ),
        None,
    )
    if wanted and wanted.startswith("-") and "--" not in argv[1 : argv.index(wanted)]:
        with contextlib.suppress(BrokenPipeError):
            _print_help(of_all=wanted.endswith("full"))
        sys.exit(0)
    # absl's errors begin with the culprit; the rest of them is noise.
    try:
        rest = flags.FLAGS([argv[0], *(_config.take_from(argv[1:]) if _config else argv[1:])])
    except flags.Error as error:
        unknown = getattr(error, "flagname", None)
        if unknown in verbs():
            fail(f"--{unknown} is no flag but a verb: diffit {unknown} --help")
        fail(f"{str(error).strip().splitlines()[0]} (--help lists the flags)")
    except UserError as error:
        fail(str(error))
    if len(rest) > 1:
        fail(f"argument {rest[1]!r} is not a flag: write --name=value")
    return rest


def _print_help(of_all: bool) -> None:
    """Print a command's summary and flags; `of_all`: those of its libraries too."""
    print((sys.modules["__main__"].__doc__ or "").strip() + "\n\nflags:")
    by_module = flags.FLAGS.flags_by_module_dict()
    names = [name for name in by_module if of_all or name.startswith("diffit_jax.")]
    shown: set[str] = set()
    for flag in sorted((f for name in names for f in by_module[name]), key=lambda f: f.name):
        if flag.name not in shown:
            shown.add(flag.name)
            default = "" if flag.default in (None, "") else f" (default: {flag.default})"
            print(f"  --{flag.name}: {flag.help}{default}")


def fail(message: str) -> NoReturn:
    """End the command with one line on stderr and exit status 1."""
    print("error: " + one_line(message), file=sys.stderr)
    sys.exit(1)


class _Plain(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        prefix = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        return prefix + record.getMessage()
