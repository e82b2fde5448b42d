"""The networks, as pure Flax modules: shapes in, shapes out."""

from diffit_jax.models.diffit.image import ImageDiffiT
from diffit_jax.models.diffit.latent import LatentDiffiT
from diffit_jax.models.model import (
    Model,
    as_network,
    attention_in_words,
    init_variables,
    parameter_facts,
    variable_shapes,
)

MODELS = {"image_diffit": ImageDiffiT, "latent_diffit": LatentDiffiT}
