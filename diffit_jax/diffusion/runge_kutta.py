"""Runge-Kutta steps along a path as a table, with a row for each evaluation of the network.

Everything but x is known beforehand: it is made in float64, and becomes the table of one loop.

Shape suffixes: B batch, H, W, C height, width and channels; E evaluations.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffit_jax.diffusion.flow import Flow
from diffit_jax.diffusion.guidance import Guided
from diffit_jax.diffusion.loop import (
    Carry,
    SamplerOutput,
    at_level,
    frame_indices,
    sampling_loop,
    tree_map,
)
from diffit_jax.diffusion.types import Conditioning, Network, Noise


class Row(NamedTuple):
    """An evaluation, and the step behind it.

        x ← stretch x + fresh noise
        x_start = x where it predicts; a correction starts where its prediction did
        y = f(shrink x; level),  slope = of_x x + of_y y,  estimate = shows_x x + shows_y y
        x ← x_start + by_first first_slope + by_slope slope + after noise

    Attributes:
      sigma: noise level of the evaluation in EDM's terms, which guidance follows.
    """

    sigma: float
    level: float
    of_x: float
    of_y: float
    by_slope: float
    by_first: float = 0.0
    predicts: float = 1.0
    stretch: float = 1.0
    fresh: float = 0.0
    shrink: float = 1.0
    shows_x: float = 0.0
    shows_y: float = 1.0
    after: float = 0.0


def integrate(
    guided: Guided,
    rows: Sequence[Row],
    noise: Noise,
    conditioning: Conditioning,
    *,
    start: float,
    step_sigma: np.ndarray,
    evaluations: int,
    frames: int = 0,
) -> SamplerOutput:
    """Take the steps of a table, from `start` times noise number 0.

    Args:
      guided: the evaluations f, and their guidance.
      rows: of the table.
      noise: noise number i + 1 is that of step i.
      conditioning: of the B samples.
      start: standard deviation of the initial noise.
      step_sigma: (N,) noise levels at which the steps start.
      evaluations: of each step but perhaps the last.
      frames: F, as of `SamplingMethod.draw`.

    Returns:
      x (B, H, W, C) after the last row, or a pytree like `noise(0)`, and the frames.
    """
    noisy = any(row.fresh or row.after for row in rows)
    x = noise(0)
    table = jnp.asarray([row[1:] for row in rows], jax.tree.leaves(x)[0].dtype)

    def body(index: jax.Array, carry: Carry, network: Network) -> tuple[Carry, Any]:
        x, start, first_slope = carry
        row: Any = Row(0.0, *table[index])  # of scalars
        x = tree_map(lambda x: row.stretch * x, x)
        number = index // evaluations + 1
        if noisy:
            x = tree_map(lambda x, z: x + row.fresh * z, x, noise(number))
        start = tree_map(lambda x, start: jnp.where(row.predicts == 1, x, start), x, start)
        shrunk = tree_map(lambda x: row.shrink * x, x)
        y = network(shrunk, at_level(x, row.level), conditioning)
        slope = tree_map(lambda x, y: row.of_x * x + row.of_y * y, x, y)
        shown = tree_map(lambda x, y: row.shows_x * x + row.shows_y * y, x, y)
        x = tree_map(
            lambda start, one, two: start + row.by_first * one + row.by_slope * two,
            start,
            first_slope,
            slope,
        )
        if noisy:
            x = tree_map(lambda x, z: x + row.after * z, x, noise(number))
        return (x, start, slope), shown

    x = tree_map(lambda x: x * jnp.asarray(start, x.dtype), x)
    carry = x, x, tree_map(jnp.zeros_like, x)
    sigma = np.array([row.sigma for row in rows])
    starts = np.repeat(step_sigma, evaluations)[: len(rows)]
    seen = frame_indices(len(step_sigma), frames, evaluations)
    carry, kept = sampling_loop(guided, body, carry, sigma, seen, step_sigma=starts)
    return SamplerOutput(carry[0], kept)


def velocity_row(process: Flow, t: float, by_slope: float, **further: float) -> Row:
    """Return the row of an evaluation of a flow's velocity at time t, whose slope is dx/dt."""
    place, sigma = process.interpolant.at(np.array(t)), process.sigma_of(np.array(t))
    shows = -place.noise_slope / place.turn, place.noise / place.turn
    row = Row(float(sigma), float(sigma), 0.0, 1.0, by_slope, shows_x=shows[0], shows_y=shows[1])
    return row._replace(**further)


def runge_kutta_steps(
    row: Callable[..., Row],
    t: np.ndarray,
    *,
    second: bool,
    alpha: float = 1.0,
    correct_last: bool = False,
    moved: Sequence[tuple[float, float, float]] | None = None,
) -> list[Row]:
    """Return the table of steps in time.

    Args:
      row: `(t, by_slope, **further)` → the row of an evaluation at time t, like `velocity_row`.
      t: (N + 1,) times, descending.
      second: whether steps have a second evaluation, after the share `alpha` of the step: 1 Heun,
        1/2 midpoint.
      alpha: that share.
      correct_last: whether the last step has one too.
      moved: for each step (time t̂ that it starts at, instead of t; stretch; fresh), see `Row`.
    """
    rows, count, share = [], len(t) - 1, 1 / (2 * alpha)
    for step in range(count):
        here, stretch, fresh = (t[step], 1.0, 0.0) if moved is None else moved[step]
        h = t[step + 1] - here
        twice = second and (step < count - 1 or correct_last)
        rows.append(row(here, alpha * h if twice else h, stretch=stretch, fresh=fresh))
        if twice:
            by = {"by_first": h * (1 - share), "predicts": 0.0}
            rows.append(row(here + alpha * h, h * share, **by))
    return rows


def follow_velocity(
    process: Flow,
    guided: Guided,
    noise: Noise,
    conditioning: Conditioning,
    t: np.ndarray,
    *,
    second: bool,
    frames: int = 0,
    **steps: Any,
) -> SamplerOutput:
    """Draw samples by steps in the time of a flow, (N + 1,) times `t`, descending.

    `second`: Heun's steps, 2N - 1 evaluations, the last one Euler's; else Euler's, N. Further
    settings as of `runge_kutta_steps`.
    """
    row = functools.partial(velocity_row, process)
    return integrate(
        guided,
        runge_kutta_steps(row, t, second=second, **steps),
        noise,
        conditioning,
        start=process.start_std,
        step_sigma=process.sigma_of(t[:-1]),
        evaluations=2 if second else 1,
        frames=frames,
    )
