"""EDM's snapshots (`.pkl`), read without running what they name.

Such a file is a pickle of a dict, whose `ema` is a network, and its source, which ordinary
unpickling would run. Each object of a persistent class is one call of a function on a dict with its
attributes; each tensor is a stream as PyTorch wrote before 1.6. The unpickler makes inert values of
both, and refuses any other name.
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
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _NAMES:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is never run")
        return _NAMES[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to something outside of itself")


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
                content = _Unpickler(file).load()
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
