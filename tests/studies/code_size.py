"""How large the code is: lines of code (no blank lines, comments or docstrings) by room, and which
functions are long.

    python tests/studies/code_size.py [--rooms]
"""

import ast
import io
import subprocess
import sys
import tokenize
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LONG, POSITIONAL = 60, 5
_NOT_CODE = (
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
)


def docstring_lines(tree: ast.Module) -> set[int]:
    """Numbers of the lines that docstrings cover."""
    found: set[int] = set()
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if not isinstance(body, list) or not body:
            continue
        value = getattr(body[0], "value", None) if isinstance(body[0], ast.Expr) else None
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            found |= set(range(value.lineno, value.end_lineno + 1))
    return found


def code_lines(path: Path) -> int:
    text = path.read_text()
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in _NOT_CODE:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - docstring_lines(ast.parse(text)))


def functions(path: Path):
    """(name, lines from `def` to the end, positional parameters) of every function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            names = [each.arg for each in (*node.args.posonlyargs, *node.args.args)]
            count = len(names) - (bool(names) and names[0] in ("self", "cls"))
            yield f"{path.relative_to(ROOT)}:{node.name}", node.end_lineno - node.lineno + 1, count


def main() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    paths = [ROOT / name for name in listed if (ROOT / name).exists()]
    by_top, by_room, found = Counter(), Counter(), []
    for path in paths:
        top, *below = path.relative_to(ROOT).parts
        by_top[top] += (count := code_lines(path))
        if top == "diffit_jax":
            by_room[below[0]] += count
        if top in ("diffit_jax", "launch", "configs"):
            found += functions(path)
    if "--rooms" in sys.argv:
        for room, count in by_room.most_common():
            print(f"{count:7,}  {room}")
    package = by_top["diffit_jax"]
    print(f"{package:7,}  package")
    print(f"{package + by_top['launch'] + by_top['configs']:7,}  with launch and configs")
    print(f"{by_top['tests']:7,}  tests")
    long = sorted(((lines, name) for name, lines, _ in found if lines > LONG), reverse=True)
    print(f"{len(long):7}  functions over {LONG} lines: " + ", ".join(f"{n} {c}" for c, n in long))
    many = [name for name, _, count in found if count > POSITIONAL]
    print(f"{len(many):7}  with more than {POSITIONAL} positional parameters: {', '.join(many)}")


if __name__ == "__main__":
    main()
