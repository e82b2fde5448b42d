"""EDM's general sampler against the original's, in float64 and float32; and against our own ones,
of which it is a case."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.golden import golden

from diffit_jax.diffusion import PROCESSES, samplers
from diffit_jax.diffusion.edm import EDM
from diffit_jax.diffusion.general_sampler import General
from diffit_jax.diffusion.guidance import apply_guidance, unguided
from diffit_jax.diffusion.samplers import Euler, Heun
from diffit_jax.errors import UserError
from diffit_jax.runtime.backend import enable_x64

KEYS = {
    "discretization": "grid",
    "S_churn": "churn_amount",
    "S_min": "churn_sigma_low",
    "S_max": "churn_sigma_high",
    "S_noise": "churn_noise",
}
RECORDED = golden("edm_ablation_sampler.npz")
CASES = json.loads(str(RECORDED["cases"]))
# The levels of improved DDPM's networks were made in float32: they differ from ours by 3e-4, and
# the samples by 7e-7.
BOUNDS = {"float64": 1e-6, "float32": 1e-4}


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("case", CASES)
def test_samples_of_the_original(case, dtype):
    settings = dict(CASES[case])
    process = PROCESSES[settings.pop("net")]()
    sampler = General(**{KEYS.get(key, key): value for key, value in settings.items()})
    sampler.check(process)
    recorded = {
        name: RECORDED[key].astype(dtype)
        for name, key in dict(
            latents="latents", mean="mean", variance="variance", noise=f"{case}/noise"
        ).items()
    }
    with enable_x64(dtype == "float64"):
        mean, variance = jnp.asarray(recorded["mean"]), jnp.asarray(recorded["variance"])
        fresh = recorded["noise"] if recorded["noise"].size else np.zeros((0, 3, 4, 4, 2), dtype)
        noises = jnp.concatenate([recorded["latents"][None], fresh])

        def ideal(x, sigma, _):
            squared = sigma[:, None, None, None] ** 2
            return (variance * x + squared * mean) / (variance + squared)

        drawn = jax.jit(
            lambda noises: sampler.draw(process, unguided(ideal), lambda i: noises[i], {}).samples
        )(noises)
    assert drawn.dtype == dtype
    final = RECORDED[f"{case}/final"]
    np.testing.assert_allclose(drawn, final, rtol=0, atol=BOUNDS[dtype] * np.abs(final).max())


NOISE = samplers.seeded_noise(jnp.arange(4, dtype=jnp.uint32), (2, 2, 1))
CHURN = dict(churn_amount=4.0, churn_sigma_low=0.1, churn_sigma_high=20.0, churn_noise=1.01)


def curved(x, sigma, _=None):
    """A denoiser that is not linear."""
    return jnp.sin(x / (1 + sigma[:, None, None, None]))


# The same numbers by other roundings: 2e-6 was measured of samples of about 2.
@pytest.mark.parametrize(
    "general, ours",
    [
        (General(num_steps=9), Heun(num_steps=9)),
        (General(num_steps=9, **CHURN), Heun(num_steps=9, **CHURN)),
        (General(num_steps=9, solver="euler"), Euler(num_steps=9)),
    ],
)
def test_our_samplers_are_cases_of_it(general, ours):
    one, other = (
        sampler.draw(EDM(), guide_nothing(), NOISE, {}, frames=3) for sampler in (general, ours)
    )
    np.testing.assert_allclose(one.samples, other.samples, rtol=0, atol=2e-5)
    np.testing.assert_allclose(one.frames, other.frames, rtol=0, atol=2e-5)


def guide_nothing():
    return unguided(curved)


def test_it_is_guided_on_its_own_grid():
    from diffit_jax.diffusion.guidance import Interval

    guidance = Interval(scale=2.0, sigma_low=0.5, sigma_high=5.0)
    null = 1

    def by_label(x, sigma, conditioning):
        return curved(x, sigma) * (1 - 0.5 * (conditioning["label"] == null))[:, None, None, None]

    guided = apply_guidance(guidance, by_label, EDM().time_of, null)
    labels = {"label": jnp.zeros(4, jnp.int32)}
    one = General(num_steps=9).draw(EDM(), guided, NOISE, labels).samples
    other = Heun(num_steps=9).draw(EDM(), guided, NOISE, labels).samples
    np.testing.assert_allclose(one, other, rtol=0, atol=2e-5)


@pytest.mark.parametrize("grid", ["edm", "vp", "ve", "iddpm"])
@pytest.mark.parametrize("process", ["edm", "vp", "ve", "iddpm", "ddpm"])
def test_every_grid_keeps_to_what_every_network_knows(process, grid):
    process, sampler = PROCESSES[process](), General(num_steps=12, grid=grid)
    sigma = sampler.levels(process)
    assert len(sigma) == 12 and (np.diff(sigma) < 0).all()
    low, high = process.sigma_range
    assert low * (1 - 1e-12) <= sigma[-1] and sigma[0] <= high * (1 + 1e-12)


@pytest.mark.parametrize(
    "settings, process, said",
    [
        (dict(sigma_max=90.0, num_steps=9), "ddpm", None),
        (dict(sigma_max=200.0, num_steps=9), "ddpm", "sigma_max is 200, outside"),
        (dict(sigma_min=0.001, num_steps=9), "ve", "sigma_min is 0.001, outside"),
        (dict(sigma_min=90.0, num_steps=9), "edm", "from 80 down to 90"),
        (dict(grid="iddpm", sigma_min=50.0, num_steps=99), "edm", "use fewer steps"),
        (dict(num_steps=900), "iddpm", "use fewer steps"),
    ],
)
def test_grids_outside_of_what_the_network_knows(settings, process, said):
    sampler = General(**settings)
    if said is None:
        sampler.check(PROCESSES[process]())
        return
    with pytest.raises(UserError, match=said):
        sampler.check(PROCESSES[process]())


@pytest.mark.parametrize(
    "settings, said",
    [
        (dict(solver="rk4"), "solver is 'rk4': use heun, euler"),
        (dict(grid="cosine"), "grid is 'cosine'"),
        (dict(alpha=0.0), "alpha is 0.0"),
        (dict(alpha=1.5), "alpha is 1.5"),
        (dict(time_min=1.0), "time_min is 1.0"),
    ],
)
def test_bad_settings(settings, said):
    with pytest.raises(UserError, match=said):
        General(num_steps=9, **settings)
