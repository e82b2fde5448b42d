"""How attention is computed: by XLA, the TPU kernel or cuDNN."""

import jax.numpy as jnp

from diffit_jax import platforms
from diffit_jax.models.diffit import attention_kernel

# How attention is computed. "auto" is the kernel on TPUs, where it serves the window and compiles,
# and XLA elsewhere.
BACKENDS = ("auto", "xla", "pallas", "cudnn")


def choose_backend(
    wanted: str,
    platform: str,
    window: int,
    head_width: int,
    dtype: jnp.dtype,
    *,
    obstacle: str = "",
) -> tuple[str, str]:
    """Choose how attention is computed on a platform.

    Args:
      wanted: a name in `BACKENDS`.
      platform: "tpu", "gpu" or "cpu".
      window: side of the window.
      head_width: channels of a head.
      dtype: of the matrix products.
      obstacle: why no kernel can do what a network asks of it, "" if one can: `xla_only`.

    Returns:
      ("xla", "pallas" or "cudnn"; why it is not the one wanted, "" if it is). The kernel runs on
      other platforms than TPUs only if it is asked for by name, emulated and slow.
    """
    here = platforms.of(platform)
    if wanted in ("auto", "pallas"):
        if wanted == "auto" and here.auto_attention != "pallas":
            return here.auto_attention, ""
        if obstacle:
            return "xla", obstacle
        reason = attention_kernel.supports(window)
        if reason:
            sides = [side for side in range(1, 65) if not attention_kernel.supports(side)]
            served = " and ".join(f"{side} x {side}" for side in sides)
            return "xla", f"the kernel serves windows of {served} tokens, and not this: {reason}"
        refusal = attention_kernel.refusal() if wanted == "auto" else ""
        return (
            ("xla", f"the kernel does not compile here: {refusal}") if refusal else ("pallas", "")
        )
    if wanted == "cudnn" and obstacle:
        return "xla", obstacle
    if wanted == "cudnn" and (
        not here.has_cudnn or jnp.dtype(dtype) != jnp.bfloat16 or head_width % 8 or head_width > 128
    ):
        return (
            "xla",
            "cuDNN serves bfloat16 on GPUs, and heads of up to 128 channels in multiples of 8",
        )
    return wanted, ""


def xla_only(wanted: str, time_in: str, outside: bool = False) -> str:
    """Say why a kernel cannot do what a network asks of it, "" if it can.

    Args:
      wanted: a name in `BACKENDS`.
      time_in: where the network takes time in.
      outside: whether it has other tokens outside the grid than time's.
    """
    if time_in == "bias":
        return "a position bias for each example is added by XLA alone"
    if wanted == "cudnn" and (outside or time_in == "token"):
        return "tokens outside the grid are attended to by XLA and the TPU kernel"
    return ""
