"""Files of the FID network's weights."""

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file
from support.fid import NARROW, inception_tensors

from diffit_jax.errors import UserError
from diffit_jax.interop import inception as interop


@pytest.fixture(scope="module")
def narrow():
    return inception_tensors(NARROW)


def test_the_width_is_that_of_the_file(narrow, tmp_path):
    save_file(narrow, tmp_path / "w.safetensors")
    module, variables = interop.load(tmp_path / "w.safetensors")
    assert module.width == NARROW
    kernel = variables["params"]["mixed_9"]["3x3_row"]["conv"]["kernel"]
    theirs = narrow["Mixed_7b.branch3x3_2a.conv.weight"]
    np.testing.assert_array_equal(kernel, theirs.transpose(2, 3, 1, 0))
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(variables))


def test_counters_of_batches_are_passed_over(narrow, tmp_path):
    counter = {"Conv2d_1a_3x3.bn.num_batches_tracked": np.zeros((), np.int64)}
    save_file(narrow | counter, tmp_path / "w.safetensors")
    interop.load(tmp_path / "w.safetensors")


def test_weights_of_another_network_are_named(narrow, tmp_path):
    path = tmp_path / "w.safetensors"
    others = {name: array for name, array in narrow.items() if not name.startswith("Mixed_5b")}
    save_file(others | {"layer.weight": np.zeros(3, np.float32)}, path)
    with pytest.raises(UserError, match=r"missing Mixed_5b\S+.*extra layer\.weight.*pytorch-fid"):
        interop.load(path)


def test_numbers_that_are_not_finite_are_named(narrow, tmp_path):
    path, name = tmp_path / "w.safetensors", "Mixed_6c.branch1x1.bn.running_var"
    save_file(narrow | {name: np.full_like(narrow[name], np.nan)}, path)
    with pytest.raises(UserError, match=f"not finite.*{name}"):
        interop.load(path)
