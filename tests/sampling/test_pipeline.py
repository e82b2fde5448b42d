"""`DiffiT` in Python draws what the command draws, and says in one line what cannot be."""

import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from support.fid import VAE, save_vae
from support.processes import ROOT, environment

from diffit_jax import DiffiT, UserError
from diffit_jax.interop import diffusers
from diffit_jax.run import workdir as workdirs
from diffit_jax.sampling.convert import workdir_to_weights
from diffit_jax.sampling.decode import decode
from diffit_jax.sampling.decoder import Decoding
from diffit_jax.sampling.sample import sample


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return save_vae(tmp_path_factory.mktemp("vae") / "sd-vae-ft-ema")


@pytest.fixture(scope="module")
def model(run):
    return DiffiT.load(run[0])


@pytest.fixture(scope="module")
def latent_model(latent_run, vae):
    return DiffiT.load(latent_run[0], vae=vae)


def read(path):
    with np.load(path) as arrays:
        return arrays["arr_0"], arrays["arr_1"]


def test_the_package_alone_imports_no_jax():
    code = "import sys, diffit_jax; diffit_jax.UserError; print('jax' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(), cwd=ROOT
    )
    assert result.stdout == "False\n", result.stderr


def test_samples_are_the_commands_to_the_bit(run, model, tmp_path):
    """More than a batch of them, with a rest; other settings; and one alone."""
    for name, asked, overrides in (
        ("a", dict(labels=[3, 5], seeds=range(11)), {}),
        ("b", dict(labels="7-9", seeds=[5, 2**32 - 1]), {"guidance.scale": 2.5}),
        ("c", dict(seeds=[4]), {"sampler": "euler", "sampler.num_steps": 3}),
    ):
        labels = asked.get("labels")
        path = sample(
            run[0],
            seeds=asked["seeds"],
            labels=labels,
            overrides=overrides,
            output=tmp_path / f"{name}.npz",
        )
        settings = {
            key.replace("guidance.", "guidance_").replace("sampler.", ""): value
            for key, value in overrides.items()
        }
        drawn = model.sample(**asked, **settings)
        images, given = read(path)
        np.testing.assert_array_equal(drawn, images)
        np.testing.assert_array_equal(drawn.labels, given)
        assert drawn.dtype == np.uint8 and drawn.seeds.tolist() == list(asked["seeds"])


def test_the_way_to_a_sample_ends_there(model):
    way = model.trajectory(labels=[3, 5], seeds=range(3), frames=3)
    assert way.shape == (3, 3, 8, 8, 1)
    np.testing.assert_array_equal(way[:, -1], model.sample(labels=[3, 5], seeds=range(3)))
    with pytest.raises(UserError, match="frames is 9: the sampler has 3 steps"):
        model.trajectory(frames=9)


def test_images_are_shown_and_saved(model, tmp_path):
    images = model.sample(labels=[3, 5], seeds=range(4))
    assert images.grid().size == (2 * 33 - 1, 16 + 2 * 33 - 1)  # a column for each, and its name
    assert images.grid(columns=4).size == (4 * 33 - 1, 32)
    images.save(tmp_path / "all.npz")
    np.testing.assert_array_equal(read(tmp_path / "all.npz")[0], images)
    images.save(str(tmp_path / "grid.png"))
    np.testing.assert_array_equal(Image.open(tmp_path / "grid.png"), np.asarray(images.grid()))
    with pytest.raises(UserError, match=r"must end in \.npz, \.png"):
        images.save(tmp_path / "grid.tiff")


def test_denoising_is_the_processes_own(run, model):
    """Of several levels at once as of one, on two devices; without a label the null label's."""
    rng = np.random.default_rng(0)
    x, sigmas = rng.normal(size=(3, 8, 8, 1)).astype(np.float32), [0.5, 1.0, 2.0]
    together = model.denoise(x, sigmas, labels=[1, 2, 3])
    for row, sigma in enumerate(sigmas):
        alone = model.denoise(x[row : row + 1], sigma, labels=row + 1)
        np.testing.assert_allclose(alone[0], together[row], atol=1e-5)
    free = model.denoise(x, 1.0)
    assert free.shape == x.shape and abs(free - model.denoise(x, 1.0, labels=1)).max() > 1e-4


def test_latents_are_encoded_and_decoded_as_the_autoencoder_does(latent_model):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3, 64, 64, 3), np.uint8)
    module, variables = diffusers.load(VAE)
    encode = jax.jit(lambda images: module.apply(variables, images, method="encode"))
    mean, _ = encode(images / 127.5 - 1)
    latents = latent_model.encode(images)
    np.testing.assert_allclose(latents, np.asarray(mean) * 0.18215, atol=2e-5)
    assert latent_model.decode(latents).shape == images.shape
    assert latent_model.image_shape == (64, 64, 3)


def test_attention_is_followed(model):
    analysed = model.attention(images=2, steps=3)
    assert len(analysed.sigmas) == 3 and analysed.layers


def test_what_cannot_be_is_one_line(run, model, tmp_path):
    for action, line in (
        (lambda: model.sample(labels=[12]), "label 12 is outside the classes 0-9"),
        (lambda: model.sample(labels="cat"), "'cat' is a name, .* known by number only"),
        (lambda: model.sample(seeds=-1), "whole number in"),
        (lambda: model.sample(colour="red"), "colour is unknown"),
        (lambda: model.sample(sampler="hun"), "hun is unknown: use"),
        (lambda: model.denoise(np.zeros((2, 4, 4, 1)), 1.0), r"it must be \(N, 8, 8, 1\)"),
        (lambda: model.decode(np.zeros((2, 4, 4, 4))), "there is no autoencoder"),
        (lambda: DiffiT.load(tmp_path), "holds no run"),
        (lambda: DiffiT.load(tmp_path / "w.safetensors", raw=True), "holds one average"),
    ):
        with pytest.raises(UserError, match=line) as error:
            action()
        assert "\n" not in str(error.value)


def test_an_exported_file_draws_what_its_run_draws(latent_run, latent_model, tmp_path):
    """It carries its settings and the names of its classes, and has a card that says so."""
    workdir = tmp_path / "named"
    workdir.mkdir()
    for entry in latent_run[0].iterdir():
        (workdir / entry.name).symlink_to(entry)
    workdirs.write_classes(workdir, [f"kind {number}" for number in range(10)])
    file = tmp_path / "ours.safetensors"
    workdir_to_weights(workdir, weights=file)
    model = DiffiT.load(file)
    assert model.class_names[3] == "kind 3"
    plain = DiffiT.load(latent_run[0])
    named = model.sample(labels=["kind 3", "kind 7"], seeds=range(3))
    np.testing.assert_array_equal(named, plain.sample(labels=[3, 7], seeds=range(3)))
    card = (tmp_path / "ours.md").read_text()
    assert "kind 0" in card and "DiffiT.load" in card and "not been\nmeasured" in card


def test_latents_that_lie_there_are_decoded_as_samples_are(latent_run, vae, tmp_path):
    """To the same images; a file for each of them, in a folder of its class; and again nothing."""
    latents = sample(latent_run[0], seeds=range(5), labels=[1, 2], output=tmp_path / "latents.npz")
    wanted = sample(
        latent_run[0],
        seeds=range(5),
        labels=[1, 2],
        output=tmp_path / "s.npz",
        decoding=Decoding(vae),
        images="png",
    )
    path = decode(latents, decoding=Decoding(vae), images="webp")
    assert path.name == "samples_5x64x64x3.npz"
    for one, other in zip(read(path), read(wanted), strict=True):
        np.testing.assert_array_equal(one, other)
    written = Path(path).stat().st_mtime_ns
    assert Path(decode(latents, decoding=Decoding(vae))).stat().st_mtime_ns == written
    files = {entry.relative_to(tmp_path / "s") for entry in (tmp_path / "s").glob("*/*.png")}
    assert {str(file) for file in files} == {f"{1 + n % 2}/{n:07d}.png" for n in range(5)}
    picture = np.asarray(Image.open(tmp_path / "s" / "2" / "0000003.png"))
    np.testing.assert_array_equal(picture, read(wanted)[0][3])
    assert len(list((tmp_path / "samples_5x64x64x3").glob("*/*.webp"))) == 5
    with pytest.raises(UserError, match="holds images already"):
        decode(wanted, decoding=Decoding(vae))
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "mine.txt").touch()
    with pytest.raises(UserError, match="holds no samples: move it away"):
        sample(
            latent_run[0],
            seeds=[0],
            output=tmp_path / "t.npz",
            decoding=Decoding(vae),
            images="png",
        )
