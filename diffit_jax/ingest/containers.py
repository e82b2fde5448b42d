"""Folders, zips and tars of images: what is in them, and which label each image has.

Labels are, in this order: those of a `dataset.json` (EDM's layout), of `.cls` files (WebDataset),
the folder that an image lies in, or the tar (ImageNet's own has a tar for each class). Folders and
tars are numbered by their sorted names, as torchvision and ImageNet's users do it.
"""

import concurrent.futures
import json
import tarfile
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from etils import epath

from diffit_jax.errors import UserError
from diffit_jax.ingest.decoding import SUFFIXES
from diffit_jax.ingest.locations import Index
from diffit_jax.runtime.console import first_few

DATASET_JSON = "dataset.json"
_DEEP = 20  # folders in folders
_CONCURRENT_TARS = 16
_SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}


class Member(NamedTuple):
    """An image in a container: its name with `/`, and its place in terms of `Index.locations`."""

    name: str
    file: int
    first: int
    second: int


def index_folder(folder: epath.Path, unlabelled: bool) -> Index:
    """Index the images in a folder and in its folders."""
    names = sorted(_walk(folder, ""))
    paths = tuple(str(folder / name) for name in names)
    members = [Member(name, number, 0, 0) for number, name in enumerate(names)]
    labels = None
    if (folder / DATASET_JSON).exists():
        labels = read_dataset_json((folder / DATASET_JSON).read_bytes(), f"{folder}/{DATASET_JSON}")
    classes = {name.partition("/")[0] for name in names if "/" in name}
    others = {entry.name for entry in folder.iterdir() if entry.is_dir()} - classes
    empty = [name for name in others if not _hidden(name)]
    if empty and classes and labels is None and not unlabelled:
        raise UserError(
            f"{folder} has folders without an image ({first_few(sorted(empty))}), which would be "
            "classes: delete them, or say --unlabelled"
        )
    return index_members(
        str(folder),
        "file",
        files=paths,
        members=members,
        given=labels,
        unlabelled=unlabelled,
        whole=True,
    )


def index_zip(path: epath.Path, unlabelled: bool) -> Index:
    """Index the images in a zip."""
    labels, members = None, {}
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            for entry in archive.infolist():
                if entry.filename.rpartition("/")[2] == DATASET_JSON:
                    labels = read_dataset_json(archive.read(entry), f"{path}/{entry.filename}")
                elif _is_image(entry.filename):
                    members[entry.filename] = Member(
                        entry.filename, 0, entry.header_offset, entry.compress_size
                    )
    except (zipfile.BadZipFile, EOFError) as error:
        raise UserError(f"{path} is not a whole zip file ({error}): fetch it again") from error
    return index_members(
        str(path),
        "zip",
        files=(str(path),),
        members=members.values(),
        given=labels,
        unlabelled=unlabelled,
    )


def index_tars(paths: Sequence[epath.Path], unlabelled: bool) -> Index:
    """Index the images in one or several tars, which may have tars in them."""
    found = [_scan(path, number) for number, path in enumerate(paths)]
    files, source = tuple(map(str, paths)), ", ".join(path.name for path in paths[:3])
    digits = {key: text for scan in found for key, text in scan.classes.items()}
    inner = any(scan.inner for scan in found)
    if digits and not inner:
        return _index_webdataset(
            source, files, [one for scan in found for one in scan.members], digits
        )
    members = {}
    for path, scan in zip(paths, found, strict=True):
        # A tar of each class: its name is the folder.
        prefix = f"{path.name.partition('.')[0]}/" if len(paths) > 1 and not scan.inner else ""
        if any("/" in member.name for member in scan.members) and not scan.inner:
            prefix = ""
        for member in scan.members:
            named = member._replace(name=prefix + member.name)
            members[named.name] = named
    return index_members(
        source,
        "range",
        files=files,
        members=members.values(),
        given=None,
        unlabelled=unlabelled,
        whole=inner,
    )


def index_members(
    source: str,
    kind: str,
    *,
    files: tuple[str, ...],
    members: Iterable[Member],
    given: Mapping[str, int] | None,
    unlabelled: bool,
    whole: bool = False,
) -> Index:
    """Give images their order, by name, and their labels.

    Args:
      source: its name in errors.
      kind: of the `Index`.
      files: of the `Index`.
      members: its images, in any order.
      given: labels by name, of a `dataset.json`, {} if that says that there are none; None: there
        is no such file.
      unlabelled: whether to leave labels out.
      whole: whether folders at the top are classes even where all images are in one.

    Raises:
      UserError: no images, or labels that cannot be determined.
    """
    ordered = sorted(members)
    if not ordered:
        raise UserError(
            f"{source} has no images ({' '.join(SUFFIXES)}): name a folder or file that has"
        )
    names = [member.name for member in ordered]
    locations = np.array([member[1:] for member in ordered], np.int64)
    messages = []
    if unlabelled or given == {}:
        labels, classes = None, ()
    elif given is not None:
        labels, classes = _given_labels(source, names, given)
    else:
        labels, classes, notes = _folder_labels(source, names, whole)
        messages += notes
    return Index(kind, files, locations, names, labels, classes, tuple(messages))


def _given_labels(
    source: str, names: Sequence[str], given: Mapping[str, int]
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return the labels of a `dataset.json`, whose names are relative to it."""
    top = _common_folder(names)
    if top and not any(name in given for name in names):
        given = {top + name: label for name, label in given.items()}
    missing = [name for name in names if name not in given]
    absent = sorted(set(given) - set(names))
    if missing:
        raise UserError(
            f"{source}: {DATASET_JSON} has no label of {len(missing)} images "
            f"({first_few(missing)}): complete it, or say --unlabelled"
        )
    if absent:
        raise UserError(
            f"{source}: {DATASET_JSON} names {len(absent)} images that are not there "
            f"({first_few(absent)}): fetch them, or take them out"
        )
    labels = np.array([given[name] for name in names], np.int64)
    if labels.min() < 0 or labels.max() >= 2**24:
        raise UserError(
            f"{source}: {DATASET_JSON} has labels from {labels.min()} to {labels.max()}: they must "
            "count from 0"
        )
    classes = tuple(str(number) for number in range(labels.max() + 1))
    return labels.astype(np.int32), classes


def _folder_labels(
    source: str, names: Sequence[str], whole: bool
) -> tuple[np.ndarray | None, tuple[str, ...], list[str]]:
    """Return labels by the folders at the top, below those that all images share."""
    shared = 0 if whole else len(_common_folder(names))
    inside = [name[shared:] for name in names]
    loose = [name for name in inside if "/" not in name]
    if len(loose) == len(inside):
        return None, (), ["no labels: its images lie in one folder"]
    if loose:
        raise UserError(
            f"{source} has {len(loose)} images beside its folders ({first_few(loose)}), whose "
            "class is not known: move them into a folder, or say --unlabelled"
        )
    folders = [name.partition("/")[0] for name in inside]
    classes = tuple(sorted(set(folders)))
    if set(classes) <= _SPLITS:
        raise UserError(
            f"{source} has folders of splits ({', '.join(classes)}), not of classes: name one of "
            "them"
        )
    if len(classes) == 1:
        raise UserError(
            f"{source} has one class only, {classes[0]!r}: name the folder above the classes, or "
            "say --unlabelled"
        )
    numbers = {name: number for number, name in enumerate(classes)}
    return np.array([numbers[name] for name in folders], np.int32), classes, []


def _common_folder(names: Sequence[str]) -> str:
    """Return `a/b/` if all names begin with it, and it is a folder."""
    first, last = min(names).split("/")[:-1], max(names).split("/")[:-1]
    shared = 0
    while shared < min(len(first), len(last)) and first[shared] == last[shared]:
        shared += 1
    return "".join(f"{part}/" for part in first[:shared])


def _index_webdataset(
    source: str, files: tuple[str, ...], members: list[Member], digits: Mapping[str, str]
) -> Index:
    """Index samples in the order of the archives, with the number in their `.cls`."""
    images: dict[str, Member] = {}
    for member in members:
        images.setdefault(_sample(member), member)
    missing = [member.name for key, member in images.items() if key not in digits]
    if missing:
        raise UserError(
            f"{source}: {len(missing)} images have no .cls beside them ({first_few(missing)}): "
            "complete the archives, or say --unlabelled"
        )
    labels = []
    for key, member in images.items():
        try:
            labels.append(int(digits[key]))
        except ValueError:
            raise UserError(
                f"{source}: the .cls of {member.name} is {digits[key]!r:.40}, not a number: "
                "correct it"
            ) from None
    if not images or min(labels) < 0:
        raise UserError(f"{source} has no labels from 0 on in its .cls files: correct them")
    locations = np.array([member[1:] for member in images.values()], np.int64)
    several = len(files) > 1
    names = [
        f"{epath.Path(files[member.file]).name}/{member.name}" if several else member.name
        for member in images.values()
    ]
    classes = tuple(str(number) for number in range(max(labels) + 1))
    return Index("range", files, locations, names, np.array(labels, np.int32), classes)


class _Scan(NamedTuple):
    """The content of a tar: images, texts of `.cls` files by sample, and if it has tars."""

    members: list[Member]
    classes: dict[str, str]
    inner: bool


def _scan(path: epath.Path, number: int) -> _Scan:
    try:
        with path.open("rb") as file:
            if file.read(2) == b"\x1f\x8b":
                raise UserError(
                    f"{path} is compressed, and images in it cannot be found without unpacking: "
                    f"gunzip it first (CIFAR-10's archives are read as they are)"
                )
        found, inner = _scan_tar(path, number, "", 0)
        # ImageNet's has a thousand, of 138 MB: in a bucket, one after the other would take long.
        with concurrent.futures.ThreadPoolExecutor(_CONCURRENT_TARS) as threads:
            parts = threads.map(lambda one: _scan_tar(path, number, *one)[0], inner)
        scans = [found, *parts]
    except tarfile.TarError as error:
        raise UserError(f"{path} is not a whole tar file ({error}): fetch it again") from error
    members = [member for scan in scans for member in scan.members]
    classes = {key: text for scan in scans for key, text in scan.classes.items()}
    return _Scan(members, classes, bool(inner))


def _scan_tar(
    path: epath.Path, number: int, prefix: str, offset: int
) -> tuple[_Scan, list[tuple[str, int]]]:
    """Scan a tar at `offset` of a file; return also the tars in it: (prefix, offset)."""
    members, classes, inner = [], {}, []
    with path.open("rb") as file:
        file.seek(offset)
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for entry in archive:
                archive.members = []  # it keeps all that it has seen
                if not entry.isfile():
                    continue
                name = entry.name.removeprefix("./")
                member = Member(prefix + name, number, entry.offset_data, entry.size)
                suffix = name.rpartition(".")[2].lower()
                if suffix == "tar" and not prefix:
                    folder = name.rpartition("/")[2].removesuffix(".tar")
                    inner.append((f"{folder}/", entry.offset_data))
                elif _is_image(name):
                    members.append(member)
                elif suffix == "cls":
                    part = archive.extractfile(entry)
                    assert part is not None
                    text = part.read(40).decode(errors="replace")
                    classes[_sample(member)] = text.strip()
    return _Scan(members, classes, bool(inner)), inner


def _sample(member: Member) -> str:
    """Return the common name of a WebDataset sample: up to the first dot of its last part."""
    folder, slash, name = member.name.rpartition("/")
    return f"{member.file}:{folder}{slash}{name.partition('.')[0]}"


def _walk(folder: epath.Path, prefix: str, deep: int = 0) -> Iterable[str]:
    """Yield the names of the image files below a folder."""
    if deep > _DEEP:
        raise UserError(f"{folder} is {_DEEP} folders deep: does a link lead back up?")
    try:
        entries = list(folder.iterdir())
    except OSError as error:
        raise UserError(f"{folder} cannot be read ({error.strerror or error})") from error
    for entry in entries:
        # By the suffix first: asking a million files whether they are folders takes long.
        if _is_image(entry.name):
            yield prefix + entry.name
        elif not _hidden(entry.name) and entry.is_dir():
            yield from _walk(entry, f"{prefix}{entry.name}/", deep + 1)


def _is_image(name: str) -> bool:
    last = name.rpartition("/")[2]
    hidden = _hidden(last) or name.startswith("__MACOSX/") or "/__MACOSX/" in name
    return not hidden and last.lower().endswith(tuple(SUFFIXES))


def _hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def read_dataset_json(content: bytes, path: str) -> dict[str, int]:
    """Read labels by name; {} if the file says that there are none."""
    try:
        labels = json.loads(content)["labels"]
        if labels is None:
            return {}
        table = {str(name): label for name, label in labels}
        if not all(isinstance(label, int) for label in table.values()):
            raise ValueError("labels must be whole numbers")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f'{path} is not {{"labels": [[name, number], …]}} ({error}): correct it'
        ) from error
    return table
