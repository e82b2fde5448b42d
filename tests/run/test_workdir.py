"""Configs of work directories: of other versions and programs, and what may change under a run."""

import json
import shutil

import pytest
from support.configs import small_latent_config

from diffit_jax import limits
from diffit_jax.errors import UserError
from diffit_jax.experiment import config as experiment
from diffit_jax.run import workdir
from diffit_jax.sampling.sample import sample
from diffit_jax.training.train import train

# --- Configs of other versions and programs


@pytest.fixture
def mine(latent_run, tmp_path):
    shutil.copytree(latent_run[0], tmp_path / "run")
    return tmp_path / "run"


def edited(workdir, edit):
    path = workdir / "config.json"
    config = json.loads(path.read_text())
    edit(config)
    path.write_text(json.dumps(config))
    return path


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda c: c["training"].update(ema_decay=0.99),
            "has the key training.ema_decay, which this version of diffit_jax does not know",
        ),
        (
            lambda c: c.update(losses={}),
            "has the key losses, which this version of diffit_jax does not know",
        ),
        (
            lambda c: c["model"].pop("depth") and c["model"].update(layers=2),
            "has the key model.layers, which this version",
        ),
        (
            lambda c: c["training"].pop("batch_size"),
            "has no key training.batch_size, which this version of diffit_jax needs",
        ),
        (lambda c: c.pop("ema"), "has no key ema, which this version of diffit_jax needs"),
        (
            lambda c: c["model"].update(hidden_size=18),
            "config.json: hidden_size 18 is not a multiple of num_heads",
        ),
        (lambda c: c["model"].update(name="unet"), "config.json: config key model.name is 'unet'"),
        (
            lambda c: c.update(model="unet"),
            "config.json: config key model is 'unet': it must be a section",
        ),
    ],
)
def test_a_config_of_another_version_is_named_with_its_key(mine, edit, message):
    path = edited(mine, edit)
    for action in (
        lambda: sample(mine, seeds=[0]),
        lambda: train(small_latent_config(), workdir=mine),
    ):
        with pytest.raises(UserError) as error:
            action()
        assert (
            str(path) in str(error.value)
            and message in str(error.value)
            and "\n" not in str(error.value)
        )


def test_keys_that_change_no_number_may_be_missing(mine):
    """An older version did not have them: the defaults serve."""

    def older(config):
        for name in (
            "log_steps",
            "grid_steps",
            "checkpoint_steps",
            "keep_checkpoints",
            "grid_images",
        ):
            config["training"].pop(name, None)
        config.pop("mesh", None)

    edited(mine, older)
    sample(mine, seeds=[0])
    assert int(train(small_latent_config(training__total_steps=7), workdir=mine).step) == 7


@pytest.mark.parametrize(
    "content",
    ['{"foo": 1}', '{"model_type": "bert", "hidden_size": 768}', "[]", "3", '"text"', "{", ""],
)
def test_another_programs_config(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    for action in (
        lambda: sample(tmp_path, seeds=[0]),
        lambda: train(small_latent_config(), workdir=tmp_path),
    ):
        with pytest.raises(UserError) as error:
            action()
        assert "config.json" in str(error.value) and "\n" not in str(error.value)
    assert (tmp_path / "config.json").read_text() == content


def test_checkpoints_without_a_config_are_nobodys(mine):
    """Deleted by mistake: a config with another seed would go on from them silently."""
    (mine / "config.json").unlink()
    with pytest.raises(
        UserError,
        match=r"holds step 6 of a run without its config\.json: put it back, or choose another "
        r"workdir",
    ):
        train(small_latent_config(seed=1), workdir=mine)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (
            {"optimizer": {"learning_rate": 1e-3, "warmup_steps": 4, "name": "lamb"}},
            "optimizer.name = adam, this config has lamb",
        ),
        ({"model__slim_tmsa": True}, "model.slim_tmsa = False"),
        ({"model__time_in": "adaln"}, "model.time_in = tmsa, this config has adaln"),
        ({"model__time_embedding": "fourier"}, "model.time_embedding = positional"),
        ({"seed": 1}, "seed = 0"),
        ({"data__name": "digits"}, "data.name|has images of"),
        ({"training__label_dropout": 0.2}, "training.label_dropout = 0.1"),
    ],
)
def test_what_may_not_change_under_a_run(mine, change, key):
    with pytest.raises(UserError, match=key):
        train(small_latent_config(training__total_steps=8, **change), workdir=mine)


def test_free_keys_are_marked_beside_their_fields():
    """And change no number: they are not in what is compared with the run."""
    model = experiment.build(small_latent_config()).model
    settings = workdir.number_settings("model", model)
    assert {"remat", "attention", "scan_unroll"}.isdisjoint(settings)
    assert settings["name"] == "latent_diffit" and {"dtype", "depth"} < settings.keys()
    free = {
        f"{section}.{name}"
        for section, cls in experiment.section_classes(small_latent_config()).items()
        for name, field in experiment.keys_of(section, cls).items()
        if limits.is_resumable(field.type)
    }
    assert free == {
        "data.data_dir",
        "ema.snapshot_steps",
        "model.attention",
        "model.remat",
        "model.scan_unroll",
        "training.accumulation",
        "training.checkpoint_minutes",
        "training.checkpoint_steps",
        "training.grid_images",
        "training.grid_steps",
        "training.keep_checkpoints",
        "training.keep_every_steps",
        "training.wandb",
        "training.log_steps",
        "training.max_bad_steps",
        "training.total_steps",
    }
