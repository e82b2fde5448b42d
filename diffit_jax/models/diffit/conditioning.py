"""The conditioning of a DiffiT: noise level, label and augmentation → the time token x_t.

And of a flow map: the time to go to, and guidance.

Shape suffixes: B batch, L tokens, C channels, T width of the time token, N blocks.
"""

from collections.abc import Mapping
from typing import Annotated

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffit_jax.errors import UserError
from diffit_jax.limits import LATER, CountOrZero, one_of
from diffit_jax.models.diffit.backends import xla_only
from diffit_jax.models.model import Model
from diffit_jax.models.placement import FSDP, Dense, Embed, at_least_float32, param

# Where a block takes in the time token, see `blocks.DiffiTBlock`.
TIME_IN = ("tmsa", "bias", "mlp", "token", "adaln", "add")
EMBEDDINGS = ("positional", "fourier")
# How a network is told the time to go to, and the guidance, of a flow map.
END_TIME_IN = ("none", "blocks", "sum", "tokens")
GUIDANCE_IN = ("none", "sum", "tokens")
# Tokens of iMF for each number, those of guidance being 1 - 1 / scale and both ends of its times.
TOKENS = {"duration": 4, "guidance_scale": 4, "guidance_low": 2, "guidance_high": 2}


class TimeConditioned(Model, kw_only=True):
    """A network of DiffiT blocks, with the switches of the paper's Tables 6 to 8.

    Attributes:
      time_in: where the blocks take in the time token, see `DiffiTBlock`: "tmsa", or what the paper
        compares with it: "bias" (images only), "mlp", "token", "adaln", "add".
      time_embedding: of the noise level: "positional", or "fourier" for levels of order 1, see
        `TimeToken`.
      end_time_in: how a flow map is told the time r to go to: "none"; "blocks", the blocks from
        `end_time_from` on get the time token of r in the place of that of t (DMF; no parameters);
        "sum", an embedding of t - r is added to the time token (MeanFlow); or "tokens", it makes
        four tokens outside the grid (iMF; latent_diffit).
      end_time_from: how many blocks are told t, in the order of use, before the first one that is
        told r; 0: five sevenths of all, DMF's 20 of 28.
      guidance_in: how a flow map is told its guidance: "none", "sum" or "tokens", as above.
      qk_norm: whether each head's queries and keys are normalised (by their root mean square, with
        learned scales) before they are multiplied, see `TMSA`.
    """

    time_in: Annotated[str, one_of(*TIME_IN), LATER] = "tmsa"
    time_embedding: Annotated[str, one_of(*EMBEDDINGS), LATER] = "positional"
    end_time_in: Annotated[str, one_of(*END_TIME_IN), LATER] = "none"
    end_time_from: Annotated[CountOrZero, LATER] = 0
    guidance_in: Annotated[str, one_of(*GUIDANCE_IN), LATER] = "none"
    qk_norm: Annotated[bool, LATER] = False

    @property
    def blocks(self) -> int:
        """How many blocks there are, in all stacks together."""
        raise NotImplementedError

    @property
    def is_map(self) -> bool:
        """Whether it is told a second time; then times are embedded in float32."""
        return self.end_time_in != "none"

    @property
    def _first_told(self) -> int:
        return self.end_time_from or max(1, round(self.blocks * 5 / 7))

    @property
    def own_tokens(self) -> tuple[str, ...]:
        """Numbers that the network is told by tokens outside the grid, names in `TOKENS`."""
        names = ("duration",) if self.end_time_in == "tokens" else ()
        return names + (tuple(TOKENS)[1:] if self.guidance_in == "tokens" else ())

    @property
    def adds_tokens(self) -> str:
        """Which key has tokens outside the grid but for time's, in words; "": none."""
        if self.class_token:
            return "model.class_token is a token"
        if self.own_tokens:
            asked = self.end_time_in == "tokens"
            return f"model.{'end_time_in' if asked else 'guidance_in'} is 'tokens'"
        return ""

    def check_sizes(self) -> None:
        """Raise `UserError` if an attention is asked for that cannot take time, or tokens, in."""
        of_time = xla_only(self.attention, self.time_in)
        key = f"model.time_in is {self.time_in!r}" if of_time else self.adds_tokens
        reason = of_time or xla_only(self.attention, self.time_in, bool(self.adds_tokens))
        if reason and self.attention not in ("auto", "xla"):
            other = "" if self.time_in == "bias" else ", pallas"
            raise UserError(
                f"config key model.attention is {self.attention!r}, but {key}: {reason}; set "
                f"model.attention to auto{other} or xla"
            )
        if self.end_time_in == "blocks" and self.blocks == 1:
            raise UserError(
                "config key model.end_time_in is 'blocks', but the network has one: set it to sum"
            )
        if self.end_time_in == "blocks" and self.end_time_from >= self.blocks:
            raise UserError(
                f"config key model.end_time_from is {self.end_time_from}, but the network has "
                f"{self.blocks} blocks, of which at least the last one is told r: use 1 to "
                f"{self.blocks - 1}"
            )
        if self.is_map and self.time_embedding == "fourier":
            raise UserError(
                "config key model.time_embedding is 'fourier', whose slope by the time is about "
                "100, and a map's loss has that slope in it: set it to positional"
            )
        if self.end_time_in == "blocks" and self.time_in == "token":
            raise UserError(
                "config key model.end_time_in is 'blocks', which tells blocks different times, but "
                "model.time_in 'token' has one token for all: set end_time_in to sum"
            )
        if self.end_time_in != "blocks" and self.end_time_from:
            raise UserError(
                f"config key model.end_time_from is {self.end_time_from}, but model.end_time_in is "
                f"{self.end_time_in!r}: set it to 0, or end_time_in to blocks"
            )

    def time_token(
        self,
        module: "TimeToken",
        noise_level_B: jax.Array,
        label_B: jax.Array | None,
        conditioning: Mapping[str, jax.Array],
    ) -> jax.Array:
        """Make the time token of all blocks, (B, T), or of each block, (N, B, T).

        Args:
          module: that makes it of one time.
          noise_level_B: (B,) the time t.
          label_B: (B,) labels, or None.
          conditioning: `augment`; of a flow map `end_time` (B,) and `guidance` (B, 3), absent where
            r = t, and where there is no guidance.
        """
        augment = conditioning.get("augment")
        token = module(noise_level_B, label_B, augment)
        if self.end_time_in == "blocks" and "end_time" in conditioning:
            end_BT = module(conditioning["end_time"], label_B, augment)
            first = self._first_told
            token = jnp.stack([token] * first + [end_BT] * (self.blocks - first))
        for name, number_B in self.told_numbers(noise_level_B, conditioning).items():
            if name not in self.own_tokens:
                embed = TimeToken(module.width, dtype=module.dtype, name=f"time_{name}")
                token = token + embed(number_B)
        return token

    def told_numbers(
        self, noise_level_B: jax.Array, conditioning: Mapping[str, jax.Array]
    ) -> Mapping[str, jax.Array]:
        """Return what else than a time the network is told, (B,) each, names in `TOKENS`.

        Of order 1 where the noise level is a time. Arguments as of `time_token`.
        """
        numbers = {}
        if self.end_time_in in ("sum", "tokens"):
            numbers["duration"] = noise_level_B - conditioning.get("end_time", noise_level_B)
        if self.guidance_in != "none":
            zeros_B = jnp.zeros_like(noise_level_B)
            none_B3 = jnp.stack([zeros_B + 1, zeros_B, zeros_B + 1], axis=-1)
            scale_B, low_B, high_B = conditioning.get("guidance", none_B3).T
            values = 1 - 1 / scale_B, low_B, high_B
            numbers |= dict(zip(tuple(TOKENS)[1:], values, strict=True))
        return numbers


def sinusoidal_embedding(
    noise_level_B: jax.Array, width: int, max_period: float = 10_000.0
) -> jax.Array:
    """Embed a scalar by sines and cosines ("positional", the better choice in the paper's Table 8).

    Args:
      noise_level_B: (B,) any real dtype; a timestep or EDM's `c_noise`, used without scaling.
      width: even number of output channels.
      max_period: the slowest frequency is about 1 / max_period.

    Returns:
      (B, width) float32 (float64 of such levels), `[cos(t w_k), sin(t w_k)]` with
      `w_k = max_period^(-k / (width / 2))` for `k < width / 2`.
    """
    half = width // 2
    dtype = at_least_float32(noise_level_B.dtype)
    frequencies = jnp.exp(-jnp.log(max_period) * jnp.arange(half, dtype=dtype) / half)
    angles = noise_level_B.astype(dtype)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def fixed_frequencies(module: nn.Module, count: int) -> jax.Array:
    """Return a module's frequencies of Fourier features, (count,): drawn once, never trained."""
    return module.variable(
        "constants",
        "frequencies",
        lambda: 16 * jax.random.normal(module.make_rng("params"), (count,)),
    ).value


def fourier_embedding(noise_level_B: jax.Array, frequencies: jax.Array) -> jax.Array:
    """Embed a scalar by Fourier features of random frequencies (the paper's Table 8, as in EDM).

    Args:
      noise_level_B: (B,) any real dtype, of order 1, as EDM's `c_noise` is.
      frequencies: (width / 2,) float32.

    Returns:
      (B, width) float32 (float64 of such levels), `[cos(2π t f), sin(2π t f)]`.
    """
    dtype = at_least_float32(noise_level_B.dtype)
    angles = 2 * np.pi * noise_level_B.astype(dtype)[:, None] * frequencies.astype(dtype)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def position_embedding(grid: int, width: int) -> np.ndarray:
    """Return the fixed two-dimensional sine-cosine embedding of the released latent model.

    Args:
      grid: side of the grid; its L = grid² tokens are in row-major order.
      width: number of channels C, a multiple of 4.

    Returns:
      (L, C) float32, computed in float64. The first half of the channels encodes the column p, the
      second half the row, each as `[sin(p w_k), cos(p w_k)]` with `w_k = 10000^(-k / (C / 4))` for
      `k < C / 4`.
    """
    frequencies = 10_000.0 ** (-np.arange(width // 4) / (width // 4))
    angles = np.arange(grid)[:, None] * frequencies
    line = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    row, column = np.divmod(np.arange(grid * grid), grid)
    return np.concatenate([line[column], line[row]], axis=1).astype(np.float32)


class TimeToken(nn.Module):
    """Noise level (and label) → the token `x_t` that every TMSA layer receives.

    An embedding of the noise level goes through a two-layer MLP with swish; class-conditional
    models add a row of a learned label table whose last row, index `num_classes`, stands for "no
    label".

    Attributes:
      width: width T of the token.
      num_classes: number of labels; 0 makes the model unconditional.
      frequency_width: width of the embedding.
      embedding: "positional" (`sinusoidal_embedding`) or "fourier", whose frequencies are 16 times
        draws of a normal distribution, fixed when the network is made (constants/…/frequencies).
      augment_labels: how many numbers tell what was done to an image, see `data.augment`.
      dtype: dtype of the matrix products; parameters are float32.
    """

    width: int
    num_classes: int = 0
    frequency_width: int = 256
    augment_labels: int = 0
    dtype: jnp.dtype = jnp.float32
    embedding: str = "positional"

    @nn.compact
    def __call__(
        self,
        noise_level_B: jax.Array,
        label_B: jax.Array | None = None,
        augment_BA: jax.Array | None = None,
    ) -> jax.Array:
        """Map noise levels, labels and augmentation labels to the time token, (B, T).

        Args:
          noise_level_B: (B,) noise levels.
          label_B: (B,) int labels in [0, num_classes]; None: no label.
          augment_BA: (B, A) augmentation labels; None: not augmented.
        """
        init = nn.initializers.normal(0.02)
        if self.embedding == "fourier":
            frequencies = fixed_frequencies(self, self.frequency_width // 2)
            token_BT = fourier_embedding(noise_level_B, frequencies)
        else:
            token_BT = sinusoidal_embedding(noise_level_B, self.frequency_width)
        token_BT = Dense(self.width, self.dtype, init, name="in")(token_BT)
        token_BT = Dense(self.width, self.dtype, init, name="out")(nn.silu(token_BT))
        if self.num_classes:
            if label_B is None:
                label_B = jnp.full(noise_level_B.shape, self.num_classes, jnp.int32)
            table = Embed(
                self.num_classes + 1,
                self.width,
                embedding_init=init,
                dtype=self.dtype,
                name="label",
            )
            token_BT = token_BT + table(label_B)
        if self.augment_labels:
            # Without a bias, as EDM has it: nothing done adds nothing.
            shape = (self.augment_labels, self.width)
            kernel = param(self, "augment_kernel", init, shape, (None, FSDP))
            if augment_BA is not None:
                token_BT = token_BT + augment_BA.astype(self.dtype) @ kernel.ready(self.dtype)
        return token_BT


class NumberTokens(nn.Module):
    """A number → tokens outside the grid: its embedding, plus a learned vector for each token.

    Attributes:
      width: channels C of a token.
      count: how many tokens.
      dtype: dtype of the matrix products.
    """

    width: int
    count: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, number_B: jax.Array) -> jax.Array:
        """Map numbers of order 1, (B,), to (B, count, C)."""
        embedded_BC = TimeToken(self.width, dtype=self.dtype, name="embedding")(number_B)
        init, shape = nn.initializers.normal(0.02), (self.count, self.width)
        place = param(self, "place", init, shape, (None, FSDP), decays=False).ready(self.dtype)
        return embedded_BC[:, None] + place
