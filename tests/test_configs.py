"""Every config in `configs/` describes an experiment that can be, and the ImageNet ones the
paper's."""

import os

import jax
import numpy as np
import pytest
from flax import traverse_util
from support.configs import CONFIGS, config_of
from support.golden import GOLDEN

from diffit_jax.data.augment import Augmentation
from diffit_jax.data.sources import SyntheticSource
from diffit_jax.diffusion import GUIDANCE
from diffit_jax.diffusion.edm import EDM
from diffit_jax.diffusion.samplers import Ancestral, Heun
from diffit_jax.errors import UserError
from diffit_jax.experiment.config import build
from diffit_jax.run.state import open_training_data
from diffit_jax.runtime import config_files
from diffit_jax.training.train import train

# Made of a data set's manifest: tests/ingest/test_own_data.py and tests/launch/test_notebooks.py.
OF_DATA = ("own_images", "chain")


NAMES = sorted(path.stem for path in CONFIGS.glob("*.py") if path.stem not in OF_DATA)


@pytest.mark.parametrize("name", NAMES)
def test_config_can_be(name):
    config = config_of(name)
    build(config)
    assert config.is_locked


def test_the_papers_table_5_can_be():
    for variant in ("vp", "ve", "edm", "vp_tmsa", "ve_tmsa", "edm_tmsa"):
        model = build(config_files.load(str(CONFIGS / f"cifar10_songunet.py:{variant}"))).model
        assert model.family == ("ncsnpp" if variant.startswith("ve") else "ddpmpp")
        assert model.tmsa == ("all" if variant.endswith("tmsa") else "none")
    with pytest.raises(UserError, match=r"cifar10_songunet\.py:vq is unknown"):
        config_files.load(str(CONFIGS / "cifar10_songunet.py:vq"))


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_as_text(name):
    """A change of a recipe shows in review. RENEW_CONFIGS=1 writes the texts anew."""
    values = traverse_util.flatten_dict(config_of(name).to_dict(), sep=".")
    text = "".join(f"{key} = {value!r}\n" for key, value in sorted(values.items()))
    place = GOLDEN / "configs" / f"{name}.txt"
    if os.environ.get("RENEW_CONFIGS"):
        place.parent.mkdir(exist_ok=True)
        place.write_text(text)
    assert text == place.read_text()


def decay(experiment):
    """Of the average, per update."""
    return 0.5 ** (experiment.training.batch_size / experiment.ema.halflife_images)


def test_imagenet_recipes_are_the_papers():
    for name, size, rate, batch, kind, scale in (
        ("imagenet256_latent", 32, 3e-4, 256, "power_cosine", 4.4),
        ("imagenet512_latent", 64, 1e-4, 512, "constant", 1.49),
    ):
        experiment = build(config_of(name))
        model = experiment.model
        assert (model.input_size, model.hidden_size, model.depth, model.num_heads) == (
            size,
            1152,
            28,
            16,
        )
        assert (experiment.optimizer.learning_rate, experiment.training.batch_size) == (rate, batch)
        np.testing.assert_allclose(1 - decay(experiment), 1e-4, rtol=1e-6)
        sampling = experiment.sampling
        assert sampling.sampler == Ancestral(num_steps=250)
        assert sampling.guidance == GUIDANCE[kind](scale=scale, channels=3)
        assert getattr(sampling.guidance, "power", 4) == 4


def test_pixel_recipes_are_the_papers():
    for name, size, channels, blocks, window, dropout, fraction, rate, batch, steps in (
        ("cifar10", 32, (128, 256, 256), (2, 2, 2), 4, 0.13, 0.12, 1e-3, 512, 18),
        ("cifar10_h1", 32, (128, 256, 256), (4, 4, 4), 4, 0.13, 0.12, 1e-3, 512, 18),
        ("ffhq64", 64, (128, 256, 256, 256), (1, 2, 2, 2), 8, 0.05, 0.15, 2e-4, 256, 40),
        ("ffhq64_h1", 64, (128, 256, 256, 256), (4, 4, 4, 4), 8, 0.05, 0.15, 2e-4, 256, 40),
    ):
        experiment = build(config_of(name))
        model, training = experiment.model, experiment.training
        assert (model.image_size, model.channels, model.num_blocks) == (size, channels, blocks)
        assert (model.window, model.dropout, model.augment_labels) == (window, dropout, 9)
        assert model.num_classes == 0 and experiment.augmentation == Augmentation(fraction)
        assert (experiment.optimizer.learning_rate, training.batch_size) == (rate, batch)
        # EDM: the rate rises over 10 million images, the average's half-life is half a million.
        np.testing.assert_allclose(experiment.optimizer.warmup_steps * batch, 1e7, rtol=1e-4)
        np.testing.assert_allclose(decay(experiment), 0.5 ** (batch / 500_000), rtol=1e-12)
        assert training.total_steps == 200_000
        assert experiment.sampling.sampler == Heun(num_steps=steps)
        assert experiment.process == EDM()


def test_conditional_variants():
    for name in ("cifar10", "cifar10_h1"):
        assert build(config_of(name, "conditional")).model.num_classes == 10
        with pytest.raises(UserError, match=r"cifar10\.py:labelled is unknown"):
            config_of(name, "labelled")


def test_large_batch_scales_the_rate_by_the_root():
    large, paper = (
        build(config_of("imagenet512_latent_large_batch")),
        build(config_of("imagenet512_latent")),
    )
    assert large.training.batch_size == 4096 and large.optimizer.warmup_steps > 0
    np.testing.assert_allclose(
        large.optimizer.learning_rate / paper.optimizer.learning_rate, np.sqrt(4096 / 512)
    )
    images = lambda e: e.training.total_steps * e.training.batch_size
    assert images(large) == images(paper) and large.ema == paper.ema


def test_smaller_sizes_by_name():
    assert build(config_of("imagenet256_latent", "S/2")).model.hidden_size == 384
    with pytest.raises(UserError, match="model size 'H/2' is unknown"):
        config_of("imagenet512_latent", "H/2")


def test_imagenet_says_which_files_it_misses_and_runs_on_synthetic(tmp_path):
    config = config_of("imagenet512_latent", "S/2")
    config.data.data_dir = str(tmp_path / "data")
    with pytest.raises(
        UserError, match=r"there is no .*/data/imagenet512_latents/train.manifest.json"
    ) as error:
        train(config, workdir=tmp_path / "run")
    assert "--config.data.name=synthetic" in str(error.value) and not list(tmp_path.iterdir())
    config.data.name = "synthetic"
    batch = open_training_data(build(config)).read(np.arange(3))
    assert batch["latent"].shape == (3, 64, 64, 4) and batch["latent"].dtype == np.float32


def test_synthetic_latents_are_standard_normal_and_a_function_of_the_index():
    source = SyntheticSource((8, 8, 4), 10, latents=True)
    latents = source.read(np.arange(200))["latent"]
    assert abs(latents.mean()) < 0.02 and abs(latents.std() - 1) < 0.02
    np.testing.assert_array_equal(source.read(np.array([7]))["latent"][0], latents[7])


def test_training_a_small_imagenet_config_on_synthetic_latents(tmp_path):
    """The recipe with a tiny network: two updates, a grid and a checkpoint."""
    config = config_of("imagenet256_latent")
    config.data.name = "synthetic"
    config.model.update(hidden_size=16, depth=2, num_heads=2, input_size=8)
    config.training.update(batch_size=4, total_steps=2, log_steps=1, grid_images=2)
    config.sampling.sampler.num_steps = 3
    state = train(config, workdir=tmp_path)
    assert int(state.step) == 2 and (tmp_path / "grids" / "00000002.png").exists()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))
