"""Files of the Hugging Face hub, `hf://[datasets/]owner/name[@revision]/path`.

They are fetched into the hub's own cache, and compared with the hub's checksums.
"""

import fnmatch
import glob
import hashlib
import json
import logging
import os
import re
import urllib.parse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from etils import epath

from diffit_jax.errors import UserError, one_line
from diffit_jax.runtime import files

log = logging.getLogger(__name__)

SCHEME = "hf://"
# Files and folders that pages name, by the last part of their path.
_PUBLISHED = {
    "sd-vae-ft-ema": "hf://stabilityai/sd-vae-ft-ema",
    "sd-vae-ft-mse": "hf://stabilityai/sd-vae-ft-mse",
    "diffit_256.safetensors": "hf://nvidia/DiffiT/diffit_256.safetensors",
    "diffit_512.safetensors": "hf://nvidia/DiffiT/diffit_512.safetensors",
}


class Address(NamedTuple):
    """A place on the hub.

    Attributes:
      kind: "model" or "dataset".
      repository: `owner/name`.
      revision: branch, tag or commit; None: the main branch.
      path: in the repository; "" is all of it. It may have `*`, `?` and `[…]`.
    """

    kind: str
    repository: str
    revision: str | None
    path: str


def is_address(path: Any) -> bool:
    """Whether a path is an address on the hub."""
    return isinstance(path, str | os.PathLike) and os.fspath(path).lower().startswith(SCHEME)


def elsewhere(path: epath.PathLike) -> str:
    """Return the remedy for a file that is missing and that the hub has; "" if none is known."""
    address = _PUBLISHED.get(os.path.basename(os.fspath(path)))
    return f"name {address}, from where it is fetched" if address else ""


def parse(text: str, flag: str) -> Address:
    """Parse an address, in the grammar of huggingface_hub's file system.

    Raises:
      UserError: it has another form.
    """
    rest = text[len(SCHEME) :]
    kind = "model"
    if match := re.match(r"(datasets|models|spaces)/", rest):
        kind, rest = match[1][:-1], rest[match.end() :]
    match = re.fullmatch(
        r"([^/@]+/[^/@]+)(?:@(refs/(?:convert/[^/]+|pr/\d+)|[^/]+))?(?:/(.*))?", rest.rstrip("/")
    )
    if not match or kind == "space":
        raise UserError(
            f"{flag} {text} is no address of a model or data set: write "
            "hf://owner/name/path or hf://datasets/owner/name/path"
        )
    revision = urllib.parse.unquote(match[2]) if match[2] else None
    return Address(kind, match[1], revision, match[3] or "")


def local(path: epath.PathLike, flag: str, wanted: Sequence[str] = ("*",)) -> epath.Path:
    """Return a path that can be opened: `hf://…` is fetched, others are as of `files.resolve`.

    Args:
      path: as it is written.
      flag: that named it, for errors.
      wanted: patterns of the files of a folder that are fetched, where the address is one.

    Raises:
      UserError: as `files.resolve`; there is no such file, no network, no permission, or the file
        that came is damaged.
    """
    if not is_address(path):
        return files.resolve(path, flag)
    return epath.Path(_fetch(os.fspath(path), flag, wanted))


def pattern_hint(folder: epath.PathLike) -> str:
    """Return what is to be said of a folder that is not there, where it has a pattern; or ""."""
    marked = any(mark in os.fspath(folder) for mark in "*?")
    return " (only the last part of a path may be a pattern)" if marked else ""


def output_directory(path: epath.PathLike, found: epath.Path) -> epath.Path:
    """Return where results of an input go by default: next to it, but not in the hub's cache.

    Args:
      path: as a person named it.
      found: the result of `local`.
    """
    return epath.Path(Path.cwd()) if is_address(path) else found.parent


def _fetch(text: str, flag: str, wanted: Sequence[str]) -> str:
    address = parse(text, flag)
    try:
        import huggingface_hub
    except ImportError as error:
        raise UserError(
            f"{flag} {text} cannot be fetched without the library huggingface_hub: pip install "
            "huggingface_hub"
        ) from error
    endpoint = os.environ.get("HF_ENDPOINT", "")
    if endpoint and not re.match(r"https?://[^/]", endpoint):
        raise UserError(
            f"the variable HF_ENDPOINT is {endpoint!r}, which is no address: write https://HOST"
        )
    # A file, or those of a folder that the caller needs.
    common = {
        "repo_id": address.repository,
        "repo_type": address.kind,
        "revision": address.revision,
    }
    huggingface_hub.logging.set_verbosity_error()  # it reports every attempt
    try:
        names = [address.path]
        if not _is_file(address.path):
            names = _listed(huggingface_hub, address, common, wanted)
        root = _snapshot(huggingface_hub, common, names)
        for name in names:
            if not (root / name).exists():
                raise FileNotFoundError(name)
            _check(root / name, f"{text.partition('@')[0]}: {name}" if len(names) > 1 else text)
    except UserError:
        raise
    except Exception as error:  # its client of HTTP has errors of its own, renamed twice
        told = _told(error, address, huggingface_hub)
        if told is None:
            raise
        raise UserError(f"{flag} {text}{told}") from error
    return str(root / address.path) if address.path else str(root)


def _snapshot(library: Any, common: Mapping[str, Any], names: Sequence[str]) -> Path:
    """Fetch files of a commit and return its folder in the cache.

    Without a network, the files that are there already.
    """
    patterns = [glob.escape(name) for name in names]
    try:
        return Path(library.snapshot_download(**common, allow_patterns=patterns))
    except Exception:
        try:
            root = _held(library, common, patterns)
        except Exception:  # nothing is there: the first error says more
            root = None
        if root is None or not all((root / name).exists() for name in names):
            raise
        return root


def _held(library: Any, common: Mapping[str, Any], patterns: Sequence[str]) -> Path:
    """Return a commit's folder if all files that match the patterns are in the cache."""
    local = {"local_files_only": True, "allow_patterns": list(patterns)}
    return Path(library.snapshot_download(**common, **local))


def _told(error: Exception, address: Address, library: Any) -> str | None:
    """Explain an error of the library, in words that follow the address.

    None: nothing that a person can mend.
    """
    from huggingface_hub import errors

    page = f"{library.constants.ENDPOINT}/{'datasets/' * (address.kind == 'dataset')}"
    page += address.repository
    repository, login = address.repository, "log in by `hf auth login` or set HF_TOKEN"
    no_network = (
        " cannot be fetched: the hub cannot be reached from here, and the file is not in its "
        "cache; look at the network, or fetch it elsewhere (`hf download`) and name the file"
    )
    # From the particular error to the general: its classes derive from each other.
    meanings: tuple[tuple[Any, str], ...] = (
        (
            errors.GatedRepoError,
            f" is for those who have accepted its terms: accept them on {page}, then {login}",
        ),
        (
            errors.RepositoryNotFoundError,
            f": there is no such {address.kind} {repository}, or it is private: correct the name, "
            f"or {login}",
        ),
        (
            errors.RevisionNotFoundError,
            f": {repository} has no revision {address.revision}: correct it",
        ),
        ((errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled), no_network),
        (
            (errors.RemoteEntryNotFoundError, FileNotFoundError),
            f": {repository} has no file {address.path}: see {page}",
        ),
    )
    told = next((text for kinds, text in meanings if isinstance(error, kinds)), None)
    if told is None and _is_connection(error):
        return no_network
    if told is None and isinstance(error, OSError):
        remedy = files.remedy_for_writing(error) or "try again later"
        return f" cannot be fetched ({one_line(error, 120)}): {remedy}"
    if told is None and type(error).__module__.partition(".")[0] in _NETWORK_LIBRARIES:
        return (
            f" cannot be fetched ({type(error).__name__}: {one_line(error, 120)}): try again later"
        )
    return told


_NETWORK_LIBRARIES = ("huggingface_hub", "requests", "urllib3", "httpx", "httpx2", "httpcore")


def _is_file(path: str) -> bool:
    """Whether a path names one file: it has a suffix, and no pattern."""
    return bool(re.search(r"\.\w+$", path)) and not _is_pattern(path)


def _is_pattern(path: str) -> bool:
    return bool(re.search(r"[*?\[]", path))


def _listed(
    library: Any, address: Address, common: dict[str, Any], wanted: Sequence[str]
) -> list[str]:
    """List the files that a pattern or a folder names."""
    try:
        names = sorted(library.HfApi().list_repo_files(**common))
    except Exception as error:
        if not _is_connection(error) and type(error).__name__ != "OfflineModeIsEnabled":
            raise
        prefix = f"{address.path}/" if address.path else ""
        folder = [f"{glob.escape(prefix)}{pattern}" for pattern in wanted]
        root = _held(library, common, folder if not _is_pattern(address.path) else [address.path])
        names = sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
    if address.path in names:
        return [address.path]
    if _is_pattern(address.path):
        found = [name for name in names if _matches(name, address.path)]
    else:
        prefix = f"{address.path}/" if address.path else ""
        found = [
            name
            for name in names
            if name.startswith(prefix)
            and any(fnmatch.fnmatchcase(name.rpartition("/")[2], pattern) for pattern in wanted)
        ]
    if not found:
        raise FileNotFoundError(address.path)
    return found


def _matches(name: str, pattern: str) -> bool:
    """Whether a name fits a pattern, part by part: `*` does not stand for `/`."""
    parts, patterns = name.split("/"), pattern.split("/")
    return len(parts) == len(patterns) and all(map(fnmatch.fnmatchcase, parts, patterns))


def _check(place: Path, what: str) -> None:
    """Compare a file with the hub's SHA-256 of it, once.

    Files of the hub's large storage are named by it in the cache.

    Raises:
      UserError: it differs; the file is deleted, so that it is fetched anew.
    """
    blob = Path(os.path.realpath(place))
    if not re.fullmatch(r"[0-9a-f]{64}", blob.name):
        return
    stat = blob.stat()
    seen = {"size": stat.st_size, "mtime": stat.st_mtime_ns}
    home = files.home()
    note = home / ".cache/diffit_jax/checked" / blob.name if home else None
    if note and files.read_json(note) == seen:
        return
    with blob.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != blob.name:
        blob.unlink()
        place.unlink(missing_ok=True)
        raise UserError(
            f"{what} came damaged: its SHA-256 is {digest[:16]}…, the hub says "
            f"{blob.name[:16]}…; it is deleted: run the same command again"
        )
    if note:
        try:
            note.parent.mkdir(parents=True, exist_ok=True)
            files.write_bytes(note, json.dumps(seen).encode())
        except (OSError, UserError):  # then it is computed again next time
            log.debug("%s cannot be written", note)


def _is_connection(error: BaseException) -> bool:
    """Whether an error, or what it came from, is one of the network."""
    return any(
        isinstance(each, ConnectionError | TimeoutError)
        or re.search(r"Connect|Timeout|NetworkError|ProtocolError", type(each).__name__)
        for each in files.causes_of(error)
    )
