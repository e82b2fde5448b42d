"""Config files: Python files with `get_config()`, and keys of theirs given on the command line."""

import ast
import dataclasses
import difflib
import importlib.util
import linecache
import os
import re
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, FrozenConfigDict, config_flags

from diffit_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class ConfigArgs:
    """What a command line says of its config.

    Attributes:
      file: value of `--config`: a path, perhaps with an argument of `get_config` after a colon;
        None: it is not given.
      overrides: the arguments `--config.key=value` as they stand there, each key before its value.
      others: all other arguments.
    """

    file: str | None
    overrides: Sequence[str]
    others: Sequence[str]

    @classmethod
    def find(cls, arguments: Sequence[str]) -> "ConfigArgs":
        """Sort the arguments of a command line, without the program's name.

        Raises:
          UserError: `--config` without a value.
        """
        file, overrides, others = None, [], []
        waiting = list(arguments)
        while waiting:
            argument = waiting.pop(0)
            if argument == "--":
                others += [argument, *waiting]
                break
            name, equals, value = argument.partition("=")
            if re.fullmatch(r"--?config", name):
                if not equals and not waiting:
                    raise UserError("--config is empty: name a file with get_config()")
                file = value if equals else waiting.pop(0)
            elif re.match(r"--?(no)?config\.", name):
                overrides.append(argument)
                if not equals and waiting and not re.match(r"--?[A-Za-z]", waiting[0]):
                    overrides.append(waiting.pop(0))
            else:
                others.append(argument)
        return cls(file, overrides, others)

    def keys(self) -> list[str]:
        """Return the dotted keys that are overridden, in their order."""
        names = (argument.partition("=")[0] for argument in self.overrides)
        return [
            name.partition("config.")[2] for name in names if re.match(r"--?(no)?config\.", name)
        ]

    def text_of(self, key: str) -> str | None:
        """Return the text of the last override of a key; None if there is none."""
        found = None
        for index, argument in enumerate(self.overrides):
            name, equals, value = argument.partition("=")
            if re.fullmatch(rf"--?config\.{re.escape(key)}", name):
                following = [*self.overrides[index + 1 : index + 2], "--config."][0]
                alone = re.match(r"--?(no)?config\.", following)
                found = value if equals else (None if alone else following)
        return found


def folder() -> Path:
    """Return the folder `configs/` that comes with this package.

    In a checkout it is beside the package; installed, inside it or beside the script's folder.
    """
    package, script = Path(__file__).resolve().parents[1], Path(sys.argv[0]).resolve()
    above = [package.parent, package, *script.parents[1:2]]
    places = [one / "configs" for one in above]
    return next((place for place in places if (place / "digits.py").exists()), places[0])


def own(name: str, flag: str) -> Path:
    """Return the path of a file of `configs/` that comes with this package.

    Raises:
      UserError: it is not there; `flag` names another one.
    """
    path = folder() / name
    if not path.exists():
        what = "a config" if name.endswith(".py") else "a file"
        raise UserError(
            f"there is no configs/{name} in this installation ({path}): name {what} by {flag}"
        )
    return path


def summaries() -> dict[str, str]:
    """Return the first line of each config's docstring by the name that `--config` takes."""
    found = {}
    for path in sorted(folder().glob("[a-z]*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
        if "get_config" in functions:
            found[path.stem] = (ast.get_docstring(tree) or "").partition("\n")[0].rstrip(".:")
    return found


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of Python files that are named on a command line.

    Attributes:
      flag: that names one.
      function: of the file, whose result is wanted.
      example: a file of this kind.
      within: folder of such files in `configs/`.
    """

    flag: str
    function: str
    example: str
    within: str = ""


CONFIG = Kind("--config", "get_config()", "configs/digits.py")


def load(file: str, kind: Kind = CONFIG) -> ConfigDict:
    """Return the result of a config file's `get_config()`, or of another kind's function.

    Args:
      file: path of a Python file; after `:`, an argument of `get_config`.
      kind: of the file.

    Raises:
      UserError: it is not such a file, or there is a mistake in it, whose line is shown.
    """
    path, argument = divided(file, kind)
    _check_kind(path, kind)
    flag, function = kind.flag, kind.function
    spec = importlib.util.spec_from_file_location("config", path)
    if spec is None or spec.loader is None:
        raise UserError(f"{flag} {path} cannot be loaded: name a Python file with {function}")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise _mistake(path, error, flag) from error
    make = getattr(module, function.removesuffix("()"), None)
    if not callable(make):
        raise UserError(
            f"{flag} {path} has no function {function}: name a config, such as {kind.example}"
        )
    try:
        config = make() if argument is None else make(argument)
    except Exception as error:
        raise _mistake(path, error, flag) from error
    if isinstance(config, FrozenConfigDict):  # no key of which could be overridden
        return ConfigDict(config.to_dict())
    if isinstance(config, ConfigDict):
        return config
    if isinstance(config, Mapping):
        return ConfigDict(dict(config), convert_dict=kind is CONFIG)
    raise UserError(
        f"{flag} {path}: {function} returned {config!r:.60}, not a ConfigDict: return one"
    )


def override(config: ConfigDict, given: ConfigArgs, file: str) -> None:
    """Set the overridden keys of a config, each of which it has, in its type.

    Raises:
      UserError: a value of another type, or a key of the file that is left open.
    """
    overridden = given.keys()
    for key in _left_open(config):
        if key not in overridden:
            raise UserError(
                f"config key {key} is left open in {divided(file)[0]}: give it by --config.{key}=…"
            )
        *parents, name = key.split(".")
        node: Any = config
        for part in parents:
            node = node[part]
        # ml_collections shows the config before it sets the key: something must be there.
        reference = node.get_ref(name)
        reference.set(reference.get_type()())
    values = flags.FlagValues()
    try:
        config_flags.DEFINE_config_dict(
            "config", config, flag_values=values, lock_config=False, sys_argv=["", *given.overrides]
        )
        rest = values(["", *given.overrides])
    except (flags.Error, TypeError, ValueError) as error:
        raise UserError(str(error).strip().splitlines()[0]) from error
    if len(rest) > 1:
        raise UserError(f"argument {rest[1]!r} is not a flag: write --name=value")


def _left_open(config: ConfigDict, prefix: str = "") -> list[str]:
    """Return the keys with a placeholder that must be filled."""
    keys = []
    for key in config:
        try:
            value = config[key]
        except Exception:  # ml_collections' RequiredValueError is not public in all versions
            keys.append(f"{prefix}{key}")
            continue
        if isinstance(value, ConfigDict):
            keys += _left_open(value, f"{prefix}{key}.")
    return keys


def divided(file: str, kind: Kind = CONFIG) -> tuple[Path, str | None]:
    """Split `path.py:argument`, or `name:argument` of a file in `configs/`, into its two parts.

    A folder `configs` in the current one comes before that of the package.

    Raises:
      UserError: a name that no file has.
    """
    match = re.fullmatch(r"(.*?\.py|\w+):(.*)", file, re.DOTALL)
    path, argument = (match[1], match[2]) if match else (file, None)
    if re.fullmatch(r"\w+", path) and not Path(path).is_file():
        within = folder() / kind.within
        here = Path("configs", kind.within)  # a checkout's, where the package is installed too
        within = here if (here / f"{path}.py").exists() else within
        if not (within / f"{path}.py").exists() and not Path(path).exists():
            names = [other.stem for other in sorted(within.glob("[a-z]*.py"))]
            close = difflib.get_close_matches(path, names, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(names)}"
            raise UserError(f"{kind.flag} {path} is neither a file nor one of configs/: {hint}")
        if (within / f"{path}.py").exists():
            path = str(within / f"{path}.py")
    return Path(os.path.expanduser(path)), argument


def _check_kind(path: Path, kind: Kind) -> None:
    """Raise `UserError` if a path cannot be a config file, naming its kind."""
    flag, function = kind.flag, kind.function
    if str(path) in ("", "."):
        raise UserError(f"{flag} is empty: name a file with {function}")
    if path.is_dir():
        what = " of a run" if (path / "config.json").exists() else ""
        raise UserError(
            f"{flag} {path} cannot be loaded (it is a directory{what}): name a file with {function}"
        )
    if not path.exists():
        raise UserError(
            f"{flag} cannot be loaded (there is no file {path}): name a file with {function}"
        )
    if path.suffix != ".py":
        what = "the config of a run" if path.name == "config.json" else f"a {path.suffix} file"
        what = "a file" if not path.suffix else what
        raise UserError(
            f"{flag} {path} cannot be loaded (it is {what}, not Python): name a file with "
            f"{function}"
        )


def _mistake(path: Path, error: Exception, flag: str) -> UserError:
    """Describe an error in a config file: Python's words, and the file's own line."""
    if isinstance(error, UserError):
        return UserError(f"{flag} cannot be loaded ({error})")
    said = " ".join(f"{type(error).__name__}: {error}".split())
    if isinstance(error, SyntaxError) and error.filename:
        where, number = error.filename, error.lineno or 0
        said = f"{type(error).__name__}: {error.msg}"
    else:
        # The innermost line in the file itself, or in another one next to it.
        folder = path.resolve().parent
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if Path(frame.filename).resolve().parent == folder]
        if not own:
            return UserError(f"{flag} {path} cannot be loaded ({said}): correct it")
        where, number = own[-1].filename, own[-1].lineno or 0
    line = linecache.getline(where, number).strip()
    name = path if Path(where).resolve() == path.resolve() else Path(where)
    return UserError(
        f"{flag} {path} cannot be loaded ({name}, line {number}: {line or '…'}: {said}): "
        "correct that line"
    )
