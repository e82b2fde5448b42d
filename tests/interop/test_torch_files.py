"""State dicts in both of PyTorch's formats (made by torch 2.14), read without it."""

import shutil
import zipfile

import numpy as np
import pytest
from support.golden import GOLDEN

from diffit_jax.errors import UserError
from diffit_jax.interop.torch_files import TorchFile


@pytest.fixture(scope="module")
def state():
    with np.load(GOLDEN / "torch_state.npz") as arrays:
        return dict(arrays)


@pytest.mark.parametrize("name", ["torch_zip.pth", "torch_legacy.pth", "torch_nested.pth"])
def test_every_tensor_is_read(state, name):
    """A convolution, batch statistics with their counter, a transposed tensor, two that share a
    storage, narrow types and a scalar."""
    with TorchFile(GOLDEN / name) as file:
        assert file.shapes == {key: value.shape for key, value in state.items()}
        assert {file.dtypes[key] for key in ("half", "bf16", "bn.num_batches_tracked")} == {
            "F16",
            "BF16",
            "I64",
        }
        for key, value in state.items():
            np.testing.assert_array_equal(file.tensor(key).astype(np.float32), value)


def test_code_in_a_file_is_not_run(capfd):
    """It would say so, and end this process."""
    with pytest.raises(UserError, match=r"asks for posix.system, which is never run"):
        TorchFile(GOLDEN / "torch_code.pth")
    assert "this was run" not in capfd.readouterr().err


@pytest.mark.parametrize("name", ["torch_zip.pth", "torch_legacy.pth"])
def test_a_truncated_file(tmp_path, name, state):
    """Wherever it ends, reading all tensors is refused, in one line that names the file."""
    content = (GOLDEN / name).read_bytes()
    for length in range(0, len(content), 97):
        path = tmp_path / "cut.pth"
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match=r"cut\.pth") as caught, TorchFile(path) as file:
            for key in state:
                file.tensor(key)
        assert "\n" not in str(caught.value)


def test_a_tensor_that_reaches_beyond_its_storage(tmp_path):
    """The file says that one is larger than what there is of it."""
    path = tmp_path / "large.pth"
    with zipfile.ZipFile(GOLDEN / "torch_zip.pth") as old, zipfile.ZipFile(path, "w") as new:
        for entry in old.namelist():
            content = old.read(entry)
            if entry.endswith("data.pkl"):
                # transposed: (3, 2) of strides (1, 3) becomes (3, 9)
                assert content.count(b"K\x03K\x02\x86") == 1
                content = content.replace(b"K\x03K\x02\x86", b"K\x03K\x09\x86")
            new.writestr(entry, content)
    with pytest.raises(UserError, match="reaches beyond its storage"):
        TorchFile(path)


def test_no_such_file(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        TorchFile(tmp_path / "none.pth")
    shutil.copy(GOLDEN / "README.md", tmp_path / "text.pth")
    with pytest.raises(UserError, match="no state dict of PyTorch"):
        TorchFile(tmp_path / "text.pth")
