"""VP, VE and improved DDPM's processes against EDM's own code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.golden import golden, loss_at

from diffit_jax.diffusion.edm import EDM
from diffit_jax.diffusion.preconditioning import IDDPM, VE, VP, cosine_levels
from diffit_jax.errors import UserError

PROCESSES = {"vp": VP(), "ve": VE(), "iddpm": IDDPM(), "edm": EDM()}


def network(x, c_noise, _):
    """What the golden data were made with; improved DDPM's has channels behind."""
    return 0.6 * jnp.sin(2 * x) + 0.3 * jnp.cos(c_noise)[:, None, None, None] + 0.1 * x


def with_variance(x, c_noise, conditioning):
    return jnp.concatenate([network(x, c_noise, conditioning), 1e6 * jnp.ones_like(x)], axis=-1)


# Measured: at most 4e-7 of each array's largest value.
@pytest.mark.parametrize("name", PROCESSES)
def test_denoisers_of_the_original(name):
    expected = golden("edm_preconditioning.npz")
    process = PROCESSES[name]
    sigma = expected[f"{name}_sigma_rounded"]
    f = with_variance if name == "iddpm" else network
    denoised = jax.jit(lambda x, sigma: process.denoise(f, x, sigma, {}))(
        expected[f"{name}_x"], sigma
    )
    wanted = expected[f"{name}_denoised"]
    np.testing.assert_allclose(denoised, wanted, rtol=0, atol=2e-6 * np.abs(wanted).max())
    # Up to 999: a 5-millionth of it.
    c_noise = process.preconditioning(jnp.asarray(sigma))[3]
    np.testing.assert_allclose(c_noise, expected[f"{name}_c_noise"], rtol=1e-6, atol=2e-4)


# The original makes its limits in float32, which loses three digits at VP's lower end and four at
# improved DDPM's: ours are float64.
@pytest.mark.parametrize("name, rtol", [("vp", 0.03), ("ve", 0), ("iddpm", 1e-3), ("edm", 0)])
def test_what_networks_know(name, rtol):
    expected, process = golden("edm_preconditioning.npz"), PROCESSES[name]
    np.testing.assert_allclose(process.sigma_range, expected[f"{name}_sigma_min_max"], rtol=rtol)
    known = process.round_sigma(expected[f"{name}_sigma"])
    np.testing.assert_allclose(known, expected[f"{name}_sigma_rounded"], rtol=1e-3)


def test_levels_of_improved_ddpm():
    levels = cosine_levels(1000, 0.001, 0.008)
    # reference values, to the digits that were computed
    np.testing.assert_allclose(
        levels[[0, 1, 2, 999]], [20291.2, 641.66, 320.83, 0.0064254], rtol=1e-5
    )
    assert (np.diff(levels) < 0).all()
    process = IDDPM()
    np.testing.assert_array_equal(process.round_sigma(levels), levels)
    between = np.sqrt(levels[1:] * levels[:-1])
    assert set(process.round_sigma(between)) <= set(levels)
    # Every level is told apart in float32 too.
    told = process.preconditioning(jnp.asarray(levels, jnp.float32))[3]
    np.testing.assert_array_equal(told, 999 - np.arange(1000))


# 1e-5 of each array's maximum, as the data ask for; 3.5e-6 was measured.
@pytest.mark.parametrize("name", ["vp", "ve", "edm"])
def test_losses_of_the_original(name):
    recorded, process = golden("edm_losses.npz"), PROCESSES[name]
    x, noise, draw = (recorded[f"{name}_{part}"] for part in ("images", "noise", "draw"))
    if name == "edm":
        sigma = jnp.exp(process.log_sigma_mean + process.log_sigma_std * draw)
    else:
        sigma = process.sigma_of_fraction(jnp.asarray(draw))
    # Ours is the mean over an image of what the original leaves elementwise.
    wanted = recorded[f"{name}_loss"]
    loss = jax.jit(lambda x, sigma, noise: loss_at(process, network, x, sigma, noise, {})[0])(
        x, sigma, noise
    )
    np.testing.assert_allclose(
        loss, wanted.mean(axis=(1, 2, 3)), rtol=0, atol=1e-5 * wanted.mean(axis=(1, 2, 3)).max()
    )
    denoised = process.denoise(network, x + sigma[:, None, None, None] * noise, sigma, {})
    elementwise = process.loss_weight(sigma)[:, None, None, None] * (denoised - x) ** 2
    np.testing.assert_allclose(elementwise, wanted, rtol=0, atol=1e-5 * wanted.max())


@pytest.mark.parametrize("process", [VP(), VE()])
def test_losses_draw_noise_levels_over_the_whole_range(process):
    keys = jax.random.split(jax.random.key(0), 4000)
    sigma = np.asarray(jax.vmap(process.draw_sigma)(keys), np.float64)
    low, high = process.sigma_range
    assert low * 0.999 <= sigma.min() and sigma.max() <= high * 1.001
    # The share of the way is uniform: 4 standard errors of its mean and of its square's.
    if isinstance(process, VE):
        fraction = np.log(sigma / low) / np.log(high / low)
    else:
        fraction = 1 - np.asarray(process.preconditioning(jnp.asarray(sigma))[3]) / 999
    assert abs(fraction.mean() - 1 / 2) < 4 / np.sqrt(12 * 4000)
    assert abs((fraction**2).mean() - 1 / 3) < 4 * np.sqrt(4 / 45 / 4000)


@pytest.mark.parametrize("process", [VP(), VE(), IDDPM()])
def test_grids_of_samplers_keep_to_what_the_network_knows(process):
    grid = process.sigmas(18)
    low, high = process.sigma_range
    assert grid[-1] == 0 and len(grid) == 19 and (np.diff(grid) < 0).all()
    assert low <= grid[-2] and grid[0] <= high
    np.testing.assert_array_equal(process.round_sigma(grid[:-1]), grid[:-1])


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: IDDPM().sigmas(2000), "use fewer steps"),
        (lambda: VE(sigma_min=90.0).sigmas(9), "none of EDM's"),
        (lambda: VE(sigma_min=3.0, sigma_max=2.0), "leave nothing between"),
        (lambda: VP(epsilon=1.0), "process.epsilon is 1.0"),
        (lambda: VP(beta_d=0.0), "process.beta_d is 0.0"),
    ],
)
def test_bad_settings(make, said):
    with pytest.raises(UserError, match=said):
        make()
