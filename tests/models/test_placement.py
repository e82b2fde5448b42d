"""Networks say by name which weight they need: every name is a parameter's path."""

import jax
import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict
from support.configs import small_config, small_latent_config

from diffit_jax import models
from diffit_jax.experiment import build
from diffit_jax.models.placement import Placement, nowhere, under
from diffit_jax.runtime import contents

CONFIGS = {
    "image": small_config(model__channels=(8, 16), model__num_blocks=(1, 2), model__head_width=8),
    "augmented": small_config(
        model__augment_labels=9, augmentation=ConfigDict({"probability": 0.1})
    ),
    "latent": small_latent_config(),
    "slim": small_latent_config(model__slim_tmsa=True),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_path_asked_for_is_a_parameters_path(name):
    """And every matrix is asked for: one that is not would not be gathered before its product."""
    model = build(CONFIGS[name]).model
    variables = jax.eval_shape(lambda: models.init_variables(model, jax.random.key(0)))
    asked, placed = set(), []

    def weight(path, value):
        asked.add(path)
        return value

    def activation(x):
        placed.append(x.shape)
        return x

    x_BHWC = jax.ShapeDtypeStruct((2, *model.sample_shape), jnp.float32)
    level_B, label_B = jnp.zeros(2), {"label": jnp.zeros(2, jnp.int32)}
    if name == "augmented":
        label_B["augment"] = jnp.zeros((2, 9))
    with under(Placement(activation=activation, weight=weight)):
        jax.eval_shape(
            lambda v, x: models.as_network(model, v)(x, level_B, label_B), variables, x_BHWC
        )
    shapes = dict(contents.named(variables["params"]))
    assert asked <= shapes.keys(), asked - shapes.keys()
    convolutions = {path for path, leaf in shapes.items() if leaf.shape[-4:-2] == (3, 3)}
    matrices = {path for path in shapes if path.endswith("kernel")} - convolutions
    assert asked == matrices
    assert placed and all(shape[0] == 2 for shape in placed)


def test_a_placement_ends_with_its_block():
    seen = []
    record = Placement(activation=lambda x: seen.append("outer") or x, platform="tpu")
    from diffit_jax.models.placement import placed, platform

    with under(record):
        placed(jnp.zeros(1))
        with nowhere():
            placed(jnp.zeros(1))
            assert platform() == "tpu"
    placed(jnp.zeros(1))
    assert seen == ["outer"] and platform() == "cpu"
