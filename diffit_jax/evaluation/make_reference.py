"""The verb `make_reference`: from the pictures of a data set to what samples are compared with."""

import json
import tempfile
import zipfile
from collections.abc import Mapping
from typing import IO

import numpy as np
from etils import epath

from diffit_jax.errors import UserError
from diffit_jax.evaluation.features import BATCH_PER_DEVICE, Extractor
from diffit_jax.evaluation.measuring import measure, protocol_of
from diffit_jax.evaluation.pictures import NpzPictures, Pictures
from diffit_jax.evaluation.reference import COVARIANCES
from diffit_jax.runtime import backend, distributed, files, npz, parallel

PICTURES = 10_000  # in a reference, for precision and recall, as in ADM's


@backend.pinned()
@backend.memory_for("lower --batch_per_device")
def make_reference(
    pictures: Pictures,
    *,
    output: epath.PathLike,
    inception: epath.PathLike,
    resize: str = "tf1",
    overwrite: bool = False,
    kept: int = PICTURES,
    batch_per_device: int = BATCH_PER_DEVICE,
) -> epath.Path:
    """Measures a data set and writes an npz file like ADM's: `mu`, `sigma`, `mu_s` and `sigma_s` of
    all pictures, float64; `arr_0`, some of them at equal distances, uint8; `protocol`, a JSON text.

    Args:
      pictures: of the data set, all of them.
      output: path of the npz.
      inception, resize, batch_per_device: as of `evaluate`.
      overwrite: whether a file that is there may be replaced.
      kept: how many pictures `arr_0` has, at most.

    Raises:
      UserError: one picture only, a reference in place of pictures, weights that cannot be read, or
        an output that cannot be written.
    """
    output = files.resolve(output, "output")
    if output.suffix != ".npz" or output.is_dir():
        raise UserError(f"--output {output} must be a file that ends in .npz: change it")
    if isinstance(pictures, NpzPictures) and pictures.has("mu"):
        raise UserError(
            f"{pictures.facts['samples']} is a reference already: its {pictures.count} pictures "
            "are for precision and recall, its mu and sigma are of the whole data set"
        )
    if pictures.count < 2:
        raise UserError("one picture has no covariance: name a data set")

    def check_place() -> None:
        files.refuse_existing(output, "output", overwrite)
        files.make_directory(output.parent, "output")

    distributed.on_primary(check_place)
    extractor = Extractor.load(inception, parallel.any_mesh(), resize, batch_per_device)

    # --- Measure all pictures, and put some aside, since they come by once.
    chosen = np.unique(np.linspace(0, pictures.count - 1, kept).astype(np.int64))
    with tempfile.TemporaryFile() as aside:

        def put_aside(start: int, part: np.ndarray) -> None:
            inside = chosen[(chosen >= start) & (chosen < start + len(part))] - start
            aside.write(np.ascontiguousarray(part[inside]).tobytes())

        measured = measure(pictures, extractor, "reference", seen=put_aside)
        facts = protocol_of(pictures, extractor, measured.count)
        facts |= {"samples_digest": measured.digest.hex()}
        arrays = {"protocol": np.array(json.dumps(facts))}
        for name, moments in (("mu", measured.pool), ("mu_s", measured.spatial)):
            arrays[name], arrays[COVARIANCES[name]] = moments.statistics()
        shape = (len(chosen), *pictures.shape)
        distributed.on_primary(lambda: _write(output, arrays, aside, shape))
    return output


def _write(
    output: epath.Path, arrays: Mapping[str, np.ndarray], pictures: IO[bytes], shape: tuple
) -> None:
    """The npz: `arr_0` from a file of uint8 pictures, and arrays by name."""
    pictures.seek(0)
    with files.writing(output) as file, zipfile.ZipFile(file, "w") as archive:
        parts = iter(lambda: pictures.read(2**24), b"")
        npz.write_rows(archive, "arr_0", np.dtype(np.uint8), shape, parts)
        for name, array in arrays.items():
            npz.write(archive, name, array)
