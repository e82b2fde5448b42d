"""Images of a latent run, by an autoencoder, and more images of samples."""

import json

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file
from support.configs import small_config
from support.fid import VAE, save_vae

from diffit_jax.errors import UserError
from diffit_jax.experiment.spaces import LatentSpace
from diffit_jax.interop import diffusers
from diffit_jax.sampling.decode import decode
from diffit_jax.sampling.decoder import Decoding
from diffit_jax.sampling.sample import sample


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return save_vae(tmp_path_factory.mktemp("vae") / "sd-vae-ft-ema")


def arrays(path):
    with np.load(path) as file:
        return file["arr_0"], file["arr_1"]


def test_samples_are_decoded(latent_run, vae, tmp_path):
    """As the autoencoder alone decodes the run's latents; three on two devices, in two batches."""
    workdir = latent_run[0]
    latents, labels = arrays(sample(workdir, seeds=range(3), output=tmp_path / "latents.npz"))
    decoding = Decoding(vae)
    path = sample(workdir, seeds=range(3), output=tmp_path / "samples.npz", decoding=decoding)
    images, same_labels = arrays(path)
    assert latents.dtype == np.float32 and latents.shape == (3, 8, 8, 4)
    assert images.dtype == np.uint8 and images.shape == (3, 64, 64, 3)
    np.testing.assert_array_equal(labels, same_labels)
    module, variables = diffusers.load(VAE)
    decoded = jax.jit(lambda z: module.apply(variables, z, method="decode"))(latents / 0.18215)
    wanted = np.clip(127.5 * np.asarray(decoded) + 128, 0, 255)  # the run's pixel_rounding is edm
    edge = abs(wanted - np.rint(wanted)) < 0.01
    assert (abs(images.astype(int) - np.floor(wanted)) <= edge).all()


def test_a_decoded_request_is_another_one(latent_run, vae, tmp_path):
    workdir, output = latent_run[0], tmp_path / "s.npz"
    sample(workdir, seeds=range(2), output=output, decoding=Decoding(vae))
    before = output.stat().st_mtime_ns
    sample(
        workdir, seeds=range(2), output=output, decoding=Decoding(vae, chunk_size=1)
    )  # there already
    assert output.stat().st_mtime_ns == before
    for other in (None, Decoding(vae, "bfloat16")):
        with pytest.raises(UserError, match=r"s\.npz is there already .* another autoencoder"):
            sample(workdir, seeds=range(2), output=output, decoding=other)


def test_images_by_class_and_of_trajectories(latent_run, vae, tmp_path):
    """A row for each of three labels, with its name, in columns of 64 pixels; and two rows of three
    frames, the last of which is the sample."""
    path = sample(
        latent_run[0],
        seeds=range(12),
        labels="3,1,7",
        output=tmp_path / "s.npz",
        decoding=Decoding(vae),
        by_class=True,
        frames=3,
    )
    images, labels = arrays(path)
    by_class = np.asarray(Image.open(tmp_path / "s.classes.png"))
    margin = by_class.shape[1] - (4 * 65 - 1)  # four of each
    assert by_class.shape[0] == 3 * 65 - 1 and by_class[:65, :margin].any() and margin < 20
    by_class = by_class[:, margin:]
    for row, label in enumerate((1, 3, 7)):
        for column, image in enumerate(images[labels == label]):
            cell = by_class[65 * row : 65 * row + 64, 65 * column : 65 * column + 64]
            np.testing.assert_array_equal(cell, image)
    frame_indices = np.asarray(Image.open(tmp_path / "s.trajectory.png"))
    assert frame_indices.shape == (8 * 65 - 1, 3 * 65 - 1, 3)
    last = frame_indices[:64, 2 * 65 :].astype(int)
    assert (last != images[0]).mean() < 1e-3 and abs(last - images[0]).max() <= 1


def test_what_does_not_go_together(latent_run, run, vae, tmp_path):
    cases = (
        (latent_run, dict(frames=5), "--trajectory is 5: the sampler has 4 steps"),
        (run, dict(decoding=Decoding(vae)), "images already: leave out --vae"),
        (latent_run, dict(decoding=Decoding(tmp_path)), "name a folder as diffusers saves it"),
    )
    for (workdir, _), asked, message in cases:
        with pytest.raises(UserError, match=message):
            sample(workdir, seeds=range(2), output=tmp_path / "n" / "s.npz", **asked)
    assert not (tmp_path / "n").exists()


def test_latents_of_another_kind():
    class OfEight:
        channels = 8

    with pytest.raises(UserError, match="latents of 8 channels, the network makes 4"):
        LatentSpace("sd-vae-ft-ema").decoded(OfEight(), (8, 8, 4))


def test_a_grid_by_class_of_a_model_without_classes(tmp_path):
    config = small_config(model__num_classes=0, training__label_dropout=0.0)
    config.sampling.guidance = {"kind": "none"}
    (tmp_path / "config.json").write_text(config.to_json())
    with pytest.raises(UserError, match="unconditional: leave out --grid"):
        sample(tmp_path, seeds=range(2), by_class=True)


def scaled(folder, factors=(), **config):
    """The autoencoder with another config, and tensors multiplied by factors."""
    save_vae(folder, **config)
    weights = next(folder.glob("*.safetensors"))
    tensors = load_file(weights)
    for name, factor in factors:
        tensors[name] = tensors[name] * np.float32(factor)
    weights.unlink()  # a link to the golden one
    save_file(tensors, weights)
    return folder


def test_images_that_are_not_finite_are_named(latent_run, tmp_path):
    """Of latents that are, by weights that are: black they would pass as images."""
    vae = scaled(tmp_path / "vae", [("decoder.conv_in.weight", 1e22)])
    path = tmp_path / "s.npz"
    with pytest.raises(UserError, match=r"some of its samples are not finite \(2, of seeds 0-1\)"):
        sample(latent_run[0], seeds=range(2), output=path, decoding=Decoding(vae))
    record = json.loads(path.with_suffix(".json").read_text())
    assert record["not_finite"] == {"count": 2, "seeds": [0, 1]}
    latents = sample(latent_run[0], seeds=range(2), output=tmp_path / "l.npz")
    with pytest.raises(UserError, match="not finite"):
        decode(latents, decoding=Decoding(vae), output=tmp_path / "d.npz")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dict(scaling_factor=0.13025), "latent_scale 0.13025 .*latents have 0.18215"),
        (dict(shift_factor=0.1), "latent_mean 0.1 .*latents have 0 "),
        (
            dict(latents_mean=[0.0] * 4, latents_std=[1.0, 2.0, 1.0, 1.0]),
            "latent_scale 1, 0.5 .*latents have 0.18215",
        ),
    ],
)
def test_an_autoencoder_of_another_scale_is_refused(latent_run, tmp_path, config, message):
    vae = scaled(tmp_path / "vae", **config)
    with pytest.raises(UserError, match=rf"--vae has {message}"):
        sample(latent_run[0], seeds=range(2), output=tmp_path / "s.npz", decoding=Decoding(vae))
    assert not (tmp_path / "s.npz").exists()


def test_one_scale_may_be_written_for_each_channel(latent_run, tmp_path):
    vae = scaled(tmp_path / "vae", latents_mean=[0.0] * 4, latents_std=[1 / 0.18215] * 4)
    sample(latent_run[0], seeds=range(2), output=tmp_path / "s.npz", decoding=Decoding(vae))
