"""Samples that are pytrees: a pair of arrays, drawn together."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffit_jax.diffusion import samplers
from diffit_jax.diffusion.ddpm import DDPM
from diffit_jax.diffusion.edm import EDM
from diffit_jax.diffusion.general_sampler import General
from diffit_jax.diffusion.guidance import Constant, apply_guidance, unguided
from diffit_jax.diffusion.samplers import DDIM, Ancestral, DPMSolver, Euler, Heun

SEEDS = jnp.arange(5, dtype=jnp.uint32)
SHAPES = {"image": (4, 4, 3), "latent": {"z": (2, 2, 4)}}
PAIR = samplers.seeded_noise(SEEDS, SHAPES)
METHODS = {
    "heun": Heun(6, churn_amount=2.0),
    "euler": Euler(6),
    "dpm_solver": DPMSolver(6),
    "general": General(6, churn_amount=2.0, alpha=0.5),
    "ddpm": Ancestral(6),
    "ddim": DDIM(6, eta=0.5),
}


def process_of(name):
    return DDPM(variance="fixed_small", loss_type="mse") if name in ("ddpm", "ddim") else EDM()


def network(x, level, conditioning):
    """Each leaf by itself: what an array's own network would make of it."""
    return jax.tree.map(lambda leaf: jnp.tanh(leaf / (1 + level[:, None, None, None])), x)


@pytest.mark.parametrize("name", METHODS)
def test_a_pair_is_drawn_as_its_arrays_would_be_alone(name):
    """To the bit, where each array has the noise of its leaf; frames too."""
    method, process = METHODS[name], process_of(name)
    drawn = jax.jit(lambda: method.draw(process, unguided(network), PAIR, {}, 3))()
    assert drawn.samples["image"].shape == (5, 4, 4, 3)
    assert drawn.frames["latent"]["z"].shape == (3, 5, 2, 2, 4)
    for pick in (lambda tree: tree["image"], lambda tree: tree["latent"]["z"]):
        noise = lambda index, pick=pick: pick(PAIR(index))
        alone = jax.jit(lambda noise=noise: method.draw(process, unguided(network), noise, {}, 3))()
        np.testing.assert_array_equal(pick(drawn.samples), alone.samples)
        np.testing.assert_array_equal(pick(drawn.frames), alone.frames)


def test_each_leaf_has_keys_of_its_own():
    """A function of seed and path: other leaves beside it change nothing, and an array alone has
    the noise that it always had."""
    shapes = {"a": (3,), "b": (3,)}
    noise = samplers.seeded_noise(SEEDS, shapes)(0)
    assert not np.isin(noise["a"], noise["b"]).any()
    only = samplers.seeded_noise(SEEDS, {"b": (3,)})(0)
    np.testing.assert_array_equal(noise["b"], only["b"])
    keys = samplers.sample_keys(SEEDS)
    np.testing.assert_array_equal(
        samplers.seeded_noise(SEEDS, (2, 2, 1))(4), samplers.step_noise(keys, 4, (2, 2, 1))
    )


def test_guidance_acts_on_the_leaves_and_channels_that_are_named():
    """y_lesser + s (y - y_lesser) there, the plain evaluation elsewhere."""

    def labelled(x, level, conditioning):
        shift = conditioning["label"].astype(jnp.float32)[:, None, None, None]
        return jax.tree.map(lambda leaf: leaf + shift, x)

    x, level = PAIR(0), jnp.ones(5)
    conditioning = {"label": jnp.arange(5)}
    guided = apply_guidance(
        Constant(3.0), labelled, lambda sigma: sigma, null_label=10, acts_on={"latent/z": 2}
    )
    found = guided.mixed(x, level, conditioning, jnp.float32(3.0))
    plain = labelled(x, level, conditioning)
    np.testing.assert_array_equal(found["image"], plain["image"])
    z = found["latent"]["z"]
    np.testing.assert_array_equal(z[..., 2:], plain["latent"]["z"][..., 2:])
    uncond = x["latent"]["z"] + 10.0
    wanted = uncond + 3.0 * (plain["latent"]["z"] - uncond)
    np.testing.assert_allclose(z[..., :2], wanted[..., :2], rtol=1e-6)
