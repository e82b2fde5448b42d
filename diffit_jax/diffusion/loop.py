"""The loop of a sampler over its evaluations, which jit compiles once.

Shape suffixes: B batch, H, W, C height, width and channels of a sample; E evaluations.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from diffit_jax.diffusion.guidance import Guided
from diffit_jax.diffusion.types import Network

T = TypeVar("T", bound=tuple)
Carry = tuple[Any, ...]  # of a sampler's loop
tree_map = jax.tree.map


class SamplerOutput(NamedTuple):
    """What a sampler makes.

    Attributes:
      samples: (B, H, W, C) float32 (or a pytree), in the units of the training data and not
        clipped.
      frames: the same with F in front: the clean samples as they were estimated at F of its steps.
    """

    samples: Any
    frames: Any


def at_level(x: Any, level: jax.Array | float) -> jax.Array:
    """Return the same noise level for each of the samples x, (B,)."""
    return jnp.full(len(jax.tree.leaves(x)[0]), level)


def frame_indices(steps: int, frames: int, evaluations: int = 1) -> np.ndarray:
    """Return which evaluations of a sampler are kept as frames, (F,) int.

    They begin F of its steps, from the first step to the last at equal distances.

    Args:
      steps: of the sampler.
      frames: F.
      evaluations: of each step.
    """
    return np.rint(np.linspace(0, steps - 1, frames)).astype(np.int64) * evaluations


def sampling_loop(
    guided: Guided,
    body: Callable[[jax.Array, T, Network], tuple[T, Any]],
    carry: T,
    sigma: np.ndarray,
    frame_indices: np.ndarray,
    *,
    step_sigma: np.ndarray | None = None,
) -> tuple[T, Any]:
    """Run a sampler's loop: `carry, denoised = body(e, carry, network)` for each evaluation e.

    Args:
      guided: the evaluations and their guidance.
      body: calls `network`, which is guided as e asks for, once.
      carry: tuple that the loop starts from; its first entry is x, like `denoised`.
      sigma: (E,) static noise levels of the evaluations, see `Guided.scales`.
      frame_indices: (F,) static, evaluations whose `denoised` is kept.
      step_sigma: (E,) static noise levels of the starts of their steps; None: the same.

    Returns:
      The last carry, and the kept frames, (F, …) each. The program has one loop for each segment
      of evaluations with, or without, guidance.
    """
    empty = jax.tree.map(lambda leaf: jnp.zeros((len(frame_indices), *leaf.shape)), carry[0])
    state = carry, empty if len(frame_indices) else None  # nothing is carried along for no frames
    for segment in guided.segments(sigma, step_sigma):

        def step(index: jax.Array, state: tuple, network: Any = segment.network) -> tuple:
            carry, frames = state
            carry, denoised = body(index, carry, network(index))
            if frames is not None:
                here = jnp.asarray(frame_indices) == index
                frames = jax.tree.map(
                    lambda kept, new: jnp.where(here.reshape(-1, *(1,) * new.ndim), new, kept),
                    frames,
                    denoised,
                )
            return carry, frames

        state = jax.lax.fori_loop(segment.start, segment.stop, step, state)
    carry, frames = state
    return carry, empty if frames is None else frames
