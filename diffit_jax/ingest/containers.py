"""Folders, zips and tars of images: what is in them, and which label each image has.

Labels are, in this order: those of a `dataset.json` (EDM's layout), of `.cls` files (WebDataset),
the folder that an image lies in, or the tar (ImageNet's own has a tar for each class). Folders and
tars are numbered by their sorted names, as torchvision and ImageNet's users do it.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import os
import posixpath
import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import IO, NamedTuple

import numpy as np
from etils import epath

from diffit_jax.errors import UserError, one_line
from diffit_jax.ingest import labelling, locations
from diffit_jax.ingest.decoding import HEAD, SUFFIXES, is_image
from diffit_jax.ingest.labelling import DATASET_JSON, Labels
from diffit_jax.ingest.locations import Index
from diffit_jax.runtime import files, npz
from diffit_jax.runtime.console import first_few

_DEEP = 20  # folders in folders
_CONCURRENT_TARS = 16
_BLOCK = 512  # of a tar
_BEHIND = 2**16  # bytes behind the end of a tar in which another one would begin
_LINK, _PIPE = "links to what is not there", "pipes or devices"


class Member(NamedTuple):
    """An image in a container.

    Its name with `/`, its place in terms of `Index.locations`, and what is known of its content
    without reading it, see `Index.stamps`.
    """

    name: str
    file: int
    first: int
    second: int
    stamp: str = ""


# How many files were passed over, by their suffix or by what they are.
Passed = collections.Counter[str]


def index_folder(folder: epath.Path, unlabelled: bool) -> Index:
    """Index the images in a folder and in its folders."""
    passed = Passed()
    found = sorted(_walk(folder, "", passed, ()))
    # A zip made on Windows, unpacked elsewhere, leaves names with its separators.
    names = [_slashed(name) for name, _ in found]
    paths = tuple(str(folder / name) for name, _ in found)
    members = [
        Member(name, number, 0, 0, stamp)
        for number, (name, (_, stamp)) in enumerate(zip(names, found, strict=True))
    ]
    labels = None
    if (folder / DATASET_JSON).exists():
        path = folder / DATASET_JSON
        labels = labelling.read_dataset_json(path.read_bytes(), str(path))
    classes = {name.partition("/")[0] for name in names if "/" in name}
    entries = locations.listed(folder)
    others = {entry.name for entry in entries if entry.kind == "folder"} - classes
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
        passed=passed,
    )


def index_zip(path: epath.Path, unlabelled: bool) -> Index:
    """Index the images in a zip."""
    tables: dict[str, dict[str, int]] = {}
    members: dict[str, Member] = {}
    passed = Passed()
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            _check_count(file, len(archive.infolist()))
            for entry in archive.infolist():
                name = entry.filename.replace("\\", "/")
                is_link = stat.S_ISLNK(entry.external_attr >> 16)
                left_out = entry.is_dir() or name.endswith("/") or _concealed(name)
                other_json = name.endswith(".json") and not name.endswith(DATASET_JSON)
                if left_out or is_link or other_json:
                    archive.open(entry).close()  # is that its name where it lies, too?
                if left_out:
                    continue
                if is_link and not is_image("", lambda entry=entry: _head_of(archive, entry)):
                    passed["symbolic links"] += 1
                elif name.rpartition("/")[2] == DATASET_JSON:
                    labels = labelling.read_dataset_json(archive.read(entry), f"{path}/{name}")
                    tables[name] = labels
                elif is_image(name, lambda entry=entry: _head_of(archive, entry)):
                    place = (0, entry.header_offset, entry.compress_size)
                    members[name] = Member(name, *place, f"{entry.CRC:08x}")
                else:
                    passed[_suffix(name)] += 1
    except UserError:
        raise
    except (*npz.DAMAGED, OverflowError) as error:
        raise UserError(
            f"{path} is not a whole zip file ({one_line(error, 120)}): fetch it again"
        ) from error
    if len(tables) > 1:
        raise UserError(
            f"{path} has several {DATASET_JSON} ({first_few(sorted(tables))}): keep one"
        )
    return index_members(
        str(path),
        "zip",
        files=(str(path),),
        members=members.values(),
        given=next(iter(tables.values()), None),
        unlabelled=unlabelled,
        passed=passed,
    )


def _check_count(file: IO[bytes], found: int) -> None:
    """Raise `BadZipFile` unless a zip says at its end that it has so many entries."""
    file.seek(0, os.SEEK_END)
    file.seek(max(0, file.tell() - 2**16 - 22))
    tail = file.read()
    end = tail[tail.rfind(b"PK\5\6") :]  # APPNOTE.TXT 4.3.16
    said = int.from_bytes(end[10:12], "little")
    if said not in (found, 0xFFFF):  # that one is: see the zip64 record
        raise zipfile.BadZipFile(f"its directory has {found} of {said} entries")


def index_tars(paths: Sequence[epath.Path], unlabelled: bool, tar_classes: bool) -> Index:
    """Index the images in one or several tars, which may have tars in them.

    Args:
      paths: of the tars.
      unlabelled: whether to leave labels out.
      tar_classes: whether each of several tars is a class, whatever its name and content.
    """
    found = [_scan(path, number) for number, path in enumerate(paths)]
    files_, source = tuple(map(str, paths)), ", ".join(path.name for path in paths[:3])
    passed = sum((scan.passed for scan in found), Passed())
    digits = {key: text for scan in found for key, text in scan.texts.items()}
    inner = any(scan.inner for scan in found)
    if digits and not inner and not unlabelled:
        members = [one for scan in found for one in scan.members.values()]
        return _index_webdataset(source, files_, members, digits, passed)
    stems = [path.name.partition(".")[0] for path in paths]
    flat = not inner and not any("/" in name for scan in found for name in scan.members)
    several = len(paths) > 1 and not inner
    # A tar of each class: its name is the folder. But shards are numbered, and those of
    # WebDataset have texts beside the images.
    companions = any(scan.companions for scan in found)
    # Or each has a folder of its own, named like it perhaps.
    tops = [{name.partition("/")[0] for name in scan.members} for scan in found]
    alone = all(len(top) == 1 for top in tops) and len(set().union(*tops)) == len(tops)
    is_shards = several and (flat or alone) and (companions or labelling.are_shards(stems))
    unlabelled |= is_shards and not tar_classes
    messages = ()
    if is_shards and not tar_classes:
        why = "other files beside the images" if companions else "numbers for names"
        messages = (
            f"no labels: its tars have {why}, and are taken for parts of one set, without .cls "
            "files (--tar_classes makes each tar a class)",
        )
    members = {}
    for stem, scan in zip(stems, found, strict=True):
        for member in scan.members.values():
            named = member
            if several and flat:
                named = member._replace(name=f"{stem}/{member.name}")
            elif named.name in members and members[named.name].file != named.file:
                folder, slash, last = member.name.rpartition("/")  # in two shards, say
                named = member._replace(name=f"{folder}{slash}{stem}/{last}")
            members[named.name] = named
    return index_members(
        source,
        "range",
        files=files_,
        members=members.values(),
        given=None,
        unlabelled=unlabelled,
        whole=inner,
        passed=passed,
        messages=messages,
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
    passed: Mapping[str, int] = Passed(),
    messages: Sequence[str] = (),
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
      passed: what was passed over.
      messages: about the source.

    Raises:
      UserError: no images, or labels that cannot be determined.
    """
    ordered = sorted(members)
    if not ordered:
        there = f", but {_counted(passed)}" if passed else ""
        raise UserError(
            f"{source} has no images ({' '.join(SUFFIXES)}){there}: name a folder or file that has"
        )
    names = [member.name for member in ordered]
    if unlabelled or given == {}:
        labels = Labels()
    elif given is not None:
        labels = labelling.of_dataset_json(source, names, given)
    else:
        labels = labelling.of_folders(source, names, whole)
    said = (*messages, *labels.messages, *_said(passed))
    return _index(kind, files, ordered, names, labels._replace(messages=said))


def _index(
    kind: str, files: tuple[str, ...], members: Sequence[Member], names: list[str], labels: Labels
) -> Index:
    places = np.array([member[1:4] for member in members], np.int64)
    stamps = locations.stamps_of([member.stamp for member in members])
    return Index(kind, files, places, names, *labels, stamps=stamps)


def _index_webdataset(
    source: str,
    files: tuple[str, ...],
    members: list[Member],
    digits: Mapping[str, str],
    passed: Passed,
) -> Index:
    """Index samples in the order of the archives, with the number in their `.cls`."""
    images: dict[str, Member] = {}
    for member in members:
        if images.setdefault(_sample(member), member) is not member:
            passed["images beside the first one of their sample"] += 1
    missing = [member.name for key, member in images.items() if key not in digits]
    if missing:
        raise UserError(
            f"{source}: {len(missing)} images have no .cls beside them ({first_few(missing)}): "
            "complete the archives, or say --unlabelled"
        )
    if not images:
        raise UserError(f"{source} has no images beside its .cls files: name another file")
    values = []
    for key, member in images.items():
        try:
            values.append(int(digits[key]))
        except ValueError:
            raise UserError(
                f"{source}: the .cls of {member.name} is {digits[key]!r:.40}, not a number: "
                "correct it, or say --unlabelled"
            ) from None
    several = len(files) > 1
    names = [
        f"{epath.Path(files[member.file]).name}/{member.name}" if several else member.name
        for member in images.values()
    ]
    labels = labelling.of_values(f"{source}: .cls", values, names)
    labels = labels._replace(messages=(*labels.messages, *_said(passed)))
    return _index("range", files, [*images.values()], names, labels)


# --- Tars


@dataclasses.dataclass
class _Scan:
    """The content of a tar.

    Attributes:
      number: of the file.
      prefix: of the names in it.
      members: images by name.
      texts: content of `.cls` files by sample.
      inner: tars in it: (prefix, offset, size) of each.
      links: names by the names of links to them.
      samples: how many files each sample has.
      passed: what was passed over.
    """

    number: int
    prefix: str = ""
    members: dict[str, Member] = dataclasses.field(default_factory=dict)
    texts: dict[str, str] = dataclasses.field(default_factory=dict)
    inner: list[tuple[str, int, int]] = dataclasses.field(default_factory=list)
    links: dict[str, str] = dataclasses.field(default_factory=dict)
    samples: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    passed: Passed = dataclasses.field(default_factory=Passed)

    @property
    def companions(self) -> bool:
        """Whether images have other files of their sample beside them."""
        return any(self.samples[_sample(member)] > 1 for member in self.members.values())

    def add(self, entry: tarfile.TarInfo, read: Callable[[int], bytes]) -> None:
        """Add an entry, whose first bytes `read` returns."""
        name = _slashed(entry.name.removeprefix("./"))
        suffix, place = _suffix(name), (self.number, entry.offset_data, entry.size)
        # The header's own sum covers size and time.
        stamp = f"{entry.size} {entry.mtime} {entry.chksum}"
        member = Member(self.prefix + name, *place, stamp)
        if entry.isdir() or _concealed(name):
            return
        if entry.issym() or entry.islnk():
            target = _slashed(entry.linkname.removeprefix("./"))
            if entry.issym():
                target = posixpath.join(posixpath.dirname(name), target)
            self.links[member.name] = self.prefix + posixpath.normpath(target)
        elif not entry.isfile() or entry.issparse():
            self.passed[_PIPE if not entry.isfile() else "sparse files"] += 1
        elif suffix == ".tar" and not self.prefix:
            folder = name.rpartition("/")[2].removesuffix(".tar")
            self.inner.append((f"{folder}/", entry.offset_data, entry.size))
        elif is_image(name, lambda: read(HEAD)):
            self.samples[_sample(member)] += 1
            self.members[member.name] = member
        else:
            self.samples[_sample(member)] += 1
            if suffix == ".cls":
                text = read(40).decode(errors="replace")
                self.texts[_sample(member)] = text.strip()
            else:
                self.passed[suffix] += 1

    def follow_links(self) -> None:
        """Make images of the links to images."""
        for name, target in self.links.items():
            seen = {name}
            while target in self.links and target not in seen:  # a link to a link
                seen.add(target)
                target = self.links[target]
            if target in self.members:
                self.members[name] = self.members[target]._replace(name=name)
            elif is_image(name, bytes):
                self.passed[_LINK] += 1


def _scan(path: epath.Path, number: int) -> _Scan:
    """Scan a tar, and those in it."""
    try:
        with path.open("rb") as file:
            if file.read(2) == b"\x1f\x8b":
                raise UserError(
                    f"{path} is compressed, and images in it cannot be found without unpacking: "
                    f"gunzip it first (CIFAR-10's archives are read as they are)"
                )
        scan = _scan_tar(path, _Scan(number), 0, files.size(path))

        def scan_inner(one: tuple[str, int, int]) -> _Scan:
            prefix, offset, size = one
            return _scan_tar(path, _Scan(number, prefix), offset, size)

        # ImageNet's has a thousand, of 138 MB: in a bucket, one after the other would take long.
        with concurrent.futures.ThreadPoolExecutor(_CONCURRENT_TARS) as threads:
            for part in threads.map(scan_inner, scan.inner):
                scan.members |= part.members
                scan.texts |= part.texts
                scan.passed += part.passed
                scan.samples += part.samples
    except UserError:
        raise
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        raise UserError(
            f"{path} is not a whole tar file ({one_line(error, 120)}): fetch it again"
        ) from error
    return scan


def _scan_tar(path: epath.Path, scan: _Scan, offset: int, size: int) -> _Scan:
    """Fill a scan from the tar at `offset` of a file."""
    with path.open("rb") as file:
        file.seek(offset)
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for entry in archive:
                archive.members = []  # it keeps all that it has seen
                if entry.isfile() and entry.offset_data + entry.size > offset + size:
                    raise tarfile.ReadError("unexpected end of data")
                scan.add(entry, functools.partial(_read_within, file, entry))
            _check_end(file, archive.offset, offset + size)
    scan.follow_links()
    return scan


def _read_at(file: IO[bytes], offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)


def _read_within(file: IO[bytes], entry: tarfile.TarInfo, size: int) -> bytes:
    return _read_at(file, entry.offset_data, min(size, entry.size))


def _check_end(file: IO[bytes], end: int, limit: int) -> None:
    """Raise `tarfile.ReadError` unless a tar ends at `end` as it should.

    Tarfile ends without a word at a header that is none.
    """
    block = _read_at(file, end, _BLOCK)
    if len(block) < _BLOCK or end + _BLOCK > limit:
        raise tarfile.ReadError("its end is missing")
    if any(block):
        raise tarfile.ReadError(f"the header at byte {end} is damaged")
    behind = _read_at(file, end, max(0, min(_BEHIND, limit - end)))
    if any(behind):
        raise tarfile.ReadError(f"there is more behind its end at byte {end}: are these several?")


def _sample(member: Member) -> str:
    """Return the common name of a WebDataset sample: up to the first dot of its last part."""
    folder, slash, name = member.name.rpartition("/")
    return f"{member.file}:{folder}{slash}{name.partition('.')[0]}"


# --- Files


def _walk(
    folder: epath.Path, prefix: str, passed: Passed, above: tuple[tuple[int, int], ...]
) -> Iterator[tuple[str, str]]:
    """Yield names of the image files below a folder, and what is known of each's content.

    Args:
      folder: to walk.
      prefix: of names in it.
      passed: where to count what is no image.
      above: the folders that it lies in, by device and inode.
    """
    local = files.is_local(folder)
    try:
        here = os.stat(folder) if local else None
        identity = (here.st_dev, here.st_ino) if here else (0, 0)
        if len(above) > _DEEP or (here and identity in above):
            raise UserError(
                f"{folder} is a folder within itself, or more than {_DEEP} folders deep: delete "
                "the link that leads back up"
            )
        found = list(locations.listed(folder))
    except OSError as error:
        raise UserError(f"{folder} cannot be read ({error.strerror or error})") from error
    for entry in found:
        if _hidden(entry.name):
            continue
        if entry.kind == "folder":
            below = folder / entry.name
            yield from _walk(below, f"{prefix}{entry.name}/", passed, (*above, identity))
        elif entry.kind != "file":  # never opened: a pipe would be waited for
            passed[_LINK if entry.kind == "lost link" else _PIPE] += 1
        elif is_image(entry.name, lambda entry=entry: _head(folder / entry.name)):
            yield prefix + entry.name, entry.stamp()
        elif entry.name != DATASET_JSON:
            passed[_suffix(entry.name)] += 1


def _head(path: epath.Path) -> bytes:
    with path.open("rb") as file:
        return file.read(HEAD)


def _head_of(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    try:
        with archive.open(entry) as file:
            return file.read(HEAD)
    except RuntimeError:  # encrypted, or (NotImplementedError) of a method that is not known
        return b""


def _concealed(name: str) -> bool:
    """Whether a file in an archive is hidden, or lies in a hidden folder of a Mac."""
    return _hidden(name.rpartition("/")[2]) or "__MACOSX" in name.split("/")


def _hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _slashed(name: str) -> str:
    """Return a name with `/` where it has the separators of Windows alone."""
    return name if "/" in name else name.replace("\\", "/")


def _suffix(name: str) -> str:
    last = name.rpartition("/")[2].lower()
    stem, suffix = os.path.splitext(last)
    return (os.path.splitext(stem)[1] if suffix == ".gz" else "") + suffix or "without a suffix"


def _counted(passed: Mapping[str, int]) -> str:
    ordered = sorted(passed.items(), key=lambda item: (-item[1], item[0]))
    return first_few([f"{count} {what}" for what, count in ordered], 8)


def _said(passed: Mapping[str, int]) -> tuple[str, ...]:
    return (f"passed over, as no images: {_counted(passed)}",) if passed else ()
