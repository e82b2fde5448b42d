"""The networks, as pure Flax modules: shapes in, shapes out."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffit_jax import platforms
from diffit_jax.models import placement
from diffit_jax.models.image import ImageDiffiT
from diffit_jax.models.latent import LatentDiffiT
from diffit_jax.models.model import Model

__all__ = [
    "MODELS",
    "Model",
    "as_network",
    "attention_in_words",
    "init_variables",
    "parameter_facts",
    "variable_shapes",
]

MODELS = {"image_diffit": ImageDiffiT, "latent_diffit": LatentDiffiT}


@functools.partial(jax.jit, static_argnums=0)
def init_variables(model: Model, key: jax.Array) -> dict[str, Any]:
    """Fresh float32 variables of a network.

    Jitted, so that a network is traced once for everybody who asks for its variables or their
    shapes, whatever the placement: they do not depend on it. Call it under another `jit` to have
    them made in their places, or under `eval_shape`.

    Returns:
      `params`: what training changes; `constants`: fixed arrays that belong to the model
        (`pos_embed`), empty for some models.
    """
    x_BHWC = jnp.zeros((1, *model.sample_shape), jnp.float32)
    variables = model.init(key, x_BHWC, jnp.zeros((1,), jnp.float32), {})
    return {"params": variables["params"], "constants": variables.get("constants", {})}


@functools.cache
def parameter_facts(model: Model) -> Mapping[str, placement.Fact]:
    """How each parameter is divided over a mesh, and whether it decays, by its path: what is said
    where it is made."""
    x_BHWC = jax.ShapeDtypeStruct((1, *model.sample_shape), jnp.float32)
    level_B = jax.ShapeDtypeStruct((1,), jnp.float32)
    with placement.collected_facts() as facts, placement.nowhere():
        jax.eval_shape(lambda x, t: model.init(jax.random.key(0), x, t, {}), x_BHWC, level_B)
    return facts


def variable_shapes(module: nn.Module, example: tuple[int, ...]) -> Any:
    """Shapes and dtypes of the variables of another module (autoencoder, FID network), which takes
    (B, *example) float32; traced once for everybody who asks, too."""
    return jax.eval_shape(lambda: _variables_of(module, example))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _variables_of(module: nn.Module, example: tuple[int, ...]) -> Any:
    return module.init(jax.random.key(0), jnp.zeros((1, *example), jnp.float32))


def as_network(
    model: Model,
    variables: Mapping[str, Any],
    *,
    forward_mode: bool = False,
    capture: int | None = None,
    inner: bool = False,
) -> Callable[[jax.Array, jax.Array, Any], Any]:
    """The network as the function `(x_BHWC, noise_level_B, conditioning) -> y_BHWC` that diffusion
    processes know.

    Call it inside jit with `variables` (`params` and `constants`) an argument of the jitted
    function: captured from outside, they would become constants of the program.

    Args:
      model: the network.
      variables: of it.
      forward_mode: whether `jax.jvp` is to go through it: attention is then computed by XLA, since
        kernels have a backward pass only.
      capture: number of a block, from 0 (in the U: of the encoder), after which its tokens are
        wanted: the function returns (y_BHWC, tokens).
      inner: whether the output of a model's inner head is wanted: it returns (y_BHWC, y_inner). A
        model that has one returns both; everybody else sees y_BHWC.
    """
    if forward_mode:
        model = model.with_xla_attention()
    settings: dict[str, Any] = {} if capture is None else {"capture": capture}

    def network(x_BHWC: jax.Array, noise_level_B: jax.Array, conditioning: Any) -> Any:
        found: Any = model.apply(variables, x_BHWC, noise_level_B, conditioning, **settings)
        return found[0] if isinstance(found, tuple) and not (inner or settings) else found

    return network


def attention_in_words(model: Model, platform: str) -> str:
    """How a network computes attention on a platform, as devices name it, and why, for people:
    "xla (the kernel does not serve it: …)"."""
    backend, reason = model.attention_backend(platform)
    if not reason and model.attention == "auto":
        reason = platforms.of(platform).auto_reason
    elif not reason:
        reason = "as the config says"
    return f"{backend} ({reason})"
