"""Training a small autoencoder, and the folder that it becomes."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file
from support.golden import GOLDEN
from support.processes import at_question
from support.trees import assert_equal_trees

from diffit_jax.data import digits
from diffit_jax.data.records import open_records
from diffit_jax.errors import UserError
from diffit_jax.ingest.encode import Encoding, encode
from diffit_jax.ingest.prepare import prepare
from diffit_jax.interop import diffusers
from diffit_jax.models.pretrained.autoencoder import Autoencoder
from diffit_jax.runtime import distributed, interruption
from diffit_jax.training.autoencoder import AutoencoderTraining, initial_state, losses
from diffit_jax.training.train_autoencoder import train_autoencoder

SMALL = AutoencoderTraining(channels=(16, 16), steps=300, batch_size=8)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of data sets: `digits8`, 60 digits to train on and 40 others; `upright` is only to
    train on."""
    folder = tmp_path_factory.mktemp("digits")
    digits.write_images(folder / "images", 60)
    prepare(folder / "images" / "train", name="digits8", data_dir=folder, workers=0)
    prepare(folder / "images" / "test", name="digits8", data_dir=folder, split="test", workers=0)
    prepare(folder / "images" / "train", name="upright", data_dir=folder, workers=0)
    return folder


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("autoencoder")
    return workdir, train_autoencoder("digits8", workdir=workdir, settings=SMALL, data_dir=data)


def test_the_loss_is_what_its_formula_says():
    """In float64, of an encoder whose moments are known: those of the module itself."""
    module = SMALL.module(1)
    variables = initial_state(SMALL, module).variables
    keys = jax.random.split(jax.random.key(1), 3)
    images = jax.random.uniform(jax.random.key(2), (3, 8, 8, 1), minval=-1.0)
    found = jax.jit(lambda *given: losses(module, *given))(variables, images, keys)
    apply = jax.jit(module.apply, static_argnames="method")
    mean, log_variance = apply(variables, images, method="encode")
    noise = np.stack([jax.random.normal(key, mean.shape[1:]) for key in keys])
    z = mean + np.exp(np.float64(log_variance) / 2) * noise
    decoded = np.asarray(apply(variables, jnp.float32(z), method="decode"))
    assert found["error"] == pytest.approx(np.abs(np.asarray(images) - decoded).mean(), rel=1e-5)
    mean, log_variance = np.float64(mean), np.float64(log_variance)
    kl = 0.5 * (mean**2 + np.exp(log_variance) - 1 - log_variance).sum() / images.size
    assert found["kl"] == pytest.approx(kl, rel=1e-5)


def test_it_learns_and_its_folder_is_read(data, trained, tmp_path):
    """Better by half than the best of all fixed images, in 300 updates; latents come out
    with mean 0 and variance 1."""
    workdir, result = trained
    images = open_records(data / "digits8", "test").read(np.arange(60))["image"]
    fixed = np.abs(images - np.median(images, axis=0)).mean()
    assert result.count == 60 and result.error < fixed / 2, (result, fixed)
    manifest = encode(
        data / "digits8", name="latents", encoding=Encoding(workdir), data_dir=tmp_path, workers=0
    )
    moments = open_records(tmp_path / "latents", "train").read(np.arange(60))["moments"]
    mean, log_variance = np.split(np.float64(moments[:, 0]), 2, axis=-1)
    scale, shift = (manifest.autoencoder[f"latent_{name}"] for name in ("scale", "mean"))
    scaled = (mean - shift) * scale
    # Moments are kept in float16.
    np.testing.assert_allclose(scaled.mean((0, 1, 2)), 0, atol=1e-3)
    variance = scaled.var((0, 1, 2)) + (np.exp(log_variance) * np.square(scale)).mean((0, 1, 2))
    np.testing.assert_allclose(variance, 1, atol=2e-3)
    with Image.open(workdir / "reconstructions.png") as image:
        assert image.size == (10 * 65 - 1, 2 * 65 - 1)


def test_an_interrupted_training_ends_as_one_that_was_not(data, tmp_path, monkeypatch):
    """Of twelve updates; the loop is that of networks."""
    short = dataclasses.replace(SMALL, steps=12)

    def trained(name):
        return train_autoencoder("digits8", workdir=tmp_path / name, settings=short, data_dir=data)

    whole = trained("whole")
    with monkeypatch.context() as interrupted:
        interrupted.setattr(distributed.PreemptionNotice, "reached", at_question(7))
        with pytest.raises(interruption.Preempted, match="checkpoint 7 of 12 steps is saved"):
            trained("cut")
    assert not (tmp_path / "cut" / "config.json").exists()
    assert trained("cut") == whole
    ours, theirs = (diffusers.load(tmp_path / name) for name in ("cut", "whole"))
    assert ours[0] == theirs[0]
    assert_equal_trees(ours[1], theirs[1])
    assert trained("cut") == whole  # finished


def test_what_is_written_is_what_diffusers_writes(tmp_path):
    """Of an autoencoder in diffusers' files: the same names, shapes and numbers, and a config that
    says the same."""
    module, variables = diffusers.load(GOLDEN / "vae_small.safetensors")
    diffusers.save(tmp_path, module, variables)
    ours = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    theirs = load_file(GOLDEN / "vae_small.safetensors")
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        assert ours[name].shape == array.shape, name
        np.testing.assert_array_equal(ours[name], array.astype(np.float32))
    assert diffusers.read_config(tmp_path / "config.json") == module
    theirs = json.loads((GOLDEN / "vae_small.config.json").read_text())
    ours = json.loads((tmp_path / "config.json").read_text())
    assert {key: ours[key] for key in theirs if key in ours} == {
        key: value for key, value in theirs.items() if key in ours
    }


@pytest.mark.parametrize(("mean", "scale"), [((0.5,), (2.0,)), ((0.1, 0.2), (3.0, 4.0))])
def test_scales_of_latents_come_back(tmp_path, mean, scale):
    module = Autoencoder(
        channels=(8,), num_groups=4, latent_channels=2, latent_mean=mean, latent_scale=scale
    )
    variables = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 4, 4, 3)))
    diffusers.save(tmp_path, module, variables)
    read = diffusers.load(tmp_path)[0]
    np.testing.assert_allclose(read.latent_mean, mean)
    np.testing.assert_allclose(read.latent_scale, scale, rtol=1e-15)


@pytest.mark.parametrize(
    ("dataset", "changes", "message"),
    [
        ("digits8", {"seed": 1}, "holds an autoencoder with seed 0, not 1: choose another"),
        ("digits8", {"channels": (12,)}, "channels 12 are not a multiple of its 8 groups"),
        ("digits8", {"channels": (8,) * 5}, "need sides that are multiples of 16"),
        ("digits8", {"batch_size": 3}, "--batch_size 3 does not divide over 2 devices"),
        ("upright", {}, "it has train only"),
        ("nowhere", {}, "data set 'nowhere' is unknown"),
    ],
)
def test_what_cannot_be_is_said(data, trained, dataset, changes, message):
    settings = AutoencoderTraining(**{**vars(SMALL), **changes})
    before = sorted(path.name for path in trained[0].iterdir())
    with pytest.raises(UserError, match=message):
        train_autoencoder(dataset, workdir=trained[0], settings=settings, data_dir=data)
    assert sorted(path.name for path in trained[0].iterdir()) == before
