"""From own images to training, in pixels and in latents; and latents that others made."""

import json
import zipfile

import jax
import numpy as np
import pytest
from support.configs import config_of
from support.fid import save_tiny_vae
from support.golden import WEIGHTS
from support.images import others_latents, pets, write_folder

from diffit_jax.data.records import open_records
from diffit_jax.errors import UserError
from diffit_jax.ingest.encode import Encoding, encode
from diffit_jax.ingest.import_latents import import_latents
from diffit_jax.ingest.prepare import prepare
from diffit_jax.interop import official
from diffit_jax.run import workdir as workdirs
from diffit_jax.sampling.convert import weights_to_workdir
from diffit_jax.sampling.sample import sample
from diffit_jax.training.held_out import Nearness
from diffit_jax.training.train import train


def short(config):
    """Two updates of a narrow network."""
    with config.unlocked():
        if config.model.name == "image_diffit":
            config.model.update(channels=(8,) * len(config.model.channels), head_width=8)
            config.model.update(num_blocks=(1,) * len(config.model.channels), time_width=16)
        else:
            config.model.update(hidden_size=16, depth=1, num_heads=2)
            config.sampling.sampler.num_steps = 2
        config.training.update(batch_size=4, total_steps=2, log_steps=1, grid_images=2)
        config.model.dtype = "float32"
    return config


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of data sets: `images`, `latents`, and `plain` without labels."""
    folder = tmp_path_factory.mktemp("own")
    source = write_folder(folder / "pets", pets(14, width=8, height=8))
    vae = Encoding(save_tiny_vae(folder / "tiny-vae", scaling_factor=0.7), batch_per_device=1)
    prepare(source, name="images", data_dir=folder, workers=0)
    prepare(source, name="plain", data_dir=folder, unlabelled=True, workers=0)
    encode(source, name="latents", encoding=vae, data_dir=folder, workers=0)
    return folder


@pytest.mark.parametrize("name", ["images", "plain", "latents"])
def test_a_name_is_all_that_training_needs(data, tmp_path, name, monkeypatch):
    """By its path, and by its name alone where the variable says where data sets live; what the
    manifest says stands in config.json."""
    size = ":tiny" if name == "plain" else ""
    config = short(config_of("own_images", f"{data}/{name}{size}"))
    state = train(config, workdir=tmp_path / "run")
    assert int(state.step) == 2 and int(state.skipped) == 0
    written = json.loads((tmp_path / "run/config.json").read_text())
    assert written["model"]["num_classes"] == (0 if name == "plain" else 2)
    assert written["data"]["name"] == name
    assert len(list((tmp_path / "run/grids").glob("*.png"))) == 1
    if name == "latents":
        assert written["data"]["autoencoder"] == "tiny-vae"
        assert written["data"]["latent_scale"] == [0.7] * 4
        assert written["model"]["input_size"] == 4 and written["model"]["input_channels"] == 4
    monkeypatch.setenv("TFDS_DATA_DIR", str(data))
    assert config_of("own_images", name).data.name == name


def test_a_held_out_part_is_watched_and_classes_keep_their_names(tmp_path, caplog):
    """From one key, the FID network's file: the loss, the nearest training images, and FID against
    the part itself; and samples by the names of the classes."""
    source = write_folder(tmp_path / "pets", pets(40, width=8, height=8))
    prepare(source, name="held", data_dir=tmp_path, workers=0, holdout=0.3)
    config = short(config_of("own_images", f"{tmp_path}/held:tiny"))
    assert config.evaluation.loss_steps == 200 and config.augmentation.probability == 1
    with config.unlocked():
        config.evaluation.update(inception="random", count=4, metrics=("fid",), raw=False)
        config.evaluation.loss_steps = 2
    with caplog.at_level("INFO", logger="diffit_jax"):
        train(config, workdir=tmp_path / "run")
    assert "step 2: held-out loss ema" in caplog.text
    assert "of so few it is too high" in caplog.text
    found = json.loads((tmp_path / "run/evaluations/00000002.json").read_text())
    protocol = found["weights"]["ema"]["protocol"]
    assert protocol["reference"]["path"].endswith("run/reference.npz")
    with np.load(tmp_path / "run/reference.npz") as reference:
        kept = reference["arr_0"]
    test = open_records(tmp_path / "held", "test").read(np.arange(len(kept)))["image"]
    np.testing.assert_array_equal(kept, test)

    # The nearest training images, by loops in float64.
    train_images = open_records(tmp_path / "held", "train")
    every = train_images.read(np.arange(len(train_images)))["image"] / 127.5 - 1
    nearest = [min(np.linalg.norm(one - other) for other in every) for one in test / 127.5 - 1]
    nearness = Nearness(train_images, open_records(tmp_path / "held", "test"))
    np.testing.assert_allclose(nearness.held_out, np.median(nearest), rtol=1e-9)
    assert nearness(train_images.read(np.arange(3))["image"]) < 1e-6

    assert json.loads((tmp_path / "run/classes.json").read_text()) == ["cat", "dog"]
    named = sample(tmp_path / "run", seeds=range(3), labels="Dog,cat", output=tmp_path / "n.npz")
    with np.load(named) as arrays:
        assert arrays["arr_1"].tolist() == [1, 0, 1]
    with pytest.raises(UserError, match="no class is named 'dgo': did you mean dog"):
        sample(tmp_path / "run", seeds=range(3), labels="dgo", output=tmp_path / "m.npz")


def test_a_latent_run_goes_on_as_if_it_had_not_stopped(data, tmp_path):
    """The posterior is drawn by the example's key: with six updates at once as with three twice."""
    config = short(config_of("own_images", f"{data}/latents"))
    config.training.update(total_steps=6, checkpoint_steps=3)
    whole = train(config, workdir=tmp_path / "whole")
    config.training.total_steps = 3
    train(config, workdir=tmp_path / "run")
    config.training.total_steps = 6
    twice = train(config, workdir=tmp_path / "run")
    for one, other in zip(
        jax.tree.leaves(whole.params), jax.tree.leaves(twice.params), strict=True
    ):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("latents", {"latent_scale": (0.18215,)}, "was encoded with latent_scale 0.7, the config"),
        ("latents", {"autoencoder": ""}, "holds latents: name images, or set data.autoencoder"),
        ("latents", {"name": "images"}, 'holds images: encode them, or set data.autoencoder=""'),
        ("images", {"name": "plain"}, "has 0 classes, the model 2"),
        ("images", {"name": "other"}, "there is no .*other/train.manifest.json"),
    ],
)
def test_a_manifest_that_disagrees_with_the_config_is_refused(
    data, tmp_path, name, changes, message
):
    config = short(config_of("own_images", f"{data}/{name}"))
    with config.unlocked():
        config.data.update(changes)
        if changes.get("autoencoder") == "":
            config.model.update(input_channels=4)
    with pytest.raises(UserError, match=message):
        train(config, workdir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_without_a_name_or_data_the_config_says_so():
    with pytest.raises(UserError, match=r"name your data: --config own_images:NAME"):
        config_of("own_images")
    with pytest.raises(UserError, match=r"there is no data set .*/nothing/train.manifest.json"):
        config_of("own_images", "/tmp/nowhere/nothing")


def test_released_weights_get_a_new_label_table(tmp_path):
    """Every class begins as "no label" was; nothing else changes."""
    from support.configs import small_latent_config

    config = small_latent_config().to_dict()
    weights_to_workdir(WEIGHTS["a"], workdir=tmp_path / "run", config=config, num_classes=7)
    written = workdirs.read_config(tmp_path / "run")
    assert written["model"]["num_classes"] == 7
    _, theirs = official.load(WEIGHTS["a"])
    from diffit_jax.run.state import setup_experiment
    from diffit_jax.sampling.request import Run

    run = Run(tmp_path / "run")
    ours, _ = run.load(setup_experiment(written, to_train=False))
    table = ours["params"]["time"].pop("label")["embedding"]
    old = theirs["params"]["time"].pop("label")["embedding"]
    assert table.shape == (8, old.shape[1])
    np.testing.assert_array_equal(table, np.tile(old[-1], (8, 1)))
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(one, other)


# --- Latents that others made


@pytest.mark.parametrize(
    ("means", "said"),
    [((5.81, 3.25, 0.12, -2.15), "[0, 1]"), ((0.86, -0.28, 0.22, 0.37), "[-1, 1]")],
    ids=["edm2", "repa"],
)
def test_latents_of_others_become_moments(tmp_path, means, said, caplog):
    """log variance = 2 ln std, channels last, with their labels; the range of pixels is told."""
    arrays = others_latents(tmp_path / "latents.zip", means)
    manifest = import_latents(tmp_path / "latents.zip", name="theirs", data_dir=tmp_path)
    assert ("too pale" in caplog.text) == (said == "[0, 1]")
    assert said in manifest.autoencoder["pixels"] and manifest.class_counts == (8, 8, 8)
    batch = open_records(tmp_path / "theirs", "train").read(np.arange(24))
    assert batch["moments"].shape == (24, 1, 8, 8, 8) and batch["label"].tolist()[:4] == [
        0,
        1,
        2,
        0,
    ]
    for moments, array in zip(batch["moments"], arrays.values(), strict=True):
        np.testing.assert_array_equal(moments[0, ..., :4], array[:4].transpose(1, 2, 0))
        log_variance = 2 * np.log(array[4:].astype(np.float64)).transpose(1, 2, 0)
        np.testing.assert_allclose(moments[0, ..., 4:], log_variance, rtol=1e-6)
    with zipfile.ZipFile(tmp_path / "latents.zip") as archive:
        archive.extractall(tmp_path / "folder")
    import_latents(tmp_path / "folder", name="same", data_dir=tmp_path)
    one, other = (
        tmp_path / name / "train-00000-of-00001.array_record" for name in ("theirs", "same")
    )
    assert one.read_bytes() == other.read_bytes()
    config = config_of("own_images", f"{tmp_path}/theirs")
    np.testing.assert_allclose(config.data.latent_mean, means, atol=0.5)


def test_latents_of_an_unknown_kind_are_refused(tmp_path):
    others_latents(tmp_path / "unknown.zip", (3, 1, 0, -1))
    with pytest.raises(
        UserError, match=r"channel means are .* which neither range of pixels gives"
    ):
        import_latents(tmp_path / "unknown.zip", name="x", data_dir=tmp_path)
    others_latents(tmp_path / "plain.zip", (0.86, -0.28, 0.22, 0.37), labels=False)
    with pytest.raises(UserError, match=r"has no labels in dataset.json: .*--unlabelled"):
        import_latents(tmp_path / "plain.zip", name="x", data_dir=tmp_path)
    assert (
        import_latents(tmp_path / "plain.zip", name="x", data_dir=tmp_path, unlabelled=True).classes
        == ()
    )
    write_folder(tmp_path / "images", pets(12))
    with pytest.raises(UserError, match=r"has no img-mean-std-\*.npy"):
        import_latents(tmp_path / "images", name="y", data_dir=tmp_path)
    assert not (tmp_path / "y").exists()
