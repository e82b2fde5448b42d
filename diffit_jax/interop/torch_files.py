"""State dicts that PyTorch saved (`.pth`), read without PyTorch and without running a pickle.

There are two formats: a zip archive (`data.pkl` and `data/N`), and the stream of before PyTorch 1.6
(magic number, protocol, system, pickle, keys, then the storages one after the other). The unpickler
knows ordered dicts, tensors and storages, as inert values; whatever else a file names is refused.
"""

import collections
import dataclasses
import io
import math
import pickle
import sys
import zipfile
from collections.abc import Mapping
from typing import Any, BinaryIO, NoReturn

import ml_dtypes
import numpy as np
from etils import epath

from diffit_jax.errors import UserError, one_line

_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
# Name of a storage's type → (numpy's dtype, as safetensors names it).
_STORAGES = {
    "FloatStorage": (np.dtype(np.float32), "F32"),
    "HalfStorage": (np.dtype(np.float16), "F16"),
    "BFloat16Storage": (np.dtype(ml_dtypes.bfloat16), "BF16"),
    "DoubleStorage": (np.dtype(np.float64), "F64"),
    "LongStorage": (np.dtype(np.int64), "I64"),
    "IntStorage": (np.dtype(np.int32), "I32"),
    "ShortStorage": (np.dtype(np.int16), "I16"),
    "CharStorage": (np.dtype(np.int8), "I8"),
    "ByteStorage": (np.dtype(np.uint8), "U8"),
    "BoolStorage": (np.dtype(np.bool_), "BOOL"),
}


# What a damaged file raises, whatever its opcodes run into.
DAMAGED = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    KeyError,
    EOFError,
    ValueError,
    IndexError,
    RuntimeError,  # encrypted, or packed in a way that zipfile does not know
    AttributeError,
    TypeError,
    OverflowError,
    MemoryError,
    RecursionError,
)


@dataclasses.dataclass(frozen=True)
class _StorageType:
    name: str


@dataclasses.dataclass(frozen=True)
class _Storage:
    type: str
    key: str
    count: int


@dataclasses.dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> _Tensor:
    """Make a tensor as `torch._utils._rebuild_tensor_v2` would; refuse one beyond its storage."""
    if not isinstance(storage, _Storage):
        raise pickle.UnpicklingError("a tensor without a storage")
    return _Tensor(storage, *_within(storage.count, offset, shape, strides))


def _within(
    count: int, offset: Any, shape: Any, strides: Any
) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """Return a tensor's place in a storage of `count` numbers; refuse one that is none."""
    shape, strides = tuple(shape), tuple(strides)
    numbers = (offset, *shape, *strides)
    if len(shape) != len(strides) or not all(type(n) is int and n >= 0 for n in numbers):
        raise pickle.UnpicklingError("a tensor of an impossible shape")
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if math.prod(shape) and last >= count:
        raise pickle.UnpicklingError("a tensor that reaches beyond its storage")
    return offset, shape, strides


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _tensor
        if module == "torch" and name in _STORAGES:
            return _StorageType(name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is never run")

    def persistent_load(self, pid: Any) -> Any:
        match pid:
            case ("storage", _StorageType(name), str(key), _, int(count), *_):
                return _Storage(name, key, count)
        raise pickle.UnpicklingError("it refers to something that is no storage")


class TorchFile:
    """The tensors of a state dict, as a context manager; read when they are asked for.

    Attributes:
      shapes, dtypes: of each tensor by its name; dtypes as safetensors names them ("F32").
      hint: as in `WeightFiles`; always "".
    """

    hint = ""

    def __init__(self, path: epath.PathLike):
        """Open a file and read its names.

        Raises:
          UserError: it cannot be read, or holds something else than tensors by name.
        """
        self._path = epath.Path(path)
        try:
            self._file: BinaryIO = self._path.open("rb")
        except OSError as error:
            raise UserError(
                f"weights {path} cannot be read ({error.strerror or error}): name a .pth or a "
                "safetensors file"
            ) from error
        self._archive: zipfile.ZipFile | None = None
        self._places: dict[str, int] = {}
        try:
            self._tensors = _tensors_in(self._read())
        except (*DAMAGED, OSError) as error:
            self.__exit__()
            self._refuse(error)
        self.shapes = {name: tensor.shape for name, tensor in self._tensors.items()}
        self.dtypes = {
            name: _STORAGES[tensor.storage.type][1] for name, tensor in self._tensors.items()
        }

    def _read(self) -> Any:
        if zipfile.is_zipfile(self._file):
            self._archive = zipfile.ZipFile(self._file)
            (name,) = [name for name in self._archive.namelist() if name.endswith("/data.pkl")]
            self._folder = name.removesuffix("data.pkl")
            order = f"{self._folder}byteorder"
            if order in self._archive.namelist() and self._archive.read(order) != b"little":
                raise ValueError("its numbers are big-endian")
            return _Unpickler(io.BytesIO(self._archive.read(name))).load()
        self._file.seek(0)
        if _Unpickler(self._file).load() != _MAGIC or _Unpickler(self._file).load() != _PROTOCOL:
            raise ValueError("it does not begin like one")
        _Unpickler(self._file).load()  # the system on which it was written
        content = _Unpickler(self._file).load()
        counts = {tensor.storage.key: tensor.storage for tensor in _tensors_in(content).values()}
        for key in _Unpickler(self._file).load():
            count = int.from_bytes(self._file.read(8), "little")
            self._places[key] = self._file.tell()
            if key in counts:
                self._file.seek(count * _STORAGES[counts[key].type][0].itemsize, io.SEEK_CUR)
            else:
                raise ValueError(f"storage {key} belongs to no tensor")
        return content

    def _refuse(self, error: Exception) -> NoReturn:
        text = one_line(error, 100)
        raise UserError(
            f"weights {self._path} are no state dict of PyTorch that can be read ({text}): fetch "
            "them again, or convert them to safetensors"
        ) from error

    def __enter__(self) -> "TorchFile":
        return self

    def __exit__(self, *_) -> None:
        if self._archive is not None:
            self._archive.close()
        self._file.close()

    def tensor(self, name: str) -> np.ndarray:
        """Read one tensor.

        Raises:
          UserError: the file is truncated or damaged.
        """
        tensor = self._tensors[name]
        dtype, _ = _STORAGES[tensor.storage.type]
        size = tensor.storage.count * dtype.itemsize
        try:
            if self._archive is not None:
                content = self._archive.read(f"{self._folder}data/{tensor.storage.key}")
            else:
                self._file.seek(self._places[tensor.storage.key])
                content = self._file.read(size)
            if len(content) != size:
                raise ValueError(f"{name} has {len(content)} of {size} bytes")
        except (*DAMAGED, OSError) as error:
            self._refuse(error)
        flat = np.frombuffer(content, dtype.newbyteorder("<") if dtype.kind != "V" else dtype)
        strides = [stride * dtype.itemsize for stride in tensor.strides]
        return np.lib.stride_tricks.as_strided(flat[tensor.offset :], tensor.shape, strides)


def view(flat: np.ndarray, offset: Any, shape: Any, strides: Any) -> np.ndarray:
    """Return the tensor at a place in the numbers of a storage; strides count numbers."""
    offset, shape, strides = _within(len(flat), offset, shape, strides)
    steps = [stride * flat.itemsize for stride in strides]
    return np.lib.stride_tricks.as_strided(flat[offset:], shape, steps)


def read_storage(file: BinaryIO) -> np.ndarray:
    """Read the stream of one storage, as PyTorch wrote it before 1.6, as a flat array."""
    if _Unpickler(file).load() != _MAGIC or _Unpickler(file).load() != _PROTOCOL:
        raise ValueError("a storage that does not begin like one")
    _Unpickler(file).load()  # the system on which it was written
    storage, keys = _Unpickler(file).load(), _Unpickler(file).load()
    if not isinstance(storage, _Storage) or list(keys) != [storage.key]:
        raise ValueError("a stream that is no storage")
    dtype = _STORAGES[storage.type][0]
    count = int.from_bytes(file.read(8), "little")
    content = file.read(count * dtype.itemsize)
    if count != storage.count or len(content) != count * dtype.itemsize:
        raise ValueError(f"a storage has {len(content)} of {count * dtype.itemsize} bytes")
    return np.frombuffer(content, dtype)


def name_of(dtype: np.dtype) -> str:
    """Return the name that safetensors has for a dtype."""
    return next(name for known, name in _STORAGES.values() if known == dtype)


def _tensors_in(content: Any) -> dict[str, _Tensor]:
    """Return a file's tensors by name, from a dict of them, or a dict with one such dict."""
    if isinstance(content, Mapping):
        found = {str(name): one for name, one in content.items() if isinstance(one, _Tensor)}
        if found:
            return found
        inner = [one for one in content.values() if isinstance(one, Mapping)]
        if len(inner) == 1:
            return _tensors_in(inner[0])
    raise ValueError("it holds no tensors by name")


assert sys.byteorder == "little", "files are read as they lie"
