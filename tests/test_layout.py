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
    """README's section on how the code is laid out."""
    return (
        (ROOT / "README.md").read_text().split("## How the code is laid out")[1].split("\n## ")[0]
    )


def test_the_layout_names_every_file_of_the_package():
    tree = layout().split("```")[1]
    package = ROOT / "diffit_jax"
    files = {path.relative_to(package) for path in package.rglob("*.py")}
    for file in sorted(
        file for file in files if not file.stem.startswith("__") and file.parts[0] != "configs"
    ):
        room = f"{file.parts[0]}/" if len(file.parts) > 1 else file.name
        entry = re.search(
            rf"^  {re.escape(room)}(.*?)(?=^  \S|^\S)", tree, re.DOTALL | re.MULTILINE
        )
        assert entry and re.search(rf"\b{file.stem}\b", room + entry[1]), file


def test_the_walks_name_files_and_functions_that_are_there():
    text = layout().split("```")[2]
    sources = [*ROOT.glob("launch/*.py"), *ROOT.glob("diffit_jax/**/*.py")]
    code = "\n".join(path.read_text() for path in sources)
    for name in re.findall(r"`([^`]+)`", text.split("A few agreements")[0]):
        if name.endswith(".py"):
            assert any(str(path).endswith(f"/{name}") for path in sources), name
        elif re.fullmatch(r"[\w.]+", name):  # not a folder or a flag
            last = name.rpartition(".")[2]
            assert re.search(rf"(def|class) {last}\b|\b{last}:", code), name


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


def test_each_line_of_the_readme_imports_from_lines_above_it():
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


def test_each_room_says_in_fifteen_lines_what_it_holds_and_may_import():
    package = ROOT / "diffit_jax"
    for folder in sorted(path.parent for path in package.glob("*/__init__.py")):
        text = (folder / "README.md").read_text()
        assert len(text.splitlines()) <= 15, folder
        for name in re.findall(r"`([a-z_/]+\.py)`", text):
            assert list(folder.glob(f"**/{name}")) or (package / name).exists(), (folder, name)
        said = re.search(r"^Imports: (.*?)(?=^\*\*|\Z|^$)", text, re.DOTALL | re.MULTILINE)[1]
        named = set(re.findall(r"`(\w+)", said))
        used = {room for path in folder.rglob("*.py") for room in imported(path)} - {folder.name}
        if "above it" not in said and "everything" not in said:
            assert used <= named, (folder, used - named)
