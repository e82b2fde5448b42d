"""Samplers against a closed form: for Gaussian data the ideal denoiser, and where the probability
flow ends, are known."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffit_jax.diffusion import SAMPLERS, samplers
from diffit_jax.diffusion.ddpm import DDPM
from diffit_jax.diffusion.edm import EDM
from diffit_jax.diffusion.flow import Flow
from diffit_jax.diffusion.flow_map import FlowMap
from diffit_jax.diffusion.guidance import unguided
from diffit_jax.diffusion.map_sampler import MapSampler
from diffit_jax.diffusion.samplers import DDIM, Ancestral, Euler, Heun
from diffit_jax.diffusion.sde import SDE

MEAN, STD = 0.3, 0.5
SHAPE = (2, 2, 1)
NOISE = samplers.seeded_noise(jnp.arange(64, dtype=jnp.uint32), SHAPE)


def ideal_denoiser(x, sigma, _=None):
    """The posterior mean of data N(MEAN, STD²) under noise of standard deviation sigma."""
    sigma = jnp.reshape(sigma, (-1, 1, 1, 1))
    return MEAN + (x - MEAN) * STD**2 / (STD**2 + sigma**2)


def ideal_epsilon(process, second_half=None):
    """The network of `process` that has the ideal denoiser: epsilon = (x' - D(x'; sigma)) / sigma
    at x' = √(1 + sigma²) x."""
    log_levels = jnp.asarray(
        np.log(process.schedule_for().sqrt_recipm1_alphas_cumprod), jnp.float32
    )

    def network(x, timestep, _):
        sigma = jnp.exp(
            jnp.interp(
                timestep.astype(jnp.float32),
                jnp.arange(len(log_levels), dtype=jnp.float32),
                log_levels,
            )
        )
        sigma = sigma[:, None, None, None]
        noisy = x * jnp.sqrt(1 + sigma**2)
        epsilon = (noisy - ideal_denoiser(noisy, sigma)) / sigma
        return (
            epsilon
            if second_half is None
            else jnp.concatenate([epsilon, jnp.full_like(x, second_half)], axis=-1)
        )

    return network


def end_of_flow(x, sigma):
    """Where the probability flow takes x at noise level sigma: deviations from the mean shrink in
    proportion to √(STD² + sigma²)."""
    return MEAN + (np.asarray(x, np.float64) - MEAN) * STD / np.hypot(STD, sigma)


def errors_of(draw, exact, steps):
    return [
        np.abs(np.asarray(jax.jit(lambda n=n: draw(n))(), np.float64) - exact(n)).max()
        for n in steps
    ]


def edm_case(process, denoise, sampler):
    """(draw, exact) of one of EDM's samplers."""
    noise = np.asarray(NOISE(0), np.float64)

    def exact(steps):
        sigma = process.sigmas(steps)[0]
        return end_of_flow(sigma * noise, sigma)

    method = SAMPLERS[sampler]
    return lambda steps: method(steps).draw(process, unguided(denoise), NOISE, {}).samples, exact


DISCRETE = DDPM(variance="fixed_small", loss_type="mse")
CASES = {
    "edm": (EDM(), ideal_denoiser),
    "ddpm": (DISCRETE, lambda *a: DISCRETE.denoise(ideal_epsilon(DISCRETE), *a)),
}


@pytest.mark.parametrize("process", CASES)
@pytest.mark.parametrize(("sampler", "order"), [("euler", 1), ("heun", 2), ("dpm_solver", 2)])
def test_order_of_convergence(process, sampler, order):
    """Halving the step divides the error by 2 or 4: measured 1.96-1.99, and 4.1-4.7."""
    errors = errors_of(*edm_case(*CASES[process], sampler), steps=(16, 32, 64))
    for coarse, fine in itertools.pairwise(errors):
        assert 0.85 * 2**order < coarse / fine < 1.3 * 2**order
    assert errors[-1] < (0.02 if order == 2 else 0.1)


def test_ddim_is_of_first_order():
    levels = DISCRETE.schedule_for().sqrt_recipm1_alphas_cumprod
    noise = np.asarray(NOISE(0), np.float64)

    def exact(_):
        # x_T is scaled by √alpha_bar.
        return end_of_flow(noise * np.sqrt(1 + levels[-1] ** 2), levels[-1])

    def draw(n):
        return DDIM(n).draw(DISCRETE, unguided(ideal_epsilon(DISCRETE)), NOISE, {}).samples

    errors = errors_of(draw, exact, steps=(25, 50, 100))
    for coarse, fine in itertools.pairwise(errors):
        assert 1.6 < coarse / fine < 2.6
    assert errors[-1] < 0.05


def test_deterministic_ddim_is_eulers_method():
    """The same levels and start, in the two formulations."""
    levels = DISCRETE.schedule_for("20").sqrt_recipm1_alphas_cumprod[::-1]
    in_sigma = jax.jit(
        lambda: Euler(20).solve(unguided(CASES["ddpm"][1]), NOISE, {}, np.append(levels, 0)).samples
    )()
    # Euler starts from sigma · noise, DDIM from unit noise, which stands for √(1 + sigma²) · noise.
    scale = levels[0] / np.hypot(1, levels[0])
    discrete = jax.jit(
        lambda: (
            DDIM(20)
            .draw(DISCRETE, unguided(ideal_epsilon(DISCRETE)), lambda i: scale * NOISE(i), {})
            .samples
        )
    )()
    np.testing.assert_allclose(in_sigma, discrete, atol=2e-4)  # float32 at sigma = 157


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
def test_moments_of_ancestral_sampling_converge(variance):
    """With more steps, mean and variance come to those of the data; with the posterior's variance
    from below, with beta from above."""
    process = DDPM(variance=variance, loss_type="hybrid" if variance == "learned_range" else "mse")
    network = ideal_epsilon(process, second_half=None if variance != "learned_range" else 0.0)
    noise = samplers.seeded_noise(jnp.arange(4096, dtype=jnp.uint32), SHAPE)
    gaps = []
    for count in (25, 100, 400):
        out = np.asarray(
            jax.jit(
                lambda count=count: (
                    Ancestral(count).draw(process, unguided(network), noise, {}).samples
                )
            )(),
            np.float64,
        )
        assert abs(out.mean() - MEAN) < 0.025  # four standard errors are 0.016
        gaps.append(out.std() / STD - 1)
    # Standard error of the standard deviation: 0.55 %.
    assert abs(gaps[2]) < 0.03 and abs(gaps[2]) < 0.6 * abs(gaps[0])
    if variance == "fixed_small":
        assert gaps[0] < -0.02
    if variance == "fixed_large":
        assert gaps[0] > 0.02


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_random_ddim_samples_the_data(eta):
    noise = samplers.seeded_noise(jnp.arange(4096, dtype=jnp.uint32), SHAPE)
    out = jax.jit(
        lambda: (
            DDIM(250, eta=eta).draw(DISCRETE, unguided(ideal_epsilon(DISCRETE)), noise, {}).samples
        )
    )()
    assert abs(float(out.mean()) - MEAN) < 0.025 and abs(float(out.std()) / STD - 1) < 0.04
    deterministic = jax.jit(
        lambda: DDIM(250).draw(DISCRETE, unguided(ideal_epsilon(DISCRETE)), noise, {}).samples
    )()
    assert np.abs(out - deterministic).max() > 0.1


def test_churn_samples_the_data():
    """Stochastic sampling with EDM's churn ends in the data distribution too."""
    noise = samplers.seeded_noise(jnp.arange(8192, dtype=jnp.uint32), (1, 1, 1))
    out = jax.jit(
        lambda: Heun(64, churn_amount=30).draw(EDM(), unguided(ideal_denoiser), noise, {}).samples
    )()
    # Four standard errors and the grid's error.
    assert abs(float(out.mean()) - MEAN) < 0.025 and abs(float(out.std()) - STD) < 0.02


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_frames_are_estimates_of_the_clean_sample(sampler):
    """One at each of the steps asked for; the last step ends at its own. The samples are those
    without frames."""
    discrete = sampler in ("ddpm", "ddim")
    process, network = (DISCRETE, ideal_epsilon(DISCRETE)) if discrete else CASES["edm"]
    method = SAMPLERS[sampler](9)
    if sampler == "sde":  # of flows; its usual last step goes beside its estimate
        process, method = Flow(), SDE(9, last="tweedie", diffusion_norm=0.1)

        def network(z, sigma, _):  # the velocity: (z - x) / t
            t = 1 / (1 + 1 / sigma[:, None, None, None])
            alpha = jnp.maximum(1 - t, 1e-9)
            return (z - ideal_denoiser(z / alpha, t / alpha)) / t

    if sampler == "map":  # to clean data in every step: the exact map of normal data
        process, method = FlowMap(), MapSampler(9, restart=True)

        def network(z, t, told):
            t, r = (each[:, None, None, None] for each in (t, told["next_time"]))
            here, there = (jnp.hypot((1 - one) * STD, one) for one in (t, r))
            end = (1 - r) * MEAN + (z - (1 - t) * MEAN) * there / here
            return (z - end) / (t - r)

    def draw(frames):
        return jax.jit(lambda: method.draw(process, unguided(network), NOISE, {}, frames))()

    plain, drawn = draw(0), draw(3)
    if sampler == "map":  # whose estimates are samples from the first step on
        np.testing.assert_allclose(drawn.frames[-1], drawn.samples, atol=1e-5)
        np.testing.assert_allclose(drawn.frames.std(axis=(1, 2, 3, 4)), STD, rtol=0.1)
        np.testing.assert_allclose(drawn.frames.mean(axis=(1, 2, 3, 4)), MEAN, atol=0.05)
        return
    np.testing.assert_allclose(drawn.samples, plain.samples, atol=1e-6)
    assert plain.frames.shape == (0, 64, *SHAPE) and drawn.frames.shape == (3, 64, *SHAPE)
    np.testing.assert_allclose(drawn.frames[-1], drawn.samples, atol=1e-5)
    # From all noise the best estimate is the mean of the data; later ones are as spread as they.
    spread = np.asarray(drawn.frames).std(axis=(1, 2, 3, 4))
    assert abs(np.asarray(drawn.frames[0]) - MEAN).max() < 0.05
    assert spread[0] < spread[1] < spread[2]
