"""Networks say of each weight how it is divided, and ask for it where it is needed."""

import jax
import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict
from support.configs import small_config, small_latent_config

from diffit_jax import models
from diffit_jax.experiment.config import build
from diffit_jax.models.diffit.latent import LatentDiffiT
from diffit_jax.models.placement import Placement, no_placement, use_placement
from diffit_jax.runtime import parallel

CONFIGS = {
    "image": small_config(model__channels=(8, 16), model__num_blocks=(1, 2), model__head_width=8),
    "augmented": small_config(
        model__augment_labels=9, augmentation=ConfigDict({"probability": 0.1})
    ),
    "latent": small_latent_config(),
    "slim": small_latent_config(model__slim_tmsa=True),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_matrix_is_asked_for_with_its_axes(name):
    """One that is not would not be gathered before its product."""
    model = build(CONFIGS[name]).model
    variables = jax.eval_shape(lambda: models.init_variables(model, jax.random.key(0)))
    asked, placed = [], []

    def weight(axes, value):
        asked.append((value.shape, axes))
        return value

    def activation(x):
        placed.append(x.shape)
        return x

    x_BHWC = jax.ShapeDtypeStruct((2, *model.sample_shape), jnp.float32)
    level_B, label_B = jnp.zeros(2), {"label": jnp.zeros(2, jnp.int32)}
    if name == "augmented":
        label_B["augment"] = jnp.zeros((2, 9))
    with use_placement(Placement(activation=activation, weight=weight)):
        jax.eval_shape(
            lambda v, x: models.as_network(model, v)(x, level_B, label_B), variables, x_BHWC
        )
    metadata, shapes = models.parameter_metadata(model), dict(parallel.named(variables["params"]))
    assert metadata.keys() == shapes.keys()
    matrices = []
    for path, leaf in shapes.items():
        stacked = path.split("/")[0] in model.stacked
        shape = leaf.shape[1:] if stacked else leaf.shape
        if path.endswith("kernel") and shape[:2] != (3, 3):
            matrices.append((shape, metadata[path].axes))
    assert sorted(map(str, set(asked))) == sorted(map(str, set(matrices)))
    assert placed and all(shape[0] == 2 for shape in placed)


def test_a_placement_ends_with_its_block():
    seen = []
    record = Placement(activation=lambda x: seen.append("outer") or x, platform="tpu")
    from diffit_jax.models.placement import placed, platform

    with use_placement(record):
        placed(jnp.zeros(1))
        with no_placement():
            placed(jnp.zeros(1))
            assert platform() == "tpu"
    placed(jnp.zeros(1))
    assert seen == ["outer"] and platform() == "cpu"


def test_a_network_is_traced_once_for_its_axes():
    """The sampler asks for them for each of its arrays."""
    model = LatentDiffiT(input_size=4, hidden_size=8, depth=1, num_heads=1, num_classes=2)
    same = model.clone()
    assert models.parameter_metadata(model) is models.parameter_metadata(same)
