"""What all commands in `launch/` share: flags, logging, and one-line errors."""

import logging
import re
import sys
from collections.abc import Callable, Sequence

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import ConfigDict, config_flags

from diffit_jax.errors import UserError


def define_config() -> flags.FlagHolder[ConfigDict]:
    """The flag `--config FILE`, whose keys can be overridden by `--config.section.key=value`."""
    return config_flags.DEFINE_config_file("config", None, "File with get_config(); override keys by --config.section.key=value.")


def run(main: Callable[[], None]) -> None:
    """Parses the flags and calls `main`; a mistake of the user's ends in one line on stderr and exit status 1."""

    def guarded(_: Sequence[str]) -> None:
        logging.getLogger("diffit_jax").setLevel(logging.INFO)
        logging.getLogger("diffit_jax").propagate = False
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(_Plain())
        logging.getLogger("diffit_jax").handlers = [handler]
        absl_logging.set_verbosity(absl_logging.ERROR)  # Orbax reports every file that it touches
        try:
            main()
        except UserError as error:
            _fail(str(error))
        except KeyboardInterrupt:
            print("interrupted: run the same command again to go on", file=sys.stderr)
            sys.exit(130)

    app.run(guarded, flags_parser=_parse)


def parse_numbers(flag: str, text: str) -> list[int]:
    """`7`, `0-63` or `0-9,20-29` → the whole numbers it names, ends included; `flag` is named in the error."""
    numbers = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if not match or (match[2] and int(match[2]) < int(match[1])):
            raise UserError(f"{flag} {text!r} is not a list of whole numbers: write 7, 0-63 or 0-9,20-29")
        numbers.extend(range(int(match[1]), int(match[2] or match[1]) + 1))
    return numbers


def _parse(argv: list[str]) -> list[str]:
    try:
        rest = flags.FLAGS(argv)
        if "config" in flags.FLAGS and flags.FLAGS.config is not None:
            flags.FLAGS.config.items()  # a config file that could not be loaded only says so when it is used
    except flags.Error as error:
        _fail(str(error).splitlines()[0] + " (--help lists the flags)")
    except (AttributeError, KeyError) as error:
        # ConfigDict names the key and perhaps a similar one, in quotes and on two lines.
        unknown, *similar = re.findall(r"""['"](\w+)\\*['"]""", str(error)) or [str(error)]
        hint = f"did you mean {similar[0]}?" if similar else "see the file given by --config"
        _fail(f"config key {unknown} is unknown: {hint}")
    except (OSError, ImportError, SyntaxError, TypeError) as error:
        _fail(f"--config cannot be loaded ({error}): name a file with get_config()")
    if len(rest) > 1:
        _fail(f"argument {rest[1]!r} is not a flag: write --name=value")
    return rest


def _fail(message: str) -> None:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(1)


class _Plain(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        prefix = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        return prefix + record.getMessage()
