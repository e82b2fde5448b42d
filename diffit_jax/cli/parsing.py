"""A command's arguments: its flags, its config, its `--help`, and what is wrong with them.

Nothing here imports jax: a mistake is said, and help is printed, in a fraction of a second.
"""

import contextlib
import difflib
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from absl import flags

from diffit_jax.errors import UserError, one_line
from diffit_jax.runtime.config_files import ConfigArgs

if TYPE_CHECKING:
    from ml_collections import ConfigDict

when_parsed: list[Callable[[], None]] = []  # what defines more flags, just before they are parsed
_groups: dict[str, str] = {}  # heading of a flag in --help
_state: dict[str, Any] = {"config": None, "positional": None, "verbs": ()}


def fail(message: str) -> NoReturn:
    """End the command with one line on stderr and exit status 1."""
    print("error: " + one_line(message), file=sys.stderr)
    sys.exit(1)


@contextlib.contextmanager
def group(heading: str) -> Iterator[None]:
    """Put the flags that are defined in this block under a heading in `--help`."""
    before = set(flags.FLAGS)
    yield
    for name in set(flags.FLAGS) - before:
        _groups.setdefault(name, heading)


class ConfigFlag:
    """The flag `--config FILE`, whose keys can be overridden by `--config.section.key=value`.

    Attributes:
      value: the config, None if none is given; from `finish` on.
    """

    def __init__(self, help_text: str, required: bool, run: "Callable[[], str | None] | None"):
        # For --help and --flagfile only: the value is taken out before flags are parsed.
        flags.DEFINE_string("config", None, help_text)
        self.value: ConfigDict | None = None
        self._required, self._run = required, run
        self._given: ConfigArgs | None = None
        self._loaded: ConfigDict | None = None

    @property
    def named(self) -> bool:
        """Whether the command line names a config."""
        return self._given is not None and self._given.file is not None

    @property
    def trains(self) -> bool:
        """Whether the command is about the config, not about a network that has one."""
        return self._required

    def take(self, given: ConfigArgs) -> None:
        """Take what a command line says of the config."""
        if given.overrides and given.file is None and not self._run:
            raise UserError(f"{given.overrides[0]} needs a config: name one by --config")
        self._given = given

    def load(self) -> None:
        """Load the config that the command line names, and check its overrides, without jax."""
        given = self._given
        assert given is not None
        from diffit_jax.experiment import catalogue
        from diffit_jax.runtime import config_files

        if given.file is not None:
            self._loaded = config_files.load(given.file)
        elif self._run and (workdir := self._run()):
            from etils import epath

            from diffit_jax.runtime.files import read_json

            # Of a run that is there; the command says what is wrong if there is none.
            found = read_json(epath.Path(workdir) / "config.json")
            self._loaded = None if found is None else _with_tuples(found)
        if self._loaded is not None:
            catalogue.check_overrides(self._loaded, given)
        if self._required and self._loaded is None:
            here = f": there is no run in {self._run()} to continue" if self._run else ""
            raise UserError(
                f"--config is missing{here}: name a file with get_config(), or a config that "
                "`diffit configs` lists"
            )

    def finish(self) -> None:
        """Set the overridden keys, and check all that needs the classes of the sections."""
        from diffit_jax.experiment import config as experiment

        if self._loaded is not None and self._given is not None:
            self.value = experiment.given_config(self._given, self._loaded)


def _with_tuples(section: Any) -> "ConfigDict":
    """Return a config that was read from JSON, where lists stand for tuples."""
    from ml_collections import ConfigDict

    return ConfigDict(
        {
            key: _with_tuples(value)
            if isinstance(value, dict)
            else (tuple(value) if isinstance(value, list) else value)
            for key, value in section.items()
        }
    )


def define_config(
    help_text: str = "A config that `diffit configs` lists, or a file with get_config(); "
    "--config.section.key=value overrides a key, and --config NAME --help lists all.",
    required: bool = False,
    run: "Callable[[], str | None] | None" = None,
) -> ConfigFlag:
    """Define the flag `--config`.

    Args:
      help_text: of the flag.
      required: whether the command ends if it is not given.
      run: returns a work directory whose config is taken if none is named.
    """
    _state["config"] = ConfigFlag(help_text, required, run)
    return _state["config"]


def config_flag() -> ConfigFlag | None:
    """Return the flag `--config` of this command, if it has one."""
    return _state["config"]


def define_positional(name: str) -> None:
    """Let an argument without a dash be the value of the flag of this name."""
    _state["positional"] = name


def own_flags() -> list[flags.Flag]:
    """Return the flags that this package defines, in their order."""
    known = flags.FLAGS
    modules = known.flags_by_module_dict()
    ours = {
        flag.name
        for name, some in modules.items()
        if name.startswith("diffit_jax.") or name == "diffit_jax"
        for flag in some
    }
    found = {known[name].name: known[name] for name in known if name in ours}
    return list(found.values())


def parse(argv: list[str], verbs: Sequence[str], summary: str) -> list[str]:
    """Parse a command line, for absl's `app.run`; end the command if it is wrong or asks for help.

    Args:
      argv: of the process.
      verbs: that there are, for hints.
      summary: of the command, what `--help` begins with.
    """
    _state["verbs"] = verbs
    try:
        for define in when_parsed:
            define()
        try:
            arguments = flags.FLAGS.read_flags_from_files(argv[1:], False)
        except flags.Error as error:
            fail(str(error).removeprefix("ERROR:: "))
        config: ConfigFlag | None = _state["config"]
        given = ConfigArgs.find(arguments) if config else ConfigArgs(None, (), arguments)
        if _asks_for_help(given.others):
            with contextlib.suppress(BrokenPipeError):
                print(_keys_of(given) if given.file is not None else _help(summary), flush=True)
            sys.exit(0)
        rest = _parse_flags([argv[0], *given.others])
        if config:
            config.take(given)
    except UserError as error:
        fail(str(error))
    return rest


def _asks_for_help(arguments: Sequence[str]) -> bool:
    ended = list(arguments).index("--") if "--" in arguments else len(arguments)
    return any(
        re.fullmatch(r"--?(help|h|helpshort|helpfull)", argument) for argument in arguments[:ended]
    )


def _parse_flags(argv: list[str]) -> list[str]:
    try:
        rest = flags.FLAGS(argv)
    except flags.UnrecognizedFlagError as error:
        fail(f"--{error.flagname} is no flag of this command: {_nearest(error.flagname)}")
    except flags.Error as error:
        fail(_in_our_words(str(error).strip().splitlines()[0]))
    positional = _state["positional"]
    if positional and len(rest) == 2 and flags.FLAGS[positional].value is None:
        flags.FLAGS[positional].parse(rest.pop())
    if len(rest) > 1:
        fail(f"argument {rest[-1]!r} is not a flag: write --name=value")
    return rest


def _nearest(name: str) -> str:
    """Say what an unknown flag may stand for: a verb, a key of a config, or another flag."""
    if name in _state["verbs"]:
        return f"it is a verb, diffit {name} --help"
    known = [flag.name for flag in own_flags()]
    keys: dict[str, str] = {}
    if _state["config"]:
        from diffit_jax.experiment import catalogue

        for section, described in catalogue.sections().items():
            for key in described.fields():
                full = f"{section}.{key}" if section else key
                if full not in catalogue.sections():
                    keys.setdefault(key, full)
                    keys[full] = full
    ends = {one.rpartition(".")[2]: one for one in known} | {one: one for one in known}
    trains = _state["config"] is not None and _state["config"].trains
    if name in ends:
        return f"did you mean --{ends[name]}?"
    if trains and name in keys:
        return f"did you mean --config.{keys[name]}?"
    close = difflib.get_close_matches(name, ends, n=1, cutoff=0.7)
    if close:
        return f"did you mean --{ends[close[0]]}?"
    close = difflib.get_close_matches(name, keys, n=1, cutoff=0.7)
    if close:
        return f"did you mean --config.{keys[close[0]]}?"
    return "--help lists them"


def _in_our_words(said: str) -> str:
    """Rewrite absl's line about a flag's value."""
    match = re.match(r"flag --([\w.]+)=(.*?): ", said, re.DOTALL)
    if not match:
        missing = re.match(r"Missing value for flag -*([\w.]+)", said)
        return f"--{missing[1]} has no value: write --{missing[1]}=VALUE" if missing else said
    name, value = match.groups()
    flag = flags.FLAGS[name]
    if "must have a value other than None" in said:
        return f"--{name} is missing: {flag.help}"
    parser: Any = flag.parser
    choices = getattr(parser, "enum_values", None)
    if choices:
        close = difflib.get_close_matches(value, choices, n=1)
        return f"--{name} {value} is unknown: " + (
            f"did you mean {close[0]}?" if close else f"use {', '.join(choices)}"
        )
    if isinstance(parser, flags.BooleanParser):
        return f"--{name} is {value!r}: write --{name} or --no{name}"
    words = {int: "a whole number", float: "a number"}
    for kind, cls in ((int, flags.IntegerParser), (float, flags.FloatParser)):
        if isinstance(parser, cls):
            lower, upper = parser.lower_bound, parser.upper_bound
            ends = "" if lower is None else f" of at least {lower}"
            ends += "" if upper is None else f"{' and' if ends else ' of'} at most {upper}"
            return f"--{name} is {value!r}: it must be {words[kind]}{ends}"
    return said.removeprefix("flag ")


def _width() -> int:
    return max(60, min(shutil.get_terminal_size((100, 24)).columns, 110))


def _help(summary: str) -> str:
    """Return what a command does, and its flags by groups."""
    by_group: dict[str, list[flags.Flag]] = {"": []}
    for flag in own_flags():
        if not (flag.help or "").startswith("Alias for"):
            by_group.setdefault(_groups.get(flag.name, ""), []).append(flag)
    lines = [summary.strip()]
    for heading, some in by_group.items():
        if some:
            lines += ["", f"{heading or 'flags'}:"]
        for flag in some:
            lines += _described(flag)
    if _state["config"]:
        lines += ["", "--config NAME --help lists the keys of a config; diffit configs, the names."]
    return "\n".join(lines)


def _described(flag: flags.Flag) -> list[str]:
    parser: Any = flag.parser
    choices = getattr(parser, "enum_values", None)
    kinds = (
        (flags.BooleanParser, ""),
        (flags.IntegerParser, "=NUMBER"),
        (flags.FloatParser, "=NUMBER"),
    )
    value = next((text for cls, text in kinds if isinstance(parser, cls)), "=VALUE")
    value = "=" + "|".join(choices) if choices else value
    text = re.sub(r"^<[^>]*>: ", "", " ".join((flag.help or "").split()))
    default = flag.default
    if default not in (None, "", [], False):
        shown = ",".join(default) if isinstance(default, list) else default
        text += f" (default: {str(shown).lower() if default is True else shown})"
    wrapped = textwrap.wrap(text, _width() - 6)
    return [f"  --{flag.name}{value}", *(f"      {line}" for line in wrapped)]


def _keys_of(given: ConfigArgs) -> str:
    """Return all keys of a config: value, what it may be, and what it means."""
    from diffit_jax import limits
    from diffit_jax.experiment import catalogue
    from diffit_jax.experiment import config as experiment

    config = experiment.given_config(given)
    whole, added = experiment.completed(config)
    classes = {"": experiment.Experiment, **experiment.section_classes(config)}
    lines = [f"The keys of --config {given.file}, to be overridden by --config.KEY=VALUE", ""]
    for section, cls in classes.items():
        node: Any = whole
        for part in section.split(".") if section else ():
            node = node[part]
        chooser, choices = experiment.CHOICES.get(section, ("", {}))
        if section:
            lines += ["", f"{section}:"]
        if chooser:
            lines.append(
                f"  {section}.{chooser} = {node[chooser]!r}  (one of {', '.join(choices)})"
            )
        texts = catalogue.docs_of(cls)
        for name, field in experiment.keys_of(section, cls).items():
            full = f"{section}.{name}" if section else name
            if name not in node or full in classes:
                continue
            default = "; the default" if full in added else ""
            takes = limits.describe(field.type)
            lines.append(f"  {full} = {node[name]!r}  ({takes}{default})")
            lines += [f"      {line}" for line in textwrap.wrap(texts.get(name, ""), _width() - 6)]
    return "\n".join(lines)
