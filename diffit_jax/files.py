"""Files that appear whole or not at all, on local disks and `gs://` alike."""

import contextlib
from collections.abc import Iterator
from typing import BinaryIO

from etils import epath

from diffit_jax.errors import UserError


@contextlib.contextmanager
def writing(path: epath.PathLike) -> Iterator[BinaryIO]:
    """A binary file to write to: it has a temporary name until the block ends, and goes away if the block fails.

    Raises:
      UserError: the place cannot be written.
    """
    path = epath.Path(path)
    temporary = path.parent / f".{path.name}.partial"
    try:
        with temporary.open("wb") as file:
            yield file
        temporary.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise UserError(f"{path} cannot be written ({error.strerror or error}): choose another place") from error
        raise


def write_bytes(path: epath.PathLike, content: bytes) -> None:
    """Writes a file whole or not at all, see `writing`."""
    with writing(path) as file:
        file.write(content)


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
    except ImportError as error:  # gs:// needs gcsfs, which also brings what writes TensorBoard events there
        raise UserError(f"{flag} {path} cannot be used ({error}): pip install gcsfs") from error
    return path
