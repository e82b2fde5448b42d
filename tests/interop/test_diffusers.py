"""Autoencoders as diffusers saves them."""

import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.fid import VAE, save_vae

from diffit_jax.errors import UserError
from diffit_jax.interop import diffusers

OLDER = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


@pytest.fixture(scope="module")
def variables():
    return diffusers.load(VAE)[1]


def same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_a_folder_is_the_same_as_a_file(tmp_path, variables):
    module, ours = diffusers.load(save_vae(tmp_path / "vae"))
    same(ours, variables)
    assert module.latent_scale == (0.18215,) and module.factor == 8


def test_a_pipelines_folder_is_taken_for_its_vae(tmp_path, variables):
    save_vae(tmp_path / "pipeline" / "vae")
    same(diffusers.load(tmp_path / "pipeline")[1], variables)


@pytest.mark.parametrize("convolutions", [False, True])
def test_older_names_of_attention(tmp_path, variables, convolutions):
    """Before 2023; and matrices as convolutions of 1×1."""
    tensors = {}
    for name, array in load_file(VAE).items():
        if "attentions.0.to_" in name:
            for new, old in OLDER.items():
                name = name.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
            if convolutions and name.endswith("weight"):
                array = array[..., None, None]
        tensors[name] = array
    assert any("proj_attn" in name for name in tensors)
    folder = save_vae(tmp_path / "vae")
    path = folder / "diffusion_pytorch_model.safetensors"
    path.unlink()
    save_file(tensors, path)
    same(diffusers.load(folder)[1], variables)


@pytest.mark.parametrize(
    ("said", "mean", "scale"),
    [
        ({}, (0.0,), (0.18215,)),
        ({"scaling_factor": 0.3611, "shift_factor": 0.1159}, (0.1159,), (0.3611,)),
        # Statistics of the channels win, even where a factor stands beside them.
        (
            {"latents_mean": [1, 2, 3, 4], "latents_std": [2, 4, 5, 8], "scaling_factor": 0.5},
            (1, 2, 3, 4),
            (0.5, 0.25, 0.2, 0.125),
        ),
    ],
)
def test_what_scales_latents(tmp_path, said, mean, scale):
    module = diffusers.read_config(save_vae(tmp_path / "vae", **said) / "config.json")
    assert module.latent_mean == mean and module.latent_scale == scale


@pytest.mark.parametrize(
    ("said", "named"),
    [
        ({"_class_name": "AutoencoderTiny"}, "AutoencoderTiny"),
        (
            {"down_block_types": ["DownEncoderBlock2D"] * 3 + ["AttnDownEncoderBlock2D"]},
            "AttnDownEncoderBlock2D",
        ),
        ({"up_block_types": ["UpDecoderBlock2D"] * 3}, "3 up_block_types and 4 block_out_channels"),
        ({"act_fn": "mish"}, "mish"),
        ({"latents_mean": [1, 2], "latents_std": [1, 2]}, "2 latents_mean for 4 latent_channels"),
        ({"norm_num_groups": 48}, "not a multiple of its 48 groups"),
    ],
)
def test_other_networks_are_refused_by_name(tmp_path, said, named):
    with pytest.raises(UserError, match=named):
        diffusers.load(save_vae(tmp_path / "vae", **said))


def test_weights_of_another_architecture(tmp_path):
    """The config has three blocks a stage, the file two; first the tensors that are missing."""
    with pytest.raises(UserError, match=r"missing encoder\.down_blocks\.0\.resnets\.2\S+ .*more"):
        diffusers.load(save_vae(tmp_path / "vae", layers_per_block=3))
    with pytest.raises(UserError, match=r"misshapen encoder\.\S+ \(32, 3, 3, 3\) instead of \(64"):
        diffusers.load(save_vae(tmp_path / "wide", block_out_channels=[64, 128, 128, 128]))


def test_no_autoencoder_there(tmp_path):
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "none"):
        with pytest.raises(UserError, match="name a folder as diffusers saves it"):
            diffusers.load(path)


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("scaling_factor", None, "a positive number"),
        ("scaling_factor", 0, "a positive number"),
        ("scaling_factor", "0.18", "a positive number"),
        ("block_out_channels", None, "a list of sizes"),
        ("block_out_channels", [], "a list of sizes"),
        ("block_out_channels", [32, "64"], "a list of sizes"),
        ("down_block_types", None, "a list of names"),
        ("layers_per_block", None, "a whole number"),
        ("latent_channels", 4.0, "a whole number"),
        ("latent_channels", -4, "a whole number"),
        ("norm_num_groups", True, "a whole number"),
        ("use_quant_conv", None, "true or false"),
        ("act_fn", None, "a name"),
        ("latents_std", [1, 0, 1, 1], "null or finite numbers"),
        ("latents_mean", ["a"] * 4, "null or finite numbers"),
        ("shift_factor", "x", "null or finite numbers"),
    ],
)
def test_values_that_cannot_be_are_named_by_their_key(tmp_path, key, value, wanted):
    with pytest.raises(UserError, match=rf"config.json has {key} .*, wanted is {wanted}"):
        diffusers.load(save_vae(tmp_path / "vae", **{key: value}))


@pytest.mark.parametrize("content", ["[" * 100_000, "{", "[]", "null", '{"a": NaN'])
def test_a_config_that_is_none_gets_one_line(tmp_path, content):
    folder = save_vae(tmp_path / "vae")
    (folder / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json is not a JSON"):
        diffusers.load(folder)


def test_weights_under_other_names(tmp_path, variables):
    """The one safetensors file is taken; a pickle alone is named."""
    folder = save_vae(tmp_path / "vae")
    weights = next(folder.glob("*.safetensors"))
    weights.rename(folder / "vae-ft-ema.safetensors")
    diffusers.load(folder)
    shutil.copy(folder / "vae-ft-ema.safetensors", folder / "other.safetensors")
    with pytest.raises(UserError, match=r"has other.safetensors, vae-ft-ema.safetensors, and no"):
        diffusers.load(folder)
    for name in ("other", "vae-ft-ema"):
        (folder / f"{name}.safetensors").unlink()
    (folder / "diffusion_pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(UserError, match=r"but diffusion_pytorch_model.bin, a pickle: save it as"):
        diffusers.load(folder)
