"""The verb `convert`: released weights ⇄ work directories, and between the parametrisations of
TMSA."""

import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from support.configs import small_latent_config
from support.damage import data_files, truncate
from support.golden import WEIGHTS

from diffit_jax.errors import UserError
from diffit_jax.interop.parametrisation import to_slim
from diffit_jax.sampling import convert
from diffit_jax.sampling.sample import sample
from diffit_jax.training.train import train

CONFIG = small_latent_config(
    sampling__sampler__num_steps=3,
    training__total_steps=2,
    training__batch_size=2,
    training__grid_images=2,
).to_dict()


def test_weights_to_workdir_and_back(tmp_path):
    convert.weights_to_workdir(WEIGHTS["a"], workdir=tmp_path / "run", config=CONFIG)
    convert.workdir_to_weights(
        tmp_path / "run", weights=tmp_path / "back.safetensors", index_buffers=True
    )
    original, back = load_file(WEIGHTS["a"]), load_file(tmp_path / "back.safetensors")
    assert original.keys() == back.keys()
    for name, tensor in original.items():
        np.testing.assert_array_equal(back[name], tensor, err_msg=name)


def test_a_converted_run_can_be_sampled_and_trained(tmp_path):
    convert.weights_to_workdir(WEIGHTS["b"], workdir=tmp_path / "run", config=CONFIG, slim=True)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (
        config["model"]["slim_tmsa"]
        and config["model"]["hidden_size"] == 48
        and config["model"]["input_size"] == 64
    )
    with np.load(
        sample(tmp_path / "run", seeds=[0, 1], overrides={"batch_per_device": 1})
    ) as arrays:
        assert np.isfinite(arrays["arr_0"]).all()
    from ml_collections import ConfigDict

    assert int(train(ConfigDict(config), workdir=tmp_path / "run").step) == 2


def test_another_resolution(tmp_path):
    convert.weights_to_workdir(WEIGHTS["a"], workdir=tmp_path / "run", config=CONFIG, input_size=16)
    convert.workdir_to_weights(tmp_path / "run", weights=tmp_path / "w.safetensors")
    assert load_file(tmp_path / "w.safetensors")["pos_embed"].shape == (1, 64, 64)


def test_training_goes_on_the_same_in_the_slim_parametrisation(latent_run, tmp_path):
    """Six updates in one, four more in both: parameters agree to rounding, and come back with the
    optimizer's moments."""
    source, _ = latent_run
    old = tmp_path / "old"
    shutil.copytree(source, old)
    convert.workdir_to_workdir(old, target=tmp_path / "slim", slim=True)
    convert.workdir_to_workdir(tmp_path / "slim", target=tmp_path / "back", slim=False)
    states = {}
    for name, slim in (("old", False), ("slim", True), ("back", False)):
        states[name] = train(
            small_latent_config(training__total_steps=10, model__slim_tmsa=slim),
            workdir=tmp_path / name,
        )
        assert int(states[name].step) == 10
    reference = to_slim(states["old"])
    for mine in (states["slim"], to_slim(states["back"])):
        assert jax.tree.structure(mine) == jax.tree.structure(reference)
        for ours, theirs in zip(jax.tree.leaves(mine), jax.tree.leaves(reference), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5)
    key_share = states["back"].params["blocks"]["attention"]["time_qkv_kernel"][:, :, 1]
    assert not key_share.any()  # what was dropped came back as zeros


def test_an_interrupted_conversion_leaves_no_run(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, "save_state", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert.weights_to_workdir(WEIGHTS["b"], workdir=tmp_path / "run", config=CONFIG)
    assert not (tmp_path / "run" / "config.json").exists()


def test_checkpoints_without_a_config_are_not_overwritten(latent_run, tmp_path):
    shutil.copytree(latent_run[0], tmp_path / "run")
    (tmp_path / "run" / "config.json").unlink()
    with pytest.raises(UserError, match="holds a run already"):
        convert.weights_to_workdir(WEIGHTS["b"], workdir=tmp_path / "run", config=CONFIG)


def test_conversion_touches_nothing_of_its_source(latent_run, tmp_path):
    source = tmp_path / "old"
    shutil.copytree(latent_run[0], source)
    truncate(*data_files(source / "checkpoints" / "6"))
    before = sorted(source.rglob("*"))
    convert.workdir_to_workdir(source, target=tmp_path / "new", slim=True)
    assert sorted(source.rglob("*")) == before and (tmp_path / "new" / "checkpoints" / "4").exists()


def test_refusals(latent_run, run, tmp_path):
    for call, message in (
        (
            lambda: convert.weights_to_workdir(WEIGHTS["a"], workdir=latent_run[0], config=CONFIG),
            "holds a run already",
        ),
        (
            lambda: convert.workdir_to_workdir(latent_run[0], target=latent_run[0], slim=None),
            "holds a run already",
        ),
        (
            lambda: convert.workdir_to_weights(run[0], weights=tmp_path / "w"),
            "holds no latent_diffit",
        ),
        (
            lambda: convert.workdir_to_weights(tmp_path / "none", weights=tmp_path / "w"),
            "holds no run",
        ),
        (
            lambda: convert.weights_to_workdir(__file__, workdir=tmp_path / "x", config=CONFIG),
            "truncated or no safetensors file",
        ),
        (
            lambda: convert.weights_to_workdir(
                WEIGHTS["a"], workdir=tmp_path / "x", config=CONFIG, input_size=15
            ),
            "not divisible by patch_size",
        ),
    ):
        with pytest.raises(UserError, match=message):
            call()
    assert not list(tmp_path.iterdir())
