"""Power-function averages, whose length is chosen after training (EDM2, Karras et al. 2024, §3).

An average with exponent gamma weighs the parameters after n of N updates in proportion to n^gamma;
how much of training it covers is its relative standard deviation sigma, here called its length
(0.05: the last 5 % or so). Training keeps `ema.power_lengths` of them (EDM2 has two) and now and
then a snapshot of all; any other length is a sum of the snapshots, with factors that a
least-squares fit of the weight profiles gives (appendix C).

Only ratios of times matter, so updates are counted, not images.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffit_jax.errors import UserError

LONGEST = 12**-0.5  # of a constant weight, gamma = 0


def gamma_of(length: float) -> float:
    """Return the exponent of an average with a length in (0, 12^-½).

    It is the largest root of g³ + 7 g² + (16 - s) g + 12 - s with s = length^-2.

    Raises:
      UserError: a length outside that range.
    """
    if not 0 < length < LONGEST:
        raise UserError(f"EMA length {length} must lie between 0 and {LONGEST:.3f}: change it")
    s = length**-2
    return float(np.roots([1, 7, 16 - s, 12 - s]).real.max())


def power_rate(gamma: float, update: jax.Array) -> jax.Array:
    """Return 1 - beta of update number n from 0, float32: beta = (1 - 1 / (n + 1))^(gamma + 1).

    A float32 scalar, exactly 1 in the first. 1 - beta is far below the spacing of floats around 1
    late in training; `log1p` and `expm1` keep its digits.
    """
    fraction = 1 / (update.astype(jnp.float32) + 1)
    return -jnp.expm1((gamma + 1) * jnp.log1p(-fraction))


def profile_products(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return inner products of weight profiles, (n, m) float64.

    Args:
      one: (n, 2) rows of (time, gamma).
      other: (m, 2).
    """
    (t_a, g_a), (t_b, g_b) = one.T[:, :, None], other.T[:, None, :]
    exponent = np.where(t_a < t_b, g_b, -g_a)
    return (
        (g_a + 1) * (g_b + 1) * (t_a / t_b) ** exponent / ((g_a + g_b + 1) * np.maximum(t_a, t_b))
    )


def reconstruction(
    times: Sequence[float], lengths: Sequence[float], target_time: float, target_length: float
) -> np.ndarray:
    """Return factors that make an average of any length out of snapshots.

    Args:
      times: (n,) when each snapshot was taken (any unit).
      lengths: (n,) of the average in each snapshot.
      target_time: at most the last of the times.
      target_length: in (0, 12^-½).

    Returns:
      (n,) float64 with sum 1; snapshots after the target time get 0.
    """
    rows = np.array(
        [(time, gamma_of(length)) for time, length in zip(times, lengths, strict=True)], np.float64
    )
    usable = rows[:, 0] <= target_time
    target = np.array([[target_time, gamma_of(target_length)]])
    solved = np.linalg.lstsq(
        profile_products(rows[usable], rows[usable]),
        profile_products(rows[usable], target)[:, 0],
        rcond=None,
    )[0]
    factors = np.zeros(len(rows))
    factors[usable] = solved / solved.sum()
    return factors


def add_scaled(total: Any, tree: Any, factor: float) -> Any:
    """Return total + factor · tree, leaf by leaf in float32; `total` None is zero."""
    if total is None:
        return jax.tree.map(lambda leaf: jnp.float32(factor) * leaf, tree)
    return jax.tree.map(lambda sum_, leaf: sum_ + jnp.float32(factor) * leaf, total, tree)
