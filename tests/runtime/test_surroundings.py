"""Full disks, files that may not be read, encodings, modes of jax, libraries that fail."""

import contextlib
import errno
import os
import sys
import types

import jax
import numpy as np
import pytest
from etils import epath
from ml_collections import ConfigDict, FrozenConfigDict
from support.images import pets, write_folder

from diffit_jax.data import digits, records
from diffit_jax.data.sources import open_dataset
from diffit_jax.errors import UserError
from diffit_jax.evaluation.images import open_samples
from diffit_jax.ingest import containers
from diffit_jax.ingest import shards as shards_module
from diffit_jax.ingest.images import open_images
from diffit_jax.ingest.prepare import prepare
from diffit_jax.interop import diffusers
from diffit_jax.runtime import backend, config_files, files, hub
from diffit_jax.training import loggers
from diffit_jax.training.loop import Tracer

FULL = OSError(errno.ENOSPC, "No space left on device")
PETS = pets(12, width=8, height=8)


def fails(error):
    def act(*_, **__):
        raise error

    return act


# --- Full disks


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_is_full_for_a_lock_is_named(tmp_path, monkeypatch, number):
    """Not `the output could not be printed; what was asked for is done`: nothing was."""
    monkeypatch.setattr(os, "pwrite", fails(OSError(number, os.strerror(number))))
    refused = pytest.raises(UserError, match=rf"workdir {tmp_path} cannot be written .*: make room")
    with refused, files.owned(tmp_path, "workdir"):
        raise AssertionError("it is not owned")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["write_bytes", "mkdir"])
def test_a_disk_that_is_full_for_a_folder_is_named(tmp_path, monkeypatch, name):
    monkeypatch.setattr(type(epath.Path(tmp_path)), name, fails(FULL))
    with pytest.raises(UserError, match=r"data_dir .* cannot be written .*: make room, or"):
        files.make_directory(tmp_path / "x", "data_dir")


def test_a_disk_that_fills_while_a_file_is_written_keeps_no_part(tmp_path):
    refused = pytest.raises(UserError, match=r"cannot be written .*: make room, or choose another")
    with refused, files.writing(tmp_path / "x.npz") as file:
        file.write(b"some")
        raise FULL
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_in_prepare_keeps_no_part_of_a_shard(tmp_path, monkeypatch):
    """Not even where closing the file fails too."""
    source = write_folder(tmp_path / "x", PETS)

    class Failing(shards_module.ShardWriter):
        def add(self, label, **values):
            super().add(label, **values)
            if self.stats.count == 5:
                raise FULL

        def abandon(self):
            super().abandon()
            raise FULL

    monkeypatch.setattr(shards_module, "ShardWriter", Failing)
    with pytest.raises(UserError, match=r"cannot be written .*: make room, and run the same"):
        prepare(source, name="x", data_dir=tmp_path / "data", workers=0)
    assert not list((tmp_path / "data/x").glob(".*.partial"))


# --- What may not be read


def test_a_source_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    """Of every kind: never as a traceback, and never as damaged."""
    denied = PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "inner"))
    for name in ("a.zip", "a.tar", "a.parquet", "a.tar.gz", "a.arrow"):
        (tmp_path / name).write_bytes(b"x")
    with monkeypatch.context() as patch:
        patch.setattr(type(epath.Path(tmp_path)), "open", fails(denied))
        for path in tmp_path.iterdir():
            with pytest.raises(UserError, match=r"may not be read \(permission denied\): ask its"):
                open_images(path)
    folder = write_folder(tmp_path / "x", PETS)
    monkeypatch.setattr(os, "scandir", fails(denied))
    for act in (open_images, open_samples, containers.index_folder):
        with pytest.raises(UserError, match=r"cannot be read|may not be read"):
            act(epath.Path(folder), *([False] if act is containers.index_folder else []))


def test_records_that_may_not_be_read_are_not_called_damaged(tmp_path, monkeypatch):
    source = write_folder(tmp_path / "x", PETS)
    prepare(source, name="x", data_dir=tmp_path / "data", workers=0)
    opened = open_dataset("x", "train", tmp_path / "data")
    monkeypatch.setattr(records, "_reader", fails(OSError("it cannot be opened")))
    with pytest.raises(UserError, match="is damaged or not there"):
        opened.read(np.arange(2))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(
        UserError, match=r"may not be read \(permission denied\): ask its owner"
    ) as e:
        opened.read(np.arange(2))
    assert "delete" not in str(e.value)


def test_an_autoencoders_config_that_may_not_be_read_is_whole(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    denied = PermissionError(errno.EACCES, "Permission denied")
    monkeypatch.setattr(type(epath.Path(tmp_path)), "read_text", fails(denied))
    with pytest.raises(UserError, match=r"cannot be read \(Permission denied\): make it readable"):
        diffusers.read_config(epath.Path(tmp_path / "config.json"))


# --- Several at once, and again


def test_whoever_waited_for_the_first_preparation_reads_it(tmp_path, monkeypatch):
    """Three commands at once on a machine without the digits: each of the waiting ones finds them
    prepared, and an own look at the folder from before."""
    owned, seen = files.owned, []

    @contextlib.contextmanager
    def after_another(folder, what, wait):
        if not seen:
            seen.append(1)
            assert len(digits.read("test", str(tmp_path))[0]) == 360  # the other one's
        with owned(folder, what, wait):
            yield

    monkeypatch.setattr(files, "owned", after_another)
    images, labels = digits.read("train", str(tmp_path))
    assert images.shape == (1437, 8, 8, 1) and len(labels) == 1437 and seen


@pytest.mark.parametrize("steps", [(1, 3), (5, 5), (90, 99)])
def test_a_profile_of_steps_that_have_passed_is_told(tmp_path, caplog, steps):
    """In a run that resumed behind them, or ended before them."""
    with Tracer(epath.Path(tmp_path), steps) as tracer:
        for step in (10, 11):
            tracer.before(step)
            tracer.after(step)
    assert caplog.text.count("no trace was written: steps") == 1


@pytest.mark.parametrize("kind", ["FrozenConfigDict(c)", "c", "c.to_dict()", "dict(c)"])
def test_a_config_of_any_mapping_can_be_overridden(tmp_path, kind):
    path = tmp_path / "c.py"
    path.write_text(
        "from ml_collections import ConfigDict, FrozenConfigDict\n"
        f"def get_config():\n  c = ConfigDict({{'a': {{'b': 1}}}})\n  return {kind}\n"
    )
    config = config_files.load(str(path))
    assert type(config) is ConfigDict and type(config.a) is ConfigDict
    config.a.b = 2
    assert not isinstance(config, FrozenConfigDict)


@pytest.mark.parametrize("returned", ["None", "[1]", "get_config", "'digits'", "3"])
def test_what_is_no_config_is_named(tmp_path, returned):
    path = tmp_path / "c.py"
    path.write_text(f"def get_config():\n  return {returned}\n")
    with pytest.raises(UserError, match=r"returned .*, not a ConfigDict: return one"):
        config_files.load(str(path))


# --- The environment


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "iso8859-15"])
def test_names_beyond_the_encoding_of_the_environment_are_refused(monkeypatch, encoding):
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: encoding)
    assert str(files.resolve("/tmp/plain", "--workdir")) == "/tmp/plain"
    with pytest.raises(UserError, match=r"has letters beyond ASCII.*: set the variable LC_ALL"):
        files.resolve("/tmp/x ü/r", "--workdir")
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "UTF-8")
    assert str(files.resolve("/tmp/x ü/r", "--workdir")).endswith("x ü/r")


@pytest.mark.parametrize("name", backend._TRANSFER_GUARDS)
@pytest.mark.parametrize("mode", ["disallow", "disallow_explicit", "log"])
def test_a_guard_of_transfers_is_named(name, mode):
    before = getattr(jax.config, name)
    jax.config.update(name, mode)
    try:
        with contextlib.ExitStack() as stack:
            if mode != "log":
                stack.enter_context(
                    pytest.raises(UserError, match=r"mode JAX_TRANSFER_GUARD.*unset")
                )
            with backend.reproducible_numerics():
                pass
    finally:
        jax.config.update(name, before)


def test_a_working_directory_at_the_root(monkeypatch):
    monkeypatch.chdir("/")
    for name in ("digits.py", "imagenet256_latent.py"):
        assert config_files.load(str(config_files.own(name, "--config"))).training.total_steps > 0


@pytest.mark.parametrize("value", ["hf-mirror.com", "https://", "ftp://x", "hf-mirror.com/api"])
def test_a_hub_that_is_no_address_is_named(monkeypatch, value):
    monkeypatch.setenv("HF_ENDPOINT", value)
    with pytest.raises(UserError, match=r"the variable HF_ENDPOINT is .*, which is no address"):
        hub.local("hf://owner/name/x.safetensors", "--weights")


@pytest.mark.parametrize(
    "error",
    [ValueError("API key must be 40 characters"), ConnectionError("no route"), TimeoutError()],
)
def test_a_wandb_that_fails_at_the_door_ends_no_run(monkeypatch, caplog, error):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_DISABLED", raising=False)
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(login=fails(error)))
    loggers.check_wandb("project")
    assert f"wandb: {type(error).__name__}" in caplog.text and "begins all the same" in caplog.text


@pytest.mark.parametrize("value", ["true", "1", "TRUE", "yes"])
def test_a_disabled_wandb_is_not_asked(monkeypatch, value):
    monkeypatch.setenv("WANDB_DISABLED", value)
    login = fails(AssertionError("asked"))
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(login=login))
    loggers.check_wandb("project")
