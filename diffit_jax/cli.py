"""What all commands in `launch/` share: flags, logging, and one-line errors."""

import contextlib
import errno
import gc
import logging
import os
import re
import runpy
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import ConfigDict, config_flags

from diffit_jax.errors import OutOfMemory, UserError
from diffit_jax.runtime import interruption

if TYPE_CHECKING:
    from diffit_jax.runtime.distributed import Cluster

interruption.listen()  # jax and what stands on it are imported later: they take seconds
# Tracing makes many small objects; looking for garbage among them took 8 % of a command's start.
gc.set_threshold(200_000, 20, 100)


class _PathParser(flags.ArgumentParser):
    """A path as it is meant: absolute, with `~` and `file://` resolved."""

    def __init__(self, flag: str):
        self._flag = flag

    def parse(self, argument: str) -> str:
        from diffit_jax.runtime.files import resolve  # brings etils

        try:
            return str(resolve(argument, self._flag))
        except UserError as error:
            fail(str(error))  # absl would add the flag's name and a hint of its own


def define_path(name: str, help_text: str) -> flags.FlagHolder[str]:
    """A flag that takes a path, None if it is not given: the one door by which paths come in, see
    `files.resolve`."""
    return flags.DEFINE(
        _PathParser(f"--{name}"), name, None, help_text, serializer=flags.ArgumentSerializer()
    )


def define_config(
    help_text: str = "File with get_config(); override keys by --config.section.key=value.",
) -> flags.FlagHolder[ConfigDict]:
    """The flag `--config FILE`, whose keys can be overridden by `--config.section.key=value`."""
    try:
        return config_flags.DEFINE_config_file("config", None, help_text)
    except flags.Error as error:  # it looks for itself in the files that --flagfile names
        fail(str(error).replace("ERROR:: ", ""))


def config_for_weights(
    config: ConfigDict | None, weights: str, input_size: int | None = None
) -> dict[str, Any]:
    """The config that released weights are used with: the one given, or that of their size in
    `configs/`.

    Args:
      config: value of the flag `--config`.
      weights: file of weights.
      input_size: side of the latents, if not that of the file.
    """
    if config is not None:
        return config.to_dict()
    from diffit_jax.interop.official import read_input_size

    name = (
        "imagenet256_latent"
        if (read_input_size(weights) if input_size is None else input_size) <= 32
        else "imagenet512_latent"
    )
    # Beside the package, or, if that is installed elsewhere, beside the script that runs.
    places = [
        Path(file).resolve().parents[1] / "configs" / f"{name}.py"
        for file in (__file__, sys.argv[0])
    ]
    path = next((place for place in places if place.exists()), None)
    if path is None:
        raise UserError(
            f"there is no configs/{name}.py in this installation ({places[0]}): name a config by "
            "--config"
        )
    return runpy.run_path(str(path))["get_config"]().to_dict()


def require_one(**flag_values: str | None) -> None:
    """Ends the command unless exactly one of the flags is given."""
    if sum(value is not None for value in flag_values.values()) != 1:
        fail(
            f"exactly one of {', '.join(f'--{name}' for name in flag_values)} is needed (--help "
            "lists the flags)"
        )


def define_cluster() -> "Callable[[], Cluster]":
    """The flags by which several processes find each other; what it returns reads them."""
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


def define_fewer_devices() -> Callable[[ConfigDict], Any]:
    """The flag that leaves devices out; what it returns takes a config and gives the devices to
    train it on, None for all."""
    fewer = flags.DEFINE_bool(
        "fewer_devices",
        False,
        "Where training.batch_size does not divide over all devices, use as many as it does (one "
        "process).",
    )

    def devices(config: ConfigDict) -> Any:
        if not fewer.value:
            return None
        from diffit_jax import experiment
        from diffit_jax.runtime import parallel

        built = experiment.build(config)
        return parallel.fitting_devices(
            built.training.batch_size, built.mesh, built.training.accumulation
        )

    return devices


def run(main: Callable[[], None], cluster: "Callable[[], Cluster] | None" = None) -> None:
    """Parses the flags, joins the other processes if `cluster` is given, and calls `main`.

    A mistake of the user's ends in one line on stderr and exit status 1; a preemption, after
    everything is saved, in exit status 75 (EX_TEMPFAIL), which means: run the same command again to
    go on.
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
            if cluster:
                from diffit_jax.runtime.distributed import initialize

                initialize(cluster())
            from diffit_jax.runtime import backend

            backend.devices()  # that there are none is said before anything else
            main()
            sys.stdout.flush()
        except UserError as error:
            fail(str(error) + _preflight_command(error))
        except BrokenPipeError:  # whoever read our output has had enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except OSError as error:
            if error.filename is None and error.errno in (
                errno.ENOSPC,
                errno.EIO,
                errno.EBADF,
            ):  # `print`, to a file on a full disk, say
                fail(
                    f"the output could not be printed ({error.strerror}); what was asked for is "
                    "done"
                )
            raise
        except MemoryError:
            fail("the host's memory ran out: ask for less at once, or use a machine with more")
        except interruption.Preempted as notice:
            interruption.finished(interruption.EXIT_RESUME)
            print(f"preempted: {notice}; run the same command again to go on", file=sys.stderr)
            sys.exit(interruption.EXIT_RESUME)
        except KeyboardInterrupt as notice:
            line = f"interrupted: {notice}; run the same command again to go on".replace(
                ": ; ", ": "
            )
            if interruption.pressed() != 1:
                # Does not wait for saves under way, as `sys.exit` would.
                interruption.end(interruption.EXIT_INTERRUPTED, line)
            interruption.finished(interruption.EXIT_INTERRUPTED)
            print(line, file=sys.stderr, flush=True)
            sys.exit(interruption.EXIT_INTERRUPTED)
        interruption.finished()

    _mend_streams()
    try:
        app.run(guarded, flags_parser=_parse)
    except KeyboardInterrupt:  # while flags and configs were read
        interruption.end(
            interruption.EXIT_INTERRUPTED, "interrupted: run the same command again to go on"
        )


def _mend_streams() -> None:
    """What cannot be printed in the terminal's encoding is printed as an escape; a stream that is
    closed swallows everything."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 (for as long as the process lives)
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
    """If memory ran out, the command that says what fits, with this command's config."""
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
    """Compiled programs are kept in the home directory, unless the environment says where, or there
    is no such directory."""
    import jax

    from diffit_jax.runtime.files import home

    if not jax.config.jax_compilation_cache_dir and home():
        jax.config.update("jax_compilation_cache_dir", str(home() / ".cache/diffit_jax/compiled"))


def _parse(argv: list[str]) -> list[str]:
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
            app.usage(shorthelp=not wanted.endswith("full"), writeto_stdout=True)
        sys.exit(0)
    try:
        rest = flags.FLAGS(_with_home(argv))
        if "config" in flags.FLAGS and flags.FLAGS.config is not None:
            # A config file that could not be loaded only says so when it is used.
            flags.FLAGS.config.items()
    except flags.Error as error:
        first, *others = str(error).strip().splitlines()
        if any(
            line.startswith("Traceback") for line in others
        ):  # what went wrong inside get_config(), with all of its traceback
            fail(
                "--config cannot be loaded "
                f"({others[-1].removeprefix('diffit_jax.errors.UserError: ')})"
            )
        fail(f"{first} (--help lists the flags)")
    except (AttributeError, KeyError) as error:
        # ConfigDict names the key and perhaps a similar one, in quotes and on two lines.
        unknown, *similar = re.findall(r"""['"](\w+)\\*['"]""", str(error)) or [str(error)]
        hint = f"did you mean {similar[0]}?" if similar else "see the file given by --config"
        fail(f"config key {unknown} is unknown: {hint}")
    except (OSError, ImportError, SyntaxError, TypeError, ValueError) as error:
        fail(f"--config cannot be loaded ({error}): name a file with get_config()")
    if len(rest) > 1:
        fail(f"argument {rest[1]!r} is not a flag: write --name=value")
    return rest


def fail(message: str) -> NoReturn:
    """Ends the command with one line on stderr and exit status 1."""
    print("error: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(1)


def _with_home(argv: list[str]) -> list[str]:
    """The arguments with `~` in the path of a config resolved, which the shell leaves alone after
    `=`."""
    resolved = list(argv)
    for index, argument in enumerate(argv[1:], 1):
        if re.match(r"--?config=~", argument):
            name, _, path = argument.partition("=")
            resolved[index] = f"{name}={os.path.expanduser(path)}"
    return resolved


class _Plain(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        prefix = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        return prefix + record.getMessage()
