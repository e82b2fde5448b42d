"""A closed form: data that are a mixture of two normal distributions for each number, and all that
follows: denoiser, velocity, flow, and the maps along it."""

import jax
import jax.numpy as jnp
import numpy as np

from diffit_jax.diffusion.flow import Flow
from diffit_jax.diffusion.types import END_TIME

MEANS, DEVIATION, SHARES = np.array([-0.9, 0.6]), 0.25, np.array([0.3, 0.7])
SHAPE = (1, 1, 1)


def ideal_denoiser(y, sigma):
    """The mean of the data, given y = x + sigma noise."""
    sigma = jnp.reshape(sigma, (-1, 1, 1, 1))
    variance = DEVIATION**2 + sigma**2
    scaled = [
        np.log(share) - (y - mean) ** 2 / (2 * variance)
        for share, mean in zip(SHARES, MEANS, strict=True)
    ]
    weights = jax.nn.softmax(jnp.stack(scaled), axis=0)
    pulls = jnp.stack([mean + (y - mean) * DEVIATION**2 / variance for mean in MEANS])
    return jnp.sum(weights * pulls, axis=0)


def ideal_network(flow):
    """The flow's network with that denoiser: the mean of its targets."""

    def network(sees, told_B, _):
        t = told_B if flow.clock == "t" else 1 - told_B
        place = [each[:, None, None, None] for each in flow.interpolant.at(t)]
        alpha, noise, alpha_slope, noise_slope = place
        alpha = jnp.maximum(alpha, 1e-12)
        deviation = flow.sigma_data
        clean = ideal_denoiser(deviation * sees / alpha, deviation * (noise / alpha)[:, 0, 0, 0])
        clean = clean / deviation
        if flow.prediction == "velocity" and flow.path == "linear":
            # Both ends without a difference of near numbers: v = (z - x) / t.
            return (1 if flow.clock == "t" else -1) * (sees - clean) / jnp.maximum(noise, 1e-9)
        epsilon = (sees - alpha * clean) / jnp.maximum(noise, 1e-9)
        if flow.prediction == "noise":
            return epsilon
        if flow.prediction == "score":
            return -epsilon / noise
        velocity = alpha_slope * clean + noise_slope * epsilon
        return velocity if flow.clock == "t" else -velocity

    return network


def cumulative(x, deviation=DEVIATION):
    """The distribution function of the mixture."""
    from scipy.stats import norm

    return sum(
        share * norm.cdf(x, mean, deviation) for share, mean in zip(SHARES, MEANS, strict=True)
    )


def exact_end(noise):
    """Where the flow takes noise: in one dimension it keeps the order, so quantiles become
    quantiles."""
    from scipy.optimize import brentq
    from scipy.stats import norm

    return np.array([brentq(lambda x, q=q: cumulative(x) - q, -5, 5, xtol=1e-13)
                     for q in norm.cdf(noise)])  # fmt: skip


def ideal_map(steps=80):
    """The network of the exact map of the linear path: by quantiles, in float64.

    Bisection finds the place z_r of the quantile of z_t; a last step of Newton's brings its
    derivatives, for `jax.jvp`. Told t and r."""
    velocity = ideal_network(Flow())

    def distribution(z, t):
        """(distribution function, density) at time t."""
        total = density = 0.0
        for share, mean in zip(SHARES, MEANS, strict=True):
            center, spread = (1 - t) * mean, jnp.sqrt(((1 - t) * DEVIATION) ** 2 + t**2)
            total += share * jax.scipy.stats.norm.cdf(z, center, spread)
            density += share * jax.scipy.stats.norm.pdf(z, center, spread)
        return total, density

    def network(z, t_B, conditioning):
        r_B = conditioning.get(END_TIME, t_B)
        t, r = (each[:, None, None, None] for each in (t_B, r_B))
        quantile, _ = distribution(z, t)
        low, high = jnp.full_like(z, -12.0), jnp.full_like(z, 12.0)

        def halve(_, ends):
            low, high = ends
            middle = (low + high) / 2
            above = distribution(middle, r)[0] > jax.lax.stop_gradient(quantile)
            return jnp.where(above, low, middle), jnp.where(above, middle, high)

        low, high = jax.lax.fori_loop(0, steps, halve, (low, high))
        found = jax.lax.stop_gradient((low + high) / 2)
        total, density = distribution(found, r)
        there = found - (total - quantile) / jax.lax.stop_gradient(density)
        length = jnp.where(t > r, t - r, 1.0)
        return jnp.where(t > r, (z - there) / length, velocity(z, t_B, {}))

    return network
