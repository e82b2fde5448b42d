"""What CONTRIBUTING.md says of files, lines and imports holds."""

import ast
import graphlib
import re
import subprocess

import pytest
from support.processes import ROOT


def ours(*endings):
    """The project's own files, as far as git knows them; without git, all that lie here."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    folders = ("diffit_jax", "configs", "launch", "tests")
    found = listed.stdout.splitlines() or [
        str(path.relative_to(ROOT)) for folder in folders for path in (ROOT / folder).rglob("*")
    ]
    return [ROOT / name for name in found if name.endswith(endings) and (ROOT / name).exists()]


def prose(path):
    """(number, line) of a page outside tables and blocks of code."""
    block = False
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        block ^= line.lstrip().startswith("```")
        if not block and not line.lstrip().startswith("|"):
            yield number, line


def test_files_fit_in_the_head():
    lengths = {path: len(path.read_text().splitlines()) for path in ours(".py", ".sh")}
    assert len(lengths) > 200
    assert not {str(path): length for path, length in lengths.items() if length > 400}


def test_lines_have_at_most_100_columns():
    """But for addresses; those of Python are the linter's."""
    long = [
        f"{path}:{number}"
        for path in ours(".sh", ".md")
        for number, line in prose(path)
        if len(line) > 100 and not re.search(r"https?://", line)
    ]
    assert not long


def imported(path):
    """The rooms (folders and loose files of the package) that a file imports from, anywhere."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            whole = [alias.name for alias in node.names]
        else:
            continue
        for name in whole:
            room = re.match(r"diffit_jax\.(\w+)", name)
            if room and not room[1].startswith("__"):
                yield room[1]


def test_rooms_import_in_no_circle():
    rooms = {}
    package = ROOT / "diffit_jax"
    for path in package.rglob("*.py"):
        room = path.relative_to(package).parts[0].removesuffix(".py")
        rooms.setdefault(room, set()).update(set(imported(path)) - {room})
    assert len(rooms) <= 20 and rooms["verbs"] >= {"training", "sampling", "runtime"}
    try:
        graphlib.TopologicalSorter(rooms).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" → ".join(error.args[1]))
