"""What README and CONTRIBUTING.md say of files, lines and imports holds."""

import ast
import re
import shutil
import subprocess

from support.processes import ROOT


def ours(*endings):
    """The project's own files, as far as git knows them; without git, all that lie here."""
    found = []
    if shutil.which("git"):
        command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        found = listed.stdout.splitlines()
    if not found:
        folders = (ROOT / name for name in ("diffit_jax", "configs", "launch", "tests"))
        paths = [*ROOT.glob("*"), *(path for folder in folders for path in folder.rglob("*"))]
        found = [str(path.relative_to(ROOT)) for path in paths]
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
    assert not {str(path): length for path, length in lengths.items() if length > 600}


def test_lines_have_at_most_100_columns():
    """But for addresses; those of Python are the linter's."""
    long = [
        f"{path}:{number}"
        for path in ours(".sh", ".md")
        for number, line in prose(path)
        if len(line) > 100 and not re.search(r"https?://", line)
    ]
    assert not long


def layout():
    """CONTRIBUTING.md on how the code is laid out."""
    return (
        (ROOT / "CONTRIBUTING.md")
        .read_text()
        .split("## How the code is laid out")[1]
        .split("\n## ")[0]
    )


def test_the_walks_name_functions_that_are_there():
    text = layout().split("```")[2]
    code = "\n".join(path.read_text() for path in ROOT.glob("diffit_jax/**/*.py"))
    names = [name for name in re.findall(r"`([\w.]+)`", text) if not name.endswith(".py")]
    assert len(names) > 20
    for name in names:
        last = name.rpartition(".")[2]
        assert re.search(rf"(def|class) {last}\b|\b{last}:|\"{last}\"", code), name


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


def test_each_line_of_the_layout_imports_from_lines_above_it():
    order = re.findall(r"^  (\w+)(?:/|\.py) ", layout().split("```")[1], re.MULTILINE)
    rooms: dict[str, set[str]] = {}
    package = ROOT / "diffit_jax"
    for path in package.rglob("*.py"):
        room = path.relative_to(package).parts[0].removesuffix(".py")
        rooms.setdefault(room, set()).update(set(imported(path)) - {room})
    rooms = {room: names for room, names in rooms.items() if not room.startswith("__")}
    assert sorted(order) == sorted(rooms) and len(order) <= 16  # with launch and configs 18
    assert rooms["training"] >= {"evaluation", "sampling", "runtime"}
    assert [room for room, names in rooms.items() if "preflight" in names] == ["cli"]
    upwards = {room: rooms[room] - set(order[:place]) for place, room in enumerate(order)}
    assert not {room: names for room, names in upwards.items() if names}


def test_each_room_names_its_files_and_imports_in_fifteen_lines():
    package = ROOT / "diffit_jax"
    for folder in sorted(path.parent for path in package.glob("*/__init__.py")):
        text = (folder / "README.md").read_text()
        assert len(text.splitlines()) <= 15, folder
        named = re.findall(r"`([a-z0-9_/]+\.py)`", text)
        for name in named:
            assert list(folder.glob(f"**/{name}")) or (package / name).exists(), (folder, name)
        if folder.name != "cli":  # whose files are the verbs
            files = {path.name for path in folder.rglob("*.py")} - {"__init__.py"}
            assert files <= {name.rpartition("/")[2] for name in named}, folder
        said = re.search(r"^Imports: (.*?)(?=^\*\*|\Z|^$)", text, re.DOTALL | re.MULTILINE)[1]
        may = set(re.findall(r"`(\w+)", said))
        used = {room for path in folder.rglob("*.py") for room in imported(path)} - {folder.name}
        if "above it" not in said and "everything" not in said:
            assert used <= may, (folder, used - may)


def with_arrays(annotation):
    """Whether an annotation is of arrays, not of functions of them."""
    text = ast.unparse(annotation) if annotation else ""
    return re.search(r"\b(jax\.Array|np\.ndarray)\b", text) and "Callable" not in text


def public_functions(path):
    """Functions and methods, `__call__` among them, without those of private classes."""

    def visit(node):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef) and not child.name.startswith("_"):
                yield from visit(child)
            elif isinstance(child, ast.FunctionDef) and not re.match("_(?!_call__)", child.name):
                yield child

    return visit(ast.parse(path.read_text()))


def test_public_functions_give_the_shapes_of_their_arrays():
    """In the docstring, "(B, H, W, C)", "a scalar", "shaped like x", or by a parameter's suffix."""
    in_text = re.compile(
        r"\([^()]*(\([^()]*\)[^()]*)?,[^()]*\)|scalar|like |same shape|elementwise"
    )
    in_name = re.compile(r"_[a-z0-9]*[A-Z][A-Za-z0-9]*$")
    missing, seen = [], 0
    for room in ("models", "diffusion", "training"):
        for path in sorted((ROOT / "diffit_jax" / room).rglob("*.py")):
            for function in public_functions(path):
                arguments = function.args
                every = arguments.posonlyargs + arguments.args + arguments.kwonlyargs
                arrays = [one.arg for one in every if with_arrays(one.annotation)]
                unnamed = [name for name in arrays if not in_name.search(name)]
                seen += bool(arrays or with_arrays(function.returns))
                shown = in_text.search(ast.get_docstring(function) or "")
                if (unnamed or with_arrays(function.returns)) and not shown:
                    missing.append(f"{path}:{function.lineno} {function.name}")
    assert seen > 100 and not missing


def test_docstrings_name_parameters_and_attributes_that_are_there():
    wrong = []
    for path in sorted((ROOT / "diffit_jax").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                section = "Args"
                arguments = node.args
                every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
                every += [one for one in (arguments.vararg, arguments.kwarg) if one]
                known = {one.arg for one in every}
            elif isinstance(node, ast.ClassDef):
                section, known = "Attributes", set(re.findall(r"\w+", ast.unparse(node.body[1:])))
            else:
                continue
            text = ast.get_docstring(node) or ""
            entries = re.search(rf"^{section}:\n((?:  .*\n?|\n)+)", text, re.MULTILINE)
            # An entry "name, name: text"; what base classes have is "as in" them.
            form = r"^  (\*{0,2}\w+(?:, \*{0,2}\w+)*): (?!as in `|N\.)"
            names = re.findall(form, entries[1] if entries else "", re.MULTILINE)
            named = {name.strip("* ") for line in names for name in line.split(",")}
            wrong += [f"{path}:{node.lineno} {name}" for name in named - known]
    assert not wrong
