"""Files of samples: written part by part, so that a long request can be interrupted, and put together at the end.

The npz is that of ADM's evaluator: `arr_0` (N, H, W, C) samples, `arr_1` (N,) int64 labels.
"""

import contextlib
import io
import json
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath

from diffit_jax import files, lock
from diffit_jax.errors import UserError

_REQUEST = "request.json"


class SampleParts:
    """The parts of one request, npy files in a directory `<output>.parts` beside the output. Each is there whole or not at all.

    Used as a context manager: one process at a time owns the directory.
    """

    def __init__(self, output: epath.Path, request: Mapping[str, Any]):
        """Names the parts of a request.

        Args:
          output: the npz that the parts are for.
          request: JSON values of all that the samples depend on.
        """
        self._output, self._request = output, json.loads(json.dumps(request))
        self._directory = output.parent / f"{output.name}.parts"

    def __enter__(self) -> "SampleParts":
        """Opens the directory, which may hold parts of an interrupted run.

        Raises:
          UserError: the parts there belong to another request, a living process draws them, or the place cannot be written.
        """
        files.make_directory(self._directory, "output directory")
        with contextlib.ExitStack() as stack:
            stack.enter_context(lock.owned(self._directory, "the sampling request in"))
            self._check_request()
            self._release = stack.pop_all().close
        return self

    def __exit__(self, *_) -> None:
        self._release()

    def _check_request(self) -> None:
        path, ours = self._directory / _REQUEST, self._request
        if path.exists():
            try:
                theirs = dict(json.loads(path.read_text()))
            except ValueError as error:
                raise UserError(f"{path} is damaged ({error}): delete {self._directory}") from error
            changed = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
            if changed:
                name = changed[0]
                raise UserError(
                    f"{self._directory} holds samples of an interrupted request with another {name} ({_short(theirs.get(name))}, now "
                    f"{_short(ours.get(name))}): repeat that request, delete the directory, or choose another --output"
                )
        else:
            files.write_bytes(path, json.dumps(ours, indent=2).encode())

    def done(self, index: int) -> bool:
        """Whether part `index` is there."""
        return self._path(index).exists()

    def write(self, index: int, samples: np.ndarray) -> None:
        """Writes part `index`, (n, H, W, C)."""
        with files.writing(self._path(index)) as file:
            np.save(file, samples, allow_pickle=False)

    def read(self, index: int) -> np.ndarray:
        """Part `index`, as it was written."""
        return np.load(io.BytesIO(self._path(index).read_bytes()), allow_pickle=False)

    def finish(self, count: int, labels: np.ndarray) -> None:
        """Puts the first `count` parts together in the npz, one at a time, and removes them."""
        first = self.read(0)
        header = {"descr": np.lib.format.dtype_to_descr(first.dtype), "fortran_order": False, "shape": (len(labels), *first.shape[1:])}
        with files.writing(self._output) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array_header_1_0(entry, header)
                for part in self._parts(count):
                    entry.write(part.tobytes())
            with archive.open("arr_1.npy", "w") as entry:
                np.lib.format.write_array(entry, np.asarray(labels, np.int64), allow_pickle=False)
        self._directory.rmtree()

    def _parts(self, count: int) -> Iterator[np.ndarray]:
        return (self.read(index) for index in range(count))

    def _path(self, index: int) -> epath.Path:
        return self._directory / f"{index:06d}.npy"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "…"
