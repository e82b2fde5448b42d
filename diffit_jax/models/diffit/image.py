"""ImageDiffiT: the U-shaped network for images (DiffiT §3.2, appendices H.1 and I.1).

    Tokenizer (conv) → stage 0 → down → stage 1 → … → stage S-1        encoder
    Head (GN, swish, conv) ← stage 0 ← up ← … ← stage S-2 ← up ←       decoder

with a skip connection at every resolution.

Each stage is a stack of DiffiTResBlocks at one resolution with one number of channels.

Switches make the networks that the paper compares it with (Table 4): an encoder of one resolution,
and SETR's multi-level decoder (MLA), which adds up the stages' results.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffit_jax.errors import UserError
from diffit_jax.limits import LATER, Count, CountOrZero, Side, Width, at_least, one_of
from diffit_jax.models.diffit.backends import choose_backend, xla_only
from diffit_jax.models.diffit.blocks import (
    XAVIER,
    DiffiTResBlock,
    Upsample,
    check_capture,
    conv3x3,
    group_norm,
    layer_norm,
    repeat_block,
)
from diffit_jax.models.diffit.conditioning import TimeConditioned, TimeToken
from diffit_jax.models.placement import Conv, Dense, at_least_float32

PATCH = 4  # side of the patches of an encoder of one resolution


class ImageDiffiT(TimeConditioned):
    """The image-space DiffiT, unconditional or class-conditional.

    Attributes:
      image_size: side of the square image in pixels; every stage after the first halves it.
      image_channels: channels of the image and of the output.
      channels: channels of each stage; the paper has 128 in the first and 256 in all others.
      num_blocks: blocks of each stage, the same in encoder and decoder.
      window: side of the attention window in pixels; a stage smaller than that attends as a whole.
      time_width: width of the time token (paper Table 3: 512).
      head_width: channels per attention head (not stated in the paper).
      mlp_ratio: width of the blocks' MLP in multiples of their channels.
      augment_labels: how many numbers tell the network what was done to an image in training: those
        of the section `augmentation`.
      stage_windows: side of the window of each stage, in the place of `window`.
      tmsa_half: "both", or the half of the U that has TMSA, "encoder" or "decoder" (Table 4, D),
        the lowest stage being the encoder's; the other half has `time_in` "add".
      resblock_conv: whether Eq. 9 has its convolution.
      encoder: "multi" resolution, the U's; or "single": all stages on patches of 4×4 pixels, as in
        a ViT (Table 4, A).
      decoder: "unet", the U's; or "mla" (`_decode_by_mla`; Table 4, A and B).
      mla_width: channels of "mla".
    """

    image_size: Side
    image_channels: Count = 3
    channels: Annotated[Sequence[Width], at_least(1)] = (128, 256, 256)
    num_blocks: Annotated[Sequence[Count], at_least(1)] = (2, 2, 2)
    window: Count = 4
    time_width: Width = 512
    head_width: Count = 64
    mlp_ratio: Count = 4
    augment_labels: CountOrZero = 0
    stage_windows: Annotated[Sequence[Count], LATER] = ()
    tmsa_half: Annotated[str, one_of("both", "encoder", "decoder"), LATER] = "both"
    resblock_conv: Annotated[bool, LATER] = True
    encoder: Annotated[str, one_of("multi", "single"), LATER] = "multi"
    decoder: Annotated[str, one_of("unet", "mla"), LATER] = "unet"
    mla_width: Annotated[Width, LATER] = 256

    def __post_init__(self) -> None:
        for name in (
            "channels",
            "num_blocks",
            "stage_windows",
        ):  # jit remembers a network by its attributes
            if isinstance(value := getattr(self, name), list):
                setattr(self, name, tuple(value))
        super().__post_init__()

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of one image."""
        return self.image_size, self.image_size, self.image_channels

    @property
    def stacked(self) -> tuple[str, ...]:
        """Names of the subtrees of parameters whose leading axis counts layers."""
        return tuple(
            f"{path}_{stage}"
            for path in ("encoder", "decoder")
            for stage in range(len(self.channels))
        )

    @property
    def blocks(self) -> int:
        """How many blocks there are, up and down the U."""
        down = sum(self.num_blocks)
        return down + (sum(self.num_blocks[:-1]) if self.decoder == "unet" else 0)

    @property
    def sides(self) -> tuple[int, ...]:
        """Pixels along a side of each stage."""
        stages = range(len(self.channels))
        if self.encoder == "single":
            return tuple(self.image_size // PATCH for _ in stages)
        return tuple(self.image_size >> stage for stage in stages)

    @property
    def windows(self) -> tuple[int, ...]:
        """Side of the window of each stage."""
        wanted = self.stage_windows or [self.window] * len(self.channels)
        return tuple(min(pair) for pair in zip(wanted, self.sides, strict=True))

    def attention_backend(self, platform: str) -> tuple[str, str]:
        """Choose the backend for the largest window, see `Model.attention_backend`."""
        asked = self.attention, platform, max(self.windows), self.head_width, self.dtype
        return choose_backend(*asked, obstacle=xla_only(self.attention, self.time_in))

    def check_sizes(self) -> None:
        """Raise `UserError` if the sizes, or the switches, do not fit together."""
        super().check_sizes()
        stages = len(self.channels)
        for name in ("num_blocks", "stage_windows"):
            given = tuple(getattr(self, name))
            if len(given) != stages and (given or name == "num_blocks"):
                raise UserError(
                    f"channels {tuple(self.channels)} describe {stages} stages but {name} "
                    f"{given} describe {len(given)}: give one entry for each stage in both"
                )
        self._check_switches()
        factor, what = 2 ** (stages - 1), f"{stages} stages"
        if self.encoder == "single":
            factor, what = PATCH, f"patches of {PATCH}×{PATCH} pixels"
        if self.image_size % factor:
            raise UserError(
                f"image_size {self.image_size} is not divisible by {factor}, which {what} "
                "need: change image_size or the number of stages"
            )
        for stage, channels in enumerate(self.channels):
            size, window = self.sides[stage], self.windows[stage]
            if size % window:
                name = "stage_windows" if self.stage_windows else "window"
                raise UserError(
                    f"stage {stage} is {size} pixels wide, which window {window} does not "
                    f"divide: change {name} or image_size {self.image_size}"
                )
            if channels % self.head_width or channels % 4:
                raise UserError(
                    f"stage {stage} has {channels} channels, which is not a multiple of head_width "
                    f"{self.head_width} and of 4: change channels or head_width"
                )

    def _check_switches(self) -> None:
        if self.own_tokens:
            raise UserError(
                "model.end_time_in and model.guidance_in 'tokens' add tokens to a window of the "
                "whole grid, latent_diffit's: use sum, or blocks for the time"
            )
        if self.encoder == "single" and (self.decoder != "mla" or len(set(self.channels)) > 1):
            raise UserError(
                "model.encoder 'single' has one resolution: set model.decoder to mla, and give "
                f"every stage the same channels ({tuple(self.channels)})"
            )
        if self.tmsa_half != "both" and (self.time_in != "tmsa" or self.decoder != "unet"):
            raise UserError(
                f"model.tmsa_half {self.tmsa_half!r} is about TMSA in the two halves of the U, and "
                f"model.time_in is {self.time_in!r}, model.decoder {self.decoder!r}: set tmsa_half "
                "to both, or these to tmsa and unet"
            )

    @nn.compact
    def __call__(
        self,
        x_BHWC: jax.Array,
        noise_level_B: jax.Array,
        conditioning: Mapping[str, jax.Array],
        capture: int | None = None,
    ) -> jax.Array | tuple[jax.Array, jax.Array]:
        """Evaluate the network.

        Args:
          x_BHWC: (B, image_size, image_size, image_channels) noisy images, scaled by the diffusion
            process.
          noise_level_B: (B,) EDM's `c_noise`, or a timestep.
          conditioning: `label`: (B,) int in [0, num_classes], the last one meaning "no label", as
            does an absent key. `augment`: (B, augment_labels) float32, 0 where nothing was done, as
            is an absent key. `dropout_key`: (B,) keys, in training. Of a flow map `end_time` and
            `guidance`, see `TimeConditioned`.
          capture: number of a block of the encoder, from 0, whose output is wanted too.

        Returns:
          Array like x_BHWC, float32; with `capture` also (B, H, W, C) of the block's stage.
        """
        self.check_sizes()
        check_capture(capture, sum(self.num_blocks))
        label_B = conditioning.get("label") if self.num_classes else None
        # The time token, once for all blocks.
        embed = TimeToken(
            self.time_width,
            self.num_classes,
            augment_labels=self.augment_labels,
            dtype=at_least_float32(self.dtype) if self.is_map else self.dtype,
            embedding=self.time_embedding,
            name="time",
        )
        time_BT = nn.silu(self.time_token(embed, noise_level_B, label_B, conditioning))
        dropout_key_B = conditioning.get("dropout_key") if self.dropout else None
        run_number, captured, blocks_run = itertools.count(), [], []

        def run_stage(name: str, x: jax.Array, stage: int) -> jax.Array:
            has_tmsa = self.tmsa_half in ("both", name)
            time_in = self.time_in if has_tmsa else "add"
            block = DiffiTResBlock(
                self.channels[stage] // self.head_width,
                self.windows[stage],
                self.mlp_ratio,
                self.dtype,
                self.dropout,
                attention=self.attention,
                remat=self.remat,
                time_in=time_in,
                conv=self.resblock_conv,
                qk_norm=self.qk_norm,
                name=f"{name}_{stage}",
            )
            first, count = sum(blocks_run), self.num_blocks[stage]
            blocks_run.append(count)
            of_stage = time_BT[first : first + count] if time_BT.ndim == 3 else time_BT
            carried: Any = x
            if time_in == "token":  # one for each window, which keeps it through the stage
                carried = x, self._time_tokens(time_BT, stage, f"{name}_{stage}_token")
            key_B, number = dropout_key_B, next(run_number)
            if key_B is not None:  # each stage its own
                key_B = jax.vmap(lambda key: jax.random.fold_in(key, number))(key_B)
            inside = name == "encoder" and capture in range(firsts[stage], firsts[stage + 1])
            wanted = [capture - firsts[stage]] if capture is not None and inside else []
            carried, found = repeat_block(
                block,
                carried,
                of_stage,
                count,
                unroll=self.scan_unroll,
                remat=self.remat,
                dropout_key_B=key_B,
                captures=wanted,
            )
            kept = next(iter(found.values()), None)
            if time_in == "token":
                carried, kept = carried[0], kept if kept is None else kept[0]
            captured.append(kept)
            return carried

        firsts = [0, *itertools.accumulate(self.num_blocks)]  # of each stage's blocks

        # Down the U, each stage's result kept for its way up (paper, Fig. 3).
        if self.encoder == "single":
            patches = (PATCH, PATCH)
            tokenizer = Conv(
                self.channels[0], patches, PATCH, kernel_init=XAVIER, dtype=self.dtype,
                name="tokenizer",
            )  # fmt: skip
        else:
            tokenizer = conv3x3(self.channels[0], self.dtype, name="tokenizer")
        x = tokenizer(x_BHWC.astype(self.dtype))
        results = []
        for stage in range(len(self.channels)):
            if stage and self.encoder == "multi":
                x = conv3x3(self.channels[stage], self.dtype, name=f"down_{stage}", stride=2)(x)
            x = run_stage("encoder", x, stage)
            results.append(x)
        if self.decoder == "mla":
            x = self._decode_by_mla(results)
        else:  # and up again, merged with what was kept
            for stage in reversed(range(len(results) - 1)):
                x = Upsample(self.channels[stage], self.dtype, name=f"up_{stage}")(x)
                x = jnp.concatenate([x, results[stage]], axis=-1)
                x = Dense(self.channels[stage], self.dtype, name=f"merge_{stage}")(x)
                x = run_stage("decoder", x, stage)
        # The last convolution in float32: its output is the prediction.
        exact = at_least_float32(self.dtype)
        x = nn.swish(group_norm(x.shape[-1], self.dtype, name="head_norm")(x)).astype(exact)
        y_BHWC = conv3x3(
            self.image_channels, exact, name="head", kernel_init=nn.initializers.zeros_init()
        )(x)
        kept = next((one for one in captured if one is not None), None)
        return y_BHWC if kept is None else (y_BHWC, kept)

    def _time_tokens(self, time_BT: jax.Array, stage: int, name: str) -> jax.Array:
        """Make the token that x_t is for a stage: (B, N, 1, C), the same in each of N windows."""
        token_BC = Dense(self.channels[stage], self.dtype, name=name)(time_BT)
        windows = (self.sides[stage] // self.windows[stage]) ** 2
        shape = (len(token_BC), windows, 1, self.channels[stage])
        return jnp.broadcast_to(token_BC[:, None, None], shape)

    def _decode_by_mla(self, results: Sequence[jax.Array]) -> jax.Array:
        """Decode by SETR's multi-level aggregation (Zheng et al. 2021, "MLA").

        From the deepest stage up: layer norm and 1×1 convolution of each result are added to what
        came before; each sum goes through three convolutions of 3×3; all are enlarged bilinearly
        and joined. Group normalisation is in the place of SETR's batch normalisation.

        Args:
          results: of each stage, (B, side, side, C).

        Returns:
          (B, image_size, image_size, stages * mla_width / 2).
        """

        def norm_relu(x: jax.Array, name: str) -> jax.Array:
            return nn.relu(group_norm(x.shape[-1], self.dtype, name=f"{name}_norm")(x))

        def resized(x: jax.Array, side: int) -> jax.Array:
            return jax.image.resize(x, (len(x), side, side, x.shape[-1]), "linear")

        total, branches = None, []
        for stage in reversed(range(len(results))):
            name = f"mla_{stage}"
            x = layer_norm(self.dtype, affine=True, name=f"{name}_norm")(results[stage])
            x = norm_relu(Dense(self.mla_width, self.dtype, name=name)(x), f"{name}_relu")
            total = x if total is None else resized(total, x.shape[1]) + x
            x = total
            for number, width in enumerate((self.mla_width, *[self.mla_width // 2] * 2)):
                name = f"mla_{stage}_conv_{number}"
                x = norm_relu(conv3x3(width, self.dtype, name=name)(x), name)
            branches.append(resized(x, self.image_size))
        return jnp.concatenate(branches, axis=-1)
