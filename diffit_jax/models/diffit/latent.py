"""LatentDiffiT: the isotropic transformer for latents, as released (DiffiT §3.3, appendix H.2).

Shape suffixes: B batch, L tokens, C channels; H, W height and width of the latent; p is the side of
a patch.
"""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffit_jax.errors import UserError
from diffit_jax.limits import LATER, Count, CountOrZero, Side, Width
from diffit_jax.models.diffit.attention import TwoTimes
from diffit_jax.models.diffit.backends import choose_backend, xla_only
from diffit_jax.models.diffit.blocks import (
    DiffiTBlock,
    check_capture,
    layer_norm,
    repeat_block,
    with_extra_tokens,
)
from diffit_jax.models.diffit.conditioning import (
    TOKENS,
    NumberTokens,
    TimeConditioned,
    TimeToken,
    position_embedding,
)
from diffit_jax.models.model import CLASS, IMAGE
from diffit_jax.models.placement import Dense, at_least_float32

# The paper has XL/2; the smaller ones are DiT's (Peebles & Xie 2023, Table 1).
SIZES = {
    "S/2": dict(patch_size=2, hidden_size=384, depth=12, num_heads=6),
    "B/2": dict(patch_size=2, hidden_size=768, depth=12, num_heads=12),
    "L/2": dict(patch_size=2, hidden_size=1024, depth=24, num_heads=16),
    "XL/2": dict(patch_size=2, hidden_size=1152, depth=28, num_heads=16),
}


def named_size(name: str) -> dict[str, int]:
    """Return attributes of `LatentDiffiT` for a name like `XL/2` (a copy).

    Raises:
      UserError: the name is not in `SIZES`.
    """
    if name not in SIZES:
        raise UserError(f"model size {name!r} is unknown: use {', '.join(SIZES)}")
    return dict(SIZES[name])


class LatentDiffiT(TimeConditioned):
    """The latent DiffiT, unconditional or class-conditional.

    `LatentDiffiT(32, **named_size("XL/2"))` is the network of ImageNet-256.

    Attributes:
      input_size: side of the square latent: 32 for images of 256 pixels, 64 for 512.
      input_channels: channels of the latent.
      patch_size: side p of the square patch that becomes a token.
      hidden_size: channels C of a token, and width of the time token.
      depth: number of blocks.
      num_heads: attention heads; 9 of width 128 fill a TPU's lanes better than the released 16 of
        width 72, at the same parameter count.
      mlp_ratio: width of the blocks' MLP in multiples of C.
      learn_sigma: whether the output has twice the channels of the input: epsilon and the
        variance's interpolation.
      slim_tmsa: leave out the parameters that can never change the output, see `TMSA`.
      inner_head: after how many blocks a second last layer reads the tokens, for internal guidance
        (2512.24176 has 8 of 28); 0: none. Its output is returned beside the network's own.
      class_token: width of an encoder's class token that is generated beside the latent (REG,
        2507.01467, has DINOv2-B's 768); 0: none. It is one more token, outside the grid.
    """

    input_size: Side = 32
    input_channels: Count = 4
    patch_size: Count = 2
    hidden_size: Width = 1152
    depth: Count = 28
    num_heads: Count = 16
    mlp_ratio: Count = 4
    learn_sigma: bool = True
    slim_tmsa: bool = False
    inner_head: Annotated[CountOrZero, LATER] = 0
    class_token: Annotated[CountOrZero, LATER] = 0
    num_classes: CountOrZero = dataclasses.field(default=1000, kw_only=True)

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of one latent."""
        return self.input_size, self.input_size, self.input_channels

    @property
    def output_channels(self) -> int:
        """Channels of what the network returns."""
        return self.input_channels * (2 if self.learn_sigma else 1)

    @property
    def has_inner_head(self) -> bool:
        """Whether the network returns an inner head's output too."""
        return bool(self.inner_head)

    @property
    def stacked(self) -> tuple[str, ...]:
        """Names of the subtrees of parameters whose leading axis counts layers."""
        return ("blocks",)

    @property
    def blocks(self) -> int:
        """How many blocks there are."""
        return self.depth

    @property
    def takes_two_levels(self) -> bool:
        """Whether tokens of one latent may have two noise levels, in training."""
        reduced = self.slim_tmsa or self.time_in == "token"
        return not (reduced or self.is_map or self.class_token)

    @property
    def grid(self) -> int:
        """Tokens along each side; attention sees the whole grid."""
        return self.input_size // self.patch_size

    @property
    def heads(self) -> tuple[int, int]:
        """(attention heads, their width)."""
        return self.num_heads, self.hidden_size // self.num_heads

    def attention_backend(self, platform: str) -> tuple[str, str]:
        """Choose the backend for a window of all tokens, see `Model.attention_backend`."""
        asked = self.attention, platform, self.grid, self.heads[1], self.dtype
        obstacle = xla_only(self.attention, self.time_in, bool(self.adds_tokens))
        return choose_backend(*asked, obstacle=obstacle)

    def check_sizes(self) -> None:
        """Raise `UserError` if the sizes, or the switches, do not fit together."""
        super().check_sizes()
        if self.input_size % self.patch_size:
            raise UserError(
                f"input_size {self.input_size} is not divisible by patch_size {self.patch_size}: "
                "change either"
            )
        if self.hidden_size % self.num_heads or self.hidden_size % 4:
            raise UserError(
                f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads} "
                "and of 4: change hidden_size or num_heads"
            )
        if self.inner_head >= self.depth:
            raise UserError(
                f"config key model.inner_head is {self.inner_head}, but the network has "
                f"{self.depth} blocks, and the last layer is behind them: use 1 to "
                f"{self.depth - 1}, or 0 for none"
            )
        if self.class_token and (self.inner_head or self.is_map):
            other = "inner_head" if self.inner_head else "end_time_in"
            raise UserError(
                f"config keys model.class_token and model.{other} do not go together: set either "
                f"to {'0' if self.inner_head else 'none, or class_token to 0'}"
            )
        if self.time_in == "bias":
            offsets = (2 * self.grid - 1) ** 2
            added = self.depth * self.num_heads * offsets * self.hidden_size
            raise UserError(
                f"model.time_in 'bias' would add {added / 1e6:,.0f} M parameters, a number for "
                f"each of {offsets:,} offsets, every head and block: image_diffit has it, with its "
                "small windows"
            )
        if self.slim_tmsa and self.qk_norm:
            raise UserError(
                "config key model.slim_tmsa leaves out the key's share of time, which has an "
                "effect with model.qk_norm: set either to False"
            )
        if self.slim_tmsa and self.time_in != "tmsa":
            raise UserError(
                f"model.slim_tmsa leaves out parameters of time_in 'tmsa', and model.time_in is "
                f"{self.time_in!r}: set slim_tmsa to False"
            )

    @nn.compact
    def __call__(
        self,
        x_BHWC: jax.Array | Mapping[str, jax.Array],
        noise_level_B: jax.Array,
        conditioning: Mapping[str, jax.Array],
        capture: int | None = None,
    ) -> Any:
        """Evaluate the network.

        Args:
          x_BHWC: (B, input_size, input_size, input_channels) noisy latents; with `class_token` also
            a dict of these as "image" and of noisy class tokens (B, 1, 1, class_token) as "class",
            which are 0 without one.
          noise_level_B: (B,) the timestep 0…999 of the original schedule (or EDM's `c_noise`), used
            as it is.
          conditioning: `label`: (B,) int in [0, num_classes], the last one meaning "no label", as
            does an absent key. `dropout_key`: (B,) keys, in training. Of a flow map `end_time` and
            `guidance`, see `TimeConditioned`. `second_level`: (B,) another noise level, which the
            tokens of `has_second`, (B, L) bool, have.
          capture: number of a block, from 0, whose tokens are wanted too.

        Returns:
          (B, input_size, input_size, output_channels) float32; with an inner head its output too,
          of the same shape; with `capture` last (B, L, C) of the model's dtype, before which the
          class token comes if there is one. Of a dict a dict.
        """
        self.check_sizes()
        class_B11D = None
        if isinstance(x_BHWC, Mapping):
            x_BHWC, class_B11D = x_BHWC[IMAGE], x_BHWC[CLASS]
        check_capture(capture, self.depth)
        batch, grid, patch = len(x_BHWC), self.grid, self.patch_size
        label_B = conditioning.get("label") if self.num_classes else None
        dtype = at_least_float32(self.dtype) if self.is_map else self.dtype
        embed = TimeToken(
            self.hidden_size,
            self.num_classes,
            dtype=dtype,
            embedding=self.time_embedding,
            name="time",
        )

        def time_of(level_B: jax.Array) -> jax.Array:
            token = self.time_token(embed, level_B, label_B, conditioning)
            return nn.silu(token) if self.time_in == "adaln" else token  # DiT's; others as it is

        time_BT: Any = time_of(noise_level_B)
        if "second_level" in conditioning:
            assert self.takes_two_levels
            second_BT = time_of(conditioning["second_level"])
            time_BT = TwoTimes(time_BT, second_BT, conditioning["has_second"])

        # Tokens are in row-major order, and so are the pixels of a patch, channels last.
        x = (
            x_BHWC.reshape(batch, grid, patch, grid, patch, -1)
            .transpose(0, 1, 3, 2, 4, 5)
            .reshape(batch, grid * grid, -1)
        )
        x_BLC = Dense(self.hidden_size, self.dtype, name="patch_embed")(x)
        position_LC = self.variable(
            "constants",
            "pos_embed",
            lambda: jnp.asarray(position_embedding(grid, self.hidden_size)),
        )
        x_BLC = x_BLC + position_LC.value.astype(self.dtype)

        # The whole grid is one window, behind which there may be tokens outside the grid.
        x_BNLC = x_BLC[:, None]
        if self.class_token:
            x_BNLC = with_extra_tokens(x_BNLC, self._class_token(class_B11D, batch))
        if self.time_in == "token":
            token_BC = Dense(self.hidden_size, self.dtype, name="time_token")(time_BT)
            x_BNLC = with_extra_tokens(x_BNLC, token_BC[:, None])
        numbers = self.told_numbers(noise_level_B, conditioning)
        for name in self.own_tokens:
            tokens_BEC = NumberTokens(self.hidden_size, TOKENS[name], dtype, name=f"{name}_tokens")
            x_BNLC = with_extra_tokens(x_BNLC, tokens_BEC(numbers[name]))
        block = DiffiTBlock(
            self.num_heads,
            grid,
            self.mlp_ratio,
            self.dtype,
            self.slim_tmsa,
            affine_norm=False,
            attention=self.attention,
            dropout=self.dropout,
            remat=self.remat,
            time_in=self.time_in,
            extra_tokens=x_BNLC.shape[2] - grid * grid,
            qk_norm=self.qk_norm,
            name="blocks",
        )
        x_BNLC, captured = repeat_block(
            block,
            x_BNLC,
            time_BT,
            self.depth,
            unroll=self.scan_unroll,
            remat=self.remat,
            dropout_key_B=conditioning.get("dropout_key") if self.dropout else None,
            captures=[block for block in (self.inner_head - 1, capture) if block not in (-1, None)],
        )

        outputs: list[Any] = [self._last_layer(x_BNLC, "final")]
        if self.class_token:
            class_out_B11D = self._last_of_class(x_BNLC[:, :, grid * grid : grid * grid + 1])
            if class_B11D is not None:
                outputs = [{IMAGE: outputs[0], CLASS: class_out_B11D}]
        if self.inner_head:
            outputs.append(self._last_layer(captured[self.inner_head - 1], "inner_final"))
        if capture is not None:
            tokens_BLC = captured[capture][:, 0, : grid * grid]
            if self.class_token:
                class_B1C = captured[capture][:, 0, grid * grid : grid * grid + 1]
                tokens_BLC = jnp.concatenate([class_B1C, tokens_BLC], axis=1)
            outputs.append(tokens_BLC)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def _class_token(self, class_B11D: jax.Array | None, batch: int) -> jax.Array:
        """Embed noisy class tokens, or none, as tokens (B, 1, C)."""
        if class_B11D is None:
            class_B11D = jnp.zeros((batch, 1, 1, self.class_token))
        embedded = Dense(self.hidden_size, self.dtype, name="class_embed")(class_B11D[:, 0])
        return layer_norm(self.dtype, affine=True, name="class_norm")(embedded)

    def _last_of_class(self, x_B11C: jax.Array) -> jax.Array:
        """Map the class token (B, 1, 1, C) to what the network returns of it."""
        exact = at_least_float32(self.dtype)
        x_B11C = nn.silu(layer_norm(exact, affine=False, name="class_final_norm")(x_B11C))
        zeros = nn.initializers.zeros_init()
        return Dense(self.class_token, exact, zeros, name="class_final")(x_B11C)

    def _last_layer(self, x_BNLC: jax.Array, name: str) -> jax.Array:
        """Map tokens to what the network returns, (B, input_size, input_size, output_channels)."""
        grid, patch, exact = self.grid, self.patch_size, at_least_float32(self.dtype)
        x_BLC = x_BNLC[:, 0, : grid * grid]
        x_BLC = nn.silu(layer_norm(exact, affine=False, name=f"{name}_norm")(x_BLC))
        last = Dense(
            features=patch * patch * self.output_channels,
            dtype=exact,
            kernel_init=nn.initializers.zeros_init(),
            name=name,
        )
        x = last(x_BLC).reshape(-1, grid, grid, patch, patch, self.output_channels)
        x = x.transpose(0, 1, 3, 2, 4, 5)
        return x.reshape(-1, self.input_size, self.input_size, self.output_channels)
