"""Files of weights as people have them: with prefixes, in several parts, beside other things; and
what is no weight file at all."""

import gzip
import io
import json
import zipfile

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.configs import small_latent_config
from support.golden import GOLDEN

from diffit_jax.errors import UserError
from diffit_jax.interop import official
from diffit_jax.models.diffit.latent import LatentDiffiT

WEIGHTS = GOLDEN / "diffit_b_noindex.safetensors"


def tensors():
    return load_file(WEIGHTS)


def with_prefix(prefix):
    return {prefix + name: tensor for name, tensor in tensors().items()}


def assert_is_b(path):
    module, variables = official.load(path)
    expected_module, expected = official.load(WEIGHTS)
    assert module == expected_module
    for ours, theirs in zip(jax.tree.leaves(variables), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(ours, theirs)


PREFIXES = [
    "module.",
    "_orig_mod.",
    "module._orig_mod.",
    "ema.",
    "model.",
    "model.diffusion_model.",
    "ema_model.module.",
    "net.",
    "a.b.c.d.",
]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_are_taken_off_with_a_line(prefix, tmp_path, caplog):
    save_file(with_prefix(prefix), tmp_path / "w.safetensors")
    with caplog.at_level("INFO", logger="diffit_jax"):
        assert_is_b(tmp_path / "w.safetensors")
    assert f"begin with {prefix}: it is taken off" in caplog.text


def test_the_average_is_used_where_there_are_both(tmp_path, caplog):
    """Its own numbers, whatever order and other things the file has."""
    for plain in ("", "model."):
        other = {f"{plain}{name}": tensor + 1 for name, tensor in tensors().items()}
        more = {
            "optimizer.exp_avg.blocks": np.zeros(3, np.float32),
            "step": np.array(7),
            "ema.decay": np.array(0.999, np.float32),
        }
        save_file(other | with_prefix("ema.") | more, tmp_path / "w.safetensors")
        with caplog.at_level("INFO", logger="diffit_jax"):
            assert_is_b(tmp_path / "w.safetensors")
        assert (
            "begin with ema.: it is taken off" in caplog.text
            and "other tensors are left out" in caplog.text
        )


def test_two_networks_without_an_average_are_refused(tmp_path):
    save_file(with_prefix("left.") | with_prefix("right."), tmp_path / "w.safetensors")
    with pytest.raises(
        UserError,
        match=r"hold 2 networks, with names that begin with left\., right\.: save the wanted one "
        r"alone",
    ):
        official.load(tmp_path / "w.safetensors")


@pytest.mark.parametrize("name", ["step", "global_step", "epoch"])
def test_a_number_of_the_trainer_is_left_out(name, tmp_path, caplog):
    save_file(tensors() | {name: np.array(3)}, tmp_path / "w.safetensors")
    with caplog.at_level("INFO", logger="diffit_jax"):
        assert_is_b(tmp_path / "w.safetensors")
    assert f"hold the trainer's number {name} too" in caplog.text


def in_parts(folder, prefix=""):
    names = sorted(tensors())
    weight_map = {}
    for part, chosen in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{part:05d}-of-00002.safetensors"
        save_file({prefix + name: tensors()[name] for name in chosen}, folder / file)
        weight_map |= {prefix + name: file for name in chosen}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map})
    )
    return folder / "model.safetensors.index.json"


@pytest.mark.parametrize("prefix", ["", "module."])
def test_an_index_stands_for_its_parts(tmp_path, prefix):
    assert_is_b(in_parts(tmp_path, prefix))


def test_a_missing_part_and_a_part_alone(tmp_path):
    index = in_parts(tmp_path)
    with pytest.raises(
        UserError, match=r"it is one of 2 files: name their index, model\.safetensors\.index\.json"
    ):
        official.load(tmp_path / "model-00001-of-00002.safetensors")
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(
        UserError,
        match=r"list 2 files, of which model-00002-of-00002.safetensors is not there: fetch it too",
    ):
        official.load(index)


def npz_bytes():
    buffer = io.BytesIO()
    np.savez(buffer, a=np.zeros(3))
    return buffer.getvalue()


def zip_bytes():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("readme.txt", "hello")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 2244\n",
            "are a Git LFS pointer, not the file itself: run git lfs",
        ),
        (
            b"<!DOCTYPE html>\n<html><head><title>diffit",
            "are a web page that was saved under this name: download the file itself",
        ),
        (b"\n  <html lang='en'>" + b" " * 600, "are a web page"),
        (b'{"weight_map": {}}', "are JSON text"),
        (npz_bytes(), "are an npz file of numpy arrays: convert them to safetensors first"),
        (zip_bytes(), "are a zip archive: unpack it"),
        (gzip.compress(b"x" * 100), "are compressed: unpack them first"),
        (b"\x93NUMPY\x01\x00" + b" " * 200, "are a numpy array"),
        (b"\x89HDF\r\n\x1a\n" + b" " * 200, "are an HDF5 file"),
        (b"\x80\x04\x95" + b" " * 200, "are a pickle, which could run code and is never read"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_weight_file_is_called_what_it_is(content, message, tmp_path):
    (tmp_path / "w.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        official.load(tmp_path / "w.safetensors")
    assert "\n" not in str(error.value) and "w.safetensors" in str(error.value)


@pytest.mark.parametrize(
    "content",
    [
        "{}",
        "[]",
        "null",
        '{"weight_map": 3}',
        '{"weight_map": {}}',
        "{",
        '{"weight_map": {"a": 3}}',
    ],
)
def test_json_that_is_no_index(content, tmp_path):
    (tmp_path / "w.index.json").write_text(content)
    with pytest.raises(UserError, match=r"no index of safetensors files|is not there|list 0 files"):
        official.load(tmp_path / "w.index.json")


def test_a_file_determines_sizes_and_nothing_else():
    """Every attribute of the model: those of a file are the file's, all others the config's, also
    ones that are yet to come."""
    values = {
        "dropout": 0.1,
        "scan_unroll": 2,
        "remat": "full",
        "attention": "auto",
        "dtype": "bfloat16",
        # Of a map, whose second time is not to be seen in its parameters.
        "end_time_in": "blocks",
        "end_time_from": 1,
        "guidance_in": "none",
    }
    config = small_latent_config(
        **{f"model__{name}": value for name, value in values.items()}, model__hidden_size=999
    ).to_dict()
    fitted = official.fit_config(config, WEIGHTS)["model"]
    module, _ = official.load(WEIGHTS)
    for name in LatentDiffiT.__dataclass_fields__:
        if name not in ("parent", "name"):
            assert fitted[name] == (
                getattr(module, name) if name in official.SIZES else values[name]
            ), name
    assert set(values) == set(official.TUNING)
