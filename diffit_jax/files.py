"""Files that appear whole or not at all, on local disks and `gs://` alike."""

from etils import epath

from diffit_jax.errors import UserError


def write_bytes(path: epath.PathLike, content: bytes) -> None:
    """Writes a file under a temporary name first and renames it when it is complete.

    Raises:
      UserError: the place cannot be written.
    """
    path = epath.Path(path)
    temporary = path.parent / f".{path.name}.partial"
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror or error}): choose another place") from error


def make_directory(path: epath.PathLike, flag: str) -> epath.Path:
    """Creates a directory, if need be, and makes sure that files can be written there.

    Args:
      path: the directory.
      flag: the flag or config key that named it, for the error message.

    Raises:
      UserError: it cannot be created or written.
    """
    path = epath.Path(path)
    probe = path / ".writable"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise UserError(f"{flag} {path} cannot be written ({error.strerror or error}): choose another directory") from error
    return path
