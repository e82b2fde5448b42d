"""ImageDiffiT: the U-shaped network for images (DiffiT §3.2, appendices H.1 and I.1).

    Tokenizer (conv) → stage 0 → down → stage 1 → … → stage S-1        encoder
    Head (GN, swish, conv) ← stage 0 ← up ← … ← stage S-2 ← up ←       decoder

with a skip connection at every resolution.

Each stage is a stack of DiffiTResBlocks at one resolution with one number of channels.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Annotated

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffit_jax.errors import UserError
from diffit_jax.limits import Count, CountOrZero, Side, Width, at_least
from diffit_jax.models.diffit.attention import choose_backend
from diffit_jax.models.diffit.blocks import (
    DiffiTResBlock,
    TimeToken,
    Upsample,
    check_capture,
    conv3x3,
    group_norm,
    repeat_block,
)
from diffit_jax.models.model import Model
from diffit_jax.models.placement import Dense, at_least_float32


class ImageDiffiT(Model):
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

    def __post_init__(self) -> None:
        for name in ("channels", "num_blocks"):  # jit remembers a network by its attributes
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

    def attention_backend(self, platform: str) -> tuple[str, str]:
        """Choose the backend for the largest window, see `Model.attention_backend`."""
        window = min(self.window, self.image_size)
        return choose_backend(self.attention, platform, window, self.head_width, self.dtype)

    def check_sizes(self) -> None:
        """Raise `UserError` if the sizes do not fit together."""
        stages = len(self.channels)
        if len(self.num_blocks) != stages:
            raise UserError(
                f"channels {tuple(self.channels)} describe {stages} stages but num_blocks "
                f"{tuple(self.num_blocks)} describe "
                f"{len(self.num_blocks)}: give one entry for each stage in both"
            )
        factor = 2 ** (stages - 1)
        if self.image_size % factor:
            raise UserError(
                f"image_size {self.image_size} is not divisible by {factor}, which {stages} stages "
                "need: change image_size or the number of stages"
            )
        for stage, channels in enumerate(self.channels):
            size = self.image_size >> stage
            if size % min(self.window, size):
                raise UserError(
                    f"stage {stage} is {size} pixels wide, which window {self.window} does not "
                    f"divide: change window or image_size {self.image_size}"
                )
            if channels % self.head_width or channels % 4:
                raise UserError(
                    f"stage {stage} has {channels} channels, which is not a multiple of head_width "
                    f"{self.head_width} and of 4: change channels or head_width"
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
            is an absent key. `dropout_key`: (B,) keys, in training.
          capture: number of a block of the encoder, from 0, whose output is wanted too.

        Returns:
          Array like x_BHWC, float32; with `capture` also (B, H, W, C) of the block's stage.
        """
        self.check_sizes()
        check_capture(capture, sum(self.num_blocks))
        label_B = conditioning.get("label") if self.num_classes else None
        # The time token, once for all blocks.
        time_BT = nn.silu(
            TimeToken(
                self.time_width,
                self.num_classes,
                augment_labels=self.augment_labels,
                dtype=self.dtype,
                name="time",
            )(noise_level_B, label_B, conditioning.get("augment"))
        )
        dropout_key_B = conditioning.get("dropout_key") if self.dropout else None
        run_number, captured = itertools.count(), []

        def run_stage(name: str, x: jax.Array, stage: int) -> jax.Array:
            heads = self.channels[stage] // self.head_width
            window = min(self.window, self.image_size >> stage)
            block = DiffiTResBlock(
                heads,
                window,
                self.mlp_ratio,
                self.dtype,
                self.dropout,
                attention=self.attention,
                remat=self.remat,
                name=f"{name}_{stage}",
            )
            key_B, number = dropout_key_B, next(run_number)
            if key_B is not None:  # each stage its own
                key_B = jax.vmap(lambda key: jax.random.fold_in(key, number))(key_B)
            inside = name == "encoder" and capture in range(firsts[stage], firsts[stage + 1])
            x, kept = repeat_block(
                block,
                x,
                time_BT,
                self.num_blocks[stage],
                unroll=self.scan_unroll,
                remat=self.remat,
                dropout_key_B=key_B,
                capture=capture - firsts[stage] if capture is not None and inside else None,
            )
            captured.append(kept)
            return x

        firsts = [0, *itertools.accumulate(self.num_blocks)]  # of each stage's blocks

        # Down the U, each stage's result kept for its way up (paper, Fig. 3).
        x = conv3x3(self.channels[0], self.dtype, name="tokenizer")(x_BHWC.astype(self.dtype))
        skips = []
        for stage in range(len(self.channels)):
            if stage:
                skips.append(x)
                x = conv3x3(self.channels[stage], self.dtype, name=f"down_{stage}", stride=2)(x)
            x = run_stage("encoder", x, stage)
        # And up again, merged with what was kept.
        for stage in reversed(range(len(skips))):
            x = Upsample(self.channels[stage], self.dtype, name=f"up_{stage}")(x)
            x = jnp.concatenate([x, skips[stage]], axis=-1)
            x = Dense(self.channels[stage], self.dtype, name=f"merge_{stage}")(x)
            x = run_stage("decoder", x, stage)
        # The last convolution in float32: its output is the prediction.
        exact = at_least_float32(self.dtype)
        x = nn.swish(group_norm(self.channels[0], self.dtype, name="head_norm")(x)).astype(exact)
        y_BHWC = conv3x3(
            self.image_channels, exact, name="head", kernel_init=nn.initializers.zeros_init()
        )(x)
        kept = next((one for one in captured if one is not None), None)
        return y_BHWC if kept is None else (y_BHWC, kept)
