"""DDPM++ and NCSN++ against EDM's own outputs and gradients, and a float64 network."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import numpy_network
from support.configs import small_config
from support.golden import GOLDEN

from diffit_jax import models
from diffit_jax.errors import UserError
from diffit_jax.experiment.config import build
from diffit_jax.interop import songunet
from diffit_jax.models import SongUNet
from diffit_jax.runtime.backend import enable_x64


@pytest.mark.parametrize("name", ["ddpmpp", "ncsnpp"])
def test_outputs_and_gradients_are_edms(name):
    """Bounds of tests/golden/README.md; measured 2e-6 to 5e-6, and 2e-5 of a gradient's maximum."""
    golden = np.load(GOLDEN / f"edm_{name}.npz")
    model, variables = songunet.load(GOLDEN / f"edm_{name}.safetensors")
    x, target = (jnp.asarray(golden[key].transpose(0, 2, 3, 1)) for key in ("x", "target"))
    conditioning = {"augment": jnp.asarray(golden["augment_labels"])}
    if model.num_classes:
        conditioning["label"] = jnp.asarray(golden["class_labels"].argmax(-1))
    level = jnp.asarray(golden["noise_labels"])

    def loss(params, conditioning):
        network = models.as_network(model, {**variables, "params": params})
        out = network(x, level, conditioning)
        return jnp.mean((out - target) ** 2), out

    both = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (_, out), gradient = both(variables["params"], conditioning)
    np.testing.assert_allclose(out.transpose(0, 3, 1, 2), golden["out"], rtol=0, atol=2e-5)
    plain = {key: value for key, value in conditioning.items() if key == "label"}
    (_, out), _ = both(variables["params"], plain)
    np.testing.assert_allclose(
        out.transpose(0, 3, 1, 2), golden["out_no_augment"], rtol=0, atol=2e-5
    )
    checked = 0
    for leaf in songunet.leaves_of(model):
        (their_name,), collection = leaf.names, leaf.path.partition("/")[0]
        if collection != "params" or f"grad/{their_name}" not in golden:
            continue
        ours = gradient
        for key in leaf.path.split("/")[1:]:
            ours = ours[key]
        expected = leaf.to_ours(golden[f"grad/{their_name}"])
        bound = 1e-4 * np.abs(expected).max()
        if leaf.path.endswith("qkv_bias"):  # the key's part is rounding there, and 0 here
            ours, expected = np.delete(ours, 1, 0), np.delete(expected, 1, 0)
        np.testing.assert_allclose(ours, expected, rtol=0, atol=bound, err_msg=their_name)
        checked += 1
    assert checked == sum(key.startswith("grad/") for key in golden.files)


SMALL = SongUNet(
    8,
    2,
    channels=8,
    channel_mults=(2, 1, 2),
    num_blocks=1,
    attention_sizes=(4,),
    num_classes=3,
    dtype=jnp.float64,
)


@pytest.mark.parametrize(("family", "tmsa"), [("ddpmpp", "listed"), ("ncsnpp", "all")])
def test_three_levels_are_the_formulas(family, tmsa):
    """What the golden networks have not: a second residual of NCSN++, attention of the lowest level
    alone, a first level as wide as none other, TMSA; and a gradient for every parameter."""
    model = SMALL.clone(family=family, tmsa=tmsa)
    shapes = jax.eval_shape(lambda: models.init_variables(model, jax.random.key(0)))
    draws = np.random.default_rng(0)
    variables = jax.tree.map(lambda leaf: draws.normal(size=leaf.shape) * 0.4, shapes)
    x, levels, labels = draws.normal(size=(2, 8, 8, 2)), np.array([-0.4, 0.9]), np.array([1, 3])
    with enable_x64(True):

        def loss(params):
            network = models.as_network(model, {**variables, "params": params})
            out = network(jnp.asarray(x), jnp.asarray(levels), {"label": jnp.asarray(labels)})
            return jnp.mean(out**2), out

        gradient, out = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
    inputs = zip(x, levels, labels, strict=True)
    expected = np.stack([numpy_network.song_unet(model, variables, *one) for one in inputs])
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-10 * np.abs(expected).max())
    for path, leaf in jax.tree_util.tree_flatten_with_path(gradient)[0]:
        assert np.any(leaf), jax.tree_util.keystr(path)
    has_tmsa = {
        name: "relative_position_bias" in block["attention"]
        for name, block in shapes["params"].items()
        if "attention" in block
    }
    assert has_tmsa == {
        "dec_2x2_in0": tmsa == "all",
        "dec_4x4_block1": True,
        "enc_4x4_block0": True,
    }


@pytest.mark.parametrize(
    ("mults", "settings", "parameters", "giga"),
    [
        ((2, 2, 2), dict(augment_labels=9, family="ncsnpp"), 56_397_827, 21.39),
        ((1, 2, 2, 2), dict(image_size=64, augment_labels=9), 61_805_571, 41.86),
    ],
)
def test_sizes_are_edms(mults, settings, parameters, giga):
    model = SongUNet(**{"image_size": 32, "channel_mults": mults, **settings})
    shapes = jax.eval_shape(lambda: models.init_variables(model, jax.random.key(0)))["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == parameters
    assert round(models.model.traced_multiply_adds(model) / 1e9, 2) == giga


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(image_size=6), "6 is not divisible by 4"),
        (dict(attention_sizes=(16,)), "attention_sizes has 16, but the levels are 8, 4, 2"),
        (dict(channels=12), "channels 12 are not a multiple of 8"),
        (dict(family="adm"), "model.family is 'adm': use ddpmpp, ncsnpp"),
        (dict(time_in="bias"), "model.time_in is unknown"),
    ],
)
def test_networks_that_cannot_be(change, message):
    sizes = dict(image_size=8, channels=8, channel_mults=(1, 1, 1), attention_sizes=(4,))
    config = small_config(model=dict(name="songunet", **(sizes | change)))
    with pytest.raises(UserError, match="(?s)" + message.replace("(", r"\(")):
        build(config)
