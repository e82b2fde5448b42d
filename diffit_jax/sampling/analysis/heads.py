"""Statistics of attention heads, computed inside an attention layer (`models.measured_network`).

Shape suffixes: B batch, N windows, H heads, L tokens of a window, P = N L positions.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from diffit_jax.models.diffit.attention import Attended

# The means of a head that `measure` gives, (H,) each.
SHARES = ("q_from_time", "v_from_time", "logits_time", "logits_content", "logits_position")


def weights_of(q: jax.Array, k: jax.Array, bias: jax.Array) -> jax.Array:
    """Return softmax(q kᵀ + bias), (B, N, H, L, L), of (B, N, H, L, D) each."""
    return jax.nn.softmax(jnp.einsum("bnhqd,bnhkd->bnhqk", q, k) + bias)


def entropy(weights: jax.Array) -> jax.Array:
    """Return the entropy of each row of weights, (…, L, L') → (…, L), as a share of the largest.

    0: all on one token; 1: the same on all.
    """
    logs = jnp.log(jnp.maximum(weights, 1e-30))
    return -jnp.sum(weights * logs, axis=-1) / np.log(max(weights.shape[-1], 2))


def reach(weights: jax.Array, window: int) -> jax.Array:
    """Return the mean distance in tokens from each query to what it attends to.

    Tokens outside the grid have no place: the weights on them are left out, and so are they.

    Args:
      weights: (…, L + E, L + E), a window's tokens in row-major order first.
      window: its side.

    Returns:
      (…, L).
    """
    tokens = window * window
    grid = weights[..., :tokens, :tokens]
    return jnp.sum(grid * distances(window), axis=-1) / jnp.maximum(grid.sum(-1), 1e-30)


def distances(window: int) -> np.ndarray:
    """Return the distances between the tokens of a window in tokens, (L, L), L = window²."""
    row, column = np.divmod(np.arange(window * window), window)
    return np.hypot(row[:, None] - row[None], column[:, None] - column[None])


def difference(weights: jax.Array, other: jax.Array) -> jax.Array:
    """Return the total variation between rows of weights (…, L), in [0, 1]: the mass that moves."""
    return 0.5 * jnp.sum(jnp.abs(weights - other), axis=-1)


def share(part: jax.Array, rest: jax.Array) -> jax.Array:
    """Return the share of `part` in the mean squares of both, (B, N, H, …, D) each, (H,)."""
    over = [axis for axis in range(part.ndim) if axis != 2]
    ours, others = jnp.mean(part**2, over), jnp.mean(rest**2, over)
    return ours / jnp.maximum(ours + others, 1e-30)


def measure(
    attended: Attended, other_time_BT: jax.Array, query: tuple[float, float]
) -> Mapping[str, jax.Array]:
    """Measure the heads of a layer.

    Args:
      attended: queries, keys, values of the layer.
      other_time_BT: (B, T) time token of another noise level.
      query: (row, column) of the token whose attention is kept, in shares of the side.

    Returns:
      `entropy`, `reach`, `excess_reach` (the same, less that of uniform attention at this place)
      (B, H, P); `change`: `difference` of the weights from those that the other
      time would give the same tokens, (H,); `q_from_time`, `v_from_time`: shares of time's part in
      queries and values, (H,); `logits_time`, `logits_content`, `logits_position`: shares of
      the variance of a row of logits that its three parts have, (H,), the last of the position
      bias; `key_effect`: largest change of a weight by time's part of the keys, which is to be
      rounding, (H,), and `k_from_time`, its share; `map`: weights of one query, (B, H, L + E).
    """
    q, k, bias, window = attended.q, attended.k, attended.bias, attended.window
    batch, _, heads, _, _ = q.shape
    q_time = attended.q_of_time(attended.time_BT)
    weights = weights_of(q, k, bias)
    over = (0, 1, 3)

    def by_position(field: jax.Array) -> jax.Array:
        field = field[..., : window * window]
        return jnp.moveaxis(field, 2, 1).reshape(batch, heads, -1)

    def variance(logits: jax.Array) -> jax.Array:
        logits = jnp.broadcast_to(logits, weights.shape)[..., : window**2, : window**2]
        return jnp.mean(jnp.var(logits, axis=-1), over)

    content, time_logits = ((q - q_time), jnp.broadcast_to(q_time, q.shape))
    parts = [variance(jnp.einsum("bnhqd,bnhkd->bnhqk", one, k)) for one in (time_logits, content)]
    parts.append(variance(bias))
    total = jnp.maximum(sum(parts), 1e-30)
    q_other = q - q_time + attended.q_of_time(other_time_BT)
    with_key = weights_of(q, k + attended.k_time, bias)
    return {
        "entropy": by_position(entropy(weights)),
        "reach": by_position(reach(weights, window)),
        "excess_reach": by_position(reach(weights, window) - distances(window).mean(-1)),
        "change": jnp.mean(difference(weights, weights_of(q_other, k, bias)), over),
        "q_from_time": share(time_logits, content),
        "v_from_time": share(jnp.broadcast_to(attended.v_time, q.shape), attended.v),
        "k_from_time": share(jnp.broadcast_to(attended.k_time, q.shape), k),
        **dict(zip(SHARES[2:], [one / total for one in parts], strict=True)),
        "key_effect": jnp.max(jnp.abs(with_key - weights), (0, 1, 3, 4)),
        "map": one_query(weights, window, query),
    }


def one_query(weights: jax.Array, window: int, query: tuple[float, float]) -> jax.Array:
    """Return the weights of the token at a place of the image, (B, H, L + E) of (B, N, H, L, L)."""
    across = round(weights.shape[1] ** 0.5)
    row, column = (min(int(share * across * window), across * window - 1) for share in query)
    at = (row // window) * across + column // window
    return weights[:, at, :, (row % window) * window + column % window]


def split_variance(field: np.ndarray) -> dict[str, float]:
    """Split the variance of a field (T, B, P) over time, image and position.

    The shares of the variances of the means over the other two axes (an analysis of variance
    without interactions), and `rest`: what only two or all of them explain together.

    Returns:
      `time`, `image`, `position`, `rest`, which sum to 1; zeros of a field that is the same
      everywhere.
    """
    field = np.asarray(field, np.float64)
    total = field.var()
    if total <= 1e-12 * max(1e-12, np.abs(field).max() ** 2):
        return dict.fromkeys(("time", "image", "position", "rest"), 0.0)
    names = {"time": (1, 2), "image": (0, 2), "position": (0, 1)}
    shares = {name: float(field.mean(axes).var() / total) for name, axes in names.items()}
    return shares | {"rest": 1 - sum(shares.values())}
