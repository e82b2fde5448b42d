"""EDM's snapshots and EDM2's references (`.pkl`), read without running what they name.

Such a file is a pickle of a dict, whose `ema` is a network, and its source, which ordinary
unpickling would run. Each object of a persistent class is one call of a function on a dict with its
attributes; each tensor is a stream as PyTorch wrote before 1.6. The unpickler makes inert values of
both, and refuses any other name. A reference is a dict of numpy's arrays, made of numbers alone.
"""

import collections
import io
import pickle
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from diffit_jax.errors import UserError, one_line
from diffit_jax.interop import torch_files


class _Module:
    """An object with its attributes, in the place of a network's module.

    A `torch.nn.ModuleDict` is made empty, then gets its attributes.
    """

    def __init__(self, state: Any = None, kind: Any = ""):
        self.state, self.kind = (state if isinstance(state, dict) else {}), kind

    def __setstate__(self, state: Any) -> None:
        self.__init__(state)


def _persistent(meta: Any) -> _Module:
    if not isinstance(meta, Mapping) or meta.get("type") != "class":
        raise pickle.UnpicklingError("a persistent object of another kind")
    return _Module(meta.get("state"), meta.get("class_name"))


def _parameter(tensor: Any, *_: Any) -> Any:
    return tensor


def _number(dtype: Any, content: Any = b"") -> float:
    """Return a numpy scalar, whose value nothing here depends on."""
    return 0.0


class _Dtype:
    def __init__(self, *_: Any):
        pass

    def __setstate__(self, _: Any) -> None:
        pass


def _storage(content: Any) -> np.ndarray:
    """Read the stream of one storage, `torch.storage._load_from_bytes`."""
    if not isinstance(content, bytes):
        raise pickle.UnpicklingError("a storage that is no stream of bytes")
    return torch_files.read_storage(io.BytesIO(content))


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> np.ndarray:
    if not isinstance(storage, np.ndarray):
        raise pickle.UnpicklingError("a tensor without a storage")
    return torch_files.view(storage, offset, shape, strides)


_NAMES = {
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): _persistent,
    ("torch.nn.modules.container", "ModuleDict"): _Module,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch.storage", "_load_from_bytes"): _storage,
    ("numpy", "dtype"): _Dtype,
    ("numpy.core.multiarray", "scalar"): _number,
    ("numpy._core.multiarray", "scalar"): _number,
}


class _Unpickler(pickle.Unpickler):
    """Knows the names of a table, and makes of each what stands there."""

    def __init__(self, file: Any, names: Mapping[tuple[str, str], Any]):
        super().__init__(file)
        self._names = names

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._names:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is never run")
        return self._names[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to something outside of itself")


class _Array:
    """An array of numpy's in the making: its shape, dtype and bytes are set last."""

    def __init__(self, *_: Any):
        self.array = np.zeros(0)

    def __setstate__(self, state: Any) -> None:
        match state:
            case (int(), tuple(shape), _NumberType() as dtype, fortran, content):
                pass
            case _:
                raise pickle.UnpicklingError("an array in another form")
        if not isinstance(content, bytes):
            raise pickle.UnpicklingError("an array without bytes")
        order = "F" if fortran else "C"
        self.array = np.frombuffer(content, dtype.dtype).reshape(shape, order=order)


class _NumberType:
    """A dtype of plain numbers."""

    def __init__(self, name: Any = "", *_: Any):
        if name not in ("f8", "f4", "i8", "i4"):
            raise pickle.UnpicklingError(f"numbers of type {name!r}")
        self.dtype = np.dtype(name).newbyteorder("<")

    def __setstate__(self, state: Any) -> None:
        if state[1] not in ("<", "|", "="):
            raise pickle.UnpicklingError("numbers of another byte order")


def _of_buffer(content: Any, dtype: Any, shape: Any, order: Any) -> _Array:
    """Make an array as pickle's protocol 5 has it."""
    if not isinstance(dtype, _NumberType) or not isinstance(content, bytes | bytearray):
        raise pickle.UnpicklingError("an array in another form")
    made = _Array()
    made.array = np.frombuffer(content, dtype.dtype).reshape(shape, order=order)
    return made


def _scalar(dtype: Any, content: Any = b"") -> Any:
    if not (isinstance(dtype, _NumberType) and isinstance(content, bytes)):
        raise pickle.UnpicklingError("a number in another form")
    return np.frombuffer(content, dtype.dtype)[0].item()


def _latin(text: Any, encoding: Any = "latin1") -> bytes:
    """Return bytes that an older protocol wrote as text."""
    if not isinstance(text, str) or encoding != "latin1":
        raise pickle.UnpicklingError("bytes in another form")
    return text.encode("latin1")


_OF_STATISTICS = {
    ("numpy", "dtype"): _NumberType,
    ("numpy", "ndarray"): _Array,
    ("_codecs", "encode"): _latin,
    **{
        (f"{package}.{name}", function): made
        for package in ("numpy.core", "numpy._core")
        for name, function, made in (
            ("multiarray", "_reconstruct", _Array),
            ("multiarray", "scalar", _scalar),
            ("numeric", "_frombuffer", _of_buffer),
        )
    },
}


_SPACES = {"fid": ("mu", "sigma"), "fd_dinov2": ("mu_dinov2", "sigma_dinov2")}


def read_statistics(path: epath.Path) -> dict[str, np.ndarray]:
    """Read a reference of EDM2's, `dict(num_images, fid=dict(mu, sigma), fd_dinov2=…)`.

    Returns:
      `mu`, `sigma`, `mu_dinov2` and `sigma_dinov2`, those that it has, float64.

    Raises:
      UserError: it is damaged, names something that would have to be run, or is something else.
      OSError: it cannot be read.
    """
    found: dict[str, np.ndarray] = {}
    try:
        with path.open("rb") as file:
            content = _Unpickler(file, _OF_STATISTICS).load()
        for space, names in _SPACES.items():
            for name, key in zip(names, ("mu", "sigma"), strict=True):
                if space in content:
                    found[name] = np.asarray(content[space][key].array, np.float64)
        if not found:
            raise ValueError("it has neither fid nor fd_dinov2")
    except torch_files.DAMAGED as error:
        raise UserError(
            f"--reference {path} is no reference of EDM2's that can be read "
            f"({one_line(error, 100)}): fetch it again"
        ) from error
    return found


class EdmPickle:
    """The tensors of the averaged network in a snapshot, as a context manager.

    Attributes:
      shapes, dtypes: of each tensor by its name, without `model.`; dtypes as safetensors names them
        ("F32").
      hint: as in `WeightFiles`; always "".
      kind: name of the network's class, such as "EDMPrecond".
    """

    hint = ""

    def __init__(self, path: epath.PathLike):
        """Read a file.

        Raises:
          UserError: it cannot be read, names something that would have to be run, or holds no
            network.
        """
        path = epath.Path(path)
        try:
            with path.open("rb") as file:
                content = _Unpickler(file, _NAMES).load()
            network = content.get("ema") if isinstance(content, Mapping) else content
            if not isinstance(network, _Module):
                raise ValueError("it holds no network by the name ema")
            self._tensors, self.kind = dict(_tensors_of(network, "", 0)), str(network.kind)
            if not self._tensors:
                raise ValueError("its network has no tensors")
        except OSError as error:
            raise UserError(
                f"weights {path} cannot be read ({error.strerror or error}): name a .pkl of EDM, "
                "or a safetensors file"
            ) from error
        except torch_files.DAMAGED as error:
            raise UserError(
                f"weights {path} are no snapshot of EDM that can be read ({one_line(error, 100)}): "
                "fetch them again, or convert them to safetensors"
            ) from error
        if all(name.startswith("model.") for name in self._tensors):
            self._tensors = {
                name.removeprefix("model."): one for name, one in self._tensors.items()
            }
        self.shapes = {name: one.shape for name, one in self._tensors.items()}
        self.dtypes = {name: torch_files.name_of(one.dtype) for name, one in self._tensors.items()}

    def __enter__(self) -> "EdmPickle":
        return self

    def __exit__(self, *_) -> None:
        pass

    def tensor(self, name: str) -> np.ndarray:
        """Return one tensor."""
        return self._tensors[name]


def _tensors_of(module: _Module, prefix: str, depth: int):
    """Yield (name, tensor) as `state_dict()` orders them: parameters, buffers, then children."""
    if depth > 20:
        raise ValueError("its modules hold each other")
    for kind in ("_parameters", "_buffers"):
        for name, tensor in dict(module.state.get(kind) or {}).items():
            if isinstance(tensor, np.ndarray):
                yield f"{prefix}{name}", tensor
    for name, child in dict(module.state.get("_modules") or {}).items():
        if isinstance(child, _Module):
            yield from _tensors_of(child, f"{prefix}{name}.", depth + 1)
