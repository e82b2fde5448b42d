"""DDPM and DDIM sampling against golden trajectories and their formulas in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.golden import WEIGHTS, evaluate, golden

from diffit_jax import models
from diffit_jax.diffusion.ddpm import DDPM
from diffit_jax.diffusion.guidance import PowerCosine, apply_guidance, unguided
from diffit_jax.diffusion.samplers import DDIM, Ancestral
from diffit_jax.errors import UserError
from diffit_jax.interop import official

PROCESS = DDPM()


@pytest.fixture(scope="module")
def network_a():
    return official.load(WEIGHTS["a"])


# --- Trajectories


@pytest.mark.parametrize("name", ["ddpm25_cfg", "ddim25_cfg"])
def test_trajectories_golden(network_a, name):
    """Guided trajectories of 25 steps, bound 1e-5 of each array's maximum (a float32 port measures
    1e-6)."""
    module, variables = network_a
    data = golden(f"{name}.npz")
    steps = PROCESS.schedule_for("25")
    np.testing.assert_array_equal(steps.timesteps, data["timestep_map"])
    np.testing.assert_allclose(steps.betas, data["betas"], rtol=0, atol=1e-12)
    fresh = data["noise"] if "noise" in data else np.zeros((25, *data["x_T"].shape), np.float32)
    noise = jnp.asarray(np.concatenate([data["x_T"][None], fresh]))
    # The scale is exactly 1 or it is not: skipping more would be faster and less exact than these
    # bounds.
    guidance = PowerCosine(
        scale=float(data["cfg_scale"]), power=float(data["scale_pow"]), channels=3, skip_tolerance=0
    )
    inputs = []

    def draw(variables):
        network = models.as_network(module, variables)

        def recorded(x, timestep, conditioning):
            # Without the unconditional copies.
            jax.debug.callback(
                lambda x: inputs.append(np.asarray(x)), x[:: len(x) // 2], ordered=True
            )
            return network(x, timestep, conditioning)

        guided = apply_guidance(guidance, recorded, PROCESS.time_of, null_label=10)
        sampler = Ancestral(25) if name == "ddpm25_cfg" else DDIM(25)
        labels = {"label": jnp.asarray(data["y"])}
        return sampler.draw(PROCESS, guided, lambda index: noise[index], labels).samples

    final = jax.jit(draw)(variables)
    jax.effects_barrier()
    assert len(inputs) == 25
    visited = [*inputs[1:], np.asarray(final)]  # x after each step
    close = lambda ours, expected: np.testing.assert_allclose(
        ours, expected, rtol=0, atol=1e-5 * np.abs(expected).max()
    )
    close(visited[0], data["first_x"])
    for done, expected in zip(data["inter_steps_done"], data["inter_x"], strict=True):
        close(visited[done - 1], expected)
    close(final, data["final_x"])

    guided = apply_guidance(
        guidance,
        lambda *inputs: evaluate(module, variables, *inputs),
        PROCESS.time_of,
        null_label=10,
    )
    level = jnp.full(2, 999)
    scale = guided.scales(steps.sqrt_recipm1_alphas_cumprod[-1:])[0]
    y = guided.mixed(jnp.asarray(data["x_T"]), level, {"label": jnp.asarray(data["y"])}, scale)
    close(PROCESS.predict(y, jnp.asarray(data["x_T"]), jnp.full(2, 24), steps).x0, data["first_x0"])


def plain_loop(process, network, noise, steps, eta=None, clip=False):
    """DDPM (eta None) or DDIM in float64, from the formulas as printed."""
    x = noise[0].astype(np.float64)
    alphas = steps.alphas_cumprod
    for index, k in enumerate(reversed(range(len(steps)))):
        before = alphas[k - 1] if k else 1.0
        y = network(x, steps.timesteps[k])
        epsilon, v = y[..., :1], y[..., 1:]
        x0 = (x - np.sqrt(1 - alphas[k]) * epsilon) / np.sqrt(alphas[k])
        if clip:
            x0 = np.clip(x0, -1, 1)
            epsilon = (x - np.sqrt(alphas[k]) * x0) / np.sqrt(1 - alphas[k])
        z = noise[index + 1] if k else 0
        if eta is None:
            beta = 1 - alphas[k] / before
            # The last step adds no noise.
            tilde = beta * (1 - before) / (1 - alphas[k]) if k else 1.0
            mean = (
                np.sqrt(before) * beta / (1 - alphas[k]) * x0
                + np.sqrt(1 - beta) * (1 - before) / (1 - alphas[k]) * x
            )
            x = mean + np.exp(0.5 * ((v + 1) / 2 * np.log(beta) + (1 - v) / 2 * np.log(tilde))) * z
        else:
            spread = eta * np.sqrt((1 - before) / (1 - alphas[k]) * (1 - alphas[k] / before))
            x = np.sqrt(before) * x0 + np.sqrt(1 - before - spread**2) * epsilon + spread * z
    return x


@pytest.mark.parametrize("respacing", ["7", "ddim20", "5,3,2", "1"])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("eta", [None, 0.0, 0.7, 1.0])
def test_samplers_equal_their_formulas(eta, clip, respacing):
    steps = PROCESS.schedule_for(respacing)
    noise = np.random.default_rng(0).normal(size=(len(steps) + 1, 3, 2, 2, 1)).astype(np.float32)

    def network(x, t, xp=np):
        return xp.concatenate([xp.sin(x) + t / 2000, 0.5 * xp.cos(x)], axis=-1)

    def draw():
        evaluate = unguided(lambda x, t, _: network(x, t[:, None, None, None], jnp))
        given = lambda index: jnp.asarray(noise)[index]
        settings = dict(num_steps=1, respacing=respacing, clip_denoised=clip)
        sampler = Ancestral(**settings) if eta is None else DDIM(**settings, eta=eta)
        return sampler.draw(PROCESS, evaluate, given, {}).samples

    expected = plain_loop(PROCESS, network, noise, steps, eta, clip)
    ours = jax.jit(draw)()
    # float32 of values up to 150 times as large on the way (without clipping).
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4 * max(1, np.abs(expected).max()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(schedule="square"), "process.schedule is 'square': use linear, cosine"),
        (dict(variance="free"), "process.variance is 'free': use learned_range"),
        (dict(loss_type="l1"), "process.loss_type is 'l1': use hybrid"),
        (dict(loss_type="mse"), "loss_type mse does not fit variance learned_range"),
        (dict(variance="fixed_small"), "loss_type hybrid does not fit variance fixed_small"),
        (dict(num_timesteps=1), "process.num_timesteps is 1: it must be between 2 and 1000000"),
        (dict(respacing="2000"), "more steps than the schedule's 1000"),
    ],
)
def test_impossible_processes(arguments, message):
    with pytest.raises(UserError, match=message):
        DDPM(**arguments)


def test_step_counts_above_the_schedule():
    with pytest.raises(UserError, match="num_steps 1001 is more than the schedule's 1000"):
        PROCESS.sigmas(1001)
    with pytest.raises(UserError, match="eta is -1: it must be at least 0"):
        DDIM(2, eta=-1)
