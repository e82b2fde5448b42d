"""The keys of a config, read from the source text of the classes that they belong to.

To import those classes takes a second or two, since they bring jax: too long for `--help`, or to
say that a key is misspelt. Tests compare what is read here with the classes themselves.
"""

import ast
import difflib
import functools
import inspect
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from ml_collections import ConfigDict

from diffit_jax.errors import UserError
from diffit_jax.runtime.config_files import ConfigArgs

_PACKAGE = Path(__file__).resolve().parents[1]
_PLAIN = ("int", "float", "bool", "str")
_ROOT = ("diffit_jax.experiment.config", "Experiment")
_NOT_GIVEN = ("space",)  # of an experiment: it follows from other sections


class Key(NamedTuple):
    """A key of a section.

    Attributes:
      name: of the field.
      kind: "int", "float", "bool", "str", "path", "list", "dtype", or "section".
      declared: its annotation, limits and all, as it stands in the source.
      text: what it means, from the class's docstring.
      needed: whether it has no default.
    """

    name: str
    kind: str
    declared: str
    text: str
    needed: bool


class Section(NamedTuple):
    """The keys of a section by name.

    Attributes:
      chooser: the key that chooses the section's class; "" if there is but one.
      classes: keys by name, of every class by the name that chooses it ("" if there is but one).
    """

    chooser: str
    classes: Mapping[str, Mapping[str, Key]]

    def fields(self, chosen: str | None = None) -> dict[str, Key]:
        """Return the keys of one class by name, or of all classes together."""
        some = self.classes.values() if chosen is None else [self.classes[chosen]]
        return {name: key for keys in some for name, key in keys.items()}


@functools.cache
def sections() -> dict[str, Section]:
    """Return every section of a config by its dotted name; "" is the config itself."""
    found = {"": Section("", {"": _keys_of(*_definition(*_ROOT))})}
    node, module = _definition(_ROOT[0], "CHOICES")
    for name, entry in _entries(node):
        chooser, classes = entry.elts
        mapping, where = _resolved(classes, module)
        found[name] = Section(
            chooser.value,
            {each: _keys_of(*_resolved(value, where)) for each, value in _entries(mapping)},
        )
    experiment, module = _definition(*_ROOT)
    for field in _fields(experiment):
        if field.target.id not in (*found, *_NOT_GIVEN, "seed"):
            cls = _resolved(_peeled(field.annotation), module)
            found[field.target.id] = Section("", {"": _keys_of(*cls)})
    return found


def docs_of(cls: type) -> dict[str, str]:
    """Return the documentation of a class's fields by name, from its docstring and its bases'."""
    return _docs([owner.__doc__ or "" for owner in reversed(cls.__mro__)])


def check_overrides(config: ConfigDict, given: ConfigArgs) -> None:
    """Check the keys that a command line overrides, and the form of their values.

    Raises:
      UserError: a key that no section has, or a value of another type.
    """
    overridden = given.keys()
    for key in overridden:
        section, found = "", None
        for name in key.split("."):
            if section and section not in sections():
                raise UserError(f"config key {key} is unknown: {section} is not a section")
            known = _known(section, config, given)
            section = f"{section}.{name}" if section else name
            if name not in known:
                raise unknown_key(section, known)
            found = known[name]
        text = given.text_of(key)
        problem = "" if text is None or found is None else _problem(text, found)
        if problem:
            raise UserError(f"config key {key} {problem}")


def unknown_key(key: str, known: Iterable[str]) -> UserError:
    """Make the error about an unknown key, with the most similar one of its section or another.

    Args:
      key: dotted.
      known: names in its section.
    """
    section, _, name = key.rpartition(".")
    dot, known = "." if section else "", list(known)
    deeper = {
        f"{below}.{field}".removeprefix(f"{section}{dot}")
        for below, described in sections().items()
        if described.chooser and below.startswith(f"{section}{dot}")
        for field in described.fields()
    }
    names = {full: full for full in (*known, *sorted(deeper))}
    ends = {full.rpartition(".")[2]: full for full in names}
    close = difflib.get_close_matches(name, names, n=1) or difflib.get_close_matches(
        name, ends, n=1
    )
    hint = f"known are {', '.join(known)}"
    if close:
        hint = f"did you mean {section}{dot}{(ends | names)[close[0]]}?"
    return UserError(f"config key {key} is unknown: {hint}")


def _known(section: str, config: ConfigDict, given: ConfigArgs) -> dict[str, Key | None]:
    """Return all keys that a section may have by name; None: one that only the file has."""
    described, node = sections()[section], _node(config, section)
    there = [*node] if isinstance(node, ConfigDict) else []
    if not described.chooser:
        keys = described.fields()
    else:
        there.append(described.chooser)
        asked = given.text_of(f"{section}.{described.chooser}")
        if asked is not None and asked not in described.classes:
            choices = " or ".join(described.classes)
            raise UserError(f"config key {section}.{described.chooser} is {asked!r}: use {choices}")
        in_file: Any = node.get(described.chooser) if isinstance(node, ConfigDict) else None
        chosen = in_file if asked is None else asked
        keys = described.fields(chosen if chosen in described.classes else None)
    return {**dict.fromkeys(there), **keys}


def _node(config: Any, section: str) -> Any:
    for part in section.split(".") if section else ():
        config = config.get(part) if isinstance(config, ConfigDict) else None
    return config


def _problem(text: str, key: Key) -> str:
    """Say what is wrong with the text of a key's value; "" if nothing is found here."""
    value: Any = text
    try:
        if key.kind == "int":
            value = int(text, 0 if re.match("[-+]?0x", text) else 10)
        if key.kind == "float":
            value = float(text)
    except ValueError:
        return f"is {text!r}: it must be {'a whole number' if key.kind == 'int' else 'a number'}"
    if key.kind == "bool":
        known = text.lower() in ("true", "false", "t", "f", "1", "0")
        return "" if known else f"is {text!r}: it must be true or false"
    if key.kind not in ("int", "float", "str"):
        return ""
    from diffit_jax import limits  # brings numpy

    names = {"limits": limits, "Annotated": Annotated, "Sequence": Sequence, **vars(limits)}
    try:
        declared = eval(key.declared, names)
    except NameError:  # of the module that it stands in: `build` checks it
        return ""
    return limits.problem(value, declared)


def _docs(docstrings: Sequence[str]) -> dict[str, str]:
    """Return the documentation of fields by name, from docstrings; later ones replace others."""
    texts: dict[str, str] = {}
    for docstring in docstrings:
        _, _, attributes = (inspect.cleandoc(docstring) + "\n").partition("Attributes:\n")
        for names, text in re.findall(r"(?m)^  ([\w, ]+): (.*\n(?:    .*\n)*)", attributes):
            entry = " ".join(text.split())
            texts |= {name: entry for name in names.split(", ") if not entry.startswith("as in `")}
    return texts


def _entries(node: Any) -> Iterator[tuple[str, Any]]:
    return ((key.value, value) for key, value in zip(node.keys, node.values, strict=True))


@functools.cache
def _tree(module: str) -> ast.Module:
    return ast.parse(_file(module).read_text(encoding="utf-8"))


def _file(module: str) -> Path:
    path = _PACKAGE.joinpath(*module.split(".")[1:])
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _definition(module: str, name: str) -> tuple[Any, str]:
    """Return what a name of a module stands for, a class or a value, and the module that says so.

    Of an imported module, its name. Raises `KeyError` for names of other packages.
    """
    for node in _tree(module).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return node, module
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(target, ast.Name) and target.id == name for target in targets):
                return node.value, module
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("diffit_jax"):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    inner = f"{node.module}.{alias.name}"
                    if _file(inner).exists():
                        return None, inner
                    return _definition(str(node.module), alias.name)
    raise KeyError(name)


def _resolved(node: Any, module: str) -> tuple[Any, str]:
    """Follow names and attributes of modules to a class or a value."""
    if isinstance(node, ast.Name):
        return _definition(module, node.id)
    if isinstance(node, ast.Attribute):
        _, inner = _resolved(node.value, module)
        return _definition(inner, node.attr)
    return node, module


def _peeled(annotation: Any) -> Any:
    """Return the plain type of an annotation with marks."""
    if isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) == "Annotated":
        return annotation.slice.elts[0]
    return annotation


def _fields(cls: ast.ClassDef) -> list[Any]:
    return [
        node
        for node in cls.body
        if isinstance(node, ast.AnnAssign) and "ClassVar" not in ast.unparse(node.annotation)
    ]


def _bases(cls: ast.ClassDef, module: str) -> Iterator[tuple[Any, str]]:
    """Yield a class and its bases in this package, the farthest first."""
    for base in reversed(cls.bases):
        try:
            found, where = _resolved(base, module)
        except KeyError:
            continue
        if isinstance(found, ast.ClassDef):
            yield from _bases(found, where)
    yield cls, module


def _keys_of(cls: ast.ClassDef, module: str) -> dict[str, Key]:
    lineage = [*_bases(cls, module)]
    texts = _docs([ast.get_docstring(each) or "" for each, _ in lineage])
    keys: dict[str, Key] = {}
    for each, where in lineage:
        for field in _fields(each):
            name, default = field.target.id, "" if field.value is None else ast.unparse(field.value)
            if "init=False" in default or name in _NOT_GIVEN:
                keys.pop(name, None)
                continue
            needed = not default or ("field(" in default and "default" not in default)
            kind, declared = _kind(field.annotation, where), ast.unparse(field.annotation)
            keys[name] = Key(name, kind, declared, texts.get(name, ""), needed)
    return keys


def _kind(annotation: Any, module: str) -> str:
    text = ast.unparse(_peeled(annotation))
    if text in _PLAIN:
        return text
    if text == "np.dtype":
        return "dtype"
    if text.startswith("Sequence["):
        return "list"
    try:
        found, where = _resolved(_peeled(annotation), module)
    except KeyError:
        return "section"
    if not isinstance(found, ast.Subscript | ast.Name | ast.Attribute) or found is annotation:
        return "section"
    return "path" if "'path'" in ast.unparse(found) else _kind(found, where)
