"""What all commands in `launch/` share: flags, logging, and one-line errors."""

import logging
import re
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
from absl import app, flags
from absl import logging as absl_logging
from ml_collections import ConfigDict, config_flags

from diffit_jax.distributed import Cluster, Preempted, initialize
from diffit_jax.errors import UserError

EXIT_RESUME = 75


def define_config(help_text: str = "File with get_config(); override keys by --config.section.key=value.") -> flags.FlagHolder[ConfigDict]:
    """The flag `--config FILE`, whose keys can be overridden by `--config.section.key=value`."""
    return config_flags.DEFINE_config_file("config", None, help_text)


def config_for_weights(config: ConfigDict | None, weights: str, input_size: int | None = None) -> dict[str, Any]:
    """The config that released weights are used with: the one given, or that of their size in `configs/`.

    Args:
      config: value of the flag `--config`.
      weights: file of weights.
      input_size: side of the latents, if not that of the file.
    """
    if config is not None:
        return config.to_dict()
    from diffit_jax.interop.official import read_input_size

    name = "imagenet256_latent" if (read_input_size(weights) if input_size is None else input_size) <= 32 else "imagenet512_latent"
    path = Path(__file__).parents[1] / "configs" / f"{name}.py"
    if not path.exists():
        raise UserError(f"there is no {path} in this installation: name a config by --config")
    return runpy.run_path(str(path))["get_config"]().to_dict()


def require_one(**flag_values: str | None) -> None:
    """Ends the command unless exactly one of the flags is given."""
    if sum(value is not None for value in flag_values.values()) != 1:
        fail(f"exactly one of {', '.join(f'--{name}' for name in flag_values)} is needed (--help lists the flags)")


def define_cluster() -> Callable[[], Cluster]:
    """The flags by which several processes find each other; what it returns reads them."""
    coordinator = flags.DEFINE_string("coordinator", None, "host:port of process 0; not needed on TPU pods and under Slurm.")
    num_processes = flags.DEFINE_integer("num_processes", None, "With --coordinator: how many processes there are.", lower_bound=1)
    process_id = flags.DEFINE_integer("process_id", None, "With --coordinator: which one this is, from 0.", lower_bound=0)
    timeout = flags.DEFINE_integer("cluster_timeout", 300, "Seconds to wait until all processes have come.", lower_bound=1)
    return lambda: Cluster(coordinator.value, num_processes.value, process_id.value, timeout.value)


def run(main: Callable[[], None], cluster: Callable[[], Cluster] | None = None) -> None:
    """Parses the flags, joins the other processes if `cluster` is given, and calls `main`.

    A mistake of the user's ends in one line on stderr and exit status 1; a preemption, after everything is saved, in exit status 75
    (EX_TEMPFAIL), which means: run the same command again to go on.
    """

    def guarded(_: Sequence[str]) -> None:
        logging.getLogger("diffit_jax").setLevel(logging.INFO)
        logging.getLogger("diffit_jax").propagate = False
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(_Plain())
        logging.getLogger("diffit_jax").handlers = [handler]
        absl_logging.set_verbosity(absl_logging.ERROR)  # Orbax reports every file that it touches
        if not jax.config.jax_compilation_cache_dir:
            jax.config.update("jax_compilation_cache_dir", str(Path("~/.cache/diffit_jax/compiled").expanduser()))
        try:
            if cluster:
                initialize(cluster())
            main()
        except UserError as error:
            fail(str(error))
        except Preempted as notice:
            print(f"preempted: {notice}; run the same command again to go on", file=sys.stderr)
            sys.exit(EXIT_RESUME)
        except KeyboardInterrupt:
            print("interrupted: run the same command again to go on", file=sys.stderr)
            sys.exit(130)

    app.run(guarded, flags_parser=_parse)


def _parse(argv: list[str]) -> list[str]:
    try:
        rest = flags.FLAGS(argv)
        if "config" in flags.FLAGS and flags.FLAGS.config is not None:
            flags.FLAGS.config.items()  # a config file that could not be loaded only says so when it is used
    except flags.Error as error:
        first, *others = str(error).strip().splitlines()
        if any(line.startswith("Traceback") for line in others):  # what went wrong inside get_config(), with all of its traceback
            fail(f"--config cannot be loaded ({others[-1].removeprefix('diffit_jax.errors.UserError: ')})")
        fail(f"{first} (--help lists the flags)")
    except (AttributeError, KeyError) as error:
        # ConfigDict names the key and perhaps a similar one, in quotes and on two lines.
        unknown, *similar = re.findall(r"""['"](\w+)\\*['"]""", str(error)) or [str(error)]
        hint = f"did you mean {similar[0]}?" if similar else "see the file given by --config"
        fail(f"config key {unknown} is unknown: {hint}")
    except (OSError, ImportError, SyntaxError, TypeError) as error:
        fail(f"--config cannot be loaded ({error}): name a file with get_config()")
    if len(rest) > 1:
        fail(f"argument {rest[1]!r} is not a flag: write --name=value")
    return rest


def fail(message: str) -> NoReturn:
    """Ends the command with one line on stderr and exit status 1."""
    print("error: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(1)


class _Plain(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        prefix = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        return prefix + record.getMessage()
