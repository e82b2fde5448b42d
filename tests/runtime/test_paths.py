"""Paths as people type them, at the flags and in the functions that a notebook calls."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from support.configs import small_latent_config
from support.golden import WEIGHTS
from support.processes import command, write_config

from diffit_jax.data.sources import DataSpec, open_dataset
from diffit_jax.errors import UserError
from diffit_jax.evaluation.score import score
from diffit_jax.run.workdir import claim
from diffit_jax.runtime import files
from diffit_jax.runtime.checkpoint import Checkpoints
from diffit_jax.sampling import convert
from diffit_jax.sampling.request import Run, Weights
from diffit_jax.sampling.sample import sample
from diffit_jax.training.train import train


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("runs/x", "HERE/runs/x"),
        ("./runs//x/", "HERE/runs/x"),
        ("~/x", "HOME/x"),
        ("~", "HOME"),
        ("/a/b", "/a/b"),
        ("file:///a/b%20c", "/a/b c"),
        ("file://localhost/a", "/a"),
        ("file:/a/b", "/a/b"),
        ("gs://bucket/x", "gs://bucket/x"),
        ("a:b", "HERE/a:b"),
        (Path("runs/x"), "HERE/runs/x"),
    ],
)
def test_paths_are_made_absolute(typed, meant, tmp_path, monkeypatch):
    monkeypatch.setitem(files._SCHEMES, "gs", "numpy")  # as if gcsfs were here
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    expected = meant.replace("HERE", str(tmp_path)).replace("HOME", "/home/someone")
    assert os.fspath(files.resolve(typed, "workdir")) == expected


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("", "workdir is empty: name a path"),
        ("  ", "workdir is empty"),
        (None, "workdir is empty"),
        ("gs:/bucket/x", "workdir gs:/bucket/x is half a URL: write gs://bucket/path"),
        ("gs://", "is half a URL"),
        ("~nobody-of-that-name/x", "names a home directory that is not known here"),
        ("file://host/x", "names a file of the host host: write file:///path"),
    ],
)
def test_impossible_paths(typed, message):
    with pytest.raises(UserError, match=message) as error:
        files.resolve(typed, "workdir")
    assert "\n" not in str(error.value)


def test_a_current_directory_that_is_gone(tmp_path, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(UserError, match="workdir x is relative to a directory that is not there"):
        files.resolve("x", "workdir")
    assert os.fspath(files.resolve("/x", "workdir")) == "/x"


def test_a_run_by_relative_paths_from_train_to_convert(tmp_path, monkeypatch):
    """What the README's table does, as functions: train, continue, sample, convert there and
    back."""
    monkeypatch.chdir(tmp_path)
    train(small_latent_config(training__total_steps=2), workdir="runs/a")
    assert (
        int(train(small_latent_config(training__total_steps=4), workdir=Path("runs/a")).step) == 4
    )
    assert (
        sample("runs/a", seeds=[0], overrides={"sampler.num_steps": 2}, output="s.npz")
        == tmp_path / "s.npz"
    )
    assert (
        sample(Run("runs/a"), seeds=[0, 1], overrides={"sampler.num_steps": 2}).parent
        == tmp_path / "runs" / "a"
    )
    convert.workdir_to_weights("runs/a", weights="w.safetensors")
    convert.weights_to_workdir(
        "w.safetensors", workdir="runs/b", config=small_latent_config().to_dict()
    )
    convert.workdir_to_workdir("runs/b", target="runs/c", slim=True)
    assert Checkpoints("runs/c/checkpoints").steps() == [0]
    weights = Weights("w.safetensors", small_latent_config().to_dict())
    assert sample(weights, seeds=[0], overrides={"sampler.num_steps": 2}).parent == tmp_path
    assert not (tmp_path / "~").exists()


def test_functions_of_a_notebook_refuse_an_empty_path(latent_run):
    for call in (
        lambda: train(small_latent_config(), workdir=""),
        lambda: sample("", seeds=[0]),
        lambda: sample(latent_run[0], seeds=[0], output=""),
        lambda: Weights("", {}),
        lambda: score("", dataset="digits"),
        lambda: convert.workdir_to_weights(latent_run[0], weights=""),
        lambda: convert.workdir_to_workdir(latent_run[0], target="", slim=None),
    ):
        with pytest.raises(UserError, match="is empty: name a path"):
            call()


def test_data_directories_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    open_dataset("digits", "train", "~/data", DataSpec((8, 8, 1), 10))
    assert (tmp_path / "home" / "data" / "digits").exists() and not (tmp_path / "~").exists()


@pytest.mark.parametrize(
    ("verb", "flags", "named"),
    [
        ("train", ["--config", "c.py", "--workdir="], "--workdir"),
        ("sample", ["--workdir", ""], "--workdir"),
        ("sample", ["--weights="], "--weights"),
        ("evaluate", ["--samples="], "--samples"),
        ("convert", ["--workdir", "x", "--to_workdir="], "--to_workdir"),
        ("benchmark", ["--config", "c.py", "--json="], "--json"),
    ],
)
def test_an_empty_flag_is_one_line(verb, flags, named, tmp_path):
    write_config(tmp_path / "c.py", small_latent_config())
    before = sorted(tmp_path.iterdir())
    status, errors = command(verb, *flags, cwd=tmp_path, PYTHONDONTWRITEBYTECODE="1")
    assert (
        status == 1
        and errors == f"error: {named} is empty: name a path (was a variable of the shell not set?)"
    )
    assert sorted(tmp_path.iterdir()) == before


def test_a_tilde_behind_an_equals_sign(tmp_path):
    write_config(tmp_path / "c.py", small_latent_config(training__total_steps=2))
    status, errors = command(
        "train", "--config=~/c.py", "--workdir=~/run", cwd=tmp_path, HOME=str(tmp_path)
    )
    assert (
        status == 0
        and (tmp_path / "run" / "checkpoints" / "2").exists()
        and not (tmp_path / "~").exists()
    ), errors


# --- Owners and claims


def test_weights_of_an_owner_without_a_name(tmp_path):
    """As in a container's volume."""
    path = tmp_path / "w.safetensors"
    shutil.copy(WEIGHTS["b"], path)
    os.chown(path, 54321, 54321)
    config = small_latent_config(sampling__sampler__num_steps=2).to_dict()
    assert (
        np.load(sample(Weights(path, config), seeds=[0], output=tmp_path / "s.npz"))["arr_0"].shape[
            0
        ]
        == 1
    )


def test_without_a_home_directory(latent_run, tmp_path, monkeypatch):
    """No passwd entry and no HOME: commands work, without a cache of programs."""
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert files.home() is None
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    with pytest.raises(
        UserError,
        match=r"there is no home directory to keep prepared data sets in: set data\.data_dir",
    ):
        open_dataset("digits", "train", "", DataSpec((8, 8, 1), 10))
    with pytest.raises(UserError, match="names a home directory that is not known here"):
        files.resolve("~/x", "workdir")


def test_a_config_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "config.json").mkdir()
    with pytest.raises(
        UserError, match=r"config.json cannot be read .Is a directory.: ask its owner"
    ):
        Run(tmp_path)


def test_a_claimed_directory_without_a_checkpoint_takes_a_corrected_config(tmp_path):
    claim(tmp_path, small_latent_config(training__batch_size=4))
    claim(tmp_path, small_latent_config(training__batch_size=8))
    (tmp_path / "checkpoints" / "6").mkdir(parents=True)
    with pytest.raises(
        UserError, match=r"holds a run with training\.batch_size = 8, this config has 4"
    ):
        claim(tmp_path, small_latent_config(training__batch_size=4))
    before = (tmp_path / "config.json").read_text()
    with pytest.raises(
        UserError,
        match=r"training.total_steps is 3, but workdir .* holds step 6: set it to at least 6",
    ):
        claim(tmp_path, small_latent_config(training__total_steps=3))
    assert (tmp_path / "config.json").read_text() == before


def test_a_config_of_another_program_stays_as_it_is(tmp_path):
    (tmp_path / "config.json").write_text('{"foo": 1}')
    with pytest.raises(
        UserError, match=r"holds a config.json of another program: choose another workdir"
    ):
        claim(tmp_path, small_latent_config())
    assert (tmp_path / "config.json").read_text() == '{"foo": 1}'


def test_a_failed_conversion_can_be_repeated(tmp_path, monkeypatch):
    def failing(*_):
        raise UserError("no room")

    monkeypatch.setattr(convert.workdirs, "write_config", failing)
    with pytest.raises(UserError, match="no room"):
        convert.weights_to_workdir(
            WEIGHTS["b"], workdir=tmp_path / "run", config=small_latent_config().to_dict()
        )
    monkeypatch.undo()
    assert not (tmp_path / "run" / "checkpoints").exists()
    convert.weights_to_workdir(
        WEIGHTS["b"], workdir=tmp_path / "run", config=small_latent_config().to_dict()
    )
    assert Checkpoints(tmp_path / "run" / "checkpoints").steps() == [0]
