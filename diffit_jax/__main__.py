"""The command `diffit VERB …`, also `python -m diffit_jax VERB …`."""

import ast
import difflib
import importlib
import sys
from pathlib import Path

_COMMANDS = Path(__file__).parent / "cli" / "commands"


def verbs() -> dict[str, str]:
    """What each verb does, in a line, by its name. Their modules are only read: two of them would
    define the same flags."""
    found = {}
    for path in sorted(_COMMANDS.glob("[a-z]*.py")):
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        found[path.stem] = text.partition("\n")[0].rstrip(":.")
    return found


def launch(verb: str) -> None:
    """Runs a verb with the arguments of this process."""
    module = importlib.import_module(f"diffit_jax.cli.commands.{verb}")
    sys.modules["__main__"].__doc__ = module.__doc__  # what --help begins with
    module.run()


def main() -> None:
    """The console script: the first argument is the verb."""
    known = verbs()
    asked = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if asked.lstrip("-") in ("help", "h"):
        width = max(map(len, known))
        print("usage: diffit VERB [--flag=value …]; diffit VERB --help says which\n")
        print("\n".join(f"  {verb:{width}}  {text}" for verb, text in known.items()))
        return
    verb = asked.replace("-", "_")
    if verb not in known:
        close = difflib.get_close_matches(verb, known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}"
        sys.exit(f"error: verb {asked} is unknown: {hint}")
    del sys.argv[1]
    launch(verb)


if __name__ == "__main__":
    main()
