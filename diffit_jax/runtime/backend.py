"""The machine that jax computes on: which devices there are, how numbers are made on them, and what
to do when memory runs out."""

import contextlib
import logging
import os
import re
from collections.abc import Iterator

import jax

from diffit_jax.errors import OutOfMemory, UserError, one_line

try:
    from jax import enable_x64
except ImportError:  # before jax 0.8
    from jax.experimental import enable_x64

log = logging.getLogger(__name__)


def devices() -> list[jax.Device]:
    """The devices of all processes.

    Raises:
      UserError: there is no such platform here, or another process holds it.
    """
    try:
        return jax.devices()
    except (
        RuntimeError,
        AssertionError,
        ValueError,
        KeyError,
    ) as error:  # AssertionError: CUDA's plugin is not installed
        text = one_line(error)
        if re.search(
            r"(?i)already in use|in use by|libtpu_lockfile|lockfile|device or resource busy", text
        ):
            raise UserError(
                f"the devices are held by another process ({text[:160]}): end it, or wait for it"
            ) from error
        wanted = os.environ.get("JAX_PLATFORMS") or jax.config.jax_platforms
        if wanted:
            names = "cpu, tpu or cuda, in small letters"
            remedy = (
                f"unset JAX_PLATFORMS, set it to a platform of this machine ({names}), or "
                "install jax for it"
            )
            raise UserError(
                f"JAX_PLATFORMS is {wanted}, which cannot be used here "
                f"({text[:160] or 'it is not installed'}): {remedy}"
            ) from error
        raise UserError(
            f"no device can be used ({text[:200]}): JAX_PLATFORMS=cpu computes without one"
        ) from error


@contextlib.contextmanager
def pinned() -> Iterator[None]:
    """Numbers made in this block (a decorator too) are the same whatever modes of jax the
    environment or a notebook has switched on.

    32 bits, threefry's partitionable form (a random number does not depend on how an array is
    divided), and the usual promotion of types. The precision of matrix products is not pinned: see
    `matmul_precision`.

    Raises:
      UserError: a mode in which programs are not compiled, or in which this package's cannot be.
    """
    config = jax.config
    modes = {
        "JAX_DISABLE_JIT": config.jax_disable_jit,
        "JAX_NUMPY_RANK_PROMOTION": config.jax_numpy_rank_promotion == "raise",
        "JAX_RANDOM_SEED_OFFSET": bool(getattr(config, "jax_random_seed_offset", 0)),
        "JAX_NO_EXECUTION": bool(getattr(config, "jax_no_execution", False)),
    }
    for name, switched_on in modes.items():
        if switched_on:
            raise UserError(
                f"jax's mode {name} is switched on, which changes or stops this package's "
                "programs: unset it"
            )
    with enable_x64(False), jax.threefry_partitionable(True), jax.numpy_dtype_promotion("standard"):
        yield


def matmul_precision() -> str:
    """How precisely matrix products of float32 are computed: "default" is the platform's (bfloat16
    on TPUs, TF32 on many GPUs).

    It is jax's own setting: the variable JAX_DEFAULT_MATMUL_PRECISION, or
    `jax.default_matmul_precision`.
    """
    return str(jax.config.jax_default_matmul_precision or "default")


@contextlib.contextmanager
def memory_for(remedy: str) -> Iterator[None]:
    """Turns what is said when memory runs out, in compiling or running, into one line.

    Args:
      remedy: what takes less of it.

    Raises:
      OutOfMemory: memory ran out in the block.
    """
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        text = one_line(error)
        if not isinstance(error, MemoryError) and not re.search(
            r"(?i)RESOURCE_EXHAUSTED|out of memory|ran out of|allocation failure|\bOOM\b", text
        ):
            raise
        asked = re.search(r"(?i)(allocat\w* [\d.,]+ ?\w*|[\d.,]+ ?[KMGT]i?B?\b[^.]*)", text)
        said = asked[0][:120] if asked else type(error).__name__
        raise OutOfMemory(f"memory ran out ({said}): {remedy}") from error


TRAINING_MEMORY = (
    "lower training.batch_size, raise training.accumulation, set model.remat to full "
    "(latent_diffit), or divide the parameters by mesh.fsdp"
)
SAMPLING_MEMORY = (
    "lower sampling.batch_per_device (--batch_per_device), or divide the parameters by mesh.fsdp"
)
